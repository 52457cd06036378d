"""The application: which route calls what. No engine is made here and no socket opened; see command.py."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteHTTPException

from qwench import __version__
from qwench.engine import Engine
from qwench.serve.chat import chat_completions
from qwench.serve.completions import completions
from qwench.serve.errors import ApiError, validation_error
from qwench.serve.limits import LIFE, Guard, ServeConfig, Slots, Traffic
from qwench.serve.metrics import Metrics
from qwench.serve.params import SamplingDefaults, known_model
from qwench.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from qwench.serve.service import Service
from qwench.serve.tokens import detokenize, tokenize

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    # The page runs only what this server sends and talks only to this server, whatever a model writes into it.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asks each time whether the file has changed, so an upgrade shows at once
}


MAX_KEYS = 20_000
SMALL_BODY_BYTES = 64 * 1024
"""Bodies up to this size cannot have so many keys that it matters."""


class StrictJsonRequest(Request):
    """Reads JSON as its standard has it: no NaN, no lone surrogates, no nesting that exhausts the stack.

    Bodies with very many keys are refused: every unknown one would be an error of its own, and a million of those
    fill the memory.
    """

    async def json(self) -> Any:
        body = await self.body()
        try:
            value = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
        if len(body) > SMALL_BODY_BYTES and num_keys(value, MAX_KEYS) > MAX_KEYS:
            raise ApiError(400, f"the body has more than {MAX_KEYS} keys in its objects", code="invalid_value")
        return value


def num_keys(value: Any, enough: int) -> int:
    """Keys of all objects in a JSON value; counting stops soon after `enough`."""
    count, rest = 0, [value]
    while rest and count <= enough:
        each = rest.pop()
        if isinstance(each, dict):
            count += len(each)
            each = each.values()
        if not isinstance(each, (str, int, float, bool, type(None))):
            rest += [item for item in each if type(item) in (dict, list)]
    return count


class StrictJsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict


def create_app(engine: Engine, config: ServeConfig, defaults: SamplingDefaults | None = None) -> FastAPI:
    """An ASGI application that answers from `engine`. `defaults` say how to sample where a request does not.

    `app.state.service` is its `Service`. Closing the engine is the caller's task.
    """
    service = Service(
        engine=engine,
        config=config,
        defaults=defaults or SamplingDefaults(),
        metrics=Metrics(engine.stats),
        slots=Slots(config.max_concurrent),
        traffic=Traffic(),
    )
    # /openapi.json, but no /docs: that page loads its code from other hosts.
    app = FastAPI(title="qwench", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.router.route_class = StrictJsonRoute
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    _add_routes(app, service)
    public = frozenset({"/health", *_add_pages(app)})
    app.add_middleware(Guard, config=config, metrics=service.metrics, traffic=service.traffic, public_paths=public)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    config = service.config

    @app.post("/v1/chat/completions")
    async def post_chat(request: Request, body: ChatRequest) -> Response:
        return await chat_completions(service, body, request.scope[LIFE])

    @app.post("/v1/completions")
    async def post_completions(request: Request, body: CompletionRequest) -> Response:
        return await completions(service, body, request.scope[LIFE])

    @app.post("/tokenize")
    async def post_tokenize(body: TokenizeRequest) -> Response:
        return await tokenize(service, body)

    @app.post("/detokenize")
    async def post_detokenize(body: DetokenizeRequest) -> Response:
        return await detokenize(service, body)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_body(service, name) for name in config.model_names]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        return JSONResponse(_model_body(service, known_model(name, config.model_names)))

    @app.get("/health")
    async def health() -> Response:
        if service.traffic.draining:
            return JSONResponse({"status": "draining"}, 503)
        if service.engine.failure is not None:  # no request is to blame, and only a new process helps
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model_body(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, and what a client may want to know of the model."""
    defaults = service.defaults
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwench",
        "max_model_len": service.engine.max_len,
        "sampling_defaults": {field: getattr(defaults, field) for field in SamplingDefaults.__dataclass_fields__},
    }


def _add_pages(app: FastAPI) -> list[str]:
    """A route for each file of the chat page, and / for the page itself. Returns their paths."""
    paths = []
    for file in sorted(STATIC.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        relative = file.relative_to(STATIC).as_posix()
        path = "/" if relative == "index.html" else f"/{relative}"
        app.add_api_route(path, _page(file), methods=["GET", "HEAD"])
        paths.append(path)
    return paths


def _page(file: Path) -> Callable[[], Coroutine[Any, Any, Response]]:
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"

    async def page() -> Response:
        return FileResponse(file, media_type=kind, headers=PAGE_HEADERS)

    return page


# ------------------------------------------------------------------------------------------------------------- errors
async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors(), error.body).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if isinstance(error, ApiError):
        return error.response()
    path = request.scope["path"][:200]
    messages = {
        404: f"there is nothing at {request.method} {path}; docs/serving.md lists the routes",
        405: f"{path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()
