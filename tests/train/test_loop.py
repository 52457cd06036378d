"""The training loop with real steps: learning, bad batches, checkpoints that stay, what it records."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwench import cli, config
from qwench.data.packing import PretrainDataset, SampleDataset
from qwench.data.shards import TokenShards
from qwench.model.load import load_model
from qwench.run import Run, read_metrics
from qwench.train import prepare
from qwench.train.batch import Batch
from qwench.train.config import GuardConfig, PretrainConfig
from qwench.train.guard import Guard
from qwench.train.loop import Trainer, TrainResult
from qwench.train.loss import next_token_losses
from qwench.train.prepare import Prepared
from qwench.train.pretrain import pretrain
from qwench.train.sharded_files import TensorFiles
from qwench.train.start import build_model
from qwench.types import Sample


@pytest.fixture
def trainer(tmp_path: Path, tiny_tokenizer, tiny_shards, pretrain_arguments):
    """A trainer of its own parts, so that a test can give it another loss or other data."""
    runs: list[Run] = []

    def make(*further: str, loss=next_token_losses, source=None, val_source=None) -> Trainer:
        recipe = config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", *further))
        shards = TokenShards.open(tiny_shards / "train")
        model = build_model(recipe.model, tiny_tokenizer, torch.device("cpu"), recipe.loop.seed)
        runs.append(Run(recipe.out, recipe, "pretrain", recipe.resume))
        data = source or PretrainDataset(shards, recipe.seq_len, recipe.loop.seed)
        prepared = Prepared(model=model, dtype=torch.float32)
        return Trainer(recipe, runs[-1], prepared, tiny_tokenizer, data, val_source, loss)

    yield make
    for run in runs:
        run.close()


def poisoned(steps: set[int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The loss, not a number in the given calls."""
    calls = 0

    def loss(model, batch: Batch, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        value, by_token = next_token_losses(model, batch, z_loss)
        return value * float("nan") if calls in steps else value, by_token

    return loss


# ------------------------------------------------------------------------------------------------------------ learning
def test_learns_a_small_batch_by_heart(trainer) -> None:
    rng = np.random.default_rng(0)
    samples = [Sample(token_ids=rng.integers(0, 500, 20, np.int32), loss_weights=np.ones(20, np.float32))]
    further = ["loop.steps=150", "loop.batch_rows=1", "optim.lr=1e-2", "optim.weight_decay=0"]
    result = trainer(*further, source=SampleDataset(samples, 32)).train()
    assert result.train_loss < 0.02


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_loss_falls(kind: str, tmp_path: Path, pretrain_arguments) -> None:
    further = [f"optim.kind={kind}", "loop.steps=40", "optim.lr=1e-2"]
    result = pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", *further)))
    first = read_metrics(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(np.log(512), rel=0.02), "at the start every token is equally likely"
    assert result.train_loss < 0.85 * first


def test_loss_does_not_depend_on_micro_batches(tmp_path: Path, pretrain_arguments) -> None:
    records = []
    for size in (1, 3, 4):
        out = tmp_path / str(size)
        pretrain(config.load(PretrainConfig, pretrain_arguments(out, "loop.steps=4", f"loop.micro_batch_rows={size}")))
        records.append([(r["loss"], r["grad_norm"]) for r in read_metrics(out)])
    np.testing.assert_allclose(records[0], records[2], rtol=2e-4)
    np.testing.assert_allclose(records[1], records[2], rtol=2e-4)


# --------------------------------------------------------------------------------------------------------- bad batches
def test_a_bad_batch_is_skipped_and_kept(trainer, tmp_path: Path, capsys) -> None:
    bad = trainer("loop.steps=6", loss=poisoned({3}))
    weights: list[torch.Tensor] = []
    set_aside = bad._set_aside

    def watch(first_row, reason) -> None:
        weights.append(bad.model.model.embed_tokens.weight.detach().clone())
        set_aside(first_row, reason)
        weights.append(bad.model.model.embed_tokens.weight.detach().clone())

    bad._set_aside = watch
    result = bad.train()
    assert result.skipped_steps == 1
    assert result.steps == 6
    assert np.isfinite(result.train_loss)
    assert all(bool(torch.isfinite(p).all()) for p in bad.model.parameters())
    assert torch.equal(*weights)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in text, "JSON has no NaN"
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [record["step"] for record in records if "skipped" in record] == [3]
    assert records[2]["loss"] is None
    assert records[2]["skipped"] == "loss is nan"
    kept = np.load(tmp_path / "run/bad_batches/step_000000003.npz")
    bad.loader.load_state_dict(bad.loader.state_dict() | {"epoch": 0, "position": 8})
    for number, row in enumerate(next(bad.loader)):
        assert np.array_equal(kept[f"tokens_{number}"], row.tokens)
        assert np.array_equal(kept[f"seq_lens_{number}"], row.seq_lens)
    said = " ".join(capsys.readouterr().err.split())
    assert "step 3 skipped: loss is nan (rows 8 to 11 of the data order, kept in" in said


def test_stops_after_many_bad_batches(trainer, tmp_path: Path, monkeypatch) -> None:
    """With the checkpoint whole that a thread is writing at this time: a rank's process would not wait for it."""
    write = TensorFiles.write
    monkeypatch.setattr(TensorFiles, "write", lambda *arguments: (time.sleep(0.3), write(*arguments))[1])
    further = ("guard.max_consecutive=3", "checkpoint.every_steps=8", "checkpoint.background=on")
    stopping = trainer("loop.steps=20", *further, loss=poisoned({2, 4, 5, 7, 8, 9}))
    with pytest.raises(ValueError, match=r"3 steps in a row were skipped, .* loss is nan \(rows 32 to 35"):
        stopping.train()
    assert sorted(p.stem for p in (tmp_path / "run/bad_batches").iterdir()) == [
        f"step_{step:09d}" for step in (2, 4, 5, 7, 8, 9)
    ]
    assert (tmp_path / "run/checkpoints/step_000000008/COMPLETE").exists()
    assert all(bool(torch.isfinite(p).all()) for p in stopping.model.parameters())


def test_steps_without_any_weight_are_skipped(trainer) -> None:
    class Unweighted(PretrainDataset):
        def row(self, epoch, index):
            row = super().row(epoch, index)
            return dataclasses.replace(row, loss_weights=np.zeros_like(row.loss_weights))

    first = trainer("loop.steps=2", "guard.max_consecutive=1")
    quiet = Unweighted(first.loader.source.shards, 48, 0)
    first.run.close()
    assert trainer("loop.steps=2", "guard.max_consecutive=1", source=quiet).train().skipped_steps == 2


def test_spike_rule() -> None:
    """Not before half a window; then above factor * median, not at it; rejected norms do not move the median."""
    guard = Guard(GuardConfig(grad_norm_factor=10, window_steps=6, max_consecutive=2))
    assert guard.verdict(1.0, 1.0) is None
    assert guard.verdict(1.0, 500.0) is None, "too early to judge"
    assert guard.verdict(1.0, 2.0) is None
    assert guard.verdict(1.0, 20.0) is None, "exactly 10 times the median 2"
    guard = Guard(GuardConfig(grad_norm_factor=10, window_steps=6, max_consecutive=2))
    for norm in (1.0, 2.0, 3.0):
        assert guard.verdict(1.0, norm) is None
    assert guard.verdict(1.0, 20.001) == "gradient norm 20 is 10 times its median 2"
    assert not guard.exhausted
    assert guard.verdict(1.0, float("inf")) == "gradient norm is inf"
    assert guard.exhausted
    assert list(guard.norms) == [1.0, 2.0, 3.0]
    other = Guard(guard.cfg)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.exhausted
    assert other.verdict(float("inf"), 1.0) == "loss is inf"
    assert other.verdict(1.0, 1.0) is None
    assert not other.exhausted
    for norm in (4.0, 4.0, 4.0, 4.0):
        other.verdict(1.0, norm)
    assert len(other.norms) == 6


def test_spike_rule_off_and_zero_norms() -> None:
    guard = Guard(GuardConfig(grad_norm_factor=0, window_steps=2))
    assert [guard.verdict(1.0, norm) for norm in (1.0, 1.0, 1e9)] == [None] * 3
    still = Guard(GuardConfig(window_steps=2))
    assert [still.verdict(0.0, norm) for norm in (0.0, 0.0, 1.0)] == [None] * 3, "a median of 0 has no multiples"


def test_spike_in_training(trainer) -> None:
    calls = 0

    def spiky(model, batch: Batch, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        value, by_token = next_token_losses(model, batch, z_loss)
        return value * (1000.0 if calls == 8 else 1.0), by_token

    result = trainer("loop.steps=10", "guard.window_steps=8", loss=spiky).train()
    assert result.skipped_steps == 1


# --------------------------------------------------------------------------------------------------------- checkpoints
def kept_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("losses", "options", "want"),
    [
        ([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], ["checkpoint.keep_last=2"], [4, 10, 12]),
        ([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], ["checkpoint.keep_last=1"], [4, 12]),
        ([5.0, 1.0, 3.0, 2.0, 0.5, 6.0], ["checkpoint.keep_last=1"], [10, 12]),
        ([5.0, 1.0, 3.0, 2.0, 4.0, 0.1], ["checkpoint.keep_last=1"], [12]),
        ([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], ["checkpoint.keep_last=2", "checkpoint.keep_best=false"], [10, 12]),
        ([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], ["checkpoint.keep_last=1", "checkpoint.every_steps=5"], [4, 12]),
    ],
)
def test_what_is_kept(losses, options, want, trainer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: losses[self.state.step // 2 - 1])
    training = trainer("loop.steps=12", "loop.eval_every=2", "checkpoint.every_steps=2", *options)
    training.val_source = training.loader.source
    assert training.train().val_loss == losses[-1]
    assert kept_steps(tmp_path / "run") == want
    state = json.loads((tmp_path / f"run/checkpoints/step_{12:09d}/state.json").read_text())
    assert state["best_loss"] == min(losses)


def test_validation_loss_by_hand(tmp_path: Path, pretrain_arguments, tiny_shards, tiny_tokenizer) -> None:
    """The mean over all weighted tokens of the first rows, computed from the saved model."""
    further = [f"val_shards={tiny_shards / 'val'}", "loop.steps=2", "loop.eval_rows=3", "seq_len=32"]
    result: TrainResult = pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", *further)))
    model = load_model(tmp_path / "run")
    dataset = PretrainDataset(TokenShards.open(tiny_shards / "val"), 32, 0)
    total, count = 0.0, 0
    for index in range(min(3, dataset.num_rows)):
        row = dataset.row(0, index)
        start = 0
        for length in row.seq_lens.tolist():
            part = slice(start, start + length)
            logits = model.logits(torch.tensor(row.tokens[part].astype(np.int64))[None])[0]
            targets = torch.tensor(row.targets[part].astype(np.int64))
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            keep = torch.tensor(row.tokens[part] != tiny_tokenizer.eod_id)
            total, count = total + float(losses[keep].sum()), count + int(keep.sum())
            start += length
    assert result.val_loss == pytest.approx(total / count, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- recording
def test_records_and_provenance(tmp_path: Path, pretrain_arguments, capsys) -> None:
    arguments = pretrain_arguments(tmp_path / "run", "loop.steps=7", "loop.log_every=3", "ops.attention=reference")
    assert cli.main(["pretrain", *arguments]) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 6, 7]
    assert records[0]["lr"] == pytest.approx(3e-3 * 3 / 4)
    assert records[0]["tokens"] == 4 * 48
    assert {"time", "loss", "grad_norm", "tokens_per_s", "mfu"} <= records[0].keys()
    facts = json.loads((tmp_path / "run/provenance.json").read_text())
    assert facts["ops"]["attention"] == "reference"
    assert facts["precision"] == "float32"
    assert facts["parameters"] > 10_000
    out = capsys.readouterr().out
    assert "7 steps, 1,344 tokens, training loss" in out
    assert f"model: {tmp_path / 'run/model'}" in out


def test_precision_of_a_run_does_not_change(tmp_path: Path, pretrain_arguments, monkeypatch) -> None:
    """`auto` measures the machine; what it chose at the start holds after a resumption that would measure otherwise."""
    arguments = pretrain_arguments(tmp_path / "run", "loop.precision=auto", "loop.steps=4", "checkpoint.every_steps=2")
    for steps, measured in ((2, torch.bfloat16), (4, torch.float32), (5, torch.float32)):
        if steps == 5:  # damage that is JSON still: the checkpoint before says it
            state = tmp_path / "run/checkpoints/step_000000004/state.json"
            state.write_text(state.read_text().replace("best_loss", "best_lXss"))
        monkeypatch.setattr(prepare, "pick_dtype", lambda precision, device, dtype=measured: dtype)
        recipe = config.load(PretrainConfig, [*arguments, f"loop.steps={steps}", "resume=force"])
        pretrain(recipe)
    assert (tmp_path / "run/checkpoints/damaged_step_000000004").exists()
    assert json.loads((tmp_path / "run/provenance.json").read_text())["precision"] == "bfloat16"
    assert json.loads((tmp_path / "run/model/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_result_is_a_model_that_transformers_loads(tmp_path: Path, pretrain_arguments) -> None:
    pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", "loop.steps=2")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits.detach(), load_model(tmp_path / "run").logits(ids), rtol=0, atol=1e-4)
