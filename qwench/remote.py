"""A model behind an OpenAI-compatible address: the chat half of what an engine can do, over HTTP.

    remote = RemoteChat("http://localhost:8000", key=os.environ.get("OPENAI_API_KEY", ""))
    (answer,) = remote.answer([[Message(role="user", content="Hello")]], SamplingParams(temperature=0))

Works with any server that has POST /v1/chat/completions. No streaming, no tools, no token ids: such servers tell text
only.
"""

from __future__ import annotations

import email.utils
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from qwench.types import Completion, FinishReason, Message, SamplingParams

BUSY = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
"""Status codes after which the same request may succeed."""
OURS_TO_MEND = frozenset((401, 403, 404))
"""Status codes that every further request would get as well."""
MOST_WAIT_S = 60.0
DEFAULTS = SamplingParams()


class RemoteError(ValueError):
    """What a server said to one request that it did not answer."""


class RemoteChat:
    """`url` with or without /v1; without a `model`, the only one that the server has.

    Raises ValueError for a server that cannot be asked which models it has.
    """

    def __init__(
        self, url: str, model: str = "", key: str = "", *, at_once: int = 8, timeout_s: float = 600, attempts: int = 6
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address; give one that begins with http:// or https://")
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.base = base if base.rsplit("/", 1)[-1].startswith("v") and base[-1].isdigit() else f"{base}/v1"
        self.key, self.at_once, self.timeout_s, self.attempts = key, at_once, timeout_s, attempts
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        names = [entry["id"] for entry in self._ask("/models", None)["data"]]
        if len(names) != 1:
            raise ValueError(f"{self.base} has the models {', '.join(names) or '(none)'}; say which one")
        return str(names[0])

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams,
        on_answer: Callable[[int, Completion | RemoteError], None] | None = None,
    ) -> list[Completion | RemoteError]:
        """The next message of every conversation, in order; `on_answer` hears of each as it comes, on this thread.

        A conversation that the server refuses (too long, against its rules) has the refusal as its result. Raises
        ValueError where no request can succeed: no such server or model, a wrong key.
        """
        bodies = [self._body(messages, params) for messages in conversations]
        found: dict[int, Completion | RemoteError] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            waiting = {pool.submit(self._one, body): place for place, body in enumerate(bodies)}
            try:
                for future in as_completed(waiting):
                    place = waiting[future]
                    found[place] = future.result()
                    if on_answer is not None:
                        on_answer(place, found[place])
            finally:
                for future in waiting:
                    future.cancel()
        return [found[place] for place in range(len(bodies))]

    def _body(self, messages: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
        if (
            params.n > 1
            or params.grammar is not None
            or params.logit_bias
            or params.stop_token_ids
            or params.ignore_eos
        ):
            raise ValueError(
                "a remote model gives one free answer: no n, grammar, logit_bias, stop_token_ids, ignore_eos"
            )
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
        }
        further = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        body |= {name: value for name in further if (value := getattr(params, name)) != getattr(DEFAULTS, name)}
        return body | ({"stop": list(params.stop)} if params.stop else {})

    def _one(self, body: dict[str, Any]) -> Completion | RemoteError:
        try:
            reply = self._ask("/chat/completions", body)
        except RemoteError as error:
            if "max_tokens" not in body or "max_completion_tokens" not in str(error):
                return error
            renamed = {
                ("max_completion_tokens" if name == "max_tokens" else name): value for name, value in body.items()
            }
            return self._one(renamed)  # OpenAI's own models know it by the other name
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            return RemoteError(f"the reply of {self.base} is none of a chat: {json.dumps(reply)[:200]}")
        finish: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
        return Completion(token_ids=[], text=text, logprobs=[], finish_reason=finish)

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        why = ""
        for attempt in range(self.attempts):
            request = urllib.request.Request(self.base + path, data, headers)
            wait = min(MOST_WAIT_S, 0.5 * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                why = f"{error.code}: {_message(error.read())}"
                if error.code in OURS_TO_MEND:
                    raise ValueError(f"{self.base}{path} answered {why}; check address, model and key") from None
                if error.code not in BUSY:
                    raise RemoteError(why) from None
                wait = _asked_wait(error.headers.get("Retry-After"), wait)
            except (OSError, ValueError) as error:  # no connection, a broken one, or a reply that is no JSON
                why = str(getattr(error, "reason", error))
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise ValueError(f"{self.base}{path} cannot be used ({why}), after {self.attempts} attempts; is the server up?")


def _message(data: bytes) -> str:
    """What an error's body says, in OpenAI's form or another."""
    text = data.decode("utf-8", "replace")
    try:
        told = json.loads(text)
        told = told.get("error", told)
        return str(told.get("message", told) if isinstance(told, dict) else told)[:300]
    except (ValueError, AttributeError):
        return text[:300]


def _asked_wait(header: str | None, otherwise: float) -> float:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not header:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return otherwise
    return min(MOST_WAIT_S, max(0.0, seconds))
