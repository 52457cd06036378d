"""Triton kernels of SwiGLU and of rotary positions with their gradients, for training.

A compiler writes the gradient of SwiGLU, and that of a rotation, as a concatenation of two halves, in which every
element computes both: on an H200 2.1 and 0.8 TB/s of 4.27, measured. Here a program computes both halves of its
elements and writes each where it belongs. Everything is fp32 inside; forward results are rounded where the references
round.
Import this file only where `triton_launch.runs_triton` says so.

Shape suffixes: T tokens, F feed-forward width, H query heads, K key/value heads, D head size, R = D / 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.elementwise_triton import product

BLOCK = 1024
"""Columns of a program: 8 a thread, one load of 16 bytes in half precision."""


@triton.jit
def _swiglu_backward_kernel(gate_up_ptr, d_out_ptr, d_gate_up_ptr, F, BLOCK_F: tl.constexpr):
    """Programs (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = d_gate_up_ptr.dtype.element_ty
    d_gate = d_out * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(d_gate_up_ptr + row * 2 * F + columns, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up_ptr + row * 2 * F + F + columns, (d_out * silu).to(dtype), mask=inside)


def swiglu_backward(gate_up_TF: Tensor, d_out_TF: Tensor) -> Tensor:
    """The gradient [T, 2F] of `swiglu`, from its input [T, 2F] and its result's gradient [T, F], both contiguous."""
    assert gate_up_TF.is_contiguous()
    assert d_out_TF.is_contiguous()
    num_tokens, width = d_out_TF.shape
    d_gate_up_TF = torch.empty_like(gate_up_TF)
    if num_tokens:
        launch: Any = _swiglu_backward_kernel[(num_tokens, triton.cdiv(width, BLOCK))]
        launch(gate_up_TF, d_out_TF, d_gate_up_TF, width, BLOCK_F=BLOCK, num_warps=4)
    return d_gate_up_TF


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program a token; rows are the query heads, then the key heads. BACKWARD turns the other way."""
    token = tl.program_id(0).to(tl.int64)
    heads, lanes = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_R)[None, :]
    is_q, is_k = (heads < H) & (lanes < R), (heads >= H) & (heads < H + K) & (lanes < R)
    q_in = q_ptr + token * stride_qt + heads * stride_qh + lanes
    k_in = k_ptr + token * stride_kt + (heads - H) * stride_kh + lanes
    first = tl.load(q_in, mask=is_q, other=0.0) + tl.load(k_in, mask=is_k, other=0.0)
    second = tl.load(q_in + R, mask=is_q, other=0.0) + tl.load(k_in + R, mask=is_k, other=0.0)
    cos = tl.load(cos_ptr + token * R + lanes, mask=lanes < R, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * R + lanes, mask=lanes < R, other=0.0).to(tl.float32)
    dtype = q_out_ptr.dtype.element_ty
    first, second = first.to(tl.float32), second.to(tl.float32)
    if BACKWARD:
        turned_first = first * cos + second * sin
        turned_second = second * cos - first * sin
    else:
        turned_first = product(first, cos).to(dtype).to(tl.float32) - product(second, sin).to(dtype).to(tl.float32)
        turned_second = product(second, cos).to(dtype).to(tl.float32) + product(first, sin).to(dtype).to(tl.float32)
    q_out = q_out_ptr + token * (H * 2 * R) + heads * (2 * R) + lanes
    k_out = k_out_ptr + token * (K * 2 * R) + (heads - H) * (2 * R) + lanes
    tl.store(q_out, turned_first.to(dtype), mask=is_q)
    tl.store(q_out + R, turned_second.to(dtype), mask=is_q)
    tl.store(k_out, turned_first.to(dtype), mask=is_k)
    tl.store(k_out + R, turned_second.to(dtype), mask=is_k)


def rotate(q_THD: Tensor, k_TKD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Rotated q and k, contiguous; `backward`: their gradients, from those of the rotated.

    q and k share a dtype and may have any strides but 1 along D; the tables are contiguous.
    """
    (num_tokens, heads, size), kv_heads = q_THD.shape, k_TKD.shape[1]
    assert q_THD.stride(2) == k_TKD.stride(2) == 1
    assert cos_T1R.is_contiguous()
    assert sin_T1R.is_contiguous()
    q_out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    k_out = torch.empty(k_TKD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens:
        launch: Any = _rotate_kernel[(num_tokens,)]
        launch(
            q_THD, k_TKD, cos_T1R, sin_T1R, q_out, k_out,
            q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1),
            H=heads, K=kv_heads, R=size // 2, BLOCK_H=triton.next_power_of_2(heads + kv_heads),
            BLOCK_R=triton.next_power_of_2(size // 2), BACKWARD=backward, num_warps=2,
        )  # fmt: skip
    return q_out, k_out
