"""A seeded permutation of 0..n-1 that is computed entry by entry instead of being stored.

It is a Feistel network on the next power of four, walked along its cycles until the value is below n (the method of
format-preserving encryption [Black and Rogaway 2002]). Two reasons against a shuffled array: a corpus of 10^9 documents
needs no memory for it on any rank, and the order depends on this file only, not on the version of a random generator,
so that a training run resumes with the same rows years later. It is not a cryptographic permutation.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def permute(positions: np.ndarray, num: int, *seeds: int) -> np.ndarray:
    """Entries `positions` (int64 [N], each in 0..num-1) of the permutation of 0..num-1 chosen by `seeds`: int64 [N]."""
    if num <= 1 or len(positions) == 0:
        return np.zeros(len(positions), np.int64)
    half_bits = np.uint64(max(1, ((num - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _round_keys(seeds)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    current = values
    while len(outside):
        left, right = current >> half_bits, current & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        current = (left << half_bits) | right
        values[outside] = current
        again = current >= num
        outside, current = outside[again], current[again]
    return values.astype(np.int64)


def _round_keys(seeds: tuple[int, ...]) -> list[np.uint64]:
    state = 0x243F6A8885A308D3  # fractional digits of pi
    for seed in seeds:
        state = int(_mix(np.array([(state + seed * 0x9E3779B97F4A7C15) & _MASK64], np.uint64))[0])
    offsets = [(state + (i + 1) * 0x9E3779B97F4A7C15) & _MASK64 for i in range(_ROUNDS)]
    return list(_mix(np.array(offsets, np.uint64)))


def _mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 [Steele et al. 2014]."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
