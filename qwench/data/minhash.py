"""MinHash signatures of texts and their bands for locality-sensitive hashing [FineWeb's setting: 14 bands of 8 rows].

    hasher = MinHasher(MinHashSettings())
    batch = hasher.hash_texts(texts)            # HashedTexts: exact hashes, signatures, numbers of shingles
    keys = band_keys(batch.signatures, 14)      # [texts, bands] uint64; equal keys in a band = candidates

Texts are compared as `data.dedup.normalise` leaves them. A shingle is `word_shingle` words in a row or, from a letter
of a script without spaces on, `letter_shingle` letters, which is about as much text: a Chinese word has some 1.6
letters. Punctuation and symbols only separate words. The probability that two texts with Jaccard similarity J of their
sets of shingles become candidates is the S-curve 1 - (1 - J^rows)^bands.

The inner loops are C (`minhash_kernel.c`, compiled when first needed); without a compiler numpy and Python give the
same bits more slowly. Which texts belong together is not decided here (`data.components`, `data.pipeline.dedup_jobs`).

Shape suffixes: D texts, P permutations.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import operator
import subprocess
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from qwench import native
from qwench.config import config

log = logging.getLogger("qwench.data")

SOURCE = Path(__file__).with_name("minhash_kernel.c")
MOST_TOKENS = 64
"""Longest shingle, as in the source."""
_WORD, _LETTER = 1, 2
_BASE, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_ASK_PYTHON, _EXPANDS = 0xFFFFFFFF, 0x80000000
_LAST = 0x323B0
"""Behind the last assigned letter; what is beyond separates words and folds to itself, but for tags and selectors."""
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3021, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF),
    (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x16FE0, 0x18DFF), (0x1B000, 0x1B2FF), (0x20000, _LAST),
)  # fmt: skip
"""Scripts without spaces: Thai, Lao, Burmese, Khmer, Tai, Han, kana, Bopomofo, Tangut, Nushu. Korean has spaces."""


@config
class MinHashSettings:
    """How near duplicates are looked for."""

    word_shingle: int = 5
    """Words of a shingle."""
    letter_shingle: int = 8
    """Letters of a shingle in scripts without spaces."""
    bands: int = 14
    """Tables; texts that agree in all rows of one of them are candidates."""
    rows: int = 8
    """Permutations of a band."""
    min_shingles: int = 5
    """Texts with fewer are only compared exactly: symbols count in them, and shingles know none."""
    verify: float = 0.7
    """A candidate goes only if the signatures estimate at least this Jaccard similarity to a document that stays; 0: of
    everything that the bands connect one document stays, in chains of any length."""
    seed: int = 1
    """Of the permutations."""

    def __post_init__(self) -> None:
        if not 1 <= self.word_shingle <= MOST_TOKENS or not 1 <= self.letter_shingle <= MOST_TOKENS:
            raise ValueError(f"word_shingle and letter_shingle are from 1 to {MOST_TOKENS}")
        if not 1 <= self.bands <= 1024 or not 1 <= self.rows <= 1024:
            raise ValueError("bands and rows are from 1 to 1024")
        if self.min_shingles < 1 or not 0 <= self.verify <= 1:
            raise ValueError("min_shingles is at least 1, and verify from 0 to 1")

    @property
    def num_permutations(self) -> int:
        return self.bands * self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedTexts:
    """What hashing a batch of D texts gives."""

    exact: np.ndarray
    """uint64 [D, 2]: 128 bits, equal for texts equal after normalisation."""
    signatures: np.ndarray
    """uint32 [D, P]; all ones for a text without words."""
    num_shingles: np.ndarray
    """uint32 [D], with repetitions."""


class MinHasher:
    """Hashes texts, with the compiled loops or (`compiled=False`, or where they cannot be had) without."""

    def __init__(self, settings: MinHashSettings | None = None, compiled: bool = True) -> None:
        self.settings = settings or MinHashSettings()
        stream = np.random.Generator(np.random.PCG64(self.settings.seed))
        count = self.settings.num_permutations
        self.masks = stream.integers(0, 1 << 32, count, dtype=np.uint32)
        self.factors = stream.integers(0, 1 << 32, count, dtype=np.uint32) | np.uint32(1)
        self._kernel = _load() if compiled else None

    @property
    def is_compiled(self) -> bool:
        return self._kernel is not None

    def hash_texts(self, texts: Sequence[str]) -> HashedTexts:
        normalised = self.normalise(texts)
        signatures_DP, num_shingles = self.signatures(normalised)
        return HashedTexts(exact=_digests(normalised), signatures=signatures_DP, num_shingles=num_shingles)

    def exact(self, texts: Sequence[str]) -> np.ndarray:
        """uint64 [D, 2], as in HashedTexts."""
        return _digests(self.normalise(texts))

    def normalise(self, texts: Sequence[str]) -> list[bytes]:
        """`data.dedup.normalise` of every text, as UTF-8."""
        if self._kernel is None:
            return [_normalised(text) for text in texts]
        fold, expansions = _folding()
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = _offsets(data)
        room = int(offsets[-1]) * 5 // 4 + 1024
        to, ends = np.empty(room, np.uint8), np.empty(len(texts), np.int64)
        self._kernel.qwench_normalise(
            b"".join(data), offsets.ctypes.data, len(texts), fold.ctypes.data, expansions.ctypes.data,
            to.ctypes.data, room, ends.ctypes.data,
        )  # fmt: skip
        made, result, begin = to[: np.where(ends < 0, ~ends, ends).max(initial=0)].tobytes(), [], 0
        for place, end in enumerate(ends.tolist()):
            result.append(_normalised(texts[place]) if end < 0 else made[begin:end])
            begin = ~end if end < 0 else end
        return result

    def signatures(self, normalised: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Signatures [D, P] uint32 and numbers of shingles [D] uint32 of normalised texts."""
        count, num_perm = len(normalised), len(self.masks)
        signatures_DP = np.full((count, num_perm), 0xFFFFFFFF, np.uint32)
        num_shingles = np.zeros(count, np.uint32)
        if self._kernel is None:
            for place, text in enumerate(normalised):
                num_shingles[place] = self._signature(text, signatures_DP[place])
            return signatures_DP, num_shingles
        offsets = _offsets(normalised)
        self._kernel.qwench_signatures(
            b"".join(normalised), offsets.ctypes.data, count, _classes().ctypes.data, self.settings.word_shingle,
            self.settings.letter_shingle, self.masks.ctypes.data, self.factors.ctypes.data, num_perm,
            signatures_DP.ctypes.data, num_shingles.ctypes.data,
        )  # fmt: skip
        return signatures_DP, num_shingles

    def _signature(self, normalised: bytes, state_P: np.ndarray) -> int:
        """The same in numpy: lowers `state_P` in place and returns the number of shingles."""
        hashes = shingle_hashes(normalised, self.settings)
        distinct = np.unique(hashes)
        for first in range(0, len(distinct), 4096):
            v = (distinct[first : first + 4096, None] ^ self.masks) * self.factors
            v = (v ^ (v >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
            np.minimum(state_P, v.min(axis=0), out=state_P)
        return len(hashes)


def _digests(normalised: Sequence[bytes]) -> np.ndarray:
    digests = b"".join([blake2b(text, digest_size=16).digest() for text in normalised])
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def _offsets(data: Sequence[bytes]) -> np.ndarray:
    offsets = np.zeros(len(data) + 1, np.int64)
    np.cumsum([len(part) for part in data], out=offsets[1:])
    return offsets


def shingle_hashes(normalised: bytes, settings: MinHashSettings) -> np.ndarray:
    """32-bit hashes of the shingles of one normalised text, with repetitions."""
    tokens, kinds = token_hashes(normalised)[:2]
    parts = []
    for kind, length in ((_WORD, settings.word_shingle), (_LETTER, settings.letter_shingle)):
        first = np.flatnonzero(kinds[: max(0, len(tokens) - length + 1)] == kind)
        if len(first):
            parts.append(_mixed_sum(tokens, first, length))
    if not parts:
        parts = [_mixed_sum(tokens, np.zeros(1, np.int64), len(tokens))] if len(tokens) else []
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def _mixed_sum(tokens: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(len(first), np.uint64)
    for place in range(length - 1, -1, -1):
        total = total * _STEP + tokens[first + place]
    return (mix(total) >> np.uint64(32)).astype(np.uint32)


def token_hashes(normalised: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes (uint64), classes (1 word, 2 letter) and first code points of the tokens of a normalised text."""
    codes = np.frombuffer(normalised.decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass"), "<u4")
    classes = _classes()[codes]
    starts = classes != 0
    starts[1:] &= (classes[1:] == _LETTER) | (classes[:-1] != _WORD)
    inside = np.flatnonzero(classes)
    if not len(inside):
        return np.zeros(0, np.uint64), np.zeros(0, np.uint8), np.zeros(0, np.int64)
    first = np.flatnonzero(starts[inside])
    lengths = np.diff(first, append=len(inside))
    place = np.arange(len(inside)) - np.repeat(first, lengths)
    powers = np.cumprod(np.full(lengths.max(), _BASE, np.uint64)) * _inverse(_BASE)
    values = (codes[inside].astype(np.uint64) + np.uint64(1)) * powers[place]
    where = inside[first]
    return mix(np.add.reduceat(values, first)), classes[where], where


def _inverse(odd: np.uint64) -> np.uint64:
    return np.uint64(pow(int(odd), -1, 1 << 64))


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64 bits whose results look random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def band_keys(signatures_DP: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [D, bands]: equal where all rows of a band are."""
    count = len(signatures_DP)
    rows = signatures_DP.reshape(count, bands, signatures_DP.shape[1] // bands)
    keys = np.zeros((count, bands), np.uint64)
    for row in range(rows.shape[2]):
        keys = mix((keys ^ rows[:, :, row].astype(np.uint64)) + _BASE)
    return keys


# ------------------------------------------------------------------------------------------------------ similarities
def estimated_jaccard(left_DP: np.ndarray, right_DP: np.ndarray) -> np.ndarray:
    """Of pairs of signatures, or of the low bytes of signatures (uint8), where 1 in 256 agrees by chance."""
    share = (left_DP == right_DP).mean(axis=-1)
    return np.maximum(0.0, (share - 1 / 256) / (1 - 1 / 256)) if left_DP.dtype == np.uint8 else share


def exact_jaccard(left: str, right: str, settings: MinHashSettings | None = None) -> float:
    """Of the sets of shingles of two texts, counted one by one; 0 if neither has any.

    >>> exact_jaccard("a b c d e f", "a b c d e g")
    0.3333333333333333
    """
    sets = [set(_tuples(_normalised(text), settings or MinHashSettings())) for text in (left, right)]
    union = len(sets[0] | sets[1])
    return len(sets[0] & sets[1]) / union if union else 0.0


def _tuples(normalised: bytes, settings: MinHashSettings) -> list[tuple[str, ...]]:
    """The shingles themselves, found letter by letter: what everything above is measured against."""
    tokens: list[str] = []
    kinds: list[int] = []
    before = 0
    for letter in normalised.decode("utf-8", "surrogatepass"):
        kind = int(_classes()[ord(letter)])
        if kind == _WORD and before == _WORD:
            tokens[-1] += letter
        elif kind:
            tokens.append(letter)
            kinds.append(kind)
        before = kind
    lengths = {_WORD: settings.word_shingle, _LETTER: settings.letter_shingle}
    found = [tuple(tokens[i : i + lengths[k]]) for i, k in enumerate(kinds) if i + lengths[k] <= len(tokens)]
    return found or ([tuple(tokens)] if tokens else [])


def s_curve(settings: MinHashSettings, similarities: Sequence[float] | np.ndarray) -> np.ndarray:
    """Probability that a pair of that Jaccard similarity shares a band."""
    return 1 - (1 - np.asarray(similarities, np.float64) ** settings.rows) ** settings.bands


def describe_s_curve(settings: MinHashSettings) -> str:
    """The setting and its S-curve as two lines of text."""
    points = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    chances = "  ".join(f"{j:.2f}:{p:.3f}" for j, p in zip(points, s_curve(settings, points), strict=True))
    middle = (1 - 0.5 ** (1 / settings.bands)) ** (1 / settings.rows)
    return (
        f"MinHash: {settings.num_permutations} permutations = {settings.bands} bands x {settings.rows} rows, shingles "
        f"of {settings.word_shingle} words or {settings.letter_shingle} letters, seed {settings.seed}, "
        f"half of the pairs with J = {middle:.3f} are found\nJaccard:chance  {chances}"
    )


# ------------------------------------------------------------------------------------------------------------ tables
def _normalised(text: str) -> bytes:
    from qwench.data.dedup import normalise

    return normalise(text).encode("utf-8", "surrogatepass")


_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x17000, 0x187F7), (0x20000, 0x2A6DF), (0x2A700, 0x2B738))
"""Large ranges of letters that fold to themselves, and so do Hangul syllables; looking at each takes too long."""
_SYLLABLES = (0xAC00, 0xD7A3)


def _code_points() -> list[int]:
    begin, rest = 0, []
    for first, last in sorted((*_IDEOGRAPHS, _SYLLABLES)):
        rest += range(begin, first)
        begin = last + 1
    return [*rest, *range(begin, _LAST), *range(0xE0000, 0xE0200)]


@functools.cache
def _classes() -> np.ndarray:
    """uint8 for every code point: 0 separates, 1 belongs to a word, 2 is a token of its own."""
    table = np.zeros(0x110000, np.uint8)
    codes = _code_points()
    letters = list(map(chr, codes))
    marks = map({"Mn", "Mc", "Me"}.__contains__, map(unicodedata.category, letters))
    table[codes] = np.fromiter(map(operator.or_, marks, map(str.isalnum, letters)), np.uint8, len(codes)) * _WORD
    table[ord("_")] = _WORD
    for first, last in (*_IDEOGRAPHS, _SYLLABLES):
        table[first : last + 1] = _WORD
    for first, last in _UNSPACED:
        part = table[first : last + 1]
        part[part != 0] = _LETTER
    return table


@functools.cache
def _folding() -> tuple[np.ndarray, np.ndarray]:
    """What NFKC, case folding and one kind of blank make of a code point alone, and the expansions.

    A code point that may join its neighbours (marks, second halves of compositions) is left to Python. Every process
    needs this table, so all letters go through each function at once, and only the few that change are looked at.
    """
    codes = _code_points()
    letters = list(map(chr, codes))
    joins = {code for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul vowels and finals
    for decomposition in filter(None, map(unicodedata.decomposition, letters)):
        parts = decomposition.split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            joins.add(int(parts[1], 16))
    composed = list(map(functools.partial(unicodedata.normalize, "NFKC"), letters))
    folded = list(map(str.casefold, composed))
    combining = map(unicodedata.combining, letters)
    rows = zip(codes, letters, composed, folded, combining, strict=True)
    fold = np.arange(0x110000, dtype=np.uint32)
    expansions: list[int] = []
    for code, letter, whole, result, mark in rows:
        if whole == letter == result and not mark and code not in joins and not letter.isspace():
            continue
        if any(unicodedata.combining(part) or ord(part) in joins for part in whole):
            fold[code] = _ASK_PYTHON
        elif len(result) == 1:
            fold[code] = 0x20 if result.isspace() else ord(result)
        else:
            fold[code] = _EXPANDS | len(expansions)
            expansions += [len(result), *(0x20 if part.isspace() else ord(part) for part in result)]
    return fold, np.array(expansions or [0], np.uint32)


@functools.cache
def _load() -> Any:
    """The compiled loops, or None."""
    try:
        library = ctypes.CDLL(str(native.build(SOURCE, "minhash", ())))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.qwench_normalise.argtypes = [
            ctypes.c_char_p, pointer, size, pointer, pointer, pointer, size, pointer,
        ]  # fmt: skip
        library.qwench_normalise.restype = None
        library.qwench_signatures.argtypes = [
            ctypes.c_char_p, pointer, size, pointer, size, size, pointer, pointer, size, pointer, pointer,
        ]  # fmt: skip
        library.qwench_signatures.restype = None
        return library
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("MinHash uses numpy, ten times as slow: %s", error)
        return None
