"""Runs that lose a process or find a damaged checkpoint: they go on, or stop and say why."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import survival_worker as worker

from qwench import cli, config
from qwench.run import read_metrics
from qwench.train import job
from qwench.train.checksums import MANIFEST, find_damage
from qwench.train.config import PretrainConfig
from qwench.train.pretrain import pretrain

STEPS = 12


@pytest.fixture(scope="session")
def options(pretrain_arguments: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Arguments of 12 steps with a checkpoint every 4."""

    def arguments(out: Path, *further: str) -> list[str]:
        return pretrain_arguments(
            out, f"loop.steps={STEPS}", "loop.batch_rows=8", "checkpoint.every_steps=4", "checkpoint.keep_last=9",
            *further,
        )  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def finished(options: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    out = tmp_path_factory.mktemp("survival") / "run"
    pretrain(config.load(PretrainConfig, options(out)))
    return out


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:09d}"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run)]


# ----------------------------------------------------------------------------------------------------------- checksums
def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    return to


DAMAGES = {
    "weights": ("model/model.safetensors", lambda path: flip(path, path.stat().st_size - 1000), "tensor"),
    "optimiser": ("optimizer.safetensors", lambda path: flip(path, path.stat().st_size // 2), "tensor"),
    "header": ("optimizer.safetensors", lambda path: flip(path, 60), "optimizer"),
    "state": ("state.json", lambda path: flip(path, 20), "first"),
    "config": ("model/config.json", lambda path: flip(path, 20), "first"),
    "short": ("model/model.safetensors", lambda path: os.truncate(path, path.stat().st_size - 4), "bytes instead of"),
    "gone": ("state.json", Path.unlink, "No such file"),
    "manifest": (MANIFEST, lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_every_damage_is_found_by_one_of_the_ranks(name: str, finished: Path, tmp_path: Path) -> None:
    file, harm, word = DAMAGES[name]
    directory = shutil.copytree(checkpoint(finished, 8), tmp_path / "copy")
    assert [find_damage(directory, share, 3) for share in range(3)] == [None] * 3
    harm(directory / file)
    found = [damage for share in range(3) if (damage := find_damage(directory, share, 3)) is not None]
    assert found, "nobody noticed"
    assert all(Path(file).name in damage for damage in found)
    assert word in found[0]


def test_a_damaged_checkpoint_is_passed_over(finished: Path, options, tmp_path: Path, caplog, capsys) -> None:
    run = copy_of(finished, tmp_path / "run")
    flip(checkpoint(run, 12) / "state.json", 20)  # the data's place, the precision: read before the weights
    flip(checkpoint(run, 8) / "model/model.safetensors", 5000)
    assert cli.main(["pretrain", *options(run)]) == 0
    assert capsys.readouterr().err.count("warning: ") == 2
    assert "step_000000012/state.json is damaged" in caplog.text
    assert "step_000000008/model/model.safetensors is damaged: the bytes of rows" in caplog.text
    assert caplog.text.count("going back to step 4") == 2
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == sorted(
        [f"{prefix}step_{step:09d}" for prefix, step in (("", 4), ("", 8), ("", 12), ("damaged_", 8), ("damaged_", 12))]
    )
    assert losses(run) == losses(finished), "the same steps again"
    for name in ("model/model.safetensors", "optimizer.safetensors", "state.json", MANIFEST):
        assert (checkpoint(run, 12) / name).read_bytes() == (checkpoint(finished, 12) / name).read_bytes()


def test_nothing_whole_is_an_error(finished: Path, options, tmp_path: Path, capsys) -> None:
    run = copy_of(finished, tmp_path / "run")
    for step in (4, 8, 12):
        path = checkpoint(run, step) / "optimizer.safetensors"
        flip(path, path.stat().st_size - 100)
    assert cli.main(["pretrain", *options(run)]) == 2
    assert "every checkpoint in" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{s:09d}" for s in (4, 8, 12)]
    assert cli.main(["pretrain", *options(run, "checkpoint.verify=false")]) == 0, "not looked at, and no other recipe"


# ------------------------------------------------------------------------------------------------------------ restarts
def assert_same_run(run: Path, other: Path) -> None:
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1)), "every step once, in order"
    np.testing.assert_allclose([loss for _, loss in losses(run)], [loss for _, loss in losses(other)], rtol=2e-5)
    states = [json.loads((checkpoint(path, STEPS) / "state.json").read_text()) for path in (run, other)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["tokens"] == states[1]["tokens"]


@pytest.mark.multi
@pytest.mark.usefixtures("warm_processes")
def test_a_run_goes_on_with_fewer_processes(finished: Path, options, tmp_path: Path, monkeypatch, capsys) -> None:
    """Rank 1 is shot in step 7 of 12 and its device is gone; one process ends the run as if nothing had been."""
    run = tmp_path / "run"
    real = job._restarts
    monkeypatch.setattr(job, "_restarts", lambda *given: dataclasses.replace(real(*given), living=lambda: ["0"]))
    result = worker.run(config.load(PretrainConfig, options(run, "gpus=2", "resume=never")))
    assert result.steps == STEPS
    assert_same_run(run, finished)
    assert json.loads((run / "provenance.json").read_text())["layout"]["shard"] == 1
    assert "rank 1 of 2 was ended by SIGKILL" in (run / "logs/failures.txt").read_text()
    said = " ".join(capsys.readouterr().err.split())
    assert "the job failed: rank 1 of 2 was ended by SIGKILL" in said
    assert "restart 1 (at most 3 in a row without a new checkpoint), processes: 1" in said
