"""Recorded passes over one short prompt, or the short end of one, so that a question is answered at once.

Launching the some two hundred kernels of a pass one by one takes longer than running them on a short prompt. A prompt
that comes alone, with nothing cached before it, is padded to the next of a few lengths and replayed; so are a few
tokens behind a long cached beginning. Tokens of the padding come after all real ones, so causality hides them; their
keys go to block 0, which nobody reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwench.ops.attention import AttnMeta

if TYPE_CHECKING:
    from qwench.engine.graphs import DecodeGraphs
    from qwench.engine.runner import Runner

LENGTHS = (32, 64, 128, 256, 512, 1024)
ENDS = (16, 32)
"""Of tokens behind a cached beginning: as many as attention reads straight from the cache's blocks."""


class ShortPrompts:
    def __init__(self, runner: Runner, graphs: DecodeGraphs) -> None:
        self._runner, self._graphs = runner, graphs
        self._inputs = torch.zeros((2, LENGTHS[-1]), dtype=torch.int64, device=runner.device)
        """Tokens and cache slots."""
        self._last = torch.zeros(1, dtype=torch.int64, device=runner.device)
        self._start = torch.zeros(1, dtype=torch.int64, device=runner.device)
        self._table = torch.zeros_like(runner.rows.table[:1])
        self._positions = torch.arange(LENGTHS[-1], device=runner.device)
        self._cu_q = {n: torch.tensor([0, n], dtype=torch.int32, device=runner.device) for n in {*ENDS, *LENGTHS}}

    def knows(self, start: int, count: int) -> bool:
        """Whether there are recordings for `count` tokens after `start` cached ones."""
        if start and self._runner.config.deterministic:  # read by the kernels of longer prompts
            return False
        return count <= (ENDS if start else LENGTHS)[-1]

    def logits(self, token_ids: list[int], slots: Tensor, start: int, row: int) -> Tensor:
        """Logits [1, V] after a prompt of which `start` tokens are cached and `token_ids` remain.

        `slots` [tokens] int64, on the host; `row`: the sequence's in `RowState`. The next call overwrites the logits.
        """
        count = len(token_ids)
        length = next(n for n in (ENDS if start else LENGTHS) if n >= count)
        padded = torch.zeros((2, length), dtype=torch.int64)
        padded[0, :count] = torch.tensor(token_ids)
        padded[1, :count] = slots
        self._inputs[:, :length].copy_(self._runner.upload(padded))
        self._last.fill_(count - 1)
        if start:
            self._start.fill_(start)
            self._table.copy_(self._runner.rows.table[row : row + 1])
        forward = self._forward_end if start else self._forward
        result = self._graphs.perform(("end" if start else "prompt", length), lambda: forward(length))
        assert result is not None
        return result

    def _forward(self, length: int) -> Tensor:
        cu_q = self._cu_q[length]
        meta = AttnMeta(
            cu_q=cu_q,
            max_q=length,
            lens_k=cu_q[1:],
            max_k=length,
            block_table=self._table,  # not read: there is no history
            slots=self._inputs[1, :length],
            history=False,
            num_keys=length,
        )
        return self._logits(meta, self._positions[:length])

    def _forward_end(self, length: int) -> Tensor:
        meta = AttnMeta(
            cu_q=self._cu_q[length],
            max_q=length,
            lens_k=(self._start + length).int(),
            max_k=self._table.shape[1] * self._runner.block_size,
            block_table=self._table,
            slots=self._inputs[1, :length],
        )
        return self._logits(meta, self._start + self._positions[:length])

    def _logits(self, meta: AttnMeta, positions_T: Tensor) -> Tensor:
        runner = self._runner
        hidden_TD = runner.model(self._inputs[0, : len(positions_T)], positions_T, meta, runner.caches)
        return runner.model.lm_head(hidden_TD.index_select(0, self._last))
