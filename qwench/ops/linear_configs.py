"""How `linear_triton.py` cuts its work into programs: what was measured best on an H200, and rules for other shapes.

Measured by `benchmarks/linear_decode.py --tune`, with rotating weights from memory as in a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How `gemv` is cut into programs."""

    block_n: int
    """Weight rows of a program at a time; with SwiGLU, pairs of rows."""
    block_k: int
    """Inputs a step, a power of two; K or more: the whole row at once."""
    num_warps: int
    programs: int = 0
    """Programs that share all blocks of rows between them (whole rows only); 0: a program for each block."""


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Tile shape of `matmul` and its pipelining."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    """Programs that share the inputs of one tile; the last to finish adds their parts up, always in one order."""


INVARIANT = MatmulConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4)
"""The one tile shape of the batch-invariant implementation (fp32 takes `INVARIANT_FP32`: its tiles are larger)."""
INVARIANT_FP32 = MatmulConfig(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)

GEMV: dict[tuple[int, int, bool], GemvConfig] = {
    (1152, 896, False): GemvConfig(2, 1024, 2, 0),  # 0.5B qkv: 1.45 us, 1.42 TB/s
    (896, 896, False): GemvConfig(4, 512, 4, 0),  # 0.5B o: 1.60 us, 1.01 TB/s
    (4864, 896, True): GemvConfig(2, 1024, 2, 1056),  # 0.5B gate_up: 5.94 us, 2.93 TB/s
    (896, 4864, False): GemvConfig(2, 2048, 8, 0),  # 0.5B down: 3.61 us, 2.42 TB/s
    (151936, 896, False): GemvConfig(4, 512, 2, 0),  # 0.5B head: 61.80 us, 4.41 TB/s
    (2048, 1536, False): GemvConfig(4, 2048, 2, 0),  # 1.5B qkv: 2.46 us, 2.56 TB/s
    (1536, 1536, False): GemvConfig(8, 2048, 8, 0),  # 1.5B o: 1.98 us, 2.39 TB/s
    (8960, 1536, True): GemvConfig(2, 2048, 4, 528),  # 1.5B gate_up: 14.72 us, 3.74 TB/s
    (1536, 8960, False): GemvConfig(4, 2048, 4, 0),  # 1.5B down: 7.83 us, 3.51 TB/s
    (151936, 1536, False): GemvConfig(2, 512, 2, 0),  # 1.5B head: 103.56 us, 4.51 TB/s
    (4608, 3584, False): GemvConfig(2, 4096, 2, 528),  # 7B qkv: 9.78 us, 3.38 TB/s
    (3584, 3584, False): GemvConfig(4, 1024, 4, 0),  # 7B o: 7.37 us, 3.48 TB/s
    (18944, 3584, True): GemvConfig(2, 4096, 4, 0),  # 7B gate_up: 62.00 us, 4.38 TB/s
    (3584, 18944, False): GemvConfig(2, 1024, 2, 0),  # 7B down: 32.39 us, 4.19 TB/s
    (152064, 3584, False): GemvConfig(4, 2048, 8, 0),  # 7B head: 238.09 us, 4.58 TB/s
}
"""Measured best by (outputs, inputs, SwiGLU): `benchmarks/linear_decode.py --tune` on an H200."""

SKINNY: dict[tuple[int, int, bool], MatmulConfig] = {
    (1152, 896, False): MatmulConfig(16, 16, 512, 2, 6),  # 0.5B qkv: 3.15 us, 0.65 TB/s
    (896, 896, False): MatmulConfig(16, 16, 128, 1, 6),  # 0.5B o: 2.92 us, 0.55 TB/s
    (4864, 896, True): MatmulConfig(16, 16, 128, 1, 6),  # 0.5B gate_up: 7.68 us, 2.27 TB/s
    (896, 4864, False): MatmulConfig(16, 16, 512, 2, 6),  # 0.5B down: 8.43 us, 1.03 TB/s
    (151936, 896, False): MatmulConfig(16, 64, 128, 4, 6),  # 0.5B head: 72.84 us, 3.74 TB/s
    (2048, 1536, False): MatmulConfig(16, 32, 256, 2, 6),  # 1.5B qkv: 4.29 us, 1.47 TB/s
    (1536, 1536, False): MatmulConfig(16, 16, 512, 2, 6),  # 1.5B o: 4.56 us, 1.04 TB/s
    (8960, 1536, True): MatmulConfig(16, 32, 128, 4, 6),  # 1.5B gate_up: 19.27 us, 2.86 TB/s
    (1536, 8960, False): MatmulConfig(16, 16, 512, 2, 6),  # 1.5B down: 16.29 us, 1.69 TB/s
    (151936, 1536, False): MatmulConfig(16, 64, 256, 4, 4),  # 1.5B head: 121.89 us, 3.83 TB/s
    (4608, 3584, False): MatmulConfig(16, 64, 64, 4, 6),  # 7B qkv: 15.99 us, 2.07 TB/s
    (3584, 3584, False): MatmulConfig(16, 32, 512, 4, 4),  # 7B o: 11.46 us, 2.24 TB/s
    (18944, 3584, True): MatmulConfig(16, 16, 512, 2, 4),  # 7B gate_up: 85.65 us, 3.17 TB/s
    (3584, 18944, False): MatmulConfig(16, 32, 512, 2, 4),  # 7B down: 48.45 us, 2.80 TB/s
    (152064, 3584, False): MatmulConfig(16, 32, 512, 4, 4),  # 7B head: 290.59 us, 3.75 TB/s
}
"""The same for 2 to 16 tokens."""

WHOLE_ROW = 4096
"""Longest rows that `gemv` takes at once by the rule of thumb: 8 KB in half precision."""


def _power_of_2(number: int) -> int:
    """The smallest that is not less."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def gemv_config(outputs: int, size: int, swiglu: bool) -> GemvConfig:
    """The measured configuration, else: blocks of rows so that some 400 programs, three on each multiprocessor of a
    large GPU, exist, and each thread has about four 16-byte loads under way."""
    if found := GEMV.get((outputs, size, swiglu)):
        return found
    block_k = _power_of_2(size)
    pair = 2 if swiglu else 1
    if block_k <= WHOLE_ROW:
        num_warps = min(max(block_k // 256, 1), 4)
        most = max(4 * num_warps * 256 // (pair * block_k), 1)
    else:
        block_k, num_warps, most = 2048, 4, 2
    block_n = most
    while block_n > 1 and outputs // block_n < 264:
        block_n //= 2
    blocks = -(-outputs // block_n)
    return GemvConfig(block_n, block_k, num_warps, programs=0 if blocks < 8192 else 132 * 8)


@functools.cache
def _skinny_rule(block_m: int, outputs: int, size: int, swiglu: bool) -> MatmulConfig:
    if found := SKINNY.get((outputs, size, swiglu)):
        return MatmulConfig(block_m, found.block_n, found.block_k, found.num_warps, found.num_stages)
    block_n = 64
    while block_n > 16 and outputs // block_n < 264:
        block_n //= 2
    block_k = 256 if size >= 2048 else 128
    return MatmulConfig(block_m, block_n, block_k, num_warps=max(block_n // 16, 2), num_stages=4)


def skinny_config(num_tokens: int, outputs: int, size: int, swiglu: bool) -> MatmulConfig:
    """The measured configuration for few tokens, else narrow tiles so that every multiprocessor has some."""
    return _skinny_rule(max(16, _power_of_2(min(num_tokens, 64))), outputs, size, swiglu)


TILES: dict[tuple[int, int, int, bool], MatmulConfig] = {
    (16, 896, 896, False): MatmulConfig(16, 16, 128, 2, 6),  # 0.5B o: 2.82 us, cuBLAS 4.22
    (32, 896, 896, False): MatmulConfig(32, 16, 128, 2, 4),  # 2.87 us, cuBLAS 4.28
    (64, 896, 896, False): MatmulConfig(64, 16, 64, 4, 6),  # 2.90 us, cuBLAS 4.31
    (128, 896, 896, False): MatmulConfig(64, 16, 128, 4, 6),  # 3.44 us, cuBLAS 4.37
    (256, 896, 896, False): MatmulConfig(64, 32, 64, 4, 6),  # 3.82 us, cuBLAS 4.72
    (32, 1152, 896, False): MatmulConfig(32, 16, 128, 2, 4),  # 0.5B qkv with its norm: 4.24 us, cuBLAS 6.2
    (64, 1152, 896, False): MatmulConfig(64, 16, 64, 4, 6),  # 4.34 us, cuBLAS 6.3
    (128, 1152, 896, False): MatmulConfig(64, 32, 64, 4, 6),
    (256, 1152, 896, False): MatmulConfig(64, 32, 64, 4, 6),  # 5.87 us, cuBLAS 7.0
    (16, 896, 4864, False): MatmulConfig(16, 32, 128, 2, 4, split_k=8),  # 0.5B down: 5.40 us, cuBLAS 8.14
    (32, 896, 4864, False): MatmulConfig(32, 32, 128, 2, 4, split_k=8),  # 6.52 us, cuBLAS 8.31
    (64, 896, 4864, False): MatmulConfig(32, 32, 128, 2, 4, split_k=4),  # 7.84 us, cuBLAS 8.61
    (64, 1536, 1536, False): MatmulConfig(64, 16, 64, 4, 6),  # 1.5B o
    (64, 2048, 1536, False): MatmulConfig(64, 16, 128, 4, 6),  # 1.5B qkv: 1.5 us less than cuBLAS, as the next two
    (128, 2048, 1536, False): MatmulConfig(64, 32, 128, 4, 4),
    (256, 2048, 1536, False): MatmulConfig(64, 64, 128, 4, 4),
}
"""Measured best by (tokens, outputs, inputs, SwiGLU) for up to that many tokens. What is missing above 16 tokens goes
to cuBLAS, which is faster there. A norm inside the product was tried and is slower than a kernel of its own."""

_TILE_TOKENS = (16, 32, 64, 128, 256)


@functools.cache
def tile_config(num_tokens: int, outputs: int, size: int, swiglu: bool) -> MatmulConfig | None:
    """The tile of `matmul` for so many tokens (2 or more), or None where cuBLAS is the better choice."""
    for tokens in _TILE_TOKENS:
        if num_tokens <= tokens:
            found = TILES.get((tokens, outputs, size, swiglu))
            return found or (skinny_config(num_tokens, outputs, size, swiglu) if tokens == 16 else None)
    return None
