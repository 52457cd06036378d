"""Recorded decoding steps: one CUDA graph per batch size of a ladder and kind of step, made when first wanted twice.

The first step of a size runs as it is, so that an answer begins at once; the second is recorded (some tenths of a
second), all later ones are replayed without launching their hundreds of kernels one by one.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwench.engine.draw import Mode

if TYPE_CHECKING:
    from qwench.engine.runner import Runner

log = logging.getLogger("qwench.engine")


def ladder(max_rows: int) -> list[int]:
    """Batch sizes worth a graph: fine where a row more costs much, coarse above."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32]
    sizes += range(48, 129, 16)
    sizes += range(160, 513, 32)
    sizes += range(640, max_rows + 128, 128)
    return sorted({min(size, max_rows) for size in sizes})


class DecodeGraphs:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sizes = ladder(runner.max_seqs)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, num_rows: int) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def replay(self, num_rows: int, mode: Mode) -> bool:
        """Replay a whole decoding step of at least `num_rows` rows; False while there is no graph for it yet."""
        size = self.size_for(num_rows)
        found = self._find(("decode", size, mode), lambda: self._runner.decode_step(size, mode))
        if found is not None:
            found[0].replay()
        return found is not None

    def replay_logits(self, num_rows: int) -> Tensor | None:
        """Replay a decoding pass up to its logits [B, V], B >= num_rows, which the next replay overwrites."""
        size = self.size_for(num_rows)
        found = self._find(("logits", size), lambda: self._runner.decode_logits(size))
        if found is None:
            return None
        found[0].replay()
        return found[1]

    def draw(self, logits_BV: Tensor, mode: Mode, mask_BW: Tensor | None) -> None:
        """Draw from the logits of a step; from a recording where they are those that `replay_logits` returns."""
        recorded = self._graphs.get(("logits", logits_BV.shape[0]))
        if recorded is None or recorded[1] is not logits_BV:
            self._runner.draw_step(logits_BV, mode, mask_BW=mask_BW)
            return
        key = ("draw", logits_BV.shape[0], mode, mask_BW is not None)
        self.perform(key, lambda: self._runner.draw_step(logits_BV, mode, mask_BW=mask_BW))

    def perform(self, key: Hashable, work: Callable[[], Tensor | None]) -> Tensor | None:
        """Do what `work` does, from its recording when there is one. The next replay overwrites what is returned."""
        found = self._find(key, work)
        if found is None:
            return work()
        found[0].replay()
        return found[1]

    def _find(
        self, key: Hashable, work: Callable[[], Tensor | None]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor | None] | None:
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return None
            log.info("recording a step: %s", key)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
            self._graphs[key] = graph, result
        return self._graphs[key]
