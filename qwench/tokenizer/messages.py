"""Conversations in OpenAI's form, checked and turned into `qwench.types.Message`.

Nothing is dropped in silence: a field that no chat format of Qwen can express is an error that names the message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from qwench.types import Message, Role, ToolCall

_ROLES = get_args(Role)
# tool_call_id only links a result to its call; Qwen's formats link them by order.
_KNOWN = {"role", "content", "tool_calls", "name", "tool_call_id"}

Messages = Sequence[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


def as_messages(messages: Messages) -> list[Message]:
    """Check a conversation and bring it into one form. Raises ValueError naming the index of a bad message.

    >>> as_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    [Message(role='user', content='Hi', tool_calls=(), name='')]
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise ValueError("messages is empty; give at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message | Mapping[str, Any], where: str) -> Message:
    if isinstance(message, Message):
        message = {
            "role": message.role,
            "content": message.content,
            "tool_calls": message.tool_calls,
            "name": message.name,
        }
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}; give an object with role and content")
    role: Any = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where} has role {role!r}; known roles are {', '.join(_ROLES)}")
    if unknown := [key for key, value in message.items() if key not in _KNOWN and value not in (None, [], "", {})]:
        raise ValueError(f"{where} has a field {unknown[0]!r} that no chat format of Qwen can express")
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ValueError(f"{where} has tool_calls but role {role!r}; only the assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}.tool_calls is no list")
    name = message.get("name") or ""
    if not isinstance(name, str):
        raise ValueError(f"{where}.name is no string")
    content = _content(message.get("content"), where)
    parsed = tuple(_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls))
    return Message(role=role, content=content, tool_calls=parsed, name=name)


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}.content is a {type(content).__name__}; give a string or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"{where}.content[{number}] is no text part; only text can be rendered")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is a {type(call).__name__}; give an object with a function")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments is not valid JSON: {error}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.function.arguments must be a JSON object, not {type(arguments).__name__}")
    try:
        json.dumps(dict(arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.function.arguments cannot be written as JSON: {error}") from None
    return ToolCall(name=name, arguments=dict(arguments), id=str(call.get("id") or ""))


def as_tools(tools: Tools | None) -> list[Mapping[str, Any]]:
    """Check tool descriptions of the form {"type": "function", "function": {"name", "description", "parameters"}}."""
    if tools is None:
        return []
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise ValueError('tools must be a list such as [{"type": "function", "function": {"name": ...}}]')
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{index}] is not of the form {{"type": "function", "function": {{"name": ...}}}}')
        try:
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise ValueError(f"tools[{index}] cannot be written as JSON: {error}") from None
    return list(tools)
