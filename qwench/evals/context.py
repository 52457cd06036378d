"""What the functions of a task may know of the evaluation that they serve.

lm-eval calls them with documents and answers only; a task that makes its texts to measure (needle in a haystack) or
runs programs needs the tokenizer, lengths or the number of workers as well. No lm-eval and no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from qwench.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """`TaskContext(tokenizer=engine.tokenizer, max_len=32768, data_dirs=(Path("data/eval"),))`"""

    tokenizer: Tokenizer
    max_len: int
    """Tokens of prompt and answer that the model can be given."""
    data_dirs: tuple[Path, ...] = ()
    """Where local files are looked for."""
    seed: int = 1234
    workers: int = 0
    """Processes that run programs; 0 takes one for each core."""


_current: ContextVar[TaskContext | None] = ContextVar("qwench_task_context", default=None)


def current() -> TaskContext:
    """The context of the evaluation that is running. Raises RuntimeError outside of one."""
    context = _current.get()
    if context is None:
        raise RuntimeError("a task's function was called outside of an evaluation; use harness.evaluate")
    return context


@contextmanager
def using(context: TaskContext) -> Iterator[TaskContext]:
    """Make `context` the current one for the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
