"""Paged attention in Triton against the reference: decoding with rotation and cache write, drafts, splits, windows.

The kernels run on a GPU, or in Triton's interpreter (tests/test_interpreted_kernels.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.ops import linear  # noqa: F401  (registers the operation that batch invariance forces)
from qwench.ops.attention import AttnMeta, KVCache, attention
from qwench.ops.dispatch import batch_invariant_kernels, forced
from qwench.ops.rope import Rope, inverse_frequencies
from qwench.ops.triton_launch import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if DEVICE.type == "cuda" else (torch.float32, 2e-6)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")

SHAPES = [(4, 2, 32), (14, 2, 64), (4, 1, 32)]
"""Query heads, key heads, head size."""


class Pages:
    """A cache whose unwritten places are NaN, so that a read of them shows."""

    def __init__(self, lens: list[int], new: int, shape: tuple[int, int, int], block: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        _, kv_heads, size = shape
        counts = [-(-length // block) for length in lens]
        order = torch.randperm(sum(counts), generator=generator) + 1
        self.table = torch.zeros(len(lens), max(counts) + 3, dtype=torch.int32)
        pages = torch.full((2, sum(counts) + 1, block, kv_heads, size), float("nan"))
        slots, at = [], 0
        for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
            self.table[row, :count] = order[at : at + count].int()
            at += count
            places = torch.arange(length)
            flat = self.table[row].long()[places // block] * block + places % block
            old = flat[: length - new]
            pages.flatten(1, 2)[:, old] = torch.randn(2, len(old), kv_heads, size, generator=generator)
            slots.append(flat[length - new :])
        self.pages, self.table = pages.to(DEVICE, DTYPE), self.table.to(DEVICE)
        self.slots = torch.cat(slots).to(DEVICE)

    def cache(self) -> KVCache:
        keys, values = self.pages.clone()
        return keys, values


def equal(got: Tensor, want: Tensor) -> None:
    assert not got.isnan().any()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert float(error) < TOLERANCE


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("splits", "window", "block", "whole_blocks"),
    [(1, None, 16, False), (4, None, 16, False), (16, 20, 16, False), (1, None, 32, True), (4, None, 16, True)],
)
def test_decode(
    shape: tuple[int, int, int],
    block: int,
    window: int | None,
    splits: int,
    whole_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rotation, cache write and attention in one kernel = the reference of each, one after the other."""
    from qwench.ops import attention_triton

    tile = attention_triton.Tile(
        keys=64, num_warps=4, num_stages=2, min_keys=64, splits=splits, whole_blocks=whole_blocks
    )
    monkeypatch.setattr(attention_triton, "tile_for", lambda num_units, head_size: tile)
    heads, kv_heads, size = shape
    lens = [1, 7, 70, 65, 400]
    pages = Pages(lens, 1, shape, block)
    torch.manual_seed(1)
    qkv = torch.randn(len(lens), (heads + 2 * kv_heads) * size).to(DEVICE, DTYPE).unflatten(-1, (-1, size))
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    lens_k = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    meta = AttnMeta(
        cu_q=torch.arange(len(lens) + 1, dtype=torch.int32, device=DEVICE), max_q=1, lens_k=lens_k, max_k=max(lens),
        block_table=pages.table, slots=pages.slots, num_decodes=len(lens),
    )  # fmt: skip
    rope = Rope(lens_k.long() - 1, inverse_frequencies(1e4, size, DEVICE), None)
    with torch.no_grad():
        wanted = pages.cache()
        with forced({"attention": "reference", "rope_and_store": "reference"}):
            want = attention(q, k, v, meta, wanted, window, rope)
        cache = pages.cache()
        got = attention_triton.decode_attention(q, k, v, rope, meta, cache, window)
        equal(got, want)
        for mine, theirs in zip(cache, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=2e-2, atol=TOLERANCE)
        again = attention_triton.decode_attention(q, k, v, rope, meta, pages.cache(), window)
        assert torch.equal(got, again), "the counters were not left at zero"


@needs_kernels
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_several_queries(
    shape: tuple[int, int, int], window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwench.ops import attention_triton

    tile = attention_triton.Tile(keys=64, num_warps=4, num_stages=2, min_keys=64, splits=splits)
    monkeypatch.setattr(attention_triton, "tile_for", lambda num_units, head_size: tile)
    heads, kv_heads, size = shape
    lens, counts = [9, 70, 300], [3, 1, 5]
    cache = Pages(lens, 0, shape).cache()
    table = Pages(lens, 0, shape).table
    torch.manual_seed(1)
    q = torch.randn(sum(counts), heads, size).to(DEVICE, DTYPE)
    unused = q[:, :kv_heads]
    meta = AttnMeta(
        cu_q=torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=DEVICE), max_q=5,
        lens_k=torch.tensor(lens, dtype=torch.int32, device=DEVICE), max_k=max(lens), block_table=table,
    )  # fmt: skip
    with forced({"attention": "reference"}):
        want = attention(q, unused, unused, meta, cache, window)
    equal(attention_triton.paged_attention(q, meta, cache, window, 5), want)


@needs_kernels
def test_invariant_rows_depend_on_themselves_alone() -> None:
    """A sequence's bits, alone and among others."""
    from qwench.ops.attention_triton import decode_attention

    shape = (4, 2, 32)
    lens = [5, 300, 70]
    pages = Pages(lens, 1, shape)
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 8, 32).to(DEVICE, DTYPE).split((4, 2, 2), 1)
    results = []
    for rows in ([0, 1, 2], [1]):
        lens_k = torch.tensor([lens[row] for row in rows], dtype=torch.int32, device=DEVICE)
        meta = AttnMeta(
            cu_q=torch.arange(len(rows) + 1, dtype=torch.int32, device=DEVICE), max_q=1, lens_k=lens_k, max_k=300,
            block_table=pages.table[rows], slots=pages.slots[rows], num_decodes=len(rows),
        )  # fmt: skip
        rope = Rope(lens_k.long() - 1, inverse_frequencies(1e4, 32, DEVICE), None)
        with batch_invariant_kernels():
            results.append(decode_attention(q[rows], k[rows], v[rows], rope, meta, pages.cache(), None))
    assert torch.equal(results[0][1], results[1][0])
