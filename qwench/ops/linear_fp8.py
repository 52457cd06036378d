"""A training linear layer whose three products are in FP8: one scale a tensor, taken from the tensor itself each time.

    y_TN = linear_fp8(x_TK, weight_NK, bias_N)        # differentiable; x, y and gradients in bf16 (or fp32)

Forward operands are e4m3 (largest value 448, 3 bits of fraction), gradients e5m2 (57,344, 2 bits), as
[Micikevicius 2022] proposes: a tensor is divided by its largest magnitude, rounded, and the product multiplies the
scales back in. Sums of the forward product are in the tensor cores' reduced precision ("fast accumulation"), those of
the gradients in fp32.

    y   = x  @ weight.T        [T, K] x [N, K]
    d x = d_y @ weight         the weight transposed in memory
    d w = d_y.T @ x            both transposed in memory

The product wants its left factor by rows and its right one by columns, hence the transposed copies, and all dimensions
as multiples of 16. Everything is plain tensor code around `torch._scaled_mm`, so that a compiler fuses scaling,
rounding and transposing with what makes the tensor. Kept for the backward pass: x in FP8, half of bf16's bytes, and the
weight as it is. On a CPU the same code runs with fp32 products of the rounded factors: for tests, it is slow.

Not here: which layers use it and whether it pays (`train/fp8.py`). Shape suffixes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2
MULTIPLE = 16
"""Of which all dimensions of a product must be multiples."""
SMALLEST = 1e-12
"""Magnitudes below this count as 0: the scale of a tensor of zeros stays finite."""


def runs_fp8(device: torch.device) -> bool:
    """The device's tensor cores multiply FP8 (compute capability 8.9: Ada, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def suits_fp8(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """The sizes are those that the product takes."""
    return not (x_TK.shape[0] % MULTIPLE or weight_NK.shape[0] % MULTIPLE or weight_NK.shape[1] % MULTIPLE)


def linear_fp8(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype, by FP8 products; sizes that those do not take go through `F.linear`.

    x is [T, K]; weight and bias have x's dtype. Differentiable in all three; the weight's gradient is in its dtype.
    Values that are not finite make the result not finite.
    """
    if not suits_fp8(x_TK, weight_NK):
        return F.linear(x_TK, weight_NK, bias_N)
    out = _LinearFP8.apply(x_TK, weight_NK, bias_N)
    assert isinstance(out, Tensor)
    return out


class _LinearFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        x_unit, weight_unit = unit_of(x_TK, FORWARD), unit_of(weight_NK, FORWARD)
        x8_TK = rounded(x_TK, x_unit, FORWARD)
        # The weight is rounded again in the backward pass: kept in FP8, all layers' would be there at once.
        ctx.save_for_backward(x8_TK, x_unit, weight_NK, weight_unit)
        weight8_NK = rounded(weight_NK, weight_unit, FORWARD)
        fused = bias_N if x_TK.dtype != torch.float32 else None  # the product adds no bias to an fp32 result
        y_TN = _product(x8_TK, weight8_NK.t(), x_unit, weight_unit, x_TK.dtype, fused, fast=True)
        return y_TN if bias_N is None or fused is not None else y_TN + bias_N

    @staticmethod
    def backward(ctx: Any, d_y_TN: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x8_TK, x_unit, weight_NK, weight_unit = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad
        d_unit = unit_of(d_y_TN, BACKWARD)
        d8_TN = rounded(d_y_TN, d_unit, BACKWARD)
        d_x_TK = d_weight_NK = None
        if want_x:
            by_columns = rounded(weight_NK, weight_unit, FORWARD).t().contiguous().t()
            d_x_TK = _product(d8_TN, by_columns, d_unit, weight_unit, d_y_TN.dtype)
        if want_weight:
            by_columns = x8_TK.t().contiguous().t()
            d_weight_NK = _product(d8_TN.t().contiguous(), by_columns, d_unit, x_unit, weight_NK.dtype)
        return d_x_TK, d_weight_NK, d_y_TN.sum(0) if want_bias else None


def unit_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scalar: what 1 in `dtype` stands for, so that the largest magnitude of x becomes dtype's largest."""
    return x.abs().amax().float().clamp(min=SMALLEST) / torch.finfo(dtype).max


def rounded(x: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """x / unit in `dtype`, to nearest."""
    largest = torch.finfo(dtype).max  # beyond it the cast makes NaN or infinity of a quotient that is rounded up
    return (x.float() / unit).clamp(-largest, largest).to(dtype)


def _product(
    left: Tensor,
    right: Tensor,
    left_unit: Tensor,
    right_unit: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    """left @ right times both units; left by rows, right by columns."""
    run = scaled_product if left.is_cuda else exact_product
    return run(left, right, left_unit, right_unit, dtype, bias, fast)


def scaled_product(
    left: Tensor,
    right: Tensor,
    left_unit: Tensor,
    right_unit: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    fast: bool,
) -> Tensor:
    """On the tensor cores."""
    return torch._scaled_mm(
        left, right, scale_a=left_unit, scale_b=right_unit, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def exact_product(
    left: Tensor,
    right: Tensor,
    left_unit: Tensor,
    right_unit: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    fast: bool,
) -> Tensor:
    """The same of the rounded factors in fp32."""
    y = (left.float() @ right.float()) * (left_unit * right_unit)
    return (y if bias is None else y + bias.float()).to(dtype)
