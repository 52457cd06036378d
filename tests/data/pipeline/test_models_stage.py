"""Models and decontamination inside `qwench data`: scores, drops with reasons, survivors by quality, any workers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import outputs

from qwench.config import load
from qwench.data.classifier import Classifier, ClassifierSettings, train_classifier
from qwench.data.pipeline import decontaminate_job, models_job
from qwench.data.pipeline.parts import read_part
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.pipeline.stages import DataResult, run_pipeline
from qwench.types import Document

GOOD = "The experiment measured how {} changes under pressure and confirms the theory of its structure in detail."
BAD = "Buy {} now, cheap deal, click here for the best price and subscribe to win another cheap deal today."
THINGS = [
    "copper",
    "iron",
    "silver",
    "glass",
    "water",
    "salt",
    "paper",
    "carbon",
    "helium",
    "rubber",
    "marble",
    "cotton",
]
QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    texts = [form.format(thing) for form in (BAD, GOOD) for thing in THINGS]
    labels = ["bad"] * len(THINGS) + ["good"] * len(THINGS)
    train_classifier(texts, labels, ClassifierSettings(bucket_bits=12), ("bad", "good")).save(folder)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"id": f"good-{t}", "text": GOOD.format(t)} for t in THINGS]
    rows += [{"id": f"bad-{t}", "text": BAD.format(t)} for t in THINGS]
    rows.append({"id": "leak", "text": f"Homework for Monday, to be solved at home. {QUESTION} The answer is 72."})
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval").mkdir()
    (folder / "eval" / "sums.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "72"}) + "\n")
    return folder


def run(sources: Path, out: Path, *further: str) -> DataResult:
    arguments = [f"out={out}", f"inputs={sources}", 'sources.all.paths=["docs.jsonl"]', "sources.all.kind=docs"]
    near = ["dedup.near=false", "part_mb=0.001", "workers=1"]
    return run_pipeline(load(DataConfig, [*arguments, *near, *further]), quiet=True)


def documents(result: DataResult) -> dict[str, Document]:
    return {document.id: document for part in result.parts for document in read_part(part.docs)}


def dropped(out: Path, stage: str) -> dict[str, dict]:
    rows = [
        row for path in sorted(out.glob(f"work/{stage}/*/dropped.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    return {row["id"]: row for row in rows}


@pytest.mark.parametrize(("before", "stage"), [("false", "models"), ("true", "prepare")])
def test_a_model_scores_and_drops(sources: Path, quality: Path, tmp_path: Path, before: str, stage: str):
    out = tmp_path / "out"
    model = f'models.quality={{path="{quality}", drop_below=0.5, before_dedup={before}}}'
    result = run(sources, out, model)
    kept = documents(result)
    assert {name for name in kept if name != "leak"} == {f"good-{t}" for t in THINGS}
    assert all(0.5 <= document.meta["quality"] <= 1 for document in kept.values())
    gone = dropped(out, stage)
    assert set(gone) - {"leak"} == {f"bad-{t}" for t in THINGS}
    assert {(row["stage"], row["reason"]) for row in gone.values()} == {("model", "quality_low")}
    assert all(row["value"] < 0.5 for row in gone.values())
    counted = result.summary[stage]
    assert counted["reasons"]["model: quality_low"] == len(gone)
    assert sum(counted["scores"]["quality"].values()) == 2 * len(THINGS) + 1


def test_only_the_named_kinds_and_directions(sources: Path, quality: Path, tmp_path: Path):
    other = run(sources, tmp_path / "a", f'models.q={{path="{quality}", drop_below=0.5, kinds=["web"]}}')
    assert len(documents(other)) == 2 * len(THINGS) + 1
    above = run(sources, tmp_path / "b", f'models.spam={{path="{quality}", label="bad", drop_above=0.5, field="s"}}')
    kept = documents(above)
    assert {f"good-{t}" for t in THINGS} <= set(kept)
    assert not any(name.startswith("bad") for name in kept)
    assert all(document.meta["s"] < 0.5 for document in kept.values())
    assert {row["reason"] for row in dropped(tmp_path / "b", "models").values()} == {"spam_high"}


def test_a_domain_becomes_the_kind(sources: Path, quality: Path, tmp_path: Path):
    kept = documents(run(sources, tmp_path / "out", f'models.domain={{path="{quality}", set_kind=true}}'))
    assert {kept[f"good-{t}"].kind for t in THINGS} == {"good"}
    assert kept["bad-iron"].kind == "bad"
    assert kept["bad-iron"].meta["given_kind"] == "docs"
    assert kept["bad-iron"].meta["domain_share"] > 0.5


def test_quality_decides_which_duplicate_stays(tmp_path: Path):
    # The scorer likes one of two spellings, which the search for duplicates does not tell apart.
    texts = ["gamma delta words", "alpha beta words"]
    model = train_classifier(
        texts, ["bad", "good"], ClassifierSettings(bucket_bits=12, min_documents=1), ("bad", "good")
    )
    model.save(tmp_path / "model")
    (tmp_path / "in").mkdir()
    long = (
        "This text stands twice in the collection, and only its last sentences differ from one copy to the other. " * 8
    )
    rows = [{"id": "a", "text": long + "gamma delta. gamma delta gamma."}, {"id": "b", "text": long + "alpha beta."}]
    for order in (rows, rows[::-1]):
        (tmp_path / "in" / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        further = ["dedup.near=true", "part_mb=1", "dedup.paragraph_chars=0"]
        plain = documents(run(tmp_path / "in", tmp_path / "plain", *further))
        scored = documents(
            run(
                tmp_path / "in",
                tmp_path / "out",
                *further,
                f'models.quality={{path="{tmp_path}/model", before_dedup=true}}',
            )
        )
        assert list(plain) == ["a"]
        assert list(scored) == ["b"]


def test_another_model_under_the_same_path_is_applied(sources: Path, quality: Path, tmp_path: Path):
    model = tmp_path / "model"
    first = Classifier.load(quality)
    first.save(model)
    recipe = f'models.quality={{path="{model}", drop_below=0.5}}'
    before = documents(run(sources, tmp_path / "out", recipe))
    train_classifier(
        [form.format(t) for form in (BAD, GOOD) for t in THINGS],
        ["good"] * len(THINGS) + ["bad"] * len(THINGS), ClassifierSettings(bucket_bits=12), ("bad", "good"),
    ).save(model)  # fmt: skip
    after = documents(run(sources, tmp_path / "out", recipe))
    assert set(before) & set(after) <= {"leak"}
    assert "bad-iron" in after


def test_evaluation_samples_are_taken_out_and_named(sources: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run(sources, out, 'decontaminate.against=["eval"]')
    assert len(documents(result)) == 2 * len(THINGS)
    assert "leak" not in documents(result)
    (told,) = [json.loads(line) for line in (out / "contamination.jsonl").read_text().splitlines()]
    assert told["document"] == "leak"
    assert told["sample"] == "eval/sums.jsonl:1:question"
    assert told["share"] == 1
    assert "natalia sell altogether" in told["excerpt"]
    row = dropped(out, "decontaminate")["leak"]
    assert row["reason"] == "contaminated"
    assert json.loads(row["meta"])["contamination"]["sample"] == told["sample"]
    assert result.summary["decontaminate"]["sets"] == {"eval/sums.jsonl": 1}
    # A set that changed is compared anew.
    (sources / "eval" / "sums.jsonl").write_text(json.dumps({"question": GOOD.format("iron"), "answer": "1"}) + "\n")
    again = documents(run(sources, out, 'decontaminate.against=["eval"]'))
    assert "leak" in again
    assert "good-iron" not in again


def test_batches_change_no_byte(sources: Path, quality: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models = [f'models.quality={{path="{quality}", drop_below=0.5}}', 'decontaminate.against=["eval"]']
    run(sources, tmp_path / "one", *models, "part_mb=1")
    monkeypatch.setattr(models_job, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(decontaminate_job, "_BATCH_CHARS", 300)
    run(sources, tmp_path / "two", *models, "part_mb=1")
    one, two = outputs(tmp_path / "one"), outputs(tmp_path / "two")
    assert {"work/models/00000/docs.parquet", "work/decontaminate/00000/dropped.parquet"} <= set(one)
    assert [name for name in {**one, **two} if one.get(name) != two.get(name)] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('models.q={path="nowhere"}', "models.q: there is no model at nowhere"),
        ('models.q={path="QUALITY", label="ugly"}', "models.q: label 'ugly' is none of bad, good"),
        ('models.q={path="QUALITY", label="bad", drop_below="trained"}', "second of two classes"),
        ('models.q={path="QUALITY", scorer="perplexity", set_kind=true}', "perplexity has one number"),
        ('decontaminate.against=["nothing"]', "there is no evaluation set at .*nothing"),
        ("decontaminate.rule=qwen9", "decontaminate.rule"),
    ],
)
def test_mistakes_are_named(sources: Path, quality: Path, tmp_path: Path, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        run(sources, tmp_path / "out", override.replace("QUALITY", str(quality)))
