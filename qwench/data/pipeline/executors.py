"""Who does the items: this process alone, processes that Daft starts, or actors on a Ray cluster.

Daft holds no documents: what travels is an item as JSON and its counts. A process that dies takes the others of its
crew along; what they had begun is done again one by one.
"""

from __future__ import annotations

import contextvars
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwench.data.pipeline.items import Failure, Finished, Job, Room, Task, read_finished, run_item
from qwench.run import usable_cores

log = logging.getLogger("qwench.data")

_PARENT_CHECK_S = 0.2
_WORKER = ".worker."
_DEATHS = 3
"""How often processes may die one after the other before they have begun an item."""

_threads: contextvars.ContextVar[int] = contextvars.ContextVar("threads", default=1)


def job_threads() -> int:
    """Threads that a job may use: one in a worker, all cores where one process does everything. No output may depend
    on it."""
    return _threads.get()


def run_tasks(room: Room, job: Job, todo: Sequence[Task], alone: bool) -> Iterator[tuple[int, Finished] | Failure]:
    """Do the items and give what came of each, in any order. `alone`: they are few enough for this process."""
    if not todo:
        return
    small = room.in_process or (room.in_process is None and (alone or len(todo) == 1))
    # A process for one small item would only be waited for, also on a cluster.
    if (alone and len(todo) == 1) or (room.runner == "local" and (small or room.num_workers == 1)):
        threads = _threads.set(room.num_workers)
        try:
            for task in todo:
                yield _outcome(task, run_item(job, task))
        finally:
            _threads.reset(threads)
        return
    left = {task.number: task for task in todo}
    lost = 0
    while left:
        try:
            for result in _daft_results(room, job, list(left.values()), room.workers):
                yield _outcome(left.pop(result["number"]), result)
            assert not left, "the executor lost items"
        except Exception as error:
            if not _is_death(error):
                raise
            begun = _begun(left.values())
            log.warning("a process died while these items were being done: %s (%s)", begun or "none", error)
            lost = 0 if begun else lost + 1
            if lost == _DEATHS:
                raise OSError("worker processes cannot be started; see logs/run.log") from error
            # All processes went down with it, so those that did nothing wrong are among them. And what was too much for
            # the memory beside others may be possible alone.
            for number in begun:
                yield _run_apart(room, job, left.pop(number))


def _run_apart(room: Room, job: Job, task: Task) -> tuple[int, Finished] | Failure:
    """Do an item in a process of its own while nothing else runs."""
    if (finished := read_finished(Path(task.directory), task.digest)) is not None:
        return task.number, finished
    try:
        return _outcome(task, next(_daft_results(room, job, [task], 1)))
    except Exception as error:
        if not _is_death(error):
            raise
        _begun([task])
        message = "its process died, also when it ran alone; perhaps it needs more memory than there is"
        return Failure(task.number, message, str(error))


def _is_death(error: Exception) -> bool:
    """Whether a worker's process ended: Daft's word for it is RuntimeError, Ray has its own."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("ray")


def _begun(tasks: Iterable[Task]) -> list[int]:
    """Items whose unfinished directories lie there; these are removed."""
    begun: list[int] = []
    for task in tasks:
        final = Path(task.directory)
        partial = list(final.parent.glob(f".{final.name}.*"))
        if partial:
            begun.append(task.number)
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
    return begun


def _outcome(task: Task, result: Mapping[str, Any]) -> tuple[int, Finished] | Failure:
    if "error" in result:
        return Failure(task.number, result["error"], result["trace"], result["errno"])
    finished = Finished(
        directory=Path(task.directory), counts=result["counts"], digest=task.digest, seconds=result["seconds"]
    )
    return task.number, finished


class Worker:
    """Lives in a process of Daft's (or an actor of Ray's) and does one item after the other."""

    def __init__(self, job: str, parent: int, stage: str) -> None:
        Path(stage, f"{_WORKER}{os.getpid()}").touch()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is the starting process's to handle
        if parent:
            threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
        import pyarrow

        pyarrow.set_cpu_count(1)  # processes do the scaling
        pyarrow.set_io_thread_count(1)
        self._job = _load(job)

    def do(self, task: str) -> str:
        return json.dumps(run_item(self._job, Task(*json.loads(task))))


def _die_with(parent: int) -> None:
    """End this process soon after `parent`, however that ended: nobody waits for its work.

    Not PR_SET_PDEATHSIG, which fires when the thread that started this process ends, and Daft's come and go.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def _name(job: Job) -> str:
    name = f"{job.__module__}:{job.__qualname__}"
    if job.__module__ == "__main__" or "<" in job.__qualname__ or _load(name) is not job:
        raise TypeError(f"{name} cannot be found by other processes; define the job at the top of a module")
    return name


def _load(name: str) -> Job:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _daft_results(room: Room, job: Job, tasks: Sequence[Task], workers: int) -> Iterator[dict[str, Any]]:
    """What `run_item` returns for every task, in any order. If a process dies, raises what `_is_death` knows."""
    daft = _daft()
    local = room.runner == "local"
    if not local:
        _join_ray(daft, room)
    num = min(len(tasks), workers or (usable_cores() if local else _ray_cores()))

    # Daft sends this class by value: it makes the others findable before anything of qwench is imported.
    class Proxy:
        def __init__(self, path: list[str], job: str, parent: int, stage: str) -> None:
            import sys

            sys.path += [entry for entry in path if entry not in sys.path]
            from qwench.data.pipeline.executors import Worker

            self.worker = Worker(job, parent, stage)

        @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)
        def do(self, tasks: Any) -> list[str]:
            return [self.worker.do(task) for task in tasks.to_pylist()]

    crew = daft.cls(Proxy, use_process=True if local else None, max_concurrency=num)
    stage = Path(tasks[0].directory).parent
    worker = crew([entry for entry in sys.path if entry], _name(job), os.getpid() if local else 0, str(stage))
    rows = [json.dumps([t.number, t.directory, t.digest, t.item]) for t in tasks]
    frame = daft.from_pydict({"task": rows})
    if not local:
        frame = frame.into_partitions(min(len(rows), 4 * num))
    frame = frame.select(worker.do(daft.col("task")).alias("result"))
    # Without order an item goes to whichever process is free.
    with daft.execution_config_ctx(maintain_order=False):
        results = frame.iter_rows(results_buffer_size=None)
        try:
            for row in results:
                yield json.loads(row["result"])
        except BaseException:
            # Nobody waits for them, and Daft's threads would (at the end of Python, with a crash).
            if local:
                _kill_workers(stage)
            raise
        finally:
            results.close()
            for path in stage.glob(f"{_WORKER}*"):
                path.unlink(missing_ok=True)


def _kill_workers(stage: Path) -> None:
    for path in stage.glob(f"{_WORKER}*"):
        with suppress(OSError):
            os.kill(int(path.name.removeprefix(_WORKER)), signal.SIGKILL)


def _join_ray(daft: Any, room: Room) -> None:
    """Make Daft use the cluster; once a process, as Daft has one runner."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("runner=ray needs the ray package; pip install 'qwench[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=room.ray_address, log_to_driver=False, logging_level=logging.WARNING)
    daft.set_runner_ray(noop_if_initialized=True)


def _ray_cores() -> int:
    import ray  # pyright: ignore[reportMissingImports]

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _daft() -> Any:
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # we have our own
    try:
        import daft
    except ImportError:
        raise ValueError(
            "several workers need the daft package; pip install 'qwench[data]', or set workers=1"
        ) from None
    return daft
