"""What the characters of a text are, as far as rules ask: scripts that write no spaces, letters, white space."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np

# Scripts without spaces between words, as ranges for a character class.
HAN_KANA_HANGUL = "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff"
HAN_KANA_HANGUL += "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
LETTER, WIDE, THAI_LIKE, BLANK = 1, 2, 3, 4
"""Classes of characters: letters and marks, those of HAN_KANA_HANGUL and SOUTH_EAST_ASIAN, white space; else 0."""
_ALL_BLANKS = "".join(map(chr, (*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))))
_ALL_BLANKS += "\u2028\u2029\u202f\u205f\u3000"
_RANGE = re.compile("(.)-(.)")
_TABLE_SIZE = 0x323B1
"""Code points above are no letters of any script in use."""


def classes_of(text: str) -> np.ndarray:
    """uint8 for every character: its class."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return class_table()[np.minimum(points, _TABLE_SIZE - 1)]


@cache
def class_table() -> np.ndarray:
    """uint8 for every code point below its length: its class."""
    table = np.zeros(_TABLE_SIZE, np.uint8)
    for first, last in ((0, 0x33FF), (0xA000, 0xABFF), (0xF900, 0x11FFF), (0x16000, 0x18FFF), (0x1D000, 0x1EFFF)):
        chars = map(chr, range(first, last + 1))
        table[first : last + 1] = [char.isalpha() or unicodedata.category(char)[0] == "M" for char in chars]
    for kind, ranges in ((WIDE, HAN_KANA_HANGUL), (THAI_LIKE, SOUTH_EAST_ASIAN)):
        for pair in _RANGE.finditer(ranges):
            table[ord(pair[1]) : ord(pair[2]) + 1] = kind
    for char in _ALL_BLANKS:
        table[ord(char)] = BLANK
    return table
