"""`qwench convert`: every direction, and Qwen-1 against its forward pass written down plainly."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from qwench.model.config import ModelConfig
from qwench.model.convert import convert, main
from qwench.model.decoder import CausalLM
from qwench.model.flops import num_parameters
from qwench.model.init import init_weights
from qwench.model.load import load_model
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer, train

MHA = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, eos_token_id=300, rope_theta=10000.0,
)  # fmt: skip
QWEN1 = {
    "model_type": "qwen", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "kv_channels": 16, "vocab_size": 320, "seq_length": 256, "max_position_embeddings": 512,
    "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "use_dynamic_ntk": True, "use_logn_attn": True,
    "no_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train(["def f(x):\n    return x + 1\n", "the quick brown fox jumps over the lazy dog"] * 9, 300)


def make(path, config=MHA, dtype=torch.float32, tokenizer=None):
    model = CausalLM(config, dtype=dtype)
    init_weights(model, 0)
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(number)
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    save_pretrained(model, path, tokenizer=tokenizer, generation_config={"do_sample": True, "top_p": 0.8})
    return model


def tensors(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def qwen1_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"transformer.wte.weight": (320, 64), "transformer.ln_f.weight": (64,), "lm_head.weight": (320, 64)}
    for n in range(2):
        shapes |= {
            f"transformer.h.{n}.ln_1.weight": (64,), f"transformer.h.{n}.ln_2.weight": (64,),
            f"transformer.h.{n}.attn.c_attn.weight": (192, 64), f"transformer.h.{n}.attn.c_attn.bias": (192,),
            f"transformer.h.{n}.attn.c_proj.weight": (64, 64), f"transformer.h.{n}.mlp.w1.weight": (96, 64),
            f"transformer.h.{n}.mlp.w2.weight": (96, 64), f"transformer.h.{n}.mlp.c_proj.weight": (64, 96),
        }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def qwen1_forward(w, ids):
    """Qwen-1 as its report and code describe it, one sequence, fp32, within the training length."""

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def rotate(x):  # [heads, T, 16]
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        angle = torch.cat([angle, angle], -1)
        return x * angle.cos() + torch.cat([-x[..., 8:], x[..., :8]], -1) * angle.sin()

    x = w["transformer.wte.weight"][ids]
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    for n in range(2):
        layer = {name.removeprefix(f"transformer.h.{n}."): t for name, t in w.items()}
        merged = norm(x, layer["ln_1.weight"]) @ layer["attn.c_attn.weight"].T + layer["attn.c_attn.bias"]
        q, k, v = (part.view(-1, 4, 16).transpose(0, 1) for part in merged.chunk(3, -1))
        scores = rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(16)
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + out.transpose(0, 1).reshape(-1, 64) @ layer["attn.c_proj.weight"].T
        m = norm(x, layer["ln_2.weight"])
        x = x + ((m @ layer["mlp.w1.weight"].T) * F.silu(m @ layer["mlp.w2.weight"].T)) @ layer["mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def qwen1_dir(path):
    path.mkdir()
    weights = qwen1_tensors()
    # Buffers of the remote code that old files carry.
    extra = {
        "transformer.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).bool(),
    }
    save_file(weights | extra, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(QWEN1))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 300, "chat_format": "chatml"}))
    return weights


def test_qwen1_computes_what_the_report_says(tmp_path):
    weights = qwen1_dir(tmp_path / "qwen")
    ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1))
    want = qwen1_forward(weights, ids)
    torch.testing.assert_close(load_model(tmp_path / "qwen").logits(ids[None])[0], want, rtol=1e-4, atol=1e-4)
    convert(tmp_path / "qwen", tmp_path / "hf")
    torch.testing.assert_close(load_model(tmp_path / "hf").logits(ids[None])[0], want, rtol=1e-4, atol=1e-4)
    swapped = {n.replace("w1", "wX").replace("w2", "w1").replace("wX", "w2"): t for n, t in weights.items()}
    assert (qwen1_forward(swapped, ids) - want).abs().max() > 0.01, "this test notices exchanged gates"


def test_qwen1_there_and_back_is_exact(tmp_path):
    weights = qwen1_dir(tmp_path / "qwen")
    notes = convert(tmp_path / "qwen", tmp_path / "hf")
    assert any("no tokenizer" in note for note in notes)
    config = load_model(tmp_path / "hf").config
    assert (config.seq_length, config.use_logn_attn, config.eos_token_id) == (256, True, 300)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["chat_format"] == "chatml"
    convert(tmp_path / "hf", tmp_path / "again", to="qwen1", max_shard_bytes=50_000)
    assert equal(tensors(tmp_path / "again"), weights)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written[key] for key in QWEN1} == QWEN1
    assert written["fp32"] is True
    assert written["bf16"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_direction_and_back_is_exact(tmp_path, tokenizer, dtype):
    make(tmp_path / "hf", dtype=dtype, tokenizer=tokenizer)
    original = tensors(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "qwen1", to="qwen1")
    convert(tmp_path / "qwen1", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    back = tensors(tmp_path / "back")
    # GGUF keeps vectors in F32, so they come back wider, with the same values.
    assert {name: t.to(dtype) for name, t in back.items()}.keys() == original.keys()
    assert all(torch.equal(back[name], original[name].to(back[name].dtype)) for name in original)
    assert back["lm_head.weight"].dtype == dtype
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"
    for place in ("qwen1", "m.gguf", "back"):
        assert Tokenizer.load(tmp_path / place).encode("def fox(dog)") == tokenizer.encode("def fox(dog)")
    convert(tmp_path / "back", tmp_path / "same", dtype=str(dtype).removeprefix("torch."))
    assert equal(tensors(tmp_path / "same"), original)
    assert load_model(tmp_path / "same", dtype="auto").config == dataclasses.replace(
        MHA, seq_length=None, use_dynamic_ntk=False, use_logn_attn=False
    )


def test_runs_convert(tmp_path, tokenizer):
    make(tmp_path / "run" / "model", tokenizer=tokenizer)
    assert convert(tmp_path / "run", tmp_path / "hf") == []
    assert equal(tensors(tmp_path / "hf"), tensors(tmp_path / "run" / "model"))
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["top_p"] == 0.8


def test_quantised_sources_are_remarked_on(tmp_path, tokenizer):
    make(tmp_path / "hf", tokenizer=tokenizer)
    assert convert(tmp_path / "hf", tmp_path / "m.gguf", dtype="q8_0") == []
    notes = convert(tmp_path / "m.gguf", tmp_path / "back")
    assert any("--dtype bfloat16 halves the size" in note for note in notes)
    assert {t.dtype for t in tensors(tmp_path / "back").values()} == {torch.float32}


def test_command_line(tmp_path, tokenizer, capsys):
    make(tmp_path / "hf", tokenizer=tokenizer)
    source, out = str(tmp_path / "hf"), str(tmp_path / "out")
    assert main([source, out, "--dtype", "bfloat16", "--max-shard-gb", "0.0001"]) == 0
    message = capsys.readouterr().err
    assert f"out: {num_parameters(MHA):,} parameters, 0.00 GB" in message
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match="out exists and is not empty"):
        main([source, out])
    assert main([source, out, "--force"]) == 0
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hf", "x", "--dtype", "q8_0"], "q8_0 exists in GGUF files only"),
        (["hf", "x", "--to", "gguf"], r"a GGUF target is a file named \*\.gguf"),
        (["hf", "x.gguf", "--to", "hf"], r"x\.gguf does not fit hf"),
        (["hf", "hf", "--force"], "is the source itself"),
        (["gqa", "x", "--to", "qwen1"], "grouped key/value heads"),
        (["bare", "x.gguf"], "a GGUF file carries its tokenizer"),
        (["nowhere", "x"], "there is no model at"),
        (["hf", "x", "--max-shard-gb", "0"], "give a positive number"),
    ],
)
def test_refusals_write_nothing(tmp_path, tokenizer, monkeypatch, arguments, sentence):
    make(tmp_path / "hf", tokenizer=tokenizer)
    make(tmp_path / "gqa", dataclasses.replace(MHA, num_key_value_heads=2), tokenizer=tokenizer)
    make(tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "gqa", "hf"]
