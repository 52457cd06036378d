"""Jobs that are started again: what is repeated, with how many processes, and how often."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import job_worker as worker
import pytest

from qwench.parallel.restart import JobFailure, Restarts, can_pass, supervised


def failing(failures: list[JobFailure | Exception]) -> Callable[..., tuple]:
    """A job that fails so often; then it gives what it was started with."""

    def start(arguments: tuple, world: int, devices: str | None, number: int) -> tuple:
        if failures:
            raise failures.pop(0)
        return arguments, world, devices, number

    return start


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwench.parallel.restart.PAUSE_S", 0.0)


def lost(may_pass: bool = True) -> JobFailure:
    return JobFailure("rank 3 of 4 was ended by SIGKILL", may_pass=may_pass)


def test_restarts_with_what_is_left(tmp_path: Path) -> None:
    fits = {4: ("four",), 2: ("two",)}
    left = [["0", "1", "3"], ["0", "1", "2", "3"]]
    restarts = Restarts(
        limit=2, progress=lambda: 0, arguments_for=lambda world: fits.get(world), living=lambda: left.pop(0)
    )
    result = supervised(failing([lost()]), ("four",), world=4, logs=tmp_path, restarts=restarts)
    assert result == (("two",), 2, "0,1", 1), "three do not divide"
    result = supervised(failing([lost()]), ("four",), world=4, logs=tmp_path, restarts=restarts)
    assert result == (("four",), 4, "0,1,2,3", 1), "it was the process, not the device"
    assert (tmp_path / "failures.txt").read_text().count("SIGKILL") == 2


def test_gives_up_without_progress_only(tmp_path: Path) -> None:
    saved = iter([0, 0, 0, 0])
    restarts = Restarts(limit=2, progress=lambda: next(saved), arguments_for=lambda world: ())
    with pytest.raises(JobFailure, match="Given up after 2 restarts in a row without a new checkpoint"):
        supervised(failing([lost()] * 9), (), world=2, logs=tmp_path, restarts=restarts)
    steps = iter(range(99))
    restarts = Restarts(limit=2, progress=lambda: next(steps), arguments_for=lambda world: ())
    assert supervised(failing([lost()] * 9), (), world=2, logs=tmp_path, restarts=restarts)[3] == 9


def test_what_is_not_repeated(tmp_path: Path) -> None:
    restarts = Restarts(limit=9, progress=lambda: 0, arguments_for=lambda world: None)
    for error in (ValueError("bad recipe"), KeyboardInterrupt(), lost(may_pass=False)):
        with pytest.raises(type(error)):
            supervised(failing([error]), (), world=2, logs=tmp_path, restarts=restarts)
    with pytest.raises(JobFailure, match="does not fit on what is left"):
        supervised(failing([lost()]), (), world=2, logs=tmp_path, restarts=restarts)
    assert can_pass("DistBackendError", "NCCL error in: ...")
    assert can_pass("RuntimeError", "[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    assert can_pass("AcceleratorError", "CUDA error: unspecified launch failure")
    assert not can_pass("RuntimeError", "The size of tensor a (3) must match the size of tensor b (4)")
    assert not can_pass("OutOfMemoryError", "CUDA out of memory")
    assert not can_pass("ZeroDivisionError", "division by zero")


@pytest.mark.multi
def test_torchrun_starts_again(tmp_path: Path) -> None:
    """Rank 1 is shot in the first attempt; both are started again, and meet in the store that knows the old ones."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run([*command, worker.__file__, "torchrun", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attempt 0 rank 1",
        "attempt 1 rank 0",
        "attempt 1 rank 1",
    ]
    assert (tmp_path / "attempt 1 rank 0").read_text() == "1.0"
