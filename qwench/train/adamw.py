"""AdamW whose two states are kept in bf16: 8 bytes a parameter beside its fp32 master weight's 4 become 4.

The arithmetic is fp32; only what is kept between steps is rounded, to nearest. That works for beta2 = 0.95: a step
changes the mean square by up to 5 %, far more than bf16's steps of 0.4 to 0.8 %. With beta2 = 0.999 changes of 0.1 %
would be rounded away, and the state would stand still: such settings are refused.

On a GPU one kernel does all parameters of a group (`adamw_triton.py`). torch's own fused AdamW takes bf16 states beside
fp32 weights from a later version than 2.11 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qwench.ops.triton_launch import runs_triton
from qwench.parallel.blocks import local_part
from qwench.train.config import LARGEST_HALF_BETA


class AdamWHalfStates(torch.optim.Optimizer):
    """Decoupled weight decay as torch.optim.AdamW, which it equals for `state_dtype` fp32 but for the last place.

    States: "step" (fp32, on the CPU), "exp_avg" and "exp_avg_sq" (`state_dtype`, the parameter's shape). Parameters and
    gradients are fp32, whole or DTensors. Like torch's fused AdamW it reads its attributes `found_inf` (1: leave
    weights and states as they are; the caller then calls `uncount`) and `grad_scale` (gradients are divided by it).
    Raises ValueError for betas that the states' dtype does not resolve.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if state_dtype == torch.bfloat16 and max(betas) > LARGEST_HALF_BETA:
            raise ValueError(
                f"betas are {betas}; optimiser states in bf16 need at most {LARGEST_HALF_BETA}, or keep them in fp32"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    def uncount(self) -> None:
        """Take back the count of a step that `found_inf` has skipped."""
        for state in self.state.values():
            state["step"] -= 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        factor = self.grad_scale.reciprocal() if self.grad_scale is not None else None
        for group in self.param_groups:
            tensors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
            numbers: list[tuple[float, float, float]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                state["step"] += 1
                four = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                p, grad, mean, square = (local_part(x).view(-1) for x in four)
                tensors.append((p, grad, mean, square))
                numbers.append(_numbers(group, float(state["step"])))
            beta1, beta2 = group["betas"]
            if tensors and runs_triton(tensors[0][0].device):
                from qwench.train.adamw_triton import adamw_

                adamw_(tensors, numbers, beta1, beta2, group["eps"], skip=self.found_inf, factor=factor)
            elif self.found_inf is None or not self.found_inf:
                for (p, grad, mean, square), its_numbers in zip(tensors, numbers, strict=True):
                    grad = grad if factor is None else grad * factor
                    _update(p, grad, mean, square, *its_numbers, beta1, beta2, group["eps"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        elif state["step"].is_cuda:  # loaded with the others; read on the host in every step
            state["step"] = state["step"].cpu()
        return state


def _numbers(group: dict[str, Any], step: float) -> tuple[float, float, float]:
    """Step size, root of the second bias correction, what weight decay leaves."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step), 1 - group["lr"] * group["weight_decay"]


def _update(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step_size: float,
    root: float,
    left: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of flat tensors, in place."""
    new_mean = mean.float().lerp(grad, 1 - beta1)
    new_square = square.float() * beta2 + grad * grad * (1 - beta2)
    p.copy_(p * left - step_size * new_mean / (new_square.sqrt() / root + eps))
    mean.copy_(new_mean)
    square.copy_(new_square)
