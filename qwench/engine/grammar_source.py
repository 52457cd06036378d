"""From a `Grammar` to what llguidance compiles, and what a grammar may cost: its text, its compilation, its limits.

Not the masks (`grammar.py`), and no vocabulary. Every refusal is a `GrammarError`, which is a ValueError for users.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, get_args

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from qwench.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_WHITESPACE = r" |\n( {0,64}|\t{0,16})"
"""What may stand, at most once, between two tokens of JSON: a blank, or a line end and the indentation after it. Both
`{"a": 1}` and indented JSON fit; a model that writes blanks for ever does not."""
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": JSON_WHITESPACE,
    "json_allow_general_unicode_escapes": True,
}
"""llguidance's options for JSON. Any character may be written as \\uXXXX, as JSON has it."""

MAX_GRAMMAR_CHARS = 1 << 18
MAX_MULTIPLE_OF = 100_000
"""Largest multipleOf, decimal point and trailing zeros aside: its automaton has a state for each remainder."""
COMPILE_BUDGET_S = 1.0

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=50_000,  # some 1.5 kB each
    max_grammar_size=50_000,
    verbose_errors=False,
)
_STACK_BYTES = 512 << 20
"""Compilation recurses over chains of rules and references: some 10 kB a link, and the text allows 20,000 links."""
_MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*([-+.\w]+)')


class GrammarError(ValueError):
    """A grammar that cannot be used, or that became too expensive on the way."""


class BusyError(GrammarError):
    """Compilation was given up for time; on a machine less busy the same grammar may work."""


# ----------------------------------------------------------------------------------------- from Grammar to llguidance
def lower(grammar: Grammar) -> str:
    """The grammar in llguidance's JSON form. Raises GrammarError for what can be seen without compiling."""
    if grammar.kind not in get_args(GrammarKind):
        raise GrammarError(f"no grammar kind {grammar.kind!r}; known kinds are {', '.join(get_args(GrammarKind))}")
    if len(grammar.value) > MAX_GRAMMAR_CHARS:
        raise GrammarError(
            f"the {grammar.kind} grammar has {len(grammar.value)} characters; at most {MAX_GRAMMAR_CHARS} are accepted"
        )
    try:
        grammar.value.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"the {grammar.kind} grammar holds half of a surrogate pair, which is no text") from None
    if grammar.kind == "json_object":
        return _lower_schema({"type": "object"})
    if grammar.kind == "json_schema":
        return _lower_schema(_json(grammar.value, "the JSON schema"))
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_regex(_alternatives(_json(grammar.value, "the list of choices")))
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.value)
    _check_multiples(grammar.value)
    return json.dumps({"grammars": [{"lark_grammar": grammar.value}]})


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} is not valid JSON: {error}") from None


def _lower_schema(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError('a JSON schema must be an object such as {"type": "object", "properties": {...}}')
    if "x-guidance" in schema:
        raise GrammarError('the JSON schema has the key "x-guidance", which is not part of JSON Schema; leave it out')
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema cannot be used: {error}") from None
    _check_multiples(text)
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(f"the JSON schema cannot be used: {first_line(str(error))}") from None


def _check_multiples(text: str) -> None:
    for number in _MULTIPLE_OF.findall(text):
        try:
            digits = "".join(map(str, Decimal(number).as_tuple().digits)).rstrip("0")
        except InvalidOperation:
            continue  # no number; llguidance says so
        if len(digits) > 9 or int(digits or "0") > MAX_MULTIPLE_OF:
            raise GrammarError(f"multipleOf {number} is too expensive; at most {MAX_MULTIPLE_OF} can be constrained")


def _alternatives(choices: Any) -> str:
    """A regular expression for one of the strings."""
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError('choices must be a JSON list of strings with at least one, such as ["yes", "no"]')
    try:
        "".join(choices).encode()
    except UnicodeEncodeError:
        raise GrammarError("a choice holds half of a surrogate pair, which is no text") from None
    return "|".join("".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in s) for s in choices)


def first_line(message: str) -> str:
    """llguidance's message without dumps and without options that users do not have."""
    if message.startswith("panic"):
        return "it is too large or too deeply nested"
    if message.startswith("oneOf constraints"):
        return "oneOf needs alternatives that exclude each other; use anyOf"
    if "NoExtension" in message:
        return "no text satisfies it"
    line = message.partition("\n")[0].replace("<non-verbose/>", "").strip()
    line = line if len(line) <= 200 else line[:200] + "..."
    detail = re.search(r"^error: (.*)$", message, re.MULTILINE)  # how errors in regular expressions end
    return f"{line} {detail[1]}" if detail else line


# -------------------------------------------------------------------------------------------------------- compilation
@cache
def _workers() -> ThreadPoolExecutor:
    """Two threads with deep stacks, which compile without Python's lock."""
    pool, ready = ThreadPoolExecutor(2, thread_name_prefix="grammar"), threading.Barrier(3)
    before = threading.stack_size(_STACK_BYTES)  # reserved, not used: only touched pages count
    try:
        for _ in range(2):
            pool.submit(ready.wait)
    finally:
        threading.stack_size(before)
    ready.wait()
    return pool


_workers_lock = threading.Lock()


def compile_guarded(build: Callable[[], LLMatcher], kind: str) -> tuple[LLMatcher, float]:
    """A compiled matcher and the seconds it took. Raises GrammarError for an invalid or too expensive grammar.

    What llguidance's own limits let through is given up after `COMPILE_BUDGET_S`; the thread then ends in its own time.
    """
    began = threading.Event()

    def work() -> tuple[LLMatcher, float]:
        began.set()
        started = time.perf_counter()
        matcher = build()
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is a part of the cost, and finds grammars without any text
        return matcher, time.perf_counter() - started

    with _workers_lock:
        future: Future[tuple[LLMatcher, float]] = _workers().submit(work)
    if not began.wait(COMPILE_BUDGET_S):
        if future.cancel():
            raise BusyError("too many expensive grammars are being compiled; try again")
        began.wait()
    try:
        matcher, seconds = future.result(COMPILE_BUDGET_S)
    except FutureTimeoutError:
        raise BusyError(f"the {kind} grammar takes more than {COMPILE_BUDGET_S} s to compile; simplify it") from None
    if matcher.is_error():
        raise GrammarError(f"the {kind} grammar cannot be used: {first_line(matcher.get_error())}")
    return matcher, seconds


def check_schema(schema: Any) -> None:
    """Raises GrammarError if a JSON schema uses what cannot be constrained, whatever the vocabulary."""
    _check_lowered(_lower_schema(schema))


@lru_cache(maxsize=512)
def _check_lowered(lowered: str) -> None:
    compile_guarded(lambda: LLMatcher(_bytes_alone(), lowered, limits=LIMITS, log_level=0), "json_schema")


@cache
def _bytes_alone() -> LLTokenizer:
    return LLTokenizer("byte")
