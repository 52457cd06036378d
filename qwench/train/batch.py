"""Packed rows (numpy) -> one `Batch` of tensors on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwench.data.packing import PackedRow
from qwench.ops.attention import AttnMeta
from qwench.ops.hardware import upload
from qwench.parallel.context import Part, cut
from qwench.parallel.layout import Team


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows laid end to end: tokens, targets, positions int64 [T]; loss_weights fp32 [T]; sequences in `meta`; the
    number of each token's source int16 [T], where rows have sources."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    loss_weights_T: Tensor
    meta: AttnMeta
    sources_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()


PAD_MULTIPLE = 256
"""Batches are padded to a multiple of this many tokens, so that kernels are built for few shapes."""


def make_batch(
    rows: Sequence[PackedRow],
    device: torch.device,
    team: Team | None = None,
    *,
    total_weight: float = 1.0,
    num_tokens: int = 0,
) -> Batch:
    """Positions restart at 0 in every sequence. Padding is a row of its own without loss weight.

    Loss weights are divided by `total_weight`, and a batch of fewer than `num_tokens` tokens is padded to that many.
    Does not wait for the device.

    With a context axis in the team, the part of this rank: some tokens of every row. Where rows do not all divide into
    the pieces of the axis, as rows of samples do not, all of them together are cut as one.
    """
    context, tensor = (1, 1) if team is None else (team.layout.context, team.layout.tensor)
    multiple = math.lcm(PAD_MULTIPLE, 2 * context * tensor)
    filled = sum(row.num_tokens for row in rows)
    num_padding = -(-max(filled, num_tokens) // multiple) * multiple - filled
    if num_padding:
        rows = [*rows, padding_row(num_padding)]
    seq_lens = np.concatenate([row.seq_lens for row in rows])
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    part: Part | None = None
    if team is not None and context > 1:
        row_lens = [row.num_tokens for row in rows]
        even = all(num_tokens % (2 * context) == 0 for num_tokens in row_lens)
        part = cut(seq_lens.tolist(), team.place("context"), context, row_lens if even else None)

    def tensor_of(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        values = np.concatenate(parts)
        return upload(torch.from_numpy(values if part is None else values[part.index]).to(dtype), device)

    weights = [row.loss_weights / np.float32(total_weight) for row in rows]
    sources = [row.sources if row.sources is not None else np.zeros(row.num_tokens, np.int16) for row in rows]
    return Batch(
        tokens_T=tensor_of([row.tokens for row in rows], torch.int64),
        targets_T=tensor_of([row.targets for row in rows], torch.int64),
        positions_T=tensor_of([np.arange(len(starts)) - starts], torch.int64),
        loss_weights_T=tensor_of(weights, torch.float32),
        meta=AttnMeta.packed(seq_lens.tolist(), device)
        if part is None or team is None
        else part.meta(team.group("context"), device),
        sources_T=tensor_of(sources, torch.int16) if rows[0].sources is not None else None,
    )


def padding_row(num_tokens: int) -> PackedRow:
    """A row without any loss weight."""
    zeros = np.zeros(num_tokens, np.int32)
    # In pieces, so that padding never is the longest sequence of a batch of short ones.
    seq_lens = np.array([32] * (num_tokens // 32) + [num_tokens % 32] * (num_tokens % 32 > 0), np.int32)
    return PackedRow(tokens=zeros, targets=zeros, loss_weights=zeros.astype(np.float32), seq_lens=seq_lens)
