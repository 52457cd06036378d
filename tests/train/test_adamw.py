"""AdamW with bf16 states: equal to torch's with fp32 states, and it learns as well."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import linear_cross_entropy
from qwench.ops.triton_launch import runs_triton
from qwench.train.adamw import AdamWHalfStates, _update

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


def test_bf16_states_learn_as_well(tiny_config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """The loss falls from ln 512 to little, and with bf16 states it is within some per cent of fp32's on the way."""
    half, full = make_model(tiny_config, std=0.02), make_model(tiny_config, std=0.02)
    optimizer = AdamWHalfStates(groups(half), 1e-3)
    got = train(half, optimizer, 200)
    want = train(full, torch.optim.AdamW(groups(full), 1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True), 200)
    assert want[0] > 5.5
    assert want[-1] < 1.0
    for step in (50, 100, 150, 199):
        assert got[step] == pytest.approx(want[step], rel=0.05)
    state = optimizer.state[half.lm_head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert half.lm_head.weight.dtype == torch.float32


def test_states_that_would_stand_still_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 0\.98"):
        AdamWHalfStates([nn.Parameter(torch.zeros(2))], 1e-3, betas=(0.9, 0.999))


# ---------------------------------------------------------------------------------------------------------- the kernel
def test_kernel_in_the_interpreter() -> None:
    """In a process of its own; in fp32, since the interpreter cuts bf16 instead of rounding."""
    if KERNELS or importlib.util.find_spec("triton") is None:
        pytest.skip("the kernel runs in this process, or Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "one_launch"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.startswith(".."), "both have run"


@pytest.mark.skipif(not KERNELS, reason="no GPU; the interpreter's run of this file covers it")
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
        _update(p, grad * 0.5, mean, square, *its_numbers, 0.9, 0.95, 1e-8)
    adamw_(tensors, numbers, 0.9, 0.95, 1e-8, skip=torch.ones((), device=DEVICE))
    adamw_(tensors, numbers, 0.9, 0.95, 1e-8, factor=torch.full((), 0.5, device=DEVICE))
    for got_four, want_four in zip(tensors, want, strict=True):
        for got, wanted in zip(got_four, want_four, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.skipif(not KERNELS, reason="no GPU; the interpreter's run of this file covers it")
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
