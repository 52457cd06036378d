"""What a model costs: parameters, training FLOPs and KV cache, from its configuration alone.

Formulas, not measurements; nothing here builds a model. [Qwen2.5 TR Table 1] for the counts, [Kaplan 2020, 2.1] for the
6N rule, to which the attention products are added.
"""

from __future__ import annotations

from qwench.model.config import ModelConfig


def num_parameters(config: ModelConfig, *, embedding: bool = True, active: bool = False) -> int:
    """Parameters of the model.

    embedding=False leaves out the embedding and the output matrix, as the reports' "non-embedding" column does.
    active=True counts only the experts that one token visits (the same number for a dense model).
    """
    matrices = 1 if config.tie_word_embeddings else 2
    outer = matrices * config.vocab_size * config.hidden_size if embedding else 0
    layers = sum(_layer_parameters(config, n, active) for n in range(config.num_hidden_layers))
    return outer + layers + config.hidden_size


def _layer_parameters(config: ModelConfig, layer: int, active: bool) -> int:
    D, d = config.hidden_size, config.d_head
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * d
    attention = qkv * D + config.num_attention_heads * d * D + (qkv if config.qkv_bias else 0)
    norms = 2 * D
    if not config.is_moe_layer(layer):
        return attention + norms + 3 * D * config.intermediate_size
    router = config.num_experts * D
    routed = (config.num_experts_per_tok if active else config.num_experts) * 3 * D * config.moe_intermediate_size
    # The shared expert has a gate of one row beside its three matrices.
    shared = 3 * D * config.shared_expert_intermediate_size + D if config.shared_expert_intermediate_size else 0
    return attention + norms + router + routed + shared


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token in a sequence of `seq_len` tokens; a multiply-add counts as two.

    A weight matrix costs 2 FLOPs per weight forward and 4 backward, hence 6 * (active layer weights + output matrix);
    the embedding is a look-up and costs nothing. Under the causal mask a token sees seq_len / 2 positions on average;
    QK^T and PV cost 2 * Hq * d each per position forward and twice that backward, hence
    6 * L * seq_len * Hq * d. Recomputation is not counted, so this is the numerator of model FLOPs utilisation (MFU).
    Layers with a sliding window see at most that many positions.
    """
    width = config.num_attention_heads * config.d_head
    seen = 0.0
    for layer in range(config.num_hidden_layers):
        window = min(config.window(layer) or seq_len, seq_len)
        # The first `window` tokens see half of it on average, all later ones the whole.
        seen += (window * window / 2 + (seq_len - window) * window) / seq_len
    return weight_flops_per_token(config) + 12.0 * width * seen


def weight_flops_per_token(config: ModelConfig) -> float:
    """The part of `training_flops_per_token` that is products with weights; the rest is attention."""
    return 6.0 * (num_parameters(config, embedding=False, active=True) + config.vocab_size * config.hidden_size)


def kv_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of keys and values that one token leaves in the cache; 2 bytes an element is bfloat16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.d_head * bytes_per_element
