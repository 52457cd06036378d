"""Ask a generator questions and keep what it said: the small evaluations of the demo stand on this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwench.run import progress
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Generator, Message, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question with its answer: `Answer(question="2+2=", completion=Completion(...))`."""

    question: str
    completion: Completion


def ask(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    params: SamplingParams,
    title: str = "asking",
) -> list[Answer]:
    """The generator's answer to every conversation, in order."""
    answers = []
    with progress() as bar:
        for messages in bar.track(prompts, description=title):
            completion = generator.generate(tokenizer.render(messages), params)
            answers.append(Answer(question=messages[-1].content, completion=completion))
    return answers


def share(answers: Sequence[Answer], holds: Callable[[int, Completion], bool]) -> float:
    """Share of the answers for which `holds(index, completion)`."""
    return sum(holds(index, answer.completion) for index, answer in enumerate(answers)) / max(1, len(answers))
