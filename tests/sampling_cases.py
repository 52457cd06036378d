"""Settings and checks that the tests of the sampling operations share: its reference and its kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwench.ops.sampling import (
    IN_PROMPT,
    MAX_COUNT,
    SamplingRows,
    count_,
    mask_,
)
from qwench.ops.triton_launch import interpreted, runs_triton
from qwench.types import SamplingParams

INF = float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
kernels = pytest.mark.skipif(not runs_triton(DEVICE), reason="no GPU, and not in Triton's interpreter")

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=3, top_p=0.99),
    SamplingParams(temperature=1e-38),
    SamplingParams(top_k=1),
    SamplingParams(temperature=1e9, top_k=500, top_p=0.5),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_k=10**6, min_p=1),
    SamplingParams(temperature=0, top_k=3, top_p=0.1),
]
PLAIN = [SamplingParams(temperature=temperature) for temperature in (0, 0.5, 1, 1.7, 1e-38, 1e9, 1e38)]


def random_logits(seed: int, shape: tuple[int, ...], scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows_of(params: Sequence[SamplingParams], vocab_size: int, seed: int = 0, step: int = 0) -> SamplingRows:
    return SamplingRows.of(params, range(seed, seed + len(params)), [step] * len(params), vocab_size, DEVICE)


def same_row(params: SamplingParams, vocab_size: int, seeds: Tensor, steps: Tensor) -> SamplingRows:
    """Many draws with the same parameters."""
    rows = SamplingRows.of([params], [0], [0], vocab_size, DEVICE)
    wide = {
        name: getattr(rows, name).expand(seeds.numel()).contiguous()
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    return dataclasses.replace(rows, seeds=seeds.to(DEVICE), steps=steps.to(DEVICE), **wide)


def counting(slots: list[int], tokens: list[int], start: Tensor) -> Tensor:
    counts = start.clone().to(DEVICE)
    count_(counts, *torch.tensor([slots, tokens], dtype=torch.int64, device=DEVICE))
    return counts.cpu()


def check_counts() -> None:
    start = torch.zeros((3, 6), dtype=torch.int16)
    start[1, 2], start[1, 3], start[1, 5] = IN_PROMPT, MAX_COUNT, IN_PROMPT + MAX_COUNT
    got = counting([1, 1, 1, 1, 0, 0, 2, 2], [2, 2, 3, 5, 0, 0, 4, 5], start)
    want = start.clone()
    want[1, 2], want[0, 0], want[2, 4], want[2, 5] = IN_PROMPT + 2, 2, 1, 1
    assert torch.equal(got, want)
    assert torch.equal(counting([], [], start), start)


def check_mask(size: int) -> None:
    allowed = random_logits(8, (3, 32 * -(-size // 32))) > 0
    words = (allowed.view(3, -1, 32).long() << torch.arange(32)).sum(-1)
    mask = torch.where(words >= 2**31, words - 2**32, words).int()
    mask[2] = -1
    logits = random_logits(9, (3, size)).to(DEVICE)
    want = logits.cpu().clone()
    want[:2][~allowed[:2, :size]] = -INF
    mask_(logits, mask.to(DEVICE))
    assert torch.equal(logits.cpu(), want)
