"""The run directory: records that survive crashes, recipes that changed, one process at a time."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwench import config
from qwench.run import Run, provenance, read_metrics, write_atomically


@config.config
class Section:
    size: int = 1


@config.config
class Recipe:
    out: Path = Path("x")
    resume: str = "auto"
    text: str = "a"
    section: Section = Section()
    unset: int | None = None


def began(path: Path, recipe: Recipe = Recipe(), *, records: int = 2) -> None:  # noqa: B008 - frozen
    with Run(path, recipe, "test") as run:
        for step in range(1, records + 1):
            run.record(step=step, loss=1.0 / step)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_contents(tmp_path: Path) -> None:
    began(tmp_path / "run", Recipe(text="[x]\n"))
    assert config.load(Recipe, [tmp_path / "run/config.toml"]) == Recipe(text="[x]\n")
    [first, second] = read_metrics(tmp_path / "run")
    assert (first["step"], first["loss"], second["loss"]) == (1, 1.0, 0.5)
    assert second["time"] >= first["time"] > 1.7e9


def test_record_reaches_the_file_at_once(tmp_path: Path) -> None:
    with Run(tmp_path, Recipe(), "test") as run:
        run.record(step=1)
        assert steps(tmp_path) == [1]


def test_odd_values(tmp_path: Path) -> None:
    """Line separators inside strings, characters of several bytes, numbers that JSON lacks."""
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng 日本 🙂"
    with Run(tmp_path, Recipe(), "test") as run:
        run.record(step=1, text=odd, loss=float("nan"), norm=float("inf"))
        run.record(step=2)
        run.forget_after(1)
        run.record(step=3)
    [first, second] = read_metrics(tmp_path)
    assert first["text"] == odd
    assert first["loss"] is first["norm"] is None
    assert second["step"] == 3


@pytest.mark.parametrize(
    "rest", [b'{"step": 3, "lo', b'{"step": 3, "text": "\xe6\x97', b"{", b"\x00\x00", b"\x00\xff\n", b'{"step": 3\n']
)
def test_half_a_line(rest: bytes, tmp_path: Path) -> None:
    """A crash in the middle of a record: readers leave it out, the next process writes a line of its own."""
    began(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    assert steps(tmp_path) == [1, 2]
    with Run(tmp_path, Recipe(), "test") as run:
        run.record(step=3)
    assert steps(tmp_path) == [1, 2, 3]


def test_forget_after(tmp_path: Path) -> None:
    began(tmp_path, records=5)
    with Run(tmp_path, Recipe(), "test") as run:
        run.record(step=5, val_loss=2.0)
        run.forget_after(5)
        assert steps(tmp_path) == [1, 2, 3, 4, 5, 5]
        run.forget_after(3)
        run.record(step=4, loss=0.0)
        assert steps(tmp_path) == [1, 2, 3, 4]
        run.forget_after(-1)
        assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (Recipe(text="b"), "text"),
        (Recipe(section=Section(size=2)), "section.size"),
        (Recipe(unset=1), "unset"),
        (Recipe(text="b", section=Section(size=2)), "section.size, text"),
    ],
)
def test_changed_recipe(changed: Recipe, names: str, tmp_path: Path) -> None:
    began(tmp_path)
    with pytest.raises(ValueError, match=rf"another recipe \(different: {names}\).*resume=force"):
        Run(tmp_path, changed, "test")
    assert config.load(Recipe, [tmp_path / "config.toml"]) == Recipe(), "a refusal changes nothing"
    with Run(tmp_path, changed, "test", "force"):
        pass
    assert config.load(Recipe, [tmp_path / "config.toml"]) == changed
    assert steps(tmp_path) == [1, 2]


def test_a_run_that_cannot_go_on_keeps_its_recipe(tmp_path: Path) -> None:
    began(tmp_path)
    before = (tmp_path / "config.toml").read_text()
    changed = Recipe(text="b")
    with pytest.raises(OSError, match="checkpoint"), Run(tmp_path, changed, "test", "force"):
        raise OSError("no checkpoint of this model")
    assert (tmp_path / "config.toml").read_text() == before
    with Run(tmp_path, changed, "test", "force") as run:
        assert (tmp_path / "config.toml").read_text() == before
        run.record(step=3)
        assert (tmp_path / "config.toml").read_text() != before
    assert config.read_toml(tmp_path / "config.toml")["text"] == "b"


def test_the_same_run_by_another_name(tmp_path: Path) -> None:
    """Another spelling of the directory's path, or of `resume`, is no change of the recipe."""
    began(tmp_path)
    with Run(tmp_path, Recipe(out=Path("elsewhere"), resume="force"), "test"):
        pass


def test_never(tmp_path: Path) -> None:
    began(tmp_path, records=0)
    with Run(tmp_path, Recipe(text="corrected"), "test", "never") as run:
        run.record(step=1)
    with pytest.raises(ValueError, match="already holds a run; give another out"):
        Run(tmp_path, Recipe(text="corrected"), "test", "never")


def test_checkpoints_make_a_run(tmp_path: Path) -> None:
    """Also without a record: nothing that was saved is given to another recipe."""
    began(tmp_path, records=0)
    (tmp_path / "checkpoints/step_000000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="different: text"):
        Run(tmp_path, Recipe(text="b"), "test")


def test_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from test_run import Recipe\n"
        "from qwench.run import Run\n"
        "run = Run(Path(sys.argv[1]), Recipe(), 'test'); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another process is working in"):
            Run(tmp_path, Recipe(), "test")
        other.kill()
    with Run(tmp_path, Recipe(), "test"), pytest.raises(ValueError, match="another process"):
        Run(tmp_path, Recipe(), "test")
    with Run(tmp_path, Recipe(), "test"):
        pass


def test_log(tmp_path: Path) -> None:
    run = Run(tmp_path, Recipe(), "test")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError(logging.getLogger("qwench.somewhere").info("told the log"))
    text = (tmp_path / "logs/run.log").read_text()
    assert "told the log" in text
    assert "ZeroDivisionError" in text
    assert not any(isinstance(h, logging.FileHandler) for h in logging.getLogger("qwench").handlers)
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Recipe(), "test"):
        raise KeyboardInterrupt
    assert "KeyboardInterrupt" not in (tmp_path / "logs/run.log").read_text()


def test_provenance(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qwench", "pretrain", "out=a b"])
    with Run(tmp_path, Recipe(), "test") as run:
        run.write_provenance(device="cpu")
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert facts["command"] == "qwench pretrain 'out=a b'"
    assert facts["device"] == "cpu"
    assert facts["packages"]["torch"]
    assert facts["machine"]["cores"] >= 1
    assert provenance().keys() <= facts.keys()


def test_write_atomically(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
