"""How much of a text is repeated: duplicate lines, paragraphs and n-grams, measured as in Gopher (Rae et al. 2021).

Words are hashes, an n-gram is a 64-bit hash rolled over them, and the cost a word is the same for a note and a book. In
scripts without spaces a token is one character and an n-gram of n words one of 2n characters. The n-grams are counted
by C (`prose_kernel.c`); numpy gives the same results more slowly where there is no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwench.data import prose_native

TOP_FROM, DUPLICATE_FROM = 2, 5
"""Words of the n-grams that the first limits are for."""
_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Share of parts (lines or paragraphs) that stood before, and the share of characters in them."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    chars = sum(map(len, parts))
    repeated = chars - sum(map(len, distinct))
    return (len(parts) - len(distinct)) / len(parts), repeated / max(1, chars)


def paragraphs_of(text: str) -> list[str]:
    """What blank lines separate (in a cleaned text they are empty)."""
    return list(filter(None, map(str.strip, text.split("\n\n"))))


def broken_gram_rule(
    text: str, unspaced: bool, top_limits: Sequence[float], duplicate_limits: Sequence[float], *, compiled: bool = True
) -> tuple[str, float] | None:
    """The first limit that the repeated n-grams of a text exceed, as its reason with the measured share, or None.

    `top_limits` are for the most frequent 2-, 3-, ... gram ("top_2_gram"), `duplicate_limits` for duplicated 5-, 6-
    grams ("duplicate_5_grams"), all of them shares of the characters that are no white space.
    """
    step = 2 if unspaced else 1
    if compiled and (kernel := prose_native.load()) is not None:
        place, share = kernel.repeated_grams(text, unspaced, step, top_limits, duplicate_limits)
        if not place:
            return None
        top = place <= len(top_limits)
        n = place - 1 + TOP_FROM if top else place - 1 - len(top_limits) + DUPLICATE_FROM
        return (f"top_{n}_gram" if top else f"duplicate_{n}_grams"), share
    tokens = Tokens(text.split(), step)
    for n, limit in enumerate(top_limits, TOP_FROM):
        if (share := tokens.top_share(n, limit)) > limit:
            return f"top_{n}_gram", share
    for place, limit in enumerate(duplicate_limits):
        least = min(duplicate_limits[place:])
        if (share := tokens.duplicate_share(DUPLICATE_FROM + place, least)) > limit:
            return f"duplicate_{DUPLICATE_FROM + place}_grams", share
        # A longer n-gram covers no more than the shorter ones in it.
        if share <= least:
            break
    return None


class Tokens:
    """Words (or characters) of a text as numbers: `ids` uint64 [T] and `sizes` int64 [T], characters of each."""

    def __init__(self, words: Sequence[str], step: int) -> None:
        self.step = step
        self.count = len(words)
        if step == 2:  # characters: their code points
            self.ids = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
            self.sizes = np.ones(len(self.ids), np.int64)
            self.count = len(self.ids)
        else:
            # Python's hashes differ from run to run, but which are equal does not.
            self.ids = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
            self.sizes = np.fromiter(map(len, words), np.int64, len(words))
        self._ends = np.concatenate(([0], self.sizes.cumsum()))
        self.chars = max(1, int(self._ends[-1]))
        mixed = (self.ids + np.uint64(1)) * _MULTIPLIER
        self._mixed = mixed ^ (mixed >> np.uint64(29))
        self._rolled, self._length = self._mixed, 1

    def _grams(self, n: int) -> np.ndarray:
        """Hash of the n-gram that begins at every token: uint64 [T - n + 1]."""
        if n < self._length:
            self._rolled, self._length = self._mixed, 1
        while self._length < n:  # the n-grams of the last call, one token longer each
            rolled = self._rolled[:-1] * _FACTOR
            rolled += self._mixed[self._length :]
            self._rolled = rolled
            self._length += 1
        return self._rolled

    def _longest(self, n: int) -> int:
        """Characters of the longest n-gram."""
        return int((self._ends[n:] - self._ends[:-n]).max())

    def top_share(self, words: int, over: float = 0.0) -> float:
        """Share of characters in the n-gram of `words` words that covers most, if it stands there more than once.

        A result that is not above `over` is an upper bound only, which is found several times quicker.
        """
        n = words * self.step
        if self.count < n + 1:
            return 0.0
        grams = self._grams(n)
        ordered = np.sort(grams)
        edges = np.flatnonzero(ordered[1:] != ordered[:-1])
        if len(edges) + 1 == len(grams):
            return 0.0
        lasts = np.empty(len(edges) + 2, np.int64)
        lasts[0], lasts[1:-1], lasts[-1] = -1, edges, len(grams) - 1
        counts = lasts[1:] - lasts[:-1]
        most = int(counts.max())
        if (bound := most * self._longest(n) / self.chars) <= over:
            return bound
        # Of those that stand there equally often the longest counts, so that no order has a say.
        first = np.flatnonzero(np.isin(grams, ordered[lasts[1:][counts == most]]))
        return most * int((self._ends[first + n] - self._ends[first]).max()) / self.chars

    def duplicate_share(self, words: int, over: float = 0.0) -> float:
        """Share of characters that lie in an n-gram which stood there before, each counted once; `over` as above."""
        n = words * self.step
        if self.count < n + 1:
            return 0.0
        grams = self._grams(n)
        ordered = np.sort(grams)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if (bound := len(repeated) * self._longest(n) / self.chars) <= over:
            return bound
        places = np.flatnonzero(np.isin(grams, repeated))
        order = places[grams[places].argsort(kind="stable")]
        ordered = grams[order]
        again = order[1:][ordered[1:] == ordered[:-1]]  # of equal ones all but the first
        covered = np.zeros(self.count + 1, np.int64)
        covered[again] += 1
        np.subtract.at(covered, again + n, 1)
        return int(self.sizes[covered[:-1].cumsum() > 0].sum()) / self.chars
