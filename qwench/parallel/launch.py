"""The processes of a training job: started here (`gpus=N`) or by torchrun, and ended together.

    return run_job(train_rank, (recipe,), gpus=4, on_gpu=True, logs=out / "logs")

starts 4 processes of this host that each call `train_rank(recipe)`, and returns what rank 0 returns. Every process
finds torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...) in its environment, so a process that
torchrun started itself goes the same way from there: `run_job` calls the function in it, and `connected` joins the
others. With one process nothing is started and nothing of torch.distributed is initialised.

Rank 0 has the console; what the others print goes to LOGS/rank_N.log. The first rank that fails ends the job: the rest
is killed, and the error names the rank, with its traceback. Ctrl-C and SIGTERM are passed on to every rank once; they
agree on the step after which they stop (see `train/loop.py`). With `restarts` the processes are started again after
failures that can pass (`restart.py`); under torchrun that is its --max-restarts' affair.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from qwench.parallel.meeting import ANNOUNCED, WORD, meet
from qwench.parallel.restart import JobFailure, Restarts, can_pass, started_with, supervised
from qwench.run import usable_cores

T = TypeVar("T")

AFTERMATH_S = 3.0
"""How long the other ranks' reports are awaited after the first failure, to tell its cause from its consequences."""
STOP_S = 60.0
"""How long the others may take to stop after the first rank has stopped: they save together, so they end together."""
MEETING_LIMIT_S = 600.0
"""Time for all ranks to arrive. torchrun on several hosts may start them far apart."""
EXIT_HANG = 75
"""Exit code of a process whose job stopped moving (`watchdog.py`): EX_TEMPFAIL, worth another try."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of the job this is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Its number on this host, which chooses its GPU."""
    local_world: int = 1


def place_in_environment() -> Place:
    """What torchrun, or `run_job`, says in the environment; the only process of its job if nothing does.

    Raises ValueError when the variables do not fit together.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    world = os.environ.get("WORLD_SIZE", "")
    if missing := [name for name in names if name not in os.environ and world != "1"]:
        raise ValueError(
            f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}; start the job with torchrun, or "
            "unset RANK and WORLD_SIZE and give gpus=N"
        )
    try:
        place = Place(*(int(os.environ.get(name, default)) for name, default in zip(names[:4], "0101", strict=True)))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no number: {error}") from None
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world):
        raise ValueError(f"the environment says {place}, which is impossible; start the job with torchrun")
    return place


def attempt() -> int:
    """How often this job has been started again, by `run_job` or by torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def hang_key(name: str) -> str:
    """Where the watchdogs of this attempt leave word in the job's store."""
    return f"qwench/{os.environ.get(WORD, '')}/hang/{name}"


def job_size(gpus: int, on_gpu: bool) -> int:
    """The number of processes: torchrun's, else `gpus`.

    Raises ValueError, before any GPU is touched, when there are fewer GPUs, or when torchrun started another number.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; give 1 or more")
    place = place_in_environment()
    here = gpus if place.world == 1 else place.local_world
    if place.world > 1 and gpus not in (1, place.local_world):
        raise ValueError(
            f"gpus={gpus}, but torchrun started {place.local_world} processes on this host; leave gpus out"
        )
    if on_gpu and here > 1 and here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes want a GPU each, but this machine has {torch.cuda.device_count()}; give a smaller gpus, "
            "or loop.device=cpu to run the processes on the CPU"
        )
    return max(gpus, place.world)


def run_job(
    function: Callable[..., T],
    arguments: tuple[Any, ...],
    *,
    gpus: int,
    on_gpu: bool,
    logs: Path,
    restarts: Restarts | None = None,
) -> T:
    """`function(*arguments)` on every rank; see the head of this file. `function` and its result can be pickled.

    One process is the caller's own, unless `restarts` allows some: then it is a process to be watched over.

    Raises what a rank raised if it is a ValueError or an OSError, ChildProcessError with the rank's traceback for any
    other failure, and KeyboardInterrupt when the ranks stopped after Ctrl-C or SIGTERM.
    """
    job_size(gpus, on_gpu)
    again = restarts is not None and restarts.limit > 0
    if place_in_environment().world > 1 or (gpus == 1 and ("RANK" in os.environ or not again)):
        return function(*arguments)
    if restarts is None or not again:
        return _Job(function, arguments, gpus, logs).run()
    return supervised(
        lambda arguments, world, devices, number: _Job(function, arguments, world, logs, devices, number).run(),
        arguments,
        world=gpus,
        logs=logs,
        restarts=restarts,
    )


@contextlib.contextmanager
def connected(device: torch.device, timeout_s: float = MEETING_LIMIT_S) -> Iterator[Place]:
    """Join the other ranks that the environment speaks of, and part from them at the end. Nothing for one process."""
    place = place_in_environment()
    if place.world == 1:
        yield place
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Without an agent's store rank 0 makes one, which is as young as this attempt.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    known: dict[str, Any] = {}
    if kept:
        known = {"store": meet(place.rank, place.world, timeout_s), "rank": place.rank, "world_size": place.world}
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",  # what hosts exchange has groups of its own (`Team`)
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
        **known,
    )
    yield place
    # Not after an exception: the others may be gone, and parting from them in good order could wait for ever.
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- a rank's side
def _rank_main(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], out: Connection, log: Path
) -> None:
    """What a started process does: report ("result" | "stopped" | "error", ...) through `out` and end."""
    _die_with_parent()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    if rank:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    code = 0
    try:
        result = function(*arguments)
        out.send(("result", result if rank == 0 else None))
    except KeyboardInterrupt:
        out.send(("stopped",))
    except BaseException as error:
        code = 1
        expected = isinstance(error, (ValueError, OSError)) and not isinstance(error, dist.DistError)
        sys.stderr.write(traceback.format_exc() if rank else "")
        out.send(("error", expected, type(error).__name__, str(error), traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # no destructors: a communicator whose other ranks have gone may wait for ever


def _die_with_parent() -> None:
    """Linux: end this process when the one that watches over it is killed."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    # Ctrl-C reaches all processes of the terminal's group; here the parent passes it on, so that it arrives once.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


# --------------------------------------------------------------------------------------------------- the starter's side
class _Job:
    """One attempt. `devices` are what CUDA_VISIBLE_DEVICES shall say, `number` counts the attempts before this one."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        world: int,
        logs: Path,
        devices: str | None = None,
        number: int = 0,
    ) -> None:
        self.function, self.arguments, self.world, self.logs = function, arguments, world, logs
        self.devices, self.number = devices, number
        self.hang: str | None = None
        self.processes: list[SpawnProcess] = []
        self.pipes: list[Connection] = []
        self.reports: dict[int, tuple[Any, ...]] = {}
        self.signalled = False

    def run(self) -> Any:
        self.logs.mkdir(parents=True, exist_ok=True)
        # The store listens before anybody connects, on a port that the system chose: no race for a free one.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with self._passing_signals():
            try:
                for rank in range(self.world):
                    self._start(rank, store.port)
                self._watch()
                self.hang = self._word_of_watchdogs(store)
            finally:
                self._end_all()
        failures = {rank: report for rank, report in self.reports.items() if report[0] in ("error", "died")}
        # A signal that comes while a rank is still starting ends it without a report.
        if self.signalled and not any(report[0] == "error" for report in failures.values()):
            raise KeyboardInterrupt
        if failures:
            raise self._cause(failures)
        return self.reports[0][1]

    def _start(self, rank: int, port: int) -> None:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours, as it is torchrun's
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
        }
        context = multiprocessing.get_context("spawn")
        mine, theirs = cast("tuple[Connection, Connection]", context.Pipe(duplex=False))
        log = self.logs / f"rank_{rank}.log"
        arguments = (self.function, self.arguments, environment, theirs, log)
        process = context.Process(target=_rank_main, args=arguments, name=f"qwench rank {rank}")
        # Read when torch is loaded, before `_rank_main` runs.
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.world))}
        early = {name: value for name, value in threads.items() if name not in os.environ}
        if self.devices is not None:
            early["CUDA_VISIBLE_DEVICES"] = self.devices
        with started_with(early):
            process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(mine)

    def _watch(self) -> None:
        """Until every rank has reported, or some time after the first one that ended otherwise than in order."""
        deadline = float("inf")
        while len(self.reports) < self.world and time.monotonic() < deadline:
            waiting = [rank for rank in range(self.world) if rank not in self.reports]
            wait([self.pipes[rank] for rank in waiting], timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            for rank in waiting:
                self._listen(rank)
            ends = {report[0] for report in self.reports.values()}
            if deadline == float("inf") and ends - {"result"}:
                deadline = time.monotonic() + (STOP_S if ends <= {"result", "stopped"} else AFTERMATH_S)

    def _listen(self, rank: int) -> None:
        if not self.pipes[rank].poll():
            return
        try:
            self.reports[rank] = self.pipes[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join()
            self.reports[rank] = ("died", self.processes[rank].exitcode)

    def _word_of_watchdogs(self, store: dist.TCPStore) -> str | None:
        """What they have come to, if that is why ranks ended."""
        if not any(report == ("died", EXIT_HANG) for report in self.reports.values()):
            return None
        if store.check([ANNOUNCED]):
            key = f"qwench/{store.get(ANNOUNCED).decode()}/hang/verdict"
            if store.check([key]):
                return store.get(key).decode()
        return "the job made no progress"

    def _end_all(self) -> None:
        finished = all(self.reports.get(rank, ("",))[0] in ("result", "stopped") for rank in range(self.world))
        for process in self.processes:
            if finished:
                process.join(60)
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def _cause(self, failures: dict[int, tuple[Any, ...]]) -> Exception:
        """One error for the job, from the reports in the order in which they came."""
        again = "What was saved before is intact: run the same command again to go on from the newest checkpoint"
        if self.hang is not None:
            return JobFailure(f"{self.hang}. Stacks: {self.logs}/rank_*.stacks.txt. {again}", may_pass=True)
        rank = min(failures, key=lambda rank: _follows(failures[rank]))  # the first of those with the least key
        report = failures[rank]
        others = f" (the others were stopped; their last words are in {self.logs}/rank_*.log)" if self.world > 1 else ""
        if report[0] == "died":
            code = report[1]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return JobFailure(f"rank {rank} of {self.world} {how}{others}. {again}", may_pass=True)
        _, expected, kind, message, trace = report
        if expected:
            return ValueError(message)
        text = f"rank {rank} of {self.world} failed with {kind}{others}:\n{trace}"
        return JobFailure(text, may_pass=can_pass(kind, message))

    @contextlib.contextmanager
    def _passing_signals(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self.signalled = True
            for process in self.processes:
                if process.is_alive() and process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def _follows(report: tuple[Any, ...]) -> bool:
    """Whether a failure looks like what a rank suffers when another one has gone."""
    if report[0] == "died":
        return report[1] == -signal.SIGABRT  # NCCL's watchdog
    return report[2] in ("RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError")


def local_device(name: str, place: Place) -> torch.device:
    """The device of a rank: its own GPU where `name` (auto, cpu, cuda) means one."""
    if place.world == 1 or name == "cpu":
        return torch.device(name)
    return torch.device("cuda", place.local_rank)
