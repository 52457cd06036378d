"""Stages: what is done once, what again, what failure leaves, and what dies with whom."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipeline_jobs as jobs
import pytest

from qwench.data.pipeline.work import Finished, Item, Room, StageError, finished_items, run_stage

NUMBERS = [{"number": number} for number in range(6)]


def room_in(path: Path, workers: int = 1) -> Room:
    return Room(path=path, workers=workers, in_process=workers == 1)


def files(directory: Path) -> dict[str, bytes]:
    """Content of every file, without the records of times and processes."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "done.json")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def test_outputs_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    alone = run_stage(room_in(tmp_path / "a"), "squares", jobs.square, NUMBERS)
    together = run_stage(room_in(tmp_path / "b", 2), "squares", jobs.square, NUMBERS)
    assert [f.counts["number"] for f in alone] == [f.counts["number"] for f in together] == list(range(6))
    assert [f.digest for f in alone] == [f.digest for f in together], "no path outside the run counts"
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (alone[3].directory / "square.txt").read_text() == "9"
    assert {f.counts["pid"] for f in alone} == {os.getpid()}
    assert os.getpid() not in {f.counts["pid"] for f in together}


def test_finished_items_are_not_done_again(tmp_path: Path) -> None:
    room = room_in(tmp_path)
    run_stage(room, "s", jobs.square, NUMBERS[:4])
    first = {n: (tmp_path / f"s/{n:05d}/done.json").stat().st_mtime_ns for n in range(4)}
    again = run_stage(room, "s", jobs.square, [*NUMBERS[:2], {"number": 9}, *NUMBERS[3:]])
    assert [f.reused for f in again] == [True, True, False, True, False, False]
    assert (tmp_path / "s/00002/square.txt").read_text() == "81"
    assert (tmp_path / "s/00003/done.json").stat().st_mtime_ns == first[3]
    assert [f.reused for f in run_stage(room, "s", jobs.square, NUMBERS[:2], version=2)] == [False, False]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00000", "00001"], "items beyond the list are removed"
    assert [f is None for f in finished_items(room, "s", NUMBERS[:3], version=2)] == [False, False, True]


def test_a_file_that_is_missing_or_cut_is_made_again(tmp_path: Path) -> None:
    room = room_in(tmp_path)
    run_stage(room, "s", jobs.square, NUMBERS[3:])
    (tmp_path / "s/00000/square.txt").write_text("")
    (tmp_path / "s/00002/square.txt").unlink()
    again = run_stage(room, "s", jobs.square, NUMBERS[3:])
    assert [f.reused for f in again] == [False, True, False]
    assert (tmp_path / "s/00000/square.txt").read_text() == "9"


def _chain(path: Path, numbers: list[Item]) -> list[Finished]:
    room = room_in(path)
    squares = run_stage(room, "s", jobs.square, numbers)
    return run_stage(room, "d", jobs.double_file, [{"file": str(f.directory / "square.txt")} for f in squares])


def test_an_item_is_done_again_if_its_input_was(tmp_path: Path) -> None:
    _chain(tmp_path / "run", NUMBERS)
    again = _chain(tmp_path / "run", [{"number": 7}, *NUMBERS[1:]])
    assert [f.reused for f in again] == [False, *[True] * 5]
    assert (again[0].directory / "double.txt").read_text() == "4949"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert all(f.reused for f in _chain(tmp_path / "moved", [{"number": 7}, *NUMBERS[1:]])), "a run can be moved"


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_named_and_the_rest_goes_on(tmp_path: Path, workers: int) -> None:
    items = [{**item, "bad": [1, 4]} for item in NUMBERS]
    with pytest.raises(StageError, match=r"2 of 6 items of stage s failed: item 1 .*RuntimeError: no 1 please"):
        run_stage(room_in(tmp_path, workers), "s", jobs.fussy, items)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00000", "00002", "00003", "00005"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, workers: int) -> None:
    with pytest.raises(OSError, match="6 items left") as error:
        run_stage(room_in(tmp_path, workers), "s", jobs.full_disk, NUMBERS)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "s")
    run_stage(room_in(tmp_path), "s", jobs.square, NUMBERS)
    assert len(list((tmp_path / "s").iterdir())) == 6


def test_a_process_that_dies_once_costs_its_item_only(tmp_path: Path) -> None:
    items = [{**item, "deadly": 3, "once": True, "marker": str(tmp_path / "died")} for item in NUMBERS]
    done = run_stage(room_in(tmp_path / "room", 2), "s", jobs.mortal, items)
    assert (tmp_path / "died").exists()
    assert [f.counts["number"] for f in done] == list(range(6))


def test_an_item_that_always_kills_its_process_is_named(tmp_path: Path) -> None:
    items = [{**item, "deadly": 3, "once": False, "marker": str(tmp_path / "died")} for item in NUMBERS]
    with pytest.raises(StageError, match=r"1 of 6 items of stage s failed: item 3 .*its process died"):
        run_stage(room_in(tmp_path / "room", 2), "s", jobs.mortal, items)
    assert len(list((tmp_path / "room/s").iterdir())) == 5


def test_workers_die_with_the_process_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import pipeline_jobs as jobs\n"
        "from qwench.data.pipeline.work import Room, run_stage\n"
        "if __name__ == '__main__':\n"
        f"    items = [{{'marker': f'{tmp_path}/{{n}}', 'seconds': 60}} for n in range(2)]\n"
        f"    run_stage(Room(path=Path('{tmp_path}/room'), workers=2, in_process=False), 's', jobs.sleepy, items)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        markers = [tmp_path / "0", tmp_path / "1"]
        _wait(lambda: all(marker.exists() and marker.read_text() for marker in markers))
        workers = [int(marker.read_text()) for marker in markers]
        assert parent.pid not in workers
        assert all(_lives(pid) for pid in workers)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait(lambda: not any(_lives(pid) for pid in workers))


def _wait(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_jobs_that_other_processes_cannot_find(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="define the job at the top of a module"):
        run_stage(room_in(tmp_path, 2), "s", lambda item, directory: {}, NUMBERS)


def test_a_negative_number_of_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is -1"):
        Room(path=tmp_path, workers=-1)
