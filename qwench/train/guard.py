"""Watches every step for losses that are not finite and for gradient spikes, and names the batch that caused them.

Whether a step is taken is decided twice from the same fp64 numbers: on the device by `decide`, so that the optimiser
can be launched before the host knows, and on the host by `Guard.verdict`, which keeps the record and says why.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.train.config import GuardConfig


class Guard:
    """`verdict` says why a step must be skipped, or returns None; `Stop` is raised when bad steps follow each other."""

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.norms: deque[float] = deque(maxlen=cfg.window_steps)
        self.consecutive = 0

    @property
    def largest_norm(self) -> float:
        """What the next step's gradient norm must not exceed."""
        if not self.cfg.grad_norm_factor or len(self.norms) * 2 < self.cfg.window_steps:
            return math.inf
        return self.cfg.grad_norm_factor * statistics.median(self.norms) or math.inf

    def verdict(self, loss: float, grad_norm: float) -> str | None:
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.norms.append(grad_norm)
            self.consecutive = 0
        else:
            self.consecutive += 1
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if grad_norm > self.largest_norm:
            median = statistics.median(self.norms)
            return f"gradient norm {grad_norm:.3g} is {grad_norm / median:.0f} times its median {median:.3g}"
        return None

    @property
    def exhausted(self) -> bool:
        return self.consecutive >= self.cfg.max_consecutive

    def state_dict(self) -> dict[str, object]:
        return {"norms": list(self.norms), "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, list[float] | int]) -> None:
        norms, consecutive = state["norms"], state["consecutive"]
        assert isinstance(norms, list)
        assert isinstance(consecutive, int)
        self.norms = deque(norms, maxlen=self.cfg.window_steps)
        self.consecutive = consecutive


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What the optimiser does with a step's gradients; 0-dimensional fp32 tensors on their device."""

    skip: Tensor
    """1 leaves weights and states as they are, 0 takes the step."""
    divisor: Tensor
    """Of the gradients: the share by which their norm exceeds its limit, at least 1."""


def decide(loss: Tensor, squared_norm: Tensor, largest_norm: float, grad_clip: float) -> StepDecision:
    """From the fp64 loss (with z-loss) and squared gradient norm of a step, and the limit of clipping (0: none)."""
    norm = squared_norm.sqrt()
    good = loss.isfinite() & norm.isfinite() & (norm <= largest_norm)
    divisor = (norm / grad_clip).clamp(min=1.0) if grad_clip > 0 else torch.ones_like(norm)
    return StepDecision((~good).float(), divisor.float())
