"""Recorded passes over one short new prompt, so that a question is answered at once.

Launching the some two hundred kernels of a pass one by one takes longer than running them on a short prompt. A prompt
that comes alone, with nothing cached before it, is padded to the next of a few lengths and replayed. Tokens of the
padding come after all real ones, so causality hides them; their keys go to block 0, which nobody reads.
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


class ShortPrompts:
    def __init__(self, runner: Runner, graphs: DecodeGraphs) -> None:
        self._runner, self._graphs = runner, graphs
        self._inputs = torch.zeros((2, LENGTHS[-1]), dtype=torch.int64, device=runner.device)
        """Tokens and cache slots."""
        self._last = torch.zeros(1, dtype=torch.int64, device=runner.device)
        self._positions = torch.arange(LENGTHS[-1], device=runner.device)
        self._cu_q = {n: torch.tensor([0, n], dtype=torch.int32, device=runner.device) for n in LENGTHS}

    def logits(self, token_ids: list[int], slots: Tensor) -> Tensor:
        """Logits [1, V] after a prompt of at most LENGTHS[-1] tokens; slots [tokens] int64 on the host. The next call
        overwrites them."""
        count = len(token_ids)
        length = next(n for n in LENGTHS if n >= count)
        padded = torch.zeros((2, length), dtype=torch.int64)
        padded[0, :count] = torch.tensor(token_ids)
        padded[1, :count] = slots
        self._inputs[:, :length].copy_(self._runner.upload(padded))
        self._last.fill_(count - 1)
        result = self._graphs.perform(("prompt", length), lambda: self._forward(length))
        assert result is not None
        return result

    def _forward(self, length: int) -> Tensor:
        runner, cu_q = self._runner, self._cu_q[length]
        meta = AttnMeta(
            cu_q=cu_q,
            max_q=length,
            lens_k=cu_q[1:],
            max_k=length,
            block_table=runner.rows.table[:1],  # not read: there is no history
            slots=self._inputs[1, :length],
            history=False,
            num_keys=length,
        )
        tokens_T, positions_T = self._inputs[0, :length], self._positions[:length]
        hidden_TD = runner.model(tokens_T, positions_T, meta, runner.caches)
        return runner.model.lm_head(hidden_TD.index_select(0, self._last))
