"""The embedding and the output layer with its loss, cut by rows of the vocabulary over a tensor-parallel group.

Rank r of R has the r-th run of rows. The embedding looks up the tokens that it has rows for, the ranks' results
are summed. The loss exchanges two numbers a token and rank, the log-sum-exp of the rank's logits and the target's logit
where the rank has it; no logits ever leave their rank, and only those of a chunk of tokens exist at a time.

Shape suffixes: T tokens, S = T / R tokens of this rank, D hidden size, V rows of this rank, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwench.model.decoder import CausalLM, Linear, RMSNorm
from qwench.ops.cross_entropy import (
    add_product_,
    chunk_rows,
    linear_cross_entropy_by_token,
    triton_chunk_tokens,
)
from qwench.ops.dispatch import chosen
from qwench.parallel.sequence import TokenGroup, check_divides, scatter_tokens, start_gather, start_scatter, wait


class VocabularyEmbedding(nn.Embedding):
    """This rank's rows of the embedding."""

    def __init__(self, weight_VD: nn.Parameter, ranks: TokenGroup) -> None:
        super().__init__(weight_VD.shape[0], weight_VD.shape[1], device="meta")
        self.weight = weight_VD
        self._ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [T], the same on all ranks, -> [S, D]. Raises ValueError if T does not divide."""
        check_divides(input.shape[0], self._ranks.size)
        rows_T = input - self._ranks.rank * self.num_embeddings
        elsewhere_T = (rows_T < 0) | (rows_T >= self.num_embeddings)
        x_TD = F.embedding(rows_T.masked_fill(elsewhere_T, 0), self.weight)
        return scatter_tokens(x_TD.masked_fill(elsewhere_T[:, None], 0), self._ranks)


class VocabularyHead(Linear):
    """This rank's rows of the output matrix."""

    def __init__(self, weight_VD: nn.Parameter, ranks: TokenGroup) -> None:
        super().__init__(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
        self.weight = weight_VD
        self._ranks = ranks

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        raise ValueError("a model cut over a tensor-parallel group has no logits; use cross_entropy, or load it whole")

    def cross_entropy(
        self, hidden_SD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The contract of `ops.linear_cross_entropy_by_token` over all tokens and rows, the same on all ranks."""
        ranks, enabled = self._ranks, torch.is_grad_enabled()
        out: Any = _VocabularyCrossEntropy.apply(
            hidden_SD, self.weight, targets_T, loss_weights_T, z_loss, enabled, ranks.rank, ranks.size, ranks.name
        )
        return out


def token_losses(
    model: CausalLM, hidden_TD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy_by_token` of what the model returned, whether the model is cut or whole."""
    if isinstance(model.lm_head, VocabularyHead):
        return model.lm_head.cross_entropy(hidden_TD, targets_T, loss_weights_T, z_loss)
    return linear_cross_entropy_by_token(hidden_TD, model.lm_head.weight, targets_T, loss_weights_T, z_loss)


class _VocabularyCrossEntropy(torch.autograd.Function):
    """As `ops.cross_entropy` does, gradients are formed in the forward pass while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        loss_weights_T: Tensor,
        z_loss: float,
        grad_enabled: bool,
        rank: int,
        size: int,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        gathered = start_gather(hidden_SD, name, size)
        num_tokens, num_rows = hidden_SD.shape[0] * size, weight_VD.shape[0]
        cast_VD = weight_VD.to(hidden_SD.dtype)
        want_hidden, want_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        rows_T = targets_T - rank * num_rows
        here_T = (rows_T >= 0) & (rows_T < num_rows)
        rows_T = rows_T.masked_fill(~here_T, 0)
        losses_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_SD.device)
        total = torch.zeros_like(losses_T[0])
        hidden_TD = wait(gathered)
        d_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        with_triton = chosen(hidden_SD.device)["cross_entropy"] == "triton"
        step = triton_chunk_tokens(num_tokens, num_rows, hidden_SD.element_size()) if with_triton else None
        step = step or chunk_rows(num_rows)
        for start in range(0, num_tokens, step):
            chunk = slice(start, start + step)
            logits_CV = F.linear(hidden_TD[chunk], cast_VD)
            local = (_TritonChunk if with_triton else _Chunk)(logits_CV, rows_T[chunk])
            target_logits_C = torch.where(here_T[chunk], local.target_logits_C, 0)
            # [R, 2, C] of all ranks.
            both = wait(start_gather(torch.stack((local.logsumexp_C, target_logits_C))[None], name, size))
            logsumexp_C, weights_C = both[:, 0].logsumexp(0), loss_weights_T[chunk]
            losses_C = torch.sub(logsumexp_C, both[:, 1].sum(0), out=losses_T[chunk])
            total += ((losses_C + z_loss * logsumexp_C.square()) * weights_C).sum()
            if not (want_hidden or want_weight):
                continue
            # d / d logits = w * ((1 + 2 z lse) * softmax over all ranks - onehot); a rank's softmax times its share of
            # the sum of exponentials is the one over all ranks.
            share_C = (local.logsumexp_C - logsumexp_C).exp_()
            d_logits_CV = local.gradient_(
                weights_C * (1 + 2 * z_loss * logsumexp_C) * share_C, weights_C * here_T[chunk]
            )
            if d_hidden_TD is not None:
                d_hidden_TD[chunk] = d_logits_CV @ cast_VD
            if d_weight_VD is not None:
                add_product_(d_weight_VD, d_logits_CV.t(), hidden_TD[chunk])
        d_hidden_SD = None if d_hidden_TD is None else wait(start_scatter(d_hidden_TD, name, size))
        ctx.mark_non_differentiable(losses_T)
        ctx.gradients, ctx.weight_dtype = (d_hidden_SD, d_weight_VD), weight_VD.dtype
        return total, losses_T

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of the loss were taken already; compute the loss again")
        (d_hidden_SD, d_weight_VD), ctx.gradients = ctx.gradients, None
        return (
            None if d_hidden_SD is None else d_hidden_SD.mul_(d_loss),
            None if d_weight_VD is None else d_weight_VD.mul_(d_loss).to(ctx.weight_dtype),
            *[None] * 7,
        )


class _Chunk:
    """Statistics [C] of one chunk of a rank's logits, then the logits turned into their gradient."""

    def __init__(self, logits_CV: Tensor, rows_C: Tensor) -> None:
        self._logits_CV, self._rows_C1 = logits_CV, rows_C[:, None]
        self._probs_CV = logits_CV.softmax(-1, dtype=torch.float32)
        self.target_logits_C = logits_CV.gather(1, self._rows_C1)[:, 0].float()
        # log sum exp = max - log(largest probability): exact where the target's own probability underflows.
        self.logsumexp_C = logits_CV.amax(-1).float() - self._probs_CV.amax(-1).log()

    def gradient_(self, scale_C: Tensor, target_C: Tensor) -> Tensor:
        """scale * softmax(logits) - target * onehot, written over the logits."""
        targets_C1 = self._probs_CV.gather(1, self._rows_C1) * scale_C[:, None] - target_C[:, None]
        torch.mul(self._probs_CV, scale_C[:, None], out=self._logits_CV)
        return self._logits_CV.scatter_(1, self._rows_C1, targets_C1.to(self._logits_CV.dtype))


class _TritonChunk:
    """The same with the kernel of `ops.cross_entropy_triton`."""

    def __init__(self, logits_CV: Tensor, rows_C: Tensor) -> None:
        from qwench.ops.cross_entropy_triton import cross_entropy_

        self._run, self._logits_CV, self._rows_C = cross_entropy_, logits_CV, rows_C.contiguous()
        self._losses_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
        self.logsumexp_C = torch.empty_like(self._losses_C)
        # Without a gradient the kernel reads no weights: any fp32 [C] will do.
        self._run(logits_CV, self._rows_C, self._losses_C, self._losses_C, self.logsumexp_C, 0.0, with_gradient=False)
        self.target_logits_C = self.logsumexp_C - self._losses_C

    def gradient_(self, scale_C: Tensor, target_C: Tensor) -> Tensor:
        # The kernel writes scale * (softmax - onehot); the targets' logits are put right afterwards.
        self._run(self._logits_CV, self._rows_C, scale_C, self._losses_C, self.logsumexp_C, 0.0, with_gradient=True)
        targets_C1 = ((-self._losses_C).exp() * scale_C - target_C)[:, None]
        return self._logits_CV.scatter_(1, self._rows_C[:, None], targets_C1.to(self._logits_CV.dtype))
