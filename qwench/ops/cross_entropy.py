"""The output layer and its loss in one operation, so that the logits of all tokens never exist at once.

The vocabulary of 151,936 rows makes the logits the largest tensor of a small model by far: 32k tokens in fp32 take
19.9 GB. Here tokens go through in chunks; each chunk's gradients are formed while its logits are at hand, so nothing
is kept or recomputed for the backward pass, which only scales.

* "triton" (GPU): a product makes a chunk's logits in the activations' dtype, one kernel turns them in place into their
  own gradient (`ops.cross_entropy_triton`), two products make the gradients of hidden and weight, the latter summed
  over chunks in fp32 by the product itself.
* "chunked" is the same in plain PyTorch.

Without a gradient (evaluation) only the first product and the losses are computed.

Shape suffixes: T tokens, D hidden size, V vocabulary rows, C tokens of one chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import triton_launch
from qwench.ops.dispatch import Implementation, Operation

CHUNK_LOGITS = 1 << 25
"""Logits that "chunked" and `token_logprobs` hold at once (elements): 128 MiB in fp32."""
CHUNK_TOKENS = 4096
"""Most tokens of a chunk of "triton". Each chunk reads and writes the fp32 gradient of the weight once: 8 V D bytes
beside 6 C V D operations, on an H200 (4.27 TB/s, 684 TFLOP/s) at most 214 / C of the products' time. Measured there,
16,384 x 896 x 151,936: 24.6 ms and 1.4 GiB with 4,096 tokens, 25.4 ms and 2.6 GiB with 8,192."""
CHUNK_BYTES = 5 << 28
"""Most bytes of logits of a chunk of "triton": 1.25 GiB, what 4,096 tokens x 152,064 in bf16 need."""
CHUNK_MULTIPLE = 256
"""Chunks are multiples of this many tokens, the tallest tile of the products."""


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Weighted sum over tokens of -log softmax(hidden @ weight.T)[target] + z_loss * (log sum exp)^2, an fp32 scalar.

    hidden in any float dtype, weight in its own (cast to hidden's for the product), targets int64, loss_weights fp32;
    tokens of weight 0 cost nothing in the result, their target may be any valid row. Softmax in fp32.
    Differentiable in hidden and weight; gradients can be taken once. A result whose own gradient is 1 (weights that
    include every factor) spares the GPU a pass over the weight's gradient.
    """
    return linear_cross_entropy_by_token(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss)[0]


def linear_cross_entropy_by_token(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(what `linear_cross_entropy` returns, each token's cross-entropy in nats [T] fp32).

    The latter has neither weight nor z-loss in it and no gradient: for records by source.
    """
    run = CROSS_ENTROPY.choose(hidden_TD.device)
    return run(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss)


def token_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """[T] fp32 log-probabilities of the targets, without gradient, in chunks."""
    outs = []
    with torch.no_grad():
        weight_VD = weight_VD.to(hidden_TD.dtype)
        step = chunk_rows(weight_VD.shape[0])
        for hidden_CD, targets_C in zip(hidden_TD.split(step), targets_T.split(step), strict=True):
            logits_CV = F.linear(hidden_CD, weight_VD).float()
            outs.append(-F.cross_entropy(logits_CV, targets_C, reduction="none"))
    return torch.cat(outs)


def chunk_rows(num_rows: int) -> int:
    return max(1, CHUNK_LOGITS // num_rows)


def triton_chunk_tokens(num_tokens: int, vocabulary: int, itemsize: int) -> int:
    """Tokens of a chunk of "triton": chunks of nearly equal size, as few as the bounds above allow."""
    fits = CHUNK_BYTES // (vocabulary * itemsize) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    most = max(CHUNK_MULTIPLE, min(CHUNK_TOKENS, fits))
    num_chunks = max(1, -(-num_tokens // most))
    return -(-num_tokens // (num_chunks * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE


def _reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits_TV = F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype)).float()
    losses_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    total_T = losses_T + z_loss * logits_TV.logsumexp(-1).square() if z_loss else losses_T
    return (total_T * loss_weights_T).sum(), losses_T.detach()


def _weighted(losses_T: Tensor, logsumexp_T: Tensor, loss_weights_T: Tensor, z_loss: float) -> Tensor:
    total_T = losses_T.addcmul(logsumexp_T, logsumexp_T, value=z_loss) if z_loss else losses_T
    return (total_T * loss_weights_T).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        loss_weights_T: Tensor,
        z_loss: float,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        cast_VD = weight_VD.to(hidden_TD.dtype)
        want_hidden, want_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        d_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        losses_T = torch.empty(hidden_TD.shape[0], dtype=torch.float32, device=hidden_TD.device)
        logsumexp_T = torch.empty_like(losses_T)
        step = chunk_rows(weight_VD.shape[0])
        for start in range(0, hidden_TD.shape[0], step):
            rows = slice(start, start + step)
            hidden_CD, targets_C1 = hidden_TD[rows], targets_T[rows, None]
            logits_CV = F.linear(hidden_CD, cast_VD)
            probs_CV = logits_CV.softmax(-1, dtype=torch.float32)
            # log sum exp = max - log(largest probability): exact where the target's own probability underflows.
            lse_C = torch.sub(logits_CV.amax(-1).float(), probs_CV.amax(-1).log(), out=logsumexp_T[rows])
            torch.sub(lse_C, logits_CV.gather(1, targets_C1)[:, 0].float(), out=losses_T[rows])
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = w * (softmax - onehot), written over the logits; w joins on the narrow side.
            if z_loss:
                probs_CV.mul_((1 + 2 * z_loss * lse_C)[:, None])
            probs_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=torch.float32))
            d_logits_CV = logits_CV.copy_(probs_CV)
            weights_C1 = loss_weights_T[rows, None]
            if d_hidden_TD is not None:
                d_hidden_TD[rows] = (d_logits_CV @ cast_VD) * weights_C1
            if d_weight_VD is not None:
                d_weight_VD += d_logits_CV.t() @ (hidden_CD * weights_C1).to(hidden_CD.dtype)
        ctx.mark_non_differentiable(losses_T)
        ctx.gradients, ctx.weight_dtype = (d_hidden_TD, d_weight_VD), weight_VD.dtype
        return _weighted(losses_T, logsumexp_T, loss_weights_T, z_loss), losses_T

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden_TD, d_weight_VD = _taken(ctx)
        return (
            None if d_hidden_TD is None else d_hidden_TD * d_loss.to(d_hidden_TD.dtype),
            None if d_weight_VD is None else d_weight_VD.mul_(d_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        loss_weights_T: Tensor,
        z_loss: float,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        from qwench.ops.cross_entropy_triton import cross_entropy_

        num_tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        hidden_TD, targets_T, weights_T = hidden_TD.contiguous(), targets_T.contiguous(), loss_weights_T.contiguous()
        cast_VD = weight_VD.to(hidden_TD.dtype)
        want_hidden, want_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        step = triton_chunk_tokens(num_tokens, vocabulary, hidden_TD.element_size())
        room_CV = hidden_TD.new_empty(min(step, num_tokens), vocabulary)
        d_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if want_weight else None
        losses_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        logsumexp_T = torch.empty_like(losses_T)
        for start in range(0, num_tokens, step):
            rows = slice(start, min(start + step, num_tokens))
            hidden_CD = hidden_TD[rows]
            logits_CV = torch.mm(hidden_CD, cast_VD.t(), out=room_CV[: len(hidden_CD)])
            cross_entropy_(
                logits_CV, targets_T[rows], weights_T[rows], losses_T[rows], logsumexp_T[rows], z_loss,
                with_gradient=want_hidden or want_weight,
            )  # fmt: skip
            if d_hidden_TD is not None:
                torch.mm(logits_CV, cast_VD, out=d_hidden_TD[rows])
            if d_weight_VD is not None:
                add_product_(d_weight_VD, logits_CV.t(), hidden_CD, first=start == 0)
        if d_weight_VD is not None and num_tokens == 0:
            d_weight_VD.zero_()
        ctx.mark_non_differentiable(losses_T)
        ctx.gradients, ctx.weight_dtype = (d_hidden_TD, d_weight_VD), weight_VD.dtype
        return _weighted(losses_T, logsumexp_T, loss_weights_T, z_loss), losses_T

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        from qwench.ops.cross_entropy_triton import scale_

        d_hidden_TD, d_weight_VD = _taken(ctx)
        return (
            None if d_hidden_TD is None else scale_(d_hidden_TD, d_loss),
            None if d_weight_VD is None else scale_(d_weight_VD, d_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def _taken(ctx: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that the forward pass formed, given away: autograd then keeps them instead of a copy."""
    if ctx.gradients is None:
        raise RuntimeError("the gradients of linear_cross_entropy were taken already; compute the loss again")
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


def add_product_(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor, first: bool = False) -> None:
    """sum += a @ b with an fp32 sum, in one product where the device can; `first`: sum = a @ b, its content is ignored.

    a and b share a dtype; in half precision the product is not rounded before it is added.
    """
    if a_MK.dtype == torch.float32:
        torch.addmm(sum_MN, a_MK, b_KN, beta=0 if first else 1, out=sum_MN)
    elif not a_MK.is_cuda:
        torch.addmm(sum_MN, a_MK.float(), b_KN.float(), beta=0 if first else 1, out=sum_MN)
    elif first:
        torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=sum_MN)
    elif adds_to_fp32(a_MK.device, a_MK.dtype):
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32, out=sum_MN)
    else:
        sum_MN += torch.mm(a_MK, b_KN, out_dtype=torch.float32)


@functools.cache
def adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm of half-precision factors adds in place to an fp32 sum: earlier versions of torch refuse the mixed
    dtypes, or ignore what is in `out`."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.full((16, 16), 0.5, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16.5).all())


def _chunked(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    out: Any = _Chunked.apply(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss, torch.is_grad_enabled())
    return out


def _triton(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    out: Any = _Triton.apply(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss, torch.is_grad_enabled())
    return out


CROSS_ENTROPY = Operation(
    "cross_entropy",
    [
        Implementation("triton", _triton, triton_launch.runs_triton),
        Implementation("chunked", _chunked),
        Implementation("reference", _reference),
    ],
)
