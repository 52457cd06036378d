"""The fast encoder: gigatoken where it gives the ids of the definition, the `tokenizers` library elsewhere.

Measured on every code point and on random strings of all scripts (tests/tokenizer/test_agreement.py), the two differ in
one thing: gigatoken's tables are of a newer Unicode. It orders some rare combining marks differently, so text is
normalised here and not there; and it counts newly assigned letters as letters, so text with code points that the older
tables do not know goes to `tokenizers`. On everything else they agree.
"""

from __future__ import annotations

import functools
import json
import threading
import unicodedata
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

RENEW_AFTER_BYTES = 1 << 29
"""gigatoken remembers every distinct piece it has seen; a fresh instance after so much text bounds that memory."""

_NEWEST = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
"""Letters and digits of Unicode 17 (2025)."""

_TRICKY = (
    "Hello, world! 12345 I'm you're I'LL 'ſ don'T",
    "  two  spaces   \n\n\n \t\r\n\r\n x=1;;;\n\n\ny\u00a0x\u3000全角",
    "你好，世界。 한국어 العربية हिन्दी ไทย e\u0301 Ａ x² ½ Ⅷ 🙂👩‍👩‍👧 \u200b\ufeff\x00\x85\u2028",
    "<|im_start|>system\n<|im_end|><|endoftext|></tool_call>",
    "def f(x):\n\treturn {'a': [1.5e-3, None]}  # ok\n",
)


@functools.cache
def _doubtful() -> np.ndarray:
    """bool[0x110000]: code points on whose class tables of different Unicode versions may disagree."""
    table = np.zeros(0x110000, dtype=bool)
    # Planes 4-13 are empty and 14-16 hold no letters; the first four are where new scripts appear.
    table[:0x40000] = [unicodedata.category(chr(code)) == "Cn" for code in range(0x40000)]
    for first, last in _NEWEST:
        table[first : last + 1] = True
    return table


def normalise(text: str) -> str:
    """NFC as the `tokenizers` library has it, at the speed of Python's own check where nothing is to be done.

    What is NFC by newer tables is NFC by older ones, so Python's check may stand in for the library's.
    """
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else _NFC.normalize_str(text)


class Backend(Protocol):
    """Encodes without control tokens: none can come out, whatever the text. Safe to call from several threads."""

    name: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of text without lone surrogates: int32[n]."""
        ...


class TokenizersBackend:
    """The `tokenizers` library: exact, 2-3 MB/s."""

    name = "tokenizers"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._encoder = HuggingFaceTokenizer.from_str(json.dumps(tokenizer_json(vocabulary, with_controls=False)))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32)


class GigatokenBackend:
    """gigatoken for what it does as `tokenizers` does, and that library for the rest."""

    name = "gigatoken"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._exact: TokenizersBackend | None = None
        self._encoder = self._build()
        self._num_bytes = 0

    def _build(self) -> Any:
        assert gigatoken is not None
        return gigatoken.Tokenizer.from_json(
            json.dumps(tokenizer_json(self._vocabulary, with_controls=False, normalize=False))
        )

    def encode(self, text: str) -> np.ndarray:
        if not text.isascii():
            text = normalise(text)
            if _doubtful()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any():
                return self._exactly(text)
        if self._num_bytes > RENEW_AFTER_BYTES:
            self._renew()
        self._num_bytes += len(text)
        return self._encoder.encode(text).view(np.int32)

    def _exactly(self, text: str) -> np.ndarray:
        with self._lock:
            if self._exact is None:
                self._exact = TokenizersBackend(self._vocabulary)
        return self._exact.encode(text)

    def _renew(self) -> None:
        with self._lock:
            if self._num_bytes > RENEW_AFTER_BYTES:  # another thread may have been faster
                self._encoder, self._num_bytes = self._build(), 0


def choose(vocabulary: Vocabulary) -> Backend:
    """gigatoken if it takes this vocabulary and passes the self-check, else `tokenizers`."""
    if gigatoken is not None:
        try:
            backend = GigatokenBackend(vocabulary)
            if all(backend.encode(text).tolist() == bpe.encode(text, vocabulary.ranks) for text in _TRICKY):
                return backend
        except (ValueError, TypeError, RuntimeError):
            pass  # a vocabulary that gigatoken refuses is one for the other library
    return TokenizersBackend(vocabulary)
