"""The learning rate against its closed formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.train.config import ScheduleConfig
from qwench.train.schedule import lr_ratio


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
