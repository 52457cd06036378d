"""Choosing a tool: the right one, with the right arguments, and none where none fits [Qwen eval scripts].

Up to five candidates. `tool_selection` counts questions with a fitting tool whose named tool is the expected one;
`tool_input` is Rouge-L F of the arguments, as JSON with sorted keys, over the model's own tokens; `false_positive`
counts calls where no tool fits. Asked with the ReAct prompt of Qwen and Qwen1.5, as published figures are, or in the
model's own format.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.evals import context
from qwench.evals.chat_prompt import render_prompt
from qwench.evals.own.bfcl import read_lenient
from qwench.tokenizer.chat import react_prompt

MAX_TOOLS = 5
_REACT = re.compile(r"\nAction: *(.*?) *(?:\n+Action Input: *(.*?))?(?=\nObservation:|\nThought:|\Z)", re.DOTALL)


def ask_react(doc: Mapping[str, Any]) -> str:
    text = react_prompt(doc["query"], json.loads(doc["tools"]))
    return render_prompt(context.current().tokenizer, [{"role": "user", "content": text}])


def ask_native(doc: Mapping[str, Any]) -> str:
    messages = [{"role": "user", "content": doc["query"]}]
    return render_prompt(context.current().tokenizer, messages, json.loads(doc["tools"]))


def read_react(text: str) -> tuple[str, str] | None:
    """Name and input text of the first action, or None. An answer may begin with its action."""
    found = _REACT.search("\n" + text)
    return (found[1].strip(), (found[2] or "").strip()) if found else None


def read_native(text: str) -> tuple[str, str] | None:
    """Of the first call, in the model's format or as bare JSON; no published figures bind this reading."""
    calls = read_lenient(text)
    return (calls[0][0], json.dumps(dict(calls[0][1]), ensure_ascii=False)) if calls else None


def normal(arguments: str) -> str:
    """Arguments as JSON with sorted keys. Python's spelling, single quotes and trailing commas are read too; what
    cannot be read stays as it is."""
    text = arguments.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    for read in (lambda text: json.loads(text, strict=False), ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        try:
            return json.dumps(value, ensure_ascii=False, sort_keys=True)
        except (TypeError, ValueError):
            break
    return text


def rouge_l(found: Sequence[int], wanted: Sequence[int]) -> float:
    """F of the longest common subsequence: 1 for equal sequences, 0 where one is empty."""
    if not found or not wanted:
        return float(not found and not wanted)
    row = [0] * (len(wanted) + 1)
    for item in found:
        before = 0
        for place, other in enumerate(wanted, 1):
            before, row[place] = row[place], before + 1 if item == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(found) + len(wanted))


def _score(doc: Mapping[str, Any], action: tuple[str, str] | None) -> dict[str, float]:
    if not doc["action"]:
        return {"false_positive": float(action is not None)}
    if action is None:
        return {"tool_selection": 0.0, "tool_input": 0.0}
    encode = context.current().tokenizer.encode
    rouge = rouge_l(encode(normal(action[1])), encode(normal(doc["arguments"])))
    return {"tool_selection": float(action[0].strip().lower() == doc["action"].strip().lower()), "tool_input": rouge}


def score_react(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _score(doc, read_react(results[0]))


def score_native(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _score(doc, read_native(results[0]))
