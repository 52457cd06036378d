"""POST /v1/chat/completions: a conversation in, the assistant's turn out, with its tool calls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from qwench.engine import Engine
from qwench.engine.grammar import tool_grammar
from qwench.serve.errors import value_error
from qwench.serve.limits import Life, sse
from qwench.serve.params import (
    answer_tokens,
    apart,
    asked_grammar,
    check,
    grammar_field,
    known_model,
    plain_tools,
    render,
    sampling_params,
    single_answers,
)
from qwench.serve.protocol import ChatRequest, NamedToolChoice
from qwench.serve.service import Service
from qwench.serve.streaming import (
    EventStream,
    Job,
    LogprobQueue,
    TextEvents,
    TokenLogprob,
    Usage,
    complete,
    finite,
    of_completion,
    run,
)
from qwench.serve.tool_stream import TextDelta, ToolCallArguments, ToolCallStart, ToolCallStream, ToolEvent
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Grammar


async def chat_completions(service: Service, request: ChatRequest, life: Life) -> Response:
    """Answer one request. Raises ApiError."""
    engine, n = service.engine, request.n or 1
    model = known_model(request.model, service.config.model_names)
    life.stack.enter_context(service.slots.take(n))
    # With tool_choice none the model does not see the tools, so it cannot be tempted to call one.
    tools = request.tools if request.tools and request.tool_choice != "none" else None
    prompt = await render(engine, request.messages, tools)
    asked = request.max_completion_tokens or request.max_tokens
    grammar, grammar_param = asked_grammar(request), grammar_field(request)
    if tools:
        if grammar is not None:
            raise value_error(f"{grammar_param} cannot be combined with tools, unless tool_choice is none")
        grammar, grammar_param = await _tool_grammar(engine, request), "tools"
    params = sampling_params(
        request,
        service.defaults,
        max_tokens=answer_tokens(len(prompt), asked, engine.max_len, "messages"),
        top_logprobs=request.top_logprobs or 0,
        grammar=grammar,
        vocab_size=engine.tokenizer.vocab_size,
    )
    await check(engine, prompt, params, n, grammar_param if grammar else None)
    jobs = [Job(prompt, one) for one in single_answers(params, n)]
    head = {
        "id": f"chatcmpl-{life.id.removeprefix('req_')}",
        "object": "chat.completion.chunk" if request.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
    if request.stream:
        return EventStream(_events(service, request, jobs, head, bool(tools), life))
    usage = Usage(jobs, n)
    choices = []
    for index, done in enumerate(await complete(service, jobs, life)):
        usage.add(index, done)
        logprobs = None
        if request.logprobs:
            logprobs = logprobs_body(engine.tokenizer, of_completion(engine.tokenizer, done))
        choices.append({"index": index, **_whole(engine.tokenizer, done, bool(tools)), "logprobs": logprobs})
    return JSONResponse(head | {"choices": choices, "usage": usage.body()})


async def _tool_grammar(engine: Engine, request: ChatRequest) -> Grammar | None:
    choice = request.tool_choice or "auto"
    if isinstance(choice, NamedToolChoice):
        choice = {"type": "function", "function": {"name": choice.function.name}}
    tools, parallel = plain_tools(request.tools), request.parallel_tool_calls is not False
    return await apart(lambda: tool_grammar(engine.tokenizer, tools, choice, parallel), "tools")


# ------------------------------------------------------------------------------------------------------ whole answers
def _whole(tokenizer: Tokenizer, done: Completion, with_tools: bool) -> dict[str, Any]:
    """`message` and `finish_reason` of a choice."""
    content: str | None = done.text
    calls: list[dict[str, Any]] = []
    if with_tools:
        stream = ToolCallStream(tokenizer)
        content = ""
        for event in [*stream.push(done.text), *stream.close()]:
            if isinstance(event, TextDelta):
                content += event.text
            elif isinstance(event, ToolCallStart):
                calls.append(_call(event))
            else:
                calls[event.index]["function"]["arguments"] += event.text
        if calls:
            content = content or None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": _finish(done, bool(calls))}


def _call(event: ToolCallStart) -> dict[str, Any]:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}


def _finish(done: Completion, called: bool) -> str:
    return "tool_calls" if called and done.finish_reason == "stop" else done.finish_reason


# ---------------------------------------------------------------------------------------------------------- streaming
async def _events(
    service: Service, request: ChatRequest, jobs: Sequence[Job], head: dict[str, Any], with_tools: bool, life: Life
) -> AsyncGenerator[bytes]:
    tokenizer = service.engine.tokenizer
    usage = Usage(jobs, len(jobs))
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    if with_usage:
        head = head | {"usage": None}
    choices = [_Choice(tokenizer, index, with_tools, bool(request.logprobs)) for index in range(len(jobs))]
    plain = [TextEvents(head | {"choices": [choice.body({"content": TextEvents.HERE})]}) for choice in choices]
    for choice in choices:
        yield sse(head | {"choices": [choice.body({"role": "assistant", "content": "", "refusal": None})]})
    async with aclosing(run(service, jobs, life)) as chunks:
        async for index, chunk in chunks:
            choice = choices[index]
            if choice.writes_text_only and chunk.completion is None:
                if chunk.text:
                    yield plain[index](chunk.text)
                continue
            if choice.queue is not None:
                choice.queue.push(chunk.token_ids, chunk.logprobs, chunk.top_logprobs)
            for delta in choice.deltas(chunk.text, last=chunk.completion is not None):
                yield sse(head | {"choices": [choice.body(delta)]})
            if chunk.completion is not None:
                usage.add(index, chunk.completion)
                yield sse(head | {"choices": [choice.body({}, _finish(chunk.completion, choice.called))]})
    if with_usage:
        yield sse(head | {"choices": [], "usage": usage.body()})


class _Choice:
    """One answer of a stream."""

    def __init__(self, tokenizer: Tokenizer, index: int, with_tools: bool, with_logprobs: bool) -> None:
        self.tokenizer, self.index = tokenizer, index
        self.tools = ToolCallStream(tokenizer) if with_tools else None
        self.queue = LogprobQueue(tokenizer) if with_logprobs else None
        self.writes_text_only = not with_tools and not with_logprobs
        self.called = False
        self._tokens: list[TokenLogprob] = []

    def deltas(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """What the new text adds to the message."""
        if self.queue is not None:
            self._tokens += self.queue.release(text)
        if self.tools is None:
            return [{"content": text}] if text else []
        events = self.tools.push(text)
        if last:
            events = [*events, *self.tools.close()]
        return [self._delta(event) for event in events]

    def _delta(self, event: ToolEvent) -> dict[str, Any]:
        if isinstance(event, TextDelta):
            return {"content": event.text}
        self.called = True
        if isinstance(event, ToolCallArguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return {"tool_calls": [{"index": event.index, **_call(event)}]}

    def body(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """The choice of one event; it carries the log-probabilities that have gathered since the last one."""
        logprobs = None
        if self.queue is not None and self._tokens:
            logprobs, self._tokens = logprobs_body(self.tokenizer, self._tokens), []
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


# -------------------------------------------------------------------------------------------------- log-probabilities
def logprobs_body(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's chat form. `token` is for reading, `bytes` is exact."""
    content = []
    for token in tokens:
        top = [_entry(tokenizer, other, logprob) for other, logprob in token.top.items()]
        content.append({**_entry(tokenizer, token.token_id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": finite(logprob)}
