"""SwiGLU's elementwise part: silu(gate) * up on the merged projection's output [Qwen TR 2.3]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import triton_launch
from qwench.ops.dispatch import Implementation, Operation


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] (gate first) -> [..., F]. Differentiable."""
    return SWIGLU.choose(gate_up.device)(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _FusedSwiGLU(torch.autograd.Function):
    """The same values; the backward pass writes both halves of the gradient into one tensor, without concatenating."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(d_y, F.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_y * up, gate))
        return d_gate_up


def _triton(gate_up: Tensor) -> Tensor:
    """One kernel without a gradient; under autograd the fused implementation."""
    recorded = torch.is_grad_enabled() and gate_up.requires_grad
    if recorded or gate_up.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        out = _FusedSwiGLU.apply(gate_up)
        assert isinstance(out, Tensor)
        return out
    from qwench.ops import elementwise_triton

    return elementwise_triton.swiglu(gate_up)


SWIGLU = Operation(
    "swiglu",
    [
        Implementation("triton", _triton, triton_launch.runs_triton),
        Implementation("fused", _FusedSwiGLU.apply),
        Implementation("reference", reference),
    ],
)
