"""Chat formats of every Qwen generation: the only place where templates live.

A conversation becomes a list of `Piece`: text, and control tokens by name. `Tokenizer.render` turns pieces into ids
with text encoded as plain text, so nothing that a user writes can close a turn (tokenizer report, section 6). The
Jinja twins at the end give the same ids for harmless text; they are what other programs read from an exported
directory, and they cannot protect against forged control tokens.

ChatML and its default system prompts: [Qwen TR 3.1], [Qwen2.5 docs]. Tools: ReAct text (Qwen, Qwen1.5), Qwen-Agent's
flower marks (Qwen2), Hermes tags (Qwen2.5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwench.tokenizer.messages import Messages, Tools, as_messages, as_tools
from qwench.tokenizer.special import ENDOFTEXT, IM_END, IM_START, TOOL_CALL, TOOL_CALL_END
from qwench.types import Message, ToolCall

Part = Literal["open", "header", "body", "close", "gap"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation: `Piece("user\\n", part="header", role="user")`."""

    text: str
    control: bool = False
    """Whether this is the control token of that name rather than text."""
    part: Part = "body"
    """Its place in the turn: `<|im_start|>`, role line, body, `<|im_end|>`, newline between turns."""
    role: str = ""
    written: bool = False
    """Whether the assistant writes this body itself. Tool results inside its turn are not its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How one generation writes a conversation."""

    default_system: str
    tools: Literal["react", "flower", "hermes"]
    joined: bool = True
    """Whether role line and body are encoded as one string, as a Jinja template must; Qwen-1 encodes them apart."""
    doubled_braces: bool = False
    """Whether the example call in the tool prompt reads {{"name": ...}}, as in some released files of Qwen2.5."""
    eos: str = IM_END
    """The token that exported files name as the end of an answer."""


_ASSISTANT_PROMPT = "You are a helpful assistant."
_QWEN25_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_MATH_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."

FORMATS: dict[str, ChatFormat] = {
    "qwen": ChatFormat(default_system=_ASSISTANT_PROMPT, tools="react", joined=False),
    "qwen1.5": ChatFormat(default_system=_ASSISTANT_PROMPT, tools="react"),
    "qwen2": ChatFormat(default_system=_ASSISTANT_PROMPT, tools="flower"),
    "qwen2.5": ChatFormat(default_system=_QWEN25_PROMPT, tools="hermes"),
    "qwen2.5-braces": ChatFormat(default_system=_QWEN25_PROMPT, tools="hermes", doubled_braces=True),
    "qwen2.5-base": ChatFormat(default_system=_ASSISTANT_PROMPT, tools="hermes", eos=ENDOFTEXT),
    "qwen2.5-math": ChatFormat(default_system=_MATH_PROMPT, tools="hermes"),
}


def find_format(name: str) -> ChatFormat:
    if name not in FORMATS:
        raise ValueError(f"no chat format {name!r}; known formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def render(name: str, messages: Messages, tools: Tools | None, *, add_generation_prompt: bool) -> list[Piece]:
    """A conversation as pieces, in the chat format `name`. Raises ValueError naming a bad message or tool."""
    style, turns, described = find_format(name), as_messages(messages), as_tools(tools)
    if turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    else:
        system = style.default_system
    if style.tools == "hermes":
        return list(_render_hermes(system, turns, described, _hermes_tail(style), add_generation_prompt))
    in_tools = bool(described) or any(turn.role == "tool" or turn.tool_calls for turn in turns)
    if style.tools == "flower":
        chinese = any(
            _is_han(char) for turn in (system, *(t.content for t in turns if t.role == "user")) for char in turn
        )
        system += flower_tool_prompt(described, chinese=chinese) if described else ""
        marks = _FLOWER
    else:
        turns, marks = _ask_react(turns, described), _REACT
    return list(_render_steps(system, turns, marks if in_tools else None, add_generation_prompt))


def _is_han(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"


# ------------------------------------------------------------------------------------------------------------ turns
def _turn(role: str, body: Iterable[Piece | str], *, closed: bool = True) -> Iterator[Piece]:
    """One ChatML turn. Strings in `body` are text by its role."""
    yield Piece(IM_START, control=True, part="open", role=role)
    yield Piece(role, part="header", role=role)
    yield Piece("\n", part="header", role=role)
    for piece in body:
        yield (
            Piece(piece, role=role, written=role == "assistant")
            if isinstance(piece, str)
            else replace(piece, role=role)
        )
    if closed:
        yield Piece(IM_END, control=True, part="close", role=role)
        yield Piece("\n", part="gap", role=role)


def _generation_prompt() -> Iterator[Piece]:
    yield from _turn("assistant", [], closed=False)


def _json(value: Any) -> str:
    """As Jinja's tojson in transformers writes it: keys in the order given, nothing escaped but what JSON must."""
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------- Hermes tags (Qwen2.5)
_HERMES_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_HERMES_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}'
    "\n</tool_call>"
)


def _hermes_tail(style: ChatFormat) -> str:
    return re.sub(r"(\{.*\})", r"{\1}", _HERMES_TAIL) if style.doubled_braces else _HERMES_TAIL


def _render_hermes(
    system: str, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], tail: str, add_generation_prompt: bool
) -> Iterator[Piece]:
    block: list[Piece | str] = []
    if tools:
        block = [_HERMES_HEAD, *("\n" + _json(tool) for tool in tools), *_with_tags(tail)]
    yield from _turn("system", [system, *block])
    results: list[str] = []
    for index, turn in enumerate(turns):
        if turn.role == "tool":
            results.append(f"<tool_response>\n{turn.content}\n</tool_response>")
            if index + 1 == len(turns) or turns[index + 1].role != "tool":
                yield from _turn("user", ["\n".join(results)])
                results = []
        else:
            yield from _turn(turn.role, _hermes_body(turn))
    if add_generation_prompt:
        yield from _generation_prompt()


def _with_tags(text: str) -> Iterator[Piece]:
    """Text of ours in which <tool_call> and </tool_call> are meant as the tokens."""
    for part in re.split(f"({TOOL_CALL}|{TOOL_CALL_END})", text):
        yield Piece(part, control=part in (TOOL_CALL, TOOL_CALL_END))


def _hermes_body(turn: Message) -> Iterator[Piece]:
    learn = turn.role == "assistant"
    if turn.content or not turn.tool_calls:
        yield Piece(turn.content, written=learn)
    for number, call in enumerate(turn.tool_calls):
        lead = "\n" if number or turn.content else ""
        yield Piece(lead, written=learn)
        yield Piece(TOOL_CALL, control=True, written=learn)
        yield Piece(f'\n{{"name": "{call.name}", "arguments": {_json(call.arguments)}}}\n', written=learn)
        yield Piece(TOOL_CALL_END, control=True, written=learn)


# ------------------------------------------------------- calls and results in one assistant turn (Qwen, 1.5, Qwen2)
@dataclass(frozen=True, slots=True, kw_only=True)
class _Marks:
    """The words that mark calls and results inside an assistant turn."""

    thought: str
    """Before the text that goes with a call."""
    action: str
    action_input: str
    result: tuple[str, str]
    """Before a tool's result: the stop word that the model writes itself, and what follows it."""
    resume: str
    """Written by the program after the last result; the model goes on from there."""
    after_resume: str
    final: str
    """Before an answer without a call."""


_REACT = _Marks(
    thought="Thought:",
    action="Action: ",
    action_input="Action Input: ",
    result=("\nObservation:", " "),
    resume="\nThought:",
    after_resume=" ",
    final="Thought: I now know the final answer.\nFinal Answer: ",
)
_FLOWER = _Marks(
    thought="",
    action="✿FUNCTION✿: ",
    action_input="✿ARGS✿: ",
    result=("\n✿RESULT✿", ": "),
    resume="\n✿RETURN✿",
    after_resume=": ",
    final="",
)


def _render_steps(
    system: str, turns: Sequence[Message], marks: _Marks | None, add_generation_prompt: bool
) -> Iterator[Piece]:
    """Plain ChatML; with `marks`, an assistant's calls, their results and its answer share one turn."""
    yield from _turn("system", [system])
    index = 0
    while index < len(turns):
        turn = turns[index]
        if turn.role not in ("assistant", "tool") or marks is None:
            yield from _turn(turn.role, [turn.content])
            index += 1
            continue
        stop = index
        while stop < len(turns) and turns[stop].role in ("assistant", "tool"):
            stop += 1
            # An answer without a call ends the turn; what follows it is a turn of its own.
            if turns[stop - 1].role == "assistant" and not turns[stop - 1].tool_calls:
                break
        waiting = add_generation_prompt and stop == len(turns) and turns[stop - 1].role == "tool"
        yield from _turn("assistant", _steps(turns[index:stop], marks, waiting), closed=not waiting)
        index = stop
        if waiting:
            return
    if add_generation_prompt:
        yield from _generation_prompt()


def _steps(turns: Sequence[Message], marks: _Marks, waiting: bool) -> Iterator[Piece]:
    calls: list[ToolCall] = []  # made, and not answered yet
    written, resumed = False, False

    def own(text: str) -> Piece:
        return Piece(text, written=True)

    for index, turn in enumerate(turns):
        if turn.role == "assistant" and turn.tool_calls:
            yield from (own(_call_text(call, marks, "\n")) for call in calls)
            lead = "" if resumed or not written else "\n"
            thought = "" if resumed and marks.thought else marks.thought
            said = turn.content.removeprefix(marks.thought).lstrip() if marks.thought else turn.content
            content = said and (marks.after_resume if resumed else " " if marks.thought else "") + said
            yield own(lead + thought + content)
            first, *calls = turn.tool_calls
            yield own(_call_text(first, marks, "\n" if resumed or thought or content or written else ""))
            written, resumed = True, False
        elif turn.role == "assistant":
            final = marks.final
            if resumed:
                final = marks.after_resume + final.removeprefix(marks.thought).lstrip(" ")
            yield own(("\n" if written and not resumed else "") + final + turn.content)
            written, resumed = True, False
        else:
            stop_word, colon = marks.result
            yield own(stop_word)
            yield Piece(colon + turn.content)
            written = True
            more = index + 1 < len(turns) and turns[index + 1].role == "tool"
            if calls:
                yield own(_call_text(calls.pop(0), marks, "\n"))
            elif not more and (waiting or index + 1 < len(turns)):
                yield Piece(marks.resume)
                resumed = True
    yield from (own(_call_text(call, marks, "\n")) for call in calls)


def _call_text(call: ToolCall, marks: _Marks, lead: str) -> str:
    return f"{lead}{marks.action}{call.name}\n{marks.action_input}{_json(call.arguments)}"


# ---------------------------------------------------------------------------------------------- ReAct (Qwen, Qwen1.5)
_REACT_TOOL = (
    "{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? {description} "
    "Parameters: {parameters} Format the arguments as a JSON object."
)
_REACT_PROMPT = """Answer the following questions as best you can. You have access to the following tools:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""


def _fields(tool: Mapping[str, Any]) -> dict[str, str]:
    function = tool["function"]
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": _json(function.get("parameters") or {}),
    }


def react_prompt(query: str, tools: Tools) -> str:
    """The user turn by which Qwen and Qwen1.5 are told of tools."""
    described = [_fields(tool) for tool in as_tools(tools)]
    blocks = "\n\n".join(_REACT_TOOL.format(**fields) for fields in described)
    return _REACT_PROMPT.format(tools=blocks, names=",".join(fields["name"] for fields in described), query=query)


def _ask_react(turns: Sequence[Message], tools: Tools) -> list[Message]:
    """Put the instruction into the latest question, where Qwen expects it."""
    asked = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if not tools:
        return list(turns)
    if not asked:
        raise ValueError(
            "tools are described in the user's question in this chat format, but messages has no user message"
        )
    latest = asked[-1]
    question = replace(turns[latest], content=react_prompt(turns[latest].content, tools))
    return [*turns[:latest], question, *turns[latest + 1 :]]


# --------------------------------------------------------------------------------------- Qwen-Agent's marks (Qwen2)
_FLOWER_TEXTS = {
    False: (
        "# Tools",
        "## You have access to the following tools:",
        "### {name}\n\n{name}: {description} Parameters: {parameters} Format the arguments as a JSON object.",
        "## When you need to call a tool, please insert the following command in your reply, which can be called zero "
        "or multiple times according to your needs:",
        "✿FUNCTION✿: The tool to use, should be one of [{names}]\n"
        "✿ARGS✿: The input of the tool\n✿RESULT✿: Tool results\n"
        "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)",
    ),
    True: (
        "# 工具",
        "## 你拥有如下工具：",
        "### {name}\n\n{name}: {description} 输入参数：{parameters} 此工具的输入应为JSON对象。",
        "## 你可以在回复中插入零次、一次或多次以下命令以调用工具：",
        "✿FUNCTION✿: 工具名称，必须是[{names}]之一。\n✿ARGS✿: 工具输入\n✿RESULT✿: 工具结果\n"
        "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来",
    ),
}


def flower_tool_prompt(tools: Tools, *, chinese: bool) -> str:
    """What Qwen-Agent appends to the system message of Qwen2; in Chinese where system or user write Chinese."""
    title, heading, tool_text, when, commands = _FLOWER_TEXTS[chinese]
    described = [_fields(tool) for tool in as_tools(tools)]
    commands = commands.format(names=",".join(fields["name"] for fields in described))
    blocks = [title, heading, *(tool_text.format(**fields) for fields in described), when, commands]
    return "\n\n" + "\n\n".join(blocks)


# ------------------------------------------------------------------------------------------------- Jinja twins, names
_JINJA_SYSTEM = """{%- set given = messages[0].role == "system" -%}
{{- "<|im_start|>system\n" + (messages[0].content if given else SYSTEM) -}}
"""
_JINJA_PLAIN = """{{- "<|im_end|>\n" -}}
{%- if tools -%}
    {{- raise_exception("this template describes no tools; " + NAME + " has a prompt of its own for them") -}}
{%- endif -%}
{%- set turns = messages[1:] if given else messages -%}
{%- for message in turns -%}
    {%- if message.role not in ["system", "user", "assistant"] or message.tool_calls -%}
        {{- raise_exception("this template cannot write tool calls and results") -}}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\n" + (message.content or "") + "<|im_end|>\n" -}}
{%- endfor -%}
"""
_JINJA_HERMES = """{%- if tools -%}
    {{- HEAD -}}
    {%- for tool in tools -%}{{- "\n" + (tool | tojson) -}}{%- endfor -%}
    {{- TAIL -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{%- set turns = messages[1:] if given else messages -%}
{%- for message in turns -%}
    {%- if message.role == "tool" -%}
        {%- set first = loop.first or turns[loop.index0 - 1].role != "tool" -%}
        {%- set last = loop.last or turns[loop.index0 + 1].role != "tool" -%}
        {{- "<|im_start|>user\n" if first else "\n" -}}
        {{- "<tool_response>\n" + message.content + "\n</tool_response>" -}}
        {{- "<|im_end|>\n" if last else "" -}}
    {%- else -%}
        {{- "<|im_start|>" + message.role + "\n" + (message.content or "") -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function if call.function is defined else call -%}
            {{- "\n" if message.content or not loop.first else "" -}}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
            {{- (function.arguments | tojson) + "}\n</tool_call>" -}}
        {%- endfor -%}
        {{- "<|im_end|>\n" -}}
    {%- endif -%}
{%- endfor -%}
"""
_JINJA_END = """{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}"""
_JINJA_NAME = "{{#- chat format: {name} -#}}\n"


def jinja(name: str) -> str:
    """The format as a Jinja template for other programs. The formats before Qwen2.5 refuse tools there."""
    style = find_format(name)
    body = _JINJA_HERMES if style.tools == "hermes" else _JINJA_PLAIN
    words = {"SYSTEM": style.default_system, "NAME": name, "HEAD": _HERMES_HEAD, "TAIL": _hermes_tail(style)}
    text = re.sub(r"\b(SYSTEM|NAME|HEAD|TAIL)\b", lambda word: _json(words[word[0]]), _JINJA_SYSTEM + body)
    return _JINJA_NAME.format(name=name) + text + _JINJA_END


def recognise(template: str) -> str | None:
    """The format of a Jinja template: one of ours by name, a published one by its default system prompt, else None."""
    for name in FORMATS:
        if template.startswith(_JINJA_NAME.format(name=name)):
            return name
    if IM_START not in template:
        return None
    if TOOL_CALL not in template:
        return "qwen2" if _ASSISTANT_PROMPT in template else None
    if "put your final answer within" in template:
        return "qwen2.5-math"
    if _QWEN25_PROMPT in template:
        doubled = re.search(r'\{\{\\?"name\\?": <function-name>', template)
        return "qwen2.5-braces" if doubled else "qwen2.5"
    return "qwen2.5-base" if f"'{_ASSISTANT_PROMPT}'" in template or f"\\n{_ASSISTANT_PROMPT}" in template else None
