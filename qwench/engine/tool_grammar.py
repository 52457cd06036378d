"""Grammars of answers that may call tools, in each chat format's own syntax. [Qwen2.5 docs, Qwen-Agent]

What `tokenizer/chat.py` writes and `tokenizer/replies.py` reads, as a grammar in llguidance's Lark. Free text is free
until it opens a call; from there the call must have a known name and arguments that fit the tool's JSON schema, and the
answer ends behind its calls. Nothing here runs a tool or reads its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.engine.grammar_source import JSON_OPTIONS, GrammarError, check_schema
from qwench.tokenizer import Tokenizer, chat
from qwench.tokenizer.messages import Tools, as_tools
from qwench.tokenizer.special import TOOL_CALL, TOOL_CALL_END
from qwench.types import Grammar

ToolChoice = str | Mapping[str, Any]


def tool_grammar(tokenizer: Tokenizer, tools: Tools | None, tool_choice: ToolChoice, parallel: bool) -> Grammar | None:
    """The grammar of an answer to a conversation with `tools`; None if no call can be made.

    `tool_choice` is OpenAI's: "none", "auto" (text, and calls if the model opens one), "required" (calls at once), or
    {"type": "function", "function": {"name": ...}} (that tool at once). `parallel` False allows one call at most; ReAct
    never has more. Raises ValueError naming a tool that cannot be constrained.
    """
    functions = [tool["function"] for tool in as_tools(tools)]
    if isinstance(tool_choice, Mapping):
        functions = _chosen(functions, tool_choice)
    elif tool_choice not in ("none", "auto", "required"):
        raise ValueError(f'tool_choice is {tool_choice!r}; give "none", "auto", "required" or a function')
    elif tool_choice == "required" and not functions:
        raise ValueError('tool_choice is "required", but there are no tools')
    if tool_choice == "none" or not functions:
        return None
    if tokenizer.chat_format is None:
        raise ValueError("the chat template of this tokenizer is not known, so tools cannot be called")
    _check_names([function["name"] for function in functions])
    style, forced = chat.find_format(tokenizer.chat_format).tools, tool_choice != "auto"
    if style == "hermes":
        lines, lead = _hermes(tokenizer, forced, parallel), '"\\"{}\\", \\"arguments\\": "'
    elif style == "flower":
        lines, lead = _flower(forced, parallel), '"{}\\n✿ARGS✿: "'
    else:
        lines, lead = _react(forced), '"{}\\nAction Input: "'
    lines.append("one: " + " | ".join(f"tool{number}" for number in range(len(functions))))
    for number, function in enumerate(functions):
        schema = {"x-guidance": JSON_OPTIONS, **_parameters(function)}
        lines.append(f"tool{number}: {lead.format(function['name'])} %json {json.dumps(schema)}")
    return Grammar(kind="lark", value="\n".join(lines) + "\n")


# -------------------------------------------------------------------------------------------------------- the formats
def _hermes(tokenizer: Tokenizer, forced: bool, parallel: bool) -> list[str]:
    """<tool_call> may be a token or, in free text, spelled in characters: both open a call, since both read as one.
    Where a tag must stand, it is the token if there is one."""
    opening = _control(tokenizer, TOOL_CALL)
    calls = 'call ("\\n" open call)*' if parallel else "call"
    lines = [
        f"start: open {calls}" if forced else f"start: free | head {calls}",
        f"open: {opening}",
        f'call: "\\n{{\\"name\\": " one "}}\\n" {_control(tokenizer, TOOL_CALL_END)}',
    ]
    if forced:
        return lines
    lines += ["free: /(?s:.*)/", "spelled[lazy]: /(?s:.*)<tool_call>/"]
    return [*lines, "head: spelled" + (" | free open" if TOOL_CALL in tokenizer.special_ids else "")]


def _control(tokenizer: Tokenizer, name: str) -> str:
    token_id = tokenizer.special_ids.get(name)
    return f'"{name}"' if token_id is None else f"<[{token_id}]>"


def _flower(forced: bool, parallel: bool) -> list[str]:
    """Behind its calls a model writes the mark of the result, for the program to go on; there the answer ends."""
    calls = 'call ("\\n✿FUNCTION✿" call)*' if parallel else "call"
    start = f'"✿FUNCTION✿" {calls} end?' if forced else f"free | head {calls} end?"
    free = [] if forced else ["free: /(?s:.*)/", "head[lazy]: /(?s:.*)✿FUNCTION✿/"]
    return [f"start: {start}", *free, 'call: ": " one', 'end: "\\n✿RESULT✿"']


def _react(forced: bool) -> list[str]:
    start = '"Action:" call end?' if forced else "free | head call end?"
    free = [] if forced else ["free: /(?s:.*)/", "head[lazy]: /((?s:.*)\\n)?[ \\t]*Action:/"]
    return [f"start: {start}", *free, 'call: " " one', 'end: "\\nObservation:"']


# ---------------------------------------------------------------------------------------------------------- the tools
def _chosen(functions: Sequence[Mapping[str, Any]], choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    wanted = choice.get("function")
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise ValueError('tool_choice as an object is {"type": "function", "function": {"name": ...}}')
    if not (chosen := [function for function in functions if function["name"] == name]):
        raise ValueError(f"tool_choice names the tool {name!r}, which is not among the tools")
    return chosen


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not name or name != name.strip() or not name.isprintable() or any(char in '"\\✿{}' for char in name):
            raise ValueError(f"the tool name {name!r} cannot be written in a call; use letters, digits, _ and -")
        if names.count(name) > 1:
            raise ValueError(f"two tools have the name {name!r}; give each its own")


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, which are always an object. Raises ValueError naming the tool."""
    name, parameters = function["name"], function.get("parameters")
    if not parameters:  # OpenAI: a function without parameters
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"the parameters of the tool {name!r} are no JSON schema; give an object")
    kinds = parameters.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise ValueError(f'the parameters of the tool {name!r} have type {kinds!r}; arguments are always an "object"')
    schema = {**parameters, "type": "object"}
    try:
        check_schema(schema)
    except GrammarError as error:
        raise GrammarError(f"the parameters of the tool {name!r} cannot be constrained: {error}") from None
    return schema
