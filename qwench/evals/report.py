"""RUN/report.html of an evaluation: scores with their settings, every sample, and a second run beside it.

One offline file. Samples lie in it as compressed blocks that the browser opens when they are looked at (`viewer/`), so
tens of thousands are no burden. What models wrote is untrusted: it is data in the page and goes into text nodes only;
a Content-Security-Policy allows this page's own script and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib.pyplot as plt
import numpy as np

from qwench import page
from qwench.evals.compare import Comparison, Row, compare_runs, match_samples, metric_value
from qwench.evals.own.heat_map import needle_heat_map
from qwench.evals.run_files import EvalRun, Sample, document_digest, main_metric, question
from qwench.run import write_atomically

BLOCK = 200
"""Samples in a compressed block."""
MAX_TEXT = 60_000
"""Characters of one text that the page holds; the middle of a longer one stays in the run's directory."""
MIN_OPENING = 200
"""Characters from which on a beginning that all prompts share is stored once."""
VIEWER = Path(__file__).parent / "viewer"
SAME, DIFFERS, ONLY_RUN, ONLY_BASELINE = 1, 0, 2, 3


def write_report(run: Path, baseline: Path | None = None, out: Path | None = None) -> Path:
    """Write the page, to RUN/report.html by default. Raises ValueError if a directory holds no evaluation."""
    ours = EvalRun.open(run)
    theirs = EvalRun.open(baseline) if baseline is not None else None
    comparison = compare_runs(run, baseline) if baseline is not None else None
    names = _names(ours, theirs)
    blocks: list[str] = []
    tasks = {name: _task(name, ours, theirs, blocks) for name in ours.leaves()}
    tasks = {name: task for name, task in tasks.items() if task["blocks"]}
    data = {
        "run": {"name": names[0]},
        "baseline": {"name": names[1]} if theirs is not None else None,
        "block": BLOCK,
        "tasks": tasks,
    }
    script, style = ((VIEWER / f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"img-src data:; script-src 'sha256-{allowed}'\"><style>{style}</style>"
    )
    body = [
        page.section("Scores", _scores(ours, theirs, comparison)),
        page.section("Before you compare", _warnings(comparison)) if comparison and comparison.warnings else "",
        *_pictures(ours, theirs, names),
        page.section("Samples", _browser(tasks)),
        page.section("Setting", '<div id="settings"></div>'),
        page.section("Where this ran", _facts(ours, theirs, names)),
        page.section("Notes", _list(dict.fromkeys(ours.notes))) if ours.notes else "",
        f'<script type="application/json" id="page-data">{_json(data)}</script>',
        *blocks,
        f"<script>{script}</script>",
    ]
    path = out or run / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.document(f"Evaluation of {names[0]}", _lead(ours, theirs, names), body, head))
    return path


def _names(ours: EvalRun, theirs: EvalRun | None) -> tuple[str, str]:
    if theirs is None:
        return ours.name, ""
    if ours.name != theirs.name:
        return ours.name, theirs.name
    here, there = ours.path.resolve(), theirs.path.resolve()
    return (here.name, there.name) if here.name != there.name else (str(ours.path), str(theirs.path))


def _json(value: Any) -> str:
    """For a script element: no character of it can end the element or begin a comment."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _block(value: Any, blocks: list[str]) -> str:
    """Add compressed data to the page; its id."""
    name = f"b{len(blocks)}"
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    packed = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
    blocks.append(f'<script type="text/plain" id="{name}">{packed}</script>\n')
    return name


# ------------------------------------------------------------------------------------------------------------- samples
def _task(name: str, ours: EvalRun, theirs: EvalRun | None, blocks: list[str]) -> dict[str, Any]:
    entry = ours.tasks[name]
    metric = main_metric(entry) or ""
    there = theirs.tasks.get(name) if theirs is not None else None
    samples = [_readable(sample) for sample in ours.samples(name)]
    records: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    if theirs is None or there is None:
        for sample in samples:
            records.append(sample)
            rows.append(_row(sample, metric_value(sample, metric), None, SAME if theirs is None else ONLY_RUN))
    else:
        others = [_readable(sample) for sample in theirs.samples(name)]
        partner = {id(one): two for one, two in match_samples(samples, others).pairs}
        taken = {id(two) for two in partner.values()}
        for sample in samples:
            other = partner.get(id(sample))
            value = metric_value(sample, metric)
            if other is None:
                records.append(sample)
                rows.append(_row(sample, value, None, ONLY_RUN))
                continue
            is_same = SAME if _answer(sample) == _answer(other) else DIFFERS
            rows.append(_row(sample, value, metric_value(other, metric), is_same))
            dropped = {"doc", "id", "target", *(("prompt",) if other.get("prompt") == sample.get("prompt") else ())}
            records.append({**sample, "base": {key: part for key, part in other.items() if key not in dropped}})
        for other in others:
            if id(other) not in taken:
                records.append({**other, "whole": True})
                rows.append(_row(other, None, metric_value(other, metric), ONLY_BASELINE))
    opening = _opening([record["prompt"] for record in records if not record.get("whole")])
    for record in records:
        if opening and not record.get("whole") and "prompt" not in record.get("base", {}):
            record["prompt"] = record["prompt"][len(opening) :]
        elif opening:
            record["whole"] = True
        record.pop("digest", None)
        record.get("base", {}).pop("digest", None)
    values = [value for row in rows for value in row[1:3] if value is not None]
    return {
        "index": _block(rows, blocks),
        "blocks": [_block(records[at : at + BLOCK], blocks) for at in range(0, len(records), BLOCK)],
        "opening": opening,
        "graded": bool(values) and all(0 <= value <= 1 for value in values),
        "higher": (entry.get("metrics") or {}).get(metric, {}).get("higher_is_better") is not False,
        "setting": {
            "here": _setting(ours, name),
            "there": _setting(theirs, name) if theirs is not None and there is not None else None,
        },
    }


def _readable(sample: Sample) -> Sample:
    """A sample with its texts cut to what a page can hold; documents keep their identity by `digest`."""
    cut = {key: _cut(value) for key, value in sample.items()}
    return cut | {"prompt": _cut(str(sample.get("prompt", ""))), "digest": document_digest(sample.get("doc"))}


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        left_out = len(value) - MAX_TEXT
        return (
            f"{value[: MAX_TEXT * 2 // 3]}\n[... {left_out:,} characters are left out of this page; they are in the "
            f"run's samples ...]\n{value[-MAX_TEXT // 3 :]}"
        )
    if isinstance(value, dict):
        return {key: _cut(inner) for key, inner in value.items()}
    return [_cut(inner) for inner in value] if isinstance(value, list) else value


def _row(sample: Sample, value: float | None, other: float | None, same: int) -> list[Any]:
    return [sample["id"], _round(value), _round(other), same, question(sample.get("doc"), sample.get("prompt"))]


def _round(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, 6)


def _answer(sample: Sample) -> Any:
    """What two runs of a sample are compared by: the text, or which choice is the likeliest."""
    if choices := sample.get("choices"):
        return max(range(len(choices)), key=lambda at: choices[at]["logprob"])
    return sample["response"] if "response" in sample else sample.get("logprob")


def _opening(prompts: Sequence[str]) -> str:
    """The whole lines with which all prompts begin, where it is worth while to say them once."""
    if len(prompts) < 2:
        return ""
    first, last = min(prompts), max(prompts)
    differ = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(differ, min(len(first), len(last)))]
    common = common[: common.rfind("\n") + 1]
    return common if len(common) >= MIN_OPENING else ""


def _setting(run: EvalRun, name: str) -> dict[str, Any]:
    """All that a score of a task depends on and what it cost, for a person to read."""
    entry, results = run.tasks[name], run.results
    model, engine = results.get("model") or {}, results.get("engine") or {}
    scores = {metric: _score(found) for metric, found in (entry.get("metrics") or {}).items()}
    return {
        **scores,
        **(entry.get("setting") or {}),
        "limit": results.get("limit"),
        "documents": entry.get("n"),
        "tokens": entry.get("tokens"),
        "seconds": entry.get("seconds"),
        "tokens_per_second": entry.get("tokens_per_second"),
        "model": model.get("name"),
        "model_hash": model.get("hash"),
        **{f"engine_{key}": value for key, value in engine.items()},
        "preset": results.get("preset"),
        "commit": results.get("commit"),
    }


# -------------------------------------------------------------------------------------------------------------- pieces
def _lead(ours: EvalRun, theirs: EvalRun | None, names: tuple[str, str]) -> str:
    results = ours.results
    facts = [f"{len(ours.leaves())} tasks"]
    if results.get("limit") is not None:
        facts.append(f"at most {results['limit']} documents of each")
    if results.get("seconds"):
        facts.append(f"{results['seconds']:,.0f} s")
    if results.get("started"):
        facts.append(str(results["started"]))
    if results.get("complete") is False:
        facts.append("not complete")
    beside = f" &middot; beside {page.text(names[1])}" if theirs is not None else ""
    return page.text(" · ".join(facts)) + beside


def _score(found: Mapping[str, Any]) -> str:
    value, error = found.get("value"), found.get("stderr")
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _scores(ours: EvalRun, theirs: EvalRun | None, comparison: Comparison | None) -> str:
    parts = {member for name in ours.tasks if ours.tasks[name].get("group") for member in ours.members(name)}
    main = [(name, main_metric(ours.tasks[name])) for name in ours.tasks if name not in parts]
    every = [(name, metric) for name, entry in ours.tasks.items() for metric in entry.get("metrics") or {}]
    rows = {(row.task, row.metric): row for row in comparison.rows} if comparison is not None else {}
    found = _score_table(ours, theirs, [(n, m) for n, m in main if m], rows)
    if len(every) > len(main):
        all_of_them = _score_table(ours, theirs, every, rows)
        found += f"<details><summary>All {len(every)} metrics of all tasks</summary>{all_of_them}</details>"
    if comparison is not None:
        found += (
            f"<p class=quiet>Differences: paired bootstrap over the documents of both runs, {comparison.resamples:,} "
            f"resamples, seed {comparison.seed}; the interval has {comparison.level:.0%}. Gained and lost: documents "
            "that only this run, or only the baseline, has right, with the exact p of McNemar's test. The scores of "
            "both runs are as recorded.</p>"
        )
    return found


def _score_table(
    ours: EvalRun, theirs: EvalRun | None, entries: Iterable[tuple[str, str]], rows: Mapping[tuple[str, str], Row]
) -> str:
    head = ["task", "metric", "documents", "score"]
    head += ["baseline", "difference", "interval", "p", "gained / lost", "p"] if theirs is not None else []
    head += ["published", "seconds", "tokens/s"]
    lines = []
    for name, metric in entries:
        entry = ours.tasks[name]
        target = name if not entry.get("group") else ""
        cells = [
            (
                f'<a href="#task={page.text(quote(target, safe=""))}">{page.text(name)}</a>'
                if target
                else page.text(name)
            )
            + f"<div class=quiet>{page.text(_in_short(ours, name))}</div>",
            page.text(metric),
            f"{entry['metrics'][metric].get('n') or 0:,}",
            page.text(_score(entry["metrics"][metric])),
        ]
        if theirs is not None:
            there = (theirs.tasks.get(name) or {}).get("metrics") or {}
            cells.append(page.text(_score(there[metric])) if metric in there else "–")
            cells += _compared(rows.get((name, metric)))
        published = (entry.get("published") or {}).get("value") if metric == main_metric(entry) else None
        speed = entry.get("tokens_per_second")
        cells += [
            "" if published is None else page.text(published),
            f"{entry['seconds']:,.1f}" if entry.get("seconds") is not None else "",
            f"{speed:,.0f}" if speed is not None else "",
        ]
        lines.append(cells)
    return f"<div class=scores>{page.table(head, lines, numeric=range(2, len(head)))}</div>"


def _in_short(run: EvalRun, name: str) -> str:
    """The part of a task's setting that moves scores most, as one line."""
    settings = [run.tasks[member].get("setting") or {} for member in run.members(name) if member in run.tasks]
    if not settings or not settings[0]:
        return ""
    setting = settings[0]
    generation = setting.get("generation") or {}
    told = [f"{setting.get('num_fewshot', 0)}-shot", "chat template" if setting.get("chat") else "no chat template"]
    if generation:
        temperature = generation.get("temperature") or 0
        told.append(f"temperature {temperature:g}" if temperature else "greedy")
        told.append(f"stop {json.dumps(setting.get('stop'), ensure_ascii=False)}")
    if (extraction := setting.get("extraction")) and isinstance(extraction, list):
        told.append(f"read by {', '.join(str(part.get('name', '?')) for part in extraction)}")
    told.append(f"seed {setting.get('seed')}")
    return " · ".join(told)


def _compared(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 5
    color = {"better": "good", "worse": "bad"}.get(row.verdict, "")
    test = row.mcnemar
    return [
        f'<span class="{color}">{row.difference:+.4f}</span>',
        f"{row.low:+.4f} to {row.high:+.4f}",
        _p(row.p),
        "" if test is None else f"+{test.gained:,} / −{test.lost:,}",
        "" if test is None else _p(test.p),
    ]


def _p(value: float) -> str:
    return "" if np.isnan(value) else "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def _warnings(comparison: Comparison) -> str:
    return f"<div class=warnings>{_list(comparison.warnings)}</div>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{page.text(line)}</li>" for line in lines) + "</ul>"


def _browser(tasks: Mapping[str, Any]) -> str:
    if not tasks:
        return "<p>This run has no samples.</p>"
    return """<div class="controls">
<label>task <select id="task"></select></label> <label>show <select id="filter"></select></label>
<label>order <select id="sort"><option value="order">of the data</option><option value="low">lowest score first</option>
<option value="high">highest score first</option><option value="change">largest change first</option></select></label>
<input type="search" id="search" placeholder="search in prompts, answers and documents" aria-label="search">
<span id="count" class="quiet" role="status"></span></div>
<div class="browser"><div class="list" id="list" tabindex="0" role="listbox" aria-label="samples">
<div class="space" id="space"></div></div>
<div class="detail" id="detail"></div></div>"""


def _facts(ours: EvalRun, theirs: EvalRun | None, names: tuple[str, str]) -> str:
    shown = []
    for run, name in ((ours, names[0]), (theirs, names[1])):
        if run is not None:
            facts = {key: value for key, value in run.results.items() if key != "tasks"}
            shown.append(
                f"<p>{page.text(name)}</p><pre>{page.text(json.dumps(facts, indent=1, ensure_ascii=False))}</pre>"
            )
    return "".join(shown)


def _pictures(ours: EvalRun, theirs: EvalRun | None, names: tuple[str, str]) -> list[str]:
    """Heat maps of needle tasks, and loss by position."""
    maps = []
    for name in ours.leaves():
        for run, whose in ((ours, names[0]), (theirs, names[1])):
            if run is not None and name in run.tasks and "depth" in (_first_doc(run, name) or {}):
                drawing = needle_heat_map(run.samples(name), name)
                maps.append(f"<figure>{drawing}<figcaption>{page.text(whose)}</figcaption></figure>" if drawing else "")
    drawn = [drawing for drawing in maps if drawing]
    drawn += [_by_position(name, ours, theirs, names) for name in ours.leaves() if _positions(ours, name)]
    return [page.section("Length and position", f"<div class=pictures>{''.join(drawn)}</div>")] if drawn else []


def _first_doc(run: EvalRun, name: str) -> Mapping[str, Any] | None:
    sample = next(run.samples(name), None)
    return sample["doc"] if sample is not None and isinstance(sample.get("doc"), Mapping) else None


def _positions(run: EvalRun, name: str) -> list[tuple[int, float]]:
    """(last position, nats a token) of each bin of a task with metrics nll_FROM_TO."""
    found = []
    for metric, value in (run.tasks.get(name, {}).get("metrics") or {}).items():
        match = re.fullmatch(r"nll_(\d+)_(\d+)", metric)
        if match and value.get("value") is not None:
            found.append((int(match[2]), float(value["value"])))
    return sorted(found)


def _by_position(name: str, ours: EvalRun, theirs: EvalRun | None, names: tuple[str, str]) -> str:
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for run, whose in ((ours, names[0]), (theirs, names[1])):
        if run is not None and (points := _positions(run, name)):
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=whose)
    axis.set(xlabel="position, tokens", ylabel="nats per token", title=name, xscale="log")
    axis.grid(alpha=0.25)
    axis.legend()
    return page.svg(figure)
