"""From what the model wrote back to a message: the inverse of `chat.py` for assistant turns.

Reads Hermes tags (Qwen2.5), Qwen-Agent's marks (Qwen2) and ReAct text (Qwen, Qwen1.5). Lenient about blanks; a call
that cannot be read leaves the whole text as content, so nothing that was written gets lost.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qwench.tokenizer.chat import find_format
from qwench.tokenizer.special import ENDOFTEXT, IM_END, TOOL_CALL
from qwench.types import Message, ToolCall

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FLOWER = re.compile(
    r"✿FUNCTION✿\s*:?[ \t]*(.*?)\s*✿ARGS✿\s*:?\s*(.*?)\s*(?=✿FUNCTION✿|✿RESULT✿|✿RETURN✿|\Z)", re.DOTALL
)
_REACT = re.compile(
    r"(?:\A|\n)[ \t]*Action:[ \t]*(.*?)\s*\n[ \t]*Action Input:\s*(.*?)\s*(?=\n[ \t]*Observation:|\Z)", re.DOTALL
)
_FINAL = re.compile(r"(?:\A|\n)[ \t]*Final Answer:[ \t]*")


def parse_assistant(text: str, chat_format: str | None = None) -> Message:
    """The assistant's turn as a message with its tool calls.

    With `chat_format`, only that generation's way of calling is looked for; without, each by its marks. End tokens at
    the end are taken off.

    >>> parse_assistant('<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>').tool_calls
    (ToolCall(name='now', arguments={}, id='call_0'),)
    """
    while (bare := text.rstrip()).endswith((IM_END, ENDOFTEXT)):
        text = bare.removesuffix(IM_END).removesuffix(ENDOFTEXT)
    style = find_format(chat_format).tools if chat_format else None
    if style in (None, "hermes") and TOOL_CALL in text:
        return _hermes(text)
    if style in (None, "flower") and "✿" in text:
        return _flower(text)
    if style in (None, "react"):
        return _react(text)
    return Message(role="assistant", content=text)


def _hermes(text: str) -> Message:
    calls: list[ToolCall] = []
    for block in _HERMES.findall(text):
        table = _object(block)
        if table is None or not isinstance(table.get("name"), str):
            return Message(role="assistant", content=text)
        if not _add(calls, table["name"], table.get("arguments", {})):
            return Message(role="assistant", content=text)
    outside = [part.strip() for part in _HERMES.split(text)[::2]]
    return Message(role="assistant", content="\n".join(filter(None, outside)), tool_calls=tuple(calls))


def _flower(text: str) -> Message:
    calls: list[ToolCall] = []
    for name, arguments in _FLOWER.findall(text):
        if not _add(calls, name, arguments):
            return Message(role="assistant", content=text)
    if calls:
        return Message(role="assistant", content=text[: text.index("✿FUNCTION✿")].strip(), tool_calls=tuple(calls))
    # A reply that goes on from ✿RETURN✿ begins with the colon of that mark.
    return Message(
        role="assistant", content=text.rpartition("✿RETURN✿")[2].removeprefix(": ") if "✿RETURN✿" in text else text
    )


def _react(text: str) -> Message:
    finals = list(_FINAL.finditer(text))
    steps = list(_REACT.finditer(text))
    if finals and (not steps or finals[-1].start() > steps[-1].start()):
        return Message(role="assistant", content=text[finals[-1].end() :].strip())
    calls: list[ToolCall] = []
    if not steps or not _add(calls, steps[-1][1], steps[-1][2]):
        return Message(role="assistant", content=text)
    thought = text[: steps[-1].start()].strip().removeprefix("Thought:").strip()
    return Message(role="assistant", content=thought, tool_calls=tuple(calls))


def _add(calls: list[ToolCall], name: str, arguments: Any) -> bool:
    """Append a call if it can be read."""
    table = _object(arguments) if isinstance(arguments, str) else arguments
    if not name or not isinstance(table, dict):
        return False
    calls.append(ToolCall(name=name, arguments=table, id=f"call_{len(calls)}"))
    return True


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object, possibly fenced, or with the doubled braces that some published templates showed the model."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    for candidate in (text, text[1:-1] if text.startswith("{{") and text.endswith("}}") else ""):
        try:
            table = json.loads(candidate, strict=False) if candidate else None
        except ValueError:
            continue
        if isinstance(table, dict):
            return table
    return None
