"""Ask an engine questions and keep what it said: the small evaluations of the demo stand on this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwench.run import progress
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Message, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question with its answer: `Answer(question="2+2=", completion=Completion(...))`."""

    question: str
    completion: Completion


class Answering(Protocol):
    """What is asked of an engine: `engine.Engine` is one."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue all prompts; `progress` is called with 1 for each answer that is complete."""
        ...


class Scoring(Protocol):
    """What is asked of an engine: `engine.Engine` is one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_len(self) -> int: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Continue all prompts; `on_answer` hears of each answer when it is complete, on the calling thread."""
        ...


def ask(
    engine: Answering,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    params: SamplingParams,
    title: str = "asking",
) -> list[Answer]:
    """The engine's answer to every conversation, in order; they are computed together."""
    with progress() as bar:
        task = bar.add_task(title, total=len(prompts))
        rendered = [tokenizer.render(messages) for messages in prompts]
        completions = engine.generate(rendered, params, lambda number: bar.advance(task, number))
    return [
        Answer(question=messages[-1].content, completion=completion)
        for messages, completion in zip(prompts, completions, strict=True)
    ]


def share(answers: Sequence[Answer], holds: Callable[[int, Completion], bool]) -> float:
    """Share of the answers for which `holds(index, completion)`."""
    return sum(holds(index, answer.completion) for index, answer in enumerate(answers)) / max(1, len(answers))
