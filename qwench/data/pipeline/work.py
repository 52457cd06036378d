"""Stages of the data pipeline as items of work: pure functions whose outputs appear whole or not at all.

A stage is a function (a job) from an item to files and counts. What the items are depends on the input and the recipe
only, never on the number of workers, so neither does any byte of the output. A job writes into a fresh directory, which
gets its name when the job has finished; whatever kills the machine in between costs the unfinished items, and running
again does those only. An item is done again when it, its stage's version or the contents of an earlier stage's
directory that it names have changed.

Items run in processes that Daft starts (`runner="local"`), or on a Ray cluster through Daft (`runner="ray"`, with the
run directory on a file system that every node has). Neither of them holds documents: what travels is an item as JSON
and its counts.

Items on the disk are in `pipeline.items`, the processes in `pipeline.executors`. None of it knows of documents
(`pipeline.parts`) and of the order of the stages (`pipeline.stages`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Sequence

from qwench.data.pipeline.executors import job_threads, run_tasks
from qwench.data.pipeline.items import (
    DONE,
    Failure,
    Finished,
    Item,
    Job,
    Room,
    Task,
    Watcher,
    digest_of,
    names_of,
    read_finished,
    size_of,
    sweep,
    weight_of,
)

__all__ = [
    "ALONE_BYTES", "DONE", "Finished", "Item", "Job", "Room", "StageError", "Watcher", "finished_items", "job_threads",
    "run_stage",
]  # fmt: skip

log = logging.getLogger("qwench.data")

ALONE_BYTES = 4 << 20
"""Less to do is done by this process: starting others would take longer."""


class StageError(ValueError):
    """Items of a stage failed; those that finished are kept. The message names them."""


def run_stage(
    room: Room, name: str, job: Job, items: Sequence[Item], *, version: int = 1, alone_bytes: int = ALONE_BYTES
) -> list[Finished]:
    """Run `job` on every item, each into `room.path / name / f"{number:05d}"`, and return what came out in item order.

    Items that an earlier call finished are not done again. Directories of a larger earlier call are removed. Large
    items (key "bytes"; without it their files in the run count) begin first. Below `alone_bytes` of items to do, other
    processes are not started (see `Room.in_process`). Raises StageError for items that fail, after the others are done;
    OSError at once if the disk is full.
    """
    stage = room.path / name
    stage.mkdir(parents=True, exist_ok=True)
    results: dict[int, Finished] = {}
    todo: list[Task] = []
    for number, item in enumerate(items):
        directory = stage / f"{number:05d}"
        digest = digest_of(room, item, version)
        if (finished := read_finished(directory, digest)) is not None:
            results[number] = finished
        else:
            todo.append(Task(number, str(directory), digest, json.dumps(item, ensure_ascii=False)))
    sweep(stage, len(items))
    if room.watcher is not None:
        room.watcher.begin(name, len(items), sum(size_of(item) for item in items))
        for number in sorted(results):
            room.watcher.finished(items[number], results[number])
    # The largest first: the last item to finish is then a small one. Which comes first changes no output.
    weights = {task.number: weight_of(room, items[task.number]) for task in todo}
    todo.sort(key=lambda task: (-weights[task.number], task.number))
    failures: list[Failure] = []
    try:
        for outcome in run_tasks(room, job, todo, alone=sum(weights.values()) < alone_bytes):
            if isinstance(outcome, Failure):
                if outcome.errno in (errno.ENOSPC, errno.EDQUOT):
                    log.error("disk full in %s, item %d\n%s", name, outcome.number, outcome.trace)
                    left = len(items) - len(results)
                    raise OSError(outcome.errno, f"{os.strerror(outcome.errno)} ({left} items left)", str(stage))
                log.error("stage %s, item %d failed\n%s", name, outcome.number, outcome.trace)
                failures.append(outcome)
                continue
            number, result = outcome
            results[number] = result
            if room.watcher is not None:
                room.watcher.finished(items[number], result)
    finally:
        if room.watcher is not None:
            room.watcher.end()
    if failures:
        failures.sort(key=lambda failure: failure.number)
        shown = "; ".join(f"item {f.number} ({names_of(items[f.number])}): {f.message}" for f in failures[:3])
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise StageError(
            f"{len(failures)} of {len(items)} items of stage {name} failed: {shown}{more}. The others are kept; "
            f"tracebacks are in logs/run.log. Run the same command again to try these again"
        )
    finished = [results[number] for number in range(len(items))]
    for result in finished:
        room._digests[str(result.directory)] = result.digest
    return finished


def finished_items(room: Room, name: str, items: Sequence[Item], *, version: int = 1) -> list[Finished | None]:
    """What `run_stage` would not do again, without running anything."""
    return [
        read_finished(room.path / name / f"{number:05d}", digest_of(room, item, version))
        for number, item in enumerate(items)
    ]
