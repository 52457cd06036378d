"""Rotary position embedding, half-split form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) [Qwen TR 2.3].

Frequencies and angles are computed in fp32 ("FP32 precision for the inverse frequency matrix"), the cosines and
sines are then cast to the dtype of the activations. Shape suffixes: T tokens, H heads, D head size, R = D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.ops.dispatch import Implementation, Operation


def inverse_frequencies(theta: float, head_size: int, device: torch.device | str = "cpu") -> Tensor:
    """[R] fp32: theta ** (-2j / D) for j = 0 .. R-1."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    return (1.0 / (theta**exponents)).to(device)


def rope_tables(positions_T: Tensor, inv_freq_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, R] of each token's angles, ready to broadcast over heads."""
    angles_TR = positions_T.float()[:, None] * inv_freq_R[None, :]
    return angles_TR.cos().to(dtype)[:, None, :], angles_TR.sin().to(dtype)[:, None, :]


def apply_rope(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotate every head of x. Differentiable in x."""
    return ROPE.choose(x_THD.device)(x_THD, cos_T1R, sin_T1R)


def _reference(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, -1)
    return torch.cat((first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R), -1)


ROPE = Operation("rope", [Implementation("reference", _reference)])
