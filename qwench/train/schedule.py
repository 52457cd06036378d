"""Learning rate as a share of the peak, step by step [Qwen TR 2.4]: linear warm-up, then cosine to 10 %."""

from __future__ import annotations

import math

from qwench.train.config import ScheduleConfig


def lr_ratio(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak at optimiser step `step` (from 0) of `total_steps`.

    Warm-up: t / warmup_steps for t = step + 1, so that the first step moves. A longer warm-up than the run is cut.
    """
    warmup = min(schedule.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape
