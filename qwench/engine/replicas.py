"""Tensor parallelism in the engine: one process a device, each with its share of the weights and of the cache.

Every rank runs the whole engine - scheduler, block pool, drawing - on the same orders. The sums inside the model give
all ranks the same logits, and noise is a function of the request (`ops.sampling`), so all draw the same tokens and come
to the same decisions without exchanging them. Rank 0 lives in the caller's process. Before each step its loop sends the
others what callers have asked for since the last one (`Add`, `Abort`), with a checksum of the tokens drawn so far,
which a rank that has come to other tokens notices.

Nothing that a step decides may therefore depend on the clock or on what a process happens to hold. Grammars do, as
their cost is bounded by time: rank 0 runs them for all (`shared_matcher.py`).

Not here: how parameters split (`qwench.parallel`), steps (`core.py`), the thread that runs them (`loop.py`).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qwench.engine.answer import Answer
from qwench.engine.assembly import build_core
from qwench.engine.config import EngineConfig
from qwench.engine.core import Core
from qwench.engine.runner import Flight
from qwench.engine.sequence import Sequence
from qwench.engine.shared_matcher import HeardMatcher, LedMatcher, Outcome
from qwench.model.checkpoint import read_config
from qwench.model.decoder import CausalLM
from qwench.parallel.plan import check
from qwench.parallel.tensor import Group, connect, join_group, load_shard
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

if TYPE_CHECKING:
    from qwench.engine.grammar import Matcher

log = logging.getLogger("qwench.engine")

STEP_LIMIT_S = 300.0
"""A step that takes longer has lost a rank. The first steps may compile kernels for a minute."""
GOODBYE_S = 5.0
"""Time for a rank to end by itself when the engine is closed."""


# ------------------------------------------------------------------------------------------------- what ranks are sent
@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank needs to load its share."""

    model: Path
    device_type: str
    dtype: torch.dtype
    world: int
    store: Path
    """Where the ranks meet."""
    limit_s: float
    num_threads: int
    """Of matrix products on a CPU: another number could mean another order of sums, and other bits."""

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.device_type == "cuda" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Setup:
    """Every rank has its weights: meet, and build the engine with these settings."""

    config: EngineConfig
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Add:
    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    ends: frozenset[int]
    limit: int


@dataclass(frozen=True, slots=True)
class Abort:
    number: int


@dataclass(frozen=True, slots=True)
class Orders:
    """Apply the acts, then run one step."""

    acts: list[Add | Abort]
    checksum: int
    """Of all tokens read before this step."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank's last words."""

    error: str
    by_user: bool
    """A ValueError, for whoever has made the settings."""


class Checksum:
    """Of the tokens that a core has read. The numbers are the same in every process: hashes of ints are not salted."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, flight: Flight, lines: list[list[int]]) -> None:
        wanted = (lines[column] for column, sequence in flight.columns if not sequence.is_finished)
        self.value = hash((self.value, *(token for line in wanted for token in line)))


# -------------------------------------------------------------------------------------------------------------- rank 0
class Replicas:
    """The other ranks as rank 0 sees them.

    `load`, `join`, `agree`, then `send` before each step and `stepped` after it; `close` in any state. A thread watches
    the processes; when one ends or a step takes too long, `failure` is set and `on_failure` called.
    """

    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype, world: int) -> None:
        """Start the processes, which load their shares at once.

        Raises ValueError when the model does not split so, or there are fewer devices.
        """
        check(read_config(model), world)
        _check_devices(device, world)
        self._directory = Path(tempfile.mkdtemp(prefix="qwench-"))
        self._plan = Plan(
            model=model,
            device_type=device.type,
            dtype=dtype,
            world=world,
            store=self._directory / "store",
            limit_s=STEP_LIMIT_S,
            num_threads=torch.get_num_threads(),
        )
        self._group: Group | None = None
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers: weakref.WeakKeyDictionary[Sequence, int] = weakref.WeakKeyDictionary()
        self._num_sent = 0
        self._checksum = Checksum()
        self._began: float | None = None
        """When the step that is being computed began."""
        self._lock = threading.Lock()
        self._closed = False
        self._decided = threading.Event()
        self.failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] = lambda failure: None
        self._woken, self._wake = multiprocessing.Pipe(duplex=False)
        self._watcher: threading.Thread | None = None
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(1, world):
                mine, theirs = cast("tuple[Connection, Connection]", context.Pipe())
                process = context.Process(
                    target=_follow, args=(self._plan, rank, theirs), name=f"qwench-rank-{rank}", daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(mine)
            self._watcher = threading.Thread(target=self._watch, name="qwench-ranks", daemon=True)
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------------------------------------------- start
    def load(self) -> CausalLM:
        """Rank 0's share of the model."""
        return load_shard(self._plan.model, self._plan.device(0), self._plan.dtype, 0, self._plan.world)

    def join(self, model: CausalLM, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """Wait until every rank has its weights, and meet. Raises what has stopped one of them."""
        self._collect()
        self._send(Setup(config, tokenizer))
        try:
            self._group = connect(0, self._plan.world, self._plan.store, self._plan.limit_s, self._plan.device(0))
        except RuntimeError as error:
            raise self.explain(error) from error
        join_group(model, self._group)

    def agree(self, num_blocks: int) -> int:
        """The smallest number of cache blocks that fit on a rank."""
        fewest = min(num_blocks, *self._collect())
        self._send(fewest)
        return fewest

    def _collect(self) -> list[Any]:
        """The next message of each rank."""
        messages = []
        for _ in self._processes:
            message = self._arrived.get()
            if isinstance(message, Exception):
                raise message
            messages.append(message)
        return messages

    # ---------------------------------------------------------------------------------------------------- steps
    def follow(self, core: Core) -> None:
        """Watch the tokens that rank 0 reads."""
        core.on_tokens = self._note

    def _note(self, flight: Flight, lines: list[list[int]]) -> None:
        self.raise_failure()  # tokens that were waited for when a rank has gone are not to be trusted
        self._checksum.add(flight, lines)

    def send(self, orders: Iterable[tuple[bool, Sequence]]) -> None:
        """Let the other ranks do the same before the step that follows: (is new, sequence)."""
        self.raise_failure()
        acts = [self._add(sequence) if is_new else self._abort(sequence) for is_new, sequence in orders]
        self._began = time.monotonic()
        self._send(Orders(acts, self._checksum.value))

    def lead(self, matcher: Matcher) -> Matcher:
        """The matcher, whose outcomes the other ranks will hear while they run the same steps."""
        return cast("Matcher", LedMatcher(matcher, self._send))

    def stepped(self) -> None:
        self._began = None

    def _add(self, sequence: Sequence) -> Add:
        self._num_sent += 1
        self._numbers[sequence] = self._num_sent
        params, answer = sequence.params, sequence.answer
        params = replace(params, logit_bias=dict(params.logit_bias))  # some mappings cannot travel
        return Add(self._num_sent, sequence.prompt, params, sequence.seed, answer.ends, answer.limit)

    def _abort(self, sequence: Sequence) -> Abort:
        return Abort(self._numbers[sequence])

    def _send(self, message: Any) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(message)
            except OSError as error:
                raise self.explain(error) from error

    # ---------------------------------------------------------------------------------------------------- failure
    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def explain(self, error: BaseException) -> BaseException:
        """What has stopped a rank, if that is why a step of this one has failed; else `error`."""
        if isinstance(error, RuntimeError | OSError):
            self._decided.wait(GOODBYE_S)
        return self.failure or error

    def _watch(self) -> None:
        pipes = dict(enumerate(self._pipes, 1))
        ends = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        while not self._closed and self.failure is None:
            ready = wait([*pipes.values(), *ends, self._woken], timeout=min(1.0, self._plan.limit_s / 4))
            for rank in [rank for rank, pipe in pipes.items() if pipe in ready]:
                if not self._listen(rank, pipes[rank]):
                    del pipes[rank]  # the end of its process is about to be noticed
            for rank in [rank for end, rank in ends.items() if end in ready]:
                if self._closed:
                    return
                if rank in pipes:
                    self._listen(rank, pipes[rank])  # its last words
                self._processes[rank - 1].join()
                code = self._processes[rank - 1].exitcode
                self._fail(RuntimeError(f"the process of device {rank} has ended (exit code {code})"))
            began = self._began
            if began is not None and time.monotonic() - began > self._plan.limit_s:
                self._fail(RuntimeError(f"a step has taken longer than {self._plan.limit_s:g} s on some device"))

    def _listen(self, rank: int, pipe: Connection) -> bool:
        """Take what a rank has sent; False when it will send no more."""
        try:
            while pipe.poll():
                message = pipe.recv()
                if not isinstance(message, Failed):
                    self._arrived.put(message)
                elif message.by_user:
                    self._fail(ValueError(message.error))
                else:
                    self._fail(RuntimeError(f"device {rank} has failed: {message.error}"))
        except (EOFError, OSError):
            return False
        return True

    def _fail(self, failure: Exception) -> None:
        with self._lock:
            if self._closed or self.failure is not None:
                return
            self.failure = failure
        log.error("tensor parallelism: %s", failure)
        self._decided.set()
        self._arrived.put(failure)
        self.on_failure(failure)
        if self._group is not None:
            self._group.abort()

    # ------------------------------------------------------------------------------------------------------ end
    def close(self) -> None:
        """End the other processes; by force where they do not end by themselves. From any thread, in any state."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake.close()  # the watcher wakes up
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + (GOODBYE_S if self.failure is None else 0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        if self._group is not None:
            self._group.abort()
        for pipe in [*self._pipes, self._woken]:
            pipe.close()
        for process in self._processes:
            process.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _check_devices(device: torch.device, world: int) -> None:
    if device.type == "cuda":
        if device.index:
            raise ValueError(
                f"device is {device}, but tensor_parallel={world} takes cuda:0 to cuda:{world - 1}; "
                "choose the devices with CUDA_VISIBLE_DEVICES"
            )
        if (found := torch.cuda.device_count()) < world:
            raise ValueError(f"tensor_parallel is {world}, but this machine has {found} CUDA devices")


# --------------------------------------------------------------------------------------------------------- other ranks
def _follow(plan: Plan, rank: int, pipe: Connection) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all, and rank 0 ends the others
    threading.Thread(target=_end_with_parent, args=(plan.store.parent,), daemon=True).start()
    code = 1
    try:
        _work(plan, rank, pipe)
        code = 0
    except EOFError:
        pass  # rank 0 has gone
    except BaseException as error:
        log.error("%s", traceback.format_exc())
        with contextlib.suppress(OSError):
            pipe.send(Failed(f"{type(error).__name__}: {error}", by_user=False))
    os._exit(code)  # no destructors: a communicator whose other ranks have gone may wait for ever


def _end_with_parent(directory: Path) -> None:
    """Also in the middle of a sum for which rank 0 will never come."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def _work(plan: Plan, rank: int, pipe: Connection) -> None:
    torch.set_num_threads(plan.num_threads)
    device = plan.device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def heard(kind: type[Any]) -> Any:
        if not isinstance(message := pipe.recv(), kind):
            raise EOFError
        return message

    def agree(num_blocks: int) -> int:
        pipe.send(num_blocks)
        return heard(int)

    try:
        model = load_shard(plan.model, device, plan.dtype, rank, plan.world)
        pipe.send(rank)
        setup = heard(Setup)
        join_group(model, connect(rank, plan.world, plan.store, plan.limit_s, device))
        core = build_core(model, setup.tokenizer, setup.config, agree)
    except ValueError as error:
        pipe.send(Failed(str(error), by_user=True))
        return
    follower = Follower(core, setup.tokenizer, lambda: heard(Outcome))
    while True:
        follower.step(heard(Orders))


class Follower:
    """A core that does what rank 0 orders."""

    def __init__(self, core: Core, tokenizer: Tokenizer, hear: Callable[[], Outcome]) -> None:
        """`hear` waits for the next outcome of a grammar."""
        self._core, self._tokenizer, self._hear = core, tokenizer, hear
        self._sequences: dict[int, Sequence] = {}
        """By number; finished ones until the next order."""
        self._checksum = Checksum()
        core.on_tokens = self._checksum.add

    def step(self, orders: Orders) -> None:
        """Raises RuntimeError when this rank has drawn other tokens than rank 0."""
        if orders.checksum != self._checksum.value:
            raise RuntimeError(
                "this device has drawn other tokens than the first one; the answers are not to be trusted"
            )
        if orders.acts:
            self._sequences = {n: s for n, s in self._sequences.items() if not s.is_finished}
        for act in orders.acts:
            if isinstance(act, Add):
                answer = Answer(self._tokenizer, act.params, act.ends, act.limit, streaming=False)
                sequence = self._sequences[act.number] = Sequence(act.prompt, act.params, act.seed, answer, None)
                if act.params.grammar is not None:
                    sequence.matcher = cast("Matcher", HeardMatcher(self._hear))
                self._core.add(sequence)
            elif act.number in self._sequences:
                self._core.abort(self._sequences[act.number])
        self._core.step()
