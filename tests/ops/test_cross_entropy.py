"""The loss of the output layer: z-loss, losses by token, what is not computed without a gradient, and the kernel.

The Triton implementation runs on a GPU or in Triton's interpreter (tests/test_interpreted_kernels.py).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import cross_entropy
from qwench.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_by_token, triton_chunk_tokens
from qwench.ops.dispatch import forced
from qwench.ops.triton_launch import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")
FAST = ["chunked", pytest.param("triton", marks=needs_kernels)]
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cuts bf16 instead of rounding


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 700)
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(cross_entropy, "CHUNK_MULTIPLE", 4)


def inputs(dtype: torch.dtype = torch.float32, vocabulary: int = 101, num_tokens: int = 23) -> list[Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 32, device=DEVICE).to(dtype)
    weight = torch.randn(vocabulary, 32, device=DEVICE) / 4
    targets = torch.randint(vocabulary, (num_tokens,), device=DEVICE)
    weights = torch.rand(num_tokens, device=DEVICE)
    weights[::3] = 0
    return [hidden, weight, targets, weights]


def gradients(name: str, values: list[Tensor], z_loss: float, factor: float = 1.0) -> list[Tensor]:
    """Loss and gradients of hidden and weight."""
    hidden, weight = (x.clone().requires_grad_() for x in values[:2])
    with forced({"cross_entropy": name}):
        loss = linear_cross_entropy(hidden, weight, *values[2:], z_loss)
    (loss * factor).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_and_z_loss(name: str, z_loss: float, factor: float) -> None:
    """Against autograd through the definition, in fp64."""
    values = inputs()
    hidden, weight = (x.double().requires_grad_() for x in values[:2])
    logits = hidden @ weight.t()
    nats = F.cross_entropy(logits, values[2], reduction="none") + z_loss * logits.logsumexp(-1) ** 2
    loss = (nats * values[3]).sum()
    (loss * factor).backward()
    for got, want in zip(gradients(name, values, z_loss, factor), (loss, hidden.grad, weight.grad), strict=True):
        assert want is not None
        torch.testing.assert_close(got.double(), want.detach(), rtol=2e-5, atol=2e-5)
    reference = gradients("reference", values, z_loss, factor)
    torch.testing.assert_close(reference[0].double(), loss.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FAST)
def test_z_loss_matters(name: str) -> None:
    values = inputs()
    plain, with_z = gradients(name, values, 0.0), gradients(name, values, 0.1)
    for a, b in zip(plain, with_z, strict=True):
        assert not torch.allclose(a, b, rtol=1e-3)


@pytest.mark.usefixtures("small_chunks")
@needs_kernels
@pytest.mark.parametrize("vocabulary", [8, 1000, 5001])
def test_half_precision(vocabulary: int) -> None:
    values = inputs(HALF, vocabulary)
    want = gradients("reference", [values[0].float(), *values[1:]], 0.01)
    got = gradients("triton", values, 0.01)
    assert got[1].dtype == HALF
    assert got[2].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.02


@needs_kernels
@pytest.mark.parametrize("vocabulary", [16384 + 8, 40_003])
def test_rows_of_several_steps(vocabulary: int) -> None:
    """Largest logit, target and the rest in different steps of the kernel's sweep; huge logits; equal logits."""
    from qwench.ops.cross_entropy_triton import cross_entropy_

    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary, device=DEVICE) * 5
    logits[1, 3] = 3e4
    logits[2, -1] = 3e4
    logits[3] = -3e4
    logits[4, 100:] = float("-inf")
    targets = torch.tensor([0, vocabulary - 1, vocabulary - 1, 5, 99, 17_000 % vocabulary], device=DEVICE)
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE)
    leaf = logits.double().requires_grad_()
    want = F.cross_entropy(leaf, targets, reduction="none")
    (want * weights).sum().backward()
    assert leaf.grad is not None
    losses, lse, kept = torch.empty(6, device=DEVICE), torch.empty(6, device=DEVICE), logits.clone()
    cross_entropy_(kept, targets, weights, losses, lse, 0.0, with_gradient=False)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    again = torch.empty_like(losses)
    cross_entropy_(kept, targets, weights, again, lse, 0.0, with_gradient=True)
    assert torch.equal(again, losses)
    torch.testing.assert_close(kept.double(), leaf.grad, rtol=1e-5, atol=1e-9)


@needs_kernels
def test_rows_with_a_stride_and_nan() -> None:
    """The kernel stays inside its rows, and a logit that is not a number gives a loss that is not one."""
    from qwench.ops.cross_entropy_triton import cross_entropy_

    wide = torch.zeros(3, 72, device=DEVICE)
    wide[1, 7] = float("nan")
    losses, lse, ones = torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE), torch.ones(3, device=DEVICE)
    targets = torch.tensor([0, 1, 69], device=DEVICE)
    cross_entropy_(wide[:, :70], targets, ones, losses, lse, 0.0, with_gradient=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert float(losses[0]) == pytest.approx(float(torch.log(torch.tensor(70.0))))
    assert torch.equal(wide[:, 70:], torch.zeros(3, 2, device=DEVICE))
    assert float(wide[0, :70].sum()) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_losses_by_token(name: str) -> None:
    values = inputs()
    with forced({"cross_entropy": name}):
        loss, losses = linear_cross_entropy_by_token(*values, z_loss=0.5)
    assert not losses.requires_grad
    want = F.cross_entropy(values[0] @ values[1].t(), values[2], reduction="none")
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    assert float(loss) > float((losses * values[3]).sum())


@pytest.mark.parametrize("name", FAST)
def test_evaluation_computes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters want gradients, but under no_grad the logits stay logits and no gradient is allocated."""
    values = inputs()
    hidden, weight = (x.requires_grad_() for x in values[:2])
    with forced({"cross_entropy": name}):
        want = linear_cross_entropy(*values)
        monkeypatch.setattr(cross_entropy, "add_product_", None)
        monkeypatch.setattr(torch, "empty_like", _only_vectors(torch.empty_like))
        monkeypatch.setattr(torch, "zeros_like", _only_vectors(torch.zeros_like))
        with torch.no_grad():
            loss = linear_cross_entropy(*values)
    assert not loss.requires_grad
    assert torch.equal(loss, want.detach())
    assert hidden.grad is None
    assert weight.grad is None


def _only_vectors(function):
    def call(x: Tensor, **options) -> Tensor:
        assert x.ndim < 2, "a gradient was allocated"
        return function(x, **options)

    return call


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(name: str, which: int) -> None:
    """A frozen output layer, or frozen activations."""
    values = inputs()
    want = gradients("reference", values, 0.0)[1 + which]
    leaf = values[which] = values[which].requires_grad_()
    with forced({"cross_entropy": name}):
        linear_cross_entropy(*values).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_gradients_are_given_away_once(name: str) -> None:
    values = inputs()
    values[0].requires_grad_()
    with forced({"cross_entropy": name}):
        loss = linear_cross_entropy(*values)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        loss.backward()


def test_chunk_sizes() -> None:
    assert triton_chunk_tokens(65_536, 151_936, 2) == 4096
    assert triton_chunk_tokens(65_536, 152_064, 2) == 4096
    assert triton_chunk_tokens(65_536, 151_936, 4) == 65_536 // 32
    assert triton_chunk_tokens(5_000, 151_936, 2) == 2560  # two chunks of nearly the same size, not 4,096 and 904
    assert triton_chunk_tokens(100, 151_936, 2) == 256
    for num_tokens in (1, 255, 8193, 40_000):
        size = triton_chunk_tokens(num_tokens, 151_936, 2)
        assert size % 256 == 0
        assert size * 151_936 * 2 <= cross_entropy.CHUNK_BYTES


@pytest.mark.gpu
def test_sum_in_fp32() -> None:
    """Products of bf16 factors are added to an fp32 sum without being rounded between."""
    torch.manual_seed(0)
    a, b = (torch.randn(256, 4096, device="cuda").bfloat16() for _ in range(2))
    total = torch.zeros(256, 256, device="cuda")
    for step in range(0, 4096, 512):
        cross_entropy.add_product_(total, a[:, step : step + 512], b[:, step : step + 512].t(), first=step == 0)
    want = a.double() @ b.double().t()
    assert float((total.double() - want).norm() / want.norm()) < 1e-6
