"""Answers that must have a form: JSON, choices, expressions, and tool calls, from a model that knows none of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import NAME, PATIENCE_S, Running, wait_until

from qwench.engine.grammar import GrammarCompiler
from qwench.engine.grammar_source import BusyError
from qwench.serve import chat

MESSAGES: list[Any] = [{"role": "user", "content": "The weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "certain": {"type": "boolean"},
    },
    "required": ["unit", "days", "certain"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA, "strict": True}},
    {
        "type": "function",
        "function": {
            "name": "set_flag",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
                "additionalProperties": False,
            },
        },
    },
]
SEEDS = range(4)


def ask(running: Running, seed: int = 0, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name.startswith("guided_")}
    chosen: dict[str, Any] = {"temperature": 1.0, "max_tokens": 200, "seed": seed} | fields
    return running.client().chat.completions.create(model=NAME, messages=MESSAGES, extra_body=extra, **chosen)


def text_of(running: Running, seed: int = 0, **fields: Any) -> str:
    choice = ask(running, seed, **fields).choices[0]
    assert choice.finish_reason == "stop"
    return choice.message.content


def check_weather(arguments: Any) -> None:
    assert set(arguments) == {"unit", "days", "certain"}
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert isinstance(arguments["days"], int)
    assert 1 <= arguments["days"] <= 7
    assert isinstance(arguments["certain"], bool)


@pytest.mark.parametrize("strict", [True, False])
def test_json_schema(running: Running, strict: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": strict}}
    answers = [text_of(running, seed, response_format=form) for seed in SEEDS]
    for answer in answers:
        check_weather(json.loads(answer))
    assert len(set(answers)) > 1, "it is still sampled"


def test_json_schema_in_a_stream_of_several_answers(running: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    texts = [""] * 3
    for chunk in ask(running, n=3, stream=True, response_format=form):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        check_weather(json.loads(text))
    wait_until(running.is_idle, "the engine to be idle")


def test_json_object(running: Running) -> None:
    for seed in SEEDS:
        choice = ask(running, seed, response_format={"type": "json_object"}, max_tokens=1000).choices[0]
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_guided_choice_and_regex_and_grammar(running: Running) -> None:
    for seed in SEEDS:
        assert text_of(running, seed, guided_choice=["yes", "no", "perhaps 🙂"]) in ("yes", "no", "perhaps 🙂")
        number = text_of(running, seed, guided_regex=r"[0-9]{3}-[a-f]{2}")
        assert len(number) == 6
        assert number[:3].isdigit()
        assert number[3] == "-"
        lark = 'start: "a" ("," "b")~2 end\nend: "!" | "?"'
        assert text_of(running, seed, guided_grammar=lark) in ("a,b,b!", "a,b,b?")
    body = {"model": NAME, "prompt": "x", "max_tokens": 20, "guided_choice": ["one", "two"]}
    assert running.post("/v1/completions", body).json()["choices"][0]["text"] in ("one", "two")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(unclosed"}, "guided_regex"),
        ({"guided_grammar": "start: ???"}, "guided_grammar"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-type"}}}},
            "response_format",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}
                ]
            },
            "tools",
        ),
    ],
)
def test_a_grammar_that_cannot_be_used_is_a_400(running: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        body = {"model": NAME, "messages": MESSAGES, "max_tokens": 5, "stream": stream} | fields
        response = running.post("/v1/chat/completions", body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    assert running.service.slots.in_use == 0


class Gate:
    """Holds every call of a function until `open` is called for it."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.num_arrived = 0
        self._may_go = threading.Semaphore(0)

    def __call__(self, *arguments: Any) -> Any:
        self.num_arrived += 1
        assert self._may_go.acquire(timeout=PATIENCE_S), "nobody opened the gate: what it holds held up the others too"
        return self.inner(*arguments)

    def open(self) -> None:
        self._may_go.release()


def test_others_stream_on_while_a_grammar_is_compiled(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is slow here for as long as it takes another stream to be made from its beginning to its end."""
    checked, compiled = Gate(chat.tool_grammar), Gate(GrammarCompiler.compile)
    monkeypatch.setattr(chat, "tool_grammar", checked)
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *arguments: compiled(*arguments))

    def stream_another() -> None:
        stream = running.client().chat.completions.create(
            model=NAME, messages=MESSAGES, temperature=0, max_tokens=8, stream=True
        )
        assert sum(chunk.choices[0].finish_reason is not None for chunk in stream) == 1

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, running, stream=False, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        # the tools' own check, the compilation that decides about a 400, and the one that the engine asks for
        for gate, num_arrived in ((checked, 1), (compiled, 1), (compiled, 2)):
            wait_until(lambda gate=gate, num=num_arrived: gate.num_arrived == num, "a grammar to be compiled")
            stream_another()
            gate.open()
        check_calls(calls_of(slow.result().choices[0].message))


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_expensive_grammars_are_a_503(running: Running, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    def busy(*_: Any) -> None:
        raise BusyError("too many expensive grammars are being compiled; try again")

    monkeypatch.setattr(chat, "tool_grammar", busy)
    monkeypatch.setattr(GrammarCompiler, "compile", busy)
    body = {"model": NAME, "messages": MESSAGES, "stream": stream}
    for fields, param in (({"tools": TOOLS}, "tools"), ({"guided_regex": "a+"}, "guided_regex")):
        response = running.post("/v1/chat/completions", body | fields)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["param"] == param
    assert running.service.slots.in_use == 0


# --------------------------------------------------------------------------------------------------------------- tools
def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def check_calls(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "get_weather":
            check_weather(arguments)
        else:
            assert name == "set_flag"
            assert list(map(type, arguments.values())) == [bool]


def test_a_required_call_fits_its_schema(running: Running) -> None:
    seen = set()
    for seed in SEEDS:
        choice = ask(running, seed, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
        calls = calls_of(choice.message)
        assert len(calls) == 1
        check_calls(calls)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls[0].id.startswith("call_")
        seen.add(calls[0][0])
    assert seen <= {"get_weather", "set_flag"}


@pytest.mark.parametrize("name", ["get_weather", "set_flag"])
def test_a_named_call(running: Running, name: str) -> None:
    named = {"type": "function", "function": {"name": name}}
    choice = ask(running, tools=TOOLS, tool_choice=named).choices[0]
    calls = calls_of(choice.message)
    assert {called for called, _ in calls} == {name}
    check_calls(calls)


def test_streamed_calls_are_the_same(running: Running) -> None:
    for seed in SEEDS:
        fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        want = calls_of(ask(running, seed, **fields).choices[0].message)
        names: dict[int, str] = {}
        arguments: dict[int, str] = {}
        ids: set[str] = set()
        finish = None
        for chunk in ask(running, seed, stream=True, **fields):
            choice = chunk.choices[0]
            finish = choice.finish_reason or finish
            assert not choice.delta.content
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.type == "function"
                    ids.add(call.id)
                    names[call.index] = call.function.name
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        assert [(names[index], json.loads(arguments[index])) for index in sorted(names)] == want
        assert len(ids) == len(want)
        assert finish == "tool_calls"


def test_a_call_cut_off_is_a_length(running: Running) -> None:
    choice = ask(running, tools=TOOLS, tool_choice="required", max_tokens=12).choices[0]
    assert choice.finish_reason == "length"


def test_auto_and_none(running: Running) -> None:
    """The model knows no tools, so what it writes is text; with none it is not even told of them."""
    choice = ask(running, tools=TOOLS, max_tokens=20).choices[0]
    check_calls(calls_of(choice.message) if choice.finish_reason == "tool_calls" else [])
    without = ask(running, max_tokens=20)
    none = ask(running, tools=TOOLS, tool_choice="none", max_tokens=20)
    assert none.choices[0].message.content == without.choices[0].message.content
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    assert ask(running, tools=TOOLS, max_tokens=20).usage.prompt_tokens > without.usage.prompt_tokens


def test_a_round_with_a_tool(running: Running) -> None:
    """Question, call, result, answer, each message sent back as the client got it."""
    client = running.client()
    fields: dict[str, Any] = {"model": NAME, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
    first = client.chat.completions.create(
        messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **fields
    ).choices[0].message  # fmt: skip
    assert first.tool_calls
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "22 degrees"}
    history: list[Any] = [*MESSAGES, first, result]
    fields["max_tokens"] = 10
    second = client.chat.completions.create(messages=history, tool_choice="none", **fields)
    plain = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call.model_dump() for call in first.tool_calls]},
        {"role": "tool", "content": "22 degrees"},
    ]
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(running.engine.tokenizer.render(plain))


def test_logprobs_of_calls_cover_what_the_model_wrote(running: Running) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True}
    whole = ask(running, **fields)
    tokens = whole.choices[0].logprobs.content
    written = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert running.engine.tokenizer.parse_assistant(written).tool_calls
    streamed: list[str] = []
    for chunk in ask(running, stream=True, **fields):
        logprobs = chunk.choices[0].logprobs
        streamed += [token.token for token in logprobs.content] if logprobs else []
    assert streamed == [token.token for token in tokens]
