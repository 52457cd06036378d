"""Instruction data for pretraining [Qwen TR 2.1, step 7]: conversations as documents.

Two forms of JSON lines are read: {"messages": [...], "tools": [...]} in OpenAI's vocabulary, and {"instruction",
"input" or "context", "output" or "response"}. A document's text is the plain rendering, by which duplicates and
contamination are found. With `style="chat"` its tokens are those of the tokenizer's chat template: the messages travel
in `meta` and are rendered when tokens are made (`pipeline.tokens`), unless a stage has edited the text by then. Rule
filters, made for prose, are not applied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from qwench.data.inputs import Skipped
from qwench.data.opening import READ_ERRORS, ReadLimits, decompressed, open_raw, read_lines
from qwench.data.text import clean_text
from qwench.tokenizer.messages import as_messages, as_tools
from qwench.types import Document

Style = Literal["plain", "chat"]
_NAMES = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response")


def read_conversations(
    item: Mapping[str, Any], style: Style, problems: list[Skipped], limits: ReadLimits | None = None
) -> Iterator[Document]:
    """The conversations of an item of JSON lines (see `data.documents.read_item`); what is none is appended to
    `problems`, and so is a file that cannot be read."""
    limits = limits or ReadLimits()
    for part in item["files"]:
        try:
            with open_raw(part["path"]) as raw:
                suffix = PurePosixPath(part["path"]).suffix.lower()
                with decompressed(raw, suffix, limits) as stream:
                    for offset, line in read_lines(stream, limits, part.get("start") or 0, part.get("stop")):
                        place = f"{part['name']}@{offset}"
                        try:
                            if (document := _document(line, place, item, style)) is not None:
                                yield document
                        except ValueError as error:
                            problems.append(Skipped(id=place, reason=f"no conversation ({error})"))
        except READ_ERRORS as error:
            problems.append(
                Skipped(id=part["name"], reason=f"unreadable ({getattr(error, 'strerror', None) or error})")
            )


def _document(line: bytes | None, place: str, item: Mapping[str, Any], style: Style) -> Document | None:
    if line is None:
        raise ValueError("line too long")
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError("no valid JSON") from None
    if not isinstance(record, dict):
        raise ValueError("no table")
    messages = _messages(record)
    text = plain_text(messages)
    meta: dict[str, Any] = {}
    if style == "chat":
        meta = {"messages": messages, "text_chars": len(text)}
        if tools := as_tools(record.get("tools")):
            meta["tools"] = list(tools)
    given = record.get("id")
    return Document(
        id=given if isinstance(given, str) and given else place,
        text=text,
        source=item.get("source") or "",
        kind=item.get("kind") or "instructions",
        lang=item.get("lang") or "",
        meta=meta,
    )


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record's messages as plain tables with cleaned texts. Raises ValueError if it is no conversation."""
    if isinstance(given := record.get("messages"), list):
        turns = as_messages(given)
        tables = []
        for turn in turns:
            table: dict[str, Any] = {"role": turn.role, "content": clean_text(turn.content)}
            if turn.name:
                table["name"] = turn.name
            if turn.tool_calls:
                table["tool_calls"] = [{"name": c.name, "arguments": dict(c.arguments)} for c in turn.tool_calls]
            tables.append(table)
        return tables

    def first(keys: Sequence[str]) -> str:
        return next((record[key] for key in keys if isinstance(record.get(key), str)), "")

    question, answer = record.get("instruction"), clean_text(first(_OUTPUTS))
    if not isinstance(question, str) or not answer:
        raise ValueError('neither "messages" nor "instruction" with "output" or "response"')
    question = clean_text("\n\n".join(part for part in (question, first(_INPUTS)) if part.strip()))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def plain_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as text without control tokens.

    >>> plain_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    'User: Hi\\n\\nAssistant: Hello.'
    """
    parts = []
    for message in messages:
        calls = [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in message.get("tool_calls", ())]
        content = "\n".join(part for part in (message.get("content", ""), *calls) if part)
        parts.append(f"{_NAMES[message['role']]}: {content}")
    return "\n\n".join(parts)
