"""BFCL's simple, parallel and irrelevance parts, asked through the model's own way of calling tools.

The prompt is the chat template with tools, the answer is read by the tokenizer's parser, and nothing constrains what
the model writes. Irrelevance is right when no function is called. `acc` counts calls in the model's own format only, as
the leaderboard does; `acc_lenient` also those that stand as bare JSON, which is how Qwen2.5-Coder likes to write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.evals import context
from qwench.evals.chat_prompt import render_prompt
from qwench.evals.own.calls import as_tool, match


def question(doc: Mapping[str, Any]) -> str:
    tools = [as_tool(function) for function in json.loads(doc["functions"])]
    return render_prompt(context.current().tokenizer, json.loads(doc["messages"]), tools)


def read_calls(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    message = context.current().tokenizer.parse_assistant(text)
    return [(call.name, call.arguments) for call in message.tool_calls]


def read_lenient(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Calls as above; else JSON objects with a name and arguments, alone, in lists, or in Markdown fences."""
    if found := read_calls(text):
        return found
    decoder = json.JSONDecoder(strict=False)
    at = 0
    while (at := min((place for sign in "[{" if (place := text.find(sign, at)) >= 0), default=-1)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), dict):
                found.append((item["name"], item["arguments"]))
    return found


def _wrong(calls: list[tuple[str, Mapping[str, Any]]], functions: Any, truth: Any) -> str:
    if truth is None:
        return f"{calls[0][0]} was called, though no function fits" if calls else ""
    return match(functions, calls, truth)


def check(responses: Sequence[Sequence[str]], docs: Any) -> list[list[dict[str, Any]]]:
    """An lm-eval filter: the calls of each answer, and why they are wrong ("" where they are right), strictly read and
    leniently."""
    graded: list[list[dict[str, Any]]] = []
    for answers, doc in zip(responses, docs, strict=True):
        functions, truth = json.loads(doc["functions"]), json.loads(doc["truth"])
        graded.append([])
        for text in answers:
            strict, lenient = read_calls(text), read_lenient(text)
            graded[-1].append(
                {
                    "calls": [{"name": name, "arguments": dict(given)} for name, given in lenient],
                    "wrong": _wrong(strict, functions, truth),
                    "wrong_lenient": _wrong(lenient, functions, truth),
                }
            )
    return graded


def score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    answers = results[0] if isinstance(results[0], list) else [results[0]]
    return {
        metric: sum(not answer[key] for answer in answers) / len(answers)
        for metric, key in (("acc", "wrong"), ("acc_lenient", "wrong_lenient"))
    }
