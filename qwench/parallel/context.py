"""Context parallelism: the tokens of every row over a group of ranks, in pieces that cost them the same.

    part = cut(seq_lens, rank, world, row_lens)          # on the host, for every micro-batch
    tokens, positions, targets, weights = (x[part.index] for x in ...)
    hidden = model(tokens, positions, part.meta(group, device))

Each row is cut into 2C runs of equal length for C ranks, and rank r computes runs r and 2C-1-r: a causal mask makes
late runs dear and early ones cheap, and these two together cost the same on every rank [Llama 3, section 3.3.2]. A
piece is what a run has of one sequence: its queries are the last of their keys, the keys from the sequence's beginning
to the piece's end. So attention needs no further mask, only the keys: all ranks' are gathered in every layer
(`KeyGather`), and their gradients are summed and scattered.

Nothing here knows the model. Every token's loss is computed by one rank: a step's loss, total weight and gradients are
sums over the ranks of the group.

Letters: T tokens of the stream, T/C of this rank, S keys that its pieces see, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qwench.ops.attention import AttnMeta
from qwench.ops.hardware import upload
from qwench.parallel.sequence import TokenGroup, start_gather, start_scatter, wait


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank computes of a packed stream."""

    index: np.ndarray
    """int64 [T/C]: its tokens by their place in the stream, in its order: first runs of all rows, then second runs."""
    query_lens: list[int]
    """Tokens of each piece, in that order."""
    key_lens: list[int]
    """Keys of each piece, from the beginning of its sequence to the piece's end."""
    first_keys: np.ndarray
    """int64: where the keys of the first runs' pieces are among all ranks' tokens laid end to end."""
    second_keys: np.ndarray
    """The same of the second runs. No place is twice in one of the two."""

    def meta(self, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> AttnMeta:
        """The pieces, and how their keys come from the other ranks of `group`."""
        ranks = TokenGroup.of(group)
        if ranks.size == 1:
            return AttnMeta.packed(self.query_lens, device)
        first, second = (upload(torch.from_numpy(keys), device) for keys in (self.first_keys, self.second_keys))
        return AttnMeta.packed(self.query_lens, device, self.key_lens, KeyGather(first, second, ranks))


def check_rows(row_lens: Sequence[int], world: int, tensor: int = 1) -> None:
    """Raise ValueError unless rows of these lengths can be cut over `world` ranks, and each rank's tokens over a
    tensor-parallel group of `tensor` ranks.
    """
    for length in sorted(set(row_lens)):
        if world > 1 and length % (2 * world):
            unit = 2 * world
            raise ValueError(
                f"a row of {length} tokens does not divide into {unit} runs for {world} context-parallel ranks; choose "
                f"a length divisible by {unit}, such as {-(-length // unit) * unit}"
            )
    num_tokens = sum(row_lens)
    if num_tokens // world % tensor:
        raise ValueError(
            f"{num_tokens} tokens, {num_tokens // world} on each of {world} context-parallel ranks, do not divide over "
            f"{tensor} tensor-parallel ranks; choose micro-batches of a multiple of {world * tensor} tokens"
        )


def cut(seq_lens: Sequence[int], rank: int, world: int, row_lens: Sequence[int] | None = None) -> Part:
    """The part of `rank` of a stream of sequences laid end to end.

    `row_lens` (sum T) are the lengths of the rows, each cut by itself; a sequence must not go on in the next row. None:
    the stream is cut as one row. Raises ValueError for a row that does not divide by 2 * world.
    """
    num_tokens = sum(seq_lens)
    row_lens = [num_tokens] if row_lens is None else row_lens
    assert sum(row_lens) == num_tokens, "rows and sequences are of the same stream"
    check_rows(row_lens, world)
    if world == 1:
        everything = np.arange(num_tokens)
        return Part(everything, list(seq_lens), list(seq_lens), everything, everything[:0])
    ends = np.cumsum(seq_lens)
    assert np.isin(np.cumsum(row_lens), ends).all(), "a sequence goes on in the next row"
    by_rank = [np.concatenate([np.arange(*run) for run in _runs(row_lens, r, world)]) for r in range(world)]
    place = np.empty(num_tokens, np.int64)  # of a token among all ranks' tokens laid end to end
    place[np.concatenate(by_rank)] = np.arange(num_tokens)
    query_lens: list[int] = []
    key_lens: list[int] = []
    keys: list[list[np.ndarray]] = [[], []]
    for number, (start, stop) in enumerate(_runs(row_lens, rank, world)):
        for seq in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            seq_start, seq_stop = int(ends[seq]) - seq_lens[seq], int(ends[seq])
            if seq_start >= stop:
                break
            piece_start, piece_stop = max(seq_start, start), min(seq_stop, stop)
            if piece_start == piece_stop:
                continue  # an empty sequence
            query_lens.append(piece_stop - piece_start)
            key_lens.append(piece_stop - seq_start)
            keys[number >= len(row_lens)].append(place[seq_start:piece_stop])
    return Part(by_rank[rank], query_lens, key_lens, np.concatenate(keys[0]), np.concatenate(keys[1]))


def _runs(row_lens: Sequence[int], rank: int, world: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in the stream of a rank's runs: the first of every row, then the second of every row."""
    starts = list(itertools.accumulate(row_lens, initial=0))
    for number in (rank, 2 * world - 1 - rank):
        for start, length in zip(starts, row_lens, strict=False):
            run = length // (2 * world)
            yield start + number * run, start + (number + 1) * run


@torch.no_grad()
def restore(
    x: Tensor, seq_lens: Sequence[int], group: dist.ProcessGroup, row_lens: Sequence[int] | None = None
) -> Tensor:
    """[T/C, ...] of every rank -> [T, ...] in the stream's order on every rank, without gradient."""
    ranks = TokenGroup.of(group)
    if ranks.size == 1:
        return x
    parts = [cut(seq_lens, rank, ranks.size, row_lens).index for rank in range(ranks.size)]
    order = torch.from_numpy(np.argsort(np.concatenate(parts))).to(x.device)
    return wait(start_gather(x, ranks.name, ranks.size)).index_select(0, order)


# ------------------------------------------------------------------------------------------------------- in the model
@dataclass(frozen=True, slots=True)
class KeyGather:
    """`AttnMeta.gather` of one micro-batch: all ranks' keys and values, then those that this rank's pieces see.

    The copies that attention reads stay for the backward pass: of the whole stream, not of a rank's share, in every
    layer. With grouped-query heads they are small beside the other activations.
    """

    first_keys: Tensor
    second_keys: Tensor
    ranks: TokenGroup

    def __call__(self, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """[T/C, K, D] twice -> [S, K, D] twice."""
        pair = torch.stack((k_TKD, v_TKD), 1)
        out = _KeyGather.apply(pair, self.first_keys, self.second_keys, self.ranks.name, self.ranks.size)
        assert isinstance(out, Tensor)
        k_SKD, v_SKD = out.unbind(1)
        return k_SKD, v_SKD


class _KeyGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Tensor, first_keys: Tensor, second_keys: Tensor, name: str, size: int) -> Tensor:
        ctx.save_for_backward(first_keys, second_keys)
        ctx.name, ctx.size = name, size
        everything = wait(start_gather(pair, name, size))
        ctx.shape = everything.shape
        return everything.index_select(0, torch.cat((first_keys, second_keys)))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        first_keys, second_keys = ctx.saved_tensors
        d_first, d_second = d_out.split((first_keys.numel(), second_keys.numel()))
        # A key is in each half at most once: the sum of two terms does not depend on an order.
        d_everything = d_out.new_zeros(ctx.shape)
        d_everything.index_copy_(0, first_keys, d_first).index_add_(0, second_keys, d_second)
        return wait(start_scatter(d_everything, ctx.name, ctx.size)), None, None, None, None
