"""GGUF files: block arithmetic against the gguf package, damaged files, and transformers reading what we write."""

import dataclasses
import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwench.model.config import ModelConfig
from qwench.model.convert import convert
from qwench.model.decoder import CausalLM
from qwench.model.gguf_blocks import GGML, expand
from qwench.model.gguf_file import GgufStore
from qwench.model.init import init_weights
from qwench.model.load import load_model, read_config
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer, train

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache/qwench-assets"))
REAL = ASSETS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
real = pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not here")

# Where the fp16 scales stand in a block; random bytes there could be inf or nan.
SCALES = {GGML.Q8_0: [0], GGML.Q5_0: [0], GGML.Q4_0: [0], GGML.Q4_K: [0, 2], GGML.Q5_K: [0, 2], GGML.Q6_K: [208]}


def random_blocks(kind, rows, columns, seed=0):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    for offset in SCALES[kind]:
        scale = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", SCALES)
def test_expansion_is_bit_for_bit_the_gguf_packages(kind):
    raw = random_blocks(kind, 37, 768)
    ours = expand(raw, kind)
    assert ours.shape == (37, 768)
    assert np.array_equal(ours.view(np.uint32), gguf.dequantize(raw, kind).view(np.uint32))


@pytest.mark.parametrize("kind", [GGML.Q8_0, GGML.Q5_0])
def test_quantising_and_expanding_comes_close(kind):
    values = np.random.default_rng(1).normal(size=(8, 256)).astype(np.float32)
    restored = expand(gguf.quantize(values, kind), kind)
    assert np.abs(restored - values).max() < (0.02 if kind == GGML.Q8_0 else 0.2)


# ------------------------------------------------------------------------------------------------ whole files, tiny
TINY = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=300, max_position_embeddings=512, rope_theta=50000.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train(["def f(x):\n    return x + 1\n", "the quick brown fox jumps over the lazy dog"] * 9, 300)


def model_dir(path, tokenizer, config=TINY, dtype=torch.float32):
    model = CausalLM(config, dtype=dtype)
    init_weights(model, 0)
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(number)
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    save_pretrained(model, path, tokenizer=tokenizer)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_transformers_and_we_agree_on_written_files(tmp_path, tokenizer, dtype, tied):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    model_dir(tmp_path / "m", tokenizer, config)
    file = tmp_path / "m.gguf"
    assert convert(tmp_path / "m", file, dtype=dtype) == []
    ours = load_model(file)
    assert ours.config == config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.randint(0, 320, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert {name: kind if "norm" not in name and "bias" not in name else "F32" for name in stored} == stored


@pytest.mark.parametrize(
    "change",
    [
        dict(head_dim=32),
        dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dict(rms_norm_eps=1e-5, rope_theta=1e7, num_key_value_heads=4),
    ],
)
def test_configs_survive(tmp_path, tokenizer, change):
    config = dataclasses.replace(TINY, **change)
    # Converting needs no network, so what the decoder does not compute yet converts all the same.
    model_dir(tmp_path / "m", tokenizer, dataclasses.replace(config, rope_scaling=None))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config.to_hf()))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    assert read_config(tmp_path / "m.gguf") == config


def test_what_the_format_cannot_hold_is_refused(tmp_path, tokenizer):
    model_dir(tmp_path / "m", tokenizer)
    path = tmp_path / "m" / "config.json"
    table = json.loads(path.read_text())
    for change, sentence in [
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), "neither sliding windows"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "no rope scaling of type 'dynamic'"),
    ]:
        path.write_text(json.dumps(table | change))
        with pytest.raises(ValueError, match=sentence):
            convert(tmp_path / "m", tmp_path / "m.gguf")
    path.write_text(json.dumps(table))
    narrow = dataclasses.replace(TINY, hidden_size=48, intermediate_size=80, num_attention_heads=2)
    model_dir(tmp_path / "narrow", tokenizer, narrow)
    with pytest.raises(ValueError, match="rows of 48; Q8_0 needs a multiple of 32"):
        convert(tmp_path / "narrow", tmp_path / "n.gguf", dtype="q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "narrow"]


def test_the_tokenizer_travels_inside(tmp_path, tokenizer):
    model_dir(tmp_path / "m", tokenizer)
    convert(tmp_path / "m", tmp_path / "m.gguf")
    inside = Tokenizer.load(tmp_path / "m.gguf")
    text = "def fox(dog): return 1 <|im_end|>"
    assert inside.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True)
    messages = [{"role": "user", "content": "hi"}]
    assert inside.render(messages) == tokenizer.render(messages)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 300
    assert fields["tokenizer.ggml.padding_token_id"].contents() == tokenizer.pad_id
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD319]"


@pytest.mark.parametrize("kind", SCALES)
def test_quantised_files_load_through_the_model(tmp_path, kind):
    """A file with K-quants and others written with the gguf package; the merged matrices hold the expanded rows."""
    config = ModelConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, qkv_bias=False,
    )  # fmt: skip
    shapes = {
        "token_embd": (64, 256), "output": (64, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256),
        "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256),
        "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512),
    }  # fmt: skip
    raw = {name: random_blocks(kind, *shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(32768)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, data in raw.items():
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_config(tmp_path / "q.gguf") == config
    model = load_model(tmp_path / "q.gguf")
    want = {name: torch.from_numpy(gguf.dequantize(data, kind)) for name, data in raw.items()}
    layer = model.model.layers[0]
    assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat([want[f"blk.0.attn_{x}"] for x in "qkv"]))
    assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat([want["blk.0.ffn_gate"], want["blk.0.ffn_up"]]))
    assert torch.equal(layer.mlp.down_proj.weight, want["blk.0.ffn_down"])
    half = load_model(tmp_path / "q.gguf", dtype="bfloat16")
    assert torch.equal(half.lm_head.weight, want["output"].bfloat16())


# ----------------------------------------------------------------------------------------------------- damaged files
def test_damaged_files_get_one_sentence(tmp_path, tokenizer):
    model_dir(tmp_path / "m", tokenizer)
    file = tmp_path / "m.gguf"
    convert(tmp_path / "m", file)
    whole = file.read_bytes()

    def says(data, sentence):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"m\.gguf.*{sentence}") as caught:
            load_model(file)
        assert "\n" not in str(caught.value)

    says(b"", "is no GGUF file")
    says(b"PK\x03\x04" + whole[4:], "is no GGUF file")
    says(whole[:-100], "is truncated: tensor '.*' ends")
    for cut in (4, 20, 30, 100, 2000):
        says(whole[:cut], "is truncated or damaged: its header does not parse")
    says(whole[:4] + struct.pack("<I", 1) + whole[8:], "GGUF version 1")
    says(whole.replace(b"qwen2", b"llama", 1), "architecture 'llama'; qwench reads qwen2")
    says(whole.replace(b"qwen2.block_count", b"qwen2.block_cOunt"), "no metadata qwen2.block_count")
    says(whole.replace(b"blk.1.attn_k.bias", b"blk.1.attn_K.bias"), r"no tensor 'blk\.1\.attn_k\.bias'")
    says(whole.replace(b"blk.0.ffn_up", b"blk.7.ffn_up"), r"no tensor 'blk\.0\.ffn_up\.weight'")


def test_types_that_nobody_expands_are_named(tmp_path, tokenizer):
    model_dir(tmp_path / "m", tokenizer)
    file = tmp_path / "m.gguf"
    convert(tmp_path / "m", file, dtype="q8_0")
    data = file.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (int(GGML.Q8_0),)
    for code, sentence in [(999, "unknown type 999"), (int(GGML.I8), "is stored as I8"), (int(GGML.Q8_1), "Q8_1")]:
        file.write_bytes(data[:at] + struct.pack("<I", code) + data[at + 4 :])
        with pytest.raises(ValueError, match=rf"'blk\.0\.ffn_down\.weight' in .*{sentence}"):
            load_model(file)


# --------------------------------------------------------------------------------------------------------- the real one
@real
@pytest.mark.real
def test_the_real_file_expands_like_the_gguf_package():
    store = GgufStore(REAL)
    config = read_config(REAL)
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (896, 24, 2)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings, "output.weight has a precision of its own in this file"
    seen = set()
    for name, info in store.tensors.items():
        if info.stored_as in seen:
            continue
        seen.add(info.stored_as)
        rows = min(5, info.shape[0])
        start = info.shape[0] - rows
        out = torch.empty((rows, *info.shape[1:]))
        store.read_rows(name, start, out)
        kind = GGML[info.stored_as]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = int(np.prod(info.shape[1:])) // block * block_bytes
        offset = store._stored[name].offset + start * row_bytes
        raw = np.fromfile(REAL, np.uint8, rows * row_bytes, offset=offset).reshape(rows, -1)
        assert np.array_equal(out.numpy().reshape(rows, -1), gguf.dequantize(raw, kind).reshape(rows, -1)), name
    assert seen == {"Q8_0", "Q6_K", "Q5_0", "Q4_K", "F32"}
