"""`qwench mixture`: real proxies on a small mixture, resumed, and what is proposed from them."""

import json
import random
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from qwench import cli, config
from qwench.data.mixture import MixtureConfig, plan_mixture, write_mixture
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.shards import ShardWriter
from qwench.tokenizer import Tokenizer
from qwench.train.mixture_proxy import MixtureProxyConfig, propose


@pytest.fixture(scope="module")
def mixture(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of 20,000 tokens each whose documents have nothing in common; nine tenths are read of the first."""
    out = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = {"letters": ["able", "bird", "cold", "dawn"], "numbers": ["1", "22", "333", "4444"]}
    available = {}
    for group, vocabulary in words.items():
        with ShardWriter(
            out / group, tokenizer_fingerprint=tiny_tokenizer.fingerprint, vocab_size=tiny_tokenizer.vocab_size
        ) as writer:
            while writer.num_tokens < 20_000:
                text = " ".join(rng.choice(vocabulary) for _ in range(60))
                writer.add(np.array([*tiny_tokenizer.encode(text), tiny_tokenizer.eod_id]))
        available[group] = writer.num_tokens
    plan = plan_mixture(available, MixtureConfig(shares={"letters": 0.9, "numbers": 0.1}, tokens=20_000))
    write_mixture(out, plan, {group: group for group in words}, {"by": ["kind"]})
    return out


def arguments(out: Path, mixture: Path, tokenizer: Path, *further: str) -> list[str]:
    shape = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1"
    return [
        f"out={out}", f"data={mixture}", f"tokenizer={tokenizer}", "runs=4", "seq_len=32", "val_tokens=1000",
        f"model.config={{{shape}}}", "loop.steps=12", "loop.batch_rows=4", "loop.device=cpu", "optim.lr=0.01",
        "concentration=3", "min_share=0.05", *further,
    ]  # fmt: skip


def test_the_neglected_group_gets_more_and_nothing_is_trained_twice(
    mixture: Path, tiny_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, mixture, tiny_tokenizer_dir, "loss_weights.numbers=1")
    assert cli.main(["mixture", *given]) == 0
    out = capsys.readouterr().out
    table = json.loads((tmp_path / "proposal.json").read_text())
    assert table["groups"] == ["letters", "numbers"]
    tried = np.array([run["shares"] for run in table["runs"]])
    assert tried[0] == pytest.approx([0.9, 0.1], abs=0.01)
    assert tried.sum(1) == pytest.approx(1)
    # Only the loss on numbers counts: as many of them as any proxy had.
    assert table["shares"][1] == pytest.approx(tried[:, 1].max(), abs=0.01)
    assert table["measured"][1] < table["runs"][0]["losses"][1]
    assert table["measured_gain"] > 0
    assert "LOO error" in out
    fragment = tomllib.loads((tmp_path / "proposal.toml").read_text())["mixture"]
    assert fragment["by"] == ["kind"]
    assert fragment["shares"] == pytest.approx(dict(zip(table["groups"], table["shares"], strict=True)), abs=1e-3)
    given_recipe = ["out=x", 'sources.a.paths=["a"]', tmp_path / "proposal.toml"]
    assert config.load(DataConfig, given_recipe).mixture.shares == fragment["shares"]

    # The same command reads what is there; with one run gone it trains that one and says the same.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/losses.json")}
    assert len(written) == 5
    gone = sorted(written)[2]
    gone.unlink()
    begin = time.time_ns()
    assert cli.main(["mixture", *given]) == 0
    assert capsys.readouterr().out == out
    assert json.loads((tmp_path / "proposal.json").read_text()) == table
    assert gone.stat().st_mtime_ns > begin
    assert all(path.stat().st_mtime_ns == when for path, when in written.items() if path != gone)


def test_limits_of_epochs_hold(mixture: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    cfg = config.load(
        MixtureProxyConfig,
        arguments(
            tmp_path, mixture, tiny_tokenizer_dir, "loss_weights.numbers=1", "max_group_epochs.numbers=0.2",
            "confirm=false", "loop.steps=2", "tokens=20000",
        ),
    )  # fmt: skip
    proposal = propose(cfg)
    assert proposal.epochs[1] <= 0.2 + 1e-6
    assert proposal.confirmed is None
    assert proposal.measured_gain is None


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("loss_weights.code=1", "no group 'code'"),
        ("loss_weights.numbers=0", "all loss_weights are 0"),
        ("seq_len=30000", "too few documents"),
        ("runs=2", "at least 4"),
    ],
)
def test_what_makes_no_sense_is_refused(
    further: str, message: str, mixture: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        propose(config.load(MixtureProxyConfig, arguments(tmp_path, mixture, tiny_tokenizer_dir, further)))
