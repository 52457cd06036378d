"""Rows become one batch of tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qwench.data.packing import PackedRow
from qwench.train.batch import PAD_MULTIPLE, make_batch


def row(tokens: list[int], seq_lens: list[int]) -> PackedRow:
    ids = np.array(tokens, np.uint16)  # the dtype of small vocabularies on disk
    weights = np.arange(len(tokens)).astype(np.float32)
    return PackedRow(tokens=ids, targets=ids + 1, loss_weights=weights, seq_lens=np.array(seq_lens, np.int32))


def test_rows_end_to_end() -> None:
    batch = make_batch([row([7, 8, 9], [2, 1]), row([5, 6, 7, 8], [4])], torch.device("cpu"))
    assert batch.tokens_T[:7].tolist() == [7, 8, 9, 5, 6, 7, 8]
    assert batch.targets_T[:7].tolist() == [8, 9, 10, 6, 7, 8, 9]
    assert batch.positions_T[:7].tolist() == [0, 1, 0, 0, 1, 2, 3], "positions restart in every sequence"
    assert batch.loss_weights_T[:7].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.meta.cu_q[:4].tolist() == [0, 2, 3, 7]
    assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64
    assert batch.loss_weights_T.dtype == torch.float32
    assert batch.meta.cu_q.dtype == torch.int32


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 255, 256, 257])
def test_padding_counts_for_nothing(num_tokens: int) -> None:
    """What fills a batch up is in sequences of its own, without loss weight; nothing is added to a full batch."""
    batch = make_batch([row([3] * num_tokens, [num_tokens])], torch.device("cpu"))
    assert batch.num_tokens == -(-num_tokens // PAD_MULTIPLE) * PAD_MULTIPLE
    assert batch.meta.cu_q[1] == num_tokens
    assert batch.meta.cu_q[-1] == batch.num_tokens
    lengths = batch.meta.cu_q.diff()
    assert int(lengths.min()) > 0
    assert batch.meta.max_q == int(lengths.max()) == max(num_tokens, int(lengths[1:].max()) if len(lengths) > 1 else 0)
    assert not batch.loss_weights_T[num_tokens:].any()
    assert torch.equal(batch.positions_T, torch.cat([torch.arange(n) for n in lengths.tolist()]))


def test_weights_and_size_of_a_step() -> None:
    """Weights as shares of the step's total, and a batch of as many tokens as the others have."""
    batch = make_batch([row([7, 8, 9], [2, 1])], torch.device("cpu"), total_weight=4.0, num_tokens=700)
    assert batch.loss_weights_T[:3].tolist() == [0, 0.25, 0.5]
    assert batch.num_tokens == 768
    assert not batch.loss_weights_T[3:].any()
    full = make_batch([row([3] * 768, [768])], torch.device("cpu"), num_tokens=700)
    assert full.num_tokens == 768


def test_sources_of_tokens() -> None:
    rows = [dataclasses.replace(row([7, 8], [2]), sources=np.array([0, n], np.int16)) for n in (1, 2)]
    batch = make_batch(rows, torch.device("cpu"))
    assert batch.sources_T is not None
    assert batch.sources_T[:4].tolist() == [0, 1, 0, 2]
    assert batch.sources_T.shape == batch.tokens_T.shape
    assert make_batch([row([7, 8], [2])], torch.device("cpu")).sources_T is None
