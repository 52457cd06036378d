"""Parameter names: ours in memory against Hugging Face's, Qwen-1's and GGUF's on disk.

In memory q, k, v are one matrix and gate, up another; on disk they are whatever the format says. Every difference is a
matter of rows, so one table per format is enough: our parameter -> the stored tensors whose rows, put one below the
other, make it. This file holds no tensors and reads no files. [Qwen code], [HF modeling_qwen2], llama.cpp's "qwen2".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwench.model.config import ModelConfig

Layout = Literal["qwench", "hf", "qwen1", "gguf"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor that is a run of rows of one of our parameters."""

    name: str
    shape: tuple[int, ...]


# Names inside a layer: ours -> (stored name, which rows). "q", "k", "v", "gate", "up" are parts, "" is the whole.
_HF = {
    "input_layernorm.weight": (("input_layernorm.weight", ""),),
    "self_attn.qkv_proj.weight": tuple((f"self_attn.{part}_proj.weight", part) for part in "qkv"),
    "self_attn.qkv_proj.bias": tuple((f"self_attn.{part}_proj.bias", part) for part in "qkv"),
    "self_attn.o_proj.weight": (("self_attn.o_proj.weight", ""),),
    "post_attention_layernorm.weight": (("post_attention_layernorm.weight", ""),),
    "mlp.gate_up_proj.weight": (("mlp.gate_proj.weight", "gate"), ("mlp.up_proj.weight", "up")),
    "mlp.down_proj.weight": (("mlp.down_proj.weight", ""),),
}
_QWEN1 = {
    "input_layernorm.weight": (("ln_1.weight", ""),),
    "self_attn.qkv_proj.weight": (("attn.c_attn.weight", ""),),
    "self_attn.qkv_proj.bias": (("attn.c_attn.bias", ""),),
    "self_attn.o_proj.weight": (("attn.c_proj.weight", ""),),
    "post_attention_layernorm.weight": (("ln_2.weight", ""),),
    # Qwen-1 computes w1(x) * silu(w2(x)): the gate is w2.
    "mlp.gate_up_proj.weight": (("mlp.w2.weight", "gate"), ("mlp.w1.weight", "up")),
    "mlp.down_proj.weight": (("mlp.c_proj.weight", ""),),
}
_GGUF = {
    "input_layernorm.weight": (("attn_norm.weight", ""),),
    "self_attn.qkv_proj.weight": tuple((f"attn_{part}.weight", part) for part in "qkv"),
    "self_attn.qkv_proj.bias": tuple((f"attn_{part}.bias", part) for part in "qkv"),
    "self_attn.o_proj.weight": (("attn_output.weight", ""),),
    "post_attention_layernorm.weight": (("ffn_norm.weight", ""),),
    "mlp.gate_up_proj.weight": (("ffn_gate.weight", "gate"), ("ffn_up.weight", "up")),
    "mlp.down_proj.weight": (("ffn_down.weight", ""),),
}
_LAYER = {"qwench": {name: ((name, ""),) for name in _HF}, "hf": _HF, "qwen1": _QWEN1, "gguf": _GGUF}
_LAYER_PREFIX = {
    "qwench": "model.layers.{}.",
    "hf": "model.layers.{}.",
    "qwen1": "transformer.h.{}.",
    "gguf": "blk.{}.",
}
# Embedding, final norm, output matrix.
_OUTER = {
    "qwench": ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    "hf": ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    "qwen1": ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
    "gguf": ("token_embd.weight", "output_norm.weight", "output.weight"),
}


def pieces(config: ModelConfig, layout: Layout) -> dict[str, tuple[Piece, ...]]:
    """Our parameter name -> its stored pieces from the first row to the last, for every parameter of the model.

    A tied output matrix is no parameter of its own, so it is in no table. Raises ValueError for a MoE model.
    """
    if config.num_experts:
        raise ValueError(f"the model has {config.num_experts} experts; this version reads and writes dense models")
    shapes = dict(_layer_shapes(config))
    parts = _part_rows(config)
    table: dict[str, tuple[Piece, ...]] = {}
    embedding, norm, head = _OUTER["qwench"]
    stored_embedding, stored_norm, stored_head = _OUTER[layout]
    matrix = (config.vocab_size, config.hidden_size)
    table[embedding] = (Piece(stored_embedding, matrix),)
    for layer in range(config.num_hidden_layers):
        prefix, stored_prefix = _LAYER_PREFIX["qwench"].format(layer), _LAYER_PREFIX[layout].format(layer)
        for ours, shape in shapes.items():
            table[prefix + ours] = tuple(
                Piece(stored_prefix + name, (parts.get(part, shape[0]), *shape[1:]))
                for name, part in _LAYER[layout][ours]
            )
    table[norm] = (Piece(stored_norm, (config.hidden_size,)),)
    if not config.tie_word_embeddings:
        table[head] = (Piece(stored_head, matrix),)
    return table


def head_name(layout: Layout) -> str:
    """Stored name of the output matrix."""
    return _OUTER[layout][2]


def embedding_name(layout: Layout) -> str:
    """Stored name of the embedding matrix."""
    return _OUTER[layout][0]


def _part_rows(config: ModelConfig) -> dict[str, int]:
    q, kv = config.num_attention_heads * config.d_head, config.num_key_value_heads * config.d_head
    return {"q": q, "k": kv, "v": kv, "gate": config.intermediate_size, "up": config.intermediate_size}


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F = config.hidden_size, config.intermediate_size
    rows = _part_rows(config)
    qkv = rows["q"] + rows["k"] + rows["v"]
    yield "input_layernorm.weight", (D,)
    yield "self_attn.qkv_proj.weight", (qkv, D)
    if config.qkv_bias:
        yield "self_attn.qkv_proj.bias", (qkv,)
    yield "self_attn.o_proj.weight", (D, rows["q"])
    yield "post_attention_layernorm.weight", (D,)
    yield "mlp.gate_up_proj.weight", (2 * F, D)
    yield "mlp.down_proj.weight", (D, F)
