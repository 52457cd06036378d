"""Sampling against transformers' own logits processors, and the draws against the probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwench.engine.sampling import filtered_probabilities, penalised, sample
from qwench.types import SamplingParams


def logits_of(seed: int, size: int, scale: float) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 17, 500]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.floats(0.05, 3),
    top_k=st.sampled_from([0, 1, 2, 20, 499, 500, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.8, 0.5, 0.01]),
)
def test_filters_are_those_of_transformers(seed, size, scale, temperature, top_k, top_p) -> None:
    logits = logits_of(seed, size, scale)
    scores = logits[None].clone()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    want = scores[0].softmax(-1)
    got = filtered_probabilities(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)
    different = (got > 0) != (want > 0)
    # transformers adds the small probabilities first, this code the large ones: a token whose place is on the border
    # within rounding may fall to either side.
    assert int(different.sum()) <= 1
    if different.any():
        ordered = (logits / temperature).softmax(-1).sort(descending=True).values if not top_k else want
        assert float(ordered.min()) < 1e-3
        return
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    penalty=st.floats(0.3, 3),
    seen=st.lists(st.integers(0, 49), max_size=30),
)
def test_penalty_is_that_of_transformers(seed, penalty, seen) -> None:
    logits = logits_of(seed, 50, 3.0)
    before = logits.clone()
    got = penalised(logits, seen, penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    want = processor(torch.tensor([seen]), logits[None].clone())[0] if seen else logits
    torch.testing.assert_close(got, want)
    assert torch.equal(logits, before), "the caller's logits must stay"


def test_penalty_ignores_ids_without_a_logit() -> None:
    """Rows of the model beyond the tokenizer may stand in a prompt."""
    logits = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(penalised(logits, [1, 7], 2.0), torch.tensor([1.0, -2.0]))
    assert torch.equal(penalised(logits, [7], 2.0), logits)


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert filtered_probabilities(logits, SamplingParams(top_p=0.5)).tolist() == [1, 0, 0]
    kept = filtered_probabilities(logits, SamplingParams(top_p=0.51))
    torch.testing.assert_close(kept, torch.tensor([0.625, 0.375, 0.0]))
    assert filtered_probabilities(logits, SamplingParams(top_p=1e-9)).tolist() == [1, 0, 0]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([3.0, 100.0, 99.0])
    cold = filtered_probabilities(logits, SamplingParams(temperature=1e-38))
    assert cold.tolist() == [0, 1, 0]
    hot = filtered_probabilities(logits, SamplingParams(temperature=1e9))
    torch.testing.assert_close(hot, torch.full((3,), 1 / 3))


def test_draws_follow_the_probabilities() -> None:
    logits = logits_of(1, 12, 1.5)
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.9)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[sample(logits, [], params, generator)] += 1
    want = filtered_probabilities(logits, params) * draws
    assert (counts[want == 0] == 0).all()
    chi_squared = float(((counts - want)[want > 0] ** 2 / want[want > 0]).sum())
    assert chi_squared < 25  # at most 5 degrees of freedom: one seed in 7000 would exceed it


def test_greedy_takes_the_lowest_of_equals() -> None:
    generator = torch.Generator()
    assert sample(torch.tensor([0.0, 2.0, 2.0]), [], SamplingParams(temperature=0), generator) == 1
    assert (
        sample(torch.tensor([0.0, 2.0, 1.9]), [1], SamplingParams(temperature=0, repetition_penalty=2), generator) == 2
    )
