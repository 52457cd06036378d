"""The terminal chat: scripted turns on a real model, and the command as a process."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwench import cli
from qwench.engine import Engine
from qwench.engine.chat import Chat, err
from qwench.types import SamplingParams


@pytest.fixture(scope="module")
def engine(parrot: Path) -> Engine:
    return Engine(parrot, device="cpu")


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def chat(engine: Engine, out: io.StringIO) -> Chat:
    return Chat(engine, SamplingParams(temperature=0, max_tokens=64), None, out)


@pytest.fixture
def script(monkeypatch, chat: Chat):
    """Run the loop on typed lines; a line may also be an exception to raise."""

    def run(*lines: str | type[BaseException]) -> int:
        typed = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)
        return chat.loop()

    return run


def roles(chat: Chat) -> list[str]:
    return [message.role for message in chat.messages]


def test_turns_follow_each_other(chat: Chat, script, out, dialogues) -> None:
    (first, first_answer), (second, _) = dialogues[0], dialogues[2]
    assert script(first, "", second) == 0
    assert out.getvalue().splitlines()[0] == first_answer
    assert roles(chat) == ["user", "assistant"] * 2
    assert chat.messages[0].content == first
    assert chat.messages[1].content == first_answer
    assert chat.messages[2].content == second
    assert out.getvalue() == "".join(m.content + "\n" for m in chat.messages if m.role == "assistant")


def test_commands(chat: Chat, script, out, dialogues, capsys) -> None:
    question, answer = dialogues[0]
    script(question, "/clear", question, "/retry", "/stats", "/what", "/quit", "never read")
    assert out.getvalue() == f"{answer}\n" * 3, "after /clear and with /retry the question is the first again"
    assert roles(chat) == ["user", "assistant"]
    assert chat.show_stats is False
    assert "/system TEXT" in capsys.readouterr().err


def test_system(chat: Chat, script, engine, monkeypatch) -> None:
    seen: list[list[str]] = []
    render = engine.tokenizer.render
    monkeypatch.setattr(
        type(engine.tokenizer),
        "render",
        lambda self, m, *a, **k: seen.append([x.role for x in m]) or render(m, *a, **k),
    )
    script("/system Be brief.", "hello", "/clear", "hello", "/retry")
    assert seen == [["system", "user"]] * 3
    assert chat.messages[0].content == "Be brief."


def test_retry_of_nothing(chat: Chat, script, out) -> None:
    assert script("/retry") == 0
    assert out.getvalue() == ""


def test_ctrl_c_stops_the_answer_only(chat: Chat, script, out, engine, dialogues, monkeypatch) -> None:
    question, answer = dialogues[0]
    stream = engine.stream

    def interrupted(prompt, params):
        for number, chunk in enumerate(stream(prompt, params)):
            if number == 4:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(engine, "stream", interrupted)
        assert script(KeyboardInterrupt, question) == 0
    part = chat.messages[-1].content
    assert chat.messages[-1].role == "assistant"
    assert 0 < len(part) < len(answer)
    assert answer.startswith(part)
    assert out.getvalue() == part + "\n"


def test_a_question_that_fails_is_not_kept(chat: Chat, script, engine, capsys, monkeypatch) -> None:
    monkeypatch.setattr(engine, "tokenizer", type(engine.tokenizer)(engine.tokenizer.vocabulary, chat_format=None))
    assert script("hello [bold]you[/bold]") == 0
    assert chat.messages == []
    assert "choose one by with_chat_format" in " ".join(capsys.readouterr().err.split())


def test_stats(chat: Chat, out, dialogues, capsys) -> None:
    chat.ask(dialogues[0][0])
    assert "tokens read, first answer after" in capsys.readouterr().err
    chat.show_stats = False
    chat.ask(dialogues[0][0])
    assert capsys.readouterr().err == ""
    assert err.stderr


def test_default_output_is_the_present_stdout(engine: Engine, dialogues, capsys) -> None:
    Chat(engine, SamplingParams(temperature=0), None).ask(dialogues[0][0])
    assert capsys.readouterr().out == dialogues[0][1] + "\n"


def test_prompts_on_the_command_line(parrot: Path, dialogues, capsys) -> None:
    greedy = ["--temperature", "0", "--repetition-penalty", "1", "--device", "cpu"]
    assert cli.main(["chat", str(parrot), *greedy, "--prompt", dialogues[0][0], "--prompt", "And now?"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(dialogues[0][1] + "\n")
    assert "loaded in" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0; give 0"),
        (["--max-tokens", "0"], "max_tokens is 0; give at least 1"),
        (["--device", "cuda:77"], "device cuda:77 is not there"),
    ],
)
def test_bad_options(arguments: list[str], message: str, parrot: Path, capsys) -> None:
    assert cli.main(["chat", str(parrot), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_such_model(tmp_path: Path, capsys) -> None:
    assert cli.main(["chat", str(tmp_path / "nothing")]) == 2
    assert "there is no model at" in capsys.readouterr().err


def test_process_with_piped_input(parrot: Path, dialogues) -> None:
    """stdout holds the answers and nothing else, so that it can be piped on."""
    command = [sys.executable, "-m", "qwench.cli", "chat", str(parrot), "--temperature", "0", "--device", "cpu"]
    text = f"{dialogues[1][0]}\n/clear\n{dialogues[0][0]}\n"
    done = subprocess.run(
        [*command, "--repetition-penalty", "1"], input=text.encode(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8") == f"{dialogues[1][1]}\n{dialogues[0][1]}\n"
    assert "tokens read" in done.stderr.decode()


def test_saved_end_tokens(parrot: Path) -> None:
    """A chat model ends with <|im_end|> and, as the published ones, with <|endoftext|>."""
    table = json.loads((parrot / "model/generation_config.json").read_text())
    names = {entry["content"]: int(key) for key, entry in added_tokens(parrot).items()}
    assert table["eos_token_id"] == [names["<|im_end|>"], names["<|endoftext|>"]]


def added_tokens(run: Path) -> dict[str, dict[str, object]]:
    return json.loads((run / "model/tokenizer_config.json").read_text())["added_tokens_decoder"]
