"""`qwench serve` as a process: it says where it is, drains when told to stop, and ends with code 0."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from served import NAME, PATIENCE_S, wait_until

from qwench.cli import main
from qwench.serve import command

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
START_S = 120.0
"""A fresh process imports torch and loads the model, beside whatever else the machine does."""


class Process:
    """A running `qwench serve`."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwench.cli", "serve", *arguments, "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"API (http://\S+)/v1", line):
                self.url = found[1]
                break
        assert self.url, f"it did not start: {self.process.stderr and self.process.stderr.read()}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def end(self) -> tuple[int, str]:
        """Exit code and what it wrote to stderr."""
        try:
            _, errors = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors


def stream_from(process: Process, key: str = "none") -> Any:
    """An answer that takes far longer than what the tests do meanwhile."""
    return process.client(key).chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
    )


@pytest.fixture
def serve(tiny_model_dir: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str, **environment: str) -> Process:
        started.append(Process([str(tiny_model_dir), *arguments], **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


def test_told_to_stop_it_lets_a_stream_finish(serve: Callable[..., Process]) -> None:
    process = serve("--drain-timeout", "60")
    stream = process.client().chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=300, stream=True, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = iter(stream)
    next(chunks)
    process.process.send_signal(signal.SIGTERM)
    refused: list[int] = []

    def ask_again() -> bool:
        try:
            refused.append(httpx.post(f"{process.url}/v1/completions", json={}, timeout=PATIENCE_S).status_code)
        except httpx.TransportError:
            return True
        return refused[-1] == 503

    wait_until(ask_again, "new requests to be refused")
    last = [*chunks][-1]
    assert last.usage is not None
    assert last.usage.completion_tokens == 300, "the running answer came whole"
    code, errors = process.end()
    assert code == 0, errors
    assert set(refused) <= {400, 503}, "before the signal arrives the empty body is a 400"
    assert "Traceback" not in errors


def test_keys_are_never_shown_and_a_drain_that_takes_too_long_ends_streams(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfile-secret\n\n")
    process = serve("--drain-timeout", "0.2", "--api-key-file", str(keys), QWENCH_API_KEYS="env-secret-1, env-secret-2")
    for key in ("file-secret", "env-secret-1", "env-secret-2"):
        assert process.client(key).models.list().data
    with pytest.raises(openai.AuthenticationError):
        process.client("wrong-secret").models.list()
    chunks = iter(stream_from(process, "file-secret"))
    next(chunks)
    process.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="stopping"):
        list(chunks)
    code, errors = process.end()
    assert code == 0, errors
    assert "Traceback" not in errors
    assert "/v1/models" in errors, "requests are logged"
    assert "secret" not in errors + "".join(process.lines)


def test_killed_in_the_middle_the_client_sees_a_clean_error(serve: Callable[..., Process]) -> None:
    process = serve()
    chunks = iter(stream_from(process))
    next(chunks)
    process.process.kill()
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        list(chunks)
    with pytest.raises(openai.APIConnectionError):
        process.client().models.list()


def test_a_second_signal_ends_it_at_once(serve: Callable[..., Process]) -> None:
    process = serve("--drain-timeout", "1000")
    chunks = iter(stream_from(process))
    next(chunks)
    process.process.send_signal(signal.SIGINT)
    assert process.process.stderr is not None
    assert any("stopping" in line for line in iter(process.process.stderr.readline, ""))
    process.process.send_signal(signal.SIGINT)
    code, errors = process.end()
    assert code == 0, errors


# ------------------------------------------------------------------------------------------- what needs no server
def test_help_and_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(SystemExit) as helped:
        main(["serve", "--help"])
    assert helped.value.code == 0
    assert "--drain-timeout" in capsys.readouterr().out
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "there is no model at" in capsys.readouterr().err
    assert main(["serve", str(tiny_model_dir), "max_seqqs=4"]) == 2
    assert "max_seqs" in capsys.readouterr().err
    assert main(["serve", str(tiny_model_dir), "--max-concurrent", "0"]) == 2
    assert "max_concurrent" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert main(["serve", str(tiny_model_dir), "--api-key-file", str(empty)]) == 2
    assert "holds no key" in capsys.readouterr().err
    assert main(["serve", str(tiny_model_dir), "--api-key", "two words"]) == 2
    assert "two words" not in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("fastapi", "a_package_that_is_not_there"))
    assert main(["serve", str(tiny_model_dir)]) == 2
    errors = capsys.readouterr().err
    assert "a_package_that_is_not_there" in errors
    assert "pip install 'qwench[serve]'" in errors


def test_a_taken_port_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny_model_dir), "--port", str(port)]) == 2
        assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_names_and_hosts(tmp_path: Path, tiny_model_dir: Path) -> None:
    assert command.name_of(str(tiny_model_dir)) == NAME
    (tmp_path / "some-model.gguf").touch()
    assert command.name_of(str(tmp_path / "some-model.gguf")) == "some-model"
    assert command.name_of("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert [command.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.com")] == [
        True, True, True, False, False
    ]  # fmt: skip
    assert command.allowed_hosts("0.0.0.0", None) == ()
    assert "localhost" in command.allowed_hosts("127.0.0.1", None)
    assert "chat.example" in command.allowed_hosts("127.0.0.1", ["Chat.Example"])
