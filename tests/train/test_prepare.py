"""The parts that make training fast, wired into whole runs: compiled blocks, copies of weights, what is recorded."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from qwench import cli, config
from qwench.data.loader import RowLoader
from qwench.data.packing import PretrainDataset
from qwench.data.sources import JoinedShards
from qwench.model.load import load_model
from qwench.ops.dispatch import forced
from qwench.run import read_metrics
from qwench.train import prepare
from qwench.train.batch import make_batch
from qwench.train.compile import compile_blocks
from qwench.train.config import LoopConfig, PretrainConfig
from qwench.train.loop import Trainer, TrainResult
from qwench.train.loss import next_token_losses
from qwench.train.prepare import picks_compilation
from qwench.train.pretrain import pretrain
from qwench.train.start import build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Traced and partitioned as for a GPU, then run without a compiler; counts graphs."""
    counting = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(prepare, "compile_blocks", functools.partial(compile_blocks, backend=counting))
    return counting


@pytest.fixture
def train(pretrain_arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., TrainResult]:
    """A run of 6 steps into tmp_path / name."""

    def run(name: str, *further: str) -> TrainResult:
        return pretrain(config.load(PretrainConfig, pretrain_arguments(tmp_path / name, "loop.steps=6", *further)))

    return run


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def provenance(run: Path) -> dict:
    return json.loads((run / "provenance.json").read_text())


# ------------------------------------------------------------------------------------------------------------ compiled
def test_compiled_runs_are_the_same(train, backend, tmp_path: Path, tiny_shards: Path) -> None:
    """One graph with a gradient and one without serve uneven micro-batches, validation and its last rows; the export is
    checked without another."""
    further = (
        f"val_shards={tiny_shards / 'val'}", "loop.eval_rows=3", "loop.eval_every=3", "loop.batch_rows=5",
        "loop.micro_batch_rows=2",
    )  # fmt: skip
    want = train("plain", *further)
    assert backend.frame_count == 0, "auto is off on a CPU"
    assert provenance(tmp_path / "plain")["compiled"] is False
    assert provenance(tmp_path / "plain")["remat"] == "none"
    got = train("compiled", *further, "loop.compile=on")
    assert backend.frame_count == 2
    assert provenance(tmp_path / "compiled")["compiled"] is True
    assert provenance(tmp_path / "compiled")["ops"]["rms_norm"] == "compiled"
    assert provenance(tmp_path / "compiled")["remat"] == "elementwise"
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=2e-5)
    assert got.val_loss == pytest.approx(want.val_loss, rel=2e-5)


def test_compiled_for_all_lengths(backend, sft_arguments, tmp_path: Path, conversations: Path) -> None:
    """Fine-tuning has rows of all lengths: no graph for each."""
    for name, further in (("plain", ()), ("compiled", ("loop.compile=on",))):
        arguments = sft_arguments(tmp_path / name, "loop.steps=6", "seq_len=600", "loop.batch_rows=1", *further)
        assert cli.main(["sft", *arguments, f'val_data=["{conversations}"]']) == 0
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=2e-5)
    assert backend.frame_count <= 3


@pytest.mark.parametrize("remat", ["elementwise", "mlp", "attention", "full"])
def test_what_is_kept_does_not_matter(remat: str, train, tmp_path: Path) -> None:
    """The same bits, with copies of the weights in bf16."""
    results = [
        train(name, f"loop.remat={name}", "loop.precision=bf16", "loop.steps=3", "loop.micro_batch_rows=2")
        for name in ("none", remat)
    ]
    assert losses(tmp_path / remat) == losses(tmp_path / "none")
    assert results[0].train_loss == results[1].train_loss
    assert provenance(tmp_path / remat)["remat"] == remat


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_resumed_with_everything_on(state_dtype: str, train, backend, tmp_path: Path) -> None:
    """Compiled blocks, bf16 copies, small states, z-loss: interrupted and continued, the same bits."""
    further = (
        "loop.compile=on", "loop.precision=bf16", "loop.micro_batch_rows=2", "loop.z_loss=1e-3",
        f"optim.state_dtype={state_dtype}", "checkpoint.every_steps=3", "checkpoint.keep_last=2",
    )  # fmt: skip
    train("straight", *further)
    train("broken", *further)
    checkpoints = tmp_path / "broken/checkpoints"
    for path in (checkpoints / "step_000000006").rglob("*"):
        if path.is_file():
            path.unlink()
    train("broken", *further)
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        left, right = (tmp_path / run / "checkpoints/step_000000006" / name for run in ("straight", "broken"))
        assert left.read_bytes() == right.read_bytes(), name
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_when_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "can_compile", lambda device: True)
    auto, on, off = (LoopConfig(steps=1, compile=choice) for choice in ("auto", "on", "off"))
    assert picks_compilation(auto, GPU)
    assert not picks_compilation(auto, CPU)
    assert picks_compilation(on, CPU)
    assert not picks_compilation(off, GPU)
    with forced({"attention": "reference"}):
        assert not picks_compilation(auto, GPU)
    with forced({"cross_entropy": "reference"}):
        assert picks_compilation(auto, GPU)
    monkeypatch.setattr(prepare, "can_compile", lambda device: False)
    assert not picks_compilation(auto, GPU)
    with pytest.raises(ValueError, match=r"loop\.compile=on needs a C\+\+ compiler"):
        picks_compilation(on, CPU)


def test_forced_operations_and_compiled_blocks(train) -> None:
    with pytest.raises(ValueError, match=r"ops\.rms_norm=fused; leave it out, or set loop\.compile=off"):
        train("run", "loop.compile=on", "ops.rms_norm=fused")


@pytest.mark.gpu
def test_waits_for_nothing_but_an_event(train, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first steps, which compile, none waits for all that is queued: its loss and gradient norm come by an
    event, behind which the optimiser runs."""
    step, waits = Trainer._step, []

    def watched(self: Trainer) -> dict:
        if self.state.step < 3:
            return step(self)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                record = step(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                torch.set_warn_always(False)
        # Not torch's warning that the mode is a prototype, which also speaks of synchronizing operations.
        messages = [one for one in caught if "called a synchronizing" in str(one.message)]
        waits.append([f"{Path(one.filename).name}:{one.lineno}" for one in messages])
        return record

    monkeypatch.setattr(Trainer, "_step", watched)
    further = ("loop.device=cuda", "loop.precision=bf16", "loop.micro_batch_rows=2", "optim.state_dtype=bf16")
    train("run", *further, "model.config.head_dim=64", "loop.z_loss=1e-4")
    assert waits == [[], [], []]


# -------------------------------------------------------------------------------------------------------------- z-loss
def test_z_loss_by_definition(tiny_model, tiny_shards: Path) -> None:
    """Gradients of sum w * (cross-entropy + z * (log sum exp)^2) taken from whole logits."""
    rows = PretrainDataset(JoinedShards.open([tiny_shards / "train"]), 48)
    batch = make_batch([rows.row(0, 0), rows.row(0, 1)], CPU, total_weight=80.0)
    total, by_token = next_token_losses(tiny_model, batch, 0.01)
    parameters = dict(tiny_model.named_parameters())
    got = torch.autograd.grad(total, list(parameters.values()))
    logits = tiny_model.head(tiny_model(batch.tokens_T, batch.positions_T, batch.meta))
    logsumexp = logits.logsumexp(-1)
    losses_T = logsumexp - logits.gather(1, batch.targets_T[:, None])[:, 0]
    want = ((losses_T + 0.01 * logsumexp.square()) * batch.loss_weights_T).sum()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(by_token, losses_T.detach())
    for name, left, right in zip(parameters, got, torch.autograd.grad(want, list(parameters.values())), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


def test_z_loss_is_recorded_apart(train, tmp_path: Path, tiny_shards: Path) -> None:
    """At the start log sum exp is near ln 512 for every token. Training differs, loss and validation have no z-loss."""
    further = (f"val_shards={tiny_shards / 'val'}", "loop.eval_every=1", "loop.micro_batch_rows=2")
    results = {z_loss: train(z_loss, *further, f"loop.z_loss={z_loss}") for z_loss in ("0", "1e-2")}
    plain, with_z = (read_metrics(tmp_path / name) for name in results)
    assert "z_loss" not in plain[0]
    assert with_z[0]["z_loss"] == pytest.approx(1e-2 * math.log(512) ** 2, rel=0.02)
    assert with_z[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert with_z[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-5)
    model = load_model(tmp_path / "1e-2")
    rows = PretrainDataset(JoinedShards.open([tiny_shards / "val"]), 48, 0)
    batch = make_batch([rows.row(0, index) for index in range(rows.num_rows)], CPU)
    with torch.no_grad():
        loss = float(next_token_losses(model, batch)[0] / batch.loss_weights_T.sum())
    assert results["1e-2"].val_loss == pytest.approx(loss, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- sources
def test_losses_by_source(train, tmp_path: Path, tiny_shards: Path, tiny_tokenizer) -> None:
    """Two directories in one run: each source's mean loss in the first step, by hand from the first weights."""
    sources = f'train_shards=["{tiny_shards / "train"}", "{tiny_shards / "val"}"]'
    train("run", sources, "loop.micro_batch_rows=3")
    record = read_metrics(tmp_path / "run")[0]
    recipe = config.load(PretrainConfig, [str(tmp_path / "run/config.toml")])
    dataset = PretrainDataset(JoinedShards.open([tiny_shards / "train", tiny_shards / "val"]), 48, recipe.loop.seed)
    rows = next(RowLoader(dataset, recipe.loop.batch_rows, recipe.loop.seed, prefetch=0))
    batch = make_batch(rows, CPU)
    assert batch.sources_T is not None
    model = build_model(recipe.model, tiny_tokenizer, CPU, recipe.loop.seed)
    with torch.no_grad():
        losses_T = next_token_losses(model, batch)[1]
    want = {}
    for number, name in enumerate(("train", "val")):
        weights_T = batch.loss_weights_T * (batch.sources_T == number)
        want[name] = float((losses_T * weights_T).sum() / weights_T.sum())
    assert record["loss_by_source"] == pytest.approx(want, rel=1e-5)
    train("single", "loop.steps=1")
    assert "loss_by_source" not in read_metrics(tmp_path / "single")[0]


# ----------------------------------------------------------------------------------------------------- optimiser states
def test_states_in_bf16_and_back(train, tmp_path: Path, capsys) -> None:
    """Kept and resumed as they are; another dtype needs resume=force and is a cast; the run goes on."""
    further = ("checkpoint.every_steps=3", "optim.state_dtype=bf16")
    train("half", *further)
    stored = load_file(tmp_path / "half/checkpoints/step_000000006/optimizer.safetensors")
    dtypes = {name.rpartition("/")[2]: value.dtype for name, value in stored.items()}
    assert dtypes == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "step": torch.float32}
    train("full", "checkpoint.every_steps=3")
    np.testing.assert_allclose(losses(tmp_path / "half"), losses(tmp_path / "full"), rtol=2e-2)
    with pytest.raises(ValueError, match=r"different: loop\.steps, optim\.state_dtype"):
        train("half", "checkpoint.every_steps=3", "loop.steps=9")
    train("half", "checkpoint.every_steps=3", "loop.steps=9", "resume=force")
    again = load_file(tmp_path / "half/checkpoints/step_000000009/optimizer.safetensors")
    assert {value.dtype for value in again.values()} == {torch.float32}
    assert len(losses(tmp_path / "half")) == 9
    with pytest.raises(ValueError, match=r"at most 0\.98"):
        train("slow", "optim.state_dtype=bf16", "optim.betas=[0.9, 0.999]")
