"""What chat and plain completions share once the prompt is known: running it, streaming it, counting it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from qwench.engine.grammar_source import BusyError
from qwench.serve.errors import ApiError, server_error, value_error
from qwench.serve.limits import LIFE, Life, sse
from qwench.serve.service import Service
from qwench.tokenizer import StreamDecoder, Tokenizer
from qwench.types import Chunk, Completion, SamplingParams

log = logging.getLogger("qwench.serve")

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write, as in OpenAI's answers."""


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make."""

    prompt: Sequence[int]
    params: SamplingParams


# ------------------------------------------------------------------------------------------------------------ running
async def run(service: Service, jobs: Sequence[Job], life: Life) -> AsyncGenerator[tuple[int, Chunk]]:
    """The chunks of all answers as they come, each with the index of its job.

    Closing the generator gives up what is unfinished. Raises ApiError 503 if the engine itself gave an answer up.
    """
    try:
        if len(jobs) == 1:
            async with aclosing(_answer(service, jobs[0], life)) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
        else:
            async with aclosing(_merged(service, jobs, life)) as merged:
                async for index, chunk in merged:
                    yield index, chunk
    finally:
        # Before the last bytes of a stream are sent, so that a client that asks again at once finds its place free.
        life.stack.close()


async def _merged(service: Service, jobs: Sequence[Job], life: Life) -> AsyncGenerator[tuple[int, Chunk]]:
    queue: asyncio.Queue[tuple[int, Chunk | BaseException]] = asyncio.Queue()

    async def feed(index: int, job: Job) -> None:
        try:
            async with aclosing(_answer(service, job, life)) as chunks:
                async for chunk in chunks:
                    queue.put_nowait((index, chunk))
        except BaseException as error:
            queue.put_nowait((index, error))
            raise

    tasks = [asyncio.create_task(feed(index, job)) for index, job in enumerate(jobs)]
    try:
        unfinished = len(jobs)
        while unfinished:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            unfinished -= item.completion is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(service: Service, job: Job, life: Life) -> AsyncGenerator[Chunk]:
    """The chunks of one answer, with their times noted."""
    last: float | None = None
    try:
        async with aclosing(service.engine.astream(job.prompt, job.params)) as chunks:  # closing it frees the cache
            async for chunk in chunks:
                if chunk.completion is not None and chunk.completion.finish_reason == "abort":
                    raise ApiError(503, "the engine gave this answer up; send the request again")
                now = time.monotonic()
                if last is None:
                    service.metrics.first_token_seconds.observe(now - life.started)
                elif chunk.token_ids:
                    service.metrics.inter_token_seconds.observe((now - last) / len(chunk.token_ids))
                last = now
                yield chunk
    except BusyError as error:
        raise ApiError(503, str(error), headers={"retry-after": "1"}) from None
    except ValueError as error:
        # The engine's word for a request that cannot go on, such as a grammar that became too expensive on the way.
        raise value_error(str(error)) from None


async def complete(service: Service, jobs: Sequence[Job], life: Life) -> list[Completion]:
    """The whole answers, in the order of the jobs."""
    done: dict[int, Completion] = {}
    async with aclosing(run(service, jobs, life)) as chunks:
        async for index, chunk in chunks:
            if chunk.completion is not None:
                done[index] = chunk.completion
    return [done[index] for index in range(len(jobs))]


class TextEvents:
    """Events that differ in one piece of text only. The rest is written once: it is the greater part, and there is an
    event for every token."""

    HERE = "\0"
    """Stands for the text. It cannot be part of a model's name, the only other text from outside."""

    def __init__(self, body: dict[str, Any]) -> None:
        """`body` has `TextEvents.HERE` where the text belongs."""
        self._before, mark, self._after = sse(body).partition(json.dumps(self.HERE).encode())
        assert mark, "no place for the text"

    def __call__(self, text: str) -> bytes:
        return self._before + json.dumps(text).encode() + self._after


class EventStream(Response):
    """Server-sent events. An error after the start becomes the last event, since the status is sent by then."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        # The second header tells nginx, which buffers answers by default, to pass each event on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        life: Life = scope[LIFE]
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = DONE
        try:
            async with aclosing(self.events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            last = sse(error.body())
        except Exception:
            log.exception("%s failed", life.id)
            last = sse(server_error(life.id).body())
        await send({"type": "http.response.body", "body": last, "more_body": False})


# ----------------------------------------------------------------------------------------------------------- counting
class Usage:
    """Tokens read and written by one request. A prompt with several answers counts once."""

    def __init__(self, jobs: Sequence[Job], per_prompt: int) -> None:
        self.per_prompt = per_prompt
        self.prompt_tokens = sum(len(job.prompt) for job in jobs[::per_prompt])
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, index: int, completion: Completion) -> None:
        self.completion_tokens += len(completion.token_ids)
        # Later answers find the prompt that the first one left in the cache; the client is told what it had.
        prompt = index // self.per_prompt
        self._cached[prompt] = min(completion.num_cached_tokens, self._cached.get(prompt, completion.num_cached_tokens))

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


# -------------------------------------------------------------------------------------------------- log-probabilities
@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: Mapping[int, float]
    """The likeliest ids with their log-probabilities, best first."""
    start: int
    """Where in the answer's text the token begins, in characters."""


class LogprobQueue:
    """Holds tokens back until the text that they begin is sent.

    Text lags behind tokens while it may become a stop string, and tokens of an end mark or a stop string never become
    text: those are never released, so tokens and text of an answer belong together.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._waiting: deque[TokenLogprob] = deque()
        self._num_decoded = self._num_sent = 0

    def push(self, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Mapping[int, float]]) -> None:
        for place, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            top = tops[place] if tops else {}
            self._waiting.append(TokenLogprob(token_id, logprob, top, self._num_decoded))
            self._num_decoded += len(self._decoder.push(token_id))

    def release(self, text: str) -> list[TokenLogprob]:
        """The tokens that begin in `text`, which is sent now."""
        self._num_sent += len(text)
        released: list[TokenLogprob] = []
        while self._waiting and self._waiting[0].start < self._num_sent:
            released.append(self._waiting.popleft())
        return released


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def of_completion(tokenizer: Tokenizer, completion: Completion) -> list[TokenLogprob]:
    """The tokens of a whole answer that are part of its text."""
    queue = LogprobQueue(tokenizer)
    queue.push(completion.token_ids, completion.logprobs, completion.top_logprobs or ())
    return queue.release(completion.text)
