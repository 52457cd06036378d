"""Passages that stand character for character in several places, found by winnowed window hashes.

A window is `tokens` words (or letters of scripts without spaces) in a row with everything between them, from the start
of the first to the start of the next word behind. Of every `slack` windows in a row the one with the smallest hash is
an anchor [Schleimer et al. 2003, "Winnowing"], so two places that share `tokens + slack` - 1 words share an anchor, and
the anchors of a longer passage overlap and cover it but for less than `slack` words at its ends. No suffix array: what
must be sorted is a share of the text instead of eight times its size, and any range of hash values alone.

Which of the places stays is not decided here (`data.pipeline.dedup_pieces`).
"""

from __future__ import annotations

import functools

import numpy as np

from qwench.data.minhash import mix, token_hashes

_BASES = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)


def anchors(text: str, tokens: int, slack: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 [anchors, 2] and characters int64 [anchors, 2] (begin, end) of the anchors of a text."""
    data = text.encode("utf-8", "surrogatepass")
    starts = token_hashes(data)[2]
    count = len(starts) - tokens + 1
    if count <= 0:
        return np.zeros((0, 2), np.uint64), np.zeros((0, 2), np.int64)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    begin = starts[:count]
    end = np.append(starts, _last_end(text, int(starts[-1])))[tokens : tokens + count]
    hashes = np.stack([_window_hashes(codes, begin, end, base) for base in _BASES], axis=1)
    chosen = _smallest_of(hashes[:, 0], slack)
    return hashes[chosen], np.stack([begin, end], axis=1)[chosen]


def _last_end(text: str, start: int) -> int:
    """Where the last token ends."""
    place = start + 1
    while place < len(text) and (text[place].isalnum() or text[place] == "_"):
        place += 1
    return place


def _window_hashes(codes: np.ndarray, begin: np.ndarray, end: np.ndarray, base: int) -> np.ndarray:
    """Polynomial hashes modulo 2**64 of codes[begin:end], by differences of prefix sums."""
    powers, inverses = _powers(base, 1 << (len(codes) + 1).bit_length())
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(mix(codes + np.uint64(1)) * powers[: len(codes)], out=sums[1:])
    return mix((sums[end] - sums[begin]) * inverses[begin] + (end - begin).astype(np.uint64))


@functools.lru_cache(maxsize=4)
def _powers(base: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """base**i and its inverse modulo 2**64 for i < count."""
    tables = []
    for factor in (base, pow(base, -1, 1 << 64)):
        table = np.full(count, factor, np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table))
    return tables[0], tables[1]


def _smallest_of(hashes: np.ndarray, slack: int) -> np.ndarray:
    """Places of the smallest of every `slack` hashes in a row (the last of equal ones), sorted."""
    slack = min(slack, len(hashes))
    windows = np.lib.stride_tricks.sliding_window_view(hashes[::-1], slack)
    places = len(hashes) - 1 - (np.arange(len(windows)) + windows.argmin(axis=1))
    return np.unique(places)
