"""The whole recipe at toy size with the real code: text -> tokenizer -> pretraining -> SFT -> evaluation -> report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwench import Engine, SamplingParams
from qwench.cli import main
from qwench.demo.stages import STAGES

TOY = [
    "corpus_bytes=600_000",
    "held_out_bytes=30_000",
    "vocab_size=700",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "pretrain.tokens=30_000",
    "pretrain.batch_tokens=1024",
    "sft.num_sums=200",
    "sft.num_docs=30",
    "sft.num_manners=30",
    "eval_sums=6",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "run"
    assert main(["demo", "--out", str(out), *TOY]) == 0
    return out


def results(run: Path, stage: str) -> dict:
    return json.loads((run / "stages" / f"{stage}.json").read_text(encoding="utf-8"))["results"]


def test_every_stage_left_its_results(run: Path) -> None:
    for stage in STAGES:
        assert results(run, stage.name)["seconds"] >= 0
    assert results(run, "pretrain")["tokens"] == 29 * 1024
    losses = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    training = [record["loss"] for record in losses if "loss" in record]
    assert training[-1] < training[0] - 0.5, "nothing was learnt"


def test_held_out_text_was_not_learnt_from(run: Path) -> None:
    """No document and no long paragraph of the held-out side stands on the training side."""
    sides = {
        side: [json.loads(line) for line in (run / "corpus" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]
        for side in ("train", "held_out")
    }
    assert not {d["id"] for d in sides["train"]} & {d["id"] for d in sides["held_out"]}
    learnt = "\n\n".join(document["text"] for document in sides["train"])
    long = [p for d in sides["held_out"] for p in re.split(r"\n\s*\n", d["text"]) if len(p) > 250]
    assert long
    assert not [paragraph for paragraph in long if paragraph in learnt]


def test_bits_per_byte_are_the_losses(run: Path) -> None:
    """The model's figure lies where its validation loss says, and the compressors' are those of the written files."""
    bits, shards = results(run, "evaluate")["bits_per_byte"], results(run, "shards")
    from_loss = results(run, "pretrain")["val_loss"] / 0.6931 / shards["bytes_per_token"]
    assert bits["model"] == pytest.approx(from_loss, rel=0.15)
    assert 1.0 < bits["xz -9e"] < bits["token unigram"] < 8


def test_the_model_is_a_hugging_face_model(run: Path) -> None:
    """transformers reads the saved directory and continues a conversation with the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    theirs = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    engine = Engine(run / "model")
    messages = [{"role": "user", "content": "What is 4 + 5?"}]
    ids = engine.tokenizer.render(messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    mine = engine.generate([ids], SamplingParams(temperature=0, max_tokens=12))[0]
    want = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=12,
        do_sample=False,
        top_k=None,
        top_p=None,
        temperature=None,
    )
    assert mine.token_ids == want[0, len(ids) :].tolist()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_offline_file(run: Path) -> None:
    page = _Page()
    text = (run / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert {"svg", "table", "h1"} <= page.tags
    assert "script" not in page.tags
    elsewhere = [link for link in page.links if not link.startswith("#")]
    assert elsewhere == ["data/report.html"]
    assert (run / elsewhere[0]).is_file()
    for stage in STAGES:
        assert stage.title in text
    assert f"{results(run, 'evaluate')['bits_per_byte']['xz -9e']:.3f}" in text


def test_running_again_resumes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is repeated, unless a setting changes: then the stages from there on."""
    times = {stage.name: (run / "stages" / f"{stage.name}.json").stat().st_mtime_ns for stage in STAGES}
    assert main(["demo", "--out", str(run), *TOY]) == 0
    assert {s.name: (run / "stages" / f"{s.name}.json").stat().st_mtime_ns for s in STAGES} == times
    assert main(["demo", "--out", str(run), *TOY, "eval_sums=4"]) == 0
    changed = [s.name for s in STAGES if (run / "stages" / f"{s.name}.json").stat().st_mtime_ns != times[s.name]]
    assert changed == ["evaluate", "export", "report"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "missing", "does not exist"),
        (lambda folder: folder, "no readable documents"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\0\1\2" * 500) and folder, "binary"),
        (
            lambda folder: (folder / "a.txt").write_text("Too little text to learn anything from. " * 3) and folder,
            "too few",
        ),
    ],
)
def test_bad_data(make, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    assert main(["demo", "--data", str(make(folder)), "--out", str(tmp_path / "out"), *TOY]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("qwench: ")
    assert says in message
