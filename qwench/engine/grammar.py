"""Constrained decoding: which tokens may come next so that an answer follows a grammar. [llguidance]

llguidance holds the automata; this file gives it our vocabulary, keeps compiled grammars, and ends an answer whose
masks become too expensive. It does not sample and knows nothing of the model. `grammar_source.py` prepares grammars and
bounds their compilation; `tool_grammar.py` writes those of tool calls.
"""

from __future__ import annotations

import threading
import time
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
_MAX_GRAMMARS, _MAX_IDLE = 64, 32
_MAX_SPENT_TOKENS = 5000
"""An automaton keeps the states that its answers visited; it is not used again after so many tokens."""


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


@dataclass
class _Compiled:
    """One grammar's matchers: those that nobody uses, or one that all are copied from.

    Copies share an automaton and its lock, so they wait for each other and fail together. That is for grammars which
    take long to compile; of others each request has its own.
    """

    lowered: str
    shared: LLMatcher | None = None
    idle: list[tuple[LLMatcher, int]] = field(default_factory=list)
    """Matchers at the beginning, and how many tokens each has consumed in all."""


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
            if known is not None:
                self._compiled.move_to_end(grammar)
            if isinstance(known, GrammarError):
                raise GrammarError(*known.args)
            if known is not None and known.shared is not None:
                return Matcher(self, grammar, known.shared.deep_copy())
            if known is not None and known.idle:
                matcher, spent = known.idle.pop()
                return Matcher(self, grammar, matcher, known, spent)
        lowered = known.lowered if known is not None else lower(grammar)
        vocabulary = self.lltokenizer
        try:
            matcher, seconds = compile_guarded(
                lambda: LLMatcher(vocabulary, lowered, limits=LIMITS, log_level=0), grammar.kind
            )
        except BusyError:
            raise
        except GrammarError as error:
            self._remember(grammar, error)
            raise
        entry = _Compiled(lowered) if known is None else known
        if seconds > _SHARED_ABOVE_S:
            entry.shared = matcher
            matcher = matcher.deep_copy()
        self._remember(grammar, entry)
        return Matcher(self, grammar, matcher, entry if entry.shared is None else None)

    def _remember(self, grammar: Grammar, found: _Compiled | GrammarError) -> None:
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _MAX_GRAMMARS:
                self._compiled.popitem(last=False)

    def forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)

    def take_back(self, matcher: LLMatcher, home: _Compiled, spent: int) -> None:
        if spent <= _MAX_SPENT_TOKENS and len(home.idle) < _MAX_IDLE and not matcher.is_error() and matcher.reset():
            home.idle.append((matcher, spent))

    def check_row(self, row: np.ndarray) -> None:
        """Raises ValueError for what is no int32[num_words] in one stretch of memory."""
        if row.dtype != np.int32 or row.shape != (self.num_words,):
            raise ValueError(f"a mask is int32 [{self.num_words}], not {row.dtype} {list(row.shape)}")
        if not row.flags["C_CONTIGUOUS"] or not row.flags["WRITEABLE"]:
            raise ValueError("a mask must be writeable memory without gaps")


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def fill_masks(matchers: Sequence[Matcher], rows: Sequence[np.ndarray] | np.ndarray) -> None:
    """The masks of a batch, on several threads with Python's lock free: rows[i], int32[num_words], for matcher i.

    `rows` is best one array [>= len(matchers), num_words]. All matchers are of one compiler. Raises the first
    GrammarError after every row was filled: `Matcher.error` says which failed, and their rows hold the end tokens
    alone. When a batch takes long, the next is done one by one, so that the matcher at fault is found and ended.
    """
    if not matchers:
        return
    if len(rows) < len(matchers):
        raise ValueError(f"{len(matchers)} matchers need as many rows, but there are {len(rows)}")
    compiler = matchers[0].compiler
    if compiler.is_suspicious or len(matchers) == 1:
        compiler.is_suspicious = False
        for matcher, row in zip(matchers, rows, strict=False):
            try:
                matcher.fill_mask(row)
            except GrammarError:
                assert matcher.error is not None
    else:
        _fill_together(compiler, matchers, rows)
    for matcher in matchers:
        if matcher.error is not None:
            raise matcher.error


def _fill_together(
    compiler: GrammarCompiler, matchers: Sequence[Matcher], rows: Sequence[np.ndarray] | np.ndarray
) -> None:
    block = rows if isinstance(rows, np.ndarray) else np.empty((len(matchers), compiler.num_words), np.int32)
    for row in rows[: len(matchers)]:
        compiler.check_row(row)
    if not block.flags["C_CONTIGUOUS"]:
        raise ValueError("the masks must be one array without gaps, or a list of rows")
    work: list[tuple[LLMatcher, int]] = []
    for index, matcher in enumerate(matchers):
        if matcher.compiler is not compiler:
            raise ValueError("the matchers of a batch must come from one GrammarCompiler")
        if matcher.error is not None or matcher.is_finished:
            block[index] = compiler.end_mask
        else:
            work.append((matcher.raw, index))
    if work:
        started = time.perf_counter()
        _executor().unsafe_compute_mask_ptr(work, block.ctypes.data, compiler.num_words * 4, len(matchers))
        compiler.is_suspicious = time.perf_counter() - started > MASK_BUDGET_S
        block[: len(matchers)] &= compiler.legal_mask
    for raw, index in work:
        if raw.is_error():  # llguidance then gives the end tokens
            matchers[index].fail(raw.get_error())
    if block is not rows:
        for index in range(len(matchers)):
            rows[index][:] = block[index]


class Matcher:
    """Where one answer stands in its grammar. Not safe to use from several threads at once; made by `compile`."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        grammar: Grammar,
        raw: LLMatcher,
        home: _Compiled | None = None,
        spent: int = 0,
    ) -> None:
        """`home` gets `raw` back in the end; `spent` counts the tokens it has consumed before."""
        self.compiler, self._grammar, self._home, self._spent = compiler, grammar, home, spent
        self.raw = raw
        """llguidance's matcher."""
        self._ends = 0  # end tokens consumed; llguidance does not see them
        self.error: GrammarError | None = None
        """Why this matcher cannot go on, once it cannot."""

    def __del__(self) -> None:
        if (home := getattr(self, "_home", None)) is not None:
            self.compiler.take_back(self.raw, home, self._spent)

    @property
    def is_finished(self) -> bool:
        """Whether an end token was consumed, or nothing else may come."""
        return self._ends > 0 or (self.error is None and self.raw.is_stopped() and not self.raw.is_error())

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self.error is None and (self.is_finished or self.raw.is_accepting())

    def fill_mask(self, row: np.ndarray) -> None:
        """Set bit i of int32[num_words] if token i may come next. The end tokens may where the grammar is complete.

        Raises GrammarError if the grammar became too expensive; the row then holds the end tokens alone.
        """
        self.compiler.check_row(row)
        if self.error is not None or self._ends:
            row[:] = self.compiler.end_mask
            if self.error is not None:
                raise self.error
            return
        started = time.thread_time()
        self.raw.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        seconds = time.thread_time() - started
        row &= self.compiler.legal_mask
        if self.raw.is_error():
            raise self.fail(self.raw.get_error())
        if seconds > MASK_BUDGET_S:
            row[:] = self.compiler.end_mask
            raise self.fail(f"its masks take more than {MASK_BUDGET_S} s")

    def consume(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError, and stays where it is, for one that the mask does not allow."""
        if self.error is not None:
            raise self.error
        if token_id in self.compiler.eos_token_ids and self.is_complete:
            self._ends += 1
        elif self._ends or not 0 <= token_id < self.compiler.vocab_rows or not self._advance(token_id):
            if self.raw.is_error():
                raise self.fail(self.raw.get_error())
            raise ValueError(f"token {token_id} is not allowed by the {self._grammar.kind} grammar here")

    def _advance(self, token_id: int) -> bool:
        self._spent += 1
        return not self.raw.is_stopped() and self.raw.try_consume_tokens([token_id]) == 1

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens. Raises ValueError if fewer were consumed."""
        if self.error is not None:
            raise self.error
        ends = min(num_tokens, self._ends)
        if num_tokens < 0 or (num_tokens > ends and not self.raw.rollback(num_tokens - ends)):
            raise self.fail(f"{num_tokens} tokens cannot be taken back")
        self._ends -= ends

    def copy(self) -> Matcher:
        """A matcher at the same place that goes its own way; it shares the automaton with this one."""
        self._home = None  # two use it now, so it cannot be handed to another request
        twin = Matcher(self.compiler, self._grammar, self.raw.deep_copy())
        twin._ends, twin.error = self._ends, self.error
        return twin

    def forced_tokens(self) -> list[int]:
        """Tokens that must come next, as far as only one spelling is possible; often none. They are not consumed."""
        if self.error is not None or self.is_finished:
            return []
        return self.raw.compute_ff_tokens()

    def fail(self, reason: str) -> GrammarError:
        """Put the matcher out of use, for `reason` in llguidance's words."""
        self.error = GrammarError(f"the {self._grammar.kind} grammar cannot be followed: {first_line(reason)}")
        self._home = None
        if self.raw.is_error():
            self.compiler.forget(self._grammar)  # a shared automaton keeps the error
        return self.error
