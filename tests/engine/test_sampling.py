"""The plain sampler against transformers' own logits processors, and its draws against its probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwench.engine.sampling import draw, filtered_probabilities, kept_tokens, penalised, pick_seed
from qwench.types import SamplingParams

INF = float("inf")


def logits_of(seed: int, size: int, scale: float) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 17, 500]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.floats(0.05, 3),
    top_k=st.sampled_from([0, 1, 2, 20, 499, 500, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.8, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_are_those_of_transformers(seed, size, scale, temperature, top_k, top_p, min_p) -> None:
    logits = logits_of(seed, size, scale)
    scores = logits[None].double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    want = scores[0].softmax(-1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filtered_probabilities(logits, params)
    assert float(got.sum()) == pytest.approx(1)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    penalty=st.floats(0.3, 3),
    prompt=st.lists(st.integers(0, 49), max_size=30),
    answer=st.lists(st.integers(0, 49), max_size=30),
)
def test_repetition_penalty_is_that_of_transformers(seed, penalty, prompt, answer) -> None:
    logits = logits_of(seed, 50, 3.0)
    before = logits.clone()
    got = penalised(logits, prompt, answer, SamplingParams(repetition_penalty=penalty))
    seen = prompt + answer
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0] if seen else logits
    torch.testing.assert_close(got, want)
    assert torch.equal(logits, before), "the caller's logits must stay"


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(logits, [0, 1, 1], [1, 3, 1, 1], params).tolist() == [1.0, -0.25, 1.0, -1.75]
    rewarded = penalised(logits, [], [2], SamplingParams(presence_penalty=-1, frequency_penalty=-0.5))
    assert rewarded.tolist() == [1.0, 1.0, 2.5, -1.0]


def test_the_order_of_penalties_and_bias() -> None:
    """The repetition penalty sees the logit before the others have changed it."""
    params = SamplingParams(repetition_penalty=2, presence_penalty=3, frequency_penalty=1, logit_bias={0: 10, 1: -INF})
    assert penalised(torch.tensor([4.0, 4.0, -4.0]), [2], [0, 0], params).tolist() == [4 / 2 - 3 - 2 + 10, -INF, -8.0]


def test_ids_without_a_logit() -> None:
    """Rows of the model beyond the tokenizer may stand in a prompt."""
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    assert penalised(torch.tensor([1.0, -1.0]), [1, 7], [], params).tolist() == [1.0, -2.0]
    assert penalised(torch.tensor([1.0, -1.0]), [7], [7, 1], params).tolist() == [1.0, -3.0]


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert filtered_probabilities(logits, SamplingParams(top_p=0.49)).tolist() == [1, 0, 0]
    kept = filtered_probabilities(logits, SamplingParams(top_p=0.51))
    torch.testing.assert_close(kept.float(), torch.tensor([0.625, 0.375, 0.0]))
    assert filtered_probabilities(logits, SamplingParams(top_p=1e-9)).tolist() == [1, 0, 0]


def test_equals_at_the_edge_all_stay() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    assert kept_tokens(logits, SamplingParams(top_k=2)).tolist() == [False, True, True, True, False, True]
    assert kept_tokens(logits, SamplingParams(top_k=4)).tolist() == [False, True, True, True, False, True]
    assert kept_tokens(logits, SamplingParams(top_k=5)).tolist() == [True, True, True, True, False, True]
    first = float(logits.softmax(0)[1])
    assert kept_tokens(logits, SamplingParams(top_p=first + 1e-3)).tolist() == [False, True, True, True, False, True]
    assert kept_tokens(torch.zeros(4), SamplingParams(top_p=0.1, top_k=1)).all()


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept_tokens(logits, SamplingParams(top_p=0.6)).tolist() == [True, True, False, False]
    assert kept_tokens(logits, SamplingParams(top_k=2, top_p=0.5)).tolist() == [True, False, False, False]
    assert kept_tokens(logits, SamplingParams(top_k=2, top_p=0.6)).tolist() == [True, True, False, False]


def test_masked_tokens_are_never_kept() -> None:
    logits = torch.tensor([-INF, 0.0, -INF, 1.0])
    for params in (
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.999),
        SamplingParams(temperature=9),
    ):
        assert kept_tokens(logits, params).tolist() == [False, True, False, True]
    assert {draw(logits, SamplingParams(temperature=50), seed, 0) for seed in range(50)} == {1, 3}
    assert draw(torch.full((3,), -INF), SamplingParams(), 0, 0) == 0


def test_extreme_temperatures() -> None:
    logits = torch.tensor([3.0, 100.0, 99.0])
    cold = filtered_probabilities(logits, SamplingParams(temperature=1e-38))
    assert cold.tolist() == [0, 1, 0]
    hot = filtered_probabilities(logits, SamplingParams(temperature=1e9))
    torch.testing.assert_close(hot.float(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_k=6, top_p=0.9),
        SamplingParams(temperature=2, min_p=0.1),
    ],
)
@pytest.mark.parametrize("by", ["seed", "step"])
def test_draws_follow_the_probabilities(params: SamplingParams, by: str) -> None:
    logits, num = logits_of(1, 12, 1.5), 3000
    want = filtered_probabilities(logits, params) * num
    counts = torch.zeros(12)
    for number in range(num):
        counts[draw(logits, params, *((number, 5) if by == "seed" else (5, number)))] += 1
    assert (counts[want == 0] == 0).all()
    chi_squared = float(((counts - want)[want > 0] ** 2 / want[want > 0]).sum())
    freedom = int((want > 0).sum()) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert draw(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(temperature=0), 1, 1) == 1
    assert draw(torch.tensor([0.0, 1.9, 2.0]), SamplingParams(temperature=0, top_k=1, top_p=0.1), 1, 1) == 2


def test_seeds() -> None:
    assert [pick_seed(seed) for seed in (0, -3, 2**64 + 1, 2**63)] == [0, -3, 1, -(2**63)]
    fresh = {pick_seed(None) for _ in range(100)}
    assert len(fresh) == 100
    assert all(0 <= seed < 2**63 for seed in fresh)
