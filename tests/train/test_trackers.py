"""TensorBoard, wandb and trackio follow metrics.jsonl: the real packages where they are installed, written to disk."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwench import cli, config
from qwench.run import Run, read_metrics
from qwench.train import trackers
from qwench.train.config import FollowConfig, PretrainConfig
from qwench.train.pretrain import pretrain
from qwench.train.trackers import Trackers, flat

RECORD = {
    "time": 1000.5, "step": 3, "loss": 2.5, "tokens": 100, "val_loss": None, "skipped": "loss is nan",
    "loss_by_source": {"web": 2.0, "code": None}, "note": "text",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the packages write stays in the test's directory, and no key is known."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def tensorboard_points(run: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_numbers_of_a_record() -> None:
    assert flat(RECORD) == {"loss": 2.5, "tokens": 100.0, "skipped": 1.0, "loss_by_source/web": 2.0}


def test_tensorboard_of_a_resumed_run(tmp_path: Path, pretrain_arguments: Callable[..., list[str]]) -> None:
    """Steps after the checkpoint are repeated, with other losses, and stand there once."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    further = ["loop.steps=6", "checkpoint.every_steps=4", "follow.tensorboard=true"]
    recipe = config.load(PretrainConfig, pretrain_arguments(run, *further))
    with Run(run, recipe, "pretrain") as begun, Trackers(run, recipe.follow) as following:
        begun.listeners.append(following.put)
        for step in range(1, 6):  # a process that was shot before it had saved anything
            begun.record(step=step, loss=99.0 + step)
    pretrain(recipe)
    wanted = [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in read_metrics(run)]
    assert [step for step, _ in wanted] == [1, 2, 3, 4, 5, 6]
    assert tensorboard_points(run, "loss") == wanted


def wandb_points(run: Path) -> list[tuple[int, float]]:
    """Steps and losses in the offline runs, in the order in which they were begun."""
    from wandb.proto import wandb_internal_pb2

    points: list[tuple[int, float]] = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            table = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "loss" in table:
                points.append((record.history.step.num or int(table["_step"]), float(table["loss"])))
    return points


def log_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 kB of parts, each with checksum, length and its place in a record."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, place = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts = (b"" if place in (1, 2) else parts) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):
            yield parts


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_that_cannot_forget(kind: str, tmp_path: Path) -> None:
    """A second process repeats steps 3 and 4; a value that was sent is not sent again, one that was not is."""
    pytest.importorskip(kind)
    run = tmp_path / "run"
    run.mkdir()
    cfg = config.from_dict(FollowConfig, {f"{kind}_project": "tests", "name": "one"})
    with Trackers(run, cfg) as following:
        for step in (1, 2, 3, 4):
            following.put({"time": 0.0, "step": step, "loss": float(step)})
    assert not any(thread.failed for thread in following.threads)
    with Trackers(run, cfg) as following:
        for step in (3, 4, 5):
            following.put({"time": 0.0, "step": step, "loss": 10.0 + step})
            following.put({"time": 0.0, "step": step, "val_loss": 20.0 + step})
    assert not any(thread.failed for thread in following.threads)
    sent = json.loads((run / f"follow/{kind}.json").read_text())["sent"]
    assert sent == {"loss": 5, "val_loss": 5}
    if kind == "wandb":
        assert wandb_points(run) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 15.0)]
    else:
        [path] = (tmp_path / "trackio").glob("tests*.db")
        with sqlite3.connect(path) as table:
            rows = table.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
        found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
        assert [(step, values["loss"]) for _, step, values in found if "loss" in values] == [
            (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 15.0),
        ]  # fmt: skip
        assert [step for _, step, values in found if "val_loss" in values] == [3, 4, 5]
        assert {name for name, *_ in found} == {"one"}


def test_a_failing_tracker_stops_nothing(tmp_path: Path, monkeypatch, capsys, pretrain_arguments) -> None:
    """One warning; the others go on; the run ends as always."""

    class Broken:
        def __init__(self, run: Path, first_step: int) -> None:
            self.calls = 0

        def write(self, step: int, values: dict[str, float], wall_time: float | None) -> None:
            self.calls += 1
            if self.calls == 2:
                raise ConnectionError("the network is gone")

        def close(self) -> None: ...

    monkeypatch.setattr(trackers, "TensorBoard", Broken)
    run = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_arguments(run, "loop.steps=5", "follow.tensorboard=true")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("follows this run no longer") == 1
    assert "ConnectionError: the network is gone" in said
    assert len(read_metrics(run)) == 5
    ours = threading.enumerate()
    assert not [thread for thread in ours if thread.name.startswith("qwench-follow")]


def test_follow_afterwards(tmp_path: Path, pretrain_arguments, capsys) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    pretrain(config.load(PretrainConfig, pretrain_arguments(run, "loop.steps=3")))
    assert cli.main(["follow", str(run)]) == 2
    assert "no tracker is named; give tensorboard=true" in capsys.readouterr().err
    for _ in range(2):  # again gives nothing twice
        assert cli.main(["follow", str(run), "tensorboard=true"]) == 0
    assert "3 records of" in capsys.readouterr().out
    assert [step for step, _ in tensorboard_points(run, "grad_norm")] == [1, 2, 3]
    assert cli.main(["follow", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_follow_without_the_package(tmp_path: Path) -> None:
    """One line for the user, not a traceback: a process of its own, since pytest handles log records itself."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = "import sys; sys.modules['trackio'] = None; from qwench import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "follow", str(tmp_path), "trackio_project=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the package trackio; pip install trackio" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
