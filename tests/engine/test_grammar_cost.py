"""Grammars that are refused, that fail or that cost too much, and what is kept between answers."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from typing import Any

import numpy as np
import pytest
from grammar_walk import SCHEMAS, allowed, feed, schema, walk

from qwench.engine import grammar as grammar_module
from qwench.engine import grammar_source
from qwench.engine.grammar import GrammarCompiler, GrammarError, fill_masks
from qwench.tokenizer import Tokenizer
from qwench.types import Grammar


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
