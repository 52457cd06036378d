"""What tests of the server hold in their hands: a running server, clients for it, and patience."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import openai

from qwench.engine import Engine
from qwench.serve.server import Server
from qwench.serve.service import Service

NAME = "tiny"
PATIENCE_S = 30.0
"""How long to wait for what must come; far longer than it takes."""


@dataclass(frozen=True)
class Running:
    """A server and clients for it."""

    url: str
    engine: Engine
    server: Server

    @property
    def service(self) -> Service:
        return self.server.service

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))

    def aclient(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))

    def post(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """A request as no client library would send it."""
        if body is not None:
            more["json"] = body
        return httpx.post(self.url + path, headers=headers, timeout=PATIENCE_S, **more)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=PATIENCE_S)

    def is_idle(self) -> bool:
        """Whether nothing runs any more, in the server and in the engine."""
        stats = self.engine.stats()
        running = stats.num_running + stats.num_waiting + self.service.slots.in_use
        return running == 0 and stats.num_free_blocks == stats.num_blocks


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)
