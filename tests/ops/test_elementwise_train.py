"""SwiGLU and rotary positions with gradients, as compiled blocks take them, against autograd through the references.

The kernels run on a GPU or in Triton's interpreter (tests/test_interpreted_kernels.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.ops import elementwise_train, rope, swiglu
from qwench.ops.rope import Rope, inverse_frequencies
from qwench.ops.triton_launch import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
DTYPES = [torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """`want` is in fp64."""
    assert got.dtype == dtype
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 1500])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 2 * width)).to(DEVICE, dtype).requires_grad_()
    d_out = torch.randn(5, width).to(DEVICE, dtype)
    exact = x.detach().double().requires_grad_()
    want = swiglu.reference(exact)
    [d_want] = torch.autograd.grad(want, exact, d_out.double())
    got = torch.ops.qwench.swiglu(x)
    [d_got] = torch.autograd.grad(got, x, d_out)
    close(got, want, dtype)
    close(d_got, d_want, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(14, 2, 64), (3, 1, 40)])
def test_rotation(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """q and k are views of one projection; the forward values are the reference's."""
    query_heads, kv_heads, size = heads
    torch.manual_seed(0)
    merged = torch.randn(7, query_heads + 2 * kv_heads, size).to(DEVICE, dtype).requires_grad_()
    tables = Rope.at(torch.arange(7, device=DEVICE) * 11, inverse_frequencies(1e4, size, DEVICE), dtype)
    assert tables.tables is not None
    d_q = torch.randn(7, query_heads, size).to(DEVICE, dtype)
    d_k = torch.randn(7, kv_heads, size).to(DEVICE, dtype)
    q, k, v = merged.split((query_heads, kv_heads, kv_heads), 1)
    same = rope.reference(q, k, v, tables, None, None)
    got = torch.ops.qwench.rotate(q, k, *tables.tables, False)
    for mine, reference in zip(got, same, strict=True):
        assert torch.equal(mine, reference)
    [d_got] = torch.autograd.grad(got, merged, (d_q, d_k))
    exact = merged.detach().double().requires_grad_()
    q64, k64, v64 = exact.split((query_heads, kv_heads, kv_heads), 1)
    cos, sin = (table.double() for table in tables.tables)
    want = rope.reference(q64, k64, v64, Rope(tables.positions_T, tables.inv_freq_R, (cos, sin)), None, None)
    [d_want] = torch.autograd.grad(want, exact, (d_q.double(), d_k.double()))
    close(d_got, d_want, dtype)


def test_operations_are_registered_as_torch_wants_them() -> None:
    tests = ("test_schema", "test_autograd_registration") if KERNELS else ("test_autograd_registration",)
    torch.library.opcheck(
        torch.ops.qwench.swiglu.default, (torch.randn(3, 8, device=DEVICE, requires_grad=True),), test_utils=tests
    )
    assert elementwise_train.SWIGLU.when_compiled is elementwise_train.compiled_swiglu


def test_a_cpu_traces_the_references() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(elementwise_train.compiled_swiglu(x), swiglu.reference(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_compiled_graph(dtype: torch.dtype) -> None:
    """One graph, whose gradients are those of the references."""
    torch.manual_seed(0)
    x = torch.randn(64, 96, device="cuda", dtype=dtype, requires_grad=True)

    def work(y: Tensor) -> Tensor:
        return swiglu.swiglu(y * 2).square().sum()

    [got] = torch.autograd.grad(torch.compile(work, fullgraph=True)(x), x)
    exact = x.detach().double().requires_grad_()
    [want] = torch.autograd.grad(swiglu.reference(exact * 2).square().sum(), exact)
    assert float((got.double() - want).norm() / want.norm()) < 3 * TOLERANCE[dtype]
