"""Triton kernels of `paging.py`: one program each, for up to some thousands of rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwench.ops.triton_launch import dependent_launch, options


@triton.jit
def _locate_kernel(
    position, live, table, slots, lens, stride_table, B, W: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < B
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    alive = tl.load(live + row, mask=inside, other=0)
    at = tl.load(position + row, mask=inside, other=0) * alive
    index = at // P
    known = inside & (alive != 0) & (index < W)
    block = tl.load(table + row.to(tl.int64) * stride_table + index, mask=known, other=0).to(tl.int64)
    tl.store(slots + row, block * P + at % P, mask=inside)
    tl.store(lens + row, (at + 1).to(tl.int32), mask=inside)


def locate(position_B: Tensor, live_B: Tensor, table_BW: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    num_rows, width = table_BW.shape
    slots = torch.empty(num_rows, dtype=torch.int64, device=position_B.device)
    lens = torch.empty(num_rows, dtype=torch.int32, device=position_B.device)
    pdl = dependent_launch(position_B.device)
    launch: Any = _locate_kernel[(1,)]
    launch(
        position_B, live_B, table_BW, slots, lens, table_BW.stride(0), num_rows, W=width, P=block_size,
        BLOCK=max(32, triton.next_power_of_2(num_rows)), USE_PDL=pdl, **options(pdl),
    )  # fmt: skip
    return slots, lens


@triton.jit
def _advance_kernel(
    tokens, logprobs, last_token, position, step, live, ring_tokens, ring_logprobs, ring_at,
    stride_tokens, stride_logprobs, B, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < B
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.load(ring_at)
    token = tl.load(tokens + row, mask=inside)
    alive = tl.load(live + row, mask=inside)
    tl.store(ring_tokens + place * stride_tokens + row, token, mask=inside)
    tl.store(ring_logprobs + place * stride_logprobs + row, tl.load(logprobs + row, mask=inside), mask=inside)
    tl.store(last_token + row, token, mask=inside)
    tl.store(position + row, tl.load(position + row, mask=inside) + alive, mask=inside)
    tl.store(step + row, tl.load(step + row, mask=inside) + alive, mask=inside)
    tl.debug_barrier()
    tl.store(ring_at, place + 1)


def advance(
    tokens_B: Tensor, logprobs_B: Tensor, last_token_B: Tensor, position_B: Tensor, step_B: Tensor, live_B: Tensor,
    ring_tokens_SR: Tensor, ring_logprobs_SR: Tensor, ring_at: Tensor,
) -> None:  # fmt: skip
    num_rows = tokens_B.numel()
    pdl = dependent_launch(tokens_B.device)
    launch: Any = _advance_kernel[(1,)]
    launch(
        tokens_B, logprobs_B, last_token_B, position_B, step_B, live_B, ring_tokens_SR, ring_logprobs_SR, ring_at,
        ring_tokens_SR.stride(0), ring_logprobs_SR.stride(0), num_rows,
        BLOCK=max(32, triton.next_power_of_2(num_rows)), USE_PDL=pdl, **options(pdl),
    )  # fmt: skip
