"""The shape of a model: one record for every size of Qwen, Qwen1.5, Qwen2 and Qwen2.5, code, math and MoE included.

Field names are Hugging Face's. This file knows `config.json` of both layouts (`Qwen2Config` and Qwen-1's `QWenConfig`)
in and out; it holds no weights and needs no torch. Published sizes are in `presets/`, parameter counts in `flops.py`.

Sources: [Qwen TR 2.3], [Qwen2 TR 2.2], [Qwen2.5 TR 2] and the published config files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from qwench.config import config, from_dict

Generation = Literal["qwen", "qwen2"]


@config
class ModelConfig:
    """Dimensions and constants of a decoder. Defaults are those that almost every published file shares.

    >>> ModelConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    ...             num_key_value_heads=2, tie_word_embeddings=True)     # Qwen2.5-0.5B
    """

    vocab_size: int = 151936
    """Rows of the embedding and of the output matrix (the tokenizer's size, padded)."""
    hidden_size: int
    """Width of the residual stream, D."""
    intermediate_size: int
    """Width of the dense feed-forward layer, F (of one matrix: gate and up are F rows each)."""
    num_hidden_layers: int
    num_attention_heads: int
    """Query heads, Hq."""
    num_key_value_heads: int
    """Key/value heads, Hk; equal to num_attention_heads, or a divisor of it for grouped queries."""
    head_dim: int | None = None
    """Size of one head; unset means hidden_size / num_attention_heads. Read `d_head`, which is always a number."""
    tie_word_embeddings: bool = False
    """The output matrix is the embedding matrix (published: sizes up to 3B of Qwen2 and Qwen2.5, 0.5B of Qwen1.5)."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    """Length extension as in config.json: {rope_type = "yarn", factor = 4.0, original_max_position_embeddings = N}."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    """Positions served without length extension, in tokens."""
    qkv_bias: bool = True
    """q, k and v have biases [Qwen TR 2.3]; no other projection has one."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    use_sliding_window: bool = False
    sliding_window: int | None = None
    """Window in tokens of the layers from max_window_layers on; without effect unless use_sliding_window."""
    max_window_layers: int | None = None
    """Layers below this index keep full attention; unset means all of them do."""
    dual_chunk_attention_config: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    """Dual chunk attention of the 1M models, as in config.json."""

    num_experts: int = 0
    """Routed experts of a MoE layer; 0 is a dense model [Qwen2 TR 2.2.2]."""
    num_experts_per_tok: int = 0
    """Routed experts that see a token."""
    moe_intermediate_size: int = 0
    """Width of one routed expert."""
    shared_expert_intermediate_size: int = 0
    """Width of all always-on experts together (one fused MLP); 0 is none."""
    norm_topk_prob: bool = False
    """Divide the chosen experts' weights by their sum."""
    decoder_sparse_step: int = 1
    """Every decoder_sparse_step-th layer is a MoE layer."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers that stay dense in a MoE model."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss."""

    seq_length: int | None = None
    """Qwen-1: training length in tokens, from which dynamic NTK and LogN scaling start. Unset in all others."""
    use_dynamic_ntk: bool = False
    """Qwen-1: enlarge the rotary base at inference beyond seq_length."""
    use_logn_attn: bool = False
    """Qwen-1: scale queries by log(position) / log(seq_length) at inference beyond seq_length."""

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    """Published: <|endoftext|> (151643) in base models, <|im_end|> (151645) in chat models."""

    def __post_init__(self) -> None:
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"]
        positive += ["head_dim", "sliding_window", "seq_length", "decoder_sparse_step"]
        if self.num_experts:
            positive += ["num_experts_per_tok", "moe_intermediate_size"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; give a positive number")
        negative = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
        for name in [*negative, "initializer_range", "router_aux_loss_coef", "max_window_layers"]:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; give 0 or a positive number")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them or give head_dim"
            )
        if self.d_head % 2:
            raise ValueError(f"the head size is {self.d_head}; rotary positions need an even head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}; every key/value head serves equally many queries"
            )
        if self.use_sliding_window and self.sliding_window is None:
            raise ValueError("use_sliding_window is true but sliding_window is unset; give the window in tokens")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if (self.use_dynamic_ntk or self.use_logn_attn) and self.seq_length is None:
            raise ValueError("use_dynamic_ntk and use_logn_attn need seq_length, the training length in tokens")

    # ------------------------------------------------------------------------------------------------------- derived
    @property
    def d_head(self) -> int:
        """Size of one attention head, d."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def generation(self) -> Generation:
        """Whose rules hold: "qwen" for Qwen-1 (seq_length is set), "qwen2" for Qwen1.5, Qwen2 and Qwen2.5 alike."""
        return "qwen2" if self.seq_length is None else "qwen"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def is_moe_layer(self, layer: int) -> bool:
        """Layer `layer` (from 0) has experts instead of a dense feed-forward layer."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def window(self, layer: int) -> int | None:
        """Attention window of a layer in tokens, or None for full attention."""
        full = self.num_hidden_layers if self.max_window_layers is None else self.max_window_layers
        return self.sliding_window if self.use_sliding_window and layer >= full else None

    # --------------------------------------------------------------------------------------------------- config.json
    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any]) -> ModelConfig:
        """From a config.json of Qwen2, Qwen2-MoE or Qwen-1 (whose intermediate_size counts both matrices).

        Missing keys get Hugging Face's defaults. Raises ValueError for another architecture, quantised weights, or
        anything that this decoder would compute differently.
        """
        table = dict(config_json)
        kind = table.get("model_type")
        if kind not in ("qwen", "qwen2", "qwen2_moe"):
            raise ValueError(f"config.json says model_type {kind!r}; qwench reads qwen, qwen2 and qwen2_moe")
        if table.get("quantization_config") is not None:
            method = table["quantization_config"].get("quant_method", "an unnamed method")
            raise ValueError(f"the weights are quantised with {method}; load the unquantised checkpoint or a GGUF file")
        try:
            known = _from_qwen1(table) if kind == "qwen" else _from_qwen2(table)
        except KeyError as error:
            raise ValueError(f"config.json has no {error.args[0]!r}, which a {kind} model needs") from None
        return from_dict(cls, known)

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json for `Qwen2ForCausalLM` (or `Qwen2MoeForCausalLM`), without `torch_dtype`.

        Keys of Qwen-1 that Hugging Face's class has no use for are written only when set, so nothing is lost.
        """
        if not self.qkv_bias and not self.num_experts:
            raise ValueError("Qwen2ForCausalLM always has q/k/v biases; a model with qkv_bias=false has no such file")
        table: dict[str, Any] = {
            "architectures": ["Qwen2MoeForCausalLM" if self.num_experts else "Qwen2ForCausalLM"],
            "model_type": "qwen2_moe" if self.num_experts else "qwen2",
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers if self.max_window_layers is None else self.max_window_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "use_sliding_window": self.use_sliding_window,
            "vocab_size": self.vocab_size,
        }
        if self.head_dim is not None:
            table["head_dim"] = self.head_dim
        if self.dual_chunk_attention_config is not None:
            table["dual_chunk_attention_config"] = self.dual_chunk_attention_config
        if self.num_experts:
            table |= {name: getattr(self, name) for name in _MOE_KEYS}
            table |= {"mlp_only_layers": list(self.mlp_only_layers), "qkv_bias": self.qkv_bias}
        if self.seq_length is not None:
            table |= {name: getattr(self, name) for name in _QWEN1_KEYS}
        return table

    def to_qwen1(self) -> dict[str, Any]:
        """The content of config.json for Qwen-1's `QWenLMHeadModel`, without the precision flags.

        Raises ValueError where Qwen-1 has no such structure (grouped queries, tied embeddings, experts, ...).
        """
        obstacles = {
            "grouped key/value heads": self.num_key_value_heads != self.num_attention_heads,
            "tied embeddings": self.tie_word_embeddings,
            "no q/k/v biases": not self.qkv_bias,
            "experts": self.num_experts > 0,
            "a sliding window": self.use_sliding_window,
            "rope_scaling": self.rope_scaling is not None,
            "dual chunk attention": self.dual_chunk_attention_config is not None,
            "heads that do not fill hidden_size": self.num_attention_heads * self.d_head != self.hidden_size,
        }
        if found := [name for name, present in obstacles.items() if present]:
            raise ValueError(
                f"the model has {' and '.join(found)}, which the Qwen-1 layout cannot express; convert to hf"
            )
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "model_type": "qwen",
            "attn_dropout_prob": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "emb_dropout_prob": 0.0,
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": 2 * self.intermediate_size,
            "kv_channels": self.d_head,
            "layer_norm_epsilon": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "no_bias": True,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "onnx_safe": None,
            "rotary_emb_base": self.rope_theta,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": self.seq_length or self.max_position_embeddings,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "use_cache": True,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_flash_attn": "auto",
            "use_logn_attn": self.use_logn_attn,
            "vocab_size": self.vocab_size,
        }


_MOE_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "router_aux_loss_coef",
)
_QWEN1_KEYS = ("seq_length", "use_dynamic_ntk", "use_logn_attn")
_SAME_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def _from_qwen2(table: dict[str, Any]) -> dict[str, Any]:
    if table.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json has hidden_act {table['hidden_act']!r}; the Qwen decoder uses silu")
    if table.get("attention_dropout", 0.0):
        raise ValueError(f"config.json has attention_dropout {table['attention_dropout']}; set it to 0.0, as Qwen does")
    known = {name: table[name] for name in ("vocab_size", "intermediate_size", *_SAME_KEYS)}
    known["num_key_value_heads"] = table.get("num_key_value_heads") or table["num_attention_heads"]
    # Files written by transformers 5 keep the rotary base and its scaling in one table, `rope_parameters`.
    rope = dict(table.get("rope_parameters") or table.get("rope_scaling") or {})
    known["rope_theta"] = table.get("rope_theta") or rope.get("rope_theta") or 10000.0
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        known["rope_scaling"] = {key: item for key, item in rope.items() if key != "rope_theta"}
    for name in ("head_dim", "sliding_window", "max_window_layers", "dual_chunk_attention_config"):
        known[name] = table.get(name)
    for name in ("bos_token_id", "eos_token_id"):
        known[name] = table.get(name)
    optional = ["tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "initializer_range"]
    optional += ["use_sliding_window", *_QWEN1_KEYS]
    if table["model_type"] == "qwen2_moe":
        known |= {name: table[name] for name in _MOE_KEYS[:4]}
        known["mlp_only_layers"] = table.get("mlp_only_layers") or ()
        optional += [*_MOE_KEYS[4:], "qkv_bias"]
    known |= {name: table[name] for name in optional if table.get(name) is not None}
    if not known.get("use_sliding_window"):
        # The numbers are in every published file without effect; one spelling of "no window" keeps configs comparable.
        known["sliding_window"] = known["max_window_layers"] = None
    return known


def _from_qwen1(table: dict[str, Any]) -> dict[str, Any]:
    if not table.get("no_bias", True):
        raise ValueError("config.json has no_bias false; published Qwen models have biases on q, k and v only")
    if table.get("rotary_pct", 1.0) != 1.0:
        raise ValueError(f"config.json has rotary_pct {table['rotary_pct']}; published Qwen models rotate whole heads")
    if not table.get("scale_attn_weights", True):
        raise ValueError("config.json has scale_attn_weights false; published Qwen models scale attention by head size")
    if table["intermediate_size"] % 2:
        raise ValueError(f"intermediate_size is {table['intermediate_size']}; Qwen-1 counts w1 and w2, so it is even")
    known = {name: table[name] for name in ("vocab_size", *_SAME_KEYS)}
    known["num_key_value_heads"] = table["num_attention_heads"]
    known["intermediate_size"] = table["intermediate_size"] // 2
    size = table["hidden_size"] // table["num_attention_heads"]
    channels = table.get("kv_channels", size)
    known["head_dim"] = None if channels == size else channels
    known["seq_length"] = table["seq_length"]
    known["max_position_embeddings"] = table.get("max_position_embeddings", table["seq_length"])
    renamed = {"rope_theta": ("rotary_emb_base", 10000.0), "rms_norm_eps": ("layer_norm_epsilon", 1e-6)}
    known |= {ours: table.get(theirs, default) for ours, (theirs, default) in renamed.items()}
    for name in ("initializer_range", "use_dynamic_ntk", "use_logn_attn", "tie_word_embeddings"):
        if table.get(name) is not None:
            known[name] = table[name]
    for name in ("bos_token_id", "eos_token_id"):
        known[name] = cast("int | None", table.get(name))
    return known
