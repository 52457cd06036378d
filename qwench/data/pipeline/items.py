"""Items of a stage on the disk: where an item's output lies, when it counts as done, and how a job makes it.

An output is a directory that gets its name when it is whole; DONE in it says what made it and how long its files are.
Which items there are (`pipeline.work`) and in which process one is done (`pipeline.executors`) is not decided here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from qwench.run import usable_cores

Item = Mapping[str, Any]
"""What a job is told: JSON values; files as paths. The key "bytes", if there, is its size for progress and order."""
Job = Callable[[Item, Path], dict[str, Any]]
"""A module-level function: reads the files that the item names, writes below the path, returns counts as JSON values.
It must not depend on anything else, the clock, the process or earlier calls included."""

DONE = "done.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The output of one item: `Finished(directory=Path("run/work/prepare/00003"), counts={"documents": 812}, ...)`."""

    directory: Path
    counts: dict[str, Any]
    digest: str
    """Equal for equal item, version and inputs."""
    seconds: float = 0.0
    """What the job took when it ran."""
    reused: bool = False
    """Was there already."""


class Watcher(Protocol):
    """Sees the items of a stage finish: a progress display."""

    def begin(self, stage: str, num_items: int, num_bytes: int) -> None: ...
    def finished(self, item: Item, result: Finished) -> None: ...
    def end(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Room:
    """Where stages work, and by whom.

    `path` is one run's directory of stages, used by one process at a time.
    """

    path: Path
    workers: int = 0
    """Processes; 0: all cores (of the cluster, with Ray)."""
    runner: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    """For Ray: "auto", "HOST:PORT" or None for what RAY_ADDRESS says."""
    in_process: bool | None = None
    """True: everything is done by this process, which is faster for small inputs (starting others takes a second a
    stage); so it always is with one worker. None: so are stages below their `alone_bytes`. False: only single items
    below it."""
    watcher: Watcher | None = None
    _digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; give a number of processes, or 0 for all cores")
        self.path = Path(os.path.abspath(self.path))

    @property
    def num_workers(self) -> int:
        return self.workers or usable_cores()


@dataclass(frozen=True, slots=True)
class Task:
    number: int
    directory: str
    digest: str
    item: str


@dataclass(frozen=True, slots=True)
class Failure:
    number: int
    message: str
    trace: str = ""
    errno: int = 0


def size_of(item: Item) -> int:
    size = item.get("bytes", 0)
    return int(size) if isinstance(size, (int, float)) else 0


def weight_of(room: Room, item: Item) -> int:
    """Bytes of an item: as it says itself, else those of the files of the run that it names."""
    if "bytes" in item:
        return size_of(item)
    total = 0
    for name in set(_strings(item)):
        if name.startswith(f"{room.path}{os.sep}"):
            path = Path(name)
            try:
                total += sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size
            except OSError:
                continue
    return total


def names_of(item: Item) -> str:
    """Something that tells a person which item it is."""
    strings = [value for value in _strings(item) if "/" in value]
    return ", ".join(strings[:2]) + (" ..." if len(strings) > 2 else "") if strings else json.dumps(item)[:80]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def digest_of(room: Room, item: Item, version: int) -> str:
    """Of the item with its inputs. Paths count by where they are in the run and by what made them, so that a run
    directory can be moved, and so that an item is done again if an earlier stage was."""
    root = f"{room.path}{os.sep}"

    def canonical(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(root):
            parts = value[len(root) :].split(os.sep)
            for depth in range(len(parts), 0, -1):
                made = room._digests.get(root + os.sep.join(parts[:depth]))
                if made is not None:
                    return ["made", *parts, made]
            return ["below", *parts]
        if isinstance(value, Mapping):
            return {str(key): canonical(inner) for key, inner in value.items()}
        return [canonical(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps([version, canonical(item)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_finished(directory: Path, digest: str) -> Finished | None:
    """The item's record if it is of this digest and its files have the lengths they had."""
    try:
        record = json.loads((directory / DONE).read_bytes())
        if record["digest"] != digest:
            return None
        for name, size in record["files"].items():
            if (directory / name).stat().st_size != size:
                return None
        return Finished(
            directory=directory, counts=record["counts"], digest=digest, seconds=record["seconds"], reused=True
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sweep(stage: Path, num_items: int) -> None:
    """Remove what no item owns: unfinished directories, and those beyond the number of items."""
    for path in sorted(stage.iterdir()):
        number = path.name.partition(".")[0]
        if path.name.startswith(".") or (number.isdigit() and int(number) >= num_items):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def run_item(job: Job, task: Task) -> dict[str, Any]:
    """Do one item in this process. Returns what travels back; raises nothing but KeyboardInterrupt and the like."""
    final = Path(task.directory)
    partial = final.with_name(f".{final.name}.{os.getpid()}.{time.monotonic_ns():x}")
    try:
        begin = time.perf_counter()
        partial.mkdir(parents=True)
        counts = job(json.loads(task.item), partial)
        seconds = round(time.perf_counter() - begin, 3)
        files = {
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        record = {"digest": task.digest, "seconds": seconds, "peak_mb": _peak_mb(), "counts": counts, "files": files}
        (partial / DONE).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        _publish(partial, final, task.digest)
        return {"number": task.number, "counts": json.loads(json.dumps(counts)), "seconds": seconds}
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        message = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        return {
            "number": task.number,
            "error": message,
            "trace": traceback.format_exc(),
            "errno": error.errno if isinstance(error, OSError) and error.errno else 0,
        }
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _peak_mb() -> float:
    """The highest resident memory that this process has had."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def _publish(partial: Path, final: Path, digest: str) -> None:
    """Give a finished directory its name. A process of a run that was killed may have done the same item meanwhile."""
    for _ in range(3):
        if final.exists():
            if read_finished(final, digest) is not None:
                shutil.rmtree(partial)
                return
            old = final.with_name(f".{final.name}.{os.getpid()}.old")
            os.rename(final, old)
            shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(partial, final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EEXIST, "another process keeps writing this item", str(final))
