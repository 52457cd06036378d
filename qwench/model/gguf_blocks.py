"""Expand GGUF's quantised blocks to float32.

The four types that the common files are made of (Q8_0, Q5_0, Q4_K, Q6_K) are done here, eight packed values at a time,
two to four times as fast as the `gguf` package; all others go through `gguf.dequantize`, with which the tests compare
bit for bit. A block is a run of 32 or 256 values of a row: scales in fp16 or 6 bits, then packed integers [ggml].

numpy, not PyTorch: its loops stay in the calling thread, so chunks of rows can be expanded on a few threads without
those threads fighting over PyTorch's own.
"""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

GGML = gguf.GGMLQuantizationType
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def expand(raw: Bytes, kind: gguf.GGMLQuantizationType) -> Floats:
    """Rows of bytes, uint8 [N, row_bytes], as float32 [N, columns].

    Raises NotImplementedError for a type that the gguf package cannot expand either.
    """
    if (fast := _FAST.get(kind)) is None:
        return gguf.dequantize(raw, kind)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return fast(raw.reshape(-1, block_bytes)).reshape(len(raw), -1)


def _half(pairs: Bytes) -> Floats:
    return np.ascontiguousarray(pairs).view(np.float16).astype(np.float32)


def _words(packed: Bytes) -> NDArray[np.uint64]:
    """[..., 8 n] bytes -> [..., n] words, so that one shift works on eight bytes."""
    return np.ascontiguousarray(packed).view(np.uint64)


def _everywhere(value: int) -> np.uint64:
    """A byte repeated in all eight places of a word."""
    return np.uint64(value * 0x0101010101010101)


_FOUR = np.uint64(4)
_LOW_HALVES = _everywhere(15)


def _nibbles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[..., n] words -> [..., 2, n]: the low half of every byte, then the high half."""
    return np.stack((words & _LOW_HALVES, (words >> _FOUR) & _LOW_HALVES), axis=-2)


def _signed(words: NDArray[np.uint64], zero: int) -> Floats:
    """Words of eight small integers as floats with `zero` subtracted, last axis eight times as long."""
    values = words.view(np.int8).astype(np.float32)
    values -= np.float32(zero)
    return values


def _q8_0(blocks: Bytes) -> Floats:
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks[:, :2])
    return values


# Byte -> word whose byte i is 16 times bit i: the fifth bits of eight values.
_FIFTH_BITS = _words((np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.uint8) * np.uint8(16)).ravel()


def _q5_0(blocks: Bytes) -> Floats:
    words = _nibbles(_words(blocks[:, 6:])).reshape(-1, 4)
    words |= _FIFTH_BITS[blocks[:, 2:6]]
    values = _signed(words, 16)
    values *= _half(blocks[:, :2])
    return values


def _q4_k(blocks: Bytes) -> Floats:
    scale, low = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    # Eight 6-bit scales and eight 6-bit minima in 12 bytes: the first four of each in the low 6 bits of bytes 0-3 and
    # 4-7; the others have their low 4 bits in bytes 8-11 and their high 2 bits on top of the first ones.
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((a & 63, (c & 15) | ((a >> 2) & 48)), axis=1) * scale
    minima = np.concatenate((b & 63, (c >> 4) | ((b >> 2) & 48)), axis=1) * low
    words = _nibbles(_words(blocks[:, 16:]).reshape(-1, 4, 4))
    values = _signed(words, 0).reshape(-1, 8, 32)
    values *= scales[:, :, None]
    values -= minima[:, :, None]
    return values


_TWO_BIT_SHIFTS = np.array([0, 2, 4, 6], np.uint64)[:, None]


def _q6_k(blocks: Bytes) -> Floats:
    words = _nibbles(_words(blocks[:, :128]).reshape(-1, 2, 8)).reshape(-1, 2, 4, 4)
    high = (_words(blocks[:, 128:192]).reshape(-1, 2, 1, 4) >> _TWO_BIT_SHIFTS) & _everywhere(3)
    words |= high << _FOUR
    values = _signed(words, 32).reshape(-1, 16, 16)
    values *= (blocks[:, 192:208].view(np.int8) * _half(blocks[:, 208:]))[:, :, None]
    return values


_FAST = {GGML.Q8_0: _q8_0, GGML.Q5_0: _q5_0, GGML.Q4_K: _q4_k, GGML.Q6_K: _q6_k}
