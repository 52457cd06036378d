"""The one network: a Qwen decoder over a flat packed token stream, for training, evaluation, RL and serving.

    hidden_TD = model.model(tokens_T, positions_T, meta, caches)      # Decoder: embedding, blocks, final norm
    logits_TV = hidden_TD @ model.lm_head.weight.T                     # applied by the caller, to the rows it needs

Prefill, decoding, packed pretraining and preference pairs differ only in `meta` (see `ops.attention`). The file holds
no collective, no cache policy, no optimiser and no choice of kernel. The q, k, v and the gate, up projections are one
matrix each in memory; `names.py` splits them on disk. Qwen-1 has the same network under other names [Qwen TR 2.3],
[Qwen2 TR 2.2.1].

Shape suffixes: T tokens, D hidden size, H query heads, K key/value heads, F feed-forward width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qwench.model.config import ModelConfig
from qwench.ops.attention import AttnMeta, KVCache, attention
from qwench.ops.linear import linear
from qwench.ops.norm import rms_norm
from qwench.ops.rope import Rope, cached_inverse_frequencies


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, with what stands before and after it in one operation.

    Training keeps fp32 master weights and feeds bf16 activations; the gradients arrive in fp32.
    """

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` or a checkpoint follows. (torch's, without memory, imports its compiler: seconds.)"""

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K] -> [T, N] or, with SwiGLU, [T, N / 2]: norm, product, SwiGLU, + residual. See `ops.linear`."""
        before = (norm.weight, norm.eps) if norm is not None else None
        return linear(input, self.weight, self.bias, norm=before, swiglu=swiglu, residual=residual)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing, as in `Linear`."""


class Attention(nn.Module):
    """x + attention(norm(x)): grouped-query attention with rotary positions, one merged projection in, one out."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.head_size = config.d_head
        self.window = config.window(layer)
        width = sum(self.heads) * self.head_size
        self.qkv_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * self.head_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, norm: RMSNorm, rope: Rope, meta: AttnMeta, cache: KVCache | None = None) -> Tensor:
        heads_THD = self.qkv_proj(x_TD, norm=norm).unflatten(-1, (-1, self.head_size))
        q_THD, k_TKD, v_TKD = heads_THD.split(self.heads, 1)
        out_THD = attention(q_THD, k_TKD, v_TKD, meta, cache, self.window, rope)
        return self.o_proj(out_THD.flatten(1), residual=x_TD)


class MLP(nn.Module):
    """x + down(silu(gate n) * up n) with n = norm(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        return self.down_proj(self.gate_up_proj(x_TD, norm=norm, swiglu=True), residual=x_TD)


class Block(nn.Module):
    """One pre-norm layer: attention, then the feed-forward layer, each with its norm and its residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: Tensor, rope: Rope, meta: AttnMeta, cache: KVCache | None = None) -> Tensor:
        x_TD = self.self_attn(x_TD, self.input_layernorm, rope, meta, cache)
        return self.mlp(x_TD, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: tokens in, hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the activations; None takes the embedding's."""

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, meta: AttnMeta, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Hidden states [T, D] after the final norm.

        tokens_T and positions_T are int64; `caches` has one pair of cache tensors a layer, or is None.
        """
        return self.norm(self.run(self.layers, self.embed(tokens_T), positions_T, meta, caches))

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token ids [T] -> [T, D] in the dtype of the activations."""
        x_TD = self.embed_tokens(tokens_T)
        return x_TD.to(self.compute_dtype or x_TD.dtype)

    def run(
        self,
        layers: Iterable[nn.Module],
        x_TD: Tensor,
        positions_T: Tensor,
        meta: AttnMeta,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """[T, D] through some layers, one after the other; `caches` has one pair each."""
        inv_freq = cached_inverse_frequencies(self.config.rope_theta, self.config.d_head, x_TD.device)
        rope = Rope.at(positions_T, inv_freq, x_TD.dtype)
        for index, layer in enumerate(layers):
            x_TD = layer(x_TD, rope, meta, caches[index] if caches is not None else None)
        return x_TD


class CausalLM(nn.Module):
    """A decoder with its language-model head."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Allocate the parameters without initialising them usefully: follow with `init_weights` or a checkpoint.

        Raises ValueError for a config that this network does not compute.
        """
        super().__init__()
        refuse_unsupported(config)
        self.config = config
        with torch.device("meta"):
            self.model = Decoder(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()
        if dtype is not None:
            self.to(dtype)
        if torch.device(device or "cpu").type != "meta":
            self._allocate(device or "cpu")
            self._tie()

    def _allocate(self, device: torch.device | str) -> None:
        """torch's `to_empty` imports its compiler, which takes seconds."""
        for module in self.modules():
            for name, shape in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(shape.shape, dtype=shape.dtype, device=device)))

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, meta: AttnMeta, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Hidden states [T, D]; see `Decoder.forward`."""
        return self.model(tokens_T, positions_T, meta, caches)

    def head(self, hidden_TD: Tensor) -> Tensor:
        """fp32 logits [T, V] of the given rows."""
        return self.lm_head(hidden_TD).float()

    @torch.inference_mode()
    def logits(self, token_ids_BT: Tensor) -> Tensor:
        """fp32 logits [B, T, V] of B sequences of T tokens, without gradient.

        Raises ValueError when the input is not a 2-D tensor of ids below vocab_size.
        """
        if token_ids_BT.ndim != 2 or token_ids_BT.numel() == 0:
            raise ValueError(f"token_ids has shape {tuple(token_ids_BT.shape)}; give [sequences, tokens], not empty")
        low, high = int(token_ids_BT.min()), int(token_ids_BT.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}; the model has rows 0 to {self.config.vocab_size - 1}"
            )
        num_seqs, seq_len = token_ids_BT.shape
        device = self.model.embed_tokens.weight.device
        tokens_T = token_ids_BT.to(device, torch.int64).flatten()
        positions_T = torch.arange(seq_len, device=device).repeat(num_seqs)
        hidden_TD = self(tokens_T, positions_T, AttnMeta.packed([seq_len] * num_seqs, device))
        return self.head(hidden_TD).unflatten(0, (num_seqs, seq_len))

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Run the activations in `dtype` while the weights stay as they are (mixed precision)."""
        self.model.compute_dtype = dtype


def refuse_unsupported(config: ModelConfig) -> None:
    """Raise ValueError for what the presets describe but this network does not compute."""
    reasons = {
        f"{config.num_experts} experts (MoE)": config.num_experts > 0,
        f"rope_scaling {config.rope_scaling}": config.rope_scaling is not None,
    }
    if found := [reason for reason, present in reasons.items() if present]:
        raise ValueError(f"the model has {' and '.join(found)}; this version runs dense models without rope scaling")
