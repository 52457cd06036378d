"""The draw: its noise, its distribution, and every implementation against the definitions written out.

The Triton kernels are compared with these references in test_sampling_kernels.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import (
    DEVICE,
    INF,
    MIXED,
    check_counts,
    check_mask,
    random_logits,
    rows_of,
    same_row,
)
from torch import Tensor

from qwench.engine.sampling import draw, filtered_probabilities, penalised
from qwench.ops.dispatch import forced
from qwench.ops.sampling import (
    IN_PROMPT,
    MAX_COUNT,
    REACH,
    SamplingRows,
    add_bias_,
    count_,
    exponential,
    noise_bits,
    penalise,
    sample,
    start_counts_,
    token_logprobs,
    uses_filters,
    wrap_seed,
)
from qwench.types import SamplingParams

# Noise.


def mix(x: int, key: int = 0) -> int:
    """The hash in plain integers."""
    x ^= x >> 17
    x = (x * 0xED5AD4BB + key) % 2**32
    x ^= x >> 11
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ x >> 14


def bits_of(seed: int, step: int, token: int) -> int:
    low, high = seed % 2**32, seed // 2**32 % 2**32
    first = mix(mix(mix((low + 0x9E3779B9) % 2**32) ^ high) ^ step)
    second = mix(mix(mix((step + 0x7F4A7C15) % 2**32) ^ high) ^ low)
    return mix(token ^ first, second)


def test_the_noise_never_changes() -> None:
    """Answers with a seed must come again in later versions, so the function is pinned, by formula and by value."""
    seeds = [0, 1, -1, 42, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    for seed in seeds:
        for step in (0, 1, 32767):
            tokens = torch.tensor([0, 1, 151643, 2**31 - 1])
            got = noise_bits(torch.tensor(seed), torch.tensor(step), tokens)
            assert got.tolist() == [bits_of(seed, step, token) for token in tokens.tolist()]
    assert noise_bits(torch.tensor(0), torch.tensor(0), torch.arange(3)).tolist() == [
        1280770952,
        1067432021,
        1020035559,
    ]


def test_noise_bits_broadcast() -> None:
    seeds, steps, tokens = torch.arange(3)[:, None], torch.arange(5, 8)[:, None], torch.arange(4)
    table = noise_bits(seeds, steps, tokens)
    assert table.shape == (3, 4)
    assert int(table[2, 3]) == bits_of(2, 7, 3)
    assert seeds.flatten().tolist() == [0, 1, 2], "the caller's tensors must stay"
    assert tokens.tolist() == [0, 1, 2, 3]


def test_every_input_bit_changes_every_output_bit_half_of_the_time() -> None:
    generator = torch.Generator().manual_seed(0)
    num = 4096
    seeds = torch.randint(-(2**62), 2**62, (num,), generator=generator)
    steps = torch.randint(0, 2**15, (num,), generator=generator)
    tokens = torch.randint(0, 151936, (num,), generator=generator)
    base = noise_bits(seeds, steps, tokens)
    flips = [(seeds ^ (1 << bit), steps, tokens) for bit in range(63)]
    flips += [(seeds, steps ^ (1 << bit), tokens) for bit in range(15)]
    flips += [(seeds, steps, tokens ^ (1 << bit)) for bit in range(18)]
    rates = torch.stack([bit_rates(base ^ noise_bits(*inputs)) for inputs in flips])
    assert rates.shape == (96, 32)
    assert float((rates - 0.5).abs().max()) < 0.045  # 5.8 standard deviations of one of 3072 rates
    assert float((bit_rates(base) - 0.5).abs().max()) < 0.045


def bit_rates(words: Tensor) -> Tensor:
    """How often each of 32 bits is set."""
    return ((words[:, None] >> torch.arange(32)) & 1).float().mean(0)


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    """Standard deviations by which the chi-squared statistic exceeds its mean."""
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0, "something impossible was drawn"
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    return (statistic - freedom) / (2 * max(freedom, 1)) ** 0.5


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 0, 128), (1, -1, 0)])
def test_neighbours_are_independent(shift: tuple[int, int, int]) -> None:
    """Noise of neighbouring seeds, steps or tokens: 16 x 16 cells of the two values' high bits are equally full."""
    seeds, steps, tokens = torch.arange(64)[:, None, None], torch.arange(1, 33)[:, None], torch.arange(500)
    here = noise_bits(seeds, steps, tokens)
    there = noise_bits(seeds + shift[0], steps + shift[1], tokens + shift[2])
    for bits in (28, 0):  # the four high and the four low bits
        cells = ((here >> bits) & 15) * 16 + ((there >> bits) & 15)
        counts = torch.bincount(cells.flatten(), minlength=256).double()
        assert abs(chi_squared(counts, torch.full((256,), here.numel() / 256).double())) < 4


def test_exponential() -> None:
    bits = noise_bits(torch.tensor(3), torch.tensor(0), torch.arange(400_000))
    e = exponential(bits).double()
    assert float(e.mean()) == pytest.approx(1, abs=0.01)
    assert float(e.var()) == pytest.approx(1, abs=0.03)
    ordered = e.sort().values
    steps = (torch.arange(e.numel()) + 0.5) / e.numel()
    assert float(((1 - (-ordered).exp()) - steps).abs().max()) < 1.95 / e.numel() ** 0.5  # Kolmogorov-Smirnov, 0.1 %
    ends = exponential(torch.tensor([0, 1, 2**32 - 2, 2**32 - 1]))
    assert ends[0] == 2.0**-33
    assert ends[1] == 1.5 * 2.0**-32
    assert bool(ends.isfinite().all())
    assert float(ends.log().max() - ends.log().min()) < REACH, "a token out of reach could win"
    assert bool((exponential(torch.arange(0, 2**32, 2**20)).diff() > 0).all())


# The distribution.

FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.3, top_k=8, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("by", ["seed", "step"])
@pytest.mark.parametrize("params", FILTERS)
def test_draws_follow_the_probabilities(params: SamplingParams, by: str) -> None:
    num, size = 2000, 12
    logits = random_logits(1, (size,), 1.5).bfloat16().float()
    logits[3] = logits[7]
    numbers, fixed = torch.arange(num), torch.full((num,), 11)
    rows = same_row(params, size, *((numbers, fixed) if by == "seed" else (fixed, numbers)))
    with forced({"sample": "reference"}):
        tokens, _ = sample(logits.to(DEVICE).expand(num, size), rows)
    counts = torch.bincount(tokens.cpu(), minlength=size).double()
    assert abs(chi_squared(counts, filtered_probabilities(logits, params) * num)) < 4


@pytest.mark.parametrize("shift", [(1, 0), (0, 1)])
def test_draws_of_neighbouring_seeds_and_steps_are_independent(shift: tuple[int, int]) -> None:
    num, size = 4000, 5
    logits = random_logits(2, (size,), 1.0)
    probs = logits.double().softmax(0)
    seeds, steps = torch.arange(num) % 50, torch.arange(num) // 50
    pairs = []
    for d in (0, 1):
        rows = same_row(SamplingParams(), size, seeds + d * shift[0], steps + d * shift[1])
        with forced({"sample": "reference"}):
            pairs.append(sample(logits.to(DEVICE).expand(num, size), rows)[0].cpu())
    counts = torch.bincount(pairs[0] * size + pairs[1], minlength=size * size).double()
    assert abs(chi_squared(counts, torch.outer(probs, probs).flatten() * num)) < 4


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e-3])
def test_equals_stay_equal_at_any_temperature(temperature: float) -> None:
    """Rounding must not give a tie at 20 to one of the two."""
    num = 1000
    logits = torch.tensor([19.0, 20.0, -3.0, 20.0])
    rows = same_row(SamplingParams(temperature=temperature), 4, torch.arange(num), torch.zeros(num, dtype=torch.int64))
    with forced({"sample": "reference"}):
        tokens, _ = sample(logits.to(DEVICE).expand(num, 4), rows)
    counts = torch.bincount(tokens.cpu(), minlength=4)
    assert counts[0] == counts[2] == 0
    assert abs(int(counts[1]) - num / 2) < 80


# The reference against the definitions.


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 17, 700]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([0.0, 1e-38, 0.3, 1.0, 2.0, 1e9]),
    top_k=st.sampled_from([0, 1, 2, 20, 699, 700, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.7931, 0.5113, 1e-6]),  # no round shares of equally likely tokens
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_the_reference_draws_as_the_oracle_does(
    seed, size, scale, dtype, masked, temperature, top_k, top_p, min_p
) -> None:
    logits = random_logits(seed, (4, size), scale).to(dtype)
    logits[random_logits(seed + 1, (4, size), 1.0) < (0 if masked else -9)] = -INF
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = SamplingRows.of([params] * 4, range(seed, seed + 4), range(4), size, "cpu")
    with forced({"sample": "reference"}):
        tokens, logprobs = sample(logits, rows)
    want = [draw(logits[i].float(), params, seed + i, i) for i in range(4)]
    assert tokens.tolist() == want
    full = logits.float().log_softmax(1)[torch.arange(4), tokens]
    torch.testing.assert_close(logprobs, full, equal_nan=True)


def test_one_large_row_against_the_oracle() -> None:
    """151,936 columns, where the reference sorts no more than it must; flat and peaked."""
    for scale in (0.5, 2.5, 6.0):
        logits = random_logits(0, (1, 151_936), scale)
        for params in (SamplingParams(top_p=0.95), SamplingParams(top_k=20, top_p=0.8), SamplingParams(top_k=3000)):
            for step in range(3):
                rows = SamplingRows.of([params], [5], [step], 151_665, "cpu")
                with forced({"sample": "reference"}):
                    assert sample(logits, rows)[0].tolist() == [draw(logits[0, :151_665], params, 5, step)]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = random_logits(4, (len(MIXED), 300)).to(DEVICE)
    rows = rows_of(MIXED, 290, step=3)
    together = sample(logits, rows)
    for i in range(len(MIXED)):
        one = {field: getattr(rows, field)[i : i + 1] for field in ("temperature", "top_k", "top_p", "min_p")}
        alone = dataclasses.replace(rows, seeds=rows.seeds[i : i + 1], steps=rows.steps[i : i + 1], **one)
        got = sample(logits[i : i + 1], alone)
        assert torch.equal(got[0], together[0][i : i + 1])
        assert torch.equal(got[1], together[1][i : i + 1])


def test_without_filters_they_are_ignored() -> None:
    """`filtered` False is the caller's word that no row uses them."""
    logits = random_logits(5, (6, 300)).to(DEVICE)
    rows = rows_of([SamplingParams(top_k=1, temperature=2)] * 6, 300)
    assert sample(logits, rows)[0].tolist() == logits.argmax(1).tolist()
    free = sample(logits, dataclasses.replace(rows, filtered=False))[0]
    assert torch.equal(free, sample(logits, rows_of([SamplingParams(temperature=2)] * 6, 300))[0])
    assert free.tolist() != logits.argmax(1).tolist()


def test_rows_of_parameters() -> None:
    rows = SamplingRows.of([SamplingParams(), SamplingParams(top_k=2**40)], [2**64 - 1, -5], [0, 9], 100, "cpu")
    assert rows.top_k.tolist() == [0, 2**31 - 1]
    assert rows.seeds.tolist() == [-1, -5]
    assert rows.filtered
    assert not SamplingRows.of(
        [SamplingParams(), SamplingParams(temperature=0, top_k=3)], [0, 1], [0, 0], 9, "cpu"
    ).filtered
    assert [uses_filters(p) for p in (SamplingParams(top_p=0.9), SamplingParams(min_p=0.1), SamplingParams())] == [
        1,
        1,
        0,
    ]
    assert [wrap_seed(s) for s in (0, -1, 2**63, 2**64 + 3, -(2**63) - 1)] == [0, -1, -(2**63), 3, 2**63 - 1]


# Before the draw.


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 39), max_size=20),
    answer=st.lists(st.integers(0, 39), max_size=40),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.1]),
)
def test_penalties_are_those_of_the_oracle(seed, prompt, answer, repetition, presence, frequency) -> None:
    """Counted one by one as the engine does, or all at once as after a preemption."""
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 1.5}
    )
    logits = random_logits(seed, (2, 40))
    stepwise, at_once = torch.full((3, 40), 77, dtype=torch.int16), torch.full((3, 40), 77, dtype=torch.int16)
    nothing = torch.tensor([], dtype=torch.int64)
    start_counts_(stepwise, 2, torch.tensor(prompt, dtype=torch.int64), nothing)
    for token in answer:
        count_(stepwise, torch.tensor([2]), torch.tensor([token]))
    start_counts_(at_once, 2, torch.tensor(prompt, dtype=torch.int64), torch.tensor(answer, dtype=torch.int64))
    assert torch.equal(stepwise, at_once)
    assert bool((at_once[:2] == 77).all())
    start_counts_(at_once, 0, nothing, nothing)
    numbers = [torch.tensor([x, off]) for x, off in ((repetition, 1.0), (presence, 0.0), (frequency, 0.0))]
    before = logits.clone()
    got = penalise(logits, at_once, torch.tensor([2, 0]), *numbers)
    assert torch.equal(logits, before)
    add_bias_(got, torch.tensor([0, 1]), torch.tensor([3, 0]), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(got[0], penalised(logits[0], prompt, answer, params))
    assert torch.equal(got[1], logits[1])
    out = penalise(logits, at_once, torch.tensor([2, 0]), *numbers, out_BV=logits)
    assert out is logits
    add_bias_(logits, torch.tensor([0]), torch.tensor([3]), torch.tensor([1.5]))
    assert torch.equal(logits, got)


def test_counts() -> None:
    with forced({"count": "reference"}):
        check_counts()
    counts = torch.zeros((1, 4), dtype=torch.int16)
    start_counts_(counts, 0, torch.tensor([1, 1, 2]), torch.tensor([2] * 40_000 + [3]))
    assert counts.tolist() == [[0, IN_PROMPT, IN_PROMPT + MAX_COUNT, 1]]


@pytest.mark.parametrize("size", [32, 100, 3001])
def test_mask(size: int) -> None:
    with forced({"mask": "reference"}):
        check_mask(size)


def test_token_logprobs() -> None:
    logits = random_logits(3, (4, 50)).bfloat16()
    got = token_logprobs(logits, torch.tensor([0, 49, 7, 7]))
    want = logits.double().log_softmax(1)[torch.arange(4), torch.tensor([0, 49, 7, 7])]
    torch.testing.assert_close(got, want.float())
