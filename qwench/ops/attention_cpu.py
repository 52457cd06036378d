"""Attention of decoding steps on a CPU: one query a sequence, keys and values in a paged cache.

Sequences of similar length are gathered into one padded grid and go through torch's fused kernel in one call, where a
call for each sequence costs several times more (docs/cpu.md). The query heads that share a key/value head stand in
the query's length dimension: a single query sees every key, so nothing needs a causal mask, and the keys of a group
are read once. Prompts, several queries and gradients are not here: see `ops.attention`.

Shape suffixes: B sequences, H query heads, K key/value heads, G = H / K, D head size, S keys, N cache blocks,
P positions in a block, W blocks of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST_BUCKET = 7
"""log2 of the length up to which sequences share a grid however much their lengths differ."""


def decode(
    q_BHD: Tensor, keys_NPKD: Tensor, values_NPKD: Tensor, lens_B: Tensor, table_BW: Tensor, window: int | None
) -> Tensor:
    """[B, H, D] in q's dtype: each row's query over the last `window` of its lens_B[b] cached keys (None: all).

    `table_BW` gives each row's blocks in order; entries past a row's length may be any block.
    """
    lens = lens_B.tolist()
    buckets: dict[int, list[int]] = {}
    for row, num_keys in enumerate(lens):
        buckets.setdefault(max(SHORTEST_BUCKET, (num_keys - 1).bit_length()), []).append(row)
    out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    for rows in buckets.values():
        mine = [lens[row] for row in rows]
        if len(buckets) == 1:
            return _grid(q_BHD, keys_NPKD, values_NPKD, mine, table_BW, window)
        index = torch.tensor(rows)
        out_BHD[index] = _grid(q_BHD[index], keys_NPKD, values_NPKD, mine, table_BW[index], window)
    return out_BHD


def _grid(
    q_BHD: Tensor, keys_NPKD: Tensor, values_NPKD: Tensor, lens: list[int], table_BW: Tensor, window: int | None
) -> Tensor:
    num_rows, kv_heads = len(lens), keys_NPKD.shape[2]
    longest, shortest = max(lens), min(lens)
    table_BW = table_BW[:, : -(-longest // keys_NPKD.shape[1])]
    k_BSKD, v_BSKD = (_pages(pages, table_BW)[:, :longest].to(q_BHD.dtype) for pages in (keys_NPKD, values_NPKD))
    if shortest < longest:
        # What lies behind a row's keys belongs to others and may be anything; a NaN there would survive the mask.
        for row, num_keys in enumerate(lens):
            k_BSKD[row, num_keys:].zero_()
            v_BSKD[row, num_keys:].zero_()
    mask = None
    if shortest < longest or (window is not None and window < longest):
        positions_S, ends_B1 = torch.arange(longest), torch.tensor(lens)[:, None]
        seen_BS = positions_S < ends_B1
        if window is not None:
            seen_BS &= positions_S >= ends_B1 - window
        mask = seen_BS[:, None, None, :]
    q_BKGD = q_BHD.reshape(num_rows, kv_heads, -1, q_BHD.shape[-1])
    out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), attn_mask=mask)
    return out_BKGD.reshape(q_BHD.shape)


def _pages(pages_NPKD: Tensor, table_BW: Tensor) -> Tensor:
    """[B, W * P, K, D]: the blocks of each row laid end to end. A view if it is one row whose blocks are neighbours."""
    num_rows, width = table_BW.shape
    if num_rows == 1:
        blocks = table_BW[0].tolist()
        if blocks == list(range(blocks[0], blocks[0] + width)):
            return pages_NPKD[blocks[0] : blocks[0] + width].flatten(0, 1)[None]
    raw = pages_NPKD
    if raw.dtype.itemsize == 1:  # torch gathers rows of bytes, not of fp8
        raw = raw.view(torch.uint8)
    gathered = raw.index_select(0, table_BW.flatten()).view(pages_NPKD.dtype)
    return gathered.view(num_rows, -1, *pages_NPKD.shape[2:])
