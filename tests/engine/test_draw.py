"""The table of grammar masks on the device, against a plain dictionary of rows."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qwench.engine.draw import MaskTable, stretches

NUM_ROWS, NUM_WORDS = 40, 3


@pytest.mark.parametrize("seed", range(4))
def test_rows_come_and_go(seed: int) -> None:
    """Rows in use hold their masks and all others allow everything, whatever was there before."""
    rng = random.Random(seed)
    table = MaskTable(NUM_ROWS, NUM_WORDS, torch.device("cpu"))
    rows: list[int] = []
    for step in range(60):
        if rng.random() < 0.6:
            rows = rng.sample(range(NUM_ROWS), rng.choice([0, 1, 2, 5, 30, NUM_ROWS]))
        want = np.full((NUM_ROWS, NUM_WORDS), -1, np.int32)
        masks = table.take(rows)
        for row in rows:
            masks[row] = want[row] = rng.randrange(2**31)
        if rows and rng.random() < 0.3:  # some have ended before the draw
            kept = rng.sample(rows, rng.randrange(len(rows)))
            assert table.take(kept) is masks
            want[sorted(set(rows).difference(kept))] = -1
            rows = kept
        if rng.random() < 0.2:
            continue  # a step that fails to draw
        num_rows = rng.choice([NUM_ROWS, max(rows, default=0) + 1])
        assert (table.put(num_rows).numpy() == want[:num_rows]).all(), step


def test_stretches_cover_the_rows_and_little_else() -> None:
    assert stretches([]) == []
    assert stretches([7, 4, 5, 6]) == [(4, 8)]
    assert stretches([0, 9, 30], gap=8) == [(0, 10), (30, 31)]
    assert stretches([0, 9, 30], gap=7) == [(0, 1), (9, 10), (30, 31)]
