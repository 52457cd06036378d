"""What a person sees of a running pipeline: a bar a stage with items, MB/s and the time left.

On a terminal the bar is live; elsewhere a line is printed when a stage ends and every half minute in between.
"""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwench.data.pipeline.work import Finished, Item
from qwench.run import console

_LINE_EVERY_S = 30.0


class StageProgress:
    """A `pipeline.work.Watcher` that shows stages on stderr and remembers what each took."""

    def __init__(self, quiet: bool = False) -> None:
        self.records: list[dict[str, Any]] = []
        """One a stage: name, items, items reused, seconds, bytes."""
        self._quiet = quiet
        self._live = console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._task: Any = None

    def begin(self, stage: str, num_items: int, num_bytes: int) -> None:
        self._stage, self._items, self._bytes = stage, num_items, num_bytes
        self._done = self._reused = self._done_bytes = self._new_bytes = 0
        self._begun = self._said = time.monotonic()
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(),
                TextColumn("{task.fields[items]}  {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=console,
            )
            self._bar.start()
            total = num_bytes or num_items
            self._task = self._bar.add_task(stage, total=total, items=f"0/{num_items} items", rate="")

    def finished(self, item: Item, result: Finished) -> None:
        size = int(item.get("bytes", 0))
        self._done += 1
        self._done_bytes += size
        if result.reused:
            self._reused += 1
        else:
            self._new_bytes += size
        if self._bar is not None:
            completed = self._done_bytes if self._bytes else self._done
            self._bar.update(
                self._task, completed=completed, items=f"{self._done}/{self._items} items", rate=self._rate()
            )
        elif not self._quiet and time.monotonic() - self._said > _LINE_EVERY_S:
            self._said = time.monotonic()
            console.print(f"{self._stage}: {self._done}/{self._items} items {self._rate()} {self._left()}".rstrip())

    def end(self) -> None:
        seconds = time.monotonic() - self._begun
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif not self._quiet:
            reused = f", {self._reused} of them from before" if self._reused else ""
            console.print(
                f"{self._stage}: {self._done}/{self._items} items in {seconds:.1f} s{reused} {self._rate()}".rstrip()
            )
        self.records.append(
            {
                "stage": self._stage,
                "items": self._items,
                "done": self._done,
                "reused": self._reused,
                "seconds": round(seconds, 3),
                "bytes": self._bytes,
                "new_bytes": self._new_bytes,
            }
        )

    def _rate(self) -> str:
        seconds = time.monotonic() - self._begun
        return f"{self._new_bytes / 1e6 / seconds:.1f} MB/s" if self._new_bytes and seconds > 0 else ""

    def _left(self) -> str:
        new = self._done - self._reused
        if not new:
            return ""
        share = (
            self._new_bytes / max(1, self._bytes - (self._done_bytes - self._new_bytes))
            if self._bytes
            else new / max(1, self._items - self._reused)
        )
        seconds = (time.monotonic() - self._begun) * (1 - share) / max(share, 1e-9)
        return f"about {seconds:.0f} s left"
