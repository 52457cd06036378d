"""Comparing two runs: the statistics against formulas and known values, the matching against made-up differences."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console
from run_writer import answer_sample, choice_sample, write_run

from qwench.evals.compare import (
    RATIOS,
    compare_runs,
    comparison_table,
    match_samples,
    mcnemar,
    metric_value,
    resampled_sums,
    standard_error,
)
from qwench.evals.run_files import EvalRun, question

if TYPE_CHECKING:
    from qwench.model.decoder import CausalLM
    from qwench.tokenizer import Tokenizer


def graded(values: list[float], name: str = "acc") -> list[dict[str, Any]]:
    return [
        {
            "id": at,
            "doc": {"question": f"q{at}"},
            "prompt": f"q{at}",
            "response": [""],
            "target": "",
            "metrics": {name: value},
        }
        for at, value in enumerate(values)
    ]


# ---------------------------------------------------------------------------------------------------------- statistics
def test_mcnemar_against_known_values() -> None:
    def p(gained: int, lost: int) -> float:
        first = np.array([1] * gained + [0] * lost + [1, 0])
        second = np.array([0] * gained + [1] * lost + [1, 0])
        found = mcnemar(first, second)
        assert (found.gained, found.lost) == (gained, lost)
        return found.p

    assert p(0, 0) == 1
    assert p(5, 0) == pytest.approx(2 / 32)
    assert p(0, 5) == p(5, 0)
    assert p(4, 4) == 1
    assert p(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert p(3000, 2700) == pytest.approx(math.erfc(299 / math.sqrt(5700) / math.sqrt(2)), rel=0.01), (
        "normal approximation"
    )


def test_both_ways_of_resampling_have_the_same_spread() -> None:
    rng = np.random.default_rng(0)
    binary = np.stack([rng.integers(0, 2, 400), np.ones(400), rng.integers(0, 2, 400), np.ones(400)], 1).astype(float)
    smooth = binary + rng.normal(0, 1e-6, binary.shape)  # all rows differ: documents are drawn, not kinds
    few, many = (resampled_sums(pairs, 4000, np.random.default_rng(1)) / 400 for pairs in (binary, smooth))
    assert np.allclose(few.mean(0), binary.mean(0), atol=0.002)
    assert np.allclose(many.mean(0), binary.mean(0), atol=0.002)
    assert few[:, 0].std() == pytest.approx(binary[:, 0].std() / 20, rel=0.05)
    assert many[:, 0].std() == pytest.approx(binary[:, 0].std() / 20, rel=0.05)
    assert np.corrcoef(few[:, 0], few[:, 2])[0, 1] == pytest.approx(
        np.corrcoef(binary[:, 0], binary[:, 2])[0, 1], abs=0.05
    )


def test_the_interval_is_that_of_paired_differences(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, 500)  # what both runs share, and what an unpaired test would count as noise
    new, old = hard + 0.1 + rng.normal(0, 0.3, 500), hard + rng.normal(0, 0.3, 500)
    one = write_run(tmp_path / "a", {"t": graded(new.tolist())}, model="new")
    two = write_run(tmp_path / "b", {"t": graded(old.tolist())}, model="old")
    row = compare_runs(one, two).row("t")
    error = standard_error(new - old)
    assert row.difference == pytest.approx((new - old).mean())
    assert row.difference_stderr == pytest.approx(error, rel=0.03)
    assert (row.low, row.high) == pytest.approx(
        (row.difference - 1.96 * error, row.difference + 1.96 * error), abs=0.1 * error
    )
    assert row.stderr == pytest.approx(standard_error(new)), "of the score itself, the formula's"
    assert row.stderr > 2 * row.difference_stderr
    z = row.difference / error
    assert row.p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.002)
    assert row.verdict == "better"
    assert compare_runs(two, one).row("t").verdict == "worse"
    assert compare_runs(one, two) == compare_runs(one, two), "the same resamples each time"


def test_few_documents_decide_nothing(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", {"t": graded([1.0] * 4), "s": graded([0.9] * 4)})
    two = write_run(tmp_path / "b", {"t": graded([0.0] * 4), "s": graded([0.1] * 4)})
    comparison = compare_runs(one, two)
    assert comparison.row("t").mcnemar is not None
    assert comparison.row("t").mcnemar.p == 0.125  # pyright: ignore[reportOptionalMemberAccess]
    assert comparison.row("t").verdict == comparison.row("s").verdict == ""


def test_a_run_against_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"t": graded([1.0, 0.0, 1.0] * 20)})
    comparison = compare_runs(run, run)
    row = comparison.row("t")
    assert (row.difference, row.low, row.high, row.p, row.verdict) == (0, 0, 0, 1, "")
    assert comparison.warnings == ()


def test_ratios_are_resampled_as_ratios(tmp_path: Path) -> None:
    """A long document counts by its bytes, as in the score itself."""
    rng = random.Random(0)
    sizes = [rng.randrange(10, 2000) for _ in range(300)]

    def run(name: str, bits: float) -> Path:
        pairs = [[-bits * math.log(2) * size + rng.gauss(0, 5), size] for size in sizes]
        samples = graded([0.0] * len(sizes), "bits_per_byte")
        for sample, pair in zip(samples, pairs, strict=True):
            sample["metrics"] = {"bits_per_byte": pair}
        value = -sum(nats for nats, _ in pairs) / sum(sizes) / math.log(2)
        path = write_run(tmp_path / name, {"t": graded([0.0] * len(sizes), "bits_per_byte")})
        (path / "samples" / "t.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
        results = json.loads((path / "results.json").read_text())
        results["tasks"]["t"]["metrics"]["bits_per_byte"] |= {"value": value, "higher_is_better": False}
        (path / "results.json").write_text(json.dumps(results))
        return path

    comparison = compare_runs(run("a", 0.9), run("b", 1.0))
    row = comparison.row("t")
    assert row.value == pytest.approx(0.9, abs=0.01)
    assert row.difference == pytest.approx(-0.1, abs=0.005)
    assert row.verdict == "better", "fewer bits"
    assert row.mcnemar is None
    assert comparison.warnings == (), "the recorded score is the ratio of the sums"
    sample = {
        "metrics": {"nll_0_64": [32.0, 64], "perplexity": [0.0, 64], "acc": [True, False], "bad": "x", "nan": math.nan}
    }
    assert [metric_value(sample, name) for name in sample["metrics"]] == [0.5, 1.0, 0.5, None, None]
    assert metric_value({"metrics": {"word_perplexity": [-2.0, 1]}}, "word_perplexity") == pytest.approx(math.exp(2))
    assert metric_value({"metrics": {"bits_per_byte": 1.0}}, "bits_per_byte") is None
    assert set(RATIOS) >= {"bits_per_byte", "word_perplexity", "byte_perplexity"}


# ------------------------------------------------------------------------------------------------------------ matching
def test_documents_are_matched_by_content_and_the_rest_is_told(tmp_path: Path) -> None:
    base = [answer_sample(n, f"q{n}", "1", "1") for n in range(30)]
    other = [answer_sample(n, f"q{n + 5}", "2", "1", prompt=f"other prompt of q{n + 5}") for n in range(30)]
    one = write_run(tmp_path / "a", {"t": base, "only": graded([1.0])}, model="new")
    changed = {"num_fewshot": 5, "seed": 7}
    two = write_run(tmp_path / "b", {"t": other}, model="old", setting=changed, limit=30, complete=False, seed=7)
    comparison = compare_runs(one, two)
    row = comparison.row("t")
    assert (row.n, row.value, row.baseline) == (25, 1.0, 0.0)
    told = "\n".join(comparison.warnings)
    assert "t: 25 documents are in both runs and compared; 5 only here, 5 only in the baseline" in told
    assert "t: 25 of 25 prompts differ" in told
    assert "t: num_fewshot is 0 here and 5 in the baseline" in told
    assert "limit is null here and 30 in the baseline" in told
    assert [line for line in told.splitlines() if "seed" in line] == ["seed is 1234 here and 7 in the baseline"]
    assert "the baseline is not complete" in told
    assert [r.task for r in comparison.rows] == ["t"]


def test_equal_documents_keep_their_order() -> None:
    ours = [{"id": n, "doc": {"q": "same"}, "metrics": {}} for n in range(3)]
    theirs = [{"id": n, "doc": {"q": "same"}, "metrics": {}} for n in (2, 1, 0)]
    assert [(one["id"], two["id"]) for one, two in match_samples(ours, theirs).pairs] == [(0, 0), (1, 1), (2, 2)]


def test_groups_are_resampled_within_their_tasks(tmp_path: Path) -> None:
    rng = random.Random(1)

    def run(name: str, shares: tuple[float, float]) -> Path:
        tasks = {
            f"g_{at}": [
                choice_sample(n, f"{at} {n}", [1, 0] if rng.random() < share else [0, 1], 0) for n in range(size)
            ]
            for at, (share, size) in enumerate(zip(shares, (300, 100), strict=True))
        }
        return write_run(tmp_path / name, tasks, model=name, groups={"g": list(tasks)})

    one, two = run("new", (0.8, 0.3)), run("old", (0.6, 0.3))
    comparison = compare_runs(one, two)
    group = comparison.row("g")
    results = [EvalRun.open(path).tasks["g"]["metrics"]["acc"]["value"] for path in (one, two)]
    assert (group.value, group.baseline) == pytest.approx(results)
    assert group.n == 400
    parts = [comparison.row(f"g_{at}") for at in range(2)]
    assert [part.parent for part in parts] == ["g", "g"]
    expected = math.sqrt(sum((part.n / 400 * part.difference_stderr) ** 2 for part in parts))
    assert group.difference_stderr == pytest.approx(expected, rel=0.05)
    assert group.mcnemar is not None
    assert group.mcnemar.gained == sum(part.mcnemar.gained for part in parts if part.mcnemar)
    told = Console(width=200, record=True, file=io.StringIO())
    told.print(comparison_table(comparison))
    text = told.export_text()
    assert "g acc" in text
    assert "g_0" not in text
    assert "better" in text
    assert "new against old" in text
    assert len(comparison_table(comparison, subtasks=True).rows) == 3
    json.dumps(comparison.to_json())


def test_mistakes_are_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", {"t": graded([1.0])})
    two = write_run(tmp_path / "b", {"u": graded([1.0])})
    with pytest.raises(ValueError, match="have no task in common"):
        compare_runs(one, two)
    with pytest.raises(ValueError, match=r"has no results\.json"):
        compare_runs(one, tmp_path)
    other = [{**sample, "doc": {"question": "another"}} for sample in graded([1.0])]
    with pytest.raises(ValueError, match="have no document in common"):
        compare_runs(one, write_run(tmp_path / "c", {"t": other}))
    (one / "samples" / "t.jsonl").write_text(
        '{"id": 0}\nno JSON\n' + json.dumps(graded([1.0])[0]) + "\n", encoding="utf-8"
    )
    comparison = compare_runs(one, write_run(tmp_path / "d", {"t": graded([1.0])}))
    assert comparison.row("t").n == 1
    assert sum("is no sample and was left out" in warning for warning in comparison.warnings) == 2
    (one / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not what qwench eval writes"):
        compare_runs(one, one)


def test_scores_that_are_no_mean_of_their_documents_are_told(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, {"t": graded([1.0, 0.0, 1.0])}) for name in "ab")
    results = json.loads((one / "results.json").read_text())
    results["tasks"]["t"]["metrics"]["acc"]["value"] = 0.9
    (one / "results.json").write_text(json.dumps(results))
    assert any(
        "acc is 0.9000 as recorded, but 0.6667 over its documents" in told for told in compare_runs(one, two).warnings
    )


def test_what_a_person_knows_a_document_by() -> None:
    assert question({"question": " What\n is it? ", "x": 1}) == "What is it?"
    assert question({"turns": ["first", "second"]}) == "first"
    assert question({"a": 1}, "the end of a prompt") == "the end of a prompt"


def test_standard_errors_are_those_of_lm_eval(tiny_model: CausalLM, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from qwench.engine import Engine
    from qwench.evals.harness import About, Item, Plan, evaluate
    from qwench.evals.task_loading import Catalogue

    (tmp_path / "icl").mkdir()
    rows = [{"query": f"Question: {n}?\nAnswer:", "choices": ["a", "b b", "c"], "gold": n % 3} for n in range(25)]
    (tmp_path / "icl" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = Plan(items=[Item(task="arc_easy")], data_dirs=(tmp_path,))
    with Engine(tiny_model, tokenizer=tiny_tokenizer) as engine:
        catalogue = Catalogue(families=("arc",))
        results = evaluate(engine, plan, tmp_path / "run", About(model={"name": "tiny"}), catalogue=catalogue)
    recorded = results["tasks"]["arc_easy"]["metrics"]
    samples = list(EvalRun.open(tmp_path / "run").samples("arc_easy"))
    for metric in ("acc", "acc_norm"):
        values = [sample["metrics"][metric] for sample in samples]
        assert recorded[metric]["value"] == pytest.approx(np.mean(values))
        assert recorded[metric]["stderr"] == pytest.approx(standard_error(values))
    assert compare_runs(tmp_path / "run", tmp_path / "run").row("arc_easy").stderr == pytest.approx(
        recorded["acc"]["stderr"]
    )
