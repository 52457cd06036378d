"""Triton kernels of what lies between matrix products: RMSNorm, SwiGLU, and rotary positions with the cache write.

Forward only. They round where the plain-PyTorch references round, so that results agree to the last bit but for the
order of sums and the last place of rsqrt, exp, cos and sin. A row's result depends on nothing but the row: tile shapes
follow from the row's length alone. Import this file only where `triton_launch.runs_triton` says so.

Shape suffixes: T tokens, D row length or head size, F feed-forward width, H query heads, K key/value heads,
R = D / 2 of a head, N cache blocks, P positions in a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwench.ops.triton_launch import dependent_launch, interpreted, options

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_xt,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_xt + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    normed = (x * rstd).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * D + columns, (normed * weight).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, pdl: bool | None = None) -> Tensor:
    """x [..., D], weight [D] -> [..., D] contiguous in x's dtype. No gradient.

    `pdl` None: programmatic dependent launch where the device has it.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0] == 0:
        return out
    pdl = dependent_launch(x.device) if pdl is None else pdl
    block = triton.next_power_of_2(size)
    launch: Any = _rms_norm_kernel[(rows.shape[0],)]
    launch(
        rows, weight_D.contiguous(), out, rows.stride(0), eps,
        D=size, BLOCK_D=block, USE_PDL=pdl, num_warps=min(max(block // 512, 1), 16), **options(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride_t, F, BLOCK_F: tl.constexpr, USE_PDL: tl.constexpr):
    """Programs (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up_ptr + row * stride_t + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_t + F + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * F + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


SWIGLU_BLOCK = 1024


def swiglu(gate_up: Tensor, pdl: bool | None = None) -> Tensor:
    """[..., 2F] (gate first) -> [..., F] contiguous in the same dtype. No gradient."""
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    if rows.shape[0] == 0:
        return out
    pdl = dependent_launch(gate_up.device) if pdl is None else pdl
    launch: Any = _swiglu_kernel[(rows.shape[0], triton.cdiv(width, SWIGLU_BLOCK))]
    launch(rows, out, rows.stride(0), width, BLOCK_F=SWIGLU_BLOCK, USE_PDL=pdl, num_warps=4, **options(pdl))
    return out


@triton.jit
def product(x, y):
    """x * y in fp32 that stays apart from a sum behind it: as one fused operation it would not be rounded before."""
    if _INTERPRETED:
        return x * y
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)


@triton.jit
def _rotate(first, second, position, inv_freq, dtype: tl.constexpr):
    """Both halves of rotated heads, rounded after each operation as tensors of `dtype` would be. Called after every
    load has been issued: sines of large angles take a while."""
    angles = position.to(tl.float32) * inv_freq
    cos = tl.cos(angles).to(dtype).to(tl.float32)[None, :]  # pyright: ignore[reportArgumentType]
    sin = tl.sin(angles).to(dtype).to(tl.float32)[None, :]  # pyright: ignore[reportArgumentType]
    rotated_first = product(first, cos).to(dtype).to(tl.float32) - product(second, sin).to(dtype).to(tl.float32)
    rotated_second = product(second, cos).to(dtype).to(tl.float32) + product(first, sin).to(dtype).to(tl.float32)
    return rotated_first.to(dtype), rotated_second.to(dtype)


@triton.jit
def _rope_and_store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    inv_freq_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_keys,
    stride_keys_head,
    stride_values,
    stride_values_head,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Programs (token, part): part 0 does k and v, part 1 and later HEADS query heads each. In place."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_R)
    dtype = q_ptr.dtype.element_ty
    inv_freq = tl.load(inv_freq_ptr + lanes, mask=lanes < R, other=0.0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions_ptr + token)
    if part == 0:
        k_heads = tl.arange(0, BLOCK_K)
        k_inside = (k_heads < K)[:, None] & (lanes < R)[None, :]
        k_ptrs = k_ptr + token * stride_kt + k_heads[:, None] * stride_kh + lanes[None, :]
        k_first = tl.load(k_ptrs, mask=k_inside, other=0.0).to(tl.float32)
        k_second = tl.load(k_ptrs + R, mask=k_inside, other=0.0).to(tl.float32)
        if HAS_CACHE:
            slot = tl.load(slots_ptr + token)
            v_ptrs = v_ptr + token * stride_vt + k_heads[:, None] * stride_vh + lanes[None, :]
            v_first = tl.load(v_ptrs, mask=k_inside, other=0.0).to(tl.float32)
            v_second = tl.load(v_ptrs + R, mask=k_inside, other=0.0).to(tl.float32)
        k_rotated = _rotate(k_first, k_second, position, inv_freq, dtype)
        tl.store(k_ptrs, k_rotated[0], mask=k_inside)
        tl.store(k_ptrs + R, k_rotated[1], mask=k_inside)
        if HAS_CACHE:
            store_dtype = keys_ptr.dtype.element_ty
            keys_ptrs = keys_ptr + slot * stride_keys + k_heads[:, None] * stride_keys_head + lanes[None, :]
            tl.store(keys_ptrs, k_rotated[0].to(tl.float32).to(store_dtype), mask=k_inside)
            tl.store(keys_ptrs + R, k_rotated[1].to(tl.float32).to(store_dtype), mask=k_inside)
            values_ptrs = values_ptr + slot * stride_values + k_heads[:, None] * stride_values_head + lanes[None, :]
            tl.store(values_ptrs, v_first.to(store_dtype), mask=k_inside)
            tl.store(values_ptrs + R, v_second.to(store_dtype), mask=k_inside)
    else:
        q_heads = (part - 1) * HEADS + tl.arange(0, HEADS)
        q_inside = (q_heads < H)[:, None] & (lanes < R)[None, :]
        q_ptrs = q_ptr + token * stride_qt + q_heads[:, None] * stride_qh + lanes[None, :]
        q_first = tl.load(q_ptrs, mask=q_inside, other=0.0).to(tl.float32)
        q_second = tl.load(q_ptrs + R, mask=q_inside, other=0.0).to(tl.float32)
        q_rotated = _rotate(q_first, q_second, position, inv_freq, dtype)
        tl.store(q_ptrs, q_rotated[0], mask=q_inside)
        tl.store(q_ptrs + R, q_rotated[1], mask=q_inside)


Q_HEADS = 8
"""Query heads a program rotates."""


def rope_and_store(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    positions_T: Tensor,
    inv_freq_R: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    slots_T: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """Rotate q and k in place, and write k and v to the cache: one kernel. No gradient.

    q, k and v may be views with any strides but 1 along D. A cache is (keys, values), each [N, P, K, D] with
    contiguous rows; its dtype may differ (a plain cast; fp8 saturates).
    """
    num_tokens, heads, size = q_THD.shape
    kv_heads, half = k_TKD.shape[1], size // 2
    assert q_THD.stride(2) == k_TKD.stride(2) == v_TKD.stride(2) == 1
    assert q_THD.dtype == k_TKD.dtype == v_TKD.dtype
    if num_tokens == 0:
        return
    pdl = dependent_launch(q_THD.device) if pdl is None else pdl
    if cache is None:
        keys, values, slots = k_TKD, v_TKD, positions_T  # not touched
        strides = (0, 0, 0, 0)
    else:
        assert slots_T is not None
        keys, values = (pages.view(-1, *pages.shape[2:]) for pages in cache)
        assert keys.stride(2) == values.stride(2) == 1
        slots = slots_T
        strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    launch: Any = _rope_and_store_kernel[(num_tokens, 1 + triton.cdiv(heads, Q_HEADS))]
    launch(
        q_THD, k_TKD, v_TKD, positions_T, inv_freq_R, keys, values, slots,
        q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0), v_TKD.stride(1), *strides,
        H=heads, K=kv_heads, R=half, HEADS=Q_HEADS, BLOCK_K=triton.next_power_of_2(kv_heads),
        BLOCK_R=triton.next_power_of_2(half), HAS_CACHE=cache is not None, USE_PDL=pdl, num_warps=1, **options(pdl),
    )  # fmt: skip
