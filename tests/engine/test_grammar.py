"""Constrained decoding: what the masks allow is the grammar, no more and no less, at bounded cost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_walk import allowed, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine import grammar as grammar_module
from qwench.engine import grammar_source
from qwench.engine.grammar import GrammarCompiler, GrammarError, fill_masks
from qwench.tokenizer import Tokenizer
from qwench.types import Grammar

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
RANKS = ASSETS / "qwen.tiktoken"
EXTRA_ROWS = 75

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": ["x", "é", 3, None, True]}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 1000},
    {"type": "integer", "multipleOf": 7, "minimum": 14, "maximum": 700},
    {"const": {"k": [1, "two"]}},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 3}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}}, {"required": ["a"]}]},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    },
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "string", "format": "date"},
]
REGEXES = [r"[a-z]{3}-\d{1,2}", r"(yes|no)( please)?", r"é+🙂?", r"[^\n]{0,12}", r"(?s:.){0,8}", "^x*$", ""]


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", value=json.dumps(value))


@pytest.fixture(scope="module")
def compiler(tiny_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size + EXTRA_ROWS)


@pytest.fixture(scope="module")
def real() -> GrammarCompiler:
    if not RANKS.exists():
        pytest.skip(f"no {RANKS.name} in QWENCH_ASSETS ({ASSETS})")
    return GrammarCompiler(Tokenizer.load(RANKS), 151_936)


def feed(compiler: GrammarCompiler, matcher: grammar_module.Matcher, text: str) -> bool:
    """Whether the matcher takes the text."""
    for token in compiler.tokenizer.encode(text):
        try:
            matcher.consume(token)
        except ValueError:
            return False
    return True


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


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "must be an object"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"not": {"type": "string"}}', '"not"'),
        ("json_schema", '{"type": "string", "format": "nonsense"}', "nonsense"),
        ("json_schema", '{"$ref": "#/$defs/missing"}', "missing"),
        ("json_schema", '{"$ref": "#"}', "no text satisfies it"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "anyOf"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}', "minimum"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"\bword", "lookarounds"),
        ("regex", "\ud800", "surrogate"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", 1]', "list of strings"),
        ("choice", '"a"', "list of strings"),
        ("lark", "start: missing", "missing"),
        ("lark", '{"grammars": []}', "lark grammar"),
        ("gbnf", "root ::= x", "known kinds"),
    ],
)
def test_invalid_grammars_say_what_is_wrong(compiler: GrammarCompiler, kind: Any, value: str, match: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(ValueError, match=re.escape(match)) as caught:
            compiler.compile(Grammar(kind=kind, value=value))
        assert "\n" not in str(caught.value)


def chain(links: int, right: str) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: " + right.format(i + 1) for i in range(links)) + f'\nr{links}: "c"'


REFUSED = {
    "long": Grammar(kind="regex", value="a" * 300_000),
    "deep regex": Grammar(kind="regex", value="(" * 5000 + ")" * 5000),
    "deep schema": Grammar(kind="json_schema", value='{"items":' * 5000 + "{}" + "}" * 5000),
    "deep lark": Grammar(kind="lark", value="start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "remainders": schema({"type": "integer", "multipleOf": 999_983}),
    "decimal remainders": schema({"type": "number", "multipleOf": 12345.678}),
    "remainders in lark": Grammar(kind="lark", value='start: %json {"multipleOf": 999983}'),
    "product of alternatives": schema(
        {"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}} for j in range(4)]} for i in range(10)]}
    ),
    "intersection of patterns": schema({"allOf": [{"pattern": f"^(.*{c}.*){{5}}$"} for c in "abcdefghij"]}),
    "many references": schema(
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(4000)},
                "d4000": {},
            },
        }
    ),
}


SUSPECT = {
    "exponential": Grammar(kind="regex", value="(a?){1000}a{1000}"),
    "many optional parts": Grammar(kind="regex", value="a?" * 5000),
    "long forced text": Grammar(kind="regex", value="[bc]a{1000000}"),
    "states": Grammar(kind="regex", value="(?s:.*)a(?s:.{500})b"),
    "counted words": Grammar(kind="regex", value=r"(\w{1,200}\W){1,200}"),
    "left recursion through many rules": Grammar(kind="lark", value=chain(2000, 'r{0} "a" | "b"')),
    "doubling": Grammar(kind="lark", value=chain(500, "r{0} r{0}").replace('"c"', '"c"?')),
    "nested repetition": Grammar(kind="lark", value='start: x{0,1000000}\nx: y{0,1000000}\ny: "a"{0,1000000}'),
    "ambiguity": Grammar(kind="lark", value='start: s\ns: s s | "a" | ""'),
    "forbidden text": Grammar(kind="lark", value="start: X\nX: /(?s:.*)/ & ~/(?s:.*)(a.{30}b|c.{30}d)(?s:.*)/"),
    "large list": schema({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**6}}),
    "large enum": schema({"enum": [f"value {number}" for number in range(10_000)]}),
    "long string": schema({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}),
    "many properties": schema({"properties": {f"property_{number}": {} for number in range(1000)}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_grammars_are_refused(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(REFUSED[name])
    assert len(str(caught.value)) < 600


def check_suspect(compiler: GrammarCompiler, name: str) -> None:
    """It may be refused, or fail on the way, or work; never does it crash or refuse in another manner."""
    rng, message = random.Random(4), ""
    try:
        matcher = compiler.compile(SUSPECT[name])
        for _ in range(30):
            choices = [token for token in allowed(matcher) if token not in compiler.eos_token_ids]
            if not choices:
                break
            matcher.consume(rng.choice(choices))
    except GrammarError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("name", SUSPECT)
def test_suspect_grammars_do_no_harm(compiler: GrammarCompiler, name: str) -> None:
    check_suspect(compiler, name)


@pytest.mark.real
@pytest.mark.parametrize("name", SUSPECT)
def test_suspect_grammars_do_no_harm_in_the_real_vocabulary(real: GrammarCompiler, name: str) -> None:
    check_suspect(real, name)


def test_deep_but_harmless_grammars_compile(compiler: GrammarCompiler) -> None:
    """Recursion that would overflow a usual stack."""
    matcher = compiler.compile(Grammar(kind="lark", value=chain(5000, '"a" r{0} | "b"')))
    assert feed(compiler, matcher, "aaab")
    assert matcher.is_finished


def test_compilation_is_given_up_after_its_budget(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size)
    big = schema({"enum": [f"value number {number}" for number in range(9000)]})  # tens of milliseconds at the least
    monkeypatch.setattr(grammar_source, "COMPILE_BUDGET_S", 1e-4)
    with pytest.raises(GrammarError, match=r"to compile; simplify|try again"):
        compiler.compile(big)
    monkeypatch.undo()
    assert compiler.compile(big).error is None  # it was not remembered as a bad one


def test_a_mask_that_runs_out_of_fuel_fails_alone(compiler: GrammarCompiler) -> None:
    good = compiler.compile(Grammar(kind="regex", value="a+"))
    bad = compiler.compile(Grammar(kind="regex", value="b?(a?){1000}a{1000}"))
    innocent = compiler.compile(Grammar(kind="regex", value="b?(a?){1000}a{1000}"))
    a, b = (compiler.tokenizer.vocabulary.ranks[letter] for letter in (b"a", b"b"))
    rows = np.zeros((3, compiler.num_words), np.int32)
    for _ in range(50):
        with contextlib.suppress(GrammarError):
            fill_masks([good, bad, innocent], rows)
            good.consume(a)
            bad.consume(a)
    assert "cannot be followed" in str(bad.error)
    assert (good.error, innocent.error) == (None, None)
    with pytest.raises(GrammarError):
        fill_masks([good, bad, innocent], rows)
    assert (rows[1] == compiler.end_mask).all()
    assert a in allowed(good)
    innocent.consume(b)  # has an automaton of its own


def test_a_shared_automaton_in_error_is_replaced(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that share an automaton survive the one that broke it, where they were."""
    monkeypatch.setattr(grammar_module, "_MAX_AUTOMATA", 1)
    value = Grammar(kind="regex", value="x*(b+|(a?){1000}a{1000})")
    first, second = compiler.compile(value), compiler.compile(value)
    a, b, x = (compiler.tokenizer.vocabulary.ranks[letter] for letter in (b"a", b"b", b"x"))
    second.consume(x)
    second.consume(b)
    before = allowed(second)
    for _ in range(50):
        with contextlib.suppress(GrammarError):
            allowed(first)
            first.consume(a)
    assert first.error is not None
    assert allowed(second) == before
    second.consume(b)
    second.rollback(2)
    assert a in allowed(second)
    assert allowed(compiler.compile(value))  # a new request gets a sound one


def test_a_slow_batch_is_searched_for_the_one_at_fault(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matchers = [compiler.compile(Grammar(kind="regex", value=f"[a-{letter}]+")) for letter in "bcd"]
    rows = np.zeros((3, compiler.num_words), np.int32)
    monkeypatch.setattr(grammar_module, "MASK_BUDGET_S", -1.0)  # every mask is too slow now
    fill_masks(matchers, rows)
    assert compiler.is_suspicious
    with pytest.raises(GrammarError, match="a mask takes more than"):
        fill_masks(matchers, rows)
    assert all(matcher.error for matcher in matchers)
    assert (rows == compiler.end_mask).all()
    monkeypatch.undo()
    others = [compiler.compile(Grammar(kind="regex", value="[a-b]+")) for _ in range(2)]
    fill_masks(others, rows)  # nothing of it stays


def test_known_grammars_are_not_compiled_again(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size)
    count = 0
    original = grammar_module.compile_guarded

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments)

    monkeypatch.setattr(grammar_module, "compile_guarded", counted)
    value = schema(SCHEMAS[0])
    for _ in range(5):
        matcher = compiler.compile(value)
        assert feed(compiler, matcher, '{"a": 1}')
        del matcher
    assert count == 1
    held = [compiler.compile(schema(SCHEMAS[0])) for _ in range(40)]
    assert count == grammar_module._MAX_AUTOMATA
    assert feed(compiler, held[0], '{"a": 1')
    assert feed(compiler, held[39], '{"a": 2')
    for number in range(grammar_module._MAX_GRAMMARS):
        compiler.compile(Grammar(kind="regex", value=f"a{{{number + 1}}}"))
    before = count
    compiler.compile(value)
    assert count == before + 1  # it was the oldest


def test_threads_share_a_compiler(compiler: GrammarCompiler) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = random.Random(seed)
            for value in SCHEMAS[:6]:
                json.loads(walk(compiler, compiler.compile(schema(value)), rng, patience=10))
        except BaseException as error:  # reported below; a thread's own traceback would be lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_fewer_rows_than_tokens(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="vocab_rows"):
        GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size - 1)


@pytest.mark.real
def test_every_real_token_has_its_bytes(real: GrammarCompiler) -> None:
    """A grammar of exactly the token's bytes allows it, for one token in 997 of the real vocabulary."""
    tok = real.tokenizer
    for token in range(0, tok.num_regular, 997):
        data = tok.token_bytes(token)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        matcher = real.compile(Grammar(kind="choice", value=json.dumps([text, text + "x"])))
        matcher.consume(token)
        assert matcher.is_complete, data
    assert list(real.lltokenizer.eos_tokens) == [151_645, 151_643]
    assert real.lltokenizer.vocab_size == 151_936
