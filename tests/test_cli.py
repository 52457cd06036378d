"""The command line from outside: speed of help, exit codes, messages."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from qwench import __version__, cli

QWENCH = [str(Path(sys.executable).parent / "qwench")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*QWENCH, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_is_fast() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert statistics.median(times) < 0.3, f"{times}; does something heavy get imported?"
    for name, command in cli.COMMANDS.items():
        assert (f"  {name} " in done.stdout) == bool(command.help)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"], ["--help"]])
def test_usage(arguments: list[str], capsys) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: qwench COMMAND")


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwench {__version__}\n"


def test_every_command_exists() -> None:
    for command in cli.COMMANDS.values():
        assert callable(cli.load_function(command.main)), command.main


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "config"])
def test_every_command_has_help(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: qwench {name}")
    assert len(out.splitlines()) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "there is no command 'pretrian'; did you mean 'pretrain'?"),
        (["tokeniser"], "did you mean 'tokenizer'?"),
        (["xyzzy"], "there is no command 'xyzzy'; qwench --help lists them"),
        (["--frobnicate"], "there is no command '--frobnicate'"),
        (["pretrain", "loop.stepz=3"], "unknown key 'loop.stepz'; did you mean 'loop.steps'?"),
        (["sft", "lr=3"], "unknown key 'lr'; did you mean 'optim.lr'?"),
        (["pretrain", "out=x"], "key 'loop' is required"),
        (["pretrain", "nowhere.toml"], "no recipe file 'nowhere.toml'"),
        (["config", "show", "nothing"], "usage: qwench config show {pretrain,sft"),
        (["config"], None),
    ],
)
def test_mistakes(arguments: list[str], message: str | None, capsys) -> None:
    assert cli.main(arguments) == (0 if message is None else 2)
    captured = capsys.readouterr()
    assert (message or "") in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["pretrain"], ["doctor", "--what"], ["chat"]])
def test_argparse_mistakes(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert f"usage: qwench {arguments[0]}" in capsys.readouterr().err


def test_exit_code_of_a_process(tmp_path: Path) -> None:
    done = run("pretrain", "loop.steps=3", "nowhere.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("qwench: no recipe file 'nowhere.toml'")
    assert done.stdout == ""
    traced = subprocess.run(
        [*QWENCH, "pretrain", "nowhere.toml"],
        capture_output=True, text=True, env=os.environ | {"QWENCH_DEBUG": "1"}, check=False,
    )  # fmt: skip
    assert "Traceback" in traced.stderr
    assert traced.returncode == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (ValueError("one sentence"), 2, "qwench: one sentence"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 2, "No such file or directory: /x"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk is full while writing /x"),
        (OSError(28, "No space left on device"), 2, "the disk is full; what was saved before is intact"),
        (ImportError("no module zstandard; pip install qwench[data]"), 2, "pip install qwench[data]"),
        (ValueError(), 2, "qwench: ValueError"),
    ],
)
def test_exit_codes(error: BaseException, code: int, message: str, monkeypatch, capsys) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "load_function", lambda path: fail)
    assert cli.main(["doctor"]) == code
    assert message in capsys.readouterr().err


def test_bugs_are_not_hidden(monkeypatch) -> None:
    def fail(argv: list[str]) -> int:
        raise AssertionError("our own bug")

    monkeypatch.setattr(cli, "load_function", lambda path: fail)
    with pytest.raises(AssertionError):
        cli.main(["doctor"])


@pytest.mark.parametrize("stage", cli.SCHEMAS)
def test_config_show(stage: str, capsys) -> None:
    assert cli.main(["config", "show", stage]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)
    assert out.count("#") > 5


def test_reader_that_goes_away() -> None:
    """`qwench config show model | head -n 1` is no crash."""
    process = subprocess.Popen(
        [*QWENCH, "config", "show", "model"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 2
    assert err == "qwench: the reader of the output went away\n"


def test_doctor(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("processor", "TFLOP/s measured", "training precision (auto)", "ops.attention", "torch", __version__):
        assert words in out


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch, capsys) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert cli.main(["config", "show", "model"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert cli.main(["config", "show", "model"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "7"
