"""Triton kernels of paged attention for few queries a sequence: decoding, and drafts to be verified.

Each program reads a part of one sequence's pages once for all query heads that share a key head, and keeps a running
softmax. In decoding steps of many sequences, the copy engine of the processor fetches whole blocks of the cache (TMA:
one instruction a block instead of an address an element). Long sequences of a small batch are split over several
programs; the last of them to finish merges the parts. How often a sequence is split depends on the batch size that the
caller was built for and on its own length, and the order of the sums on nothing else.

`decode_attention` also rotates q and k and writes the new key and value to the cache: one kernel for all that lies
between the two projections of a decoding step.

Shape suffixes as in `attention.py`; M rows of one program (queries of one sequence times query heads of one key head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.dispatch import batch_invariant
from qwench.ops.elementwise_triton import product
from qwench.ops.rope import Rope
from qwench.ops.triton_launch import dependent_launch, options, zeroed_counters

LOG2E = 1.4426950408889634
MAX_ROWS = 32
"""Rows of a program; where a sequence has more, several share its keys."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the keys of a sequence are shared out, and how a program works."""

    keys: int
    """At a time; with `whole_blocks` it is a block of the cache."""
    num_warps: int
    num_stages: int
    """Loads in flight, and one."""
    min_keys: int
    """Fewest keys worth a program of their own."""
    splits: int
    """Most programs for the keys of one sequence, a power of two."""
    whole_blocks: bool = False
    """Decoding fetches whole blocks by TMA, where the cache has the dtype of the queries and no window cuts blocks."""


INVARIANT = Tile(keys=128, num_warps=4, num_stages=3, min_keys=128, splits=16)


def tile_for(num_units: int, head_size: int) -> Tile:
    """What was measured best on an H200, or next to it, for so many pairs of a sequence and a key head.

    A mix of lengths, 850 keys on average: few units need many programs each, many only a remedy for the longest.
    """
    if (512 <= num_units < 1024) if head_size <= 64 else num_units >= 1024:
        return Tile(keys=64, num_warps=1, num_stages=3, min_keys=512, splits=1, whole_blocks=True)
    if num_units >= 112:
        min_keys = 256 if head_size <= 64 and num_units < 192 else 512
        return Tile(keys=64, num_warps=1, num_stages=3, min_keys=min_keys, splits=4, whole_blocks=True)
    if num_units >= 40:
        return Tile(keys=64, num_warps=1, num_stages=3, min_keys=256, splits=8, whole_blocks=True)
    if num_units >= 24:
        return Tile(keys=64, num_warps=4, num_stages=3, min_keys=128, splits=16)
    min_keys = 64 if head_size > 64 and num_units <= 4 else 128
    return Tile(keys=64, num_warps=4, num_stages=2, min_keys=min_keys, splits=64)


@triton.jit
def _range_of_split(length, begin, split, min_keys, SPLITS: tl.constexpr, N: tl.constexpr):
    """(number of splits in use, first key, end) of a program's share of the keys begin..length.

    Beyond 16 each has at least eight times `min_keys`: to merge a part costs as much as to read hundreds of keys.
    """
    most = tl.minimum(tl.maximum(tl.cdiv(length - begin, 8 * min_keys), 16), SPLITS)
    used = tl.minimum(tl.maximum(tl.cdiv(length - begin, min_keys), 1), most)
    share = tl.cdiv(tl.cdiv(length - begin, used), N) * N
    used = tl.maximum(tl.cdiv(length - begin, share), 1)  # rounding up may leave the last ones without keys
    start = begin + split * share
    return used, start, tl.minimum(start + share, length)


@triton.jit
def _finish(
    acc, best, total, out_ptrs, live, part_out, part_lse, rows, counter, split, used, cols,
    D: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write a program's rows; where the keys were split, the last program of the sequence merges the parts."""
    normed = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1 or used == 1:
        tl.store(out_ptrs, normed, mask=live[:, None])
    else:
        lse = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(part_out + (rows * SPLITS + split)[:, None] * D + cols[None, :], normed, mask=live[:, None])
        tl.store(part_lse + rows * SPLITS + split, lse, mask=live)
        tl.debug_barrier()
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == used - 1:
            splits = tl.arange(0, SPLITS)
            lse_MS = tl.load(
                part_lse + rows[:, None] * SPLITS + splits[None, :],
                mask=live[:, None] & (splits < used)[None, :], other=float("-inf"), cache_modifier=".cg",
            )  # fmt: skip
            top = tl.max(lse_MS, 1)
            norm = tl.sum(tl.exp2(lse_MS - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
            merged = tl.zeros([M, D], tl.float32)
            for first in range(0, used, 4):
                for other in tl.static_range(4):  # four parts a turn: it waits once for memory
                    at = first + other
                    mine = live & (at < used)
                    one = tl.load(part_lse + rows * SPLITS + at, mask=mine, other=float("-inf"), cache_modifier=".cg")
                    part = tl.load(
                        part_out + (rows * SPLITS + at)[:, None] * D + cols[None, :],
                        mask=mine[:, None], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    merged += part * tl.where(mine, tl.exp2(one - top) / norm, 0.0)[:, None]
            tl.store(out_ptrs, merged, mask=live[:, None])
            tl.store(counter, 0)


@triton.jit
def _absorb(q_MD, k_ND, v_ND, seen, scale, best, total, acc):
    """One tile of keys into a running softmax; `seen` [M or 1, N] says which keys a row sees."""
    scores = tl.where(seen, tl.dot(q_MD, tl.trans(k_ND)) * scale, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    shrink = tl.exp2(best - safe)
    probs = tl.exp2(scores - safe[:, None])
    return new_best, total * shrink + tl.sum(probs, 1), acc * shrink[:, None] + tl.dot(probs.to(q_MD.dtype), v_ND)


@triton.jit
def _places(table_row, at, stop, head_offset, stride_kn, stride_kp, P: tl.constexpr, N: tl.constexpr):
    """Where in the cache the positions from `at` lie, [N] offsets. Only those before `stop` are in the table."""
    pos = at + tl.arange(0, N)
    block = tl.load(table_row + pos // P, mask=pos < stop, other=0).to(tl.int64)
    return block * stride_kn + (pos % P) * stride_kp + head_offset


@triton.jit
def _tile(keys, values, places, cols, at, stop, dtype: tl.constexpr, N: tl.constexpr):
    """Keys and values [N, D] of the positions from `at`, and which of them lie before `stop`."""
    valid = at + tl.arange(0, N) < stop
    places = places[:, None] + cols[None, :]
    k_ND = tl.load(keys + places, mask=valid[:, None], other=0.0).to(dtype)
    v_ND = tl.load(values + places, mask=valid[:, None], other=0.0).to(dtype)
    return k_ND, v_ND, valid


@triton.jit
def _turn(x, partner, cos, sin, sign, dtype: tl.constexpr):
    """x cos + sign * partner sin, rounded after each operation as tensors of `dtype` would be."""
    turned = product(x, cos).to(dtype).to(tl.float32) + sign * product(partner, sin).to(dtype).to(tl.float32)
    return turned.to(dtype)


@triton.jit
def _decode_kernel(
    q, k, v, position_ptr, inv_freq_ptr, slots, keys, values, k_blocks, v_blocks, table, lens,
    out, part_out, part_lse, counters,
    scale, window, min_keys, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kn, stride_kp, stride_kk, stride_table,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """One query a sequence, not yet rotated; its key and value are not in the cache yet.

    Only q, k and v come from the kernel just before, so all else, a first tile of old keys included, is read before the
    wait (see `triton_launch`, rule 2). With WHOLE_BLOCKS (N = P) that tile is the last one, where a block may be full
    in part only: what lies behind its end may be anything, and 0 times anything can be NaN.
    """
    seq, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, M), tl.arange(0, D)
    R: tl.constexpr = D // 2
    h_of_row = head * G + rows
    live = rows < G
    dtype = q.dtype.element_ty
    length = tl.load(lens + seq)
    old = length - 1  # keys that the cache already holds
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0)
    used, start, stop = _range_of_split(length, begin, split, min_keys, SPLITS, N)  # pyright: ignore[reportGeneralTypeIssues]
    if split >= used:
        if USE_PDL:
            gdc_wait()
            gdc_launch_dependents()
        return
    inv_freq = tl.load(inv_freq_ptr + cols % R)
    table_row = table + seq * stride_table
    old_stop = tl.minimum(stop, old)
    head_offset = head * stride_kk
    first = start
    if WHOLE_BLOCKS:
        first = tl.maximum(start, old_stop // P * P)
    places = _places(table_row, first, old_stop, head_offset, stride_kn, stride_kp, P, N)
    k_ND, v_ND, valid = _tile(keys, values, places, cols, first, old_stop, dtype, N)  # pyright: ignore[reportGeneralTypeIssues]
    if WHOLE_BLOCKS:
        block = tl.load(table_row + start // P, mask=start < first, other=0)
    else:
        places = _places(table_row, start + N, old_stop, head_offset, stride_kn, stride_kp, P, N)
    angles = tl.load(position_ptr + seq).to(tl.float32) * inv_freq
    cos = tl.cos(angles).to(dtype).to(tl.float32)[None, :]
    sin = tl.sin(angles).to(dtype).to(tl.float32)[None, :]
    sign = tl.where(cols < R, -1.0, 1.0)[None, :]
    partner = (cols + R) % D
    slot = tl.load(slots + seq)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    q_row = q + seq * stride_qt + h_of_row[:, None] * stride_qh
    q_own = tl.load(q_row + cols[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    q_other = tl.load(q_row + partner[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    q_MD = _turn(q_own, q_other, cos, sin, sign, dtype)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if stop == length:  # this program's keys end with the new one, which only it writes
        kind = keys.dtype.element_ty
        k_row = k + seq * stride_kt + head * stride_kh
        k_own, k_other = tl.load(k_row + cols)[None, :].to(tl.float32), tl.load(k_row + partner)[None, :].to(tl.float32)
        v_1D = tl.load(v + seq * stride_vt + head * stride_vh + cols)[None, :].to(tl.float32).to(kind)
        k_1D = _turn(k_own, k_other, cos, sin, sign, dtype).to(tl.float32).to(kind)
        to = slot // P * stride_kn + slot % P * stride_kp + head * stride_kk + cols[None, :]
        tl.store(keys + to, k_1D)
        tl.store(values + to, v_1D)
        best = tl.sum(q_MD.to(tl.float32) * k_1D.to(tl.float32), 1) * scale
        total = tl.full([M], 1.0, tl.float32)
        acc = acc + v_1D.to(tl.float32)
    best, total, acc = _absorb(q_MD, k_ND, v_ND, valid[None, :], scale, best, total, acc)
    # The table is read a turn ahead: loads whose address is a load of the same turn cannot be kept in flight.
    if WHOLE_BLOCKS:
        every = tl.full([1, N], True, tl.int1)
        for at in tl.range(start, first, P, num_stages=STAGES):
            k_ND = k_blocks.load([block * P, head * D])
            v_ND = v_blocks.load([block * P, head * D])
            block = tl.load(table_row + at // P + 1, mask=at + P < first, other=0)
            best, total, acc = _absorb(q_MD, k_ND, v_ND, every, scale, best, total, acc)
    else:
        for at in range(start + N, old_stop, N):
            k_ND, v_ND, valid = _tile(keys, values, places, cols, at, old_stop, dtype, N)
            places = _places(table_row, at + N, old_stop, head_offset, stride_kn, stride_kp, P, N)
            best, total, acc = _absorb(q_MD, k_ND, v_ND, valid[None, :], scale, best, total, acc)
    out_ptrs = out + seq * (H * D) + h_of_row[:, None] * D + cols[None, :]
    _finish(
        acc, best, total, out_ptrs, live, part_out, part_lse, seq * H + h_of_row,
        counters + seq * (H // G) + head, split, used, cols, D, M, SPLITS,
    )  # fmt: skip


@triton.jit
def _part_kernel(
    q, keys, values, table, lens, cu_q, out, part_out, part_lse, counters,
    scale, window, min_keys, stride_qt, stride_qh, stride_kn, stride_kp, stride_kk, stride_table,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Several queries a sequence, already rotated, their keys in the cache."""
    seq, unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = unit // BLOCKS
    rows, cols = (unit % BLOCKS) * M + tl.arange(0, M), tl.arange(0, D)
    q_of_row, h_of_row = rows // G, head * G + rows % G
    dtype = q.dtype.element_ty
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_q = tl.load(cu_q + seq).to(tl.int64)
    num_q = (tl.load(cu_q + seq + 1) - first_q).to(tl.int32)
    length = tl.load(lens + seq)
    live = q_of_row < num_q
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - num_q - window + 1, 0)
    used, start, stop = _range_of_split(length, begin, split, min_keys, SPLITS, N)  # pyright: ignore[reportGeneralTypeIssues]
    if split >= used:
        return
    q_ptrs = q + (first_q + q_of_row)[:, None] * stride_qt + h_of_row[:, None] * stride_qh + cols[None, :]
    q_MD = tl.load(q_ptrs, mask=live[:, None], other=0.0)
    position = (length - num_q + q_of_row)[:, None]  # of each row's query
    table_row = table + seq * stride_table
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    head_offset = head * stride_kk
    places = _places(table_row, start, stop, head_offset, stride_kn, stride_kp, P, N)
    for at in range(start, stop, N):
        k_ND, v_ND, valid = _tile(keys, values, places, cols, at, stop, dtype, N)
        places = _places(table_row, at + N, stop, head_offset, stride_kn, stride_kp, P, N)
        pos = (at + tl.arange(0, N))[None, :]
        seen = valid[None, :] & (pos <= position)
        if WINDOWED:
            seen = seen & (pos > position - window)
        best, total, acc = _absorb(q_MD, k_ND, v_ND, seen, scale, best, total, acc)
    out_ptrs = out + (first_q + q_of_row)[:, None] * (H * D) + h_of_row[:, None] * D + cols[None, :]
    _finish(
        acc, best, total, out_ptrs, live, part_out, part_lse, (first_q + q_of_row) * H + h_of_row,
        counters + seq * (H // G) * BLOCKS + unit, split, used, cols, D, M, SPLITS,
    )  # fmt: skip


def decode_attention(
    q_BHD: Tensor,
    k_BKD: Tensor,
    v_BKD: Tensor,
    rope: Rope,
    meta: AttnMeta,
    cache: KVCache,
    window: int | None,
    tile: Tile | None = None,
) -> Tensor:
    """Rotate, store and attend with one new token a sequence; [B, H, D] in q's dtype. No host wait, no gradient."""
    assert meta.lens_k is not None
    assert meta.block_table is not None
    assert meta.slots is not None
    keys, values = cache
    assert keys.stride() == values.stride()
    num_seqs, heads, size = q_BHD.shape
    kv_heads = keys.shape[2]
    work = _Work.of(q_BHD, num_seqs, kv_heads, window, tile)
    block_size, blocks = keys.shape[1], cache
    if whole := work.tile.whole_blocks and window is None and keys.dtype == q_BHD.dtype and _reads_blocks(keys):
        blocks = tuple(_as_blocks(pages) for pages in cache)
        work.options["N"] = block_size
    launch: Any = _decode_kernel[(num_seqs, kv_heads, work.tile.splits)]
    launch(
        q_BHD, k_BKD, v_BKD, rope.positions_T, rope.inv_freq_R, meta.slots, keys, values, *blocks,
        meta.block_table, meta.lens_k, work.out, work.part_out, work.part_lse, work.counters,
        size**-0.5 * LOG2E, window or 0, work.tile.min_keys,
        q_BHD.stride(0), q_BHD.stride(1), k_BKD.stride(0), k_BKD.stride(1), v_BKD.stride(0), v_BKD.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), meta.block_table.stride(0),
        H=heads, G=heads // kv_heads, D=size, P=block_size, M=max(16, triton.next_power_of_2(heads // kv_heads)),
        WHOLE_BLOCKS=whole, STAGES=work.tile.num_stages, **work.options,
    )  # fmt: skip
    return work.out


def _reads_blocks(pages: Tensor) -> bool:
    """Whether TMA can fetch a block of one head: no gaps, 16 rows or more, on a device that has it."""
    capable = pages.device.type == "cpu" or torch.cuda.get_device_capability(pages.device) >= (9, 0)
    return capable and pages.is_contiguous() and pages.shape[1] in (16, 32, 64, 128)


def _as_blocks(pages: Tensor) -> TensorDescriptor:
    """[blocks, P, K, D] as TMA reads it: P rows of one head at a time."""
    num_blocks, block_size, heads, size = pages.shape
    shape, strides = [num_blocks * block_size, heads * size], [heads * size, 1]
    return TensorDescriptor(pages, shape, strides, [block_size, size])


def paged_attention(
    q_THD: Tensor, meta: AttnMeta, cache: KVCache, window: int | None, max_q: int, tile: Tile | None = None
) -> Tensor:
    """Attention of at most `max_q` queries a sequence over its pages; [T, H, D] in q's dtype. No host wait."""
    assert meta.lens_k is not None
    assert meta.block_table is not None
    keys, values = cache
    assert keys.stride() == values.stride()
    heads, size = q_THD.shape[1:]
    num_seqs, kv_heads = meta.lens_k.numel(), keys.shape[2]
    group = heads // kv_heads
    num_rows = min(max(16, 1 << (max_q * group - 1).bit_length()), MAX_ROWS)
    row_blocks = -(-max_q * group // num_rows)
    work = _Work.of(q_THD, num_seqs, kv_heads * row_blocks, window, tile)
    launch: Any = _part_kernel[(num_seqs, kv_heads * row_blocks, work.tile.splits)]
    launch(
        q_THD, keys, values, meta.block_table, meta.lens_k, meta.cu_q,
        work.out, work.part_out, work.part_lse, work.counters, size**-0.5 * LOG2E, window or 0, work.tile.min_keys,
        q_THD.stride(0), q_THD.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), meta.block_table.stride(0),
        H=heads, G=group, D=size, P=keys.shape[1], M=num_rows, BLOCKS=row_blocks, **work.options,
    )  # fmt: skip
    return work.out


@dataclass(slots=True)
class _Work:
    """A launch's output and scratch memory, and the options that both kernels share."""

    tile: Tile
    out: Tensor
    part_out: Tensor
    part_lse: Tensor
    counters: Tensor
    options: dict[str, Any]

    @staticmethod
    def of(q_THD: Tensor, num_seqs: int, num_units: int, window: int | None, tile: Tile | None) -> _Work:
        """`num_units` programs share the keys of a sequence's part: its key heads times blocks of rows."""
        device, (num_tokens, heads, size) = q_THD.device, q_THD.shape
        tile = tile or (INVARIANT if batch_invariant() else tile_for(num_seqs * num_units, size))
        splits = tile.splits
        out = torch.empty((num_tokens, heads, size), dtype=q_THD.dtype, device=device)
        part_out = part_lse = counters = out
        if splits > 1:
            part_out = torch.empty((num_tokens, heads, splits, size), dtype=torch.float32, device=device)
            part_lse = torch.empty((num_tokens, heads, splits), dtype=torch.float32, device=device)
            counters = zeroed_counters(device, triton.next_power_of_2(num_seqs * num_units))
        pdl = dependent_launch(device)
        further = dict(
            N=tile.keys, SPLITS=splits, WINDOWED=window is not None, USE_PDL=pdl,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **options(pdl),
        )  # fmt: skip
        return _Work(tile, out, part_out, part_lse, counters, further)
