"""RMSNorm: y = x * rsqrt(mean(x^2) + eps) * weight, statistics in fp32 [Qwen TR 2.3].

The normalised value is cast to the input's dtype before it is multiplied by the weight, as in the published models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwench.ops import triton_launch
from qwench.ops.dispatch import Implementation, Operation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype. Differentiable in both."""
    return RMS_NORM.choose(x.device)(x, weight, eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


class _FusedRMSNorm(torch.autograd.Function):
    """The same values with a hand-written backward pass: it keeps only the normalised input, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = (norm.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        normed = torch.mul(x, rstd).to(x.dtype)
        ctx.save_for_backward(normed, rstd, weight)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        normed, rstd, weight = ctx.saved_tensors
        d_weight = (d_y * normed).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        d_normed = d_y * weight.to(d_y.dtype)
        # d x = rstd * (d n - n * mean(d n * n))
        mean = (d_normed * normed).mean(-1, keepdim=True, dtype=torch.float32).to(d_y.dtype)
        d_x = torch.addcmul(d_normed, normed, mean, value=-1).mul_(rstd)
        return d_x, d_weight, None


LONGEST_ROW = 16384
"""Longest rows of the Triton kernel, which holds a row in one program."""


def _triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel without a gradient; under autograd the fused implementation."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if recorded or x.shape[-1] > LONGEST_ROW or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        out = _FusedRMSNorm.apply(x, weight, eps)
        assert isinstance(out, Tensor)
        return out
    from qwench.ops import elementwise_triton

    return elementwise_triton.rms_norm(x, weight, eps)


RMS_NORM = Operation(
    "rms_norm",
    [
        Implementation("triton", _triton, triton_launch.runs_triton),
        Implementation("fused", _FusedRMSNorm.apply),
        Implementation("reference", _reference),
    ],
)
