"""A job that hangs ends, and says who kept whom waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import job_worker as worker
import pytest

from qwench.parallel.launch import EXIT_HANG, run_job
from qwench.parallel.restart import JobFailure
from qwench.parallel.watchdog import Standing, Watchdog, judge_hang


@pytest.mark.multi
@pytest.mark.usefixtures("warm_processes")
def test_a_hang_ends_the_job_and_names_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(JobFailure) as caught:
        run_job(worker.waits_for_the_others, (tmp_path,), gpus=3, on_gpu=False, logs=tmp_path)
    assert caught.value.may_pass
    text = str(caught.value)
    assert "did not arrive: rank 2 (no answer: stopped, or stuck outside Python), rank 1 (step 7, training step" in text
    assert "the others wait at step 7, training step" in text
    stacks = {rank: (tmp_path / f"rank_{rank}.stacks.txt").read_text() for rank in (0, 1)}
    assert "in waits_for_the_others" in stacks[1]
    assert "time.sleep(600)" in stacks[1]
    assert stacks[0].startswith("==== ")
    assert "rank 0 of 3" in stacks[0]
    assert "---- thread MainThread" in stacks[0]
    assert "dist.barrier()" in stacks[0]


def test_slow_is_not_hung_and_hung_ends_a_single_process(tmp_path: Path) -> None:
    """It validates for twice its patience with marks, saves for as long as something that may, and then hangs."""
    done = subprocess.run(
        [sys.executable, worker.__file__, "hang", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EXIT_HANG, done.stderr
    assert done.stdout.split() == ["validated", "saved", "unwatched"]
    assert "no progress for" in done.stderr
    assert "at step 5, training step" in done.stderr
    assert "time.sleep(600)" in (tmp_path / "rank_0.stacks.txt").read_text()


def test_no_patience_watches_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, patience_s=0.0, long_patience_s=1.0) as watch:
        assert watch._thread is None


def standing(rank: int, step: int = 7, doing: str = "training step", **collectives: int) -> Standing:
    return Standing(rank=rank, step=step, doing=doing, idle_s=10.0, collectives=collectives)


def test_who_keeps_whom_waiting() -> None:
    assert "did not arrive: rank 1 (step 6, saving a checkpoint, for 10 s); the others wait at step 7" in judge_hang(
        [standing(0), standing(1, 6, "saving a checkpoint"), standing(2)], 3
    )
    # Ranks of one group are compared; another group's number says nothing about them.
    told = [standing(0, a=5), standing(1, a=4), standing(2, b=9), standing(3, b=9)]
    assert "did not arrive: rank 1 (" in judge_hang(told, 4)
    assert "rank 2 (no answer" in judge_hang([standing(0), standing(1)], 3)
    assert "all 2 ranks have come equally far: step 7, training step" in judge_hang(
        [standing(0, a=1), standing(1, a=1)], 2
    )
