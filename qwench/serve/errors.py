"""What a client gets when something is wrong: always OpenAI's error object, never a traceback.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> error type, where it is not `invalid_request_error` (other 4xx) or `server_error` (5xx)."""

UNSUPPORTED = {"extra_forbidden": "leave it out", "none_required": "leave it out or give null"}
"""pydantic's names for fields that are unknown here, and for known ones that only null is accepted for."""
ONE_WORD_FIELDS = frozenset({"temperature", "seed", "stop", "n", "tools", "messages", "prompt", "model", "logprobs"})
MAX_SHOWN_CHARS = 100
"""How much of a client's own field name goes into an error message."""


class ApiError(HTTPException):
    """A request that gets an error as its answer.

    An HTTPException, so that FastAPI lets it through from wherever it is raised.

    >>> ApiError(400, "temperature is -1; give 0 to 2", param="temperature")
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.message, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def context_length_error(num_prompt: int, max_tokens: int | None, max_len: int, param: str) -> ApiError:
    """The prompt, or the prompt and the asked answer (`max_tokens`), do not fit into `max_len` tokens."""
    asked = f"{num_prompt} tokens in the prompt"
    if max_tokens is not None:
        asked += f" and {max_tokens} for the answer make {num_prompt + max_tokens}"
    hint = "shorten the prompt" if max_tokens is None else "shorten the prompt or lower max_tokens"
    message = f"this model's context is {max_len} tokens, but {asked}; {hint}"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def server_error(request_id: str) -> ApiError:
    """A failure of ours. What failed stands in the server's log under the request's id, and only there."""
    return ApiError(500, f"the server failed on this request; its log has the cause under {request_id}")


def validation_error(problems: Sequence[Any], body: Any) -> ApiError:
    """The first of pydantic's problems with a request body, naming the field.

    Problems of union types come once for each member; the deepest is the one that the client most likely meant.
    """
    problem = max(problems, key=lambda each: (each["type"] == "extra_forbidden", len(_path(each, body))))
    kind, path = problem["type"], _path(problem, body)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json")
    if kind in UNSUPPORTED:
        message = f"{param} is not supported by this server; {UNSUPPORTED[kind]}"
        return ApiError(400, message, param=param, code="unsupported_field")
    if kind == "missing":
        message = f"{param} is required" if param else "the request has no body; send a JSON object"
        return ApiError(400, message, param=param, code="missing_field")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value") if param else value_error(message)


def value_error(message: str, param: str | None = None) -> ApiError:
    """A refused value. Where `param` is not known, messages of this project begin with the name of the field."""
    first = message.split(" ", 1)[0]
    named = first if first.replace("_", "").isalpha() and ("_" in first or first in ONE_WORD_FIELDS) else None
    return ApiError(400, message, param=param or named, code="invalid_value")


def _path(problem: Any, body: Any) -> list[str | int]:
    """The place in the body. pydantic also writes the chosen member of a union there, which is no key of the body."""
    location = list(problem["loc"][1:])
    path: list[str | int] = []
    here: Any = body
    for number, part in enumerate(location):
        known = part in here if isinstance(here, dict) else isinstance(part, int) and isinstance(here, list)
        if known and here is not None:
            here = here[part] if isinstance(here, dict) or part < len(here) else None
        if known or (problem["type"] == "missing" and number + 1 == len(location)):
            path.append(part[:MAX_SHOWN_CHARS] if isinstance(part, str) else part)
    return path
