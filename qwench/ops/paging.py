"""Bookkeeping of decoding on the device: where each row's next key goes, and moving the rows on by one token.

Shape suffixes: B rows, W blocks of a row, S places of the ring, R >= B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.ops.dispatch import Implementation, Operation
from qwench.ops.triton_launch import runs_triton


def locate(position_B: Tensor, live_B: Tensor, table_BW: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(slots [B] int64, lens [B] int32): the flat cache position of each row's token and its number of keys.

    Rows that are not live, or past the end of their blocks, write to block 0. position, live: int64; table: int32.
    """
    return LOCATE.choose(position_B.device)(position_B, live_B, table_BW, block_size)


def advance(
    tokens_B: Tensor,
    logprobs_B: Tensor,
    last_token_B: Tensor,
    position_B: Tensor,
    step_B: Tensor,
    live_B: Tensor,
    ring_tokens_SR: Tensor,
    ring_logprobs_SR: Tensor,
    ring_at: Tensor,
) -> None:
    """Note the tokens drawn: in place, live rows move on by one, and the ring's next place receives all rows."""
    ADVANCE.choose(tokens_B.device)(
        tokens_B, logprobs_B, last_token_B, position_B, step_B, live_B, ring_tokens_SR, ring_logprobs_SR, ring_at
    )


def _locate_reference(position_B: Tensor, live_B: Tensor, table_BW: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    position = position_B * live_B
    width = table_BW.shape[1]
    index = (position // block_size).clamp(max=width - 1)
    block = table_BW.gather(1, index[:, None])[:, 0].long() * live_B * (position < width * block_size)
    return block * block_size + position % block_size, (position + 1).int()


def _advance_reference(
    tokens_B: Tensor,
    logprobs_B: Tensor,
    last_token_B: Tensor,
    position_B: Tensor,
    step_B: Tensor,
    live_B: Tensor,
    ring_tokens_SR: Tensor,
    ring_logprobs_SR: Tensor,
    ring_at: Tensor,
) -> None:
    num_rows = tokens_B.numel()
    ring_tokens_SR[:, :num_rows].index_copy_(0, ring_at, tokens_B[None])
    ring_logprobs_SR[:, :num_rows].index_copy_(0, ring_at, logprobs_B[None])
    last_token_B.copy_(tokens_B)
    position_B.add_(live_B)
    step_B.add_(live_B)
    ring_at.add_(1)


def _locate_triton(position_B: Tensor, live_B: Tensor, table_BW: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    from qwench.ops import paging_triton

    return paging_triton.locate(position_B, live_B, table_BW, block_size)


def _advance_triton(*arguments: Tensor) -> None:
    from qwench.ops import paging_triton

    paging_triton.advance(*arguments)


def _gpu(device: torch.device) -> bool:
    return device.type == "cuda" and runs_triton(device)


LOCATE = Operation(
    "locate", [Implementation("triton", _locate_triton, _gpu), Implementation("reference", _locate_reference)]
)
ADVANCE = Operation(
    "advance", [Implementation("triton", _advance_triton, _gpu), Implementation("reference", _advance_reference)]
)
