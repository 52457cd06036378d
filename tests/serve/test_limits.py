"""Keys, sizes, times, how many at once, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from served import NAME, PATIENCE_S, Running, wait_until

from qwench.serve.limits import ServeConfig, key_digest
from qwench.types import Chunk, SamplingParams

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
ENDLESS: dict[str, Any] = {
    "model": NAME, "messages": MESSAGES, "temperature": 0, "ignore_eos": True, "max_tokens": 30_000
}  # fmt: skip
"""Takes far longer than what the tests below do meanwhile."""


def open_request(running: Running, body: dict[str, Any]) -> socket.socket:
    """A request sent by hand, so that the connection can be dropped at will."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    data = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def send_chunks(connection: socket.socket, count: int) -> None:
    for _ in range(count):
        connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")


# --------------------------------------------------------------------------------------------------------------- keys
@pytest.fixture(scope="module")
def locked(start_server: Callable[..., Running]) -> Running:
    return start_server(api_key_digests=(key_digest("key-one"), key_digest("key-two")))


def test_only_a_known_key_opens(locked: Running) -> None:
    for key in ("key-one", "key-two"):
        assert [model.id for model in locked.client(api_key=key).models.list()] == [NAME]
    for key in ("key", "key-one ", "KEY-ONE", "key-one,key-two", "x" * 5000):
        status = locked.get("/v1/models", {"authorization": f"Bearer {key}x"}).status_code
        assert status == 401
    with pytest.raises(openai.AuthenticationError) as caught:
        locked.client(api_key="wrong").chat.completions.create(model=NAME, messages=MESSAGES)
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("header", ["", "key-one", "Basic key-one", "Bearer", "Bearer wrong", "Bearer key-one key-two"])
def test_other_headers_do_not_open(locked: Running, header: str) -> None:
    response = locked.get("/metrics", {"authorization": header} if header else None)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_what_is_open_without_a_key(locked: Running) -> None:
    assert locked.get("/health").json() == {"status": "ok"}
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
        assert locked.get(path).status_code == 401
    assert locked.post("/health", {}).status_code == 401
    assert locked.post("/tokenize", {"prompt": "x"}).status_code == 401


def test_keys_are_not_kept_or_logged(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    locked.get("/v1/models", {"authorization": "Bearer key-one"})
    locked.get("/v1/models", {"authorization": "Bearer wrong-key"})
    wait_until(lambda: caplog.text.count("/v1/models") >= 2, "both lines of the log")
    assert "key-one" not in caplog.text
    assert "wrong-key" not in caplog.text
    assert "key-one" not in repr(locked.service.config)


# -------------------------------------------------------------------------------------------------------------- hosts
def test_a_foreign_name_is_refused(start_server: Callable[..., Running]) -> None:
    """What protects a server on this machine from pages whose name was made to lead to it."""
    server = start_server(allowed_hosts=("127.0.0.1", "localhost"))
    assert server.get("/health").status_code == 200
    assert server.get("/health", {"host": "localhost:1234"}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1]"):
        response = server.get("/health", {"host": host})
        assert response.status_code == 403
        assert "--allow-host" in response.json()["error"]["message"]


# -------------------------------------------------------------------------------------------------------------- sizes
@pytest.fixture(scope="module")
def narrow(start_server: Callable[..., Running]) -> Running:
    return start_server(max_body_bytes=2000, body_timeout_s=0.5, max_concurrent=3)


def test_a_large_body_is_refused_whole_or_in_chunks(narrow: Running) -> None:
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x" * 5000}]}).encode()

    def pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    for content in (body, pieces()):
        response = narrow.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "2000" in response.json()["error"]["message"]
    small = {"model": NAME, "messages": MESSAGES, "max_tokens": 2}
    assert narrow.post(CHAT, small).status_code == 200


def test_an_endless_body_is_cut_off(narrow: Running) -> None:
    """It never ends, so only the connection's end can end it; the server does not gather it meanwhile."""
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_chunks(connection, 100_000)


def test_a_body_that_does_not_arrive_is_a_408(narrow: Running) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.makefile("rb").readline().split()[1] == b"408"


# ------------------------------------------------------------------------------------------------------- how many
def test_too_many_answers_at_once_are_a_429(narrow: Running) -> None:
    connections = [open_request(narrow, ENDLESS | {"stream": True}) for _ in range(3)]
    try:
        wait_until(lambda: narrow.service.slots.in_use == 3, "three answers in the making")
        with pytest.raises(openai.RateLimitError) as caught:
            narrow.client().chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        assert narrow.get("/health").status_code == 200
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: narrow.service.slots.in_use == 0, "the slots to be free")
    assert narrow.client().chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2).choices


def test_more_answers_than_are_ever_allowed_are_a_400(narrow: Running) -> None:
    response = narrow.post(CHAT, {"model": NAME, "messages": MESSAGES, "n": 4})
    assert response.status_code == 400
    body = {"model": NAME, "prompt": ["a", "b"], "n": 2}
    assert narrow.post("/v1/completions", body).status_code == 400
    assert narrow.service.slots.in_use == 0


# --------------------------------------------------------------------------------------------------------- going away
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_the_engine(running: Running, stream: bool, n: int) -> None:
    wait_until(running.is_idle, "the engine to be idle before")
    connection = open_request(running, ENDLESS | {"stream": stream, "n": n, "temperature": 1.0})
    wait_until(lambda: running.engine.stats().num_running == n, "the answers to begin")
    if stream:
        assert b"200 OK" in connection.recv(100)
    connection.close()
    left = time.monotonic()
    wait_until(running.is_idle, "the engine to be idle")
    assert running.engine.stats().num_free_blocks == running.engine.stats().num_blocks
    print(f"idle {time.monotonic() - left:.3f} s after the client went away")


def test_a_client_that_leaves_an_async_stream(running: Running) -> None:
    async def leave() -> None:
        client = running.aclient()
        stream = await client.chat.completions.create(**_for_client(ENDLESS), stream=True)
        count = 0
        async for _ in stream:
            count += 1
            if count == 5:
                break
        await stream.close()
        await client.close()

    asyncio.run(leave())
    wait_until(running.is_idle, "the engine to be idle")


def _for_client(body: dict[str, Any]) -> dict[str, Any]:
    extra = {"ignore_eos": body["ignore_eos"]}
    return {name: value for name, value in body.items() if name not in extra} | {"extra_body": extra}


def test_others_do_not_notice(running: Running) -> None:
    prompt = running.engine.tokenizer.render(MESSAGES)
    want = running.engine.generate([prompt], SamplingParams(temperature=0, max_tokens=30))[0].text
    connections = [open_request(running, ENDLESS | {"stream": True}) for _ in range(4)]
    wait_until(lambda: running.service.slots.in_use == 4, "four answers in the making")
    stream = running.client().chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=30, stream=True
    )
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if number == 2:
            for connection in connections:
                connection.close()
    assert text == want
    wait_until(running.is_idle, "the engine to be idle")


def test_a_loop_that_is_behind_gets_the_rest_in_one_piece(running: Running) -> None:
    engine = running.engine
    prompt, params = engine.tokenizer.render(MESSAGES), SamplingParams(temperature=0, max_tokens=40, top_logprobs=2)
    want = engine.generate([prompt], params)[0]

    async def read_slowly() -> list[Chunk]:
        chunks: list[Chunk] = []
        async for chunk in engine.astream(prompt, params):
            chunks.append(chunk)
            wait_until(running.is_idle, "the answer to be complete")  # the loop stands still meanwhile
        return chunks

    chunks = asyncio.run(read_slowly())
    assert len(chunks) <= 2
    assert "".join(chunk.text for chunk in chunks) == want.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(want.token_ids)
    assert [logprob for chunk in chunks for logprob in chunk.logprobs] == pytest.approx(list(want.logprobs), abs=1e-4)
    assert sum(len(chunk.top_logprobs) for chunk in chunks) == len(want.token_ids)
    assert chunks[-1].completion is not None


# --------------------------------------------------------------------------------------------------------------- time
@pytest.fixture(scope="module")
def hasty(start_server: Callable[..., Running]) -> Running:
    return start_server(request_timeout_s=0.3)


def test_a_request_that_takes_too_long_is_a_504(hasty: Running) -> None:
    response = hasty.post(CHAT, ENDLESS)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    wait_until(hasty.is_idle, "the engine to be idle")


def test_a_stream_that_takes_too_long_ends_with_an_error(hasty: Running) -> None:
    with pytest.raises(openai.APIError) as caught:
        for _ in hasty.client().chat.completions.create(**_for_client(ENDLESS), stream=True):
            pass
    assert "longer than this server allows" in caught.value.message
    assert caught.value.code == "timeout"
    wait_until(hasty.is_idle, "the engine to be idle")
    last = hasty.post(CHAT, ENDLESS | {"stream": True}).text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "wrong", [{"model_names": ()}, {"max_concurrent": 0}, {"request_timeout_s": 0}, {"drain_timeout_s": -1}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"model_names": ("a",)} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeConfig(**settings)
