"""One answer as it grows: when it ends, its text, and what is new since the caller last looked.

Text lags behind tokens while it is half of a character or could still turn into a stop string. It is made only where
somebody reads it on the way (streaming) or a stop string must be found; else once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwench.tokenizer import StreamDecoder, Tokenizer
from qwench.types import Chunk, Completion, FinishReason, SamplingParams


class Answer:
    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, ends: frozenset[int], limit: int, *, streaming: bool
    ) -> None:
        """`ends` are the tokens that end it, `limit` the most tokens that it may have."""
        self.params, self.ends, self.limit = params, ends, limit
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        skipped: list[None] | None = [None] * max(1, params.prompt_logprobs_from) if params.prompt_logprobs else None
        self.prompt_logprobs: list[float | None] | None = None if skipped is None else [*skipped]
        self.prompt_greedy: list[bool | None] | None = None if skipped is None else [*skipped]
        self.first_logprobs: dict[int, float] | None = None
        self.num_cached_tokens = 0
        self.finish: FinishReason | None = None
        self._tokenizer, self._streaming = tokenizer, streaming
        self._stops = [stop for stop in params.stop if stop]
        self._reads = streaming or bool(self._stops)
        self._decoder = StreamDecoder(tokenizer)
        self._text, self._sent_text, self._sent_tokens = "", 0, 0

    def add_prompt_logprobs(self, logprobs: list[float], greedy: list[bool]) -> None:
        """Of the next tokens of the prompt."""
        assert self.prompt_logprobs is not None
        assert self.prompt_greedy is not None
        self.prompt_logprobs += logprobs
        self.prompt_greedy += greedy

    def push(self, token: int, logprob: float, top: dict[int, float] | None = None) -> bool:
        """Add a token; whether the answer has ended."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)
        if token in self.ends:
            return self._end("stop")
        if self._reads:
            piece = self._decoder.push(token)
            self._text += piece
            if self._stops and piece and len(self.token_ids) >= self.params.min_tokens and self._cut(len(piece)):
                return self._end("stop", flush=False)
        if len(self.token_ids) >= self.limit:
            return self._end("length")
        return False

    def extend(self, tokens: list[int], logprobs: list[float]) -> bool:
        """Add several tokens, those after the answer's end excepted; whether it has ended."""
        if self._stops or not self.ends.isdisjoint(tokens) or len(self.token_ids) + len(tokens) >= self.limit:
            return any(self.push(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True))
        self.token_ids += tokens
        self.logprobs += logprobs
        if self._reads:
            self._text += "".join(map(self._decoder.push, tokens))
        return False

    def stop(self) -> bool:
        """End the answer here, as a finished grammar does; this reason goes before the limit's."""
        return self._end("stop") if self.finish in (None, "length") else True

    def _cut(self, num_new: int) -> bool:
        """Cut the text at the first stop string that the last `num_new` characters have completed."""
        before = len(self._text) - num_new
        found = [at for stop in self._stops if (at := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _end(self, reason: FinishReason, *, flush: bool = True) -> bool:
        if not self._reads:
            kept = self.token_ids[:-1] if self.token_ids and self.token_ids[-1] in self.ends else self.token_ids
            self._text = self._tokenizer.decode(kept, skip_special=True)
        elif flush:
            self._text += self._decoder.flush()
        self.finish = reason
        return True

    def abort(self) -> None:
        if self.finish is None:
            self._end("abort")

    def take(self) -> Chunk:
        """What is new since the last call; after the end, with the completion."""
        first, self._sent_tokens = self._sent_tokens, len(self.token_ids)
        done = self.finish is not None
        safe = len(self._text) if done else max(self._sent_text, len(self._text) - held_back(self._text, self._stops))
        text, self._sent_text = self._text[self._sent_text : safe], safe
        return Chunk(
            text=text,
            token_ids=self.token_ids[first:],
            logprobs=self.logprobs[first:],
            top_logprobs=self.top_logprobs[first:],
            completion=self.completion() if done else None,
        )

    def completion(self) -> Completion:
        assert self.finish is not None
        further: dict[str, Any] = {"top_logprobs": self.top_logprobs} if self.params.top_logprobs else {}
        return Completion(
            token_ids=self.token_ids,
            text=self._text,
            logprobs=self.logprobs,
            finish_reason=self.finish,
            prompt_logprobs=self.prompt_logprobs,
            prompt_greedy=self.prompt_greedy,
            first_logprobs=self.first_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            **further,
        )


def joined(pieces: Sequence[Chunk]) -> Chunk:
    """Pieces of one answer that follow each other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Chunk(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs],
        completion=pieces[-1].completion,
    )


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
