"""Every implementation of every operation against its reference, values and gradients, over a grid of shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwench.ops import attention as attention_file
from qwench.ops import cross_entropy, norm, rope, swiglu
from qwench.ops.attention import AttnMeta, attention
from qwench.ops.dispatch import OPERATIONS, Implementation, chosen, forced

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def alternatives(name: str, device: str) -> list[Implementation]:
    return [impl for impl in OPERATIONS[name].available(torch.device(device)) if impl.name != "reference"]


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm; NaN counts as infinite."""
    value = float(
        (got.detach().double() - want.detach().double()).norm() / want.detach().double().norm().clamp_min(1e-12)
    )
    return float("inf") if value != value else value


def compare(name: str, device: str, call, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Run every implementation on the same inputs; outputs and gradients must agree with the reference's."""

    def run(implementation: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        with forced({name: implementation}):
            out = call(*leaves)
        torch.manual_seed(7)
        out.backward(torch.randn(out.shape, device=out.device).to(out.dtype))
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    want = run("reference")
    assert all(float(tensor.detach().abs().max()) > 0 for tensor in want)
    for impl in alternatives(name, device):
        got = run(impl.name)
        assert len(got) == len(want)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.dtype == b.dtype
            assert error(a, b) < TOLERANCE[dtype], f"{impl.name}, output or gradient {index}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (37, 96), (3, 5, 128)])
def test_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype) * 3
    weight = torch.rand(shape[-1], device=device) + 0.5
    compare("rms_norm", device, lambda a, w: norm.rms_norm(a, w, 1e-6), [x, weight], dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (37, 96)])
def test_swiglu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compare("swiglu", device, swiglu.swiglu, [torch.randn(shape, device=device).to(dtype)], dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_logits", [1 << 25, 700])
def test_cross_entropy(device: str, dtype: torch.dtype, chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(23, 32, device=device).to(dtype)
    weight = torch.randn(101, 32, device=device)
    targets = torch.randint(101, (23,), device=device)
    weights = torch.rand(23, device=device).where(torch.arange(23, device=device) % 3 != 0, 0.0)
    compare(
        "cross_entropy",
        device,
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets, weights),
        [hidden, weight],
        dtype,
    )


def test_cross_entropy_survives_hopeless_targets() -> None:
    """A target whose probability underflows still has a finite, exact loss."""
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[200.0, 0.0], [-200.0, 0.0], [0.0, 1.0]])
    loss = cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert float(loss) == pytest.approx(400.0)


def test_token_logprobs_agree_with_the_loss() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 16), torch.randn(50, 16), torch.randint(50, (9,))
    logprobs = cross_entropy.token_logprobs(hidden, weight, targets)
    loss = cross_entropy.linear_cross_entropy(hidden, weight, targets, torch.ones(9))
    assert float(-logprobs.sum()) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seq_lens", [[7], [4, 4, 4], [1, 9, 3]])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_packed(
    device: str, seq_lens: list[int], heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    torch.manual_seed(0)
    total = sum(seq_lens)
    inputs = [torch.randn(total, n, size, device=device) for n in (heads, kv_heads, kv_heads)]
    meta = AttnMeta.packed(seq_lens, device)
    compare("attention", device, lambda q, k, v: attention(q, k, v, meta, None, window), inputs, torch.float32)


@pytest.mark.parametrize("seq_lens", [[64, 64, 64], [40, 70]])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (6, 2, 32)])
def test_attention_packed_bf16_on_cpu(seq_lens: list[int], heads: int, kv_heads: int, size: int) -> None:
    torch.manual_seed(0)
    shape = [(sum(seq_lens), n, size) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, dtype=torch.bfloat16) for s in shape]
    meta = AttnMeta.packed(seq_lens)
    compare("attention", "cpu", lambda q, k, v: attention(q, k, v, meta), inputs, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_lens", [[700, 300], [512, 512]])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (12, 2, 128)])
def test_attention_packed_bf16(seq_lens: list[int], heads: int, kv_heads: int, size: int) -> None:
    torch.manual_seed(0)
    shape = [(sum(seq_lens), n, size) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shape]
    meta = AttnMeta.packed(seq_lens, "cuda")
    compare("attention", "cuda", lambda q, k, v: attention(q, k, v, meta), inputs, torch.bfloat16)


@pytest.mark.parametrize("name", ["reference", "sdpa", "short"])
@pytest.mark.parametrize(("block", "window"), [(4, None), (16, None), (4, 5)])
def test_attention_paged_equals_packed(name: str, block: int, window: int | None) -> None:
    """Two sequences written to a paged cache in pieces (prefill, chunk, single steps) attend as if packed at once."""
    torch.manual_seed(0)
    lens, heads, kv_heads, size = [11, 6], 4, 2, 16
    q, k, v = (torch.randn(sum(lens), n, size) for n in (heads, kv_heads, kv_heads))
    with forced({"attention": "reference"}):
        want = attention(q, k, v, AttnMeta.packed(lens), None, window)
    num_blocks = 16
    cache = (torch.full((num_blocks, block, kv_heads, size), float("nan")),) * 2
    cache = (cache[0].clone(), cache[1].clone())
    tables = [[5, 2, 9], [7, 0, 3]]
    starts = [0, lens[0]]
    done = [0, 0]
    got = torch.full_like(want, float("nan"))
    for pieces in ([4, 1], [3, 3], [1, 1], [3, 1]):
        rows, slots = [], []
        for b, piece in enumerate(pieces):
            positions = range(done[b], done[b] + piece)
            rows += [starts[b] + p for p in positions]
            slots += [tables[b][p // block] * block + p % block for p in positions]
            done[b] += piece
        meta = AttnMeta(
            cu_q=torch.tensor([0, *itertools.accumulate(pieces)], dtype=torch.int32),
            max_q=max(pieces),
            lens_k=torch.tensor(done, dtype=torch.int32),
            max_k=max(done),
            block_table=torch.tensor(tables, dtype=torch.int32),
        )
        for pages, new in zip(cache, (k, v), strict=True):
            pages.view(-1, kv_heads, size)[slots] = new[rows]
        with forced({"attention": name}):
            got[rows] = attention(q[rows], k[rows], v[rows], meta, cache, window)
    assert done == lens
    assert torch.allclose(got, want, atol=1e-5)


def test_rope_is_a_rotation_by_relative_position() -> None:
    """Lengths are kept, and the product of a query and a key depends on their distance alone."""
    torch.manual_seed(0)
    inv_freq = rope.inverse_frequencies(10000.0, 64)
    assert float(inv_freq[0]) == 1.0
    assert float(inv_freq[-1]) == pytest.approx(10000.0 ** (-62 / 64), rel=1e-6)
    q, k = torch.randn(1, 2, 64), torch.randn(1, 2, 64)

    def at(x: Tensor, position: int) -> Tensor:
        return rope.apply_rope(x, *rope.rope_tables(torch.tensor([position]), inv_freq, torch.float32))

    assert torch.allclose(at(q, 1000).norm(dim=-1), q.norm(dim=-1), rtol=1e-5)
    near, far = (at(q, 7) * at(k, 3)).sum(-1), (at(q, 1007) * at(k, 1003)).sum(-1)
    assert torch.allclose(near, far, atol=1e-3)
    assert not torch.allclose(near, (at(q, 8) * at(k, 3)).sum(-1), atol=1e-3)


def test_forcing_an_implementation() -> None:
    with pytest.raises(ValueError, match=r"unknown operation ops\.attenshun"), forced({"attenshun": "reference"}):
        pass
    x = torch.randn(2, 4)
    with forced({"swiglu": "magic"}), pytest.raises(ValueError, match=r"ops.swiglu=magic cannot run on cpu.*fused"):
        swiglu.swiglu(x)
    with forced({"attention": "reference"}):
        assert chosen(torch.device("cpu"))["attention"] == "reference"
    assert chosen(torch.device("cpu"))["attention"] == "short"
    assert attention_file.ATTENTION.name in OPERATIONS
