"""Compiles and calls `bpe_kernel.c`: many texts to ids at tens of megabytes a second a core, in any script.

For bulk: it takes UTF-8 as Arrow lays it out, starts in a moment and keeps a few megabytes however much it has seen.
Where it cannot be compiled, or for a vocabulary with tokens that their own bytes do not merge to, `load` returns None
and `Tokenizer` uses its other encoders; it does so too for texts with characters that tables of different Unicode
versions may class differently.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import threading
import unicodedata
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qwench import native

log = logging.getLogger("qwench.tokenizer")

SOURCE = Path(__file__).with_name("bpe_kernel.c")
_LETTER, _NUMBER, _SPACE, _UNUSUAL, _UNKNOWN = 1, 2, 4, 8, 16
_WHITE = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
_JAMO = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))
"""Letters of Korean that compose with what stands before them; syllables have no entry in Unicode's table."""
_SLACK = 3
"""Ids that the kernel may write beyond the last."""
_PART_BYTES = 1 << 18
"""Threads share texts of more than this."""


class Encoder:
    """A vocabulary as the kernel has it. Several threads may use one."""

    def __init__(self, library: Any, tokens: Sequence[bytes], left_lengths: np.ndarray) -> None:
        """Raises ValueError for a vocabulary that has a token which its own bytes do not merge to."""
        self._library = library
        self._classes = _classes()
        data, starts = _laid_out(tokens)
        problem = ctypes.c_int64()
        self._bpe = library.qwench_bpe_new(
            data, starts.ctypes.data, len(tokens), left_lengths.ctypes.data, self._classes.ctypes.data,
            ctypes.byref(problem),
        )  # fmt: skip
        if not self._bpe:
            if problem.value < 0:
                raise MemoryError("no memory for the tokenizer's tables")
            raise ValueError(f"the bytes of token {problem.value} do not merge to it")
        weakref.finalize(self, library.qwench_bpe_free, self._bpe)
        self._scratches: list[int] = []
        self._lock = threading.Lock()

    def encode(
        self, data: np.ndarray, starts: np.ndarray, closing: int = -1, *, normal: bool = False, num_threads: int = 1
    ) -> list[np.ndarray | None]:
        """Ids, uint32 [n_i], of the valid UTF-8 in `data` (uint8) from starts[i] to starts[i + 1] (int64), each with
        `closing` behind it if that is not negative. None for a text that is for others: with unknown characters, or,
        unless the caller says that they are NFC, with some that may not be."""
        num = len(starts) - 1
        cuts = [0, num]
        total = int(starts[-1] - starts[0])
        if num_threads > 1 and total > _PART_BYTES:
            places = starts[0] + np.arange(1, num_threads) * total // num_threads
            cuts = [0, *np.searchsorted(starts, places).tolist(), num]
        parts = [(low, high) for low, high in pairwise(cuts) if low < high]
        if len(parts) < 2:
            return self._encode(data, starts, closing, normal)
        with ThreadPoolExecutor(len(parts)) as pool:
            done = pool.map(lambda part: self._encode(data, starts[part[0] : part[1] + 1], closing, normal), parts)
            return [ids for each in done for ids in each]

    def _encode(self, data: np.ndarray, starts: np.ndarray, closing: int, normal: bool) -> list[np.ndarray | None]:
        num = len(starts) - 1
        out = np.empty(int(starts[-1] - starts[0]) + num + _SLACK, np.uint32)
        ends = np.empty(num, np.int64)
        marked = np.empty(num, np.uint8)
        assert data.dtype == np.uint8
        assert starts.dtype == np.int64
        assert data.flags.c_contiguous
        assert starts.flags.c_contiguous
        assert len(data) >= starts[-1]
        scratch = self._take_scratch()
        written = self._library.qwench_bpe_encode(
            self._bpe, scratch, data.ctypes.data, starts.ctypes.data, num, closing, normal,
            out.ctypes.data, ends.ctypes.data, marked.ctypes.data,
        )  # fmt: skip
        with self._lock:
            self._scratches.append(scratch)
        if written < 0:
            raise MemoryError(f"no memory to encode {len(out):,} bytes")
        found: list[np.ndarray | None] = []
        start = 0
        for end, refused in zip(ends.tolist(), marked.tolist(), strict=True):
            found.append(None if refused else out[start:end])
            start = end
        return found

    def _take_scratch(self) -> int:
        with self._lock:
            if self._scratches:
                return self._scratches.pop()
        scratch = self._library.qwench_bpe_scratch_new()
        if not scratch:
            raise MemoryError("no memory for the tokenizer's tables")
        weakref.finalize(self, self._library.qwench_bpe_scratch_free, scratch)
        return scratch


def _laid_out(tokens: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    starts = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)), out=starts[1:])
    return b"".join(tokens), starts


@functools.cache
def _classes() -> np.ndarray:
    """uint8 [0x110000]: letter, number and white space as `bpe.PATTERN` means them; and what needs a look."""
    from qwench.tokenizer.backend import doubtful

    letters = list(map(chr, range(0x40000)))
    table = np.zeros(0x110000, np.uint8)
    initials = [unicodedata.category(letter)[0] for letter in letters]
    bits = {"L": _LETTER, "N": _NUMBER}
    table[: len(letters)] = [bits.get(initial, 0) for initial in initials]
    table[list(_WHITE)] |= _SPACE
    unusual = [code for code, letter in enumerate(letters) if unicodedata.combining(letter)]
    for code in range(0xA0, 0x30000):
        parts = unicodedata.decomposition(letters[code])
        if parts and parts[0] != "<":
            if unicodedata.normalize("NFC", letters[code]) != letters[code]:
                unusual.append(code)
            unusual += [int(part, 16) for part in parts.split()[1:]]
    table[[*unusual, *_JAMO]] |= _UNUSUAL
    table[doubtful()] |= _UNKNOWN
    return table


@functools.cache
def _library() -> Any:
    """The compiled library; None where it cannot be had."""
    try:
        loaded: Any = ctypes.CDLL(str(native.build(SOURCE, "bpe", ())))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("new", pointer, [ctypes.c_char_p, pointer, size, pointer, pointer, pointer]),
            ("free", None, [pointer]),
            ("scratch_new", pointer, []),
            ("scratch_free", None, [pointer]),
            ("encode", size, [*[pointer] * 4, size, size, ctypes.c_int, *[pointer] * 3]),
            ("splits", size, [ctypes.c_char_p, pointer, size, pointer]),
        ):
            function = getattr(loaded, f"qwench_bpe_{name}")
            function.restype, function.argtypes = result, arguments
        return loaded
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("texts are encoded by a library, Chinese several times slower: %s", error)
        return None


def load(tokens: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]]) -> Encoder | None:
    """An encoder for the vocabulary; None where there is no compiler, or for one that this algorithm is not for."""
    library = _library()
    if library is None:
        return None
    left_lengths = np.zeros(len(tokens), np.int32)
    left_lengths[256:] = [len(left) for left, _ in merges]
    try:
        return Encoder(library, tokens, left_lengths)
    except ValueError as error:
        log.info("texts are encoded by a library: %s", error)
        return None


def split_tokens(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
    """What `bpe.recover_merges` finds; None where the kernel is not there or does not find it for every token."""
    library = _library()
    if library is None or len(set(tokens)) != len(tokens):
        return None
    data, starts = _laid_out(tokens)
    cuts = np.zeros(len(tokens), np.int32)
    if library.qwench_bpe_splits(data, starts.ctypes.data, len(tokens), cuts.ctypes.data) != len(tokens):
        return None
    return [(token[:cut], token[cut:]) for token, cut in zip(tokens[256:], cuts[256:].tolist(), strict=True)]
