"""The demo's data stages: `qwench data` on a small corpus, then again with the tokenizer that was trained on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qwench import config
from qwench.data.documents import read_documents
from qwench.data.mixture import MixedShards
from qwench.data.shards import TokenShards
from qwench.demo.config import DemoConfig
from qwench.demo.pipeline import run_stages
from qwench.demo.stages import STAGES
from qwench.tokenizer import Tokenizer

NAMES = ("collect", "clean", "tokenizer", "shards")
LICENCE = (
    "Permission is granted to anyone to use these words for any purpose, to alter them and to give them to others, as "
    "long as this notice stays with them and nobody claims to have written what somebody else has written. " * 2
)


def test_held_out_text_is_learnt_nowhere_and_finished_stages_are_kept(tmp_path: Path) -> None:
    library = Path(os.__file__).parent
    (tmp_path / "data").mkdir()
    for name in ("abc", "argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "enum", "heapq", "inspect"):
        text = (library / f"{name}.py").read_text(encoding="utf-8")
        (tmp_path / "data" / f"{name}.txt").write_text(f"{LICENCE}\n\n{text}", encoding="utf-8")
    given = [f"out={tmp_path / 'run'}", f"data={tmp_path / 'data'}", "vocab_size=512", "held_out_bytes=40000"]
    cfg = config.load(DemoConfig, given)
    stages = [stage for stage in STAGES if stage.name in NAMES]
    results = run_stages(stages, cfg).results
    run = tmp_path / "run"
    held_out = list(read_documents([run / "corpus/held_out.jsonl"]))
    training = list(read_documents([run / "corpus/train.jsonl"]))
    assert sum(LICENCE.strip() in document.text for document in held_out) == 1
    assert not [document.id for document in training if LICENCE.strip() in document.text]
    assert not {document.id for document in held_out} & {document.id for document in training}
    tokenizer = Tokenizer.load(run / "tokenizer")
    mixture = MixedShards.open(run / "data/shards/train", tokenizer.fingerprint)
    assert set(mixture.shards) == {document.source for document in training}
    assert sum(shards.num_documents for shards in mixture.shards.values()) == len(training)
    assert mixture.num_tokens == results["shards"]["train_tokens"]
    assert TokenShards.open(run / "shards/held_out", tokenizer.fingerprint).num_documents == len(held_out)
    assert (run / "data/report.html").is_file()
    # The second pass began where the first had ended.
    summary = json.loads((run / "data/summary.json").read_text())
    reused = {entry["stage"]: entry["reused"] == entry["items"] for entry in summary["stages"]}
    assert reused["prepare"]
    assert reused["dedup"]
    assert not reused["tokens"]
    stamp = (run / "data/summary.json").stat().st_mtime_ns
    assert run_stages(stages, cfg).results == results
    assert (run / "data/summary.json").stat().st_mtime_ns == stamp
