"""Published sizes: every total of the reports is reproduced from the dimensions."""

import pytest

from qwench.model.config import ModelConfig
from qwench.model.flops import kv_bytes_per_token, num_parameters, training_flops_per_token
from qwench.model.presets import preset, preset_names

# (total, without embeddings), as published or as implied by the published files' byte counts.
COUNTS = {
    "qwen-1.8b": (1_836_828_672, 1_214_498_816),
    "qwen-7b": (7_721_324_544, 6_476_664_832),
    "qwen-14b": (14_167_290_880, 12_610_155_520),
    "qwen-72b": (72_287_920_128, 69_796_503_552),
    "qwen2-0.5b": (494_032_768, 357_898_112),
    "qwen2-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2-7b": (7_615_616_512, 6_525_621_760),
    "qwen2-72b": (72_706_203_648, 70_214_787_072),
    "qwen2.5-0.5b": (494_032_768, 357_898_112),
    "qwen2.5-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2.5-3b": (3_085_938_688, 2_774_773_760),
    "qwen2.5-7b": (7_615_616_512, 6_525_621_760),
    "qwen2.5-14b": (14_770_033_664, 13_212_898_304),
    "qwen2.5-32b": (32_763_876_352, 31_206_740_992),
    "qwen2.5-72b": (72_706_203_648, 70_214_787_072),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    config = preset(name)
    assert (num_parameters(config), num_parameters(config, embedding=False)) == COUNTS[name]
    assert num_parameters(config, active=True) == COUNTS[name][0], "a dense model is all active"


@pytest.mark.parametrize("family", ["", "-coder", "-math"])
def test_derived_models_keep_the_dimensions(family):
    for name in preset_names():
        stem = name.removesuffix("-instruct")
        if stem.startswith(f"qwen2.5{family}-") and stem.replace(family, "", 1) in COUNTS:
            assert num_parameters(preset(name)) == COUNTS[stem.replace(family, "", 1)][0]
    assert num_parameters(preset("qwen2.5-14b-instruct-1m")) == COUNTS["qwen2.5-14b"][0]


def test_moe_counts():
    config = preset("qwen2-57b-a14b")
    assert num_parameters(config) == 57_408_658_944
    assert num_parameters(config, active=True) == 14_249_270_784
    assert num_parameters(config, active=True, embedding=False) == 13_160_193_536
    config = preset("qwen1.5-moe-a2.7b")
    counts = num_parameters(config), num_parameters(config, active=True)
    counts += (num_parameters(config, active=True, embedding=False),)
    assert [round(n / 1e9, 3) for n in counts] == [14.316, 2.689, 2.067]


def test_moe_layers_that_stay_dense_count_as_dense():
    base = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=10)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, intermediate_size=16)
    sparse = ModelConfig(**base, **experts, decoder_sparse_step=2)
    assert [sparse.is_moe_layer(n) for n in range(2)] == [False, True]
    every = ModelConfig(**base, **experts)
    assert num_parameters(every) - num_parameters(sparse) == (4 * 8 + 4 * 3 * 8 * 6) - 3 * 8 * 16


@pytest.mark.parametrize(
    ("name", "count"),
    [("0.5b", 12288), ("1.5b", 28672), ("3b", 36864), ("7b", 57344), ("14b", 196608), ("32b", 262144), ("72b", 327680)],
)
def test_kv_bytes(name, count):
    assert kv_bytes_per_token(preset(f"qwen2.5-{name}")) == count


PLAIN = dict(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def test_training_flops_count_every_matrix_once():
    config = ModelConfig(**PLAIN)
    # q, k, v, o, three of the FFN and the head; biases (8) and norm weights (12) ride along in the 6N rule.
    weights = 4 * 8 + 4 * 4 + 3 * 4 * 6 + 8 + 12 + 10 * 4
    assert training_flops_per_token(config, 100) == 6 * weights + 6 * 1 * 100 * 4
    window = ModelConfig(**PLAIN, use_sliding_window=True, sliding_window=10, max_window_layers=0)
    seen = (10 * 10 / 2 + 90 * 10) / 100
    assert training_flops_per_token(window, 100) == 6 * weights + 12 * 4 * seen


def test_every_preset_loads_and_survives_config_json():
    names = preset_names()
    assert len(names) > 60
    for name in names:
        config = preset(name)
        assert ModelConfig.from_hf(config.to_hf()) == config, name


def test_tuned_models_change_what_they_should():
    base, tuned = preset("qwen2.5-14b"), preset("Qwen2.5-14B-Instruct")
    assert (base.rms_norm_eps, tuned.rms_norm_eps) == (1e-5, 1e-6)
    assert (base.max_position_embeddings, tuned.max_position_embeddings) == (131072, 32768)
    assert (base.eos_token_id, tuned.eos_token_id) == (151643, 151645)
    assert preset("qwen2.5-math-7b").rope_theta == 10_000
    assert preset("qwen-7b").generation == "qwen"
    assert preset("qwen1.5-7b").generation == "qwen2"


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'qwen2\.5-0\.5'; did you mean .*qwen2\.5-0\.5b"):
        preset("qwen2.5-0.5")
    with pytest.raises(ValueError, match="known are"):
        preset("zzzz")
