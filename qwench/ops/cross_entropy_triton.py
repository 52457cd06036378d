"""Triton kernels of the loss over a chunk of logits: token losses, and the logits turned into their own gradient.

Each multiprocessor has one program, which takes one row after another and sweeps it twice: first the largest logit and
the sum of exponentials, then the gradient, written over the logits. 151,936 logits in bf16 are 304 KB, more than a
multiprocessor's registers or shared memory hold, so the second sweep reads again. It runs backwards: what was read last
is still in the L2 cache (40 MB are under way on 132 multiprocessors; an H200 has 50 MB). From memory that is one read
and one write, 4 bytes a logit, at best and 6 bytes at worst: by arithmetic 2.3 to 3.5 ms for 16,384 tokens x 151,936 at
4.27 TB/s, beside 19.6 ms for the products.

Everything is fp32 inside. Import this file only where `triton_launch.runs_triton` says so.

Shape suffixes: C tokens of a chunk, V vocabulary rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.triton_launch import interpreted

GROUP = tl.constexpr(8)
"""Neighbouring logits that a thread loads at once (16 bytes); each group keeps one running maximum and sum."""


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    logsumexp_ptr,
    stride_row,
    num_rows,
    z_loss,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """A program takes every num_programs-th row. The maximum and the sum are kept apart by group until the row's end: a
    reduction over the whole program in each step would cost a barrier, one over single logits another exponential."""
    columns = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_ptr = logits_ptr + row * stride_row.to(tl.int64)
        target = tl.load(targets_ptr + row)
        # Here, so that the reductions below stand between this and the stores of other threads.
        target_logit = tl.load(row_ptr + target).to(tl.float32)
        largest = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK // GROUP,), tl.float32)
        for start in range(0, V, BLOCK):
            at = start + columns
            logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"), eviction_policy="evict_last")
            logits = logits.to(tl.float32)
            # A group that is masked as a whole keeps its maximum; -1e30 keeps -inf - -inf out of the exponentials.
            higher = tl.maximum(tl.maximum(largest, tl.max(logits, 1)), -1e30)
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            largest = higher
        row_largest = tl.max(largest, 0)
        row_total = tl.sum(total * tl.exp(largest - row_largest), 0)
        log_total = tl.log(row_total)
        logsumexp = row_largest + log_total
        # In this order, equal logits far from 0 lose nothing.
        tl.store(losses_ptr + row, (row_largest - target_logit) + log_total)
        tl.store(logsumexp_ptr + row, logsumexp)
        if WITH_GRADIENT:
            weight = tl.load(weights_ptr + row)
            scale = weight * (1.0 + 2.0 * z_loss * logsumexp) / row_total
            last = (V - 1) // BLOCK * BLOCK
            for back in range(0, V, BLOCK):
                at = last - back + columns
                logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first")
                gradient = tl.exp(logits.to(tl.float32) - row_largest) * scale
                gradient = tl.where(at == target, gradient - weight, gradient).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + at, gradient, mask=at < V, eviction_policy="evict_first")


def cross_entropy_(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor,
    losses_C: Tensor,
    logsumexp_C: Tensor,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """Write each row's loss, -log softmax(logits)[target] without the weight, and its log sum exp.

    `with_gradient` overwrites the logits with d/dlogits of the sum over rows of weight * (loss + z_loss * lse ** 2).
    logits in any float dtype with neighbouring columns, targets int64 in range; the others fp32. All [C] contiguous.
    """
    num_rows, vocabulary = logits_CV.shape
    assert logits_CV.stride(1) == 1
    assert all(x.is_contiguous() for x in (targets_C, weights_C, losses_C, logsumexp_C))
    if num_rows == 0:
        return
    block, num_warps = launch_shape(vocabulary)
    launch: Any = _cross_entropy_kernel[(min(num_rows, _programs(logits_CV.device)),)]
    launch(
        logits_CV, targets_C, weights_C, losses_C, logsumexp_C, logits_CV.stride(0), num_rows, z_loss,
        V=vocabulary, BLOCK=block, WITH_GRADIENT=with_gradient, num_warps=num_warps,
    )  # fmt: skip


ROWS_PER_MULTIPROCESSOR = 1
"""Rows under way on each: two would fit, and 80 MB of rows would not fit the L2 cache."""


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return ROWS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def launch_shape(vocabulary: int) -> tuple[int, int]:
    """(logits of one step, warps) of a program: 16 logits a thread, so that 32 KB of loads are under way, what it takes
    to keep the memory busy."""
    block = min(16384, max(64, 1 << (vocabulary - 1).bit_length()))
    return block, max(1, min(32, block // 512))


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, num_elements, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
        for step in range(STEPS):
            at = start + step * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < num_elements, other=0.0)
            tl.store(x_ptr + at, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=at < num_elements)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, an fp32 scalar on x's device, without touching x's memory where the factor is 1. x is contiguous."""
    assert x.is_contiguous()
    steps, block = 8, 64 if interpreted() else 2048
    if x.numel():
        launch: Any = _scale_kernel[(triton.cdiv(x.numel(), steps * block),)]
        launch(x, factor, x.numel(), STEPS=steps, BLOCK=block, num_warps=4)
    return x
