"""The thread that runs the engine's steps, and how requests reach it. What a step does is in `core.py`."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque

import torch

from qwench.engine.core import Core
from qwench.engine.replicas import Replicas
from qwench.engine.sequence import Sequence

log = logging.getLogger("qwench.engine")


class EngineLoop:
    """Starts its thread with the first request. All methods may be called from any thread."""

    def __init__(self, core: Core, replicas: Replicas | None = None) -> None:
        """`replicas`: further devices, which do what `core` does, step by step."""
        self._core, self._replicas = core, replicas
        self._inbox: deque[tuple[bool, Sequence]] = deque()
        """What callers ask for: (True, a sequence to generate) or (False, one to give up)."""
        self._orders: deque[tuple[bool, Sequence]] = deque()
        """The same, taken over by the thread."""
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.failure: BaseException | None = None
        """The error that has ended the thread."""
        if replicas is not None:
            replicas.on_failure = self._replica_failed

    def start(self, sequences: list[Sequence]) -> None:
        """Generate these. Raises RuntimeError when the engine is closed or has failed."""
        with self._wake:
            if self.failure is not None:
                raise RuntimeError("the engine has failed earlier; start a new one") from self.failure
            if self._closed:
                raise RuntimeError("the engine is closed; start a new one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qwench-engine", daemon=True)
                self._thread.start()
            self._inbox.extend((True, sequence) for sequence in sequences)
            self._wake.notify()

    def give_up(self, sequences: list[Sequence]) -> None:
        """Abort those that are not finished; their blocks are free after the step that is being computed."""
        if unfinished := [sequence for sequence in sequences if not sequence.is_finished]:
            with self._wake:
                if not self._closed:
                    self._inbox.extend((False, sequence) for sequence in unfinished)
                    self._wake.notify()

    @property
    def num_arriving(self) -> int:
        """Sequences that the scheduler has not heard of yet."""
        with self._wake:
            return sum(is_new for is_new, _ in self._inbox)

    def close(self) -> None:
        """End the thread after the step that is being computed; every unfinished request gets a RuntimeError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread = self._thread
        if thread is None:
            self._core.runner.release()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._replicas is not None:
            self._replicas.close()

    def _replica_failed(self, failure: Exception) -> None:
        with self._wake:
            if self._thread is None:
                self.failure = failure
            self._wake.notify()

    def _run(self) -> None:
        message = "the engine was closed before the answer was complete"
        try:
            if self._core.runner.on_gpu:
                torch.cuda.set_device(self._core.runner.device)
            while self._take_orders():
                self._core.step()
                if self._replicas is not None:
                    self._replicas.stepped()
        except BaseException as error:
            failure = error if self._replicas is None else self._replicas.explain(error)
            log.error("the engine's loop has failed: %s", failure, exc_info=error if failure is error else None)
            message = f"the engine has stopped: {type(failure).__name__}: {failure}"
            self.failure = failure
        self._end(message)
        self._core.runner.release()  # recorded sums would keep the communicator of the replicas from ending
        if self._replicas is not None:
            self._replicas.close()

    def _take_orders(self) -> bool:
        """Wait until there is something to do, and hand over what callers have asked for; False when closed."""
        with self._wake:
            while not self._inbox and not self._core.has_work and not self._closed and not self._replica_is_lost:
                self._wake.wait()
            self._orders.extend(self._inbox)
            self._inbox.clear()
            if self._closed:
                return False
        if self._replicas is not None:
            self._replicas.send(self._orders)
        while self._orders:
            is_new, sequence = self._orders[0]
            (self._core.add if is_new else self._core.abort)(sequence)
            self._orders.popleft()
        return True

    @property
    def _replica_is_lost(self) -> bool:
        return self._replicas is not None and self._replicas.failure is not None

    def _end(self, message: str) -> None:
        """Tell everybody who waits, whatever state the failure has left behind."""
        with self._wake:
            self._closed = True
            self._orders.extend(self._inbox)
            self._inbox.clear()
        scheduler = self._core.scheduler
        arriving = [sequence for is_new, sequence in self._orders if is_new]
        self._orders.clear()
        for sequence in [*scheduler.running, *scheduler.waiting, *arriving]:
            with contextlib.suppress(Exception):
                scheduler.finish(sequence)
            error = RuntimeError(message)
            error.__cause__ = self.failure
            with contextlib.suppress(Exception):
                sequence.on_failure(error)
