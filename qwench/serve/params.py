"""From a request to what the engine runs: prompt ids and `SamplingParams`.

The model's generation_config.json says how to sample where the request does not; OpenAI's defaults say it where
neither does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwench.engine import Engine
from qwench.engine.grammar_source import BusyError
from qwench.serve.errors import ApiError, context_length_error, value_error
from qwench.serve.protocol import (
    ChatMessage,
    JsonObjectFormat,
    JsonSchemaFormat,
    SamplingRequest,
    Tool,
    ToolMessage,
)
from qwench.types import Grammar, SamplingParams

T = TypeVar("T")

LONG_TEXT_CHARS = 16_384
"""Longer texts are encoded on another thread, so that the streams of others go on meanwhile."""
_GRAMMAR_THREADS = ThreadPoolExecutor(4, thread_name_prefix="serve-grammar")
"""Threads of their own, so that long texts do not wait behind grammars that take seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How a model wants to be sampled where a request does not say; OpenAI's values where the model does not."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, table: Mapping[str, Any]) -> SamplingDefaults:
        """`do_sample` false means greedy, as Hugging Face has it. Raises ValueError for values that cannot be."""
        known: dict[str, Any] = {name: table[name] for name in cls.__dataclass_fields__ if table.get(name) is not None}
        if table.get("do_sample") is False:
            known = {name: known[name] for name in ("repetition_penalty",) if name in known} | {"temperature": 0.0}
        for name, value in known.items():
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise ValueError(f"generation_config.json has {name} = {value!r}; give a number")
        try:
            SamplingParams(**known)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None
        return cls(**known)


def sampling_params(
    request: SamplingRequest,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    top_logprobs: int,
    grammar: Grammar | None,
    vocab_size: int,
) -> SamplingParams:
    """The request's sampling fields with the model's defaults under them. Raises ApiError naming the field."""
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    for name, ids in (("logit_bias", bias), ("stop_token_ids", request.stop_token_ids or ())):
        if wrong := [token for token in ids if token >= vocab_size]:
            raise value_error(f"{name} has token id {wrong[0]}, but this model's ids end at {vocab_size - 1}", name)
    given = {
        name: value for name in SamplingDefaults.__dataclass_fields__ if (value := getattr(request, name)) is not None
    }
    base = {name: getattr(defaults, name) for name in SamplingDefaults.__dataclass_fields__}
    stop = request.stop if request.stop is not None else ()
    try:
        return SamplingParams(
            **(base | given),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=bias,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            seed=request.seed,
            n=1,
            top_logprobs=top_logprobs,
            grammar=grammar,
        )
    except ValueError as error:
        raise value_error(str(error)) from None


def single_answers(params: SamplingParams, n: int) -> list[SamplingParams]:
    """`n` answers as requests for one answer each; the i-th of a seeded request draws with seed + i."""
    if params.seed is None:
        return [params] * n
    return [replace(params, seed=(params.seed + number) % 2**63) for number in range(n)]


def answer_tokens(num_prompt: int, asked: int | None, max_len: int, param: str) -> int:
    """How long an answer may become: what was asked, or the rest of the context. Raises ApiError if it cannot fit."""
    if num_prompt + (asked or 1) > max_len:
        raise context_length_error(num_prompt, asked, max_len, param)
    return asked or max_len - num_prompt


def asked_grammar(request: SamplingRequest) -> Grammar | None:
    """What the answer must look like, from response_format or one of the guided fields."""
    found: dict[str, Grammar] = {}
    if isinstance(request.response_format, JsonObjectFormat):
        found["response_format"] = Grammar(kind="json_object")
    if isinstance(request.response_format, JsonSchemaFormat):
        schema = request.response_format.json_schema.schema_
        found["response_format"] = Grammar(kind="json_schema", value=json.dumps(schema, ensure_ascii=False))
    if request.guided_regex is not None:
        found["guided_regex"] = Grammar(kind="regex", value=request.guided_regex)
    if request.guided_choice is not None:
        found["guided_choice"] = Grammar(
            kind="choice", value=json.dumps(list(request.guided_choice), ensure_ascii=False)
        )
    if request.guided_grammar is not None:
        found["guided_grammar"] = Grammar(kind="lark", value=request.guided_grammar)
    if len(found) > 1:
        raise value_error(f"{' and '.join(found)} cannot both say what the answer looks like; give one of them")
    return next(iter(found.values()), None)


def grammar_field(request: SamplingRequest) -> str | None:
    """The field that `asked_grammar` reads, for error messages."""
    names = ("guided_regex", "guided_choice", "guided_grammar", "response_format")
    return next((name for name in names if getattr(request, name) is not None), None)


async def check(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, n: int, grammar_param: str | None
) -> None:
    """Ask the engine whether it can run this. Raises ApiError.

    The grammar is compiled here, once for each of the `n` answers; the engine then finds the compiled ones.
    """
    try:
        await off_loop(len(prompt), lambda: engine.validate(prompt, params))
    except ValueError as error:
        raise value_error(str(error)) from None
    if (grammar := params.grammar) is not None:
        await apart(lambda: _compile(engine, grammar, n), grammar_param)


async def apart(work: Callable[[], T], param: str | None) -> T:
    """Run what may take seconds with a grammar on another thread, so that it holds up nobody else.

    Raises ApiError naming `param`: 400 for a grammar that cannot be used, 503 if too many are being compiled.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(_GRAMMAR_THREADS, work)
    except BusyError as error:
        raise ApiError(503, str(error), param=param, headers={"retry-after": "1"}) from None
    except ValueError as error:
        raise value_error(str(error), param) from None


def _compile(engine: Engine, grammar: Grammar, n: int) -> None:
    held = [engine.grammars.compile(grammar) for _ in range(n)]
    del held  # given back, for the engine to find


async def off_loop(length: int, work: Callable[[], T]) -> T:
    """Run `work` here, or on another thread if the text or the list of ids that it reads is long."""
    return work() if length < LONG_TEXT_CHARS else await asyncio.to_thread(work)


# ------------------------------------------------------------------------------------------------------ conversations
def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as `Tokenizer.render` reads them: developer is system, and tool results stand in their calls' order.

    Qwen's formats tie a result to its call by order, OpenAI's by id. Raises ApiError for results without a call and
    calls without a result.
    """
    plain: list[dict[str, Any]] = []
    waiting: dict[str, int] = {}  # id of a call -> its place in the assistant's turn
    results: dict[int, dict[str, Any]] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                raise value_error(f"{where} answers no tool call of the assistant message before it", where)
            results[waiting.pop(message.tool_call_id)] = {"role": "tool", "content": _text(message.content)}
            if not waiting:
                plain += [results[place] for place in sorted(results)]
                results = {}
            continue
        if waiting:
            raise value_error(f"{where} comes before the results of tool calls {', '.join(waiting)}", where)
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": _text(message.content)}
        if message.role == "assistant" and message.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
            waiting = {call.id: place for place, call in enumerate(message.tool_calls)}
            if len(waiting) < len(message.tool_calls):
                raise value_error(f"{where} has two tool calls of the same id", where)
        plain.append(turn)
    if waiting:
        raise value_error(f"messages end before the results of tool calls {', '.join(waiting)}", "messages")
    return plain


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def plain_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as the chat format shows them to the model. `strict` is a word to the server, not to the model."""
    if not tools:
        return None
    described = []
    for tool in tools:
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        if tool.function.parameters is not None:
            function["parameters"] = tool.function.parameters
        described.append({"type": "function", "function": function})
    return described


async def render(
    engine: Engine,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """A conversation as prompt ids. Raises ApiError naming the bad message."""
    plain, described = plain_messages(messages), plain_tools(tools)
    num_chars = sum(len(turn["content"]) for turn in plain) + (len(str(described)) if described else 0)
    try:
        return await off_loop(
            num_chars,
            lambda: engine.tokenizer.render(plain, described, add_generation_prompt=add_generation_prompt),
        )
    except ValueError as error:
        raise value_error(str(error), "messages") from None


def known_model(name: str | None, names: Sequence[str]) -> str:
    """The model's name as the client wrote it, or the first one. Raises ApiError 404 for another model."""
    if name is None:
        return names[0]
    if name not in names:
        message = f"there is no model {name[:200]!r} here; this server has {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name
