"""AdamW with bf16 states: equal to torch's with fp32 states, and it learns as well."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import linear_cross_entropy
from qwench.ops.triton_launch import runs_triton
from qwench.train.adamw import AdamWHalfStates, next_states
from qwench.train.adamw_8bit import RUN, AdamW8bit, decode, encode, seed_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)


def groups(model: nn.Module) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train(model: CausalLM, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Learn a fixed sequence of 256 tokens; the loss in nats a token after every step."""
    tokens = torch.randint(model.config.vocab_size, (257,), generator=torch.Generator().manual_seed(1))
    meta, losses = AttnMeta.packed([64] * 4), []
    positions = torch.arange(64).repeat(4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        hidden = model(tokens[:-1], positions, meta)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens[1:], torch.full((256,), 1 / 256))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_fp32_states_equal_torch(tiny_config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    ours, torchs = make_model(tiny_config, std=0.02), make_model(tiny_config, std=0.02)
    train(ours, AdamWHalfStates(groups(ours), 1e-3, state_dtype=torch.float32), 5)
    train(torchs, torch.optim.AdamW(groups(torchs), 1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True), 5)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def losses_in_fp32(tiny_config: ModelConfig, make_model: Callable[..., CausalLM]) -> list[float]:
    """Of 200 steps with torch's AdamW."""
    model = make_model(tiny_config, std=0.02)
    losses = train(model, torch.optim.AdamW(groups(model), 1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True), 200)
    assert losses[0] > 5.5
    assert losses[-1] < 1.0
    return losses


def test_bf16_states_learn_as_well(
    tiny_config: ModelConfig, make_model: Callable[..., CausalLM], losses_in_fp32: list[float]
) -> None:
    """The loss falls from ln 512 to little, and with bf16 states it is within some per cent of fp32's on the way."""
    half, want = make_model(tiny_config, std=0.02), losses_in_fp32
    optimizer = AdamWHalfStates(groups(half), 1e-3)
    got = train(half, optimizer, 200)
    for step in (50, 100, 150, 199):
        assert got[step] == pytest.approx(want[step], rel=0.05)
    state = optimizer.state[half.lm_head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert half.lm_head.weight.dtype == torch.float32


def test_states_that_would_stand_still_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 0\.98"):
        AdamWHalfStates([nn.Parameter(torch.zeros(2))], 1e-3, betas=(0.9, 0.999))


# -------------------------------------------------------------------------------------------------------------- 8 bits
def spread(num: int, seed: int = 0) -> torch.Tensor:
    """Values of magnitudes between 1e-12 and 10, some zero, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, generator=generator) * 10 ** (torch.rand(num, generator=generator) * 13 - 12)
    return torch.where(torch.rand(num, generator=generator) < 0.05, 0.0, values)


@pytest.mark.parametrize("num", [1, RUN, 5 * RUN + 3])
@pytest.mark.parametrize("seed", [None, 7])
def test_8_bits_survive_a_checkpoint(num: int, seed: int | None) -> None:
    """Values go through bf16, and as squares, and come back as the same codes."""
    values = torch.randn(num, generator=torch.Generator().manual_seed(num)) * 1e-4
    codes, exponents = encode(values, seed)
    assert (codes.shape, exponents.shape) == ((num,), (-(-num // RUN),))
    kept = decode(codes, exponents)
    assert torch.equal(kept.bfloat16().float(), kept)
    again = encode(kept, None)
    assert torch.equal(decode(*again), kept)
    roots = decode(*encode(values.abs(), seed, never_zero=True))
    assert torch.equal(roots.square().bfloat16().float().sqrt(), roots)
    assert torch.equal(decode(*encode(roots, None, never_zero=True)), roots)


def test_8_bits_keep_a_sixteenth_or_an_eighth() -> None:
    """To nearest within 1/16 of a value, stochastically within 1/8, for all within 2^13 of the largest of 128."""
    values = spread(4096)
    near = values.abs() > values.abs().view(-1, RUN).amax(1).repeat_interleave(RUN) * 2.0**-13
    assert near.float().mean() > 0.2
    for seed, share in ((None, 1 / 16), (3, 1 / 8)):
        off = (decode(*encode(values, seed)) - values).abs() / values.abs()
        assert float(off[near].max()) <= share * 1.001
    assert not decode(*encode(torch.zeros(300), 1)).any()
    assert bool((decode(*encode(values.abs(), 5, never_zero=True))[values != 0] > 0).all())


def test_rounding_in_8_bits_has_no_drift() -> None:
    """The mean over 2,000 seeds is the value, and different parameters and steps round differently."""
    values = spread(RUN, seed=4)
    values[0] = 200.0  # fixes the scale; the largest itself is cut at 240
    values[1:] = values[1:].sign() * values[1:].abs().clamp(0.02, 100)
    seeds = [seed_of(step, number) for step in range(500) for number in range(4)]
    assert len(set(seeds)) == len(seeds)
    rounded = torch.stack([decode(*encode(values, seed)) for seed in seeds])
    off = (rounded.mean(0) - values).abs() / values.abs().clamp(min=1e-9)
    assert float(off[1:].max()) < 0.012, "an eighth / sqrt(12 * 2000) is 0.0008, and four times that for the smallest"
    assert len({tuple(row.tolist()) for row in rounded}) == len(seeds)


def test_8_bit_states_learn_as_well(
    tiny_config: ModelConfig, make_model: Callable[..., CausalLM], losses_in_fp32: list[float]
) -> None:
    small, want = make_model(tiny_config, std=0.02), losses_in_fp32
    optimizer = AdamW8bit(groups(small), 1e-3)
    got = train(small, optimizer, 200)
    for step in (50, 100, 150, 199):
        assert got[step] == pytest.approx(want[step], rel=0.06)
    state = optimizer.state[small.lm_head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    readable = optimizer.readable(small.lm_head.weight)
    assert readable["exp_avg_sq"].dtype == torch.bfloat16
    assert readable["exp_avg_sq"].shape == small.lm_head.weight.shape


# ---------------------------------------------------------------------------------------------------------- the kernel
@pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
@pytest.mark.parametrize("state", [torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])])
def test_one_launch_for_all(state: torch.dtype) -> None:
    """Tensors of several sizes, empty, not aligned, longer than a chunk, each with numbers of its own."""
    from qwench.train.adamw_triton import CHUNK, adamw_

    generator = torch.Generator().manual_seed(0)
    sizes = [1, 0, CHUNK - 1, CHUNK, 3 * CHUNK + 17, 64]
    tensors, numbers = [], []
    for index, size in enumerate(sizes):
        first = index % 2  # every second one begins 4 bytes after a multiple of 16
        four = [torch.randn(size + first, generator=generator)[first:].to(DEVICE) for _ in range(4)]
        tensors.append((four[0], four[1], four[2].to(state), four[3].abs().to(state)))
        numbers.append((0.1 * (index + 1), 0.5 + 0.05 * index, 0.99 - 0.01 * index))
    want = [tuple(x.clone() for x in four) for four in tensors]
    for (p, grad, mean, square), its_numbers in zip(want, numbers, strict=True):
        new = next_states(p, grad * 0.5, mean.float(), square.float(), *its_numbers, 0.9, 0.95, 1e-8)
        mean.copy_(new[0])
        square.copy_(new[1])
    adamw_(tensors, numbers, 0.9, 0.95, 1e-8, skip=torch.ones((), device=DEVICE))
    adamw_(tensors, numbers, 0.9, 0.95, 1e-8, factor=torch.full((), 0.5, device=DEVICE))
    for got_four, want_four in zip(tensors, want, strict=True):
        for got, wanted in zip(got_four, want_four, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
def test_one_launch_is_the_optimiser() -> None:
    ours = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5)).to(DEVICE)
    torchs = copy.deepcopy(ours)
    theirs = torch.optim.AdamW(groups(torchs), 1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    mine = AdamWHalfStates(groups(ours), 1e-3, state_dtype=torch.float32)
    for step in range(2):
        for seed, (a, b) in enumerate(zip(ours.parameters(), torchs.parameters(), strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(100 * step + seed)).to(DEVICE)
            b.grad = a.grad.clone()
        mine.step()
        theirs.step()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
def test_one_launch_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as without a kernel, and the same codes but where a product was rounded otherwise."""
    from qwench.train.adamw_triton import CHUNK

    def steps(device: torch.device) -> tuple[list[nn.Parameter], AdamW8bit]:
        """Three, the second of which is skipped."""
        generator = torch.Generator().manual_seed(0)
        mine = [nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in sizes]
        optimizer = AdamW8bit(mine, 0.01, weight_decay=0.1)
        for step in range(3):
            for parameter in mine:
                parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(device)
            optimizer.found_inf = torch.full((), float(step == 1), device=device)
            optimizer.grad_scale = torch.full((), 2.0, device=device)
            optimizer.step()
            if step == 1:
                optimizer.uncount()
        return mine, optimizer

    sizes = [1, 0, CHUNK - 1, CHUNK, 2 * CHUNK + 130, 64]
    got, ours = steps(DEVICE)
    monkeypatch.setattr("qwench.train.adamw_8bit.runs_triton", lambda device: False)
    want, plain = steps(torch.device("cpu"))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left.cpu(), right, rtol=1e-4, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            codes = ours.state[left][name].cpu()
            differ = int((codes != plain.state[right][name]).sum())
            assert differ <= 2 + codes.numel() // 500, f"{differ} of {codes.numel()} codes of {name}"
