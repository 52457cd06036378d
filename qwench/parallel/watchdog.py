"""Ends a job that has stopped moving, and leaves behind where each of its ranks stood.

    watch = Watchdog(run / "logs", patience_s=600, long_patience_s=3600)
    watch.mark(12, "training step")            # "I am still here": an assignment, nothing else
    watch.close()

A thread of every rank looks at the rank's last mark. When a rank has made none for `patience_s`, it asks all others,
through the job's store, to write the stacks of all their threads as it does: LOGS/rank_R.stacks.txt then show one and
the same moment. One rank compares what they tell of themselves (step, activity, collectives begun in each group) and
names those that the others wait for; all then end with EXIT_HANG. A rank that does not answer is stopped by a signal,
or stuck outside Python: C code that keeps the interpreter's lock ends with faulthandler's own timer, on stderr.

Only time in which this thread ran counts, so a job that was suspended for an hour has not hung for an hour.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from qwench.parallel.launch import EXIT_HANG, Place, hang_key, place_in_environment
from qwench.parallel.meeting import connection

log = logging.getLogger("qwench.parallel")

POLLS = 20
"""Looks at the mark within the patience."""
SLOWEST_POLL_S = 5.0
STORE_LIMIT_S = 10.0
"""How long the store may take: its host may be the one that has gone."""


@dataclass(frozen=True, slots=True)
class _Mark:
    step: int
    doing: str
    is_long: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a rank tells of itself in a hang."""

    rank: int
    step: int
    doing: str
    idle_s: float
    collectives: Mapping[str, int]
    """Begun so far, by group; the same name stands for the same group on all its ranks."""

    def __str__(self) -> str:
        return f"rank {self.rank} (step {self.step}, {self.doing}, for {self.idle_s:.0f} s)"


class Watchdog:
    """Watches this process until `close`; see the head of this file. `patience_s` 0 watches nothing."""

    def __init__(self, logs: Path, *, patience_s: float, long_patience_s: float) -> None:
        self.place: Place = place_in_environment()
        self.path = logs / f"rank_{self.place.rank}.stacks.txt"
        self.patience_s, self.long_patience_s = patience_s, long_patience_s
        self.poll_s = min(SLOWEST_POLL_S, patience_s / POLLS)
        self._mark = _Mark(0, "starting", True)
        self._closed = threading.Event()
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None
        if patience_s:
            if self.place.world > 1:
                outlast(2 * long_patience_s + 60)
            self._thread = threading.Thread(target=self._watch, name="qwench-watchdog", daemon=True)
            self._thread.start()

    def mark(self, step: int, doing: str, *, is_long: bool = False) -> None:
        """Say that the rank is alive, and what it begins now; `is_long` for what may take `long_patience_s`."""
        self._mark = _Mark(step, doing, is_long)

    def alive(self) -> None:
        """The same once more: something long is getting on."""
        mark = self._mark
        self._mark = _Mark(mark.step, mark.doing, mark.is_long)

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------- the thread
    def _watch(self) -> None:
        idle_s, seen, before = 0.0, self._mark, time.monotonic()
        with self._timer() as rearm:
            while not self._closed.wait(self.poll_s):
                rearm()
                now = time.monotonic()
                idle_s += min(now - before, 2 * self.poll_s)
                before = now
                if self._mark is not seen:
                    seen, idle_s = self._mark, 0.0
                limit_s = self.long_patience_s if seen.is_long else self.patience_s
                if self._asked() or idle_s > limit_s:
                    self._end(seen, idle_s)

    @contextlib.contextmanager
    def _timer(self) -> Iterator[Any]:
        """A C thread that writes the stacks to stderr and ends the process if this thread cannot run.

        Not for a single process: a terminal's Ctrl-Z would look the same to it.
        """
        if self.place.world == 1:
            yield lambda: None
            return
        limit_s = self.long_patience_s + 10 * self.poll_s
        try:
            yield lambda: faulthandler.dump_traceback_later(limit_s, exit=True, file=2)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _connect(self) -> dist.Store | None:
        """A connection of this thread's own: the others' may be held by calls that wait."""
        if self._store is None and self.place.world > 1:
            self._store = connection(STORE_LIMIT_S)
        return self._store

    def _asked(self) -> bool:
        try:
            store = self._connect()
            return store is not None and store.check([hang_key("asked")])
        except RuntimeError:  # the store has gone, and with it the job; the main thread will hear of it
            self._store = None
            return False

    def _end(self, mark: _Mark, idle_s: float) -> None:
        mine = Standing(
            rank=self.place.rank, step=mark.step, doing=mark.doing, idle_s=idle_s, collectives=collectives_begun()
        )
        judge = self._ask()
        with contextlib.suppress(OSError):
            write_stacks(self.path, mine, self.place.world)
        verdict = None
        if judge is not None:
            try:
                verdict = self._agree(mine, judge)
            except (RuntimeError, ValueError) as error:
                verdict = f"{mine} made no progress, and the others could not be asked ({error})"
        text = verdict or f"no progress for {idle_s:.0f} s at step {mark.step}, {mark.doing}"
        text += f". The stacks are in {self.path.parent}/rank_*.stacks.txt"
        with contextlib.suppress(Exception):
            log.error("%s", text)
        # One rank tells it on the console; the process that started the ranks tells what it finds in the store.
        if self.place.rank == 0 or verdict is None:
            sys.stderr.write(f"qwench: {text}\n")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        if self.place.rank == 0:
            time.sleep(min(1.0, 4 * self.poll_s))  # the store may be this process's, and the others still ask it
        os._exit(EXIT_HANG)

    def _ask(self) -> int | None:
        """Ask all ranks for their stacks; the rank that asked first. None if there is nobody to be asked."""
        with contextlib.suppress(RuntimeError, ValueError):
            if store := self._connect():
                return int(store.compare_set(hang_key("asked"), "", str(self.place.rank)))
        return None

    def _agree(self, mine: Standing, judge: int) -> str:
        """What the words of all ranks come to, as the judge sees it."""
        store = self._connect()
        assert store is not None
        store.set(hang_key(f"standing/{mine.rank}"), json.dumps(_fields(mine)))
        patience_s = 4 * self.poll_s + 1.0
        if judge != mine.rank:
            store.wait([hang_key("verdict")], timedelta(seconds=2 * patience_s))
            return store.get(hang_key("verdict")).decode()
        keys = [hang_key(f"standing/{rank}") for rank in range(self.place.world)]
        deadline = time.monotonic() + patience_s
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(self.poll_s / 4)
        told = [Standing(**json.loads(store.get(key))) for key in keys if store.check([key])]
        verdict = judge_hang(told, self.place.world)
        store.set(hang_key("verdict"), verdict)
        return verdict


# ------------------------------------------------------------------------------------------------------------ judging
def judge_hang(told: list[Standing], world: int) -> str:
    """Who keeps whom waiting: silent ranks, those at an earlier step, and those with fewer collectives in a group."""
    silent = sorted(set(range(world)) - {standing.rank for standing in told})
    furthest = max((standing.step for standing in told), default=0)
    late = [standing for standing in told if standing.step < furthest]
    if not late:
        most: dict[str, int] = {}
        for standing in told:
            for group, number in standing.collectives.items():
                most[group] = max(most.get(group, 0), number)
        late = [s for s in told if any(number < most[group] for group, number in s.collectives.items())]
    waited = max((standing.idle_s for standing in told), default=0.0)
    names = [f"rank {rank} (no answer: stopped, or stuck outside Python)" for rank in silent] + list(map(str, late))
    begin = f"the job made no progress for {waited:.0f} s"
    if not names:
        doing = ", ".join(sorted({f"step {s.step}, {s.doing}" for s in told}))
        return f"{begin}; all {world} ranks have come equally far: {doing}"
    others = [s for s in told if s not in late]
    waiting = f"; the others wait at step {furthest}, {others[0].doing}" if others else ""
    return f"{begin}; did not arrive: {', '.join(names)}{waiting}"


def collectives_begun() -> dict[str, int]:
    """How many collectives this process has begun in each of its groups, as far as torch tells."""
    found: dict[str, int] = {}
    if not dist.is_initialized():
        return found
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(Exception):
            name = f"{group.group_name} of ranks {dist.get_process_group_ranks(group)}"
            # A group may have a backend for each kind of device, or one for both.
            backends = {id(one): one for one in (group._get_backend(device) for device in group._device_types)}
            found[name] = sum(int(cast(Any, one)._get_sequence_number_for_group()) for one in backends.values())
    return found


def outlast(seconds: float) -> None:
    """Let torch's own limits on collectives be longer: they would end a rank before its stack is known."""
    for group in list(distributed_c10d._world.pg_map):
        try:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        except Exception:  # a backend without a limit that could be set
            log.info("torch's own limit stays on group %s", getattr(group, "group_name", "?"), exc_info=True)


# ------------------------------------------------------------------------------------------------------------- stacks
def write_stacks(path: Path, standing: Standing, world: int) -> None:
    """Append the Python stacks of all threads, the main one first."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [f"==== {now} rank {standing.rank} of {world}, process {os.getpid()}"]
    lines += [f"step {standing.step}, {standing.doing}, no progress for {standing.idle_s:.1f} s"]
    lines += [f"collectives begun in group {name}: {number}" for name, number in standing.collectives.items()]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: (item[0] != main, names.get(item[0], "")))
    for ident, frame in frames:
        if ident == threading.get_ident():
            continue
        lines.append(f"---- thread {names.get(ident, 'unknown to Python')} ({ident})")
        lines.append("".join(traceback.format_stack(frame)).rstrip())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
        file.flush()


def _fields(standing: Standing) -> dict[str, Any]:
    return {name: getattr(standing, name) for name in Standing.__slots__}
