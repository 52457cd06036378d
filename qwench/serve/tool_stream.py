"""An assistant's text, as it comes, into pieces of content and of tool calls: OpenAI's streaming form.

The streaming twin of `tokenizer/replies.py` (`parse_assistant`), for the same formats: Hermes tags, Qwen-Agent's marks,
ReAct. The result does not depend on how the text was cut, no text raises, and what cannot be read as a call is content.
It checks no arguments against a schema: that is the grammar's work.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Literal

import regex

from qwench.tokenizer import Tokenizer, chat
from qwench.tokenizer.replies import parse_assistant


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The `index`-th call begins: `ToolCallStart(0, "call_8f14e45fceea167a", "get_weather")`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of the `index`-th call's arguments."""

    index: int
    text: str


ToolEvent = TextDelta | ToolCallStart | ToolCallArguments
_State = Literal["text", "header", "arguments", "tail", "plain", "over", "later"]

_OPENING = {"hermes": "<tool_call>", "flower": "✿FUNCTION✿"}
# From the opening to the brace of the arguments. Each has one way to match at most, so more text never changes a match.
_HEADER = {
    "hermes": regex.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"arguments"\s*:\s*(?=\{)', regex.DOTALL),
    "flower": regex.compile(r"\s*:?[ \t]*([^\s✿:](?:[^\n✿]*[^\s✿])?)\s*✿ARGS✿\s*:?\s*(?=\{)"),
    "react": regex.compile(r"[ \t]*(\S(?:[^\n]*\S)?)[^\S\n]*\n[ \t]*Action Input:\s*(?=\{)"),
}
# What follows the arguments: the end of the call, the next call, or what the program would have written.
_TAIL = {
    "hermes": regex.compile(r"\s*\}\s*</tool_call>"),
    "flower": regex.compile(r"\s*✿(FUNCTION|RESULT|RETURN)✿"),
    "react": regex.compile(r"[^\S\n]*\n\s*Observation:"),
}
_REACT_MARK = regex.compile(r"(?:\A|\n)[ \t]*(?:(Action)|Final Answer):")


class ToolCallStream:
    """Reads one answer. The whole answer may also be pushed at once.

    >>> stream = ToolCallStream(tok)
    >>> [*stream.push('Hm.\\n<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>'), *stream.close()]
    [TextDelta('Hm.'), ToolCallStart(0, 'call_...', 'now'), ToolCallArguments(0, '{}')]

    `constrained` says that a tool grammar held while the text was written: arguments then pass on as they come, and a
    call cut off by the token limit keeps what there is of it. Without, text is held back from the first opening on, and
    `parse_assistant` decides at the end. Either way the result is `parse_assistant`'s, but for three things that cannot
    be taken back: blanks before the first content stay; content before a lone ✿RETURN✿ stays; what follows the first
    "Final Answer:" is the answer. ReAct's thoughts are held back until a call or the final answer shows what they are.
    """

    def __init__(self, tokenizer: Tokenizer, *, constrained: bool = True) -> None:
        if tokenizer.chat_format is None:
            raise ValueError("the chat template of this tokenizer is not known, so tool calls cannot be read")
        self._format = tokenizer.chat_format
        self._style = chat.find_format(self._format).tools
        self._constrained = constrained
        self._state: _State = "text"
        self._held = ""  # text that is not decided yet
        self._blank = ""  # white space that is content only if more content follows
        self._opening = ""  # what was read of a call whose header is not complete
        self._thought = ""  # in ReAct, what stands before the opening
        self._seen = 0  # in ReAct, how much of `_held` is known to open nothing
        self._said = self._whole = ""
        self._fresh = False  # no content since the last call, or since "Final Answer:"
        self._depth, self._in_string, self._escaped = 0, False, False
        self._events: list[ToolEvent] = []
        self.num_calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """What more text makes certain."""
        if not self._constrained:
            self._whole += text
        self._held += text
        while self._step():
            pass
        return self._take()

    def close(self) -> list[ToolEvent]:
        """The rest, at the end of the answer."""
        if not self._constrained and self._state == "later":
            self._parse_all()
        elif self._state in ("text", "plain", "header"):
            self._say(self._opening + self._held)
            if not self.num_calls and self._state != "plain":
                self._emit(self._blank)
        self._held = self._blank = self._opening = ""
        self._state = "over"
        return self._take()

    def _take(self) -> list[ToolEvent]:
        events, self._events = self._events, []
        return events

    # ---------------------------------------------------------------------------------------------------------- steps
    def _step(self) -> bool:
        """Decide one thing about the held text; False if that needs more text."""
        if not self._held or self._state == "later":
            return False
        if self._state == "over":
            self._held = ""
            return False
        if self._state == "plain":
            self._say(self._held)
            self._held = ""
            return False
        return {
            "text": self._find_mark if self._style == "react" else self._find_opening,
            "header": self._read_header,
            "arguments": self._read_arguments,
            "tail": self._read_tail,
        }[self._state]()

    def _find_opening(self) -> bool:
        mark = _OPENING[self._style]
        at = self._held.find(mark)
        if at < 0:
            keep = next(n for n in range(min(len(mark), len(self._held)), -1, -1) if self._held.endswith(mark[:n]))
            self._say(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        self._say(self._held[:at])
        self._open(mark, self._held[at + len(mark) :])
        return True

    def _find_mark(self) -> bool:
        match = _REACT_MARK.search(self._held, self._seen)
        if match is None:
            return False
        before, rest = self._held[: match.end()], self._held[match.end() :]
        if match[1]:
            self._thought = self._held[: match.start()]
            self._open(before, rest)
        else:
            self._state, self._held, self._fresh = "plain", rest, True
        return True

    def _open(self, opening: str, rest: str) -> None:
        if not self._constrained:
            self._state = "later"
            self._held = opening + rest
            return
        self._opening, self._held, self._state = opening, rest, "header"

    def _read_header(self) -> bool:
        match = _HEADER[self._style].match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        name = _name(match[1], self._style) if match is not None else ""
        if match is None or not name:  # no call: what was taken for an opening is text
            if self._style == "react":
                self._seen, self._held = len(self._opening), self._opening + self._held
            else:
                self._say(self._opening)
            self._opening, self._state = "", "text"
            return True
        self._emit(self._thought.strip().removeprefix("Thought:").strip())
        self._start(name)
        self._held, self._opening, self._state = self._held[match.end() :], "", "arguments"
        return True

    def _start(self, name: str) -> None:
        self._blank = ""
        self._events.append(ToolCallStart(self.num_calls, f"call_{secrets.token_hex(8)}", name))
        self.num_calls += 1
        self._fresh = True

    def _read_arguments(self) -> bool:
        end = self._end_of_object()
        piece, self._held = self._held[:end], self._held[end:]
        self._events.append(ToolCallArguments(self.num_calls - 1, piece))
        if self._depth == 0:
            self._state = "tail"
        return bool(self._held)

    def _end_of_object(self) -> int:
        for index, char in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return len(self._held)

    def _read_tail(self) -> bool:
        match = _TAIL[self._style].match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None:  # no grammar would allow this; it is kept as content
            self._state = "plain" if self._style == "react" else "text"
            return True
        self._held = self._held[match.end() :]
        if self._style == "hermes":
            self._state = "text"
        elif self._style == "flower" and match[1] == "FUNCTION":
            self._open(_OPENING["flower"], self._held)
        else:
            self._state = "over"
        return True

    def _parse_all(self) -> None:
        message = parse_assistant(self._whole, self._format)
        said = self._said.lstrip() if message.tool_calls else self._said
        if message.content.startswith(said):
            self._emit(message.content[len(said) :])
        elif not message.tool_calls:
            self._emit(self._blank + self._held)
        for call in message.tool_calls:
            self._start(call.name)
            self._events.append(ToolCallArguments(self.num_calls - 1, json.dumps(call.arguments, ensure_ascii=False)))

    # -------------------------------------------------------------------------------------------------------- content
    def _say(self, text: str) -> None:
        """Content, but for white space at its end, which waits for more."""
        text = self._blank + text
        if self._fresh:
            text = text.lstrip()
        bare = text.rstrip()
        self._blank = text[len(bare) :]
        if bare and self._fresh:
            bare = ("\n" if self._said else "") + bare  # as `parse_assistant` joins what stands around calls
            self._fresh = False
        self._emit(bare)

    def _emit(self, text: str) -> None:
        if text:
            self._said += text
            self._events.append(TextDelta(text))


def _name(text: str, style: str) -> str:
    """The name in a call's header; "" if it is none."""
    if style != "hermes":
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return ""
