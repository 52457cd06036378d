"""The learning rate against its closed formula, and batches that grow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.config import from_dict
from qwench.data.loader import RowLoader
from qwench.data.packing import PackedRow
from qwench.train.config import LoopConfig, ScheduleConfig
from qwench.train.schedule import batch_growth, lr_ratio, num_steps


@given(total=st.integers(1, 300), warmup=st.integers(0, 400), low=st.floats(0, 1), data=st.data())
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_closed_formula(kind, total, warmup, low, data) -> None:
    step = data.draw(st.integers(0, total - 1))
    got = lr_ratio(step, total, ScheduleConfig(kind=kind, warmup_steps=warmup, min_ratio=low))
    warmup = min(warmup, total)
    if step < warmup:
        want = (step + 1) / warmup
    else:
        x = (step - warmup) / (total - warmup)
        want = {
            "cosine": low + (1 - low) * (math.cos(math.pi * x) + 1) / 2,
            "linear": 1 - (1 - low) * x,
            "constant": 1.0,
        }[kind]
    assert got == pytest.approx(want, abs=1e-12)
    assert 0 < got <= 1 or low == 0


def test_shape() -> None:
    schedule = ScheduleConfig(warmup_steps=10, min_ratio=0.1)
    ratios = [lr_ratio(step, 1000, schedule) for step in range(1000)]
    assert ratios[0] == 0.1
    assert ratios[9] == ratios[10] == 1.0
    assert ratios[10:] == sorted(ratios[10:], reverse=True)
    assert ratios[505] == pytest.approx(0.55, abs=1e-3), "halfway the cosine stands in the middle"
    assert ratios[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_warm_up_stable_decay(shape: str) -> None:
    schedule = ScheduleConfig(
        kind="wsd",
        warmup_share=0.05,
        decay_share=0.2,
        min_ratio=0.1,
        decay_shape=shape,  # pyright: ignore[reportArgumentType]
    )
    ratios = [lr_ratio(step, 200, schedule) for step in range(200)]
    assert ratios[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert set(ratios[9:161]) == {1.0}
    assert ratios[160:] == sorted(ratios[160:], reverse=True)
    assert ratios[180] == pytest.approx(0.1 + 0.9 * (0.5 if shape == "linear" else 1 - math.sqrt(0.5)))
    assert 0.1 < ratios[-1] < 0.13
    # A decay in steps, and one that is longer than what the warm-up leaves.
    fixed = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=7, decay_share=0.9, min_ratio=0)
    assert [step for step in range(200) if 0 < lr_ratio(step, 200, fixed) < 1] == [*range(9), *range(194, 200)]
    long = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=500, min_ratio=0)
    assert lr_ratio(9, 100, long) == lr_ratio(10, 100, long) == 1.0
    assert lr_ratio(55, 100, long) == pytest.approx(0.5)


def test_refused_schedules() -> None:
    for values, message in (
        ({"warmup_share": 1.5}, "warmup_share is 1.5"),
        ({"decay_share": -0.1}, "decay_share is -0.1"),
        ({"decay_steps": -1}, "decay_steps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(ScheduleConfig, values)
    with pytest.raises(ValueError, match=r"no multiple of batch_warmup\.start_rows"):
        loop(batch_rows=10, start_rows=4)


# ------------------------------------------------------------------------------------------------------ growing batches
def loop(
    batch_rows: int = 16, start_rows: int = 2, tokens: int = 1000, shape: str = "linear", **given: Any
) -> LoopConfig:
    warmup = {"start_rows": start_rows, "tokens": tokens, "shape": shape}
    return from_dict(LoopConfig, {"steps": 5, "batch_rows": batch_rows, "batch_warmup": warmup, **given})


class Rows:
    """Numbered rows."""

    num_rows, fingerprint = 37, "rows"

    def row(self, epoch: int, index: int) -> PackedRow:
        number = np.array([epoch * self.num_rows + index], np.int32)
        return PackedRow(tokens=number, targets=number, loss_weights=number.astype(np.float32), seq_lens=number)


def steps_of(given: LoopConfig, number: int, world: int = 1, restart: int | None = None) -> list[list[int]]:
    """Rows of all ranks of each step, sorted."""
    growth, steps = batch_growth(given, 10), [[] for _ in range(number)]
    for rank in range(world):
        state = None
        for first, last in ((0, number),) if restart is None else ((0, restart), (restart, number)):
            loader = RowLoader(Rows(), given.batch_rows, 3, rank, world, rows_at=growth)
            if state is not None:
                loader.load_state_dict(state)
            for step in range(first, last):
                steps[step] += [int(row.tokens[0]) for row in next(loader)]
            state = loader.state_dict()
            loader.close()
    return [sorted(step) for step in steps]


def test_rows_grow() -> None:
    sizes = [len(step) for step in steps_of(loop(), 60)]
    assert sizes[0] == 2
    assert sizes == sorted(sizes)
    assert all(size % 2 == 0 for size in sizes)
    full = sizes.index(16)
    assert sum(sizes[:full]) * 10 >= 1000 > sum(sizes[: full - 1]) * 10
    doubling = [len(step) for step in steps_of(loop(shape="doubling"), 60)]
    assert sorted(set(doubling)) == [2, 4, 8, 16]
    # Equal shares of the tokens for each size below the last, up to one step.
    tokens = [10 * size * doubling.count(size) for size in (2, 4, 8)]
    assert tokens == pytest.approx([250] * 3, abs=80)
    assert batch_growth(LoopConfig(steps=1), 10) is None


@pytest.mark.parametrize("shape", ["linear", "doubling"])
def test_order_of_growing_batches_depends_on_nothing_else(shape: str) -> None:
    """Neither on the number of ranks nor on a restart; no row is lost or repeated across an epoch's end."""
    want = steps_of(loop(shape=shape), 18)
    assert steps_of(loop(shape=shape), 18, world=2) == want
    assert steps_of(loop(shape=shape), 18, restart=5) == want
    first = [row for step in want for row in step]
    assert sorted(first)[:37] == list(range(37))
    assert len(set(first)) == len(first)


def test_steps_of_epochs_with_growing_batches() -> None:
    given = loop(steps=None, epochs=4.0)
    number = num_steps(given, 37, 10)
    rows = sum(len(step) for step in steps_of(given, number))
    assert abs(rows - 4 * 37) <= 8
    assert num_steps(LoopConfig(epochs=2, batch_rows=5), 37, 10) == 15
    assert num_steps(LoopConfig(epochs=0.01, batch_rows=5), 37, 10) == 1
    with pytest.raises(ValueError, match="first step has 2 rows"):
        RowLoader(Rows(), 16, 0, 0, 4, rows_at=batch_growth(loop(), 10))
