"""Parameter groups, and steps of the optimiser against a hand-written AdamW in numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from qwench.data.packing import row_of_samples
from qwench.parallel.layout import Team
from qwench.train.batch import make_batch
from qwench.train.config import GuardConfig, OptimConfig
from qwench.train.guard import Guard, StepDecision, decide
from qwench.train.loss import next_token_loss
from qwench.train.optim import (
    allocate_states,
    build_optimizer,
    optimizer_states,
    squared_gradient_norm,
)
from qwench.types import Sample

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(params=["tied", "untied"])
def model(request, make_model, tiny_config):
    return make_model(dataclasses.replace(tiny_config, tie_word_embeddings=request.param == "tied"))


def give_gradients(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(kind: str, model) -> None:
    optimizer = build_optimizer(model, OptimConfig(kind=kind))
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()), "tied weights count once"
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = name.endswith(("norm.weight", "bias"))
        assert decay[id(parameter)] == (0.0 if plain else 0.1), name
    assert any(name.endswith("bias") for name, _ in model.named_parameters())


def test_adamw_by_hand(model) -> None:
    """Three steps at changing learning rates, with decoupled decay [Loshchilov 2019], in float64."""
    optim = OptimConfig(lr=2e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(model, optim)
    want = {name: p.detach().numpy().astype(np.float64).copy() for name, p in model.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in want.items()}
    second = {name: np.zeros_like(value) for name, value in want.items()}
    for step, ratio in enumerate((0.5, 1.0, 0.25), 1):
        give_gradients(model, step)
        optimizer.set_lr_ratio(ratio)
        optimizer.step()
        lr = optim.lr * ratio
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.numpy().astype(np.float64)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            decay = 0.3 if parameter.ndim > 1 else 0.0
            want[name] *= 1 - lr * decay
            corrected = np.sqrt(second[name] / (1 - 0.9**step)) + 1e-6
            want[name] -= lr * first[name] / (1 - 0.8**step) / corrected
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), want[name], rtol=0, atol=2e-6, err_msg=name)


def test_muon_orthogonalises(model) -> None:
    """The first Muon step of a matrix has equal singular values, and the rms of an AdamW step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(kind="muon", lr=1e-3, muon_lr=1e-2, weight_decay=0.0))
    give_gradients(model)
    optimizer.step()
    name = "model.layers.0.mlp.down_proj.weight"
    moved = before[name] - model.get_parameter(name).detach()
    values = torch.linalg.svdvals(moved)
    assert float(values.max() / values.min()) < 2, "Newton and Schulz bring all singular values near each other"
    rms = float(moved.square().mean().sqrt())
    assert 0.1 * 1e-2 < rms < 0.3 * 1e-2
    embedding = before["model.embed_tokens.weight"] - model.model.embed_tokens.weight.detach()
    torch.testing.assert_close(embedding.abs(), torch.full_like(embedding, 1e-3), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("limit", "clipped"), [(1.0, True), (1e6, False), (0.0, False)])
def test_clipping(limit: float, clipped: bool, model) -> None:
    give_gradients(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = float(np.sqrt(sum(float(grad.double().square().sum()) for grad in before.values())))
    squares = squared_gradient_norm(model, Team.alone(torch.device("cpu")))
    assert float(squares.sqrt()) == pytest.approx(norm, rel=1e-5)
    decision = decide(torch.ones((), dtype=torch.float64), squares, math.inf, limit)
    assert not decision.skip
    assert float(decision.divisor) == pytest.approx(norm / limit if clipped else 1.0)


@pytest.mark.parametrize(
    "optim",
    [OptimConfig(), OptimConfig(state_dtype="bf16"), OptimConfig(state_dtype="8bit"), OptimConfig(kind="muon")],
)
@DEVICES
def test_a_step_takes_clipped_gradients(optim: OptimConfig, device: str, model, make_model) -> None:
    """The same as gradients that were divided before."""
    other = make_model(model.config)
    other.load_state_dict(model.state_dict())
    model.to(device)
    other.to(device)
    divided, told = build_optimizer(other, optim), build_optimizer(model, optim)
    for _ in range(2):
        for net in (model, other):
            give_gradients(net)
        for parameter in other.parameters():
            assert parameter.grad is not None
            parameter.grad /= 8
        divided.step()
        told.step(StepDecision(torch.zeros((), device=device), torch.full((), 8.0, device=device)))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "8bit"])
@DEVICES
def test_a_skipped_step_changes_nothing(state_dtype, device: str, model) -> None:
    model.to(device)
    optimizer = build_optimizer(model, OptimConfig(state_dtype=state_dtype))
    assert optimizer.decides_on_device
    give_gradients(model)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    states = {name: value.clone() for name, value in tensors_of(model, optimizer).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step(StepDecision(torch.ones((), device=device), torch.full((), math.nan, device=device)))
    optimizer.uncount()
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(states[name], value) for name, value in tensors_of(model, optimizer).items())


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("norm", [0.0, 1.0, 9.0, 11.0, math.inf, math.nan])
@DEVICES
def test_device_and_host_decide_alike(loss: float, norm: float, device: str) -> None:
    """A limit of ten times the median of 1, and none at the beginning."""
    for num_norms in (0, 20):
        guard = Guard(GuardConfig(grad_norm_factor=10.0, window_steps=20))
        for _ in range(num_norms):
            assert guard.verdict(1.0, 1.0) is None
        squares = torch.tensor(norm, dtype=torch.float64, device=device).square()
        decision = decide(torch.tensor(loss, dtype=torch.float64, device=device), squares, guard.largest_norm, 1.0)
        assert float(decision.divisor) == max(1.0, norm) or not math.isfinite(norm)
        assert bool(decision.skip) == (guard.verdict(loss, norm) is not None)


def tensors_of(model, optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for name, key, _, value in optimizer_states(model, optimizer)}


def test_states_by_name_and_their_place(model, make_model) -> None:
    optimizer = build_optimizer(model, OptimConfig())
    assert tensors_of(model, optimizer) == {}
    give_gradients(model)
    optimizer.step()
    tensors = tensors_of(model, optimizer)
    assert list(tensors) == [f"{n}/{k}" for n, _ in model.named_parameters() for k in ("exp_avg", "exp_avg_sq", "step")]
    other = make_model(model.config, seed=9)
    loaded = build_optimizer(other, OptimConfig())
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    allocate_states(other, loaded, {})
    assert tensors_of(other, loaded) == {}
    allocate_states(other, loaded, shapes)
    empty = tensors_of(other, loaded)
    assert {name: (value.shape, value.dtype) for name, value in empty.items()} == {
        name: (value.shape, value.dtype) for name, value in tensors.items()
    }
    for name, value in empty.items():
        value.copy_(tensors[name])
    for net, optim in ((model, optimizer), (other, loaded)):
        for p in net.parameters():
            p.data.fill_(0.5)
            p.grad = torch.full_like(p, 0.1)
        optim.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs), "the states that were put in are used"
    lacking = {name: shape for name, shape in shapes.items() if not name.startswith("model.norm.weight/")}
    with pytest.raises(ValueError, match=r"nothing for model\.norm\.weight"):
        allocate_states(other, loaded, lacking)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_other_optimiser_is_refused(kind: str, model) -> None:
    """A state of AdamW is none of Muon, although the names of the parameters are the same."""
    optimizer = build_optimizer(model, OptimConfig(kind=kind))
    other = OptimConfig(kind="muon" if kind == "adamw" else "adamw")
    give_gradients(model)
    optimizer.step()
    shapes = {name: tuple(value.shape) for name, value in tensors_of(model, optimizer).items()}
    with pytest.raises(ValueError, match="another optimiser's; resume with"):
        allocate_states(model, build_optimizer(model, other), shapes)


def test_gradient_does_not_depend_on_the_split(model) -> None:
    """The sum over micro-batches of loss / total weight, whatever the split."""
    rng = np.random.default_rng(1)
    rows = []
    for sizes in ([9, 4], [20], [3, 3, 3], [17], [11, 2]):
        samples = [
            Sample(token_ids=rng.integers(0, 512, n, np.int32), loss_weights=(rng.random(n) < 0.6).astype(np.float32))
            for n in sizes
        ]
        rows.append(row_of_samples(samples))
    total = sum(float(row.loss_weights.sum()) for row in rows)

    def gradient(size: int) -> list[torch.Tensor]:
        model.zero_grad()
        for start in range(0, len(rows), size):
            (next_token_loss(model, make_batch(rows[start : start + size], torch.device("cpu"))) / total).backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradient(5)
    for size in (1, 2, 3):
        for got, want in zip(gradient(size), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
