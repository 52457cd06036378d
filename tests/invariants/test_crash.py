"""kill -9 at any moment loses nothing that was saved: the run loads, resumes, and ends with an undisturbed run's bits.

Two ways to die: a real `qwench pretrain` process shot from outside, and a forked one that shoots itself just before the
n-th change it makes to the file system, for many n, so that every stage of writing and pruning a checkpoint is hit.
"""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwench import cli, config
from qwench.ops.hardware import peak_flops
from qwench.run import Run, read_metrics
from qwench.train.checkpoint import Checkpoints
from qwench.train.config import PretrainConfig

STEPS = 24
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
OPTIONS = (f"loop.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=1", "loop.eval_every=2")


def saved_steps(run: Path) -> list[int]:
    return Checkpoints(run / "checkpoints", keep_last=1, keep_best=True).steps()


def in_child(work: Callable[[], object], limit_s: float = 60) -> int:
    """Run `work` in a fork of this process; its wait status."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 1
        try:
            code = work()
        finally:
            os._exit(code if isinstance(code, int) else 0)
    deadline = time.monotonic() + limit_s
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return done[1]


def path_of(event: str, args: tuple[object, ...]) -> str:
    """The path that an audit event is about; removals inside a tree name their directory by a descriptor."""
    directory = args[1] if event in ("os.remove", "os.rmdir") else -1
    return f"{os.readlink(f'/proc/self/fd/{directory}')}/{args[0]}" if directory != -1 else str(args[0])


def killed_at(change: int, run: Path, arguments: list[str], ctrl_c_at: int = 0) -> tuple[bool, int]:
    """Run in a child that dies before its `change`-th change of the run directory.

    With `ctrl_c_at`, Ctrl-C comes when the checkpoint of that step is put into place, and counting begins there.
    Returns whether it was killed, and the newest checkpoint that it had seen complete before.
    """
    shared = mmap.mmap(-1, 8)

    def work() -> int:
        count, newest, counting = 0, 0, not ctrl_c_at

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count, newest, counting
            writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
            if not (event in CHANGES or writes) or str(run) not in path_of(event, args):
                return
            newest = max([newest, *saved_steps(run)])
            if event == "os.rename" and str(args[1]).endswith(f"/step_{ctrl_c_at:09d}"):
                counting = True
                signal.raise_signal(signal.SIGINT)
            count += counting
            shared[:] = newest.to_bytes(8, "little")
            if count == change:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        return cli.main(["pretrain", *arguments])

    status = in_child(work)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == (130 if ctrl_c_at else 0), f"exit status {status}"
    return killed, int.from_bytes(shared[:], "little")


def assert_nothing_lost(run: Path, newest: int) -> None:
    """What was complete is there, and what looks complete is."""
    steps = saved_steps(run)
    assert max(steps, default=0) >= newest, f"checkpoint {newest} is lost"
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:09d}"
        names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert names >= {"state.json", "optimizer.safetensors", "model/config.json", "model/model.safetensors"}
        assert "model/tokenizer.json" in names


def contents(run: Path) -> dict[str, object]:
    """All that must not depend on crashes."""
    files = [f"checkpoints/step_{STEPS:09d}/{name}" for name in ("model/model.safetensors", "optimizer.safetensors")]
    files += [f"checkpoints/step_{STEPS:09d}/state.json", "model/model.safetensors", "model/tokenizer.json"]
    records = [(r["step"], r.get("loss"), r.get("lr"), r.get("val_loss")) for r in read_metrics(run)]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    return {name: (run / name).read_bytes() for name in files} | {"records": records, "kept": kept}


def test_every_kind_of_moment(tmp_path: Path, pretrain_arguments, tiny_shards: Path) -> None:
    """One run in many lives, each shot at another moment; after the last the run is as if nothing had happened."""
    options = [*OPTIONS, f"val_shards={tiny_shards / 'val'}"]
    peak_flops(torch.device("cpu"), torch.float32)  # measured once, here, and not in every fork
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_arguments(straight, *options)]) == 0
    arguments = pretrain_arguments(run, *options)
    # A start makes about 16 changes, a checkpoint about 24 and the removal of the one before about 12.
    for moment in (1, 6, 11, 15, *range(18, 84, 3)):
        killed, newest = killed_at(moment, run, arguments)
        assert killed, f"only {saved_steps(run)} steps were left at change {moment}; raise STEPS"
        assert_nothing_lost(run, newest)
        steps = [record["step"] for record in read_metrics(run) if "loss" in record] if newest else []
        assert steps == list(range(1, len(steps) + 1))
    assert len(saved_steps(run)) >= 1
    assert cli.main(["pretrain", *arguments]) == 0
    (run / "model/model.safetensors").unlink()
    for moment in (20, 26, 30):  # these hit the export of the result
        killed_at(moment, run, arguments)
    assert cli.main(["pretrain", *arguments]) == 0
    assert contents(run) == contents(straight)


def test_ctrl_c_at_a_checkpoint_then_shot(tmp_path: Path, pretrain_arguments) -> None:
    """Ctrl-C asks for a checkpoint at a step that has one just now: it must not be replaced by way of none."""
    run = tmp_path / "run"
    arguments = pretrain_arguments(run, *OPTIONS)
    peak_flops(torch.device("cpu"), torch.float32)
    for step, moment in enumerate((2, 5, 8, 11, 14, 30, 45), 2):
        _, newest = killed_at(moment, run, arguments, ctrl_c_at=step)
        assert_nothing_lost(run, newest)
        assert saved_steps(run)[-1] == step


def test_shot_from_outside(tmp_path: Path, pretrain_arguments, tiny_shards: Path) -> None:
    steps = 30
    options = (f"loop.steps={steps}", "checkpoint.every_steps=1")
    run = tmp_path / "run"
    arguments = pretrain_arguments(run, *options)
    for lines in (4, 12):
        process = subprocess.Popen(
            [sys.executable, "-m", "qwench.cli", "pretrain", *arguments], stderr=subprocess.PIPE, text=True
        )
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        before = max(saved_steps(run), default=0)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert max(saved_steps(run), default=0) >= before
    assert cli.main(["pretrain", *arguments]) == 0
    straight = tmp_path / "straight"
    assert cli.main(["pretrain", *pretrain_arguments(straight, f"loop.steps={steps}")]) == 0
    for name in ("model/model.safetensors", f"checkpoints/step_{steps:09d}/optimizer.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert [r["step"] for r in read_metrics(run)] == list(range(1, steps + 1))
    assert [r["loss"] for r in read_metrics(run)] == [r["loss"] for r in read_metrics(straight)]


def test_no_room_for_a_checkpoint(tmp_path: Path, pretrain_arguments) -> None:
    """A checkpoint that cannot be written ends the run with exit code 2 and leaves nothing half-made."""
    run = tmp_path / "run"
    arguments = pretrain_arguments(run, *OPTIONS)
    assert cli.main(["pretrain", *pretrain_arguments(run, *OPTIONS, "loop.steps=2")]) == 0

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # writing more than this fails with OSError
        return cli.main(["pretrain", *arguments, "resume=force"])

    assert os.waitstatus_to_exitcode(in_child(work)) == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000000002"]
    assert cli.main(["pretrain", *arguments, "resume=force"]) == 0
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))


def test_leftovers_go(tmp_path: Path, pretrain_arguments) -> None:
    """A half-removed checkpoint is no checkpoint and is removed; a user's copy is neither used nor touched."""
    run = tmp_path / "run"
    arguments = pretrain_arguments(run, "loop.steps=4", "checkpoint.every_steps=1")
    assert cli.main(["pretrain", *pretrain_arguments(run, "loop.steps=2")]) == 0
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_000000002", folder / "step_000000002_mine")
    shutil.copytree(folder / "step_000000002", folder / "step_000000001")
    shutil.copytree(folder / "step_000000002", folder / "step_000000003")
    for step in (1, 3):
        (folder / f"step_{step:09d}/COMPLETE").unlink()
    (folder / ".step_000000009/model").mkdir(parents=True)
    assert cli.main(["pretrain", *arguments, "resume=force"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_000000002_mine",
        "step_000000003",
        "step_000000004",
    ]
    assert saved_steps(run) == [3, 4]


def test_one_process_at_a_time(tmp_path: Path, pretrain_arguments, capsys) -> None:
    arguments = pretrain_arguments(tmp_path / "run", "loop.steps=2")
    recipe = config.load(PretrainConfig, arguments)
    with Run(tmp_path / "run", recipe, "pretrain"):
        assert cli.main(["pretrain", *arguments]) == 2
    assert "another process is working in" in capsys.readouterr().err
    assert cli.main(["pretrain", *arguments]) == 0
