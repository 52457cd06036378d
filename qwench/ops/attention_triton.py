"""Triton kernel of paged attention for few queries a sequence: decoding, and drafts to be verified.

Each program reads a part of one sequence's pages once for all query heads that share a key head, and keeps a running
softmax. Where the batch alone would leave the GPU idle, a sequence's keys are split over several programs, and a
second kernel merges their parts. The split depends on nothing but the batch size that the caller was built for, and a
sequence's result on nothing but its own length and that split.

Shape suffixes as in `attention.py`; M rows of one program (queries of one sequence times query heads of one key head).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.dispatch import batch_invariant

INVARIANT_SPLITS = 8


@triton.jit
def _part_kernel(
    q, keys, values, table, lens, cu_q, out, part_out, part_lse,
    scale, window, stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_table,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, SINGLE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    seq, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SINGLE:
        first_q = seq
        num_q = 1
    else:
        first_q = tl.load(cu_q + seq)
        num_q = tl.load(cu_q + seq + 1) - first_q
    length = tl.load(lens + seq)
    rows = tl.arange(0, M)
    q_of_row, h_of_row = rows // G, head * G + rows % G
    live = q_of_row < num_q
    cols = tl.arange(0, D)
    q_MD = tl.load(
        q + (first_q + q_of_row)[:, None].to(tl.int64) * stride_qt + h_of_row[:, None] * stride_qh + cols[None, :],
        mask=live[:, None], other=0.0,
    )  # fmt: skip
    position = length - num_q + q_of_row  # of each row's query
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - num_q - window + 1, 0) // N * N
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), N) * N
    start = begin + split * share
    stop = tl.minimum(start + share, length)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for at in range(start, stop, N):
        pos = at + tl.arange(0, N)
        valid = pos < stop
        block = tl.load(table + seq.to(tl.int64) * stride_table + pos // P, mask=valid, other=0).to(tl.int64)
        place = block * stride_kn + (pos % P) * stride_kp + head * stride_kh
        k_ND = tl.load(keys + place[:, None] + cols[None, :], mask=valid[:, None], other=0.0).to(q_MD.dtype)
        scores = tl.dot(q_MD, tl.trans(k_ND)) * scale
        seen = valid[None, :] & (pos[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (pos[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink = tl.exp2(best - safe)
        probs = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(probs, 1)
        v_ND = tl.load(values + place[:, None] + cols[None, :], mask=valid[:, None], other=0.0).to(q_MD.dtype)
        acc = acc * shrink[:, None] + tl.dot(probs.to(q_MD.dtype), v_ND)
        best = new_best
    if SPLITS == 1:
        to = out + (first_q + q_of_row)[:, None].to(tl.int64) * (H * D) + h_of_row[:, None] * D + cols[None, :]
        tl.store(to, acc / total[:, None], mask=live[:, None])
    else:
        row = ((first_q + q_of_row).to(tl.int64) * H + h_of_row) * SPLITS + split
        weight = tl.where(total > 0, total, 1.0)
        tl.store(part_out + row[:, None] * D + cols[None, :], acc / weight[:, None], mask=live[:, None])
        lse = tl.where(total > 0, best + tl.log2(weight), float("-inf"))
        tl.store(part_lse + row, lse, mask=live)


@triton.jit
def _merge_kernel(part_out, part_lse, out, D: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    splits, cols = tl.arange(0, SPLITS), tl.arange(0, D)
    lse = tl.load(part_lse + row * SPLITS + splits)
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    parts = tl.load(part_out + (row * SPLITS + splits)[:, None] * D + cols[None, :])
    tl.store(out + row * D + cols, tl.sum(parts * weight[:, None], 0))


def paged_attention(q_THD: Tensor, meta: AttnMeta, cache: KVCache, window: int | None, max_q: int) -> Tensor:
    """Attention of at most `max_q` queries a sequence over its pages; [T, H, D] in q's dtype. No host wait."""
    assert meta.lens_k is not None
    assert meta.block_table is not None
    keys, values = cache
    assert keys.stride() == values.stride()
    num_tokens, heads, size = q_THD.shape
    num_seqs, kv_heads = meta.lens_k.numel(), keys.shape[2]
    group = heads // kv_heads
    splits = INVARIANT_SPLITS if batch_invariant() else num_splits(num_seqs * kv_heads, _multiprocessors(q_THD.device))
    out = torch.empty((num_tokens, heads, size), dtype=q_THD.dtype, device=q_THD.device)
    part_out = part_lse = out
    if splits > 1:
        part_out = torch.empty((num_tokens, heads, splits, size), dtype=torch.float32, device=q_THD.device)
        part_lse = torch.empty((num_tokens, heads, splits), dtype=torch.float32, device=q_THD.device)
    launch: Any = _part_kernel[(num_seqs, kv_heads, splits)]
    launch(
        q_THD, keys, values, meta.block_table, meta.lens_k, meta.cu_q, out, part_out, part_lse,
        size**-0.5 * 1.4426950408889634, window or 0,
        q_THD.stride(0), q_THD.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), meta.block_table.stride(0),
        H=heads, G=group, D=size, P=keys.shape[1], M=max(16, triton.next_power_of_2(max_q * group)), N=64,
        SPLITS=splits, SINGLE=max_q == 1, WINDOWED=window is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        merge: Any = _merge_kernel[(num_tokens * heads,)]
        merge(part_out, part_lse, out, D=size, SPLITS=splits, num_warps=2)
    return out


def num_splits(num_programs: int, multiprocessors: int) -> int:
    """Power of two that gives about two programs a multiprocessor, at most 32."""
    return max(1, min(32, triton.next_power_of_2(2 * multiprocessors // max(1, num_programs) + 1) // 2))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
