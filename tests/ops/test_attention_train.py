"""Packed attention with gradient as one opaque operation: every kernel of it against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwench.ops import attention_train
from qwench.ops.attention import ATTENTION, AttnMeta
from qwench.ops.attention_train import Stream, extent_of, packed_attention


def bounds(lens: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


def qkv(num_q: int, num_k: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(num_q, heads, size), (num_k, kv_heads, size), (num_k, kv_heads, size)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, lens_q: list[int], lens_k: list[int], window: int | None) -> Tensor:
    """Sequence by sequence and head by head, in fp64."""
    outs, start_q, start_k = [], 0, 0
    group = q.shape[1] // k.shape[1]
    for num_q, num_k in zip(lens_q, lens_k, strict=True):
        heads = []
        for head in range(q.shape[1]):
            queries = q[start_q : start_q + num_q, head].double()
            keys, values = (x[start_k : start_k + num_k, head // group].double() for x in (k, v))
            scores = queries @ keys.t() / q.shape[-1] ** 0.5
            back = torch.arange(num_k - num_q, num_k)[:, None] - torch.arange(num_k)[None]
            seen = (back >= 0) & (back < (window or num_k + 1))
            scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
            heads.append(scores.softmax(-1) @ values)
        outs.append(torch.stack(heads, 1))
        start_q, start_k = start_q + num_q, start_k + num_k
    return torch.cat(outs)


def run(call, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = call(*leaves)
    torch.manual_seed(7)
    out.backward(torch.randn(out.shape, device=out.device).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(
    lens_q: list[int], lens_k: list[int], heads: tuple[int, int, int], window: int | None, dtype: torch.dtype,
    device: str, tolerance: float, padding: int = 0,
) -> None:  # fmt: skip
    tensors = qkv(sum(lens_q), sum(lens_k), *heads, dtype, device)
    empty = [0] * padding
    cu_q, cu_k = bounds(lens_q + empty, device), bounds(lens_k + empty, device)
    extent = extent_of(max(lens_q), max(lens_k), len(lens_q) + padding)
    want = run(lambda q, k, v: definition(q, k, v, lens_q, lens_k, window), [x.double() for x in tensors])
    got = run(lambda q, k, v: packed_attention(q, k, v, cu_q, cu_k, extent, window), tensors)
    assert len(got) == len(want) == 4
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < tolerance, f"output or gradient {index}"


@pytest.mark.parametrize(("lens_q", "lens_k"), [([7], [7]), ([4, 4, 4], [4, 4, 4]), ([1, 9, 3], [5, 9, 40])])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 8)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_plain(
    lens_q: list[int], lens_k: list[int], heads: tuple[int, int, int], window: int | None, padding: int
) -> None:
    compare(lens_q, lens_k, heads, window, torch.float32, "cpu", 2e-6, padding)


def test_plain_in_bf16() -> None:
    compare([30, 12], [30, 50], (6, 2, 16), None, torch.bfloat16, "cpu", 1e-2)


KERNELS = {"varlen": attention_train.VARLEN, "cudnn": attention_train.CUDNN, "flash_4": attention_train.FLASH_4}


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("heads", [(14, 2, 64), (12, 2, 128)])
@pytest.mark.parametrize(
    ("lens_q", "lens_k", "window", "padding"),
    [
        ([256, 256], [256, 256], None, 0),
        ([700, 1, 300], [700, 1, 300], None, 0),
        ([700, 1, 300], [700, 1, 300], None, 3),
        ([128, 300], [1000, 300], None, 0),
        ([700, 300], [700, 300], 100, 0),
    ],
)
def test_kernels_on_a_gpu(
    name: str, heads: tuple[int, int, int], lens_q: list[int], lens_k: list[int], window: int | None, padding: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "flash_4" and attention_train.flash_attention_4() is None:
        pytest.skip("flash-attn-4 is not installed or does not run here")
    if name == "cudnn" and (len(set(lens_q)) > 1 or lens_q != lens_k or window or padding):
        pytest.skip("cuDNN serves sequences of equal length")
    monkeypatch.setattr(attention_train, "choose", lambda *args: KERNELS[name])
    compare(lens_q, lens_k, heads, window, torch.bfloat16, "cuda", 1.5e-2, padding)


def test_extent_says_whether_sequences_have_equal_lengths() -> None:
    cu = bounds([4, 4])
    assert attention_train.Lengths(cu, cu, 4, 4, 2, 0).rectangular(8, 8)
    assert not attention_train.Lengths(cu, cu, 4, 4, 3, 0).rectangular(8, 8)
    assert not attention_train.Lengths(cu, cu, 4, 6, 2, 0).rectangular(8, 12)


def test_operation_is_registered_as_torch_wants_it() -> None:
    """Fake outputs agree with the real ones, and the gradient is where tracing finds it."""
    q, k, v = (x.requires_grad_() for x in qkv(9, 12, 4, 2, 8, torch.float32, "cpu"))
    arguments = (q, k, v, bounds([4, 5]), bounds([4, 8]), extent_of(5, 8, 2), 0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.qwench.packed_attention.default, arguments, test_utils=tests)


def test_stream() -> None:
    """What compiled blocks read from a stream are tensors; streams that they do not take come back as they are."""
    meta = AttnMeta.packed([3, 5])
    stream = Stream.of(meta)
    assert isinstance(stream, Stream)
    assert stream.extent is not None
    assert stream.extent.tolist() == [5, 5, 2]
    assert Stream.of(stream) is stream
    tensors = qkv(8, 8, 4, 2, 8, torch.float32, "cpu")
    got = attention_train.attention(tensors[0], tensors[1], tensors[2], stream, None, None)
    want = ATTENTION.named("reference", torch.device("cpu")).run(*tensors, meta, None, None)
    torch.testing.assert_close(got, want)
    cached = AttnMeta(cu_q=meta.cu_q, max_q=5, lens_k=torch.tensor([3, 5], dtype=torch.int32))
    assert Stream.of(cached) is cached
