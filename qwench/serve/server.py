"""uvicorn with a way out: told to stop, it turns new requests away, lets running ones finish, and ends with code 0."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:  # so that a taken port is known before PyTorch is loaded
    from fastapi import FastAPI

    from qwench.serve.service import Service

LAST_EVENTS_S = 3.0
"""For the last words of requests that were ended because the time to drain is over."""


class Server(uvicorn.Server):
    """One server process. The first SIGTERM or SIGINT drains it, the second one ends it at once."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] | None = None) -> None:
        settings = uvicorn.Config(
            app,
            # Named, so that what else is installed changes nothing. h11 also bounds the size of headers.
            http="h11",
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=int(LAST_EVENTS_S),
        )
        super().__init__(settings)
        self.service: Service = app.state.service
        self.on_ready = on_ready
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_ready is not None:
            self.on_ready()

    def drain(self) -> None:
        """Begin to stop; called from a signal or from another thread."""
        self.service.traffic.draining = True
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.service.config.drain_timeout_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again at the end, and the process would not end with code 0.
        if self._stop_at is not None:
            self.should_exit = self.force_exit = True
            return
        self.drain()
        running = len(self.service.traffic.lives)
        seconds = self.service.config.drain_timeout_s
        if running:
            message = f"qwench serve: stopping; {running} running requests have {seconds:g} s (again: stop now)"
            print(message, file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true ends the server."""
        if self._stop_at is not None:
            traffic = self.service.traffic
            if not traffic.lives:
                return True
            if time.monotonic() >= self._stop_at:
                traffic.end_all()
                return time.monotonic() >= self._stop_at + LAST_EVENTS_S
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, port 0 for any free one. Raises ValueError naming an address that cannot be had.

    It does not listen yet, so clients are refused and not kept waiting while the model is loaded.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"{host} is no address of this machine ({error}); try --host 127.0.0.1") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(f"cannot listen at {host}:{port} ({error.strerror}); choose another --port") from None
    return found


def url_of(bound: socket.socket, host: str) -> str:
    """The address as a browser on this machine takes it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{bound.getsockname()[1]}" if ":" in shown else f"http://{shown}:{bound.getsockname()[1]}"
