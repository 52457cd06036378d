"""`qwench data` from outside: the same bytes for any number of workers, on Ray and after a kill; and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import outputs

from qwench import cli, config
from qwench.data.mixture import MixedDataset, MixedShards
from qwench.data.pipeline.parts import read_part
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.pipeline.stages import run_pipeline
from qwench.data.shards import TokenShards
from qwench.run import read_metrics
from qwench.tokenizer import Tokenizer

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def alone(data_arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this process alone."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["data", *data_arguments(out, "workers=1")]) == 0
    return out


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen([sys.executable, "-m", "qwench.cli", "data", *arguments], env=environment)


def test_shards_hold_every_document_once(alone: Path, tiny_tokenizer: Tokenizer) -> None:
    summary = json.loads((alone / "summary.json").read_text())
    mixture = MixedShards.open(alone / "shards/train", tiny_tokenizer.fingerprint)
    mixture.verify()
    val = TokenShards.open(alone / "shards/val", tiny_tokenizer.fingerprint)
    assert set(mixture.shards) == {"web", "code", "docs", "instructions"}
    documents = sum(member.num_documents for member in mixture.shards.values()) + val.num_documents
    assert documents == summary["documents"]["documents"] == summary["tokens"]["documents"]
    assert 0 < val.num_documents < 0.2 * documents
    assert len(mixture.shards["code"].records) > 3
    assert mixture.shards["code"].document(0)[-1] == tiny_tokenizer.eod_id
    data = MixedDataset(mixture, 32, seed=1)
    from_code = sum(data.place(index)[0] == data.source_names.index("code") for index in range(data.num_rows))
    assert from_code / data.num_rows == pytest.approx(0.5, abs=0.01)


def test_documents_are_shuffled_globally(alone: Path, tiny_tokenizer: Tokenizer) -> None:
    """Neighbours in a shard were not neighbours in the input, and every shard has documents from everywhere."""
    shards = TokenShards.open(alone / "shards/train/code")
    texts = [tiny_tokenizer.decode(shards.document(n)[:-1].tolist()) for n in range(shards.num_documents)]
    assert json.loads((alone / "plan.json").read_text())["items"] > 8
    place: dict[str, int] = {}
    for path in sorted((alone / "work/dedup").glob("*/docs.parquet")):
        for document in read_part(path):
            if document.source == "code":
                place.setdefault(document.text, len(place))
    order = [place[text] for text in texts if text in place]
    assert len(order) > 0.95 * len(texts)
    steps = np.abs(np.diff(order))
    assert np.mean(steps) == pytest.approx(len(place) / 3, rel=0.25), "as of a random order"


def test_chats_are_rendered_with_the_template(alone: Path, tiny_tokenizer: Tokenizer) -> None:
    shards = TokenShards.open(alone / "shards/train/instructions")
    texts = {tiny_tokenizer.decode(shards.document(n).tolist()) for n in range(shards.num_documents)}
    messages = [{"role": "user", "content": "What is 3 + 3?"}, {"role": "assistant", "content": "It is 6."}]
    wanted = {
        tiny_tokenizer.decode([*tiny_tokenizer.render(messages, add_generation_prompt=False), tiny_tokenizer.eod_id])
    }
    others = TokenShards.open(alone / "shards/val")
    texts |= {tiny_tokenizer.decode(others.document(n).tolist()) for n in range(others.num_documents)}
    assert wanted < texts


def test_what_goes_wrong_is_named_and_counted(alone: Path) -> None:
    summary = json.loads((alone / "summary.json").read_text())
    lines = [json.loads(line) for line in (alone / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert summary["prepare"]["skipped"] == len(lines) == 3
    assert any("no valid JSON" in reason for name, reason in reasons.items() if name.startswith("code.jsonl@"))
    assert "unreadable" in reasons["notes/cut.jsonl.gz"], "the end is missing"
    assert reasons["pages/logo.png"] == "no known kind of text file"
    assert summary["dedup"]["exact_duplicate"] + summary["dedup"]["near_duplicate"] >= 10
    prepare = summary["prepare"]
    assert prepare["documents"] == prepare["kept"] + prepare["dropped"]
    later = sum(summary[stage]["dropped"] for stage in ("dedup", "models", "decontaminate"))
    assert prepare["kept"] == summary["documents"]["documents"] + later
    assert summary["models"]["reasons"] == {"model: method_high": summary["models"]["dropped"]}
    told = [json.loads(line) for line in (alone / "contamination.jsonl").read_text().splitlines()]
    assert len(told) == summary["decontaminate"]["dropped"] > 3
    assert {line["sample"].split(":")[0] for line in told} == {"eval/leaked.jsonl"}


def test_the_run_directory(alone: Path) -> None:
    stages = [record["stage"] for record in read_metrics(alone)]
    assert stages == ["prepare", "dedup", "models", "decontaminate", "tokens", "mixture"]
    assert config.load(DataConfig, [alone / "config.toml"]).seed == 7
    assert json.loads((alone / "provenance.json").read_text())["packages"]["tokenizers"]


def test_workers_and_kills_change_no_byte(alone: Path, data_arguments: Arguments, tmp_path: Path) -> None:
    """Killed with SIGKILL in several stages, with two workers and with one; what was finished is not done again."""
    out = tmp_path / "run"
    finished: dict[str, int] = {}
    for stage, number, workers in [("prepare", 3, 2), ("dedup", 2, 1), ("models", 2, 1), ("decontaminate", 2, 2)]:
        process = start(data_arguments(out, f"workers={workers}"))
        try:
            _wait(lambda s=stage, n=number: len(list((out / "work" / s).glob("[0-9]*/done.json"))) >= n, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (out / "summary.json").exists()
        again = {str(path): path.stat().st_mtime_ns for path in out.glob("work/*/[0-9]*/done.json")}
        assert {path: again[path] for path in finished} == finished
        finished = again
    process = start(data_arguments(out, "workers=2"))
    assert process.wait(120) == 0
    after = {str(path): path.stat().st_mtime_ns for path in out.glob("work/*/[0-9]*/done.json")}
    assert {path: after[path] for path in finished} == finished
    assert not [path for path in out.rglob(".*") if path.name != ".lock"], "nothing unfinished is left"
    assert outputs(out) == outputs(alone)


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_changed_recipe_redoes_what_it_touches(alone: Path, data_arguments: Arguments, tmp_path: Path) -> None:
    recipe = config.load(DataConfig, data_arguments(tmp_path / "run", "workers=1", "tokenizer=" + _given(alone)))
    run_pipeline(recipe, quiet=True)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/work/prepare").glob("*/done.json")}
    other = config.load(DataConfig, [*data_arguments(tmp_path / "run", "workers=1", "seed=8")])
    result = run_pipeline(other, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert result.train is not None
    new, old = TokenShards.open(result.train / "code"), TokenShards.open(alone / "shards/train/code")
    assert new.fingerprint != old.fingerprint, "another seed, another order"
    assert abs(new.num_documents - old.num_documents) < 0.1 * old.num_documents, "and other validation documents"


def _given(alone: Path) -> str:
    return str(config.load(DataConfig, [alone / "config.toml"]).tokenizer)


def test_without_tokenizer_the_documents_are_the_result(corpus: Path, tmp_path: Path) -> None:
    recipe = config.load(DataConfig, [f"out={tmp_path}", f'sources.code.paths=["{corpus}/code.jsonl"]'])
    result = run_pipeline(recipe, quiet=True)
    assert result.train is None
    assert sum(part.num_documents for part in result.parts) > 50
    assert all(part.docs.exists() for part in result.parts)


@pytest.mark.parametrize(
    ("further", "says"),
    [
        (["sources.code.paths=['/nowhere']"], "/nowhere does not exist"),
        (["mixture.shares.wiki=0.1"], "names 'wiki', which no document is in; groups by kind are code"),
        (["sources.code.pahts=['x']"], "did you mean 'sources.code.paths'"),
        (["shards.val_fraction=0.9"], "give a number between 0 and 0.5"),
        (["rules.text.min_words=1000000000", "sources.code.kind=docs"], "no document is left"),
        (["tokenizer=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(
    further: list[str], says: str, corpus: Path, tmp_path: Path, tiny_tokenizer_dir, capsys
) -> None:
    given = [f"out={tmp_path}", f'sources.code.paths=["{corpus}/code.jsonl"]', f"tokenizer={tiny_tokenizer_dir}"]
    assert cli.main(["data", *given, "sources.code.kind=code", *further]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray (pip install 'qwench[ray]')")
def test_ray_gives_the_same_bytes(alone: Path, data_arguments: Arguments, tmp_path: Path) -> None:
    """The same recipe on a cluster of two nodes of this machine."""
    script = tmp_path / "cluster.py"
    script.write_text(
        "import sys\n"
        "from ray.cluster_utils import Cluster\n"
        "from qwench import cli\n"
        "if __name__ == '__main__':\n"
        "    head = {'num_cpus': 1, 'include_dashboard': False}\n"
        "    cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "    cluster.add_node(num_cpus=1)\n"
        "    sys.exit(cli.main(['data', *sys.argv[1:], 'runner=ray', f'ray_address={cluster.address}']))\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    out = tmp_path / "run"
    subprocess.run([sys.executable, str(script), *data_arguments(out)], env=environment, check=True, timeout=300)
    assert outputs(out) == outputs(alone)


def test_pretraining_reads_the_mixture(alone: Path, pretrain_arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "model"
    given = [f"train_shards={alone / 'shards/train'}", f"val_shards={alone / 'shards/val'}", "loop.steps=3"]
    assert cli.main(["pretrain", *pretrain_arguments(out, *given)]) == 0
    losses = [record for record in read_metrics(out) if "loss" in record]
    assert losses
    two = f"train_shards=['{alone / 'shards/train'}','{alone / 'shards/val'}']"
    assert cli.main(["pretrain", *pretrain_arguments(tmp_path / "other", two)]) == 2
