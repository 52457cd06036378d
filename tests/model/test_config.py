"""ModelConfig: refusals, and config.json in and out against transformers."""

import json

import pytest
from transformers import AutoConfig, Qwen2Config, Qwen2MoeConfig

from qwench.config import dump, from_dict, load
from qwench.model.config import ModelConfig

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_attention_heads=3), "hidden_size 64 is not divisible by num_attention_heads 3"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        (dict(head_dim=7), "head size is 7"),
        (dict(hidden_size=12), "head size is 3"),
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(num_hidden_layers=-1), "num_hidden_layers is -1"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps is 0.0"),
        (dict(rope_theta=float("nan")), "rope_theta is nan"),
        (dict(use_sliding_window=True), "sliding_window is unset"),
        (dict(num_experts=4, num_experts_per_tok=5, moe_intermediate_size=8), "exceeds num_experts 4"),
        (dict(num_experts=4), "num_experts_per_tok is 0"),
        (dict(use_logn_attn=True), "need seq_length"),
        (dict(num_layers=2), "unknown key 'num_layers'; did you mean"),
    ],
)
def test_impossible_configs_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_dict(ModelConfig, TINY | change)


def test_toml_round_trip(tmp_path):
    config = ModelConfig(**TINY, eos_token_id=(1, 2), rope_scaling={"rope_type": "yarn", "factor": 4.0})
    (tmp_path / "m.toml").write_text(dump(config))
    assert load(ModelConfig, [tmp_path / "m.toml"]) == config
    assert len({config, ModelConfig(**TINY)}) == 2, "hashable despite its table"


def test_transformers_reads_what_we_write(tmp_path):
    config = ModelConfig(
        **TINY, head_dim=32, tie_word_embeddings=True, rope_theta=12345.0, rms_norm_eps=1e-5, eos_token_id=(5, 6)
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is Qwen2Config
    assert theirs.rope_parameters["rope_theta"] == 12345.0
    assert (theirs.head_dim, theirs.rms_norm_eps, theirs.tie_word_embeddings) == (32, 1e-5, True)
    assert theirs.layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen2MoeConfig])
def test_we_read_what_transformers_writes(tmp_path, kind):
    theirs = kind(
        **TINY, vocab_size=99, rope_parameters={"rope_type": "default", "rope_theta": 777.0}, rms_norm_eps=1e-5
    )
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    config = ModelConfig.from_hf(table)
    assert (config.vocab_size, config.rope_theta, config.rms_norm_eps, config.rope_scaling) == (99, 777.0, 1e-5, None)
    assert config.num_experts == (60 if kind is Qwen2MoeConfig else 0)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_sliding_windows_agree_with_transformers(tmp_path):
    config = ModelConfig(
        **TINY | dict(num_hidden_layers=5), use_sliding_window=True, sliding_window=16, max_window_layers=3
    )
    theirs = Qwen2Config(**{k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")})
    ours = ["full_attention" if config.window(n) is None else "sliding_attention" for n in range(5)]
    assert ours == theirs.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 2
    unused = ModelConfig.from_hf(ModelConfig(**TINY).to_hf() | {"sliding_window": 4096, "max_window_layers": 1})
    assert unused.window(1) is None, "published files carry the numbers without using them"


def test_rope_scaling_is_kept():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_hf(ModelConfig(**TINY).to_hf() | {"rope_scaling": yarn})
    assert config.rope_scaling == yarn
    new_style = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0}, "rope_theta": None}
    config = ModelConfig.from_hf(ModelConfig(**TINY).to_hf() | new_style)
    assert (config.rope_theta, config.rope_scaling) == (5.0, {"rope_type": "yarn", "factor": 4.0})


# The keys and values of the published Qwen-7B file.
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0,
    "fp16": False, "fp32": False, "hidden_size": 4096, "intermediate_size": 22016, "initializer_range": 0.02,
    "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768, "model_type": "qwen",
    "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True, "use_dynamic_ntk": True,
    "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
}  # fmt: skip


def test_qwen1_config_in_and_out():
    config = ModelConfig.from_hf(QWEN_7B)
    assert (config.intermediate_size, config.num_key_value_heads, config.d_head) == (11008, 32, 128)
    assert (config.generation, config.seq_length, config.rope_theta) == ("qwen", 8192, 10000.0)
    written = config.to_qwen1()
    assert {key: written[key] for key in QWEN_7B.keys() & written.keys()} == {
        key: QWEN_7B[key] for key in QWEN_7B.keys() & written.keys()
    }
    assert ModelConfig.from_hf(written) == config
    assert ModelConfig.from_hf(config.to_hf()) == config, "the Hugging Face layout loses nothing either"


def test_qwen1_refuses_what_it_cannot_express():
    with pytest.raises(ValueError, match="grouped key/value heads and tied embeddings"):
        ModelConfig(**TINY, tie_word_embeddings=True).to_qwen1()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantised with gptq"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(attention_dropout=0.1), r"attention_dropout 0\.1"),
        (dict(hidden_size="many"), "hidden_size: .*integer"),
    ],
)
def test_unsupported_config_files(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_hf(ModelConfig(**TINY).to_hf() | change)


def test_a_missing_key_is_named():
    table = ModelConfig(**TINY).to_hf()
    del table["num_hidden_layers"]
    with pytest.raises(ValueError, match="no 'num_hidden_layers', which a qwen2 model needs"):
        ModelConfig.from_hf(table)
    with pytest.raises(ValueError, match="no 'seq_length'"):
        ModelConfig.from_hf({k: v for k, v in QWEN_7B.items() if k != "seq_length"})
