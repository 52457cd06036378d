"""A real Chromium before a real server, whose tiny model has learnt to say Markdown with an attack in it.

The page under test is the one that the server sends, with its Content-Security-Policy. `PageServer.open` watches every
page: an error in a script, a violated policy or a request to another host fails the test that caused it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from page_driver import ATTACKS, LESSONS, NAME, ChatPage, PageServer, Watched
from served import PATIENCE_S, wait_until

from qwench.serve.app import create_app
from qwench.serve.limits import ServeConfig
from qwench.serve.params import SamplingDefaults
from qwench.serve.server import Server, bind, url_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from qwench.engine import Engine

SHAPE = (
    "{hidden_size = 64, intermediate_size = 96, num_hidden_layers = 2, num_attention_heads = 4, "
    "num_key_value_heads = 2, tie_word_embeddings = true}"
)


@pytest.fixture(scope="session")
def talker(sft_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose model knows `LESSONS` by heart (some seconds of training)."""
    from qwench import config
    from qwench.engine import Engine
    from qwench.train.config import SFTConfig
    from qwench.train.sft import sft

    directory = tmp_path_factory.mktemp("talker")
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in LESSONS]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (directory / "lessons.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    further = (
        f'train_data=["{directory / "lessons.jsonl"}"]', f"model.config={SHAPE}", "seq_len=512", "loop.steps=150",
        "loop.batch_rows=1", "optim.lr=1e-2", "schedule.min_ratio=0.1",
    )  # fmt: skip
    result = sft(config.load(SFTConfig, sft_arguments(directory / "run", *further)))
    assert result.train_loss < 0.05, "the talker has not learnt its lines"
    engine = Engine(directory / "run", "cpu", "float32")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def serve_page(talker: Engine) -> Iterator[Callable[..., PageServer]]:
    """Starts a server of the talker, greedy by default; keyword arguments are `ServeConfig`'s, and `port`."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(*, port: int = 0, **settings: Any) -> PageServer:
        config = ServeConfig(**({"model_names": (NAME,), "drain_timeout_s": 0.2} | settings))
        server = Server(create_app(talker, config, SamplingDefaults(temperature=0.0)))
        bound = bind("127.0.0.1", port)
        url = url_of(bound, "127.0.0.1")
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
        started.append((server, thread))
        wait_until(lambda: server.started or not thread.is_alive(), "the server to start")
        return PageServer(url, bound.getsockname()[1], server, thread)

    yield start
    for server, _ in started:
        server.drain()
    for _, thread in started:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a server did not stop"


@pytest.fixture(scope="session")
def page_server(serve_page: Callable[..., PageServer]) -> PageServer:
    """The server of most tests."""
    return serve_page()


@pytest.fixture(scope="module")  # playwright keeps an event loop running in this thread while it lives
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found[0], args=["--no-sandbox", "--disable-smooth-scrolling"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., ChatPage]]:
    """Opens a server's page in a fresh browser profile and watches it; keyword arguments are Playwright's."""
    watched: list[Watched] = []

    def open_one(server: PageServer, **options: Any) -> ChatPage:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}, "locale": "en-US"} | options))
        context.set_default_timeout(PATIENCE_S * 1000)
        watch = Watched(context, server.url)
        watched.append(watch)
        return ChatPage(context.new_page(), server.url)

    yield open_one
    for watch in watched:
        watch.close()
    for watch in watched:
        assert watch.problems == []


@pytest.fixture
def chat(open_page: Callable[..., ChatPage], page_server: PageServer) -> ChatPage:
    """The page on a desktop screen, in English."""
    return open_page(page_server)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`attack` is each text that would do harm if a page took it for HTML."""
    if "attack" in metafunc.fixturenames:
        metafunc.parametrize("attack", ATTACKS)
