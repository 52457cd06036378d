"""Compiles and calls `prose_kernel.c`: counts of words and letters, and repeated n-grams of a text.

Where it cannot be compiled `load` says why in the log and returns None, and callers count in Python.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwench import native
from qwench.data import characters

log = logging.getLogger("qwench.data")

SOURCE = Path(__file__).with_name("prose_kernel.c")
_SPACE, _NAMED, _LETTER, _WIDE, _THAI_LIKE, _WESTERN = 1, 2, 4, 8, 16, 32
_LAST = 0x34000
"""What is beyond is no letter and no white space."""


class Kernel:
    """The functions of the compiled library."""

    def __init__(self, library: Path) -> None:
        loaded: Any = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._count = loaded.qwench_count
        self._count.argtypes = [ctypes.c_char_p, size, pointer, pointer]
        self._count.restype = None
        self._grams = loaded.qwench_repeated_grams
        self._grams.argtypes = [
            ctypes.c_char_p, size, pointer, size, size, pointer, size, pointer, size, ctypes.POINTER(ctypes.c_double),
        ]  # fmt: skip
        self._grams.restype = size
        self._table = _bits()
        self._bits = self._table.ctypes.data

    def count(self, text: str) -> list[int]:
        """The fields of `data.text.TextCounts`."""
        counts = (ctypes.c_int64 * 8)()
        self._count(text.encode("utf-32-le", "surrogatepass"), len(text), self._bits, counts)
        return counts[:]

    def repeated_grams(
        self, text: str, characters: bool, step: int, top_limits: Sequence[float], duplicate_limits: Sequence[float]
    ) -> tuple[int, float]:
        """Place of the first limit that is exceeded, from 1 on, and the share; 0 if none is."""
        value = ctypes.c_double()
        place = self._grams(
            text.encode("utf-32-le", "surrogatepass"), len(text), self._bits, characters, step,
            _doubles(tuple(top_limits)), len(top_limits), _doubles(tuple(duplicate_limits)), len(duplicate_limits),
            ctypes.byref(value),
        )  # fmt: skip
        if place < 0:
            raise MemoryError(f"no memory for the n-grams of {len(text):,} characters")
        return place, value.value


@functools.cache
def _doubles(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


@functools.cache
def _bits() -> np.ndarray:
    """uint8 for every code point."""
    letters = list(map(chr, range(_LAST)))
    # Digits make no word, numbers such as a Roman six do.
    digits = np.fromiter(map(str.isdecimal, letters), bool, _LAST)
    table = np.zeros(0x110000, np.uint8)
    table[:_LAST] = np.fromiter(map(str.isspace, letters), bool, _LAST) * np.uint8(_SPACE)
    table[:_LAST] |= (np.fromiter(map(str.isalnum, letters), bool, _LAST) & ~digits) * np.uint8(_NAMED)
    classes = characters.class_table()
    bits = np.array([0, _LETTER, _LETTER | _WIDE, _LETTER | _THAI_LIKE, 0], np.uint8)
    table[: len(classes)] |= bits[classes]
    table[:128] |= np.fromiter(map(str.isalnum, letters[:128]), bool, 128) * np.uint8(_WESTERN)
    return table


@functools.cache
def load() -> Kernel | None:
    """The kernel, compiled if it is not in the cache; None where it cannot be had."""
    try:
        return Kernel(native.build(SOURCE, "prose", ()))
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("rules for prose count in Python, half as fast: %s", error)
        return None
