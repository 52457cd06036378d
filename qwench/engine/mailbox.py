"""From the engine's thread to asyncio: what comes for any queue of an event loop, with one wake-up for many pieces."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any


class Mailbox:
    """Everything that is put before the loop looks is delivered by one callback: with many streams open, a wake-up for
    each piece would cost more than the piece."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._items: list[tuple[asyncio.Queue[Any], Any]] = []

    def put(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Deliver `item` to `queue`, which belongs to the loop. From any thread; in order; never blocks."""
        with self._lock:
            self._items.append((queue, item))
            if len(self._items) > 1:
                return
        try:
            if (loop := self._loop()) is not None:
                loop.call_soon_threadsafe(self._deliver)
                return
        except RuntimeError:  # the loop has been closed: nobody listens any more
            pass
        with self._lock:
            self._items.clear()

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for queue, item in items:
            queue.put_nowait(item)
