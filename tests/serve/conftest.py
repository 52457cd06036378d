"""A real server with a tiny untrained model on a free port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served import NAME, PATIENCE_S, Running, wait_until

from qwench.serve.app import create_app
from qwench.serve.limits import ServeConfig
from qwench.serve.params import SamplingDefaults
from qwench.serve.server import Server, bind, url_of

if TYPE_CHECKING:
    from qwench.engine import Engine


@pytest.fixture(scope="session")
def engine(tiny_model_dir: Path) -> Iterator[Engine]:
    from qwench.engine import Engine

    engine = Engine(tiny_model_dir, "cpu", "float32")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def start_server(engine: Engine) -> Iterator[Callable[..., Running]]:
    """Start a server of the tiny model or another engine; further keyword arguments are `ServeConfig`'s."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(*, served: Engine | None = None, defaults: SamplingDefaults | None = None, **settings: Any) -> Running:
        chosen: dict[str, Any] = {"model_names": (NAME,), "drain_timeout_s": 5.0} | settings
        server = Server(create_app(served or engine, ServeConfig(**chosen), defaults))
        bound = bind("127.0.0.1", 0)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
        started.append((server, thread))
        wait_until(lambda: server.started or not thread.is_alive(), "the server to start")
        assert server.started
        return Running(url_of(bound, "127.0.0.1"), served or engine, server)

    yield start
    for server, _ in started:
        server.drain()
    for _, thread in started:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a server did not stop"


@pytest.fixture(scope="session")
def running(start_server: Callable[..., Running]) -> Running:
    """The server of most tests: no keys, defaults of OpenAI."""
    return start_server()
