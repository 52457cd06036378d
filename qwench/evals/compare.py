"""Two evaluation runs, compared on the documents that both have answered.

    comparison = compare_runs(Path("evals/new"), Path("evals/old"))
    console.print(comparison_table(comparison))

Paired: every document is resampled together with both of its scores, so that what makes a document hard for both
models cancels out [Efron & Tibshirani 1993, ch. 8 and 15]. For 0/1 scores the exact test of McNemar [1947] stands
beside it. Scores that are no mean (perplexity, bits per byte) are ratios of sums, and are resampled as such. No torch,
no lm-eval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from qwench.evals.run_files import EvalRun, Sample, document_digest, main_metric

RESAMPLES = 10_000
CHUNK = 4_000_000
"""Numbers that are drawn at a time."""
MOST_KINDS = 2000
"""Different pairs of scores up to which their counts are drawn instead of the documents."""
FEWEST = 20
"""Documents from which on an interval decides without an exact test; of fewer, resamples scatter too little."""
Pairs = np.ndarray
"""float64 [documents, 4]: sum and weight of one run's score, then of the other's. A score is sum / weight over all."""
RATIOS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "word_perplexity": lambda ratio: np.exp(-ratio),
    "byte_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
    "perplexity": np.exp,
    "nll": lambda ratio: ratio,
}
"""Metrics whose documents have a sum and a weight (log-likelihood and words, or bytes; nats and tokens): what the score
is of the ratio of both, summed over documents. `nll` stands for all metrics nll_..., of positions."""
SETTINGS = (
    "prompt_digest", "num_fewshot", "chat", "chat_template", "system", "multiturn", "generation", "stop", "extraction",
    "output_type", "version", "seed",
)  # fmt: skip
"""Parts of a task's setting that make its scores comparable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """0/1 scores: documents that only one run has right, and the two-sided exact p of an even split."""

    gained: int
    lost: int
    p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one task in both runs, over the documents that both have."""

    task: str
    metric: str
    primary: bool
    group: bool
    parent: str
    """The group that it belongs to, or ""."""
    higher_is_better: bool | None
    n: int
    value: float
    baseline: float
    stderr: float
    """Standard error of `value` over documents."""
    baseline_stderr: float
    difference: float
    difference_stderr: float
    low: float
    high: float
    """Bounds of the confidence interval of the difference."""
    p: float
    """Two-sided, from the same resamples, that such a difference comes by chance."""
    mcnemar: McNemar | None = None
    verdict: str = ""
    """"better" or "worse" where the interval excludes zero and the exact test, if there is one, agrees; else ""."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    run: str
    baseline: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    """Settings that differ, documents without a partner, scores that could not be compared."""
    resamples: int
    seed: int
    level: float

    def row(self, task: str, metric: str | None = None) -> Row:
        """The row of a task, of its main metric by default. Raises KeyError."""
        for row in self.rows:
            if row.task == task and (row.primary if metric is None else row.metric == metric):
                return row
        raise KeyError(f"{task} {metric or ''}".strip())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------------- statistics
def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of independent values: sample deviation / sqrt(n), which is what lm-eval gives with a mean."""
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Of two rows of 0/1 scores of the same documents; `gained` are right in `first` alone."""
    gained, lost = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    n, k = gained + lost, min(gained, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    p = min(1.0, 2 * math.fsum(map(math.exp, logs))) if n else 1.0
    return McNemar(gained=gained, lost=lost, p=p)


def resampled_sums(pairs: Pairs, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [resamples, columns]: column sums of as many documents drawn with replacement."""
    n = len(pairs)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    if len(kinds) <= min(MOST_KINDS, n // 2):  # the same distribution, for the price of the kinds
        return rng.multinomial(n, counts / n, size=resamples) @ kinds
    sums = np.empty((resamples, pairs.shape[1]))
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n, (min(step, resamples - start), n))
        for column in range(pairs.shape[1]):
            sums[start : start + step, column] = pairs[drawn, column].sum(1)
    return sums


def _kind(metric: str) -> str:
    name = metric.split(",")[0]
    return "nll" if name.startswith("nll_") else name


def _of_ratio(metric: str) -> Callable[[np.ndarray], np.ndarray]:
    return RATIOS.get(_kind(metric), lambda ratio: ratio)


def _scores(sums: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Both runs' scores of column sums [..., 4]."""
    transform = _of_ratio(metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        return transform(sums[..., 0] / sums[..., 1]), transform(sums[..., 2] / sums[..., 3])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draws:
    """A score in both runs: as measured, and in each resample."""

    value: float
    baseline: float
    values: np.ndarray
    baselines: np.ndarray


def _draw(pairs: Pairs, metric: str, resamples: int, rng: np.random.Generator) -> _Draws:
    value, baseline = _scores(pairs.sum(0), metric)
    values, baselines = _scores(resampled_sums(pairs, resamples, rng), metric)
    return _Draws(value=float(value), baseline=float(baseline), values=values, baselines=baselines)


def _summary(draws: _Draws, level: float) -> dict[str, float]:
    difference, differences = draws.value - draws.baseline, draws.values - draws.baselines
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return {
            "difference": difference,
            "difference_stderr": math.nan,
            "low": math.nan,
            "high": math.nan,
            "p": math.nan,
        }
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    # Under "no difference" the resamples would scatter around zero as they do around the difference found.
    as_far = np.abs(differences - difference) >= abs(difference) - 1e-12
    return {
        "difference": difference,
        "difference_stderr": float(differences.std(ddof=1)) if len(differences) > 1 else math.nan,
        "low": float(low),
        "high": float(high),
        "p": float((1 + as_far.sum()) / (1 + len(differences))) if difference else 1.0,
    }


def _error(values: np.ndarray, pairs: Pairs | None, column: int, metric: str) -> float:
    """Of a mean from its formula, of anything else from its resamples."""
    if pairs is not None and _kind(metric) not in RATIOS and (pairs[:, column + 1] == 1).all():
        return standard_error(pairs[:, column])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _verdict(
    summary: Mapping[str, float], higher_is_better: bool | None, n: int, test: McNemar | None, level: float
) -> str:
    sure = test.p <= 1 - level if test is not None else n >= FEWEST
    if higher_is_better is None or not sure or not (summary["low"] > 0 or summary["high"] < 0):
        return ""
    return "better" if (summary["difference"] > 0) == higher_is_better else "worse"


# ------------------------------------------------------------------------------------------------------------- reading
def _weighted(metric: str, value: Any) -> tuple[float, float] | None:
    """(sum, weight) of a document's score: of a number or truth value, of a list of truth values (one a part of it), or
    of the pair that RATIOS tells of; None for what is no number."""
    if isinstance(value, bool | int | float):
        return (float(value), 1.0) if math.isfinite(value) and _kind(metric) not in RATIOS else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if not all(isinstance(part, bool | int | float) for part in value):
        return None
    if _kind(metric) in RATIOS:
        return (float(value[0]), float(value[1])) if len(value) == 2 and all(map(math.isfinite, value)) else None
    return (float(sum(value)), float(len(value))) if all(part in (0, 1) for part in value) else None


def metric_value(sample: Sample, metric: str) -> float | None:
    """A document's score as one number, None where it has none."""
    found = _weighted(metric, sample["metrics"].get(metric))
    if found is None or not found[1]:
        return None
    value = float(_of_ratio(metric)(np.array(found[0] / found[1])))
    return value if math.isfinite(value) else None


@dataclass(slots=True)
class Matched:
    """The documents of one task that both runs have."""

    pairs: list[tuple[Sample, Sample]]
    only_run: int
    only_baseline: int
    other_prompt: int
    """Pairs whose prompts differ."""


def match_samples(samples: Sequence[Sample], baseline: Sequence[Sample]) -> Matched:
    """By content; equal documents in the order in which they come."""
    waiting: dict[str, list[Sample]] = {}
    for sample in reversed(baseline):
        waiting.setdefault(_digest(sample), []).append(sample)
    pairs: list[tuple[Sample, Sample]] = []
    for sample in samples:
        if others := waiting.get(_digest(sample)):
            same = next((at for at in range(len(others) - 1, -1, -1) if others[at]["id"] == sample["id"]), -1)
            pairs.append((sample, others.pop(same)))
    return Matched(
        pairs=pairs,
        only_run=len(samples) - len(pairs),
        only_baseline=len(baseline) - len(pairs),
        other_prompt=sum(one.get("prompt") != two.get("prompt") for one, two in pairs),
    )


def _digest(sample: Sample) -> str:
    return sample.get("digest") or document_digest(sample.get("doc"))


def _light(samples: EvalRun, task: str) -> list[Sample]:
    """The samples without what only a reader needs."""
    return [
        {
            "id": s["id"],
            "digest": document_digest(s.get("doc")),
            "prompt": hash(str(s.get("prompt"))),
            "metrics": s["metrics"],
        }
        for s in samples.samples(task)
    ]


def _differences(task: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    found = []
    for name in SETTINGS:
        one, two = first.get(name), second.get(name)
        if one != two and name != "prompt_digest":
            found.append(f"{task}: {name} is {_short(one)} here and {_short(two)} in the baseline")
    files = [sorted(((setting.get("data") or {}).get("files") or {}).values()) for setting in (first, second)]
    if files[0] != files[1]:
        found.append(f"{task}: the data files are not the same")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------------------------- comparing
def compare_runs(
    run: Path, baseline: Path, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Comparison:
    """Every metric of every task and group that both runs have. Raises ValueError where nothing can be compared."""
    if not 0 < level < 1 or resamples < 100:
        raise ValueError(
            f"level is {level} and resamples {resamples}; give a level between 0 and 1, 100 resamples or more"
        )
    ours, theirs = EvalRun.open(run), EvalRun.open(baseline)
    common = [name for name in ours.tasks if name in theirs.tasks]
    if not common:
        raise ValueError(
            f"{run} and {baseline} have no task in common ({', '.join(ours.tasks)}; {', '.join(theirs.tasks)}); "
            "evaluate the same tasks"
        )
    warnings = _run_warnings(ours, theirs)
    parents = {member: name for name in common if ours.tasks[name].get("group") for member in ours.members(name)}
    matched: dict[str, Matched] = {}
    for name in [name for name in common if not ours.tasks[name].get("group")]:
        found = matched[name] = match_samples(_light(ours, name), _light(theirs, name))
        warnings += _differences(name, ours.tasks[name].get("setting") or {}, theirs.tasks[name].get("setting") or {})
        if found.only_run or found.only_baseline:
            warnings.append(
                f"{name}: {len(found.pairs):,} documents are in both runs and compared; {found.only_run:,} only here, "
                f"{found.only_baseline:,} only in the baseline"
            )
        if found.other_prompt:
            warnings.append(f"{name}: {found.other_prompt:,} of {len(found.pairs):,} prompts differ")
    draws: dict[tuple[str, str], _Draws] = {}
    pairs: dict[tuple[str, str], Pairs] = {}
    rng = np.random.default_rng(seed)
    for name, found in matched.items():
        for metric in ours.tasks[name].get("metrics") or {}:
            table = _pairs(found, metric)
            if table is None:
                if metric in (theirs.tasks[name].get("metrics") or {}):
                    warnings.append(f"{name}: {metric} has no number for each document and is not compared")
                continue
            warnings += _not_a_mean(name, metric, table, ours.tasks[name]["metrics"][metric])
            pairs[name, metric] = table
            draws[name, metric] = _draw(table, metric, resamples, rng)
    rows = []
    for name in common:
        entry = ours.tasks[name]
        for metric in entry.get("metrics") or {}:
            key = name, metric
            if key in pairs:
                drawn, n = draws[key], len(pairs[key])
                test = _exact_test(pairs[key])
            elif entry.get("group"):
                combined = _group(ours, name, metric, pairs, draws)
                if combined is None:
                    continue
                drawn, n, test = combined
            else:
                continue
            summary, higher = _summary(drawn, level), entry["metrics"][metric].get("higher_is_better")
            rows.append(
                Row(
                    task=name,
                    metric=metric,
                    primary=metric == main_metric(entry),
                    group=bool(entry.get("group")),
                    parent=parents.get(name, ""),
                    higher_is_better=higher,
                    n=n,
                    value=drawn.value,
                    baseline=drawn.baseline,
                    stderr=_error(drawn.values, pairs.get(key), 0, metric),
                    baseline_stderr=_error(drawn.baselines, pairs.get(key), 2, metric),
                    mcnemar=test,
                    verdict=_verdict(summary, higher, n, test, level),
                    **summary,
                )
            )
    if not rows:
        raise ValueError(f"{run} and {baseline} have no document in common; evaluate the same tasks on the same data")
    return Comparison(
        run=ours.name if ours.name != theirs.name else str(run),
        baseline=theirs.name if ours.name != theirs.name else str(baseline),
        rows=tuple(rows),
        warnings=tuple(_gathered([*warnings, *ours.notes, *theirs.notes])),
        resamples=resamples,
        seed=seed,
        level=level,
    )


def _not_a_mean(name: str, metric: str, table: Pairs, recorded: Mapping[str, Any]) -> list[str]:
    """A warning where the documents' scores do not give the score that the run has recorded."""
    value, (found, _) = recorded.get("value"), _scores(table.sum(0), metric)
    if value is None or recorded.get("n") != len(table) or math.isclose(value, found, rel_tol=1e-6, abs_tol=1e-9):
        return []
    return [
        f"{name}: {metric} is {value:.4f} as recorded, but {found:.4f} over its documents, which is what is compared"
    ]


def _run_warnings(ours: EvalRun, theirs: EvalRun) -> list[str]:
    found = []
    for name in ("limit", "seed", "preset"):
        one, two = ours.results.get(name), theirs.results.get(name)
        if one != two:
            found.append(f"{name} is {_short(one)} here and {_short(two)} in the baseline")
    for name in ("dtype", "lm_eval"):
        one, two = ((run.results.get("engine") or {}).get(name) for run in (ours, theirs))
        if one != two:
            found.append(f"engine: {name} is {_short(one)} here and {_short(two)} in the baseline")
    for run, which in ((ours, "this run"), (theirs, "the baseline")):
        if run.results.get("complete") is False:
            found.append(f"{which} is not complete: some of its tasks have not run yet")
    return found


def _gathered(warnings: Sequence[str]) -> list[str]:
    """The same warning of many tasks once; not of tasks what is said of the whole run."""
    tasks: dict[str, list[str]] = {}
    for warning in warnings:
        task, colon, what = warning.partition(": ")
        tasks.setdefault(what if colon else warning, []).append(task if colon else "")
    told = []
    for what, names in tasks.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told.append(what if "" in names else f"{', '.join(names[:3])}{more}: {what}")
    return told


def _pairs(found: Matched, metric: str) -> Pairs | None:
    rows = []
    for one, two in found.pairs:
        first, second = (_weighted(metric, sample["metrics"].get(metric)) for sample in (one, two))
        if first is not None and second is not None:
            rows.append((*first, *second))
    return np.array(rows, np.float64) if rows else None


def _exact_test(pairs: Pairs) -> McNemar | None:
    """McNemar's test, where every score is 0 or 1."""
    first, second = pairs[:, 0], pairs[:, 2]
    if not (np.isin(pairs[:, [0, 2]], (0.0, 1.0)).all() and (pairs[:, [1, 3]] == 1).all()):
        return None
    return mcnemar(first, second)


def _group(
    run: EvalRun,
    name: str,
    metric: str,
    pairs: Mapping[tuple[str, str], Pairs],
    draws: Mapping[tuple[str, str], _Draws],
) -> tuple[_Draws, int, McNemar | None] | None:
    """A group's score from its members' resamples: documents are drawn within each task, as they would be again."""
    members = run.members(name)
    keys = [(member, metric) for member in members if (member, metric) in pairs]
    if not keys or len(keys) < len(members):
        return None
    sizes = np.array([len(pairs[key]) for key in keys], np.float64)
    weights = sizes / sizes.sum()
    recorded = [run.tasks[member]["metrics"][metric]["value"] for member, _ in keys]
    value, counts = run.tasks[name]["metrics"][metric]["value"], [run.tasks[member].get("n") or 0 for member, _ in keys]
    if value is not None and None not in recorded and sum(counts):
        by_size, plain = float(np.average(recorded, weights=counts)), float(np.mean(recorded))
        if abs(plain - value) < abs(by_size - value):
            weights = np.full(len(keys), 1 / len(keys))

    def mean(parts: Sequence[Any]) -> Any:
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    together = _Draws(
        value=float(mean([draws[key].value for key in keys])),
        baseline=float(mean([draws[key].baseline for key in keys])),
        values=np.asarray(mean([draws[key].values for key in keys])),
        baselines=np.asarray(mean([draws[key].baselines for key in keys])),
    )
    return together, int(sizes.sum()), _exact_test(np.concatenate([pairs[key] for key in keys]))


# ------------------------------------------------------------------------------------------------------------- showing
def comparison_table(comparison: Comparison, *, subtasks: bool = False) -> Table:
    """The main metric of each task; with `subtasks`, members of groups and all metrics too."""
    table = Table(
        title=f"{escape(comparison.run)} against {escape(comparison.baseline)}",
        caption=f"paired bootstrap, {comparison.resamples:,} resamples, seed {comparison.seed}; ± one standard error; "
        "gained / lost: right in only one of the runs (exact McNemar test)",
    )
    table.add_column("task")
    for name in (
        "documents",
        "score",
        "baseline",
        "difference",
        f"{comparison.level:.0%} interval",
        "p",
        "gained / lost",
        "p",
    ):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in comparison.rows:
        if not subtasks and (row.parent or not row.primary):
            continue
        test = row.mcnemar
        table.add_row(
            escape(f"{'  ' if row.parent else ''}{row.task} {row.metric}"),
            f"{row.n:,}",
            f"{row.value:.4f} ± {row.stderr:.4f}",
            f"{row.baseline:.4f} ± {row.baseline_stderr:.4f}",
            f"{row.difference:+.4f} ± {row.difference_stderr:.4f}",
            f"{row.low:+.4f} to {row.high:+.4f}",
            _p(row.p),
            "" if test is None else f"+{test.gained:,} / -{test.lost:,}",
            "" if test is None else _p(test.p),
            {"better": "[green]better[/]", "worse": "[red]worse[/]"}.get(row.verdict, ""),
        )
    return table


def _p(value: float) -> str:
    return "" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
