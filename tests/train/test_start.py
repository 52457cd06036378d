"""Where weights come from: seeds by name, presets, checkpoints, and combinations that make no sense."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from qwench import cli, config
from qwench.data.packing import PretrainDataset
from qwench.data.shards import TokenShards
from qwench.model.decoder import CausalLM
from qwench.model.init import init_weights
from qwench.model.weights import save_pretrained
from qwench.tokenizer import train
from qwench.train import job
from qwench.train.config import PretrainConfig, SFTConfig, StartConfig
from qwench.train.pretrain import pretrain
from qwench.train.sft import sft
from qwench.train.start import build_model

CPU = torch.device("cpu")


def test_weights_do_not_depend_on_construction(tiny_config) -> None:
    """The same names give the same values: in a deeper model, an untied one, after other use of torch's generator."""
    small = CausalLM(tiny_config, dtype=torch.float32)
    init_weights(small, 5, scale_residual=False)
    torch.manual_seed(123)
    torch.randn(7)
    deep = CausalLM(
        dataclasses.replace(tiny_config, num_hidden_layers=4, tie_word_embeddings=False), dtype=torch.float32
    )
    init_weights(deep, 5, scale_residual=False)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name)), name
    assert not torch.equal(deep.lm_head.weight, deep.model.embed_tokens.weight)
    layers = [deep.get_parameter(f"model.layers.{i}.mlp.down_proj.weight") for i in range(4)]
    assert not torch.equal(layers[0], layers[1])
    init_weights(deep, 6, scale_residual=False)
    assert not torch.equal(deep.model.embed_tokens.weight, small.model.embed_tokens.weight)


def test_weights_are_seeded_by_name(tiny_config) -> None:
    """The values themselves are pinned to the formula, so that no refactoring changes everyone's runs."""
    model = CausalLM(tiny_config, dtype=torch.float32)
    init_weights(model, 3)
    for name, scale in (("model.embed_tokens.weight", 0.02), ("model.layers.1.self_attn.o_proj.weight", 0.02 / 4**0.5)):
        seed = int.from_bytes(hashlib.sha256(f"3:{name}".encode()).digest()[:8], "little") >> 1
        want = torch.empty_like(model.get_parameter(name))
        want.normal_(0.0, scale, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model.get_parameter(name), want)
        assert float(want.std()) == pytest.approx(scale, rel=0.1)
    assert set(model.model.norm.weight.tolist()) == {1.0}
    assert set(model.get_parameter("model.layers.0.self_attn.qkv_proj.bias").tolist()) == {0.0}


def test_shape_and_rows(tiny_config, tiny_tokenizer) -> None:
    shape = dataclasses.replace(tiny_config, vocab_size=151936)
    model = build_model(StartConfig(config=shape), tiny_tokenizer, CPU, 0)
    assert model.config.vocab_size == 512, "the tokenizer's rows, not the default of the class"
    assert model.config.eos_token_ids == (tiny_tokenizer.eod_id,)
    assert build_model(StartConfig(config=shape, vocab_size=600), tiny_tokenizer, CPU, 0).config.vocab_size == 600
    with pytest.raises(ValueError, match=r"has 512 ids but the model only 300 embedding rows; set vocab_size to 512"):
        build_model(StartConfig(config=shape, vocab_size=300), tiny_tokenizer, CPU, 0)
    with pytest.raises(ValueError, match=r"model\.config\.vocab_size is 700 but the tokenizer needs 512 rows"):
        build_model(StartConfig(config=dataclasses.replace(shape, vocab_size=700)), tiny_tokenizer, CPU, 0)


def test_from_a_checkpoint(tmp_path: Path, tiny_model, tiny_tokenizer, tiny_config) -> None:
    save_pretrained(tiny_model, tmp_path / "model")
    model = build_model(StartConfig(path=tmp_path / "model"), tiny_tokenizer, CPU, 0)
    assert torch.equal(model.model.embed_tokens.weight, tiny_model.model.embed_tokens.weight)
    small = CausalLM(dataclasses.replace(tiny_config, vocab_size=128), dtype=torch.float32)
    init_weights(small, 0)
    save_pretrained(small, tmp_path / "small")
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model"):
        build_model(StartConfig(path=tmp_path / "small"), tiny_tokenizer, CPU, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "exactly one of model.preset, model.config and model.path"),
        ({"preset": "qwen2.5-0.5b", "path": Path("x")}, "exactly one of"),
        ({"path": Path("x"), "vocab_size": 512}, "are for random weights"),
        ({"path": Path("x"), "scale_residual": False}, "are for random weights"),
        ({"preset": "qwen2.5-0.5b", "vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_bad_combinations(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StartConfig(**keys)


def test_no_such_preset(tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no preset 'qwen2\.5-0\.6b'; did you mean"):
        build_model(StartConfig(preset="qwen2.5-0.6b"), tiny_tokenizer, CPU, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.steps=0", "steps is 0; give a positive number"),
        ("loop.epochs=1", "exactly one of loop.steps and loop.epochs"),
        ("loop.batch_rows=0", "batch_rows is 0"),
        ("loop.micro_batch_rows=-1", "micro_batch_rows is -1"),
        ("loop.log_every=0", "log_every is 0"),
        ("loop.eval_rows=0", "eval_rows is 0"),
        ("loop.eval_every=-1", "eval_every is -1"),
        ("checkpoint.every_steps=0", "every_steps is 0"),
        ("checkpoint.keep_last=0", "keep_last is 0"),
        ("guard.window_steps=0", "window_steps is 0"),
        ("guard.grad_norm_factor=-1", "grad_norm_factor is -1"),
        ("optim.lr=0", "lr is 0"),
        ("optim.lr=nan", "lr is nan"),
        ("optim.lr=inf", "lr is inf"),
        ("optim.muon_lr=0", "muon_lr is 0"),
        ("optim.grad_clip=-1", "grad_clip is -1"),
        ("schedule.warmup_steps=-1", "warmup_steps is -1"),
        ("schedule.min_ratio=2", "min_ratio is 2"),
        ("schedule.kind=step", "schedule.kind: Input should be 'cosine', 'constant', 'linear' or 'wsd'"),
        ("seq_len=0", "seq_len is 0"),
        ("seq_len=100000", "too few for one row of 100000"),
        ("ops.attention=flash9", "ops.attention=flash9 cannot run on cpu here; choose one of: "),
        ("loop.device=cuda:99", "device cuda:99 is not there"),
        ("val_shards=/nowhere", "/nowhere holds no token shards"),
    ],
)
def test_bad_recipes(override: str, message: str, tmp_path: Path, pretrain_arguments) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", override)))


def test_mistakes_do_not_spoil_the_directory(tmp_path: Path, pretrain_arguments) -> None:
    """A recipe that failed before its first step is no run that the corrected one would have to continue."""
    with pytest.raises(ValueError, match="cannot run on cpu here"):
        pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", "ops.attention=flash9")))
    recipe = config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", "loop.steps=1"))
    assert pretrain(recipe).steps == 1


def test_epochs(tmp_path: Path, pretrain_arguments, tiny_shards: Path) -> None:
    num_rows = PretrainDataset(TokenShards.open(tiny_shards / "train"), 48).num_rows
    arguments = [a for a in pretrain_arguments(tmp_path / "run") if not a.startswith("loop.steps")]
    result = pretrain(config.load(PretrainConfig, [*arguments, "loop.epochs=0.5"]))
    assert result.steps == round(0.5 * num_rows / 4)


def test_wrong_tokenizer(tmp_path: Path, tiny_tokenizer, pretrain_arguments) -> None:
    train(["another corpus, other merges " * 9], 290).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"were made with tokenizer .* use the tokenizer they were made with"):
        pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", f"tokenizer={tmp_path / 'other'}")))
    assert not (tmp_path / "run").exists()


def test_bad_input_starts_nothing(tmp_path: Path, tiny_shards: Path, pretrain_arguments, monkeypatch, capsys) -> None:
    """Shards, tokenizer, weights to start from and checkpoints to go on from are looked at before a process starts."""
    out = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_arguments(out, "loop.steps=1")]) == 0
    monkeypatch.setattr(job, "run_job", lambda *_, **__: pytest.fail("something was started"))
    train(["another corpus, other merges " * 9], 290).save(tmp_path / "tokenizer")
    damaged = shutil.copytree(tiny_shards / "train", tmp_path / "shards")
    file = damaged / "shard_00000.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"xy")
    other = shutil.copytree(out / "model", tmp_path / "other")
    shape = (other / "config.json").read_text()
    (other / "config.json").write_text(shape.replace('"hidden_size": 32', '"hidden_size": 64'))
    wide = "model.config.hidden_size=64"
    for arguments, message in (
        (pretrain_arguments(tmp_path / "new", f"train_shards={damaged}"), "shard_00000.bin is damaged"),
        (pretrain_arguments(tmp_path / "new", f"val_shards={damaged}", "gpus=2"), "shard_00000.bin is damaged"),
        (pretrain_arguments(tmp_path / "new", f"tokenizer={tmp_path / 'tokenizer'}"), "were made with tokenizer"),
        (pretrain_arguments(out, "loop.steps=2"), "holds a run of another recipe (different: loop.steps)"),
        (pretrain_arguments(out, "resume=never"), "already holds a run"),
        (pretrain_arguments(out, wide, "resume=force"), "step_000000001/model is a checkpoint of another model"),
        (
            [a for a in pretrain_arguments(tmp_path / "new") if "model.config" not in a] + [f"model.path={other}"],
            "has shape [512, 32]; its config makes it [512, 64]",
        ),
    ):
        assert cli.main(["pretrain", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    unread = pretrain_arguments(tmp_path / "new", f"train_shards={damaged}", "verify_shards=false")
    with pytest.raises(pytest.fail.Exception, match="something was started"):
        cli.main(["pretrain", *unread])


def test_sft_needs_a_tokenizer(tmp_path: Path, sft_arguments) -> None:
    arguments = [a for a in sft_arguments(tmp_path / "run") if not a.startswith("tokenizer=")]
    with pytest.raises(ValueError, match="give tokenizer=DIR as well"):
        sft(config.load(SFTConfig, arguments))
    with pytest.raises(ValueError, match=r"qwen9|known"):
        sft(config.load(SFTConfig, sft_arguments(tmp_path / "run", "chat_format=qwen9")))
