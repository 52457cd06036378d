"""Constrained decoding: what the masks allow is the grammar, no more and no less, at bounded cost."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from grammar_walk import SCHEMAS, allowed, feed, schema, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine import grammar as grammar_module
from qwench.engine.grammar import GrammarCompiler, fill_masks
from qwench.types import Grammar

REGEXES = [r"[a-z]{3}-\d{1,2}", r"(yes|no)( please)?", r"é+🙂?", r"[^\n]{0,12}", r"(?s:.){0,8}", "^x*$", ""]


def check_walks(compiler: GrammarCompiler, rounds: int) -> None:
    rng = random.Random(1)
    for value in SCHEMAS:
        validator = jsonschema.Draft202012Validator(value)
        for _ in range(rounds):
            text = walk(compiler, compiler.compile(schema(value)), rng)
            validator.validate(json.loads(text))
            assert re.search(r"\s{66}", re.sub(r'"(\\.|[^"\\])*"', "s", text)) is None, "endless white space"
    for pattern in REGEXES:
        for _ in range(rounds):
            text = walk(compiler, compiler.compile(Grammar(kind="regex", value=pattern)), rng)
            assert re.fullmatch(pattern, text), (pattern, text)
    choices = ["yes", "yes!", "no", "", "a\nb", "🙂", '"q\\"', "<tool_call>", "\x00\x7f"]
    seen = set()
    for _ in range(rounds * 5):
        seen.add(walk(compiler, compiler.compile(Grammar(kind="choice", value=json.dumps(choices))), rng))
    assert seen <= set(choices)
    assert len(seen) > 1
    for _ in range(rounds):
        assert isinstance(json.loads(walk(compiler, compiler.compile(Grammar(kind="json_object")), rng)), dict)
    lark = Grammar(kind="lark", value='start: "(" start ")" | /[0-9]+/')
    for _ in range(rounds):
        text = walk(compiler, compiler.compile(lark), rng)
        depth = text.count("(")
        assert re.fullmatch(r"\(" * depth + r"[0-9]+" + r"\)" * depth, text)


def test_random_answers_are_valid(compiler: GrammarCompiler) -> None:
    check_walks(compiler, rounds=6)


@pytest.mark.real
def test_random_answers_are_valid_in_the_real_vocabulary(real: GrammarCompiler) -> None:
    check_walks(real, rounds=2)


@settings(max_examples=60, deadline=None)
@given(choices=st.lists(st.text(max_size=8), min_size=1, max_size=5), data=st.data())
def test_any_choice_can_be_taken(compiler: GrammarCompiler, choices: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(choices))
    matcher = compiler.compile(Grammar(kind="choice", value=json.dumps(choices)))
    # Byte by byte, which needs no spelling that the encoder would give.
    ranks = compiler.tokenizer.vocabulary.ranks
    for byte in chosen.encode():
        matcher.consume(ranks[bytes([byte])])
    assert matcher.is_complete
    assert compiler.tokenizer.im_end_id in allowed(matcher)


def test_usual_spellings_are_accepted(compiler: GrammarCompiler) -> None:
    value = schema({"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "string"}}})
    for table in ({"a": [1, {"x": None}], "b": "é"}, {"a": []}, {}):
        for indent in (None, 2, 4, "\t"):
            for text in (json.dumps(table, indent=indent), json.dumps(table, separators=(",", ":"))):
                matcher = compiler.compile(value)
                assert feed(compiler, matcher, text), text
                assert matcher.is_complete
    assert not feed(compiler, compiler.compile(value), '{"a":  []}')
    assert not feed(compiler, compiler.compile(value), ' {"a": []}')


def test_only_tokens_that_continue_the_text_are_allowed(compiler: GrammarCompiler) -> None:
    """The mask of a regex in which every byte counts, against the definition: token by token over the vocabulary."""
    tok = compiler.tokenizer
    words = ["the", "then", "self"]
    matcher = compiler.compile(Grammar(kind="choice", value=json.dumps(words)))
    expected = {i for i in range(tok.num_regular) if any(w.encode().startswith(tok.token_bytes(i)) for w in words)}
    assert set(allowed(matcher)) == expected
    assert len(expected) > 3


def test_what_no_text_has_is_never_allowed(compiler: GrammarCompiler) -> None:
    """Padding rows, control tokens in text, and the byte FF, even where the grammar allows every token."""
    tok = compiler.tokenizer
    anything = set(allowed(compiler.compile(Grammar(kind="lark", value="start: <[*]>"))))
    assert anything == set(range(tok.vocab_size)) - {tok.vocabulary.ranks[b"\xff"]}
    text = set(allowed(compiler.compile(Grammar(kind="regex", value="(?s:.*)"))))
    assert text.isdisjoint(set(tok.special_ids.values()) - set(tok.eos_token_ids))
    assert set(tok.eos_token_ids) < text
    rows = np.full((2, compiler.num_words), -1, np.int32)
    fill_masks([compiler.compile(Grammar(kind="lark", value="start: <[*]>")) for _ in range(2)], rows)
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    assert [set(np.flatnonzero(line)) for line in bits] == [anything, anything]


def illegal(compiler: GrammarCompiler, matcher: grammar_module.Matcher) -> list[int]:
    """What llguidance itself allows, but no answer may have."""
    row = np.zeros(compiler.num_words, np.int32)
    matcher.raw.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    bad = row & ~compiler.legal_mask
    return np.flatnonzero(np.unpackbits(bad.view(np.uint8), bitorder="little")).tolist()


def check_no_mask_needs_legal_ones(compiler: GrammarCompiler) -> None:
    """llguidance allows tokens without bytes only where a grammar names them by number."""
    rng = random.Random(5)
    texts = [Grammar(kind="regex", value=value) for value in [*REGEXES, r"(?s:.)*"]]
    texts += [schema(value) for value in SCHEMAS] + [Grammar(kind="json_object")]
    texts += [Grammar(kind="lark", value="start: /(?s:.){3}/ <|im_start|> /[^a]*/")]
    for value in texts:
        matcher = compiler.compile(value)
        assert not matcher.names_ids
        for _ in range(12):
            assert illegal(compiler, matcher) == []
            choices = [t for t in allowed(matcher) if t not in compiler.eos_token_ids]
            if not choices:
                break
            matcher.consume(rng.choice(choices))
    for value in ("start: <[*]>", "start: <[^1-5]>", f'start: "a" | <[0-{compiler.vocab_rows - 1}]>'):
        matcher = compiler.compile(Grammar(kind="lark", value=value))
        assert matcher.names_ids
        assert illegal(compiler, matcher)
        rows = np.zeros((3, compiler.num_words), np.int32)
        fill_masks([matcher, compiler.compile(schema(SCHEMAS[0]))], rows, [2, 0])
        for row in (rows[2], np.array(rows[2])):
            assert not (row & ~compiler.legal_mask).any()
            matcher.fill_mask(row)
        assert not rows[1].any()


def test_no_mask_needs_the_legal_ones(compiler: GrammarCompiler) -> None:
    check_no_mask_needs_legal_ones(compiler)


@pytest.mark.real
def test_no_mask_needs_the_legal_ones_in_the_real_vocabulary(real: GrammarCompiler) -> None:
    check_no_mask_needs_legal_ones(real)


def test_whether_it_is_finished_is_what_llguidance_says(compiler: GrammarCompiler) -> None:
    rng = random.Random(11)
    seen = set()
    for value in [*map(schema, SCHEMAS), *(Grammar(kind="regex", value=value) for value in REGEXES)]:
        matcher, beside = compiler.compile(value), compiler.compile(schema(SCHEMAS[0]))
        rows, ends = np.zeros((2, compiler.num_words), np.int32), 0
        for _ in range(60):
            fill_masks([matcher, beside], rows)
            assert matcher.is_finished == (ends > 0 or matcher.raw.is_stopped())
            seen.add(matcher.is_finished)
            taken = len(matcher._tokens) + ends
            if taken and rng.random() < 0.3:
                back = rng.randint(1, min(3, taken))
                ends = max(0, ends - back)
                matcher.rollback(back)
            else:
                choice = rng.choice(allowed(matcher))
                ends += choice in compiler.eos_token_ids
                matcher.consume(choice)
            assert matcher.is_finished == (ends > 0 or matcher.raw.is_stopped())
            assert matcher.copy().is_finished == matcher.is_finished
    assert seen == {False, True}


def test_end_tokens(compiler: GrammarCompiler) -> None:
    tok = compiler.tokenizer
    matcher = compiler.compile(Grammar(kind="regex", value="ab?"))
    a, b = tok.vocabulary.ranks[b"a"], tok.vocabulary.ranks[b"b"]
    with pytest.raises(ValueError, match="not allowed"):
        matcher.consume(tok.im_end_id)
    matcher.consume(a)
    assert not matcher.is_finished
    assert set(allowed(matcher)) == {b, *tok.eos_token_ids}
    for end in tok.eos_token_ids:
        twin = matcher.copy()
        twin.consume(end)
        assert twin.is_finished
        assert set(allowed(twin)) == set(tok.eos_token_ids)
        with pytest.raises(ValueError, match="not allowed"):
            twin.consume(b)
    matcher.consume(b)
    assert matcher.is_finished
    assert set(allowed(matcher)) == set(tok.eos_token_ids)


def test_rollback_and_copies(compiler: GrammarCompiler) -> None:
    tok = compiler.tokenizer
    matcher = compiler.compile(schema(SCHEMAS[0]))
    ids = tok.encode('{"a": 12, "b": "x y"}')
    masks = []
    for token in ids:
        masks.append(allowed(matcher))
        matcher.consume(token)
    matcher.consume(tok.im_end_id)
    matcher.rollback(1)
    assert not matcher.error
    for step in reversed(range(len(ids))):
        matcher.rollback(1)
        assert allowed(matcher) == masks[step]
    with pytest.raises(ValueError, match="cannot be taken back"):
        matcher.rollback(1)
    matcher.consume(ids[0])
    twin = matcher.copy()
    for token in ids[1:]:
        matcher.consume(token)
    assert matcher.is_finished
    assert allowed(twin) == masks[1]
    with pytest.raises(ValueError, match="not allowed"):
        twin.consume(tok.encode("z")[0])
    assert allowed(twin) == masks[1]  # a refused token changes nothing
    twin.consume(ids[1])


BRANCHES = Grammar(kind="lark", value='start: ("a" EQ "[" | "b" EQ "(" | "(" start ")")*\nEQ: /=+/')


@pytest.mark.parametrize("value", [BRANCHES, *map(schema, SCHEMAS[:4])])
def test_masks_after_rollbacks_equal_those_of_a_fresh_matcher(compiler: GrammarCompiler, value: Grammar) -> None:
    rng = random.Random(8)
    matcher = compiler.compile(value)
    taken: list[int] = []
    for _ in range(120):
        if taken and rng.random() < 0.3:
            back = rng.randint(1, min(4, len(taken)))
            matcher.rollback(back)
            del taken[-back:]
        fresh = compiler.compile(value)
        for token in taken:
            fresh.consume(token)
        choices = allowed(matcher)
        assert choices == allowed(fresh)
        if choices := [token for token in choices if token not in compiler.eos_token_ids]:
            taken.append(rng.choice(choices))
            matcher.consume(taken[-1])


def test_forced_tokens_are_our_encoding(compiler: GrammarCompiler) -> None:
    text = "return self.function(value)"
    matcher = compiler.compile(Grammar(kind="choice", value=json.dumps([text + "1", text + "2"])))
    forced = matcher.forced_tokens()
    assert forced
    assert compiler.tokenizer.encode(text + "1")[: len(forced)] == forced
    for token in forced:
        assert allowed(matcher) == [token]
        matcher.consume(token)


def test_forced_text_that_is_not_normalised(compiler: GrammarCompiler) -> None:
    text = "e\u0301 \u212b"  # NFC would write it otherwise
    assert walk(compiler, compiler.compile(Grammar(kind="choice", value=json.dumps([text]))), random.Random(0)) == text


def test_batches_equal_single_masks(compiler: GrammarCompiler) -> None:
    matchers = [compiler.compile(schema(value)) for value in SCHEMAS]
    rng = random.Random(3)
    for _ in range(12):
        block = np.full((len(matchers), compiler.num_words), -1, np.int32)
        rows = [np.full(compiler.num_words, -1, np.int32) for _ in matchers]
        at = rng.sample(range(len(matchers)), len(matchers))
        fill_masks(matchers, block, at)
        block = block[at]
        fill_masks(matchers, rows)
        for index, matcher in enumerate(matchers):
            single = np.empty(compiler.num_words, np.int32)
            matcher.fill_mask(single)
            assert (block[index] == single).all()
            assert (rows[index] == single).all()
            choices = [t for t in allowed(matcher) if t not in compiler.eos_token_ids]
            matcher.consume(rng.choice(choices) if choices else compiler.tokenizer.im_end_id)


def test_wrong_rows(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar(kind="json_object"))
    for row in (np.zeros(3, np.int32), np.zeros(compiler.num_words, np.int64), np.zeros((99, 2), np.int32)[:, 0]):
        with pytest.raises(ValueError, match="a mask"):
            matcher.fill_mask(row)
    with pytest.raises(ValueError, match="need as many rows"):
        fill_masks([matcher, matcher.copy()], np.zeros((1, compiler.num_words), np.int32))
    with pytest.raises(ValueError, match="need as many rows"):
        fill_masks([matcher, matcher.copy()], np.zeros((2, compiler.num_words), np.int32), [1, 2])
