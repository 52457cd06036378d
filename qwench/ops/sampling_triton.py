"""Triton kernels of the draw of `ops.sampling`.

A row is cut into tiles of TILE columns; every tile reports its largest logit, its sum of exponentials and its best
runner of the exponential race, each relative to the tile's own maximum, and one program a row combines them. Tiles do
not depend on the batch, so neither does a result. Without filters that is all: logits are read once.

Rows with filters need a threshold first. Every run of SUB columns has reported its maximum and mass, from which
`_cut_kernel` finds a lower bound of the threshold; `_gather_kernel` copies the logits above it (in no particular
order); `_select_kernel` bisects the fp32 numbers between the bound and the maximum for the exact threshold, with
counts and masses in integers, which no order changes. If there are more candidates than the buffer holds (flat
distributions), it goes over the whole row instead: slower, with the same result. Then the race is run above it.

Shapes are fixed and nothing is read back, so every call can be captured in a CUDA graph. Import this file only where
`triton_launch.runs_triton` says so.

Shape suffixes: B rows, V columns, T tiles of a row, S = T * TILE / SUB runs of a row, C places for candidates.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.sampling import COLDEST, HOTTEST, MASS_UNIT, REACH, SamplingRows
from qwench.ops.triton_launch import interpreted

TILE = 2048
SUB = 128
MAX_CANDIDATES = 32768
"""Logits copied for the bisection of a row: what a top-p of a flat distribution may need at 151,936 columns."""

_TILE, _SUB = tl.constexpr(TILE), tl.constexpr(SUB)
_INTERPRETED = tl.constexpr(interpreted())
_INF = tl.constexpr(float("inf"))
_COLDEST, _HOTTEST = tl.constexpr(COLDEST), tl.constexpr(HOTTEST)
_REACH = tl.constexpr(REACH)
_MASS_UNIT = tl.constexpr(MASS_UNIT)
_MARGIN = tl.constexpr(1 - 1e-4)  # how far the bound stays from the line, for the rounding of fp32 sums


@triton.jit
def _mix(x, key):
    """`sampling._mix` in 32-bit arithmetic."""
    x = x ^ (x >> 17)
    x = x * 0xED5AD4BB + key
    x = x ^ (x >> 11)
    x = x * 0xAC4C1B51
    x = x ^ (x >> 15)
    x = x * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _log(x):
    """Natural logarithm of a normal number, within 3e-7 or 2 units in the last place, whichever is more."""
    if _INTERPRETED:
        return tl.log(x)
    log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return log2 * 0.6931471805599453


@triton.jit
def _exp(x):
    """e ** x, 0 where that is not a normal number."""
    if _INTERPRETED:
        return tl.exp(x)
    x = x * 1.4426950408889634
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log_exponential(seed, step, tokens):
    """log(e) of e ~ Exp(1): `exponential(noise_bits(seed, step, tokens)).log()`."""
    low, high, count = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32), (step & 0xFFFFFFFF).to(tl.uint32)
    first = _mix(_mix(_mix(low + 0x9E3779B9, 0) ^ high, 0) ^ count, 0)
    second = _mix(_mix(_mix(count + 0x7F4A7C15, 0) ^ high, 0) ^ low, 0)
    bits = _mix(tokens.to(tl.uint32) ^ first, second)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # 2**-32; 1 - 2**-24
    # -log(1 - v); for small v its series, as 1 - v has lost the digits there.
    series = v * (1 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * (0.2 + v * 0.16666667)))))
    return _log(tl.where(v < 0.0625, series, -_log(1 - v)))


@triton.jit
def _coldness(temperature):
    """1 / temperature; 1 for greedy rows."""
    return tl.where(temperature > 0, 1 / tl.minimum(tl.maximum(temperature, _COLDEST), _HOTTEST), 1.0)


@triton.jit
def _below(x, top):
    """x - top, where top is the largest of x; also -inf where all of x is."""
    return x - tl.where(top > -_INF, top, 0.0)


@triton.jit
def _ordered(x):
    """fp32 scalar -> int64 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unordered(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tiles_kernel(
    logits_ptr,
    raw_ptr,
    temperature_ptr,
    seeds_ptr,
    steps_ptr,
    floor_ptr,  # [B] smallest logit that may be drawn
    tile_max_ptr,  # [B, T] largest logit of an id below vocab_size
    raw_max_ptr,  # [B, T]
    raw_sum_ptr,  # [B, T] sum of exp(raw - raw_max)
    sub_max_ptr,  # [B, S]
    sub_sum_ptr,  # [B, S] sum of exp((logit - tile_max) / temperature)
    score_ptr,  # [B, T] best of (logit - tile_max) / temperature - log(e)
    id_ptr,  # [B, T] its token
    stride_b,
    raw_stride_b,
    V,
    vocab_size,
    num_tiles,
    RAW: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUBS: tl.constexpr,
    DRAW: tl.constexpr,
):
    """One tile a program: statistics, the race, or both. The race alone takes tile_max from an earlier launch."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tile * _TILE + tl.arange(0, _TILE)
    temperature = tl.load(temperature_ptr + b)
    cold = _coldness(temperature)
    place = b * num_tiles + tile
    busy = True
    if STATISTICS:
        x = tl.load(logits_ptr + b * stride_b + columns, mask=columns < V, other=-_INF).to(tl.float32)
        raw = x
        if RAW:
            raw = tl.load(raw_ptr + b * raw_stride_b + columns, mask=columns < V, other=-_INF).to(tl.float32)
        raw_top = tl.max(raw, 0)
        tl.store(raw_max_ptr + place, raw_top)
        tl.store(raw_sum_ptr + place, tl.sum(_exp(_below(raw, raw_top)), 0))
        x = tl.where(columns < vocab_size, x, -_INF)
        top = tl.max(x, 0)
        tl.store(tile_max_ptr + place, top)
        if SUBS:
            mass = _exp(_below(x, top) * cold)
            subs = place * (_TILE // _SUB) + tl.arange(0, _TILE // _SUB)
            tl.store(sub_max_ptr + subs, tl.max(tl.reshape(x, (_TILE // _SUB, _SUB)), 1))
            tl.store(sub_sum_ptr + subs, tl.sum(tl.reshape(mass, (_TILE // _SUB, _SUB)), 1))
    else:
        floor = tl.load(floor_ptr + b)
        top = tl.load(tile_max_ptr + place)
        busy = (top >= floor) & (top > -_INF)
        x = tl.full((_TILE,), -_INF, tl.float32)
        if busy:
            x = tl.load(logits_ptr + b * stride_b + columns, mask=columns < V, other=-_INF).to(tl.float32)
            x = tl.where(columns < vocab_size, x, -_INF)
    if DRAW:
        score, winner = tl.full((), -_INF, tl.float32), tl.full((), 0, tl.int32)
        if busy:
            runner = _below(x, top) * cold
            if temperature > 0:
                noise = _log_exponential(tl.load(seeds_ptr + b), tl.load(steps_ptr + b), columns)
                runner -= noise
                if not STATISTICS:
                    runner = tl.where(x >= floor, runner, -_INF)
            score, winner = tl.max(runner, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(score_ptr + place, score)
        tl.store(id_ptr + place, tile * _TILE + winner)


@triton.jit
def _finish_kernel(
    raw_ptr,
    temperature_ptr,
    tile_max_ptr,
    raw_max_ptr,
    raw_sum_ptr,
    score_ptr,
    id_ptr,
    token_ptr,
    logprob_ptr,
    raw_stride_b,
    num_tiles,
    TILES: tl.constexpr,
):
    """One row a program: the best of its tiles' runners, and its log-probability."""
    b = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    places = b * num_tiles + tiles
    raw_max = tl.load(raw_max_ptr + places, mask=inside, other=-_INF)
    raw_sum = tl.load(raw_sum_ptr + places, mask=inside, other=0.0)
    raw_top = tl.max(raw_max, 0)
    log_sum = tl.log(tl.sum(_exp(_below(raw_max, raw_top)) * raw_sum, 0)) + raw_top
    tile_max = tl.load(tile_max_ptr + places, mask=inside, other=-_INF)
    score = tl.load(score_ptr + places, mask=inside, other=-_INF)
    score += _below(tile_max, tl.max(tile_max, 0)) * _coldness(tl.load(temperature_ptr + b))
    winner = tl.argmax(score, 0, tie_break_left=True)
    token = tl.load(id_ptr + b * num_tiles + winner)
    tl.store(token_ptr + b, token.to(tl.int64))
    tl.store(logprob_ptr + b, tl.load(raw_ptr + b * raw_stride_b + token).to(tl.float32) - log_sum)


@triton.jit
def _cut_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tile_max_ptr,
    sub_max_ptr,
    sub_sum_ptr,
    max_ptr,  # [B] largest logit
    sum_ptr,  # [B] sum of exp((logit - max) / temperature)
    cut_ptr,  # [B] a lower bound of the threshold; inf where no bisection is needed
    floor_ptr,  # [B] the threshold where it is known already
    num_ptr,  # [B] candidates, set to 0
    vocab_size,
    num_subs,
    SUBS: tl.constexpr,
):
    """One row a program: the highest logit c of which the runs' maxima and masses prove that no threshold is below.

    top-k: at least k runs have a maximum of c or more. top-p: what lies below c has at most 1 - top_p of the mass; of
    a run with a maximum below c that is all, else no more than all but its maximum, and than _SUB - 1 times c's own.
    """
    b = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperature_ptr + b), tl.load(top_k_ptr + b)
    top_p, min_p = tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
    by_k, by_p = (temperature > 0) & (top_k > 0) & (top_k < vocab_size), (temperature > 0) & (top_p < 1)
    cut, floor = tl.full((), _INF, tl.float32), tl.full((), -_INF, tl.float32)
    if by_k | by_p | ((temperature > 0) & (min_p > 0)):
        cold = _coldness(temperature)
        subs = tl.arange(0, SUBS)
        inside = subs < num_subs
        sub_max = tl.load(sub_max_ptr + b * num_subs + subs, mask=inside, other=-_INF)
        sub_sum = tl.load(sub_sum_ptr + b * num_subs + subs, mask=inside, other=0.0)
        tile = subs // (_TILE // _SUB)
        tile_max = tl.load(tile_max_ptr + b * (num_subs // (_TILE // _SUB)) + tile, mask=inside, other=-_INF)
        top = tl.max(sub_max, 0)
        sub_sum *= _exp(_below(tile_max, top) * cold)
        largest = _exp(_below(sub_max, top) * cold)
        total = tl.sum(sub_sum, 0)
        tl.store(max_ptr + b, top)
        tl.store(sum_ptr + b, total)
        floor = top + tl.maximum(tl.log(tl.maximum(min_p, 1e-30)), -_REACH) / cold
        if (by_k | by_p) & (top > -_INF):
            low, high = _ordered(top - _REACH / cold), _ordered(top)
            while low < high:
                middle = low + (high - low + 1) // 2
                c = _unordered(middle)
                above = sub_max >= c
                if by_k:
                    proved = tl.sum(above.to(tl.int32), 0) >= top_k
                else:
                    rest = tl.minimum(tl.maximum(sub_sum - largest, 0.0), (_SUB - 1) * _exp((c - top) * cold))
                    proved = tl.sum(tl.where(above, rest, sub_sum), 0) <= (1 - top_p) * total * _MARGIN
                low = tl.where(proved, middle, low)
                high = tl.where(proved, high, middle - 1)
            cut = _unordered(low)
    tl.store(cut_ptr + b, cut)
    tl.store(floor_ptr + b, floor)
    tl.store(num_ptr + b, 0)


@triton.jit
def _gather_kernel(
    logits_ptr,
    tile_max_ptr,
    cut_ptr,
    num_ptr,
    candidates_ptr,  # [B, C]
    stride_b,
    V,
    vocab_size,
    num_tiles,
    C,
):
    """One tile a program: append its logits that are not below the cut to the row's candidates."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cut = tl.load(cut_ptr + b)
    if tl.load(tile_max_ptr + b * num_tiles + tile) >= cut:
        columns = tile * _TILE + tl.arange(0, _TILE)
        x = tl.load(logits_ptr + b * stride_b + columns, mask=columns < V, other=-_INF)
        chosen = (x.to(tl.float32) >= cut) & (columns < vocab_size)
        order = tl.cumsum(chosen.to(tl.int32), 0)
        start = tl.atomic_add(num_ptr + b, tl.max(order, 0))
        places = start + order - 1
        tl.store(candidates_ptr + b * C + places, x, mask=chosen & (places < C))


@triton.jit
def _above(pool_ptr, num, c, top, cold, WANT_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of `num` logits are not below c, or their mass in units of 1 / MASS_UNIT; int64."""
    result = tl.zeros((BLOCK,), tl.int64)
    start = tl.full((), 0, tl.int32)
    while start < num:  # not a range: the interpreter cannot take its end from a tensor
        places = start + tl.arange(0, BLOCK)
        x = tl.load(pool_ptr + places, mask=places < num, other=-_INF).to(tl.float32)
        if WANT_MASS:
            result += tl.where(x >= c, _exp((x - top) * cold) * _MASS_UNIT, 0.0).to(tl.int64)
        else:
            result += (x >= c).to(tl.int64)
        start += BLOCK
    return tl.sum(result, 0)


@triton.jit
def _bisect(pool_ptr, num, low, high, needed, top, cold, WANT_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number from low to high (ordered) from which upwards there is as much as needed; else low."""
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = _above(pool_ptr, num, _unordered(middle), top, cold, WANT_MASS, BLOCK).to(tl.float64) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _thresholds(pool_ptr, num, low, top, cold, by_k, top_k, by_p, top_p, total, BLOCK: tl.constexpr):
    """The ordered threshold of top-k and then top-p among the `num` logits of the pool that are not below `low`."""
    high = _ordered(top)
    mass = total.to(tl.float64) * _MASS_UNIT
    if by_k:
        low = _bisect(pool_ptr, num, low, high, top_k.to(tl.float64), top, cold, False, BLOCK)
        if by_p:
            mass = _above(pool_ptr, num, _unordered(low), top, cold, True, BLOCK).to(tl.float64)
    if by_p:
        low = _bisect(pool_ptr, num, low, high, mass * top_p, top, cold, True, BLOCK)
    return low


@triton.jit
def _select_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    max_ptr,
    sum_ptr,
    cut_ptr,
    floor_ptr,
    num_ptr,
    candidates_ptr,
    stride_b,
    vocab_size,
    C,
    BLOCK: tl.constexpr,
):
    """One row a program: raise its floor to the exact threshold of top-k and top-p."""
    b = tl.program_id(0).to(tl.int64)
    cut = tl.load(cut_ptr + b)
    if cut < _INF:
        temperature, top_k, top_p = tl.load(temperature_ptr + b), tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
        by_k, by_p = (top_k > 0) & (top_k < vocab_size), top_p < 1
        cold, top, total = _coldness(temperature), tl.load(max_ptr + b), tl.load(sum_ptr + b)
        num, low = tl.load(num_ptr + b), _ordered(cut)
        if num <= C:
            low = _thresholds(candidates_ptr + b * C, num, low, top, cold, by_k, top_k, by_p, top_p, total, BLOCK)
        else:
            row_ptr = logits_ptr + b * stride_b
            low = _thresholds(row_ptr, vocab_size, low, top, cold, by_k, top_k, by_p, top_p, total, BLOCK)
        tl.store(floor_ptr + b, tl.maximum(tl.load(floor_ptr + b), _unordered(low)))


def sample(logits_BV: Tensor, rows: SamplingRows, raw_BV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `sampling.sample`."""
    raw = logits_BV if raw_BV is None else raw_BV
    assert logits_BV.stride(1) == 1
    assert raw.stride(1) == 1
    assert raw.shape == logits_BV.shape
    num_rows, num_columns = logits_BV.shape
    num_tiles = -(-num_columns // TILE)
    num_subs = num_tiles * (TILE // SUB)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_BV.device)

    tokens_B, logprobs_B = new(num_rows, dtype=torch.int64), new(num_rows)
    if num_rows == 0:
        return tokens_B, logprobs_B
    tile_max, raw_max, raw_sum, score = new(4, num_rows, num_tiles).unbind()
    ids = new(num_rows, num_tiles, dtype=torch.int32)
    top, total, cut, floor = new(4, num_rows).unbind()
    sub_max, sub_sum = new(2, num_rows, num_subs if rows.filtered else 0).unbind()

    def run_tiles(*, statistics: bool, draw: bool) -> None:
        tiles: Any = _tiles_kernel[(num_tiles, num_rows)]
        tiles(
            logits_BV, raw, rows.temperature, rows.seeds, rows.steps, floor, tile_max, raw_max, raw_sum, sub_max,
            sub_sum, score, ids, logits_BV.stride(0), raw.stride(0), num_columns, rows.vocab_size, num_tiles,
            RAW=raw_BV is not None, STATISTICS=statistics, SUBS=rows.filtered, DRAW=draw, num_warps=4,
        )  # fmt: skip

    run_tiles(statistics=True, draw=not rows.filtered)
    if rows.filtered:
        num = new(num_rows, dtype=torch.int32)
        capacity = min(num_columns, MAX_CANDIDATES)
        candidates = new(num_rows, capacity, dtype=logits_BV.dtype)
        find_cut: Any = _cut_kernel[(num_rows,)]
        find_cut(
            rows.temperature, rows.top_k, rows.top_p, rows.min_p, tile_max, sub_max, sub_sum, top, total, cut, floor,
            num, rows.vocab_size, num_subs, SUBS=triton.next_power_of_2(num_subs), num_warps=4,
        )  # fmt: skip
        gather: Any = _gather_kernel[(num_tiles, num_rows)]
        gather(
            logits_BV, tile_max, cut, num, candidates, logits_BV.stride(0), num_columns, rows.vocab_size, num_tiles,
            capacity, num_warps=4,
        )  # fmt: skip
        select: Any = _select_kernel[(num_rows,)]
        select(
            logits_BV, rows.temperature, rows.top_k, rows.top_p, top, total, cut, floor, num, candidates,
            logits_BV.stride(0), rows.vocab_size, capacity, BLOCK=2048, num_warps=16,
        )  # fmt: skip
        run_tiles(statistics=False, draw=True)
    finish: Any = _finish_kernel[(num_rows,)]
    finish(
        raw, rows.temperature, tile_max, raw_max, raw_sum, score, ids, tokens_B, logprobs_B, raw.stride(0), num_tiles,
        TILES=triton.next_power_of_2(num_tiles), num_warps=1,
    )  # fmt: skip
    return tokens_B, logprobs_B
