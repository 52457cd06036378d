"""OUT/report.html of a run of `qwench data`: one offline page with what was read, dropped, kept and mixed, and why.

Everything comes from the run's own files: summary.json, the part files below work/ (`pipeline.findings`),
skipped.jsonl, config.toml. Texts of documents are untrusted: each is cut and escaped.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwench import page
from qwench.data.pipeline.findings import DEDUP_COUNTS, Findings, ReasonFindings, Shown, StageFindings, read_findings
from qwench.data.pipeline.models_job import BINS
from qwench.run import write_atomically

SUMMARY = "summary.json"
_LANGS, _REASONS, _SKIPPED = 15, 60, 50
_PAIR_CHARS = 900
_KNOWN = {"plan", "prepare", "dedup", "models", "decontaminate", "documents", "tokens", "mixture", "stages", "seconds"}
_STYLE = """
.bar { display: inline-block; height: .7em; background: #4a7fb5; border-radius: 2px; vertical-align: middle; }
svg.h { background: none; border-radius: 0; vertical-align: bottom; color: #4a7fb5; } svg.h.d { color: #c8553d; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88em; background: var(--soft); padding: .5rem;
border-radius: 4px; max-height: 16rem; overflow-y: auto; margin: .3rem 0 .8rem; } .id { overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } .pair > div { min-width: 0; }
ins, del { text-decoration: none; border-radius: 2px; } ins { background: #2a9d6355; } del { background: #c8553d55; }
pre.wrap { white-space: pre-wrap; }
details { margin: .2rem 0; } summary { cursor: pointer; } .cell { overflow-wrap: anywhere; }
.wide { display: inline-block; width: 18rem; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
"""


def is_data_run(out: Path) -> bool:
    """Whether `out` holds a finished run of `qwench data`."""
    return (out / SUMMARY).is_file() and (out / "plan.json").is_file()


def write_report(out: Path) -> Path:
    """Write OUT/report.html. Raises ValueError if `out` holds no finished run of the pipeline."""
    if not is_data_run(out):
        raise ValueError(f"{out} holds no finished run of qwench data (no {SUMMARY}); give its out=")
    summary = json.loads((out / SUMMARY).read_bytes())
    found = read_findings(out, summary)
    body = [
        f"<style>{_STYLE}</style>",
        page.cards(_cards(summary, found)),
        page.section("Funnel", _funnel(summary, found)),
        page.section("By language", _by_label(found, 0)),
        page.section("By domain", _by_label(found, 1)),
        page.section("What was dropped, and why", _dropped(found.dropped)),
        page.section("What was changed inside documents", _inside(summary)) if summary["prepare"]["inside"] else "",
        page.section("Scores", scores) if (scores := _scores(summary, found.scores)) else "",
        page.section("Duplicates", _duplicates(summary["dedup"], found)) if "dedup" in summary else "",
        page.section("Contamination", _contamination(out, summary["decontaminate"]))
        if "decontaminate" in summary
        else "",
        page.section("Mixture", _mixture(summary["mixture"])) if "mixture" in summary else "",
        page.section("What is left", _kept(found.kept)),
        *(page.section(f"Stage {name}", _other(summary[name])) for name in summary if name not in _KNOWN),
        page.section("What could not be read", _skipped(out, summary["prepare"])),
        page.section("Speed and memory", _speed(summary, found)),
        page.section("Recipe", _file(out / "config.toml")) if (out / "config.toml").is_file() else "",
        page.section("Where this ran", _file(out / "provenance.json")) if (out / "provenance.json").is_file() else "",
    ]
    sources = ", ".join(page.text(entry["source"]) for entry in summary["plan"]["sources"])
    lead = f"{summary['plan']['bytes'] / 1e6:,.1f} MB of input from {sources}."
    path = out / "report.html"
    write_atomically(path, page.document(f"Data: {out.resolve().name}", lead, body))
    return path


# ------------------------------------------------------------------------------------------------------ cards, funnel
def _cards(summary: Mapping[str, Any], found: Findings) -> list[tuple[str, str, str]]:
    prepare, left = summary["prepare"], summary["documents"]
    entries = [
        ("read", f"{prepare['documents']:,}", f"documents, {prepare['text_bytes'] / 1e6:,.1f} MB of text"),
        ("left", f"{left['documents']:,}", f"documents, {left['bytes'] / 1e6:,.1f} MB of text"),
    ]
    if "tokens" in summary:
        entries.append(("tokens", f"{summary['tokens']['tokens'] / 1e6:,.2f} M", "before mixing"))
    rate = summary["plan"]["bytes"] / 1e6 / max(summary["seconds"], 1e-9)
    reused = sum(entry["reused"] for entry in summary.get("stages", []))
    note = f"{rate:,.1f} MB/s of input" if not reused else f"{reused} items were there from before"
    entries.append(("time", f"{summary['seconds']:,.1f} s", note))
    if peak := max((stage.peak_mb for stage in found.stages), default=0.0):
        entries.append(("memory", f"{peak:,.0f} MB", "highest of one process"))
    return entries


def _steps(found: Findings) -> list[tuple[str, Counter[tuple[str, str]], int | None]]:
    """(name, documents by language and kind, bytes) from what was read to what is left."""
    rows: list[tuple[str, Counter[tuple[str, str]], int | None]] = []
    for stage in found.stages:
        if not stage.rewrites and not stage.dropped:
            continue
        if not rows:
            rows.append(("read", stage.kept + stage.dropped, None))
        left = stage.kept if stage.rewrites else rows[-1][1] - stage.dropped
        rows.append((stage.name, left, stage.kept_bytes if stage.rewrites else None))
    return rows


def _funnel(summary: Mapping[str, Any], found: Findings) -> str:
    steps = _steps(found)
    if not steps:
        return "<p>No stage has left documents.</p>"
    first = max(1, steps[0][1].total())
    first_bytes = max(1, summary["prepare"]["text_bytes"])
    rows = []
    for place, (name, documents, size) in enumerate(steps):
        size = summary["prepare"]["text_bytes"] if place == 0 else size
        before = steps[place - 1][1].total() if place else documents.total()
        rows.append(
            [
                page.text("read" if place == 0 else f"after {name}"),
                f"{documents.total():,}",
                f"{before - documents.total():,}" if place else "",
                f"{documents.total() / first:.1%}",
                f"{size / 1e6:,.2f}" if size is not None else "",
                f"{size / first_bytes:.1%}" if size is not None else "",
                _bar((size or 0) / first_bytes),
            ]
        )
    head = ["", "documents", "fewer", "share", "MB of text", "share", ""]
    return page.table(head, rows, numeric=range(1, 6))


def _bar(share: float, rem: float = 9.0) -> str:
    return f'<span class="bar" style="width:{max(0.0, min(1.0, share)) * rem:.2f}rem"></span>'


def _by_label(found: Findings, which: int) -> str:
    """Documents after each stage by language (0) or kind (1)."""
    steps = _steps(found)
    if not steps:
        return ""
    tables = []
    for _, documents, _ in steps:
        table: Counter[str] = Counter()
        for label, count in documents.items():
            table[label[which]] += count
        tables.append(table)
    names = sorted(tables[0] | tables[-1], key=lambda name: (-tables[0][name], name))
    shown, rest = names[:_LANGS], names[_LANGS:]
    rows = []
    for name in shown:
        left = tables[-1][name] / tables[0][name] if tables[0][name] else 0.0
        rows.append([page.text(name or "(none)"), *(f"{table[name]:,}" for table in tables), f"{left:.1%}", _bar(left)])
    if rest:
        sums = [sum(table[name] for name in rest) for table in tables]
        left = sums[-1] / max(1, sums[0])
        rows.append([f"{len(rest)} others", *(f"{count:,}" for count in sums), f"{left:.1%}", _bar(left)])
    head = ["", "read", *(f"after {name}" for name, _, _ in steps[1:]), "left", ""]
    note = "<p>Documents; as the last stage that has seen them names them."
    note += " Source code and conversations need have none.</p>" if which == 0 else "</p>"
    return note + page.table(head, rows, numeric=range(1, len(head) - 1))


# ------------------------------------------------------------------------------------------------------------- dropped
def _dropped(reasons: Mapping[tuple[str, str], ReasonFindings]) -> str:
    if not reasons:
        return "<p>Nothing.</p>"
    total = sum(found.count for found in reasons.values())
    rows = []
    for (stage, reason), found in list(reasons.items())[:_REASONS]:
        samples = "".join(_sample(document) for document in found.samples)
        shown = f"<details><summary>{len(found.samples)} of them</summary>{samples}</details>"
        rows.append(
            [
                page.text(stage),
                f'<span class="cell">{page.text(reason)}</span>{shown}',
                f"{found.count:,}",
                f"{found.count / total:.1%}",
                _histogram(found.values) + _range(found.values),
            ]
        )
    more = len(reasons) - _REASONS
    note = f"<p>{more} rarer reasons are left out.</p>" if more > 0 else ""
    head = ["stage", "reason", "documents", "share", "measured value"]
    return page.table(head, rows, numeric=(2, 3)) + note


def _sample(document: Shown) -> str:
    labels = ", ".join(filter(None, (document.source, document.kind, document.lang)))
    value = f", value {document.value:.4g}" if document.value is not None else ""
    cut = " ..." if document.chars > len(document.text) else ""
    return (
        f'<div class="id"><code>{page.text(document.id)}</code> {page.text(labels)}, {document.chars:,} characters'
        f'{value}</div><div class="text">{page.text(document.text)}{cut}</div>'
    )


def _histogram(values: np.ndarray, *, bins: int = 28, width: int = 140, height: int = 34, other: bool = False) -> str:
    """Bars of a sample of values, cut at its 1st and 99th percentile."""
    if not len(values):
        return ""
    low, high = np.percentile(values, [1, 99]).tolist()
    if not low < high:
        return ""
    counts, _ = np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))
    return _bars(counts, width, height, other)


def _bars(counts: np.ndarray, width: int, height: int, other: bool = False) -> str:
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{height - top:.1f}" width="{step * 0.85:.1f}" height="{top:.1f}"/>'
        for place, top in enumerate((counts / max(1, counts.max()) * (height - 2)).tolist())
        if top
    )
    style = "h d" if other else "h"
    return (
        f'<svg class="{style}" width="{width}" height="{height}" viewBox="0 0 {width} {height}" fill="currentColor" '
        f'role="img" aria-label="histogram">{bars}</svg>'
    )


def _range(values: np.ndarray) -> str:
    if not len(values):
        return ""
    low, middle, high = values.min(), np.median(values), values.max()
    text = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"
    return f"<br><small>{text}</small>"


def _inside(summary: Mapping[str, Any]) -> str:
    rows = [[page.text(name), f"{count:,}"] for name, count in summary["prepare"]["inside"].items()]
    return page.table(["replaced (pii) or removed (lines)", "times"], rows, numeric=(1,))


def _scores(summary: Mapping[str, Any], sampled: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """What models measured on all documents, and other numbers in documents' meta as a sample shows them."""
    rows, parts = [], []
    measured = {
        name: bins
        for stage in summary.values()
        if isinstance(stage, Mapping)
        for name, bins in stage.get("scores", {}).items()
    }
    for name, bins in measured.items():
        rows.append([page.text(name), "all", f"{sum(bins.values()):,}", _binned(bins)])
    for name, sides in sampled.items():
        for side, values in sides.items():
            if len(values):
                shape = _histogram(values, bins=48, width=240, height=44, other=side == "dropped") + _range(values)
                rows.append([page.text(name), f"sample of {side}", f"{len(values):,}", shape])
    if rows:
        parts.append(page.table(["score", "of documents", "documents", "distribution"], rows, numeric=(2,)))
    for stage in summary.values():
        if isinstance(stage, Mapping) and stage.get("kinds"):
            kinds = [[page.text(kind or "(none)"), f"{count:,}"] for kind, count in _most(stage["kinds"])]
            parts.append(page.table(["domain given by a model", "documents"], kinds, numeric=(1,)))
    return "".join(parts)


def _binned(bins: Mapping[str, int]) -> str:
    """Bars of documents by the lower edge of their score's bin, cut at the 99th percentile."""
    edges = np.array(sorted(map(float, bins)))
    documents = np.array([bins[name] for name in sorted(bins, key=float)])
    low, last = edges[0], edges[np.searchsorted(np.cumsum(documents), 0.99 * documents.sum())]
    num = min(120, round((last - low) * BINS) + 1)
    places = np.minimum((edges - low) / (last - low + 1 / BINS) * num + 1e-9, num - 1).astype(np.int64)
    shape = _bars(np.bincount(places, documents, num), 240, 44)
    return f"{shape}<br><small>{low:g} to {edges[-1] + 1 / BINS:g}</small>"


def _contamination(out: Path, counts: Mapping[str, Any]) -> str:
    """Evaluation sets, and documents that were dropped because samples of them stand there."""
    sets = [[page.text(name), f"{count:,}"] for name, count in _most(counts.get("sets", {}))]
    told = [json.loads(line) for line in _first_lines(out / "contamination.jsonl", _SKIPPED)]
    rows = [
        [
            f'<span class="cell wide">{page.text(entry.get("document", ""))}<br>'
            f"<small>{page.text(entry.get('sample', ''))}</small></span>",
            f"{entry.get('share', 0):.2f}",
            f'<span class="cell">{page.text(str(entry.get("excerpt", ""))[:300])}</span>',
        ]
        for entry in told
    ]
    against = counts.get("against", {})
    lead = f"<p>Against {against.get('samples', 0):,} samples of {against.get('files', 0):,} files.</p>"
    if not rows:
        return lead + "<p>Nothing was found.</p>"
    return (
        lead
        + page.table(["evaluation set", "documents dropped"], sets, numeric=(1,))
        + page.table(["document, and the sample that stands in it", "share", "in common"], rows, numeric=(1,))
    )


# ---------------------------------------------------------------------------------------------------------- duplicates
def _indented(label: str) -> str:
    text = label.lstrip("> ")
    return f'<span style="padding-left:{1.4 * label.count(">")}rem">{page.text(text)}</span>'


def _duplicates(counts: Mapping[str, Any], found: Findings) -> str:
    known = [(label, counts[name]) for name, label in DEDUP_COUNTS.items() if counts.get(name)]
    further = [(name.replace("_", " "), value) for name, value in counts.items() if name not in DEDUP_COUNTS]
    said = [[_indented(label), f"{value:,}"] for label, value in [*known, *further] if isinstance(value, int) and value]
    sizes = {int(size): count for size, count in counts.get("sizes", {}).items()}
    most = max(sizes.values(), default=1)
    size_rows = [
        [f"{size:,}" if size == 2 * size - 1 else f"{size:,} to {2 * size - 1:,}", f"{count:,}", _bar(count / most)]
        for size, count in sorted(sizes.items())
    ]
    largest = [[f'<span class="cell">{page.text(name)}</span>', f"{size:,}"] for name, size in found.largest]
    parts = [page.table(["", "count"], said, numeric=(1,))]
    if size_rows:
        parts.append("<h3>Clusters by size</h3>" + page.table(["documents", "clusters", ""], size_rows, numeric=(1,)))
    if largest:
        parts.append("<h3>Largest clusters</h3>" + page.table(["who stayed", "documents"], largest, numeric=(1,)))
    if counts.get("s_curve"):
        parts.append(f"<h3>Near duplicates</h3>{_s_curve(counts)}")
    if found.pairs:
        parts.append(
            f"<h3>Pairs of near duplicates</h3><p>{len(found.pairs)} sampled ones, from the least alike to the most. "
            "On the left what stayed. <del>Only left</del>, <ins>only right</ins>.</p>"
        )
        parts += [_pair(pair) for pair in found.pairs]
    return "".join(parts)


def _s_curve(counts: Mapping[str, Any]) -> str:
    drawn = ""
    settings = counts.get("minhash")
    if settings:
        bands, rows = settings["bands"], settings["rows"]
        jaccard = np.linspace(0, 1, 101)
        points = " ".join(
            f"{20 + 400 * j:.1f},{210 - 200 * (1 - (1 - j**rows) ** bands):.1f}" for j in jaccard.tolist()
        )
        ticks = "".join(
            f'<text x="{20 + 400 * tick:.0f}" y="224" text-anchor="middle">{tick:g}</text>'
            f'<line x1="{20 + 400 * tick:.0f}" x2="{20 + 400 * tick:.0f}" y1="10" y2="210" stroke-opacity=".2"/>'
            for tick in (0, 0.25, 0.5, 0.75, 1)
        )
        drawn = (
            '<svg class="h" width="440" height="230" viewBox="0 0 440 230" fill="currentColor" stroke="none" '
            'font-size="11" role="img" aria-label="chance to find a pair by its Jaccard similarity">'
            f'<g stroke="currentColor" stroke-width=".5"><line x1="20" x2="420" y1="210" y2="210"/>'
            f'<line x1="20" x2="420" y1="10" y2="10" stroke-opacity=".2"/></g><g>{ticks}</g>'
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2"/></svg>'
            "<p>Chance that a pair becomes a candidate (0 to 1), by its Jaccard similarity.</p>"
        )
    return drawn + f'<pre class="wrap">{page.text(counts["s_curve"])}</pre>'


_PIECES = re.compile(
    r"\s+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]"
)


def _pair(pair: Mapping[str, Any]) -> str:
    left, right = pair["left_text"], pair["right_text"]
    same = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    start = max(0, same - 150) if same > 300 else 0
    sides = _marked(left[start : start + _PAIR_CHARS], right[start : start + _PAIR_CHARS])
    lead = f"... ({start:,} equal characters before)\n" if start else ""
    cells = ""
    for side, marked in zip(("left", "right"), sides, strict=True):
        cut = " ..." if len(pair[f"{side}_text"]) > start + _PAIR_CHARS else ""
        name = f'<div class="id"><code>{page.text(pair[f"{side}_id"])}</code></div>'
        cells += f'<div>{name}<div class="text">{lead}{marked}{cut}</div></div>'
    return f'<p>Jaccard {pair["jaccard"]:.3f}</p><div class="pair">{cells}</div>'


def _marked(left: str, right: str) -> tuple[str, str]:
    """Both texts as HTML with what only one of them has marked."""
    a, b = _PIECES.findall(left), _PIECES.findall(right)
    out_a, out_b = [], []
    for tag, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = page.text("".join(a[a1:a2])), page.text("".join(b[b1:b2]))
        out_a.append(old if tag == "equal" or not old else f"<del>{old}</del>")
        out_b.append(new if tag == "equal" or not new else f"<ins>{new}</ins>")
    return "".join(out_a), "".join(out_b)


# ------------------------------------------------------------------------------------------------------------- mixture
def _mixture(mixture: Mapping[str, Any]) -> str:
    available = mixture["available"]
    total = max(1, sum(available.values()))
    read = max(1, sum(mixture["tokens"].values()))
    rows = [
        [
            page.text(group),
            f"{tokens:,}",
            f"{tokens / total:.2%}",
            f"{mixture['tokens'][group]:,}",
            f"{mixture['tokens'][group] / read:.2%}",
            f"{mixture['epochs'][group]:.2f}",
            _bar(tokens / total, 5) + "<br>" + _bar(mixture["tokens"][group] / read, 5),
        ]
        for group, tokens in sorted(available.items(), key=lambda entry: -entry[1])
    ]
    head = ["group", "tokens there are", "share", "tokens read", "share", "epochs", "before, after"]
    parts = [page.table(head, rows, numeric=range(1, 6))]
    for phase in mixture["phases"]:
        all_tokens = max(1, sum(phase["tokens"].values()))
        phase_rows = [
            [page.text(group), f"{phase['targets'][group]:.2%}", f"{tokens / all_tokens:.2%}", f"{tokens:,}"]
            for group, tokens in sorted(phase["tokens"].items(), key=lambda entry: -entry[1])
        ]
        title = f"<h3>Phase {page.text(phase['name'])}: {all_tokens:,} tokens</h3>"
        parts.append(title + page.table(["group", "target", "achieved", "tokens"], phase_rows, numeric=(1, 2, 3)))
    if mixture.get("val_tokens"):
        parts.append(f"<p>{mixture['val_tokens']:,} further tokens are kept for validation.</p>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------- rest
def _kept(kinds: Mapping[str, Sequence[Shown]]) -> str:
    parts = []
    for kind, documents in kinds.items():
        samples = "".join(_sample(document) for document in documents)
        parts.append(f"<details><summary>{page.text(kind or '(none)')}</summary>{samples}</details>")
    return "<p>A few documents of each domain.</p>" + "".join(parts)


def _other(counts: Any) -> str:
    """What a stage said that this page has no form for."""
    if isinstance(counts, Mapping) and counts and all(isinstance(v, (int, float, str)) for v in counts.values()):
        rows = [
            [page.text(name), page.text(f"{value:,}" if isinstance(value, int) else value)]
            for name, value in counts.items()
        ]
        return page.table(["", ""], rows, numeric=(1,))
    shown = json.dumps(counts, indent=1, ensure_ascii=False)
    return f"<pre>{page.text(shown[:8000])}{' ...' if len(shown) > 8000 else ''}</pre>"


def _skipped(out: Path, prepare: Mapping[str, Any]) -> str:
    if not prepare["skipped"]:
        return "<p>Everything could be read.</p>"
    by_reason = [[page.text(reason), f"{n:,}"] for reason, n in _most(prepare["skip_reasons"])]
    entries = [json.loads(line) for line in _first_lines(out / "skipped.jsonl", _SKIPPED)]
    rows = [[f'<span class="cell">{page.text(e["id"])}</span>', page.text(e["reason"])] for e in entries]
    left = prepare["skipped"] - len(rows)
    more = f"<p>{left:,} more are in skipped.jsonl.</p>" if left > 0 else ""
    return page.table(["reason", "inputs"], by_reason, numeric=(1,)) + page.table(["input", "reason"], rows) + more


def _most(table: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(table.items(), key=lambda entry: (-entry[1], entry[0]))


def _first_lines(path: Path, most: int) -> Iterable[bytes]:
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line, _ in zip(file, range(most), strict=False))


def _speed(summary: Mapping[str, Any], found: Findings) -> str:
    entries = {entry["stage"]: entry for entry in summary.get("stages", [])}
    rows = [_speed_row(stage, entries.get(stage.name, {})) for stage in found.stages]
    head = ["stage", "items", "MB of work", "seconds", "MB/s", "seconds of work", "MB/s a core", "MB of memory"]
    note = (
        "<p>Seconds are this run's, in which finished items of an earlier one are not done again; seconds of work are "
        "what all items took, whenever that was. Bytes are those that a stage reads (text, hashes or tokens). Memory "
        "is the highest that a process had reached by the end of an item.</p>"
    )
    return note + page.table(head, rows, numeric=range(1, 8))


def _speed_row(stage: StageFindings, entry: Mapping[str, Any]) -> list[str]:
    size, seconds = entry.get("bytes", 0) / 1e6, entry.get("seconds", 0.0)
    new = entry.get("new_bytes", 0) / 1e6
    return [
        page.text(stage.name),
        f"{stage.items:,}" + (f" ({entry['reused']:,} reused)" if entry.get("reused") else ""),
        f"{size:,.1f}" if size else "",
        f"{seconds:,.1f}",
        f"{new / seconds:,.1f}" if new and seconds else "",
        f"{stage.work_seconds:,.1f}",
        f"{size / stage.work_seconds:,.1f}" if size and stage.work_seconds else "",
        f"{stage.peak_mb:,.0f}" if stage.peak_mb else "",
    ]


def _file(path: Path) -> str:
    shown = page.text(path.read_text(encoding="utf-8"))
    return f"<details><summary>{page.text(path.name)}</summary><pre>{shown}</pre></details>"
