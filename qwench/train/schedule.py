"""What changes from step to step: learning rate [Qwen TR 2.4] and rows of a batch, as closed formulas.

Learning rate: linear warm-up, then cosine to 10 % (Qwen), a line, a constant, or WSD: a constant with a decay at the
end, so that a run can be continued from before its decay [MiniCPM, section 4].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from qwench.train.config import LoopConfig, ScheduleConfig


def lr_ratio(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak at optimiser step `step` (from 0) of `total_steps`.

    Warm-up: t / warmup_steps for t = step + 1, so that the first step moves. A longer warm-up than the run is cut.
    """
    warmup = schedule.warmup_steps
    if schedule.warmup_share is not None:
        warmup = round(schedule.warmup_share * total_steps)
    warmup = min(warmup, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    first = warmup
    if schedule.kind == "wsd":
        decay = schedule.decay_steps
        decay = round(schedule.decay_share * total_steps) if decay is None else decay
        first = max(warmup, total_steps - decay)
        if step < first:
            return 1.0
    done = (step - first) / max(1, total_steps - first)
    if schedule.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * done))
    else:
        shape = 1 - (math.sqrt(done) if schedule.kind == "wsd" and schedule.decay_shape == "sqrt" else done)
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape


def batch_growth(loop: LoopConfig, seq_len: int) -> Callable[[int], int] | None:
    """Rows of the step that begins after so many rows of the run; None without a batch warm-up."""
    return functools.partial(_rows_after, loop, seq_len) if loop.batch_warmup is not None else None


def _rows_after(loop: LoopConfig, seq_len: int, consumed: int) -> int:
    """A multiple of start_rows. It depends on the place in the data order alone, so a resumed run goes on with it."""
    warmup = loop.batch_warmup
    assert warmup is not None
    times, share = loop.batch_rows // warmup.start_rows, consumed * seq_len / warmup.tokens
    if share >= 1:
        return loop.batch_rows
    if warmup.shape == "doubling":
        return warmup.start_rows * min(times, 2 ** math.floor(share * math.ceil(math.log2(times) + 1)))
    return warmup.start_rows * (1 + math.floor(share * (times - 1)))


def num_steps(loop: LoopConfig, rows_per_epoch: int, seq_len: int) -> int:
    """Optimiser steps of a run: loop.steps, or as many as its epochs come nearest to, one at least."""
    if loop.steps is not None:
        return loop.steps
    rows, growth = (loop.epochs or 0) * rows_per_epoch, batch_growth(loop, seq_len)
    consumed = small = 0
    while growth is not None and consumed < rows and (step_rows := growth(consumed)) < loop.batch_rows:
        consumed, small = consumed + step_rows, small + 1
    return max(1, small + round(max(0.0, rows - consumed) / loop.batch_rows))
