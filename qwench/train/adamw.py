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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwench.ops.triton_launch import runs_triton
from qwench.parallel.blocks import local_part
from qwench.train.config import LARGEST_HALF_BETA


@dataclass(frozen=True, slots=True)
class Found:
    """A parameter to be updated: this rank's flat part of it and of its gradient."""

    p: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    numbers: tuple[float, float, float]
    """Step size, root of the second bias correction, what weight decay leaves."""


class AdamWSmallStates(torch.optim.Optimizer):
    """Decoupled weight decay as torch.optim.AdamW, with states that a subclass keeps in fewer bytes.

    Parameters and gradients are fp32, whole or DTensors. Like torch's fused AdamW it reads its attributes `found_inf`
    (1: leave weights and states as they are; the caller then calls `uncount`) and `grad_scale` (gradients are divided
    by it). The count of steps is a number on the host.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    def fill(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Make the states of a parameter that has none, or bring those that a checkpoint gave into their form."""
        raise NotImplementedError

    def apply(self, group: dict[str, Any], found: list[Found], factor: Tensor | None) -> None:
        """Update parameters and states in place; gradients are multiplied by `factor`, a number on the device."""
        raise NotImplementedError

    def readable(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states as a checkpoint has them."""
        return self.state[parameter]

    def uncount(self) -> None:
        """Take back the count of a step that `found_inf` has skipped."""
        for state in self.state.values():
            state["step"] -= 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        factor = self.grad_scale.reciprocal() if self.grad_scale is not None else None
        for group in self.param_groups:
            found: list[Found] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                self.fill(parameter, state)
                state["step"] += 1
                p, grad = (local_part(x).view(-1) for x in (parameter, parameter.grad))
                found.append(Found(p, grad, state, _numbers(group, float(state["step"]))))
            if found:
                self.apply(group, found, factor)


class AdamWHalfStates(AdamWSmallStates):
    """Equals torch.optim.AdamW for `state_dtype` fp32 but for the last place.

    States: "step" (fp32, on the CPU), "exp_avg" and "exp_avg_sq" (`state_dtype`, the parameter's shape). Raises
    ValueError for betas that the states' dtype does not resolve.
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
        super().__init__(params, lr, betas, eps, weight_decay)
        self.state_dtype = state_dtype

    def fill(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        elif state["step"].is_cuda:  # loaded with the others; read on the host in every step
            state["step"] = state["step"].cpu()

    def apply(self, group: dict[str, Any], found: list[Found], factor: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        tensors = [
            (one.p, one.grad, *(local_part(one.state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq")))
            for one in found
        ]
        numbers = [one.numbers for one in found]
        if runs_triton(tensors[0][0].device):
            from qwench.train.adamw_triton import adamw_

            adamw_(tensors, numbers, beta1, beta2, group["eps"], skip=self.found_inf, factor=factor)
        elif self.found_inf is None or not self.found_inf:
            for (p, grad, mean, square), its_numbers in zip(tensors, numbers, strict=True):
                grad = grad if factor is None else grad * factor
                new_mean, new_square = next_states(
                    p, grad, mean.float(), square.float(), *its_numbers, beta1, beta2, group["eps"]
                )
                mean.copy_(new_mean)
                square.copy_(new_square)


def _numbers(group: dict[str, Any], step: float) -> tuple[float, float, float]:
    """Step size, root of the second bias correction, what weight decay leaves."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step), 1 - group["lr"] * group["weight_decay"]


def next_states(
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
) -> tuple[Tensor, Tensor]:
    """Update flat fp32 weights in place from fp32 states; returns the new states."""
    new_mean = mean.lerp(grad, 1 - beta1)
    new_square = square * beta2 + grad * grad * (1 - beta2)
    p.copy_(p * left - step_size * new_mean / (new_square.sqrt() / root + eps))
    return new_mean, new_square
