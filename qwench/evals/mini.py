"""A minute of evaluation on a fixed small sample, for a model that is being trained.

    scores = mini_suite(engine, data_dirs=(Path("data/eval"),))
    {"bits_per_byte": 1.31, "hellaswag": 0.34, "arc_easy": 0.41, "piqa": 0.6, "gsm8k": 0.0, "seconds": 21.5}

The sample never depends on how fast the machine is: a task that does not finish in time has no score, and what has one
is comparable with the same score of any other step. Tasks whose files are not there are left out.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwench.tokenizer import Tokenizer
from qwench.types import Completion, SamplingParams

if TYPE_CHECKING:
    from qwench.evals.ask import Scoring

log = logging.getLogger("qwench.evals")

FAMILIES = ("hellaswag", "arc", "piqa")
"""Folders of lm-eval's tasks that the suite needs; reading all of them takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniTask:
    """`MiniTask(name="gsm8k", task="gsm8k_qwen", documents=16)`: the first documents of a task."""

    name: str
    task: str
    documents: int
    metric: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    """Tokens of a prompt; longer texts are read in windows."""


SUITE = (
    MiniTask(name="bits_per_byte", task="bits_per_byte", documents=8, max_length=1024),
    MiniTask(name="hellaswag", task="hellaswag", documents=100, metric="acc_norm"),
    MiniTask(name="arc_easy", task="arc_easy", documents=100, metric="acc"),
    MiniTask(name="piqa", task="piqa", documents=100, metric="acc"),
    MiniTask(name="tables", task="tables_en", documents=32, metric="acc"),
    MiniTask(name="gsm8k", task="gsm8k_qwen", documents=16, generation={"max_gen_toks": 256}),
)
"""In the order in which they run: what says most of a young model first."""


class TimeIsUpError(Exception):
    """The suite's time has passed."""


class _Timed:
    """An engine that gives up when time is up: after the answer that is then complete."""

    def __init__(self, engine: Scoring, deadline: float) -> None:
        self.engine, self.deadline = engine, deadline

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def max_len(self) -> int:
        return self.engine.max_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        def check(place: int, completion: Completion) -> None:
            if on_answer is not None:
                on_answer(place, completion)
            if time.monotonic() > self.deadline:
                raise TimeIsUpError

        return self.engine.generate(prompts, params, progress, check)


def mini_suite(
    engine: Scoring, data_dirs: Sequence[Path], seconds: float = 60, suite: Sequence[MiniTask] | None = None
) -> dict[str, float]:
    """Scores by name, and "seconds"; of `SUITE` by default. Random numbers of the caller (Python's and NumPy's) go on
    as if nothing had been drawn.

    Raises ValueError for data that is broken, and where no task of the suite has its files.
    """
    started = time.monotonic()
    suite = SUITE if suite is None else suite
    with _undisturbed():
        from qwench.evals.harness import Item, Plan, evaluate, quiet

        quiet()  # before lm-eval is imported
        try:
            from qwench.evals.local_files import MissingDataError
            from qwench.evals.task_loading import Catalogue
        except ModuleNotFoundError as error:
            needed = f"the mini-suite needs the package {error.name}; install it with: pip install 'qwench[eval]'"
            raise ValueError(needed) from None
        _hide_bars()
        timed = _Timed(engine, started + seconds)
        catalogue = Catalogue(families=FAMILIES)
        scores: dict[str, float] = {}
        missing: list[str] = []
        for place, entry in enumerate(suite):
            plan = Plan(
                items=[Item(task=entry.task, metric=entry.metric)],
                limit=entry.documents,
                data_dirs=tuple(data_dirs),
                generation=entry.generation,
                max_length=entry.max_length,
            )
            try:
                found = evaluate(timed, plan, catalogue=catalogue)["tasks"][entry.task]
            except MissingDataError as error:
                missing.append(str(error))
                continue
            except TimeIsUpError:
                left_out = ", ".join(one.name for one in suite[place:])
                log.warning("the mini-suite's %g s were too short for: %s", seconds, left_out)
                break
            value = found["metrics"][found["primary"]]["value"]
            if value is not None:
                scores[entry.name] = value
    if len(missing) == len(suite):
        raise ValueError(f"no task of the mini-suite has its data: {missing[0]}")
    return scores | {"seconds": round(time.monotonic() - started, 3)}


def _hide_bars() -> None:
    """lm-eval's progress bars would break the one of the training; TQDM_DISABLE comes too late for a process that has
    loaded tqdm before."""
    import lm_eval.api.task

    setattr(lm_eval.api.task, "tqdm", lambda documents, **settings: documents)  # noqa: B010


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval and its tasks seed and draw from the global generators."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
