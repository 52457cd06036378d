"""Products of a few tokens on a CPU: the values of `F.linear`, whichever call of torch is behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwench.ops import linear_cpu
from qwench.ops.dispatch import forced
from qwench.ops.linear import linear

BF16_EPS = 2.0**-8
"""Half a unit in the last place of bf16, relative."""


@pytest.fixture(params=[True, False], ids=["bf16-instructions", "older"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches run on any processor: the calls differ in speed only."""
    monkeypatch.setattr(linear_cpu, "_has_bf16_instructions", lambda: request.param)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_right_to_one_rounding(dtype: torch.dtype, num_tokens: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 96, generator=generator).to(dtype)
    weight = torch.randn(130, 96, generator=generator).to(dtype)
    b = torch.randn(130, generator=generator).to(dtype) if bias else None
    y = linear_cpu.product(x, weight, b)
    exact = x.double() @ weight.double().T + (0.0 if b is None else b.double())
    assert y.dtype == dtype
    assert y.shape == (num_tokens, 130)
    assert y.is_contiguous()
    # One rounding of the result, and fp32 sums whose terms reach about 100.
    eps = {torch.float32: 2.0**-24, torch.bfloat16: BF16_EPS, torch.float16: 2.0**-11}[dtype]
    bound = eps * exact.abs() + 2e-4
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.usefixtures("_processor")
def test_views_and_leading_dimensions() -> None:
    wide = torch.randn(8, 200).to(torch.bfloat16)
    weight = torch.randn(40, 100).to(torch.bfloat16)
    for x in (wide[:, :100], wide[:1, 50:150], wide.T[:8, :1].T.expand(3, 8)[:, :8]):
        part = weight[:, : x.shape[1]]
        torch.testing.assert_close(linear_cpu.product(x, part), F.linear(x, part), rtol=2 * BF16_EPS, atol=1e-3)
    x_3d = wide[:, :100].unflatten(0, (2, 4))
    assert linear_cpu.product(x_3d, weight).shape == (2, 4, 40)
    assert linear_cpu.product(wide[:0, :100], weight).shape == (0, 40)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_gradients_flow(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 12, requires_grad=True)
    weight = torch.randn(7, 12, requires_grad=True)
    linear_cpu.product(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand_as(x))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand_as(weight))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_whole_layer_matches_the_reference(num_tokens: int) -> None:
    x, weight = torch.randn(num_tokens, 64).bfloat16(), torch.randn(80, 64).bfloat16()
    norm, residual = (torch.rand(64).bfloat16(), 1e-6), torch.randn(num_tokens, 40).bfloat16()
    with torch.no_grad():
        answers = []
        for name in ("few", "reference"):
            with forced({"linear": name}):
                answers.append(linear(x, weight, norm=norm, swiglu=True, residual=residual))
    torch.testing.assert_close(answers[0], answers[1], rtol=4 * BF16_EPS, atol=1e-2)
