"""FP8 products: the result is what the rounded factors give, near fp32's, and the same inside compiled blocks.

On a CPU the products of the rounded factors are fp32's; that `_scaled_mm` computes the same is tested by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.ops.linear_fp8 import (
    BACKWARD,
    FORWARD,
    exact_product,
    linear_fp8,
    rounded,
    scaled_product,
    unit_of,
)
from qwench.parallel.layout import Layout, Team
from qwench.train.batch import Batch
from qwench.train.compile import compile_blocks
from qwench.train.copies import ComputeCopies
from qwench.train.fp8 import LinearFP8, block_gain, pick_fp8, use_fp8
from qwench.train.loss import next_token_loss

ALONE = Layout()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def case(dtype: torch.dtype, tokens: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 96, generator=generator) * 3
    weight = torch.randn(160, 96, generator=generator) * 0.02
    bias, d_y = torch.randn(160, generator=generator), torch.randn(tokens, 160, generator=generator) * 1e-4
    x, weight, bias = (each.to(dtype).requires_grad_() for each in (x, weight, bias))
    return x, weight, bias, d_y.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_three_products_from_rounded_factors(dtype: torch.dtype) -> None:
    x, weight, bias, d_y = case(dtype)
    y = linear_fp8(x, weight, bias)
    y.backward(d_y)
    d_x, d_weight, d_bias = x.grad, weight.grad, bias.grad
    assert d_x is not None
    assert d_weight is not None
    assert d_bias is not None
    assert y.dtype == d_x.dtype == d_weight.dtype == dtype

    def back(value: Tensor, kind: torch.dtype) -> Tensor:
        unit = unit_of(value, kind)
        return rounded(value, unit, kind).double() * unit

    x, weight, y, bias = (each.detach() for each in (x, weight, y, bias))
    x8, weight8, d8 = back(x, FORWARD), back(weight, FORWARD), back(d_y, BACKWARD)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert relative(y, x8 @ weight8.t() + bias.double()) < tolerance
    assert relative(d_x, d8 @ weight8) < tolerance
    assert relative(d_weight, d8.t() @ x8) < tolerance
    assert relative(d_bias, d_y.double().sum(0)) < tolerance
    # Rounding: 3 bits of fraction are 2 to 4 % of each factor, 2 bits twice that.
    exact = [(y - bias, x @ weight.t(), 0.05), (d_x, d_y @ weight, 0.08), (d_weight, d_y.t() @ x, 0.08)]
    for got, want, bound in exact:
        assert 0.01 < relative(got, want) < bound


@pytest.mark.parametrize("kinds", [(FORWARD, FORWARD), (BACKWARD, FORWARD)])
def test_the_devices_product(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    """torch's operation takes what it is given here - kinds, layouts, scales, a bias - and means the same."""
    x, weight, bias, _ = (each.detach() for each in case(torch.bfloat16, tokens=32))
    units = unit_of(x, kinds[0]), unit_of(weight, kinds[1])
    left, right = rounded(x, units[0], kinds[0]), rounded(weight, units[1], kinds[1]).t()
    for dtype, added in ((torch.bfloat16, bias), (torch.bfloat16, None), (torch.float32, None)):
        got, want = (run(left, right, *units, dtype, added, False) for run in (scaled_product, exact_product))
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_largest_values_stay_finite() -> None:
    """Scales follow the tensor: neither 1e4 nor 1e-6 overflows or vanishes, zeros stay zeros."""
    for size in (1e4, 1e-6, 0.0):
        x, weight = (each.detach() for each in case(torch.float32)[:2])
        y = linear_fp8(x * size, weight)
        assert y.isfinite().all()
        if size:
            assert relative(y, x @ weight.t() * size) < 0.05
        else:
            assert not y.any()
    for number in (float("nan"), float("inf")):
        x, weight = (each.detach() for each in case(torch.float32)[:2])
        broken = x.clone()
        broken[3, 5] = number
        assert not linear_fp8(broken, weight).isfinite().all(), "the guard of the loop must see it"


def test_other_sizes_take_the_usual_product() -> None:
    x, weight, bias, _ = case(torch.float32, tokens=100)
    torch.testing.assert_close(linear_fp8(x, weight, bias), x @ weight.t() + bias)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, qkv_bias=True,
    )  # fmt: skip


def gradients(model: CausalLM) -> dict[str, Tensor]:
    tokens = torch.randint(128, (128,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(48), torch.arange(80)))
    given = Batch(
        tokens_T=tokens,
        targets_T=tokens.roll(-1),
        positions_T=positions,
        loss_weights_T=torch.ones(128) / 128,
        meta=AttnMeta.packed([48, 80]),
    )
    loss = next_token_loss(model, given)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
def test_in_compiled_blocks(remat: str, config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """One graph without breaks, near uncompiled FP8 and near bf16; names and master weights stay."""
    found: dict[str, dict[str, Tensor]] = {}
    for kind in ("bf16", "fp8", "compiled"):
        model = make_model(config, std=0.05).train()
        model.set_compute_dtype(torch.bfloat16)
        names = list(model.state_dict())
        if kind != "bf16":
            assert use_fp8(model) == 4 * config.num_hidden_layers
            assert not isinstance(model.lm_head, LinearFP8)
        ComputeCopies(model, torch.bfloat16)
        if kind == "compiled":
            compile_blocks(model, remat, backend="aot_eager")  # pyright: ignore[reportArgumentType]
        found[kind] = gradients(model)
        assert list(model.state_dict()) == names
        assert all(value.dtype == torch.float32 for value in found[kind].values())
    assert abs(float(found["fp8"]["loss"] - found["bf16"]["loss"])) < 0.05 * float(found["bf16"]["loss"])
    for name, value in found["bf16"].items():
        assert relative(found["fp8"][name], value) < 0.35, name
        assert relative(found["compiled"][name], found["fp8"][name]) < 0.2, name


def test_a_step_in_fp8_learns(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """Twenty steps on one batch: the loss falls as it does without FP8."""
    losses: dict[bool, list[float]] = {False: [], True: []}
    for in_fp8, seen in losses.items():
        model = make_model(config, std=0.05).train()
        if in_fp8:
            use_fp8(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            seen.append(float(gradients(model)["loss"]))
            optimizer.step()
    assert losses[True][-1] < 0.8 * losses[True][0]
    assert losses[True][-1] == pytest.approx(losses[False][-1], rel=0.05)


def test_what_the_recipe_says(
    config: ModelConfig, make_model: Callable[..., CausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    def pick(wanted: str, layout: Layout = ALONE) -> tuple[bool, bool]:
        model = make_model(config)
        team = Team(layout=layout, rank=0, device=torch.device("cpu"))
        given = {"compiled": False, "remat": "none", "tokens": 64, "seq_len": 32}
        picked = pick_fp8(model, wanted, team, torch.bfloat16, **given)  # pyright: ignore[reportArgumentType]
        return picked, any(isinstance(module, LinearFP8) for module in model.modules())

    assert pick("on") == (True, True)
    assert pick("off") == pick("auto") == (False, False)
    assert "loop.fp8: off" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"loop\.fp8=on: parallel\.tensor"):
        pick("on", Layout(tensor=2))


def test_probe(config: ModelConfig) -> None:
    """The same code as on a GPU, where the graphs are worth something."""
    gain = block_gain(config, 100, 32, torch.bfloat16, torch.device("cpu"), "elementwise", backend="aot_eager")
    assert 0 < gain < 10
