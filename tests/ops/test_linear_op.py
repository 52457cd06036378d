"""The linear operation: the composition against formulas in fp64, and every kernel against the same.

The kernels run on a GPU, or on the CPU in Triton's interpreter (tests/test_interpreted_kernels.py). The interpreter
multiplies bf16 matrices wrongly, so bf16 is tested on a GPU alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qwench.ops.dispatch import forced
from qwench.ops.linear import linear
from qwench.ops.triton_launch import interpreted, runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
BOUND = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
Flags = tuple[bool, bool, bool, bool]
FLAGS: list[Flags] = [
    (False, False, False, False),  # head
    (True, True, False, False),  # q, k, v
    (False, False, False, True),  # o, down
    (True, False, True, False),  # gate, up
    (False, True, True, True),
    (True, True, True, True),
]
"""norm, bias, swiglu, residual."""


class Case:
    """Inputs of one call, and its exact result."""

    def __init__(
        self, num_tokens: int, num_rows: int, size: int, dtype: torch.dtype,
        flags: Flags, device: torch.device = DEVICE,
    ) -> None:  # fmt: skip
        norm, bias, self.swiglu, residual = flags
        generator = torch.Generator(device).manual_seed(num_tokens + num_rows + size)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        wide = draw(num_tokens, size + 8)  # rows with a gap between them
        self.x = (wide.to(dtype) * 2)[:, :size]
        self.weight = (draw(num_rows, size) / size**0.5).to(dtype)
        self.bias = draw(num_rows).to(dtype) if bias else None
        self.norm = (draw(size).to(dtype) * 0.3 + 1, 1e-6) if norm else None
        width = num_rows // 2 if self.swiglu else num_rows
        self.residual = draw(num_tokens, width).to(dtype) if residual else None
        if device.type == "cuda":
            torch.cuda.synchronize()  # kernels that start early take weights for constants

    def run(self, **further: Any) -> Tensor:
        residual = None if self.residual is None else self.residual.clone()  # it may be overwritten
        return linear(self.x, self.weight, self.bias, norm=self.norm, swiglu=self.swiglu, residual=residual, **further)

    def exact(self) -> Tensor:
        """In fp64, but for the norm's roundings, which are part of the contract."""
        x = self.x.double()
        if self.norm is not None:
            weight, eps = self.norm
            x = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).to(self.x.dtype)
            x = (x * weight).double()
        y = x @ self.weight.double().T
        if self.bias is not None:
            y = y + self.bias.double()
        if self.swiglu:
            gate, up = y.chunk(2, -1)
            y = gate / (1 + (-gate).exp()) * up
        return y if self.residual is None else y + self.residual.double()


def error(got: Tensor, want: Tensor) -> float:
    """Largest row's relative error in the 2-norm; NaN counts as infinite."""
    assert got.shape == want.shape
    errors = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
    return float(errors.nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS)
def test_composition(dtype: torch.dtype, flags: Flags) -> None:
    case = Case(5, 22, 40, dtype, flags)
    with forced({"linear": "reference"}):
        got = case.run()
        assert got.dtype == dtype
        assert error(got, case.exact()) < 2 * BOUND[dtype]  # it rounds at every step
        assert torch.equal(case.run(out_dtype=torch.float32), got.float())
        flat = case.run()
        case.x, case.residual = case.x[None], None if case.residual is None else case.residual[None]
        assert error(case.run()[0], flat) < BOUND[dtype]


def test_composition_casts_weights_and_has_gradients() -> None:
    """fp32 master weights under bf16 activations: bf16 out, fp32 gradients."""
    case = Case(5, 22, 40, torch.float32, (True, True, True, True), torch.device("cpu"))
    assert case.norm is not None
    leaves = [case.weight, case.bias, case.norm[0], case.x, case.residual]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves if leaf is not None]
    case.weight, case.bias, weight, x, residual = leaves
    case.norm, case.x, case.residual = (weight, 1e-6), x, residual
    case.run().square().sum().backward()
    exact = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    case.exact().square().sum().backward()  # its casts of the norm to fp32 do not round here
    for leaf, first in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad - first, first, rtol=1e-4, atol=1e-4)
        leaf.grad = None
    case.x, case.residual = x.bfloat16(), residual.bfloat16()
    out = case.run()
    out.square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 8), (14, 904)])
def test_gemv(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Whole rows, whole rows in a loop of few programs, rows in pieces."""
    from qwench.ops.linear_configs import GemvConfig
    from qwench.ops.linear_triton import gemv

    for flags in FLAGS:
        case = Case(1, *shape, dtype, flags)
        for config in (GemvConfig(4, 1024, 4), GemvConfig(2, 1024, 1, programs=2), GemvConfig(2, 256, 4), None):
            got = gemv(
                case.x, case.weight, case.bias, norm=case.norm, swiglu=case.swiglu, residual_1N=case.residual,
                config=config,
            )  # fmt: skip
            assert got.dtype == dtype
            assert error(got, case.exact()) < BOUND[dtype], f"{flags} {config}"


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33])
def test_matmul(dtype: torch.dtype, num_tokens: int) -> None:
    from qwench.ops.linear_configs import MatmulConfig
    from qwench.ops.linear_triton import matmul

    for flags, shape in itertools.product(FLAGS, [(6, 8), (70, 136)]):
        if flags[0]:  # the norm is a kernel of its own before this one
            continue
        case = Case(num_tokens, *shape, dtype, flags)
        for config in (MatmulConfig(16, 16, 64, 2, 3), None):
            got = matmul(
                case.x, case.weight, case.bias, swiglu=case.swiglu, residual_TN=case.residual, config=config
            )  # fmt: skip
            assert got.dtype == dtype
            assert error(got, case.exact()) < BOUND[dtype], f"{flags} {shape} {config}"


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fused", "invariant"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33])
def test_implementations(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    for flags in FLAGS:
        case = Case(num_tokens, 34, 72, dtype, flags)
        with forced({"linear": name}):
            got, wide = case.run(), case.run(out_dtype=torch.float32)
        assert (got.dtype, wide.dtype) == (dtype, torch.float32)
        assert error(got, case.exact()) < 2 * BOUND[dtype], flags
        assert error(wide, case.exact()) < 2 * BOUND[dtype], flags


@needs_kernels
def test_fp32_logits_are_not_rounded_to_half_precision() -> None:
    for num_tokens in (1, 4, 33):
        case = Case(num_tokens, 34, 136, torch.float16, (False, False, False, False))
        with forced({"linear": "fused"}):
            got = case.run(out_dtype=torch.float32)
        if num_tokens <= 16 or DEVICE.type == "cuda":
            assert error(got, case.exact()) < 1e-5


@needs_kernels
def test_fused_has_gradients() -> None:
    case = Case(3, 34, 136, torch.float16, (True, True, True, True))
    grads = []
    for name in ("fused", "reference"):
        weight = case.weight.detach().clone().requires_grad_()
        with forced({"linear": name}):
            linear(case.x, weight, case.bias, norm=case.norm, swiglu=True).float().sum().backward()
        grads.append(weight.grad)
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_rows_depend_on_themselves_alone(dtype: torch.dtype) -> None:
    """The bits of a row: alone, among any number of others, at any place, beside other values."""
    for flags in FLAGS[:4]:
        case = Case(70, 34, 72, dtype, flags)
        x, residual = case.x, case.residual
        with forced({"linear": "invariant"}):
            want = case.run()
            for start, stop in ((0, 1), (69, 70), (7, 40)):
                case.x, case.residual = x[start:stop], None if residual is None else residual[start:stop]
                assert torch.equal(case.run(), want[start:stop]), (flags, start, stop)
            case.x, case.residual = x.clone(), residual
            case.x[1:] = case.x[1:].flip(0) * 3
            assert torch.equal(case.run()[:1], want[:1]), flags


@needs_kernels
def test_invariant_refuses_gradients() -> None:
    weight = torch.ones(8, 8, device=DEVICE, requires_grad=True)
    with forced({"linear": "invariant"}):
        with pytest.raises(ValueError, match="no gradient"):
            linear(torch.ones(2, 8, device=DEVICE), weight)
        with torch.no_grad():
            assert float(linear(torch.ones(2, 8, device=DEVICE), weight)[0, 0]) == 8.0


@pytest.mark.skipif(interpreted(), reason="needs a process without the interpreter")
def test_kernels_are_not_chosen_on_a_cpu() -> None:
    with (
        forced({"linear": "fused"}),
        pytest.raises(
            ValueError, match=r"ops\.linear=fused cannot run on cpu here; choose one of: (native, )?few, reference"
        ),
    ):
        linear(torch.ones(2, 8), torch.ones(3, 8))


MODELS = {
    "0.5B": (896, 14, 2, 64, 4864, 151936),
    "1.5B": (1536, 12, 2, 128, 8960, 151936),
    "7B": (3584, 28, 4, 128, 18944, 152064),
}
"""Hidden size, heads, key/value heads, head size, feed-forward width, vocabulary rows."""


def real_cases() -> list[tuple[int, int, Flags]]:
    """(weight rows, inputs, flags) of every matrix of the three models."""
    cases = []
    for hidden, heads, kv_heads, size, width, vocabulary in MODELS.values():
        cases.append(((heads + 2 * kv_heads) * size, hidden, (True, True, False, False)))
        cases.append((hidden, heads * size, (False, False, False, True)))
        cases.append((2 * width, hidden, (True, False, True, False)))
        cases.append((hidden, width, (False, False, False, True)))
        cases.append((vocabulary, hidden, (False, False, False, False)))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33])
@pytest.mark.parametrize(("num_rows", "size", "flags"), real_cases())
def test_real_shapes(num_rows: int, size: int, flags: Flags, num_tokens: int) -> None:
    """bf16 against fp64, equal bits when run again, and the invariant implementation beside it."""
    case = Case(num_tokens, num_rows, size, torch.bfloat16, flags, torch.device("cuda"))
    want = case.exact()
    for name in ("fused", "invariant"):
        with forced({"linear": name}), torch.no_grad():
            got = case.run()
            assert error(got, want) < 5e-3, name
            for _ in range(5):
                assert torch.equal(case.run(), got), name


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4, 33])
def test_chain_in_a_graph(num_tokens: int) -> None:
    """Blocks of dependent kernels, captured and replayed with changing inputs, give the bits of launches one by one."""
    hidden, heads, kv_heads, size, width, _ = MODELS["0.5B"]
    torch.manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).bfloat16()

    layers = [
        (weight((heads + 2 * kv_heads) * size, hidden), weight(hidden, heads * size), weight(2 * width, hidden),
         weight(hidden, width)) for _ in range(24)
    ]  # fmt: skip
    norm = (torch.ones(hidden, device="cuda").bfloat16(), 1e-6)

    def step(x: Tensor, wait: bool) -> Tensor:
        for qkv, out, gate_up, down in layers:
            for function in (
                lambda x, qkv=qkv: linear(x, qkv, norm=norm)[:, : heads * size].contiguous(),
                lambda y, x=x, out=out: linear(y, out, residual=x),
            ):
                x = function(x)
                if wait:
                    torch.cuda.synchronize()
            y = linear(x, gate_up, norm=norm, swiglu=True)
            if wait:
                torch.cuda.synchronize()
            x = linear(y, down, residual=x)
        return x

    with torch.no_grad():
        static = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(static, False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(static, False)
        for seed in range(10):
            torch.manual_seed(seed)
            static.copy_(torch.randn(num_tokens, hidden, device="cuda"))
            want = step(static.clone(), True)
            for _ in range(5):
                graph.replay()
            assert torch.equal(out, want)
