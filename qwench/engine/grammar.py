"""Constrained decoding: which tokens may come next so that an answer follows a grammar. [llguidance]

llguidance holds the automata; this file gives it our vocabulary, keeps compiled grammars, and ends an answer whose
masks become too expensive. It does not sample and knows nothing of the model. `grammar_source.py` prepares grammars and
bounds their compilation; `tool_grammar.py` writes those of tool calls.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from qwench.engine.grammar_source import LIMITS, BusyError, GrammarError, compile_guarded, first_line, lower
from qwench.engine.tool_grammar import tool_grammar
from qwench.tokenizer import Tokenizer
from qwench.types import Grammar

__all__ = ["GrammarCompiler", "GrammarError", "Matcher", "fill_masks", "tool_grammar"]

MASK_BUDGET_S = 0.1
"""Processor time of one mask; usual ones take far less than a millisecond."""
_SHARED_ABOVE_S = 0.1
"""A grammar that takes longer to compile has one automaton."""
_MAX_GRAMMARS, _MAX_AUTOMATA, _MAX_AUTOMATON_TOKENS = 64, 8, 50_000


class _Vocabulary:
    """Our tokenizer in the form that llguidance asks for."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, num_rows: int) -> None:
        # An empty entry is never allowed: rows beyond the vocabulary, and the byte FF, which no UTF-8 text holds and by
        # which llguidance marks control tokens.
        self.tokens = [b"" if (token := tokenizer.token_bytes(i)) == b"\xff" else token for i in range(num_rows)]
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Tokens of forced text; their bytes must be the text's, which normalisation might change."""
        ids = self._tokenizer.encode(text)
        if self._tokenizer.decode_bytes(ids) == text.encode():
            return ids
        ranks = self._tokenizer.vocabulary.ranks
        return [ranks[bytes([byte])] for byte in text.encode()]


@dataclass(eq=False)
class _Automaton:
    """A compiled matcher at the beginning of its grammar. Copies of it share what was computed, and a lock."""

    raw: LLMatcher
    users: weakref.WeakSet[Matcher] = field(default_factory=weakref.WeakSet)
    num_tokens: int = 0
    """Consumed by all users: the states that they visited stay in memory."""


@dataclass(eq=False)
class _Compiled:
    """A grammar's automata: one for every few answers that are being written, so that they need not wait."""

    lowered: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    automata: list[_Automaton] = field(default_factory=list)
    seconds: float = 0.0

    def free(self) -> _Automaton | None:
        """The automaton for another answer, or None if one more should be compiled."""
        self.automata = [a for a in self.automata if a.num_tokens < _MAX_AUTOMATON_TOKENS]
        best = min(self.automata, key=lambda automaton: len(automaton.users), default=None)
        enough = len(self.automata) >= _MAX_AUTOMATA or self.seconds > _SHARED_ABOVE_S
        return best if best is not None and (enough or not best.users) else None


class GrammarCompiler:
    """Compiles grammars for one vocabulary; safe to use from several threads.

    >>> matcher = GrammarCompiler(tok, 151_936).compile(Grammar(kind="choice", value='["yes", "no"]'))
    >>> matcher.fill_mask(row)  # int32[4748]: bit i % 32 of word i // 32 is set if token i may come next
    >>> matcher.consume(9693)

    `vocab_rows` is the number of rows of the language model's head; rows beyond the vocabulary are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_rows: int) -> None:
        if vocab_rows < tokenizer.vocab_size:
            raise ValueError(f"vocab_rows is {vocab_rows}, but the tokenizer has {tokenizer.vocab_size} tokens")
        self.tokenizer, self.vocab_rows = tokenizer, vocab_rows
        self.num_words = -(-vocab_rows // 32)
        """Length of a mask row."""
        self.eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._lock = threading.Lock()
        self._build_lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, _Compiled | GrammarError] = OrderedDict()
        self.is_suspicious = False
        """Whether the last batch of masks took so long that one of its matchers must be at fault."""

    @property
    def lltokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it, built at first use (under a second for the real one)."""
        with self._build_lock:
            return self._lltokenizer

    @cached_property
    def _lltokenizer(self) -> LLTokenizer:
        self.tokenizer.encode("warm")  # the encoder is built at its first use, which no mask should wait for
        vocabulary: Any = _Vocabulary(self.tokenizer, self.vocab_rows)
        return LLTokenizer(vocabulary, eos_token=list(self.tokenizer.eos_token_ids))

    @cached_property
    def legal_mask(self) -> np.ndarray:
        """int32[num_words]: the tokens of the vocabulary."""
        ids = [i for i in range(self.tokenizer.vocab_size) if self.tokenizer.token_bytes(i) != b"\xff"]
        return self._mask_of(ids)

    @cached_property
    def end_mask(self) -> np.ndarray:
        """int32[num_words]: the end tokens."""
        return self._mask_of(self.tokenizer.eos_token_ids)

    def _mask_of(self, ids: Sequence[int]) -> np.ndarray:
        bits = np.zeros(self.num_words * 32, np.uint8)
        bits[ids] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of the grammar. Raises GrammarError (a ValueError) if it is invalid or expensive.

        Takes some milliseconds for a usual new grammar, microseconds for a known one, at most about two seconds for a
        hostile one; Python's lock is free meanwhile. Call it where waiting does no harm, not in the engine's loop.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is None:
                known = self._compiled[grammar] = _Compiled(lower(grammar))
                while len(self._compiled) > _MAX_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
        if isinstance(known, GrammarError):
            raise GrammarError(*known.args)
        with known.lock:
            automaton = known.free()
            if automaton is None:
                automaton = _Automaton(self._build(grammar, known))
                known.automata.append(automaton)
            return Matcher(self, grammar, known, automaton)

    def _build(self, grammar: Grammar, entry: _Compiled) -> LLMatcher:
        vocabulary = self.lltokenizer

        def build() -> LLMatcher:
            return LLMatcher(vocabulary, entry.lowered, limits=LIMITS, log_level=0)

        try:
            raw, entry.seconds = compile_guarded(build, grammar.kind)
        except BusyError:
            raise
        except GrammarError as error:
            with self._lock:
                self._compiled[grammar] = error
            raise
        return raw

    def rebuild(self, grammar: Grammar, entry: _Compiled) -> LLMatcher | None:
        """A matcher that shares nothing, after the shared one failed; None where that costs too much."""
        with self._lock:
            if self._compiled.get(grammar) is entry:
                del self._compiled[grammar]  # the automaton keeps its error
        if entry.seconds > _SHARED_ABOVE_S:
            return None
        try:
            return self._build(grammar, entry)
        except GrammarError:
            return None

    def check_row(self, row: np.ndarray) -> None:
        """Raises ValueError for what is no int32[num_words] in one stretch of memory."""
        if row.dtype != np.int32 or row.shape != (self.num_words,):
            raise ValueError(f"a mask is int32 [{self.num_words}], not {row.dtype} {list(row.shape)}")
        if not row.flags["C_CONTIGUOUS"] or not row.flags["WRITEABLE"]:
            raise ValueError("a mask must be writeable memory without gaps")


@cache
def _executor() -> LLExecutor:
    return LLExecutor(os.cpu_count() or 1)


def fill_masks(
    matchers: Sequence[Matcher], rows: Sequence[np.ndarray] | np.ndarray, at: Sequence[int] | None = None
) -> None:
    """The masks of a batch, on several threads with Python's lock free: rows[at[i]], int32[num_words], for matcher i.

    `rows` is best one array [any, num_words]; `at` are different ones of them, by default the first ones in order. All
    matchers are of one compiler. Raises the first GrammarError after every row was filled: `Matcher.error` says which
    failed, and their rows hold the end tokens alone. When a batch takes long, the next is done one by one, so that the
    matcher at fault is found and ended.
    """
    if not matchers:
        return
    at = range(len(matchers)) if at is None else at
    if len(at) != len(matchers) or min(at) < 0 or max(at) >= len(rows):
        raise ValueError(f"{len(matchers)} matchers need as many rows, but there are {min(len(at), len(rows))}")
    compiler = matchers[0].compiler
    if compiler.is_suspicious or len(matchers) == 1:
        compiler.is_suspicious = False
        for matcher, index in zip(matchers, at, strict=True):
            with contextlib.suppress(GrammarError):  # `Matcher.error` keeps it
                matcher.fill_mask(rows[index])
    elif isinstance(rows, np.ndarray):
        _fill_together(compiler, matchers, rows, at)
    else:
        block = np.empty((len(matchers), compiler.num_words), np.int32)
        _fill_together(compiler, matchers, block, range(len(matchers)))
        for mask, index in zip(block, at, strict=True):
            compiler.check_row(rows[index])
            rows[index][:] = mask
    for matcher in matchers:
        if matcher.error is not None:
            raise matcher.error


def _fill_together(
    compiler: GrammarCompiler, matchers: Sequence[Matcher], block: np.ndarray, at: Sequence[int]
) -> None:
    compiler.check_row(block[0])
    if not block.flags["C_CONTIGUOUS"]:
        raise ValueError("the masks must be one array without gaps, or a list of rows")
    work: list[tuple[Matcher, int]] = []
    for matcher, index in zip(matchers, at, strict=True):
        if matcher.compiler is not compiler:
            raise ValueError("the matchers of a batch must come from one GrammarCompiler")
        if matcher.error is not None or matcher.is_finished:
            block[index] = compiler.end_mask
        else:
            work.append((matcher, index))
    if not work:
        return
    work.sort(key=_automaton_of)
    started = time.perf_counter()
    raws = [(matcher.raw, index) for matcher, index in work]
    _executor().unsafe_compute_mask_ptr(raws, block.ctypes.data, compiler.num_words * 4, len(block))
    compiler.is_suspicious = time.perf_counter() - started > MASK_BUDGET_S
    for matcher, index in work:
        if matcher.names_ids or matcher.raw.is_stopped():
            with contextlib.suppress(GrammarError):  # `Matcher.error` keeps it
                matcher.check_mask(block[index])


def _automaton_of(entry: tuple[Matcher, int]) -> int:
    """Neighbours in a batch go to one thread, and matchers that share an automaton would wait for each other."""
    return entry[0].group


class Matcher:
    """Where one answer stands in its grammar. Not safe to use from several threads at once; made by `compile`."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, entry: _Compiled, automaton: _Automaton) -> None:
        self.compiler, self._grammar, self._entry = compiler, grammar, entry
        self._automaton: _Automaton | None = automaton
        automaton.users.add(self)
        self.raw = automaton.raw.deep_copy()
        """llguidance's matcher."""
        self.group = id(automaton)
        """Equal for matchers that share an automaton."""
        self.names_ids = grammar.kind == "lark" and "<[" in grammar.value
        """Whether the grammar may name tokens by number, of which some must never come."""
        self.error: GrammarError | None = None
        """Why this matcher cannot go on, once it cannot."""
        self._tokens: list[int] = []
        self._ends = 0  # end tokens consumed; llguidance does not see them
        self.is_finished = False
        """Whether an end token was consumed, or nothing else may come."""
        self._look()

    def _look(self) -> None:
        """Set `is_finished`, which is read far more often than it changes."""
        self.is_finished = self._ends > 0 or (self.error is None and self.raw.is_stopped() and not self.raw.is_error())

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self.error is None and (self.is_finished or self.raw.is_accepting())

    def fill_mask(self, row: np.ndarray) -> None:
        """Set bit i of int32[num_words] if token i may come next. The end tokens may where the grammar is complete.

        Raises GrammarError if the grammar became too expensive; the row then holds the end tokens alone.
        """
        self.compiler.check_row(row)
        if self.error is None and not self.is_finished:
            started = time.thread_time()
            self.raw.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if time.thread_time() - started > MASK_BUDGET_S and not self.raw.is_error():
                self._fail(f"a mask takes more than {MASK_BUDGET_S} s")
        self.check_mask(row)

    def check_mask(self, row: np.ndarray) -> None:
        """What `fill_mask` does once llguidance has filled the row."""
        if self.error is None and not self.is_finished:
            if self.raw.is_error() and self.recover():
                self.raw.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
                if self.raw.is_error():
                    self._fail(self.raw.get_error())
            self._look()  # that nothing else may come is sometimes found only now
        if self.error is not None or self.is_finished:
            row[:] = self.compiler.end_mask
        elif self.names_ids:
            row &= self.compiler.legal_mask
        if self.error is not None:
            raise self.error

    def consume(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError, and stays where it is, for one that the mask does not allow."""
        if self.error is not None:
            raise self.error
        ends = self.compiler.eos_token_ids
        if not self.is_finished and token_id >= 0 and token_id not in ends and self._advance(token_id):
            return  # nearly always
        if token_id in ends and self.is_complete:
            self._ends += 1
            self.is_finished = True
            return
        allowed = not self.is_finished and 0 <= token_id < self.compiler.vocab_rows and self._advance(token_id)
        if not allowed and self.raw.is_error() and self.recover():
            allowed = self._advance(token_id)
        if self.error is None and self.raw.is_error():
            self._fail(self.raw.get_error())
        if self.error is not None:
            raise self.error
        if not allowed:
            raise ValueError(f"token {token_id} is not allowed by the {self._grammar.kind} grammar here")

    def _advance(self, token_id: int) -> bool:
        if self.raw.try_consume_tokens([token_id]) != 1:
            return False
        self._tokens.append(token_id)
        if self._automaton is not None:
            self._automaton.num_tokens += 1
        if self.raw.is_stopped():
            self._look()
        return True

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens. Raises ValueError if fewer were consumed."""
        if self.error is not None:
            raise self.error
        if not 0 <= num_tokens <= len(self._tokens) + self._ends:
            raise ValueError(
                f"{num_tokens} tokens cannot be taken back; {len(self._tokens) + self._ends} were consumed"
            )
        ends = min(num_tokens, self._ends)
        self._ends -= ends
        if num_tokens > ends:
            del self._tokens[len(self._tokens) - (num_tokens - ends) :]
            if not self.raw.rollback(num_tokens - ends) and not self.recover():
                assert self.error is not None
                raise self.error
        self._look()

    def copy(self) -> Matcher:
        """A matcher at the same place that goes its own way; it shares what was computed with this one."""
        twin = object.__new__(Matcher)
        twin.__dict__.update(self.__dict__)
        twin.raw, twin._tokens = self.raw.deep_copy(), list(self._tokens)
        if self._automaton is not None:
            self._automaton.users.add(twin)
        return twin

    def forced_tokens(self) -> list[int]:
        """Tokens that must come next, as far as only one spelling is possible; often none. They are not consumed."""
        if self.error is not None or self.is_finished:
            return []
        forced = self.raw.compute_ff_tokens()
        self._look()
        return forced

    def recover(self) -> bool:
        """After an error of llguidance's: whether a matcher of its own could take the place of one that others use too,
        and may have driven into the error. Otherwise `error` is set."""
        if self._automaton is None:
            self._fail(self.raw.get_error())
            return False
        reason, self._automaton = self.raw.get_error(), None
        raw = self.compiler.rebuild(self._grammar, self._entry)
        if raw is None or raw.try_consume_tokens(self._tokens) != len(self._tokens) or raw.is_error():
            self._fail(reason)
            return False
        self.raw, self.group = raw, id(raw)
        self._look()
        return True

    def _fail(self, reason: str) -> None:
        self.error = GrammarError(f"the {self._grammar.kind} grammar cannot be followed: {first_line(reason)}")
        self._look()
