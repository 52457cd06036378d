"""A run directory: everything that is known about one execution of a stage, in one place.

    RUN/config.toml        the resolved recipe; running it again repeats the run
    RUN/provenance.json    command, commit, packages, machine, chosen op implementations
    RUN/metrics.jsonl      one record a line, the truth about the run; reports and trackers follow it
    RUN/logs/run.log       what was logged, with tracebacks
    RUN/checkpoints/       resumable states (train/checkpoint.py)
    RUN/model/             the result as a Hugging Face directory

Nothing is guessed from a directory's name.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwench import __version__, config

log = logging.getLogger("qwench.run")
console = Console(stderr=True)

PACKAGES = ("torch", "numpy", "tokenizers", "gigatoken", "safetensors", "pydantic", "pyarrow", "daft")
Resume = Literal["auto", "force", "never"]
NOT_THE_RECIPE = (
    "out",
    "resume",
    "gpus",
    "parallel",
    "verify_shards",
    "follow",
    "mini",
    "checkpoint.verify",
    "guard.hang_seconds",
    "guard.hang_seconds_long",
    "guard.max_restarts",
    "loop.profile_step",
    "loop.micro_batch_rows",
    "loop.remat",
)
"""Keys that may differ when a run is continued: where, on how many GPUs and watched by whom, not what is computed."""


class Run:
    """An open run directory, which belongs to one process at a time.

    `resume="auto"` continues a directory of the same recipe and refuses one of another recipe; "force" continues
    with the new recipe; "never" refuses any directory that already holds a run. A directory in which nothing has been
    recorded or saved yet holds no run. What "force" changes is written down with the first record: a run that cannot go
    on with the new recipe keeps its old one.
    """

    def __init__(self, path: Path, recipe: Any, stage: str, resume: Resume = "auto") -> None:
        self.path, self.stage = path, stage
        (path / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            refuse_other_run(path, recipe, resume)
            self._config: str | None = config.dump(recipe)
            if resume != "force" or not (path / "config.toml").exists():
                self._write_config()
            _cut_half_line(path / "metrics.jsonl")
        except BaseException:
            self._lock.close()
            raise
        self._handler = logging.FileHandler(path / "logs" / "run.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("qwench").addHandler(self._handler)
        logging.getLogger("qwench").setLevel(logging.INFO)
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Get every record as it is written; they return at once and raise nothing."""

    def _write_config(self) -> None:
        if self._config is not None:
            write_atomically(self.path / "config.toml", self._config)
            self._config = None

    def record(self, **values: Any) -> None:
        """Append one line to metrics.jsonl; it reaches the file at once. Numbers that JSON lacks (NaN) become null."""
        self._write_config()
        record = {"time": round(time.time(), 3), **_finite(values)}
        self._metrics.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._metrics.flush()
        for listener in self.listeners:
            listener(record)

    def forget_after(self, step: int) -> None:
        """Drop records of steps after `step`: they belong to work that a crash threw away and that is now repeated."""
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        kept = [line for line, record in _records(path) if record.get("step", 0) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))
        self._metrics = path.open("a", encoding="utf-8")

    def write_provenance(self, **extra: Any) -> None:
        self._write_config()
        write_atomically(self.path / "provenance.json", json.dumps(provenance() | extra, indent=2) + "\n")

    def close(self) -> None:
        self._metrics.close()
        logging.getLogger("qwench").removeHandler(self._handler)
        self._handler.close()
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._write_config()
        elif not isinstance(error, KeyboardInterrupt):
            log.error("the run stopped", exc_info=error)
        self.close()


def refuse_other_run(path: Path, recipe: Any, resume: Resume) -> None:
    """Raise ValueError if `path` holds a run that `recipe` must not continue; see `Run`. Nothing is written."""
    recorded, metrics = path / "config.toml", path / "metrics.jsonl"
    begun = (metrics.exists() and metrics.stat().st_size) or any(path.glob("checkpoints/*"))
    if not recorded.exists() or not begun:
        return
    if resume == "never":
        raise ValueError(f"{path} already holds a run; give another out=... or resume=auto")
    old, new = config.read_toml(recorded), config.to_dict(recipe)
    changed = sorted(
        key for key in set(_differences(old, new)) if not any(f"{key}.".startswith(f"{n}.") for n in NOT_THE_RECIPE)
    )
    if changed and resume == "auto":
        raise ValueError(
            f"{path} holds a run of another recipe (different: {', '.join(changed)}); "
            "give another out=..., or resume=force to continue it with the new values"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a run; a line that a crash cut short is left out."""
    return [record for _, record in _records(path / "metrics.jsonl")]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a file and what they say."""
    # Not `splitlines`, which also cuts at characters that JSON allows in a string.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield line.decode("utf-8"), json.loads(line)
        except ValueError:
            continue


def _cut_half_line(path: Path) -> None:
    """Remove what follows the last line end, so that the next record does not continue a line that a crash cut."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _lock(path: Path) -> IO[bytes]:
    """Hold the run directory until the file is closed or the process ends, however it ends."""
    file = (path / ".lock").open("ab")
    if sys.platform == "win32":
        return file
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is working in {path}; wait for it or stop it, or give another out=..."
        ) from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s); see to it that only one process works there", path, error)
    return file


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {*old, *new}:
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.removesuffix(".")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def provenance() -> dict[str, Any]:
    """Command, code, packages and machine of this process."""
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "qwench": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(memory / 2**30, 1),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that qwench runs from, with "-dirty" when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def progress(*extra: str) -> Progress:
    """A progress bar on stderr; `extra` are further columns, for example "{task.fields[rate]}"."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in extra),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
