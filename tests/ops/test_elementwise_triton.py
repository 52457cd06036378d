"""RMSNorm, SwiGLU and rotary positions with the cache write: the Triton kernels against the references.

The kernels run on a GPU or in Triton's interpreter (tests/test_interpreted_kernels.py). The interpreter
cuts bf16 and fp8 instead of rounding; those dtypes are tested on a GPU alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.ops.dispatch import forced
from qwench.ops.norm import rms_norm
from qwench.ops.rope import (
    Rope,
    apply_rope,
    cached_inverse_frequencies,
    inverse_frequencies,
    rope_and_store,
    rope_tables,
)
from qwench.ops.swiglu import swiglu
from qwench.ops.triton_launch import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
HALF = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
DTYPES = [*HALF, torch.float32]
STEP = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative size of two last places, with some room for fp32."""


def nearly_equal(got: Tensor, want: Tensor) -> None:
    """At most a last place apart, and that rarely."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=STEP[want.dtype], atol=1e-6)
    if want.dtype != torch.float32 and want.numel() > 0:
        assert float((got != want).float().mean()) < 0.01


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 136), (3, 5, 896), (33, 1000), (0, 64)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype) * 3
    weight = (torch.rand(shape[-1]) + 0.5).to(DEVICE)
    with forced({"rms_norm": "reference"}):
        want = rms_norm(x, weight, 1e-5)
    with forced({"rms_norm": "triton"}):
        nearly_equal(rms_norm(x, weight, 1e-5), want)
        wide = torch.randn(*shape[:-1], shape[-1] + 8, device=DEVICE).to(dtype)
        wide[..., : shape[-1]] = x
        nearly_equal(rms_norm(wide[..., : shape[-1]], weight, 1e-5), want)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 18), (3, 5, 2600), (0, 64)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape, device=DEVICE).to(dtype) * 3
    with forced({"swiglu": "reference"}):
        want = swiglu(gate_up)
    with forced({"swiglu": "triton"}):
        nearly_equal(swiglu(gate_up), want)


@needs_kernels
def test_gradients_come_from_the_fused_implementations() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64, device=DEVICE), torch.rand(64, device=DEVICE)
    grads = []
    for name in ("triton", "fused"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with forced({"rms_norm": name, "swiglu": name}):
            swiglu(rms_norm(leaves[0], leaves[1], 1e-6)).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def merged(
    num_tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device = DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection."""
    torch.manual_seed(0)
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, size, device=device).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    return q, k, v


def pages(num_blocks: int, block: int, kv_heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, block, kv_heads, size)
    return (torch.ones(shape, device=DEVICE).to(dtype), torch.ones(shape, device=DEVICE).to(dtype))


def rows(cache_half: Tensor) -> Tensor:
    """[N * P, K, D] fp32."""
    return cache_half.float().flatten(0, 1)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (4, 4, 16), (3, 1, 48)])
@pytest.mark.parametrize("cached", [False, True])
def test_rope_and_store(name: str, dtype: torch.dtype, heads: int, kv_heads: int, size: int, cached: bool) -> None:
    """Rotation as `apply_rope` does it; rotated keys and untouched values at their places, and nothing elsewhere."""
    positions = torch.tensor([0, 1, 77, 32767, 999_999], device=DEVICE)
    slots = torch.tensor([5, 0, 31, 16, 17], device=DEVICE)
    inv_freq = inverse_frequencies(1e6, size, DEVICE)
    q, k, v = merged(5, heads, kv_heads, size, dtype)
    tables = rope_tables(positions, inv_freq, dtype)
    want_q, want_k, want_v = apply_rope(q, *tables), apply_rope(k, *tables), v.clone()
    for cache_dtype in (None, *DTYPES) if cached else (None,):
        q, k, v = merged(5, heads, kv_heads, size, dtype)
        cache = pages(2, 16, kv_heads, size, cache_dtype) if cache_dtype is not None else None
        with forced({"rope_and_store": name}), torch.no_grad():
            rope = Rope.at(positions, inv_freq, dtype)
            assert (rope.tables is None) == (name == "triton")
            got_q, got_k = rope_and_store(q, k, v, rope, cache, slots if cache is not None else None)
        nearly_equal(got_q, want_q)
        nearly_equal(got_k, want_k)
        assert torch.equal(v, want_v)
        if cache is not None and cache_dtype is not None:
            untouched = torch.ones(32, dtype=torch.bool, device=DEVICE)
            untouched[slots] = False
            for half, want in zip(cache, (got_k, want_v), strict=True):
                assert torch.equal(rows(half)[slots], want.to(cache_dtype).float())
                assert bool((rows(half)[untouched] == 1).all())


def test_rope_and_store_fp8_reference() -> None:
    """A plain cast, saturating."""
    q, k, v = merged(3, 2, 1, 8, torch.float32, torch.device("cpu"))
    v[0, 0, 0], v[0, 0, 1] = 1000.0, -1000.0
    positions, slots = torch.tensor([0, 3, 9]), torch.tensor([2, 0, 3])
    shape = (1, 4, 1, 8)
    cache = (torch.zeros(shape).to(torch.float8_e4m3fn), torch.zeros(shape).to(torch.float8_e4m3fn))
    rope = Rope.at(positions, inverse_frequencies(1e4, 8), torch.float32)
    with forced({"rope_and_store": "reference"}):
        _, got_k = rope_and_store(q, k, v, rope, cache, slots)
    assert torch.equal(cache[0][0].float()[slots], got_k.to(torch.float8_e4m3fn).float())
    assert cache[1][0, 2, 0, :2].float().tolist() == [448.0, -448.0]
    torch.testing.assert_close(cache[1][0].float()[slots][1:], v[1:], rtol=1 / 16, atol=2**-9)


def test_rope_has_gradients() -> None:
    q, k, v = (x.clone().requires_grad_() for x in merged(3, 2, 1, 8, torch.float32))
    rope = Rope.at(torch.tensor([0, 3, 9], device=DEVICE), inverse_frequencies(1e4, 8, DEVICE), torch.float32)
    assert rope.tables is not None
    weights = torch.arange(8.0, device=DEVICE)
    out_q, out_k = rope_and_store(q, k, v, rope)
    (out_q @ weights).sum().backward()
    (out_k @ weights).sum().backward()
    # The gradient of a rotation is the rotation by the opposite angle.
    cos, sin = rope.tables
    assert q.grad is not None
    assert k.grad is not None
    torch.testing.assert_close(q.grad, apply_rope(weights.expand_as(q), cos, -sin))
    torch.testing.assert_close(k.grad, apply_rope(weights.expand_as(k), cos, -sin))


def test_cached_frequencies_serve_inference_and_training() -> None:
    with torch.inference_mode():
        first = cached_inverse_frequencies(12345.0, 64, DEVICE)
    assert first is cached_inverse_frequencies(12345.0, 64, DEVICE)
    assert not first.is_inference()
    assert torch.equal(first, inverse_frequencies(12345.0, 64, DEVICE))


@needs_kernels
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_angles_in_the_kernel(theta: float) -> None:
    """Cosine and sine of fp32 angles up to 10^6, against fp64: rotate (1, 0) and read both."""
    size = 128
    positions = torch.cat((torch.arange(64), torch.randint(1_000_001, (64,)), torch.tensor([2**17, 10**6]))).to(DEVICE)
    inv_freq = inverse_frequencies(theta, size, DEVICE)
    q = torch.zeros(positions.numel(), 1, size, device=DEVICE)
    q[..., : size // 2] = 1
    rope = Rope(positions, inv_freq, None)
    with forced({"rope_and_store": "triton"}), torch.no_grad():
        q, _ = rope_and_store(q, q.clone(), q.clone(), rope)
    angles = (positions.float()[:, None] * inv_freq).double()
    want = torch.cat((angles.cos(), angles.sin()), -1)
    assert float((q[:, 0].double() - want).abs().max()) < 3e-7


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_tokens", [1, 16, 1000])
def test_rope_real_shapes(num_tokens: int, cache_dtype: torch.dtype) -> None:
    """7B's heads in bf16: bits of the reference nearly always, in the cache too."""
    heads, kv_heads, size = 28, 4, 128
    positions = torch.randint(131072, (num_tokens,), device=DEVICE)
    slots = torch.randperm(1024, device=DEVICE)[:num_tokens]
    inv_freq = inverse_frequencies(1e6, size, DEVICE)
    results = []
    for name in ("triton", "reference"):
        q, k, v = merged(num_tokens, heads, kv_heads, size, torch.bfloat16)
        v[0] *= 1000  # fp8 saturates
        cache = pages(64, 16, kv_heads, size, cache_dtype)
        with forced({"rope_and_store": name}), torch.no_grad():
            got_q, got_k = rope_and_store(q, k, v, Rope.at(positions, inv_freq, torch.bfloat16), cache, slots)
        results.append((got_q, got_k, rows(cache[0]), rows(cache[1])))
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        assert bool(got.isfinite().all())
        assert float((got != want).float().mean()) < 1e-3, index
    assert torch.equal(results[0][3], results[1][3])  # values are only cast
