"""Rows become one batch of tensors."""

from __future__ import annotations

import numpy as np
import torch

from qwench.data.packing import PackedRow
from qwench.train.batch import make_batch


def row(tokens: list[int], seq_lens: list[int]) -> PackedRow:
    ids = np.array(tokens, np.uint16)  # the dtype of small vocabularies on disk
    weights = np.arange(len(tokens)).astype(np.float32)
    return PackedRow(tokens=ids, targets=ids + 1, loss_weights=weights, seq_lens=np.array(seq_lens, np.int32))


def test_rows_end_to_end() -> None:
    batch = make_batch([row([7, 8, 9], [2, 1]), row([5, 6, 7, 8], [4])], torch.device("cpu"))
    assert batch.num_tokens == 7
    assert batch.tokens_T.tolist() == [7, 8, 9, 5, 6, 7, 8]
    assert batch.targets_T.tolist() == [8, 9, 10, 6, 7, 8, 9]
    assert batch.positions_T.tolist() == [0, 1, 0, 0, 1, 2, 3], "positions restart in every sequence"
    assert batch.loss_weights_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.meta.cu_q.tolist() == [0, 2, 3, 7]
    assert batch.meta.max_q == 4
    assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64
    assert batch.loss_weights_T.dtype == torch.float32
    assert batch.meta.cu_q.dtype == torch.int32
