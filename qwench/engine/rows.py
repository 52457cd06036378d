"""The device's own record of the running sequences: one row each, so that decoding steps need nothing from the host.

Row r holds the last token drawn, the position that it will have, how to draw, and the cache blocks. A row without a
sequence is not live: it computes position 0 against block 0, which nobody reads. Updates are enqueued on the device's
stream and so fall between the steps around them.

Shape suffixes: R rows (max_seqs), W blocks of a row, B rows in use, N tokens of each row in one pass, T = B * N.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwench.engine.sequence import Sequence
from qwench.ops.attention import AttnMeta
from qwench.ops.sampling import wrap_seed
from qwench.types import SamplingParams

_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_INTS = ("last_token", "position", "step", "live", "seed")


class RowState:
    def __init__(self, num_rows: int, num_blocks: int, device: torch.device) -> None:
        """`num_blocks` is W: enough for the longest sequence."""
        self.num_rows, self.width, self.device = num_rows, num_blocks, device
        self.floats = torch.zeros((len(_FLOATS), num_rows), dtype=torch.float32, device=device)
        self.ints = torch.zeros((len(_INTS), num_rows), dtype=torch.int64, device=device)
        self.floats[1] = self.floats[3] = 1.0
        self.table = torch.zeros((num_rows, num_blocks), dtype=torch.int32, device=device)
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self.floats
        self.last_token, self.position, self.step, self.live, self.seed = self.ints
        self.top_k = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.num_entries = [0] * num_rows
        """Blocks of each row that the device knows."""

    def admit(self, sequences: Seq[Sequence]) -> None:
        """Rows of sequences that have just been given a slot: how to draw, and all their blocks."""
        params = [s.params for s in sequences]
        rows = torch.tensor([s.slot for s in sequences])
        floats = torch.tensor([_floats(p) for p in params], dtype=torch.float32).T
        ints = torch.tensor([[0, 0, 0, 0, wrap_seed(s.seed), min(s.params.top_k, 2**31 - 1)] for s in sequences]).T
        rows, ints = self.upload(rows), self.upload(ints)
        self.floats.index_copy_(1, rows, self.upload(floats))
        self.ints.index_copy_(1, rows, ints[:-1])
        self.top_k.index_copy_(0, rows, ints[-1].int())
        for sequence in sequences:
            self.num_entries[sequence.slot] = 0
        self.extend(sequences)

    def extend(self, sequences: Seq[Sequence]) -> None:
        """Blocks that sequences have gained since the device last heard of them."""
        places: list[int] = []
        blocks: list[int] = []
        for sequence in sequences:
            known, now = self.num_entries[sequence.slot], len(sequence.blocks)
            if now > known:
                first = sequence.slot * self.width
                places.extend(range(first + known, first + now))
                blocks.extend(sequence.blocks[known:])
                self.num_entries[sequence.slot] = now
        if places:
            both = self.upload(torch.from_numpy(np.array([places, blocks], np.int64)))
            self.table.view(-1).index_copy_(0, both[0], both[1].int())

    def retire(self, slots: Seq[int]) -> None:
        """Rows whose sequence has left: they write to block 0 from now on."""
        if slots:
            rows = self.upload(torch.tensor(slots))
            self.ints.index_fill_(1, rows, 0)
            self.floats[0].index_fill_(0, rows, 0.0)
            self.table.index_fill_(0, rows, 0)
            for slot in slots:
                self.num_entries[slot] = 0

    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy row a to the free row b, for each pair (a, b)."""
        sources, targets = (self.upload(torch.tensor(side)) for side in zip(*pairs, strict=True))
        for state, axis in ((self.floats, 1), (self.ints, 1), (self.top_k, 0), (self.table, 0)):
            state.index_copy_(axis, targets, state.index_select(axis, sources))
        for source, target in pairs:
            self.num_entries[target] = self.num_entries[source]
        self.retire([source for source, _ in pairs])

    def upload(self, values: Tensor) -> Tensor:
        """A host tensor on the device, without waiting: from pinned memory, or the copy would wait for the stream."""
        if self.device.type == "cpu":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)


def grid(rows: RowState, start_B: Tensor, width: int, block_size: int) -> tuple[Tensor, AttnMeta]:
    """Positions [T] and attention of a pass over `width` tokens of each of the first B rows, from position start_B on.

    Rows that are not live, and positions beyond a row's blocks, use block 0. No host wait.
    """
    num_rows = start_B.numel()
    table = rows.table[:num_rows]
    places = torch.arange(width, device=start_B.device)
    positions_BN = start_B.clamp(min=0)[:, None] + places
    index_BN = positions_BN // block_size
    blocks_BN = table.gather(1, index_BN.clamp(max=rows.width - 1)).long()
    used_BN = rows.live[:num_rows, None] * (index_BN < rows.width)
    meta = AttnMeta(
        cu_q=torch.arange(0, (num_rows + 1) * width, width, dtype=torch.int32, device=start_B.device),
        max_q=width,
        lens_k=(positions_BN[:, -1] + 1).int(),
        max_k=rows.width * block_size,
        block_table=table,
        slots=(blocks_BN * used_BN * block_size + positions_BN % block_size).flatten(),
        num_decodes=num_rows if width == 1 else 0,
    )
    return positions_BN.flatten(), meta


def _floats(params: SamplingParams) -> list[Any]:
    return [
        params.temperature, params.top_p, params.min_p,
        params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
    ]  # fmt: skip
