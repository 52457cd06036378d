"""What a step has to compute: rows, cut into micro-batches, and the sums over all ranks that its figures refer to.

    maker = WorkMaker(loader, prepared, team, micro_rows=8)
    work = maker.next_work()                   # of the rows that the loader hands out next
    batch = maker.batch(work.micro_batches, 3, work.weight)

Nothing here moves the loader's place in the data, and nothing is computed with the model: the loop does both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwench.data.loader import RowLoader
from qwench.data.packing import PackedRow
from qwench.parallel.layout import Team
from qwench.train.batch import Batch, make_batch
from qwench.train.prepare import Prepared

MicroBatches = list[list[PackedRow]]
"""Rows of a forward and backward pass each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to compute."""

    rows: list[PackedRow]
    """Of this rank."""
    micro_batches: MicroBatches
    """The same rows; none if no token has a weight."""
    first_batch: Batch | None
    """The first of them on the device."""
    weight: float
    """Loss weight, tokens, sequences and the loss weight of each source on all ranks."""
    num_tokens: int
    num_seqs: int
    source_weights: list[float]


class WorkMaker:
    """Work of this rank for one step after another."""

    def __init__(self, loader: RowLoader, prepared: Prepared, team: Team, micro_rows: int) -> None:
        self.loader, self.prepared, self.team, self.micro_rows = loader, prepared, team, micro_rows

    def next_work(self) -> Work:
        """The step after the rows that were handed out. Does not wait for the device."""
        rows = self.loader.peek()
        num_sources = len(self.loader.source.source_names)
        mine = np.zeros(3 + num_sources)
        if self.team.leads_data:
            for row in rows:
                mine[:3] += row.loss_weights.sum(dtype=np.float64), row.num_tokens, len(row.seq_lens)
                if row.sources is not None:
                    mine[3:] += np.bincount(row.sources, row.loss_weights, num_sources)
        weight, num_tokens, num_seqs, *source_weights = self.team.total(mine.tolist())
        micro_batches = self.micro_batches(rows) if weight else []
        return Work(
            rows=rows,
            micro_batches=micro_batches,
            first_batch=self.batch(micro_batches, 0, weight) if weight else None,
            weight=weight,
            num_tokens=int(num_tokens),
            num_seqs=int(num_seqs),
            source_weights=source_weights,
        )

    def micro_batches(self, rows: list[PackedRow]) -> MicroBatches:
        return [rows[start : start + self.micro_rows] for start in range(0, len(rows), self.micro_rows)]

    def batch(self, parts: Sequence[list[PackedRow]], number: int, total_weight: float = 1.0) -> Batch:
        """One of several micro-batches, on its way to the device.

        Where blocks are compiled for one number of tokens, the last rows are filled up, and in a pipeline all that are
        shorter than the longest.
        """
        num_tokens = (self.prepared.row_tokens or 0) * self.micro_rows if self.prepared.compiled else 0
        if self.team.layout.pipeline > 1:
            num_tokens = max([num_tokens, *(sum(row.num_tokens for row in part) for part in parts)])
        return make_batch(parts[number], self.team.device, self.team, total_weight=total_weight, num_tokens=num_tokens)
