"""Packed rows (numpy) -> one `Batch` of tensors on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwench.data.packing import PackedRow
from qwench.ops.attention import AttnMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows laid end to end: tokens, targets, positions int64 [T]; loss_weights fp32 [T]; sequences in `meta`."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    loss_weights_T: Tensor
    meta: AttnMeta

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()


PAD_MULTIPLE = 256
"""Batches are padded to a multiple of this many tokens, so that kernels are built for few shapes."""


def make_batch(rows: Sequence[PackedRow], device: torch.device) -> Batch:
    """Positions restart at 0 in every sequence. Padding is a row of its own without loss weight."""
    num_padding = -sum(row.num_tokens for row in rows) % PAD_MULTIPLE
    if num_padding:
        rows = [*rows, _padding(num_padding)]
    seq_lens = np.concatenate([row.seq_lens for row in rows])
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device=device, dtype=dtype)

    return Batch(
        tokens_T=tensor([row.tokens for row in rows], torch.int64),
        targets_T=tensor([row.targets for row in rows], torch.int64),
        positions_T=tensor([np.arange(len(starts)) - starts], torch.int64),
        loss_weights_T=tensor([row.loss_weights for row in rows], torch.float32),
        meta=AttnMeta.packed(seq_lens.tolist(), device),
    )


def _padding(num_tokens: int) -> PackedRow:
    zeros = np.zeros(num_tokens, np.int32)
    # In pieces, so that padding never is the longest sequence of a batch of short ones.
    seq_lens = np.array([32] * (num_tokens // 32) + [num_tokens % 32] * (num_tokens % 32 > 0), np.int32)
    return PackedRow(tokens=zeros, targets=zeros, loss_weights=zeros.astype(np.float32), seq_lens=seq_lens)
