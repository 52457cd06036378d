"""What stands between the network and the routes: keys, sizes, times, how many at once, and the way out.

`Guard` is plain ASGI, so that streams pass through it piece by piece. Every request has one `Life`, and whatever ends
it early (its time is up, the client went away, the server stops) goes through `Life.end`, which cancels the work; the
engine then frees the request's cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwench.serve.errors import ApiError, server_error
from qwench.serve.metrics import Metrics

log = logging.getLogger("qwench.serve")

Reason = Literal["timeout", "disconnect", "drain"]
LIFE = "qwench.life"
"""Key of the request's `Life` in the ASGI scope."""
CLIENT_CLOSED = 499
"""Status in log and metrics of a request whose client went away before the answer began."""
LAST_WORD_S = 5.0
"""How long a client that does not read may hold up the error at the end of its stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What the server itself allows; what the model and the engine do is set on the engine."""

    model_names: tuple[str, ...]
    """Names that requests may give as `model`, the first one is the one that answers carry."""
    api_key_digests: tuple[bytes, ...] = ()
    """SHA-256 of every accepted key, see `key_digest`; empty: no key is needed."""
    allowed_hosts: tuple[str, ...] = ()
    """Accepted names in the Host header, without port; empty: any."""
    max_concurrent: int = 256
    """Answers in the making at once, over all requests."""
    max_body_bytes: int = 16 * 2**20
    body_timeout_s: float = 60.0
    """For the arrival of a request's body."""
    request_timeout_s: float = 600.0
    """For a request as a whole."""
    drain_timeout_s: float = 30.0
    """How long running requests may go on after the server was told to stop."""

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("model_names is empty; give at least one name")
        for name in ("max_concurrent", "max_body_bytes", "body_timeout_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.drain_timeout_s >= 0:
            raise ValueError(f"drain_timeout_s is {self.drain_timeout_s}; give 0 or a positive number")


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Life:
    """One request from its first byte to its last: its id, its clock, and what is given back at its end."""

    def __init__(self, timeout_s: float) -> None:
        self.id = f"req_{uuid.uuid4().hex}"
        self.started = time.monotonic()
        self.timer = asyncio.timeout(timeout_s)
        self.stack = ExitStack()
        """Closed when the answers are made, or else when the request is over, whatever its end."""
        self.reason: Reason | None = None
        self.gone = asyncio.Event()
        self.status, self.streaming, self.finished = 0, False, False

    def end(self, reason: Reason) -> None:
        """Cancel the request's work, now."""
        if self.finished or self.reason is not None or self.timer.expired():
            return
        self.reason = reason
        self.gone.set()
        self.timer.reschedule(0)

    def error(self) -> ApiError:
        """What the client is told when the request did not come to its own end."""
        if self.reason == "drain":
            return ApiError(503, "the server is stopping; send the request again", headers={"retry-after": "5"})
        return ApiError(504, "the request took longer than this server allows; ask for fewer tokens", code="timeout")


class Slots:
    """Counts the answers in the making."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_use = limit, 0

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold `count` of them. Raises ApiError 400 if that is more than there are, 429 if they are taken."""
        if count > self.limit:
            raise ApiError(400, f"the request asks for {count} answers at once; this server allows {self.limit}")
        if self.in_use + count > self.limit:
            message = f"{self.in_use} answers are in the making and this server allows {self.limit}; try again soon"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self.in_use += count
        try:
            yield
        finally:
            self.in_use -= count


class Traffic:
    """The requests in flight, and whether new ones are let in."""

    def __init__(self) -> None:
        self.lives: set[Life] = set()
        self.draining = False

    def end_all(self) -> None:
        """End every running request because the server stops."""
        for life in list(self.lives):
            life.end("drain")


class Guard:
    """The outermost layer of the application."""

    def __init__(
        self, app: ASGIApp, config: ServeConfig, metrics: Metrics, traffic: Traffic, public_paths: frozenset[str]
    ) -> None:
        """`public_paths` need no key: GET requests for the page and the health check."""
        self.app, self.config, self.metrics, self.public_paths = app, config, metrics, public_paths
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        life = scope[LIFE] = Life(self.config.request_timeout_s)
        reply = _Reply(life, send)
        self.traffic.lives.add(life)
        try:
            with life.stack:
                await self._live(scope, receive, reply, life)
        except TimeoutError:
            if not life.timer.expired():
                raise
            if life.reason != "disconnect":
                await reply.last_word(scope, life.error())
        except ApiError as error:
            await reply.last_word(scope, error)
        except Exception:
            log.exception("%s failed", life.id)
            await reply.last_word(scope, server_error(life.id))
        finally:
            self.traffic.lives.discard(life)
            self._note(scope, life)

    async def _live(self, scope: Scope, receive: Receive, reply: _Reply, life: Life) -> None:
        async with life.timer:
            self._admit(scope)
            body = await self._read(scope, receive)
            watcher = asyncio.create_task(_watch(receive, life))
            try:
                await self.app(scope, _replay(body, life), reply)
            finally:
                watcher.cancel()

    def _admit(self, scope: Scope) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        if self.config.allowed_hosts and (host := _host(headers)) not in self.config.allowed_hosts:
            raise ApiError(403, f"this server does not go by the name {host[:100]!r}; start it with --allow-host NAME")
        if scope["method"] in ("GET", "HEAD") and path in self.public_paths:
            return
        if self.traffic.draining:
            # Closing the connection sends the client's next request to a fresh one, and so to another server.
            headers_out = {"retry-after": "5", "connection": "close"}
            raise ApiError(503, "the server is stopping; send the request again", headers=headers_out)
        if self.config.api_key_digests:
            self._check_key(headers.get(b"authorization", b""))
        if scope["method"] == "POST" and not _is_json(headers.get(b"content-type", b"")):
            # Also what keeps other sites' pages from posting here: browsers ask before they send this type.
            raise ApiError(415, "send the body as JSON, with the header content-type: application/json")

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # Every digest is compared, each in constant time, so the time tells nothing about the keys.
        matches = [hmac.compare_digest(given, digest) for digest in self.config.api_key_digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "no valid API key came with the request; send the header authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, bounded in size and time."""
        limit = self.config.max_body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        clock = asyncio.timeout(self.config.body_timeout_s)
        try:
            async with clock:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_CLOSED, "the client went away while it sent the request")
                    more = message.get("more_body", False)
                    size += len(message.get("body", b""))
                    if size <= limit:
                        parts.append(message.get("body", b""))
                    elif size > 4 * limit:
                        break  # until here the rest is read and dropped, so that the client gets to read the error
                    else:
                        parts.clear()
        except TimeoutError:
            if not clock.expired():
                raise
            raise ApiError(408, "the body did not arrive in time", headers={"connection": "close"}) from None
        if size > limit:
            message = f"the body is larger than the {limit} bytes that this server takes"
            raise ApiError(413, message, code="request_too_large", headers={"connection": "close"})
        return b"".join(parts)

    def _note(self, scope: Scope, life: Life) -> None:
        seconds = time.monotonic() - life.started
        route = getattr(scope.get("route"), "path", None) or "none"
        gone = life.reason == "disconnect" and not life.finished
        status = life.status or CLIENT_CLOSED
        self.metrics.request_done(route, scope["method"], CLIENT_CLOSED if gone else status, seconds)
        shown = json.dumps(scope["path"][:200])  # quoted, so that no path can forge a line of the log
        end = f" ({life.reason})" if life.reason else ""
        log.info("%s %s %d%s %.3f s %s", scope["method"], shown, status, end, seconds, life.id)


class _Reply:
    """`send` with the headers that every answer has, and a memory of how far the answer got."""

    def __init__(self, life: Life, send: Send) -> None:
        self.life, self.send = life, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            life = self.life
            life.status = message["status"]
            life.streaming = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
            if not life.streaming:
                life.stack.close()  # before the answer, so that a client that asks again at once finds its place free
            headers += [(b"x-request-id", life.id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.life.finished = True
        await self.send(message)

    async def last_word(self, scope: Scope, error: ApiError) -> None:
        """The error as the answer, or as the last event of a stream that has begun."""
        if self.life.finished or error.status_code == CLIENT_CLOSED:
            return
        try:
            async with asyncio.timeout(LAST_WORD_S):
                if not self.life.status:
                    await error.response()(scope, _nothing, self)
                elif self.life.streaming:
                    await self({"type": "http.response.body", "body": sse(error.body()), "more_body": False})
        except TimeoutError:
            log.warning("%s: the client does not read its answer; the connection is dropped", self.life.id)


def sse(data: MutableMapping[str, Any]) -> bytes:
    """One server-sent event. In ASCII, since some clients take U+2028 and its like inside a line for its end."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _watch(receive: Receive, life: Life) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    life.end("disconnect")


def _replay(body: bytes, life: Life) -> Receive:
    parts = [body]

    async def receive() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        await life.gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _host(headers: dict[bytes, bytes]) -> str:
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _is_json(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() == b"application/json"
