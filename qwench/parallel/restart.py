"""Start a job again after a failure that can pass, from its newest checkpoint and with the GPUs that still answer.

What the processes compute is not known here: a recipe says how far it has come (`progress`) and what to run with fewer
processes (`arguments_for`). Errors of users and bugs, which would only come again, are not repeated.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.markup import escape

from qwench.run import console

log = logging.getLogger("qwench.parallel")

T = TypeVar("T")

PROBE_S = 120.0
"""Time for a GPU to answer; the first process on a GPU takes seconds."""
PAUSE_S = 5.0
"""Wait before the second restart in a row, twice as much before the third, and so on."""
PASSING_KINDS = ("AcceleratorError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
PASSING_WORDS = re.compile(
    r"CUDA error|CUDA driver error|NCCL|nccl|CUBLAS_STATUS|CUDNN_STATUS|[Gg]loo|Connection closed"
)
"""What RuntimeErrors of devices and of communication say."""


class JobFailure(ChildProcessError):
    """A job ended because of one of its processes; `may_pass` if another attempt may fare better."""

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def can_pass(kind: str, message: str) -> bool:
    """Whether an exception comes from a device or from the network, and not from the program."""
    return kind in PASSING_KINDS or (kind == "RuntimeError" and PASSING_WORDS.search(message) is not None)


def living_gpus() -> list[str]:
    """The GPUs of this host that still compute, as CUDA_VISIBLE_DEVICES names them.

    A process each finds out, which sees that GPU alone: a lost one can kill or hang whoever asks.
    """
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = named or [str(index) for index in range(torch.cuda.device_count())]
    context = multiprocessing.get_context("spawn")
    probes = [context.Process(target=_compute) for _ in names]
    for probe, name in zip(probes, names, strict=True):
        with started_with({"CUDA_VISIBLE_DEVICES": name}):
            probe.start()
    deadline = time.monotonic() + PROBE_S
    for probe in probes:
        probe.join(max(0.0, deadline - time.monotonic()))
        if probe.is_alive():
            probe.kill()
            probe.join()
    return [name for name, probe in zip(names, probes, strict=True) if probe.exitcode == 0]


def _compute() -> None:
    ones = torch.ones(1024, device="cuda")
    assert float(ones.sum()) == 1024.0


@contextlib.contextmanager
def started_with(values: Mapping[str, str]) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    limit: int
    """Failures in a row, without progress between them, after which there is another attempt."""
    progress: Callable[[], int]
    """A number that grows when something has been saved."""
    arguments_for: Callable[[int], tuple[Any, ...] | None]
    """The arguments of the job with this many processes; None if it cannot run with so many."""
    living: Callable[[], list[str]] | None = None
    """The devices that are left, as CUDA_VISIBLE_DEVICES names them; None for processes that need none."""


def supervised(
    start: Callable[[tuple[Any, ...], int, str | None, int], T],
    arguments: tuple[Any, ...],
    *,
    world: int,
    logs: Path,
    restarts: Restarts,
) -> T:
    """The result of `start(arguments, world, devices, number of attempts before)`, in as many attempts as it takes.

    Raises the last JobFailure when it may not pass, when `restarts.limit` attempts in a row have saved nothing, or when
    too few GPUs are left; anything else that an attempt raises, at once.
    """
    devices, current, number, in_a_row, saved = None, world, 0, 0, restarts.progress()
    while True:
        try:
            return start(arguments, current, devices, number)
        except JobFailure as failure:
            if not failure.may_pass:
                raise
            now = restarts.progress()
            in_a_row, saved = (0, now) if now > saved else (in_a_row, saved)
            _note(logs, number, failure)
            if in_a_row >= restarts.limit:
                words = f"{failure}\nGiven up after {in_a_row} restarts in a row without a new checkpoint"
                raise JobFailure(words, may_pass=False) from failure
            in_a_row, number = in_a_row + 1, number + 1
            first_line = str(failure).partition("\n")[0]
            console.print(f"[yellow]the job failed[/]: {escape(first_line)}")
            time.sleep(PAUSE_S * (in_a_row - 1))
            names = restarts.living() if restarts.living is not None else None
            current, arguments = _fitting(world if names is None else min(world, len(names)), restarts, failure)
            devices = None if names is None else ",".join(names[:current])
            console.print(
                f"restart {in_a_row} (at most {restarts.limit} in a row without a new checkpoint), processes: {current}"
            )


def _fitting(most: int, restarts: Restarts, failure: JobFailure) -> tuple[int, tuple[Any, ...]]:
    """The largest number of processes, of those that are left, with which the job can run."""
    for world in range(most, 0, -1):
        arguments = restarts.arguments_for(world)
        if arguments is not None:
            return world, arguments
    words = f"{failure}\nThe job does not fit on what is left of its GPUs ({most}); see parallel and batch_rows"
    raise JobFailure(words, may_pass=False) from failure


def _note(logs: Path, number: int, failure: JobFailure) -> None:
    """Keep every failure: the console's lines may be gone by the time somebody looks."""
    logs.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (logs / "failures.txt").open("a", encoding="utf-8") as file:
        file.write(f"==== {now} attempt {number + 1}\n{failure}\n\n")
