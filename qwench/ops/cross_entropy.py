"""The output layer and its loss in one operation, so that the logits of all tokens never exist at once.

The vocabulary of 151,936 rows makes the logits the largest tensor of a small model by far: 32k tokens in fp32 take
19.9 GB. Here tokens go through in chunks; each chunk's gradients are formed while its logits are at hand, so nothing
is kept or recomputed for the backward pass, which only scales.

Shape suffixes: T tokens, D hidden size, V vocabulary rows, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops.dispatch import Implementation, Operation

CHUNK_LOGITS = 1 << 25
"""Logits held at once (elements): 128 MiB in fp32."""


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor) -> Tensor:
    """Weighted sum over tokens of -log softmax(hidden @ weight.T)[target], an fp32 scalar.

    hidden in any float dtype, weight in its own (cast to hidden's for the product), targets int64, loss_weights fp32;
    tokens of weight 0 cost nothing in the result, their target may be any valid row. Softmax in fp32.
    Differentiable in hidden and weight.
    """
    return CROSS_ENTROPY.choose(hidden_TD.device)(hidden_TD, weight_VD, targets_T, loss_weights_T)


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


def _reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor) -> Tensor:
    logits_TV = F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype)).float()
    return (F.cross_entropy(logits_TV, targets_T, reduction="none") * loss_weights_T).sum()


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor) -> Tensor:
        cast_VD = weight_VD.to(hidden_TD.dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        step = chunk_rows(weight_VD.shape[0])
        for start in range(0, hidden_TD.shape[0], step):
            rows = slice(start, start + step)
            hidden_CD, targets_C1 = hidden_TD[rows], targets_T[rows, None]
            logits_CV = F.linear(hidden_CD, cast_VD)
            probs_CV = logits_CV.softmax(-1, dtype=torch.float32)
            # log sum exp = max - log(largest probability): exact where the target's own probability underflows.
            lse_C = logits_CV.amax(-1).float() - probs_CV.amax(-1).log()
            target_logits_C = logits_CV.gather(1, targets_C1)[:, 0].float()
            loss += ((lse_C - target_logits_C) * loss_weights_T[rows]).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = w * (softmax - onehot), written over the logits; w joins on the narrow side.
            probs_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=torch.float32))
            d_logits_CV = logits_CV.copy_(probs_CV)
            weights_C1 = loss_weights_T[rows, None]
            if d_hidden_TD is not None:
                d_hidden_TD[rows] = (d_logits_CV @ cast_VD) * weights_C1
            if d_weight_VD is not None:
                d_weight_VD += d_logits_CV.t() @ (hidden_CD * weights_C1).to(hidden_CD.dtype)
        ctx.save_for_backward(d_hidden_TD, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        return (
            None if d_hidden_TD is None else d_hidden_TD * d_loss.to(d_hidden_TD.dtype),
            None if d_weight_VD is None else (d_weight_VD * d_loss).to(ctx.weight_dtype),
            None,
            None,
        )


CROSS_ENTROPY = Operation(
    "cross_entropy",
    [
        Implementation("chunked", _ChunkedLinearCrossEntropy.apply),
        Implementation("reference", _reference),
    ],
)
