"""AdamW with bf16 states: equal to torch's with fp32 states, and it learns as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import linear_cross_entropy
from qwench.train.adamw import AdamWHalfStates, _compiled, _update


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


def test_compiled_update() -> None:
    """What a GPU runs, compiled here for the CPU: the same values for tensors of several sizes and steps."""
    torch.manual_seed(0)
    for size, step_size in ((64, 0.1), (1000, 0.2), (7, 0.3)):
        numbers = torch.tensor([step_size, 0.5, 0.99])
        tensors = [torch.randn(size), torch.randn(size), torch.randn(size).bfloat16(), torch.rand(size).bfloat16()]
        copies = [x.clone() for x in tensors]
        _update(*tensors, numbers, 0.9, 0.95, 1e-8)
        _compiled()(*copies, numbers, 0.9, 0.95, 1e-8)
        for a, b in zip(copies, tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
