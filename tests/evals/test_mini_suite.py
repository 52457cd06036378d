"""The mini-suite: a fixed sample, the same at every call, beside training that does not notice it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qwench import cli, config
from qwench.run import read_metrics
from qwench.train import report as train_report
from qwench.train.config import PretrainConfig
from qwench.train.pretrain import pretrain

pytest.importorskip("lm_eval")

from qwench.engine import Engine
from qwench.evals import mini
from qwench.evals.mini import SUITE, MiniTask, mini_suite

if TYPE_CHECKING:
    from qwench.model.decoder import CausalLM
    from qwench.tokenizer import Tokenizer

QUICK = [entry for entry in SUITE if entry.name in ("bits_per_byte", "hellaswag", "arc_easy")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    (root / "wikitext2_valid.txt").write_text(
        " = Title = \n\n" + "The quick brown fox jumps over it. \n" * 40, encoding="utf-8"
    )
    (root / "icl").mkdir()
    rows = [
        {"query": f"Question: What is {n}?\nAnswer:", "choices": ["one", "two", "three", "four"], "gold": n % 4}
        for n in range(6)
    ]
    (root / "icl" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def test_scores_are_the_same_at_every_call_and_the_caller_s_random_numbers_go_on(
    tiny_model: CausalLM, tiny_tokenizer: Tokenizer, data: Path
) -> None:
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    with Engine(tiny_model, tokenizer=tiny_tokenizer) as engine:
        first = mini_suite(engine, [data], suite=QUICK)
        assert (random.random(), np.random.random()) == expected  # noqa: NPY002
        second = mini_suite(engine, [data], suite=QUICK)
    assert first.keys() == {"bits_per_byte", "arc_easy", "seconds"}, "what has no files is left out"
    first.pop("seconds")
    second.pop("seconds")
    assert first == second
    assert first["bits_per_byte"] > 1
    assert first["arc_easy"] in [n / 6 for n in range(7)]


def test_what_does_not_finish_in_time_has_no_score(
    tiny_model: CausalLM, tiny_tokenizer: Tokenizer, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(tiny_model, tokenizer=tiny_tokenizer) as engine, caplog.at_level(logging.WARNING, "qwench.evals"):
        found = mini_suite(engine, [data], seconds=1e-9, suite=QUICK)
        assert found.keys() == {"seconds"}
        assert "too short for: bits_per_byte, hellaswag, arc_easy" in caplog.text
        assert "arc_easy" in mini_suite(engine, [data], suite=QUICK[2:]), "the engine works on"


def test_without_any_files_it_says_which(tiny_model: CausalLM, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    suite = [MiniTask(name="hellaswag", task="hellaswag", documents=3)]
    with (
        Engine(tiny_model, tokenizer=tiny_tokenizer) as engine,
        pytest.raises(ValueError, match="no task of the mini-suite"),
    ):
        mini_suite(engine, [tmp_path], suite=suite)


def test_training_records_it_and_does_not_notice_it(
    pretrain_arguments: Callable[..., list[str]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "SUITE", QUICK)
    steps = ("loop.steps=4", "schedule.warmup_steps=1", "checkpoint.every_steps=4")
    with_it = pretrain_arguments(tmp_path / "with", *steps, f'mini.data_dirs=["{data}"]', "mini.every=4")
    without = pretrain_arguments(tmp_path / "without", *steps)
    for arguments in (with_it, without):
        pretrain(config.load(PretrainConfig, arguments))
    losses = {}
    for name in ("with", "without"):
        losses[name] = [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name) if "loss" in r]
    assert losses["with"] == losses["without"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    scores = {record["step"]: record["mini"] for record in read_metrics(tmp_path / "with") if "mini" in record}
    assert list(scores) == [0, 4]
    assert scores[0]["bits_per_byte"] > scores[4]["bits_per_byte"]
    assert "Mini-suite" in train_report.write_report(tmp_path / "with").read_text(encoding="utf-8")
    assert "Mini-suite" not in train_report.write_report(tmp_path / "without").read_text(encoding="utf-8")
    with Engine(tmp_path / "with", "cpu", "float32") as engine:
        after = mini_suite(engine, [data])
    assert after["bits_per_byte"] == pytest.approx(scores[4]["bits_per_byte"], rel=1e-5)
    assert after["arc_easy"] == scores[4]["arc_easy"]


def test_mistakes_stop_a_run_before_its_first_step(
    pretrain_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("loop.steps=2", "schedule.warmup_steps=1", "mini.every=1")

    def message(*further: str) -> str:
        assert cli.main(["pretrain", *pretrain_arguments(tmp_path / "run", *steps, *further)]) == 2
        return capsys.readouterr().err

    assert "not module:function" in message("mini.call=qwench.mini:nothing")
    assert "it has no colon" in message("mini.call=qwench.mini")
    assert "mend it, or set mini.every=0" in message(f'mini.data_dirs=["{tmp_path / "none"}"]')
    assert not any("loss" in record for record in read_metrics(tmp_path / "run"))
