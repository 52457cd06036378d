"""Triton kernels of what `ops.sampling` does to logits before the draw: penalties, their counts, grammar masks.

Import this file only where `triton_launch.runs_triton` says so.
Shape suffixes: B rows, V columns, R rows of the table of counts, W words of a bit mask, N any number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.sampling import MAX_COUNT

TILE = 2048

_TILE = tl.constexpr(TILE)
_MAX_COUNT = tl.constexpr(MAX_COUNT)


@triton.jit
def _penalise_kernel(
    logits_ptr,
    counts_ptr,
    slots_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    out_ptr,
    stride_b,
    out_stride_b,
    V,
):
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tile * _TILE + tl.arange(0, _TILE)
    inside = columns < V
    x = tl.load(logits_ptr + b * stride_b + columns, mask=inside, other=0.0).to(tl.float32)
    repetition, presence = tl.load(repetition_ptr + b), tl.load(presence_ptr + b)
    frequency = tl.load(frequency_ptr + b)
    if (repetition != 1) | (presence != 0) | (frequency != 0):
        counts = tl.load(counts_ptr + tl.load(slots_ptr + b) * V + columns, mask=inside, other=0).to(tl.int32)
        times = counts & _MAX_COUNT
        x = tl.where(counts != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = x - tl.where(times > 0, presence, 0.0) - frequency * times.to(tl.float32)
    tl.store(out_ptr + b * out_stride_b + columns, x, mask=inside)


def penalise(
    logits_BV: Tensor,
    counts_RV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
    out_BV: Tensor | None = None,
) -> Tensor:
    """See `sampling.penalise`. Rows without a penalty are only copied."""
    num_rows, num_columns = logits_BV.shape
    assert logits_BV.stride(1) == 1
    assert counts_RV.is_contiguous()
    assert counts_RV.shape[1] == num_columns
    out = torch.empty_like(logits_BV, dtype=torch.float32) if out_BV is None else out_BV
    assert out.stride(1) == 1
    assert out.dtype == torch.float32
    if num_rows:
        launch: Any = _penalise_kernel[(triton.cdiv(num_columns, TILE), num_rows)]
        launch(
            logits_BV, counts_RV, slots_B, repetition_B, presence_B, frequency_B, out, logits_BV.stride(0),
            out.stride(0), num_columns, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _count_kernel(words_ptr, slots_ptr, tokens_ptr, V, N, BLOCK: tl.constexpr):
    """Counts are added as halves of 32-bit words, as there is no 16-bit atomic; no count reaches its neighbour."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    token = tl.load(tokens_ptr + places, mask=inside, other=0)
    word = words_ptr + (tl.load(slots_ptr + places, mask=inside, other=0) * V + token) // 2
    shift = ((token & 1) * 16).to(tl.int32)
    times = (tl.load(word, mask=inside, other=0) >> shift) & _MAX_COUNT
    tl.atomic_add(word, tl.full((BLOCK,), 1, tl.int32) << shift, mask=inside & (times < _MAX_COUNT))


def count_(counts_RV: Tensor, slots_N: Tensor, tokens_N: Tensor) -> None:
    """See `sampling.count_`."""
    assert counts_RV.is_contiguous()
    assert counts_RV.shape[1] % 2 == 0
    if tokens_N.numel():
        launch: Any = _count_kernel[(triton.cdiv(tokens_N.numel(), 128),)]
        launch(
            counts_RV.view(torch.int32), slots_N, tokens_N, counts_RV.shape[1], tokens_N.numel(), BLOCK=128, num_warps=4
        )


@triton.jit
def _mask_kernel(logits_ptr, mask_ptr, stride_b, stride_mask, V):
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tile * _TILE + tl.arange(0, _TILE)
    words = tl.load(mask_ptr + b * stride_mask + columns // 32, mask=columns < V, other=-1)
    banned = ((words >> (columns % 32)) & 1) == 0
    nothing = tl.full((_TILE,), float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + b * stride_b + columns, nothing, mask=banned & (columns < V))


def mask_(logits_BV: Tensor, mask_BW: Tensor) -> None:
    """See `sampling.mask_`. Only banned places are written, and nothing is read but the mask."""
    num_rows, num_columns = logits_BV.shape
    assert logits_BV.stride(1) == 1
    assert mask_BW.stride(1) == 1
    assert mask_BW.shape[1] * 32 >= num_columns
    if num_rows:
        launch: Any = _mask_kernel[(triton.cdiv(num_columns, TILE), num_rows)]
        launch(logits_BV, mask_BW, logits_BV.stride(0), mask_BW.stride(0), num_columns, num_warps=4)
