"""Tensor parallelism with sequence parallelism for training, applied from outside to a built decoder.

    apply_tensor(model, group)            # every parameter becomes this rank's part, by plan.TRAINING_PLAN
    hidden = model(tokens_T, positions_T, meta)
    loss, losses_T = vocabulary.token_losses(model, hidden, targets_T, loss_weights_T)
    loss.backward()
    sum_gradients(model, tensor=group)

All ranks of the group get the same tokens and compute the same loss. Between blocks rank r of R has the r-th run of
T / R tokens: norms, residuals and the hidden states of the result. Before q, k, v and gate, up the tokens of all ranks
are gathered; after o and down the ranks' products are summed, and each keeps its run [Korthikanti et al. 2022]. Context
parallelism changes nothing in the model: see `context.py`. Parameters stay plain tensors, so FSDP goes on top.

For inference see `tensor.py`, where all ranks have all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwench.model.decoder import MLP, Attention, CausalLM, Linear, RMSNorm
from qwench.ops.norm import rms_norm
from qwench.ops.swiglu import swiglu as swiglu_op
from qwench.parallel.blocks import local_part
from qwench.parallel.plan import TRAINING_PLAN, check, shard, split_of
from qwench.parallel.sequence import TokenGroup, gather_linear, linear_scatter
from qwench.parallel.vocabulary import VocabularyEmbedding, VocabularyHead


class ColumnLinear(Linear):
    """A linear layer whose outputs are cut over the ranks: a run of tokens in, some outputs of all tokens out."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, ranks: TokenGroup) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight, self.bias, self._ranks = weight, bias, ranks

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """[T / R, K] -> [T, N / R]: the norm of the rank's own tokens, then gathered; else as `Linear`."""
        assert residual is None, "a residual has all outputs"
        x = input if norm is None else rms_norm(input, norm.weight, norm.eps)
        y_TN = gather_linear(x, self.weight, self.bias, self._ranks)
        return swiglu_op(y_TN) if swiglu else y_TN


class RowLinear(Linear):
    """A linear layer whose inputs are cut over the ranks: the products are summed, and each rank keeps its tokens."""

    def __init__(self, weight: nn.Parameter, ranks: TokenGroup) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self._ranks = weight, ranks

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K / R] -> [T / R, N], plus the residual of these tokens."""
        assert norm is None, "a norm needs all inputs"
        assert not swiglu
        y = linear_scatter(input, self.weight, self._ranks)
        return y if residual is None else residual + y


def apply_tensor(model: CausalLM, group: dist.ProcessGroup) -> None:
    """Cut a whole model over the ranks of `group`, in place, values and all; on the meta device shapes alone.

    `model.config` stays the whole model's. Parameters are new objects under the same names: make the optimiser and
    FSDP's shards afterwards. Raises ValueError for a model that does not split or is cut already.
    """
    ranks, config = TokenGroup.of(group), model.config
    check(config, ranks.size, TRAINING_PLAN)
    if isinstance(model.lm_head, VocabularyHead):
        raise ValueError("the model is cut over a tensor-parallel group already; build it anew to cut it otherwise")
    if ranks.size == 1:
        return

    def local(name: str) -> nn.Parameter:
        whole = model.get_parameter(name)
        with torch.no_grad():
            part = shard(name, whole, config, ranks.rank, ranks.size, TRAINING_PLAN)
        return nn.Parameter(part, requires_grad=whole.requires_grad)

    for number, layer in enumerate(model.model.layers):
        attention, mlp, prefix = layer.get_submodule("self_attn"), layer.get_submodule("mlp"), f"model.layers.{number}."
        assert isinstance(attention, Attention)
        assert isinstance(mlp, MLP)
        q_heads, k_heads, v_heads = (heads // ranks.size for heads in attention.heads)
        attention.heads = (q_heads, k_heads, v_heads)
        bias = local(f"{prefix}self_attn.qkv_proj.bias") if config.qkv_bias else None
        attention.qkv_proj = ColumnLinear(local(f"{prefix}self_attn.qkv_proj.weight"), bias, ranks)
        attention.o_proj = RowLinear(local(f"{prefix}self_attn.o_proj.weight"), ranks)
        mlp.gate_up_proj = ColumnLinear(local(f"{prefix}mlp.gate_up_proj.weight"), None, ranks)
        mlp.down_proj = RowLinear(local(f"{prefix}mlp.down_proj.weight"), ranks)
    embedding = local("model.embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else local("lm_head.weight")
    model.model.embed_tokens, model.lm_head = VocabularyEmbedding(embedding, ranks), VocabularyHead(head, ranks)


@torch.no_grad()
def sum_gradients(
    model: CausalLM, tensor: dist.ProcessGroup | None = None, context: dist.ProcessGroup | None = None
) -> None:
    """Once a step, after the last backward pass: sum what the ranks have of one parameter's gradient, in place.

    Over `tensor` those of the parameters that are not cut, each rank's being of its own tokens only. Over `context`
    all, unless FSDP's groups already contain the context ranks: then leave it out. Gradients may be FSDP's DTensors.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if tensor is not None and tensor.size() > 1:
        _sum([local_part(grad) for name, grad in named if split_of(name, TRAINING_PLAN).axis is None], tensor)
    if context is not None and context.size() > 1:
        _sum([local_part(grad) for _, grad in named], context)


SMALL = 1 << 20
"""Elements below which gradients are summed together, as one tensor."""


def _sum(grads: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    large = [grad for grad in grads if grad.numel() >= SMALL and grad.is_contiguous()]
    works = [dist.all_reduce(grad, group=group, async_op=True) for grad in large]
    small = [grad for grad in grads if grad.numel() < SMALL or not grad.is_contiguous()]
    if small:
        flat = torch.cat([grad.flatten() for grad in small])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(small, flat.split([grad.numel() for grad in small]), strict=True):
            grad.copy_(total.view_as(grad))
    for work in works:
        assert work is not None
        work.wait()
