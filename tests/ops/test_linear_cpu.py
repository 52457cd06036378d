"""Layers of a few tokens on a CPU: the values of the definition, whichever call of torch or kernel is behind them."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import linear_cpu
from qwench.ops import linear_cpu_native as native
from qwench.ops.dispatch import forced
from qwench.ops.hardware import cpu_features
from qwench.ops.linear import linear
from qwench.ops.norm import rms_norm

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


# ------------------------------------------------------------------------------------------------------ our own kernel
NEEDS = {"avx512": "avx512_f", "avx2": "avx2"}
SHAPES = [(1, 1), (5, 3), (31, 2), (32, 7), (33, 64), (96, 130), (897, 258), (896, 1152), (4864, 66)]
"""Inputs and outputs; the large ones are spread over threads."""


@pytest.fixture(scope="module", params=sorted(native.TARGETS))
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> native.Kernel:
    """Compiled here, for each set of instructions that this processor has."""
    if NEEDS[request.param] not in cpu_features():
        pytest.skip(f"the processor has no {NEEDS[request.param]}")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return native.open_library(native.build(request.param, tmp_path_factory.mktemp("kernels")))


def normed(kernel: native.Kernel, x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """The kernel's norm alone: times the identity."""
    return native.linear(kernel, x, torch.eye(x.shape[1]).bfloat16(), None, norm, False, None)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_kernel_is_right_to_one_rounding(
    kernel: native.Kernel, num_tokens: int, with_bias: bool, with_norm: bool, swiglu: bool
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for num_inputs, size in SHAPES:
        if with_norm and num_inputs > 1000:
            continue  # the identity would be large
        num_rows = size + size % 2 if swiglu else size
        x, weight = draw(num_tokens, num_inputs), draw(num_rows, num_inputs)
        bias = draw(num_rows) if with_bias else None
        norm = (draw(num_inputs), 1e-6) if with_norm else None
        residual = draw(num_tokens, num_rows // 2 if swiglu else num_rows) if num_inputs % 2 else None
        assert native.suits(x, weight, bias, norm and norm[0], swiglu, residual)
        y = native.linear(kernel, x, weight, bias, norm, swiglu, residual)

        x_fp64 = (x if norm is None else normed(kernel, x, norm)).double()
        exact = x_fp64 @ weight.double().T + (0.0 if bias is None else bias.double())
        slack = 2.0**-20 * (x_fp64.abs() @ weight.double().abs().T + 1)  # fp32 sums
        if swiglu:
            (gate, up), (gate_slack, up_slack) = exact.chunk(2, -1), slack.chunk(2, -1)
            exact = F.silu(gate) * up
            slack = 1.1 * gate_slack * up.abs() + gate.abs() * up_slack + 2.0**-20 * exact.abs()  # |silu'| < 1.1
        exact = exact if residual is None else exact + residual.double()
        assert y.dtype == torch.bfloat16
        assert y.shape == exact.shape
        off = (y.double() - exact).abs() - slack
        assert bool((off <= BF16_EPS * (exact.abs() + slack)).all()), (num_inputs, num_rows, off.max())


def test_the_kernel_norms_as_the_operation_does(kernel: native.Kernel) -> None:
    x, weight = 3 * torch.randn(6, 900).bfloat16(), torch.rand(900).bfloat16()
    x[1] = 0
    ours = normed(kernel, x, (weight, 1e-6))
    theirs = rms_norm(x, weight, 1e-6)
    # The last bits of the fp32 mean may differ and now and then decide a rounding.
    assert bool((ours == theirs).float().mean() > 0.99)
    torch.testing.assert_close(ours, theirs, rtol=4 * BF16_EPS, atol=0)


def test_a_row_depends_on_nothing_but_itself(kernel: native.Kernel) -> None:
    x, weight, norm = torch.randn(8, 900).bfloat16(), torch.randn(400, 900).bfloat16(), torch.rand(900).bfloat16()
    together = native.linear(kernel, x, weight, None, (norm, 1e-6), True, None)
    threads = torch.get_num_threads()
    try:
        for num_tokens, num_threads in ((1, 1), (1, 2), (2, 3), (4, 1), (5, 2), (7, 1)):
            torch.set_num_threads(num_threads)
            part = native.linear(kernel, x[:num_tokens], weight, None, (norm, 1e-6), True, None)
            assert torch.equal(part, together[:num_tokens])
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nans_stay(kernel: native.Kernel) -> None:
    weight = torch.ones(3, 40).bfloat16()
    weight[1, 39], weight[2, 7] = float("inf"), float("nan")
    y = native.linear(kernel, torch.ones(1, 40).bfloat16(), weight, None, None, False, None)
    assert y.tolist()[0][:2] == [40.0, float("inf")]
    assert y[0, 2].isnan()


def test_largest_numbers_round_to_infinity_and_to_even(kernel: native.Kernel) -> None:
    # 1 + 2 ** -8 lies between two numbers of bf16, of which 1 is even; 3 * 2 ** -8 more between 1 + 2 ** -7 and -6.
    weight = torch.tensor([[1, 2.0**-8], [1, 3 * 2.0**-8], [2.0**127, 2.0**127]]).bfloat16()
    y = native.linear(kernel, torch.ones(1, 2).bfloat16(), weight, None, None, False, None)
    assert y[0].tolist() == [1.0, 1 + 2.0**-6, float("inf")]


@pytest.fixture
def calls(kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`linear_cpu` uses this kernel; the list counts its calls."""
    made: list[int] = []

    def counted(*arguments: int | float | None) -> int:
        made.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(native, "load", lambda: counted)
    return made


def test_what_the_kernel_does_not_suit_goes_to_torch(calls: list[int]) -> None:
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    wide, norm, bias = torch.randn(2, 128).bfloat16(), torch.rand(64).bfloat16(), torch.randn(48).bfloat16()
    others = {
        "rows apart": ((wide[:, :64], weight), {}),
        "columns apart": ((wide[:, ::2], weight), {}),
        "transposed weight": ((x, torch.randn(64, 48).bfloat16().T), {}),
        "three dimensions": ((x[None], weight), {}),
        "no token": ((x[:0], weight), {}),
        "many tokens": ((torch.randn(9, 64).bfloat16(), weight), {}),
        "fp32": ((x.float(), weight.float()), {}),
        "fp32 weight": ((x, weight.float()), {}),
        "fp32 norm": ((x, weight), {"norm": (norm.float(), 1e-6)}),
        "fp32 bias": ((x, weight, bias.float()), {}),
        "fp32 residual": ((x, weight), {"residual": torch.randn(2, 48)}),
        "broadcast residual": ((x, weight), {"residual": torch.randn(1, 48).bfloat16()}),
        "fp32 result": ((x, weight), {"out_dtype": torch.float32}),
        "gradient": ((x, weight.clone().requires_grad_()), {}),
    }
    for name, (arguments, options) in others.items():
        answers = []
        for implementation in ("native", "reference"):
            with forced({"linear": implementation}):
                answers.append(linear(*arguments, **options))
        assert answers[0].dtype == answers[1].dtype, name
        torch.testing.assert_close(answers[0], answers[1], rtol=4 * BF16_EPS, atol=2e-2, msg=name)
    assert not calls
    with forced({"linear": "native"}), torch.no_grad():
        linear(x, weight.clone().requires_grad_(), bias, norm=(norm, 1e-6))
    assert len(calls) == 1


def test_wrong_shapes_are_refused_by_torch(calls: list[int]) -> None:
    with forced({"linear": "native"}), pytest.raises(RuntimeError):
        linear(torch.randn(1, 64).bfloat16(), torch.randn(48, 65).bfloat16())
    assert not calls


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8])
def test_the_native_layer_matches_the_reference(calls: list[int], num_tokens: int) -> None:
    x, weight = torch.randn(num_tokens, 64).bfloat16(), torch.randn(80, 64).bfloat16()
    norm, residual = (torch.rand(64).bfloat16(), 1e-6), torch.randn(num_tokens, 40).bfloat16()
    answers = []
    for name in ("native", "reference"):
        with forced({"linear": name}), torch.no_grad():
            answers.append(linear(x, weight, norm=norm, swiglu=True, residual=residual))
    assert len(calls) == 1
    torch.testing.assert_close(answers[0], answers[1], rtol=4 * BF16_EPS, atol=2e-2)


# ----------------------------------------------------------------------------------------------------------- compiling
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and `load` as in a new process."""
    if native.target() is None or shutil.which("cc") is None:
        pytest.skip("no C compiler or no kernel for this processor")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    yield tmp_path / "qwench"
    native.load.cache_clear()


def test_the_kernel_is_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load() is not None
    (library,) = cache.iterdir()
    monkeypatch.setattr(native, "SOURCE", _changed(cache.parent))
    native.load.cache_clear()
    assert native.load() is not None
    assert len(list(cache.iterdir())) == 2, "another source is another library"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setattr("subprocess.run", None)  # nothing is compiled again
    native.load.cache_clear()
    assert native.load() is not None
    assert library.exists()


def _changed(directory: Path) -> Path:
    changed = directory / "changed.c"
    changed.write_text(native.SOURCE.read_text(encoding="utf-8") + "\n/* another */\n", encoding="utf-8")
    return changed


def _build(directory: Path) -> str:
    name = native.target()
    assert name is not None
    library = native.build(name, directory)
    native.open_library(library)
    return library.name


def test_processes_may_compile_at_the_same_time(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        names = pool.map(_build, [cache] * 3, chunksize=1)
    assert [path.name for path in cache.iterdir()] == [names[0]]
    assert len(set(names)) == 1


def failing_compiler(directory: Path) -> str:
    script = directory / "broken"
    script.write_text("#!/bin/sh\necho out of ideas >&2\nexit 3\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    "trouble", ["no compiler", "compiler fails", "no directory", "broken library", "old processor"]
)
def test_torch_computes_where_there_is_no_kernel(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, trouble: str
) -> None:
    if trouble == "no compiler":
        monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    elif trouble == "compiler fails":
        monkeypatch.setenv("CC", failing_compiler(tmp_path))
    elif trouble == "no directory":
        (tmp_path / "qwench").write_text("a file")
    elif trouble == "broken library":
        name = native.target()
        assert name is not None
        native.build(name, cache).write_bytes(b"not a library")
    else:
        monkeypatch.setattr(native, "cpu_features", lambda: ())
    with caplog.at_level(logging.INFO, "qwench.ops"):
        assert native.load() is None
    reason = {
        "no compiler": "install gcc or clang",
        "compiler fails": "out of ideas",
        "no directory": "qwench",
        "broken library": "linear_cpu",
        "old processor": "no kernel for this processor",
    }[trouble]
    assert reason in caplog.text
    assert not linear_cpu.runs_native(torch.device("cpu"))
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert linear_cpu.layer(x, weight, None, None, False, None, None) is None
    with pytest.raises(ValueError, match="choose one of: few, reference"), forced({"linear": "native"}):
        linear(x, weight)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=2 * BF16_EPS, atol=1e-2)
