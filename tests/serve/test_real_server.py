"""The published Qwen2.5-Coder-0.5B-Instruct behind the server: it answers, calls a tool and writes JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Running, wait_until

from qwench.engine import Engine
from qwench.engine.config import EngineConfig
from qwench.types import SamplingParams

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
GGUF = ASSETS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF.exists(), reason=f"no {GGUF.name} in QWENCH_ASSETS ({ASSETS})"),
]


@pytest.fixture(scope="module")
def real(start_server: Callable[..., Running]) -> Iterator[Running]:
    with Engine(GGUF, "cpu", "bfloat16", config=EngineConfig(max_len=4096, cache_tokens=8192)) as engine:
        yield start_server(served=engine, model_names=("coder",))


def test_it_streams_what_the_engine_writes(real: Running) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number."}
    ]
    text = ""
    usage = None
    for chunk in real.client().chat.completions.create(
        model="coder", messages=messages, temperature=0, max_tokens=64, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "def fib" in text
    prompt = real.engine.tokenizer.render(messages)
    assert text == real.engine.generate([prompt], SamplingParams(temperature=0, max_tokens=64))[0].text
    assert usage is not None
    assert usage.prompt_tokens == len(prompt)
    again = real.client().chat.completions.create(model="coder", messages=messages, temperature=0, max_tokens=1)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= len(prompt) // 16 * 16 - 16, "the prefix is known"


def test_it_calls_a_tool_and_uses_the_result(real: Running) -> None:
    client = real.client()
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris now? Use the tool."}]
    ask: dict[str, Any] = {"model": "coder", "tools": [WEATHER], "temperature": 0}
    stream = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, max_tokens=60, stream=True, **ask
    )
    name, arguments, finish, call_id = "", "", None, ""
    for chunk in stream:
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            call_id = call.id or call_id
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert finish == "tool_calls"
    assert name == "get_weather"
    assert "paris" in json.loads(arguments)["city"].lower()
    messages += [
        {
            "role": "assistant",
            "tool_calls": [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": '{"temperature_celsius": 31, "sky": "cloudless"}'},
    ]
    answer = client.chat.completions.create(messages=messages, max_tokens=60, **ask).choices[0].message.content
    assert "31" in (answer or "")


def test_it_writes_json_for_a_schema(real: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string"}, "continent": {"enum": ["Europe", "Asia", "Africa"]}},
        "required": ["capital", "continent"],
        "additionalProperties": False,
    }
    answer = real.client().chat.completions.create(
        model="coder", temperature=0, max_tokens=60,
        messages=[{"role": "user", "content": "Capital and continent of France, as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "country", "schema": schema, "strict": True}},
    ).choices[0]  # fmt: skip
    assert answer.finish_reason == "stop"
    found = json.loads(answer.message.content or "")
    assert set(found) == {"capital", "continent"}
    assert "Paris" in found["capital"]
    assert found["continent"] == "Europe"
    wait_until(real.is_idle, "the engine to be idle")
