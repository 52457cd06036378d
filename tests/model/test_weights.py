"""Saving and loading Hugging Face directories: exactness, damage, interruption, transformers as the judge."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.flops import num_parameters
from qwench.model.init import init_weights
from qwench.model.load import load_model, read_config
from qwench.model.names import pieces
from qwench.model.weights import load_weights, save_pretrained, write_safetensors

TINY = ModelConfig(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VARIANTS = {
    "gqa": {},
    "tied": dict(tie_word_embeddings=True),
    "mha": dict(num_key_value_heads=4),
    "head_dim": dict(head_dim=32),
    "qwen1": dict(num_key_value_heads=4, seq_length=512, use_dynamic_ntk=True),
    "yarn_free_long": dict(max_position_embeddings=131072, rope_theta=1e6, rms_norm_eps=1e-5),
}


def variant(**change):
    return dataclasses.replace(TINY, **change)


def make(config=TINY, dtype=torch.float32, seed=0):
    model = CausalLM(config, dtype=dtype)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms that are all alike would hide a wrong order
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def same(left, right):
    a, b = dict(left.named_parameters()), dict(right.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [10_000, 10**9])
def test_round_trip_is_exact(tmp_path, name, dtype, shard):
    model = make(variant(**VARIANTS[name]), dtype)
    save_pretrained(model, tmp_path / "m", max_shard_bytes=shard)
    files = sorted(path.name for path in tmp_path.joinpath("m").glob("*.safetensors"))
    assert len(files) > 3 if shard == 10_000 else files == ["model.safetensors"]
    again = load_model(tmp_path / "m", dtype="auto")
    assert same(model, again)
    assert again.config == model.config
    assert read_config(tmp_path / "m") == model.config


@pytest.mark.parametrize("name", VARIANTS)
def test_the_tables_are_the_network(name):
    config = variant(**VARIANTS[name])
    model = CausalLM(config, device="meta")
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    for layout in ("qwench", "hf", "qwen1", "gguf"):
        stored = {
            key: (sum(piece.shape[0] for piece in parts), *parts[0].shape[1:])
            for key, parts in pieces(config, layout).items()
        }
        assert stored == shapes, layout


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same_from_our_files(tmp_path, name):
    model = make(variant(**VARIANTS[name]))
    save_pretrained(model, tmp_path, max_shard_bytes=50_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    ids = torch.randint(0, 160, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_we_load_what_transformers_saves(tmp_path, tied):
    torch.manual_seed(0)
    table = variant(tie_word_embeddings=tied).to_hf()
    theirs = Qwen2ForCausalLM(Qwen2Config(**table)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    ours = load_model(tmp_path)
    ids = torch.randint(0, 160, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_dtypes_are_cast_on_the_way(tmp_path):
    model = make()
    save_pretrained(model, tmp_path / "half", dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    wide = load_model(tmp_path / "half", dtype="float32")
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.bfloat16().float())
    with pytest.raises(ValueError, match="dtype 'int4' is none of float32"):
        load_model(tmp_path / "half", dtype="int4")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e6
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has values beyond float16"):
        save_pretrained(model, tmp_path / "f16", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_the_safetensors_package_reads_plain_tables(tmp_path):
    table = {
        "step": torch.tensor(3.0),
        "n": torch.tensor([2**40]),
        "t": torch.arange(6.0).view(2, 3).T,
        "e": torch.ones(0),
    }
    write_safetensors(tmp_path / "x.safetensors", table)
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == table.keys()
    assert all(torch.equal(again[name], table[name]) for name in table)


# ------------------------------------------------------------------------------------------------- what may lie around
def saved(tmp_path, **change):
    model = make(variant(**change))
    save_pretrained(model, tmp_path / "m", max_shard_bytes=100_000)
    return model, tmp_path / "m"


def edit(path, change):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_buffers_and_a_copied_head_are_ignored(tmp_path):
    model, path = saved(tmp_path, tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(path, add)
    assert same(load_model(path), model)
    edit(path, lambda tensors: tensors["lm_head.weight"].view(-1)[5].add_(1))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' in .* differs from the embedding .* tie_word_embeddings"):
        load_model(path)


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(K), rf"/m has no tensor '{K}'"),
        (
            lambda t: t.update({K: t[K].T.contiguous()}),
            rf"'{K}' in .*model\.safetensors has shape \[64, 32\].*\[32, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.2.x": torch.ones(1)}),
            r"'model\.layers\.2\.x' in .* is no part of the model",
        ),
        (lambda t: t.update({K: t[K].to(torch.int8)}), rf"'{K}' in .* is stored as I8"),
    ],
)
def test_wrong_tensors_are_named_with_their_file(tmp_path, change, sentence):
    _, path = saved(tmp_path)
    edit(path, change)
    with pytest.raises(ValueError, match=sentence):
        load_model(path)


def test_damaged_files_are_named(tmp_path):
    _, path = saved(tmp_path)
    shards = sorted(path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    for cut, sentence in [
        (len(whole) - 1, "is truncated: tensor"),
        (50, "truncated or no safetensors"),
        (3, "truncated"),
    ]:
        shards[1].write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{shards[1].name} .*{sentence}|{shards[1].name} is {sentence}"):
            load_model(path)
    shards[1].write_bytes(whole[:8] + b"}" + whole[9:])
    with pytest.raises(ValueError, match="header does not parse"):
        load_model(path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"names the file '{shards[1].name}', which is not in"):
        load_model(path)
    shards[1].write_bytes(whole)
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = shards[0].name
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"says that tensor 'model\.norm\.weight' is in .*00001"):
        load_model(path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index"):
        load_model(path)


def test_another_model_is_refused_before_anything_changes(tmp_path):
    _, path = saved(tmp_path)
    other = make(variant(intermediate_size=32), seed=3)
    before = other.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(ValueError, match=r"is another model: model\.layers\.0\.mlp\.down_proj\.weight is \(64, 96\)"):
        load_weights(other, path)
    assert torch.equal(before, other.model.layers[0].mlp.down_proj.weight)


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no model at"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a model directory"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickle"):
        load_model(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="someone/nothing is no local path and could not be fetched"):
        load_model("someone/nothing")


def test_runs_give_the_finished_model_or_the_newest_checkpoint(tmp_path):
    for step in (10, 200):
        folder = tmp_path / "checkpoints" / f"step_{step:09d}"
        save_pretrained(make(seed=step), folder / "model")
        (folder / "COMPLETE").touch()
    save_pretrained(make(seed=3000), tmp_path / "checkpoints" / "step_000003000" / "model")  # not complete
    assert same(load_model(tmp_path), make(seed=200))
    save_pretrained(make(seed=7), tmp_path / "model")
    assert same(load_model(tmp_path), make(seed=7))


# -------------------------------------------------------------------------------------------------------- interruption
def test_saving_replaces_models_and_nothing_else(tmp_path):
    save_pretrained(make(seed=1), tmp_path / "m")
    (tmp_path / "m" / "stale.txt").touch()
    save_pretrained(make(seed=2), tmp_path / "m")
    assert same(load_model(tmp_path / "m"), make(seed=2))
    assert not (tmp_path / "m" / "stale.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").touch()
    with pytest.raises(ValueError, match="thesis exists and is not empty"):
        save_pretrained(make(), tmp_path / "thesis")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "thesis"]


class Interrupted:
    def save(self, path):
        raise KeyboardInterrupt


def test_control_c_leaves_the_old_model(tmp_path):
    save_pretrained(make(seed=1), tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(make(seed=2), tmp_path / "m", tokenizer=Interrupted())
    assert same(load_model(tmp_path / "m"), make(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_the_old_model(tmp_path):
    save_pretrained(make(seed=1), tmp_path / "m")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_pretrained(make(seed=2), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(load_model(tmp_path / "m"), make(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


SAVE_FOREVER = """
import sys, torch
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.weights import save_pretrained
config = ModelConfig(vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                     num_attention_heads=8, num_key_value_heads=8)
model = CausalLM(config)
step = 0
while True:
    step += 1
    for parameter in model.parameters():
        parameter.data.fill_(step)
    save_pretrained(model, sys.argv[1])
    print(step, flush=True)
"""


def test_kill_minus_nine_at_any_moment_leaves_a_whole_model(tmp_path):
    out = tmp_path / "m"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, out], stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()
    seen = set()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:  # a reader never finds a mixture either
        config = read_config(out)
        assert config.hidden_size == 512
        seen.update(path.name for path in tmp_path.iterdir())
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert any(".m.saving-" in name for name in seen), "the kill should hit a save"
    parameters = [p.detach() for p in load_model(out).parameters()]
    assert len({float(x) for p in parameters for x in (p.min(), p.max())}) == 1, "every tensor is of the same save"
    save_pretrained(make(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "the killed save's leftovers are gone"


def test_memory_holds_one_model(tmp_path):
    """Loading and saving 210 MB of fp32 weights adds little more than those 210 MB, although the dtype changes."""
    code = """
import resource, sys
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.model.weights import save_pretrained
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = ModelConfig(vocab_size=20000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
before = peak()
if sys.argv[1] == "save":
    model = CausalLM(config)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    save_pretrained(model, sys.argv[2], dtype="bfloat16")
else:
    model = load_model(sys.argv[2], dtype="float32")
size = sum(p.numel() * 4 for p in model.parameters()) / 1024
print((peak() - before) / size)
"""
    for mode in ("save", "load"):
        done = subprocess.run(
            [sys.executable, "-c", code, mode, str(tmp_path / "m")], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) < 1.4, mode
