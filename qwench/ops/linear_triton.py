"""Triton kernels of a linear layer on few tokens, where the time is that of reading the weights once.

* `gemv`: one token. Plain multiply-adds over rows of weights, fp32 sums; RMSNorm, bias, SwiGLU and residual inside.
* `matmul`: a tile of tokens against tiles of weight rows on the tensor cores, for some tens of tokens, and with one
  fixed tile shape for any number of tokens as the batch-invariant implementation.

Forward only, half precision or fp32. Sums run in a fixed order, so equal inputs give equal bits. How work is cut into
programs is in `linear_configs.py`.
Import this file only where `triton_launch.runs_triton` says so; it also states the rules of dependent launch.

Shape suffixes: T tokens, N weight rows (outputs), K inputs, F feed-forward width (N = 2F with SwiGLU).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwench.ops.linear_configs import GemvConfig, MatmulConfig, gemv_config, skinny_config
from qwench.ops.triton_launch import dependent_launch, options, zeroed_counters


@triton.jit
def _row_tile(w_ptr, rows, columns, num_rows, stride_wn, K: tl.constexpr):
    """Weights [rows, columns], zero outside."""
    offsets = rows.to(tl.int64)[:, None] * stride_wn + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < K)[None, :]
    return tl.load(w_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _normed(x, rstd, weight, dtype: tl.constexpr):
    """RMSNorm's last steps with the reference's roundings, as fp32."""
    return ((x * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _biases(bias_ptr, rows, N, dtype: tl.constexpr, HAS_BIAS: tl.constexpr, SWIGLU: tl.constexpr):
    """fp32 biases of the rows and, with SwiGLU, of their gates; without a bias zeros that the compiler drops."""
    bias = tl.zeros(rows.shape, tl.float32)
    gate_bias = bias
    if HAS_BIAS:
        up_bias_ptr = bias_ptr + N if SWIGLU else bias_ptr
        bias = tl.load(up_bias_ptr + rows, mask=rows < N, other=0.0).to(dtype).to(tl.float32)
        if SWIGLU:
            gate_bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(dtype).to(tl.float32)
    return bias, gate_bias


@triton.jit
def _residual(res_ptr, rows, N, HAS_RES: tl.constexpr):
    residual = tl.zeros(rows.shape, tl.float32)
    if HAS_RES:
        residual = tl.load(res_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    return residual


@triton.jit
def _store(out_ptr, rows, N, y, gate, bias, gate_bias, residual, SWIGLU: tl.constexpr):
    """Bias, SwiGLU, residual, and the store of one block of output columns; all in fp32 until the store."""
    y += bias
    if SWIGLU:
        gate += gate_bias
        y = gate / (1.0 + tl.exp(-gate)) * y
    tl.store(out_ptr + rows, (y + residual).to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _gemv_rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    res_ptr,
    out_ptr,
    N,
    stride_wn,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_RES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Whole rows at once, the input in registers; STEPS blocks of rows a program. N counts outputs: rows, or pairs of
    rows with SwiGLU."""
    columns = tl.arange(0, BLOCK_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    up_ptr = w_ptr + N.to(tl.int64) * stride_wn if SWIGLU else w_ptr

    # Constants are read before the wait: the whole first block of weights is under way when the input arrives.
    weights = _row_tile(up_ptr, rows, columns, N, stride_wn, K)
    gate_weights = weights
    if SWIGLU:
        gate_weights = _row_tile(w_ptr, rows, columns, N, stride_wn, K)
    bias, gate_bias = _biases(bias_ptr, rows, N, dtype, HAS_BIAS, SWIGLU)
    if HAS_NORM:
        norm_weight = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(dtype).to(tl.float32)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    residual = _residual(res_ptr, rows, N, HAS_RES)
    if HAS_NORM:
        x = _normed(x, tl.rsqrt(tl.sum(x * x, 0) / K + eps), norm_weight, dtype)

    for _ in range(STEPS - 1):
        next_rows = rows + tl.num_programs(0) * BLOCK_N
        next_weights = _row_tile(up_ptr, next_rows, columns, N, stride_wn, K)  # in flight during the sums
        next_gate = next_weights
        if SWIGLU:
            next_gate = _row_tile(w_ptr, next_rows, columns, N, stride_wn, K)
        next_bias, next_gate_bias = _biases(bias_ptr, next_rows, N, dtype, HAS_BIAS, SWIGLU)
        next_residual = _residual(res_ptr, next_rows, N, HAS_RES)
        y = tl.sum(weights.to(tl.float32) * x[None, :], 1)
        gate = y
        if SWIGLU:
            gate = tl.sum(gate_weights.to(tl.float32) * x[None, :], 1)
        _store(out_ptr, rows, N, y, gate, bias, gate_bias, residual, SWIGLU)
        rows, weights, gate_weights = next_rows, next_weights, next_gate
        bias, gate_bias, residual = next_bias, next_gate_bias, next_residual

    y = tl.sum(weights.to(tl.float32) * x[None, :], 1)
    gate = y
    if SWIGLU:
        gate = tl.sum(gate_weights.to(tl.float32) * x[None, :], 1)
    _store(out_ptr, rows, N, y, gate, bias, gate_bias, residual, SWIGLU)


@triton.jit
def _gemv_long_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    res_ptr,
    out_ptr,
    N,
    stride_wn,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_RES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Rows in steps of BLOCK_K, the next step's weights and inputs in flight during the sums of this one."""
    columns = tl.arange(0, BLOCK_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    up_ptr = w_ptr + N.to(tl.int64) * stride_wn if SWIGLU else w_ptr

    weights = _row_tile(up_ptr, rows, columns, N, stride_wn, K)
    gate_weights = weights
    if SWIGLU:
        gate_weights = _row_tile(w_ptr, rows, columns, N, stride_wn, K)
    bias, gate_bias = _biases(bias_ptr, rows, N, dtype, HAS_BIAS, SWIGLU)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    rstd = 1.0
    if HAS_NORM:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            piece = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            squares += piece * piece
        rstd = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    residual = _residual(res_ptr, rows, N, HAS_RES)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gate_acc = acc
    for start in range(0, K, BLOCK_K):
        following = start + BLOCK_K + columns  # past the end in the last step: nothing is read then
        next_weights = _row_tile(up_ptr, rows, following, N, stride_wn, K)
        next_gate = next_weights
        if SWIGLU:
            next_gate = _row_tile(w_ptr, rows, following, N, stride_wn, K)
        next_x = tl.load(x_ptr + following, mask=following < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            now = start + columns
            norm_weight = tl.load(norm_ptr + now, mask=now < K, other=0.0).to(dtype).to(tl.float32)
            x = _normed(x, rstd, norm_weight, dtype)
        acc += weights.to(tl.float32) * x[None, :]
        if SWIGLU:
            gate_acc += gate_weights.to(tl.float32) * x[None, :]
        weights, gate_weights, x = next_weights, next_gate, next_x
    y = tl.sum(acc, 1)
    gate = y
    if SWIGLU:
        gate = tl.sum(gate_acc, 1)
    _store(out_ptr, rows, N, y, gate, bias, gate_bias, residual, SWIGLU)


def gemv(
    x_1K: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    swiglu: bool = False,
    residual_1N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: GemvConfig | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """`linear` for one token: x [1, K] -> [1, N], or [1, N / 2] with SwiGLU. One kernel, no gradient.

    Weight rows are contiguous. `config` None takes the measured one, `pdl` None the device's ability.
    """
    outputs, size = weight_NK.shape[0] // (2 if swiglu else 1), weight_NK.shape[1]
    assert x_1K.shape == (1, size)
    assert x_1K.stride(1) == 1
    assert weight_NK.stride(1) == 1
    config = config or gemv_config(outputs, size, swiglu)
    pdl = dependent_launch(x_1K.device) if pdl is None else pdl
    out = torch.empty(1, outputs, dtype=out_dtype or x_1K.dtype, device=x_1K.device)
    norm_weight, eps = norm if norm is not None else (x_1K, 0.0)
    bias = x_1K if bias_N is None else bias_N.contiguous()
    residual = x_1K if residual_1N is None else residual_1N.contiguous()
    arguments = (x_1K, weight_NK, bias, norm_weight.contiguous(), residual, out, outputs, weight_NK.stride(0), eps)
    flags = {
        "K": size, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "HAS_NORM": norm is not None,
        "HAS_BIAS": bias_N is not None, "SWIGLU": swiglu, "HAS_RES": residual_1N is not None, "USE_PDL": pdl,
    }  # fmt: skip
    blocks = triton.cdiv(outputs, config.block_n)
    if config.block_k >= size:
        programs = min(config.programs, blocks) or blocks
        steps = triton.cdiv(blocks, programs)
        launch: Any = _gemv_rows_kernel[(programs,)]
        launch(*arguments, **flags, STEPS=steps, num_warps=config.num_warps, **options(pdl))
    else:
        launch = _gemv_long_kernel[(blocks,)]
        launch(*arguments, **flags, num_warps=config.num_warps, **options(pdl))
    return out


@triton.jit
def _prefetch(address, USE: tl.constexpr):
    """Ask for the cache lines at `address` to be brought into the L2."""
    if USE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["T"])
def _matmul_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    res_ptr,
    out_ptr,
    part_ptr,
    counter_ptr,
    T,
    N,
    stride_xt,
    stride_wn,
    stride_rt,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_RES: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Programs (block of outputs, block of tokens, part of the inputs). N counts outputs: rows, or pairs of rows with
    SwiGLU."""
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    dtype = x_ptr.dtype.element_ty
    # Rows past the end read row 0 and are not stored: cheaper than masks.
    safe_rows = tl.where(rows < N, rows, 0).to(tl.int64)
    safe_tokens = tl.where(tokens < T, tokens, 0).to(tl.int64)
    up_ptr = w_ptr + N.to(tl.int64) * stride_wn if SWIGLU else w_ptr
    if PREFETCH_LINES > 0:
        # The weights do not depend on the kernel before: have them on their way to the L2 while it ends.
        line = 128 // (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
        heads = tl.minimum(tl.arange(0, PREFETCH_LINES) * line, K - 1)
        _prefetch(up_ptr + safe_rows[:, None] * stride_wn + heads[None, :], True)
        if SWIGLU:
            _prefetch(w_ptr + safe_rows[:, None] * stride_wn + heads[None, :], True)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()

    x_ptrs = x_ptr + safe_tokens[:, None] * stride_xt + columns[None, :]
    w_ptrs = up_ptr + safe_rows[None, :] * stride_wn + columns[:, None]
    gate_ptrs = w_ptr + safe_rows[None, :] * stride_wn + columns[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate_acc = acc
    SHARE: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    first = tl.program_id(2) * SHARE
    for start in tl.range(first, tl.minimum(first + SHARE, K), BLOCK_K, num_stages=NUM_STAGES):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, mask=(start + columns < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, mask=(start + columns < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if SWIGLU:
            if K % BLOCK_K == 0:
                gate_w = tl.load(gate_ptrs + start)
            else:
                gate_w = tl.load(gate_ptrs + start, mask=(start + columns < K)[:, None], other=0.0)
            gate_acc = tl.dot(x, gate_w, gate_acc, input_precision=PRECISION)
    inside = (tokens < T)[:, None] & (rows < N)[None, :]
    if SPLIT_K > 1:
        part_ptrs = part_ptr + safe_tokens[:, None] * N + rows[None, :]
        size = T.to(tl.int64) * N
        tl.store(part_ptrs + tl.program_id(2) * size, acc, mask=inside)
        tl.debug_barrier()
        counter = counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(SPLIT_K):
            acc += tl.load(part_ptrs + part * size, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)

    if HAS_BIAS:
        up_bias_ptr = bias_ptr + N if SWIGLU else bias_ptr
        acc += tl.load(up_bias_ptr + safe_rows).to(dtype).to(tl.float32)[None, :]
        if SWIGLU:
            gate_acc += tl.load(bias_ptr + safe_rows).to(dtype).to(tl.float32)[None, :]
    if SWIGLU:
        acc = gate_acc / (1.0 + tl.exp(-gate_acc)) * acc
    if HAS_RES:
        residual = tl.load(res_ptr + safe_tokens[:, None] * stride_rt + rows[None, :], mask=inside, other=0.0)
        acc += residual.to(tl.float32)
    out_ptrs = out_ptr + safe_tokens[:, None] * N + rows[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def matmul(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    swiglu: bool = False,
    residual_TN: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: MatmulConfig | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """`linear` without its norm for any number of tokens: x [T, K] -> [T, N], or [T, N / 2] with SwiGLU.

    Rows of x and of the weight are contiguous. fp32 inputs are multiplied in fp32, not TF32. With a given `config`, a
    row's bits depend neither on T nor on the other rows. `config` None takes the measured one for few tokens.
    """
    num_tokens, size = x_TK.shape
    outputs = weight_NK.shape[0] // (2 if swiglu else 1)
    assert weight_NK.shape[1] == size
    assert x_TK.stride(1) == weight_NK.stride(1) == 1
    config = config or skinny_config(num_tokens, outputs, size, swiglu)
    assert config.split_k == 1 or not swiglu
    pdl = dependent_launch(x_TK.device) if pdl is None else pdl
    out = torch.empty(num_tokens, outputs, dtype=out_dtype or x_TK.dtype, device=x_TK.device)
    if num_tokens == 0:
        return out
    residual = x_TK if residual_TN is None else residual_TN
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    line = 128 // x_TK.element_size()
    lines = triton.next_power_of_2(triton.cdiv(size, line))
    grid = (triton.cdiv(outputs, config.block_n), triton.cdiv(num_tokens, config.block_m), config.split_k)
    parts = counters = out
    if config.split_k > 1:
        parts = torch.empty(config.split_k, num_tokens, outputs, dtype=torch.float32, device=x_TK.device)
        counters = zeroed_counters(x_TK.device, triton.next_power_of_2(grid[0] * grid[1]))
    launch: Any = _matmul_kernel[grid]
    launch(
        x_TK, weight_NK, x_TK if bias_N is None else bias_N.contiguous(), residual, out, parts, counters,
        num_tokens, outputs, x_TK.stride(0), weight_NK.stride(0), residual.stride(0),
        K=size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, NUM_STAGES=config.num_stages,
        SPLIT_K=config.split_k, HAS_BIAS=bias_N is not None, SWIGLU=swiglu,
        HAS_RES=residual_TN is not None, PRECISION="ieee",
        PREFETCH_LINES=lines if pdl and num_tokens <= config.block_m and config.split_k == 1 else 0, USE_PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **options(pdl),
    )  # fmt: skip
    return out
