"""POST /v1/completions: plain continuation of texts or token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from qwench.serve.errors import value_error
from qwench.serve.limits import Life, sse
from qwench.serve.params import (
    answer_tokens,
    asked_grammar,
    check,
    grammar_field,
    known_model,
    off_loop,
    sampling_params,
    single_answers,
)
from qwench.serve.protocol import CompletionRequest
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
from qwench.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default on this route: a text has no end of turn at which an answer would stop by itself."""


async def completions(service: Service, request: CompletionRequest, life: Life) -> Response:
    """Answer one request. Raises ApiError."""
    engine, n = service.engine, request.n or 1
    model = known_model(request.model, service.config.model_names)
    prompts = _as_prompts(request.prompt)
    life.stack.enter_context(service.slots.take(n * len(prompts)))
    grammar, jobs = asked_grammar(request), list[Job]()
    for prompt in prompts:
        ids = await _encode(engine.tokenizer, prompt, bool(request.parse_special))
        room = max(engine.max_len - len(ids), 1)
        asked = request.max_tokens or min(DEFAULT_MAX_TOKENS, room)
        params = sampling_params(
            request,
            service.defaults,
            max_tokens=answer_tokens(len(ids), asked, engine.max_len, "prompt"),
            top_logprobs=request.logprobs or 0,
            grammar=grammar,
            vocab_size=engine.tokenizer.vocab_size,
        )
        await check(engine, ids, params, n, grammar_field(request) if grammar else None)
        jobs += [Job(ids, one) for one in single_answers(params, n)]
    head = {
        "id": f"cmpl-{life.id.removeprefix('req_')}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
    if request.stream:
        return EventStream(_events(service, request, jobs, head, life))
    usage = Usage(jobs, n)
    choices = []
    for index, done in enumerate(await complete(service, jobs, life)):
        usage.add(index, done)
        logprobs = None
        if request.logprobs is not None:
            logprobs = logprobs_body(engine.tokenizer, of_completion(engine.tokenizer, done), request.logprobs)
        choices.append(_choice(index, done.text, logprobs, done.finish_reason))
    return JSONResponse(head | {"choices": choices, "usage": usage.body()})


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def _events(
    service: Service, request: CompletionRequest, jobs: Sequence[Job], head: dict[str, Any], life: Life
) -> AsyncGenerator[bytes]:
    tokenizer, usage = service.engine.tokenizer, Usage(jobs, request.n or 1)
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    if with_usage:
        head = head | {"usage": None}
    queues = [LogprobQueue(tokenizer) for _ in jobs]
    plain = [TextEvents(head | {"choices": [_choice(index, TextEvents.HERE)]}) for index in range(len(jobs))]
    async with aclosing(run(service, jobs, life)) as chunks:
        async for index, chunk in chunks:
            if request.logprobs is None and chunk.completion is None:
                if chunk.text:
                    yield plain[index](chunk.text)
                continue
            logprobs = None
            if request.logprobs is not None:
                queues[index].push(chunk.token_ids, chunk.logprobs, chunk.top_logprobs)
                logprobs = logprobs_body(tokenizer, queues[index].release(chunk.text), request.logprobs)
            finish = None
            if chunk.completion is not None:
                usage.add(index, chunk.completion)
                finish = chunk.completion.finish_reason
            if chunk.text or finish:
                yield sse(head | {"choices": [_choice(index, chunk.text, logprobs, finish)]})
    if with_usage:
        yield sse(head | {"choices": [], "usage": usage.body()})


def _as_prompts(prompt: Any) -> list[str | list[int]]:
    """One prompt or several, as a list of prompts."""
    alone = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if alone else list(prompt)


async def _encode(tokenizer: Tokenizer, prompt: str | list[int], parse_special: bool) -> Sequence[int]:
    if not isinstance(prompt, str):
        if parse_special:
            raise value_error("parse_special is only allowed together with a text as prompt")
        return prompt
    ids = await off_loop(len(prompt), lambda: tokenizer.encode(prompt, parse_special=parse_special))
    if not ids:
        raise value_error("prompt is empty; give at least one character")
    return ids


def logprobs_body(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], num_top: int) -> dict[str, Any]:
    """Parallel lists, one entry a token. The drawn token is always among the top ones, as OpenAI has it."""
    tops: list[dict[str, float]] | None = None
    if num_top:
        tops = []
        for token in tokens:
            best = {**token.top}
            best.setdefault(token.token_id, token.logprob)
            tops.append({token_text(tokenizer, other): finite(value) for other, value in best.items()})
    return {
        "tokens": [token_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.start for token in tokens],
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole characters are written `bytes:\\xe2\\x80`, so that keys stay apart."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
