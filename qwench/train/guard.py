"""Watches every step for losses that are not finite and for gradient spikes, and names the batch that caused them."""

from __future__ import annotations

import math
import statistics
from collections import deque

from qwench.train.config import GuardConfig


class Guard:
    """`verdict` says why a step must be skipped, or returns None; `Stop` is raised when bad steps follow each other."""

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.norms: deque[float] = deque(maxlen=cfg.window_steps)
        self.consecutive = 0

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
        enough = len(self.norms) * 2 >= self.cfg.window_steps
        if self.cfg.grad_norm_factor and enough:
            median = statistics.median(self.norms)
            if 0 < self.cfg.grad_norm_factor * median < grad_norm:
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
