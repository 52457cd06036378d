"""The fast encoder: gigatoken where it gives the ids of the definition, the `tokenizers` library elsewhere.

Measured on every code point and on random strings of all scripts (tests/tokenizer/test_agreement.py), the two differ in
one thing: gigatoken's tables are of a newer Unicode. It orders some rare combining marks differently, so text is
normalised here and not there; and it counts newly assigned letters as letters, so text with code points that the older
tables do not know goes to `tokenizers`. On everything else they agree.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import normalizers

from qwench.tokenizer import bpe
from qwench.tokenizer.files import tokenizer_json
from qwench.tokenizer.vocabulary import Vocabulary

try:
    import gigatoken
except ImportError:  # no wheel for this platform
    gigatoken = None

_NFC = normalizers.NFC()

RENEW_AFTER_CHARS = 1 << 29
"""gigatoken remembers every distinct piece it has seen; a fresh instance after so much text bounds that memory."""

_NEWEST = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
"""Letters and digits of Unicode 17 (2025)."""

TRICKY = (
    "Hello, world! 12345 I'm you're I'LL 'ſ don'T",
    "  two  spaces   \n\n\n \t\r\n\r\n x=1;;;\n\n\ny\u00a0x\u3000全角",
    "你好，世界。 한국어 العربية हिन्दी ไทย e\u0301 Ａ x² ½ Ⅷ 🙂👩‍👩‍👧 \u200b\ufeff\x00\x85\u2028",
    "<|im_start|>system\n<|im_end|><|endoftext|></tool_call>",
    "def f(x):\n\treturn {'a': [1.5e-3, None]}  # ok\n",
)
_BATCH_CHARS = 100_000
"""Batches of less text are encoded one by one: gigatoken's batches need 0.3 s for imports at first."""


@functools.cache
def doubtful() -> np.ndarray:
    """bool[0x110000]: code points on whose class tables of different Unicode versions may disagree."""
    table = np.zeros(0x110000, dtype=bool)
    # Planes 4-13 are empty and 14-16 hold no letters; the first four are where new scripts appear.
    table[:0x40000] = [unicodedata.category(chr(code)) == "Cn" for code in range(0x40000)]
    for first, last in _NEWEST:
        table[first : last + 1] = True
    return table


@functools.cache
def _worth_a_look() -> re.Pattern[str]:
    """Finds what `doubtful` must be asked about: its own code points, surrogates, and all beyond U+FFFF.

    The last are taken as one range because the search then tests each character of usual text in one step.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], doubtful()[:0x10000], [False])).astype(np.int8)))
    ranges = [f"{chr(first)}-{chr(end - 1)}" for first, end in edges.reshape(-1, 2).tolist()]
    return re.compile(f"[{''.join(ranges)}\ud800-\udfff\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs become their character, lone surrogates U+FFFD."""
    try:
        text.encode("utf-8")  # faster than any search for surrogates
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def normalise(text: str) -> str:
    """NFC as the `tokenizers` library has it, at the speed of Python's own check where nothing is to be done.

    What is NFC by newer tables is NFC by older ones, so Python's check may stand in for the library's.
    """
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else _NFC.normalize_str(text)


class Backend(Protocol):
    """Encodes without control tokens: none can come out, whatever the text. Safe to call from several threads."""

    name: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: int32[n]. A lone surrogate counts as U+FFFD."""
        ...

    def encode_batch(self, texts: Sequence[str], *, parallel: bool | None) -> list[np.ndarray]:
        """Ids of each text, on the calling thread or on the library's pool; None is the pool where that is safe."""
        ...


class TokenizersBackend:
    """The `tokenizers` library: exact, about 2 MB/s a core."""

    name = "tokenizers"

    def __init__(self, vocabulary: Vocabulary) -> None:
        table = tokenizer_json(vocabulary, with_controls=False)
        self._encoder = HuggingFaceTokenizer.from_str(json.dumps(table))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoder.encode(clean(text), add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str], *, parallel: bool | None) -> list[np.ndarray]:
        if parallel is False:
            return [self.encode(text) for text in texts]
        encodings = self._encoder.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


class GigatokenBackend:
    """gigatoken for what it does as `tokenizers` does, and that library for the rest."""

    name = "gigatoken"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._exact: TokenizersBackend | None = None
        self._encoder = self._build()
        self._num_chars = 0

    def _build(self) -> Any:
        assert gigatoken is not None
        table = tokenizer_json(self._vocabulary, with_controls=False, normalize=False)
        return gigatoken.Tokenizer.from_json(json.dumps(table))

    def encode(self, text: str) -> np.ndarray:
        prepared = self._prepare(text)
        if prepared is None:
            return self._exactly(text)
        self._count(len(prepared))
        return self._encoder.encode(prepared).view(np.int32)

    def encode_batch(self, texts: Sequence[str], *, parallel: bool | None) -> list[np.ndarray]:
        num_chars = sum(map(len, texts))
        if num_chars < _BATCH_CHARS:
            return [self.encode(text) for text in texts]
        prepared = [self._prepare(text) for text in texts]
        self._count(num_chars)
        # One flat array of ids and the offsets of the texts in it, which is how gigatoken's result is laid out.
        lists = self._encoder.encode_batch([text or "" for text in prepared], parallel=parallel).layout
        offsets, ids = np.asarray(lists.offsets.data).tolist(), np.asarray(lists.content.data).view(np.int32)
        return [
            self._exactly(texts[i]) if prepared[i] is None else ids[offsets[i] : offsets[i + 1]]
            for i in range(len(texts))
        ]

    @staticmethod
    def _prepare(text: str) -> str | None:
        """The text normalised; None if it has characters that the two libraries may see differently."""
        if text.isascii():
            return text
        if _worth_a_look().search(text) is None:
            return normalise(text)
        text = normalise(clean(text))
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return None if doubtful()[codes].any() else text

    def _exactly(self, text: str) -> np.ndarray:
        with self._lock:
            if self._exact is None:
                self._exact = TokenizersBackend(self._vocabulary)
        return self._exact.encode(text)

    def _count(self, num_chars: int) -> None:
        """Take a fresh encoder when the present one has seen enough."""
        self._num_chars += num_chars
        if self._num_chars > RENEW_AFTER_CHARS:
            with self._lock:
                if self._num_chars > RENEW_AFTER_CHARS:  # another thread may have been faster
                    self._encoder, self._num_chars = self._build(), 0


def choose(vocabulary: Vocabulary) -> Backend:
    """gigatoken if it takes this vocabulary and passes the self-check, else `tokenizers`."""
    if gigatoken is not None:
        try:
            backend = GigatokenBackend(vocabulary)
            if all(backend.encode(text).tolist() == bpe.encode(text, vocabulary.ranks) for text in TRICKY):
                return backend
        except (ValueError, TypeError, RuntimeError):
            pass  # a vocabulary that gigatoken refuses is one for the other library
    return TokenizersBackend(vocabulary)
