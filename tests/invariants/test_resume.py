"""20 steps are 10 steps and a resumption of 10 more, bit for bit: weights, optimiser, data position, losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench import cli
from qwench.run import Run, read_metrics

FILES = ("model/model.safetensors", "optimizer.safetensors", "state.json")


def run(stage: str, arguments: list[str]) -> None:
    assert cli.main([stage, *arguments]) == 0


def run_until(
    monkeypatch: pytest.MonkeyPatch, step: int, stage: str, arguments: list[str], number: int = signal.SIGINT
) -> None:
    """The command, with Ctrl-C (or another signal) while it works on `step`."""
    record = Run.record

    def record_and_interrupt(self: Run, **values: object) -> None:
        record(self, **values)
        if values["step"] == step and "loss" in values:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", record_and_interrupt)
        assert cli.main([stage, *arguments]) == 130


def values_of(run_directory: Path) -> list[tuple[object, ...]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "val_loss", "skipped")
    return [tuple(record.get(name) for name in names) for record in read_metrics(run_directory)]


def assert_equal_runs(left: Path, right: Path, step: int = 20) -> None:
    for file in FILES:
        paths = [directory / "checkpoints" / f"step_{step:09d}" / file for directory in (left, right)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), file
    assert (left / "model/model.safetensors").read_bytes() == (right / "model/model.safetensors").read_bytes()
    assert values_of(left) == values_of(right)


PRETRAIN = {
    "plain": [],
    "accumulation": ["loop.micro_batch_rows=1"],
    "growing batches": ["loop.batch_warmup={start_rows=2, tokens=300}", "schedule.kind=wsd", "loop.fp8=on"],
    "uneven micro-batches": ["loop.batch_rows=5", "loop.micro_batch_rows=2"],
    "bf16": ["loop.precision=bf16", "loop.micro_batch_rows=2"],
    "attend across": ["attend_across=true"],
    "muon": ["optim.kind=muon"],
    "auto precision": ["loop.precision=auto"],
}


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain(
    name: str, tmp_path: Path, pretrain_arguments: Callable[..., list[str]], tiny_shards: Path, monkeypatch
) -> None:
    further = [f"val_shards={tiny_shards / 'val'}", "loop.eval_every=6", "loop.eval_rows=2", *PRETRAIN[name]]
    straight = pretrain_arguments(tmp_path / "straight", *further)
    broken = pretrain_arguments(tmp_path / "broken", *further)
    run("pretrain", straight)
    run_until(monkeypatch, 10, "pretrain", broken)
    state = json.loads((tmp_path / "broken/checkpoints/step_000000010/state.json").read_text())
    assert state["step"] == 10
    assert state["loader"]["epoch"] >= 1
    assert 0 < state["loader"]["position"] < state["loader"]["num_rows"], "the interruption must fall inside an epoch"
    assert not (tmp_path / "broken/model").exists()
    run("pretrain", broken)
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sft(precision: str, tmp_path: Path, sft_arguments, conversations: Path, monkeypatch) -> None:
    further = [f"loop.precision={precision}", "loop.micro_batch_rows=1", f'val_data=["{conversations}"]']
    straight = sft_arguments(tmp_path / "straight", *further)
    broken = sft_arguments(tmp_path / "broken", *further)
    run("sft", straight)
    run_until(monkeypatch, 11, "sft", broken)
    run("sft", broken)
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_at_a_step_that_has_a_checkpoint(number: int, tmp_path: Path, pretrain_arguments, monkeypatch) -> None:
    """The checkpoint that is there already is not touched again."""
    arguments = pretrain_arguments(tmp_path / "run", "checkpoint.every_steps=5", "checkpoint.keep_last=1")
    run_until(monkeypatch, 10, "pretrain", arguments, number)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000010"]
    run("pretrain", arguments)
    run("pretrain", pretrain_arguments(tmp_path / "straight"))
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def test_a_finished_run_stays_as_it_is(tmp_path: Path, pretrain_arguments, tiny_shards: Path, capsys) -> None:
    arguments = pretrain_arguments(tmp_path / "run", "loop.steps=3", f"val_shards={tiny_shards / 'val'}")
    run("pretrain", arguments)
    before = (tmp_path / "run/metrics.jsonl").read_text(), (tmp_path / "run/model/model.safetensors").read_bytes()
    first = capsys.readouterr().out
    run("pretrain", arguments)
    again = capsys.readouterr().out
    assert before == (
        (tmp_path / "run/metrics.jsonl").read_text(),
        (tmp_path / "run/model/model.safetensors").read_bytes(),
    )
    assert "nothing was left to train" in again
    validation = next(part for part in first.splitlines()[0].split(", ") if part.startswith("validation"))
    assert validation in again


def test_first_steps_skipped_then_resumed(tmp_path: Path, sft_arguments, monkeypatch) -> None:
    """A state that was saved before the optimiser had one resumes too."""
    from qwench.train.guard import Guard

    verdict, calls = Guard.verdict, []

    def skip_two(self: Guard, loss: float, grad_norm: float) -> str | None:
        calls.append(loss)
        return verdict(self, float("nan") if len(calls) <= 2 else loss, grad_norm)

    arguments = sft_arguments(tmp_path / "run", "loop.steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "verdict", skip_two)
        run_until(monkeypatch, 2, "sft", arguments)
    run("sft", arguments)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_other_data_is_refused(tmp_path: Path, pretrain_arguments, monkeypatch, capsys) -> None:
    run_until(monkeypatch, 2, "pretrain", pretrain_arguments(tmp_path / "run"))
    assert cli.main(["pretrain", *pretrain_arguments(tmp_path / "run", "seq_len=32")]) == 2
    assert "different: seq_len" in capsys.readouterr().err
    assert cli.main(["pretrain", *pretrain_arguments(tmp_path / "run", "seq_len=32", "resume=force")]) == 2
    assert "resume with the same data" in capsys.readouterr().err


def test_more_steps_with_force(tmp_path: Path, pretrain_arguments, capsys) -> None:
    run("pretrain", pretrain_arguments(tmp_path / "run", "loop.steps=3"))
    longer = pretrain_arguments(tmp_path / "run", "loop.steps=5")
    assert cli.main(["pretrain", *longer]) == 2
    assert "resume=force" in capsys.readouterr().err
    run("pretrain", [*longer, "resume=force"])
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_ctrl_c_to_a_process(tmp_path: Path, pretrain_arguments) -> None:
    steps = 120
    arguments = pretrain_arguments(tmp_path / "broken", f"loop.steps={steps}")
    command = [sys.executable, "-m", "qwench.cli", "pretrain", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "broken/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step" in err
    assert "qwench: stopped" in err
    assert "Traceback" not in err
    [saved] = (tmp_path / "broken/checkpoints").iterdir()
    assert 3 <= int(saved.name.removeprefix("step_")) < steps
    run("pretrain", arguments)
    run("pretrain", pretrain_arguments(tmp_path / "straight", f"loop.steps={steps}"))
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken", steps)
