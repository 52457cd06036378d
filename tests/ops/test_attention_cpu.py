"""Decoding steps on a CPU against the reference attention, over scattered blocks among foreign, poisoned numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.ops import attention_cpu
from qwench.ops.attention import AttnMeta, KVCache, attention
from qwench.ops.dispatch import forced

BLOCK = 4
HEADS, KV_HEADS, SIZE = 6, 2, 16


def paged(lens_q: list[int], lens_k: list[int], *, neighbours: bool = False) -> tuple[KVCache, AttnMeta]:
    """A cache whose every position that no sequence owns is NaN, and the metadata of one pass over it."""
    generator = torch.Generator().manual_seed(sum(lens_k))
    widths = [-(-n // BLOCK) for n in lens_k]
    num_blocks = sum(widths) + 2
    order = torch.arange(num_blocks) if neighbours else torch.randperm(num_blocks, generator=generator)
    table = torch.full((len(lens_k), max(widths)), int(order[-1]), dtype=torch.int32)
    keys = torch.full((num_blocks, BLOCK, KV_HEADS, SIZE), float("nan"))
    values = keys.clone()
    used = 0
    for row, (num_keys, width) in enumerate(zip(lens_k, widths, strict=True)):
        blocks = order[used : used + width]
        used += width
        table[row, :width] = blocks.int()
        for pages in (keys, values):
            own = torch.full((width * BLOCK, KV_HEADS, SIZE), float("nan"))
            own[:num_keys] = torch.randn(num_keys, KV_HEADS, SIZE, generator=generator)
            pages[blocks] = own.unflatten(0, (width, BLOCK))
    cu_q = torch.tensor([0, *lens_q]).cumsum(0).int()
    meta = AttnMeta(
        cu_q=cu_q, max_q=max(lens_q), lens_k=torch.tensor(lens_k, dtype=torch.int32), max_k=max(lens_k),
        block_table=table, num_decodes=next((i for i, n in enumerate(lens_q) if n > 1), len(lens_q)),
    )  # fmt: skip
    return (keys, values), meta


def both(cache: KVCache, meta: AttnMeta, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_tokens = int(meta.cu_q[-1])
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(num_tokens, HEADS, SIZE, generator=generator).to(dtype)
    new = torch.zeros(num_tokens, KV_HEADS, SIZE, dtype=dtype)  # already in the cache
    answers = []
    for name in ("short", "reference"):
        with forced({"attention": name}):
            answers.append(attention(q, new, new, meta, cache, window))
    return answers[0], answers[1]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "lens_k",
    [[1], [4], [13], [9, 9, 9], [1, 30, 17, 8], [3, 300, 129, 5, 128, 700]],
    ids=["one", "block", "several-blocks", "equal", "unequal", "buckets"],
)
@pytest.mark.parametrize("neighbours", [False, True])
def test_single_queries(lens_k: list[int], window: int | None, neighbours: bool) -> None:
    cache, meta = paged([1] * len(lens_k), lens_k, neighbours=neighbours)
    got, want = both(cache, meta, window, torch.float32)
    assert not want.isnan().any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prompts_after_decoding_rows() -> None:
    cache, meta = paged([1, 1, 6, 3], [20, 7, 6, 12])
    got, want = both(cache, meta, None, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bf16_and_an_fp8_cache() -> None:
    cache, meta = paged([1, 1], [40, 23])
    half = (cache[0].bfloat16(), cache[1].bfloat16())
    got, want = both(half, meta, None, torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    bytes_ = (cache[0].to(torch.float8_e4m3fn), cache[1].to(torch.float8_e4m3fn))
    widened = (bytes_[0].float(), bytes_[1].float())
    q = torch.randn(2, HEADS, SIZE)
    assert meta.lens_k is not None
    assert meta.block_table is not None
    got = attention_cpu.decode(q, *bytes_, meta.lens_k, meta.block_table, None)
    want = attention_cpu.decode(q, *widened, meta.lens_k, meta.block_table, None)
    assert torch.equal(got, want)


def test_neighbouring_blocks_are_not_copied() -> None:
    pages = torch.randn(6, BLOCK, KV_HEADS, SIZE)
    view = attention_cpu._pages(pages, torch.tensor([[2, 3, 4]], dtype=torch.int32))
    assert view.data_ptr() == pages[2].data_ptr()
    copy = attention_cpu._pages(pages, torch.tensor([[2, 4, 3]], dtype=torch.int32))
    assert torch.equal(copy[0, BLOCK:], pages[[4, 3]].flatten(0, 1))
