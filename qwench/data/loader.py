"""Batches of rows in one fixed global order, resumable to the row, the same for any number of ranks.

The order of an epoch is a seeded permutation of its rows; epoch follows epoch. A step takes the next `batch_rows` rows
of that order, and rank r of w takes every w-th of them, starting with the r-th. Therefore the position is one number
that is equal on all ranks, and a run may go on with another number of ranks or another batch size without losing or
repeating a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from qwench.data.packing import PackedRow, RowSource
from qwench.data.permutation import permute


class RowLoader:
    """Iterates over lists of rows: this rank's part of each step.

    `batch_rows` counts the rows of a step on all ranks together and must be a multiple of `world`. Without `epochs` the
    iteration never ends and steps run across the border of epochs; with it, it stops after that many, the last step
    taking what is left (a rank's part may then be shorter than another's, even empty). With `rows_at` the step that
    begins after n rows of the run has rows_at(n) instead of batch_rows; all are multiples of `world`. `prefetch` steps
    are prepared in a background thread (0: none). `state_dict()` describes what was handed out, never what was only
    prefetched.
    """

    def __init__(
        self,
        source: RowSource,
        batch_rows: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        epochs: int | None = None,
        shuffle: bool = True,
        prefetch: int = 2,
        rows_at: Callable[[int], int] | None = None,
    ) -> None:
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}; give 0 <= rank < world")
        if batch_rows < 1 or batch_rows % world:
            raise ValueError(f"batch_rows is {batch_rows}; give a positive multiple of the number of ranks, {world}")
        if rows_at is not None and rows_at(0) % world:
            raise ValueError(f"the first step has {rows_at(0)} rows; give a multiple of the number of ranks, {world}")
        if source.num_rows < 1:
            raise ValueError("the row source is empty; give more documents or samples")
        if prefetch < 0 or (epochs is not None and epochs < 0):
            raise ValueError(f"prefetch is {prefetch} and epochs {epochs}; neither may be negative")
        self.source = source
        self.batch_rows = batch_rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epochs = epochs
        self.shuffle = shuffle
        self.prefetch = prefetch
        self.rows_at = rows_at
        self._consumed = 0  # rows handed out on all ranks since the start of epoch 0
        self._submitted = 0
        self._pending: deque[Future[list[PackedRow]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def epoch(self) -> int:
        """Number of complete passes so far."""
        return self._consumed // self.source.num_rows

    @property
    def rows_consumed(self) -> int:
        """Rows handed out on all ranks since the start."""
        return self._consumed

    @property
    def rows_total(self) -> int | None:
        """Rows of all epochs on all ranks; None if the iteration has no end."""
        return None if self.epochs is None else self.epochs * self.source.num_rows

    def __iter__(self) -> Iterator[list[PackedRow]]:
        return self

    def __next__(self) -> list[PackedRow]:
        if self._consumed == self._after(self._consumed):
            self.close()
            raise StopIteration
        if self.prefetch == 0:
            batch = self._batch(self._consumed)
        else:
            self._fill()
            batch = self._pending.popleft().result()
        self._consumed = self._after(self._consumed)
        if self.prefetch:
            self._fill()
        return batch

    def peek(self) -> list[PackedRow]:
        """What `next` will hand out, the same object; the position stays. Needs `prefetch`, and a next step."""
        assert self.prefetch, "nothing is kept without prefetch"
        assert self._consumed < self._after(self._consumed), "the iteration is at its end"
        self._fill()
        return self._pending[0].result()

    def _after(self, start: int) -> int:
        stop = start + (self.batch_rows if self.rows_at is None else self.rows_at(start))
        total = self.rows_total
        return stop if total is None else max(start, min(stop, total))

    def _batch(self, start: int) -> list[PackedRow]:
        numbers = np.arange(start + self.rank, self._after(start), self.world)
        epochs, places = np.divmod(numbers, self.source.num_rows)
        rows: list[PackedRow] = []
        for epoch in np.unique(epochs):
            here = places[epochs == epoch]
            if self.shuffle:
                # 1: another permutation than that of the documents if dataset and loader got the same seed
                here = permute(here, self.source.num_rows, self.seed, int(epoch), 1)
            rows += [self.source.row(int(epoch), int(index)) for index in here]
        return rows

    def _fill(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        while len(self._pending) < self.prefetch and self._after(self._submitted) > self._submitted:
            self._pending.append(self._pool.submit(self._batch, self._submitted))
            self._submitted = self._after(self._submitted)

    def close(self) -> None:
        """Forget prefetched steps and end the background thread; the loader can still be continued."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pending.clear()
        self._submitted = self._consumed

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts: epoch and position (rows on all ranks), and what the position refers to."""
        epoch, position = divmod(self._consumed, self.source.num_rows)
        return {
            "epoch": epoch,
            "position": position,
            "num_rows": self.source.num_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "source": self.source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it belongs to other data, another seed or order."""
        mine = self.state_dict()
        for key in ("source", "num_rows", "seed", "shuffle"):
            if state.get(key) != mine[key]:
                raise ValueError(
                    f"the saved data position has {key} = {state.get(key)!r}, this run {mine[key]!r}; resume with the "
                    f"same data, sequence length and seed, or start a new run"
                )
        self.close()
        self._consumed = self._submitted = state["epoch"] * self.source.num_rows + state["position"]
