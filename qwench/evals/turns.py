"""Conversations in which each question comes after the model's own answer to the one before, as lm-eval requests.

A task makes one request of type "generate_turns" for each turn of a document, with arguments (text, generation
settings, Turn). The language model answers the first turns of all documents together, then the second ones, and so on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.instance import Instance

REQUEST = "generate_turns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """`Turn(number=1, question="Now as a limerick.", system=None)`; numbers count from 0."""

    number: int
    question: str
    system: str | None = None


class Answering(Protocol):
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...
    def generate_until(self, requests: list[Instance]) -> list[str]: ...


def generate_turns(lm: Answering, requests: Sequence[Instance]) -> list[str]:
    """The answer to every request, in order; repeats of a document are conversations of their own."""
    conversations: defaultdict[tuple[Any, ...], dict[int, int]] = defaultdict(dict)
    seen: Counter[int] = Counter()
    for place, request in enumerate(requests):
        turn = _arguments(request)[1]
        repeat = seen[id(request)]
        seen[id(request)] += 1
        conversations[request.task_name, request.doc_id, repeat][turn.number] = place
    answers: dict[int, str] = {}
    histories: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for number in range(max((len(turns) for turns in conversations.values()), default=0)):
        asked: list[Instance] = []
        places: list[tuple[tuple[Any, ...], int]] = []
        same: dict[tuple[Any, ...], Instance] = {}
        for key, turns in conversations.items():
            if number not in turns:
                continue
            request = requests[turns[number]]
            settings, turn = _arguments(request)
            system = [{"role": "system", "content": turn.system}] if turn.system else []
            history = histories.setdefault(key, system)
            history.append({"role": "user", "content": turn.question})
            context = lm.apply_chat_template(history)
            made = Instance(
                "generate_until", request.doc, (context, settings), number,
                metadata=(request.task_name, request.doc_id, request.repeats),
            )  # fmt: skip
            # Equal requests are one object, by which the language model tells repeats apart.
            asked.append(same.setdefault((*key[:2], context), made))
            places.append((key, turns[number]))
        for (key, place), answer in zip(places, lm.generate_until(asked), strict=True):
            answers[place] = answer
            histories[key].append({"role": "assistant", "content": answer})
    return [answers[place] for place in range(len(requests))]


def _arguments(request: Instance) -> tuple[dict[str, Any], Turn]:
    arguments: tuple[Any, ...] = request.args
    return arguments[1], arguments[2]
