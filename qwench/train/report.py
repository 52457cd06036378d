"""RUN/report.html of a training run, one offline file with what it has recorded; `qwench report RUN` writes it.

Everything comes from the run's own files: metrics.jsonl, profile.json, provenance.json, config.toml. Works at any time,
also while the run goes on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from qwench import page
from qwench.run import read_metrics, write_atomically

Record = dict[str, Any]
Curve = tuple[list[int], list[float]]
BLUE, RED, GREY = "#4a7fb5", "#c8553d", "#9db4c8"
POINTS = 2000
"""Of a curve in the page; longer ones are means of as many stretches."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html. Raises ValueError if `run` has recorded nothing."""
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} has no metrics.jsonl; give the directory of a run (out=... of its recipe)")
    records = read_metrics(run)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise ValueError(f"{run} has not recorded a step yet")
    facts, profile = _json(run / "provenance.json"), _json(run / "profile.json")
    body = [
        page.cards(_cards(steps, records, facts)),
        page.section("Curves", _curves(steps, records)),
        page.section("Mini-suite", _mini(records)) if any("mini" in record for record in records) else "",
        page.section("Skipped steps", _skipped(steps)),
        page.section("Where the time goes", _profile(profile)) if profile else "",
        page.section("Recipe", f"<pre>{page.text(_read(run / 'config.toml'))}</pre>"),
        page.section("Where this ran", f"<pre>{page.text(json.dumps(facts, indent=2))}</pre>"),
    ]
    path = run / "report.html"
    lead = f"{len(steps):,} recorded steps of {page.text(facts.get('command', 'a training run'))}"
    write_atomically(path, page.document(f"Run {run.resolve().name}", lead, body))
    return path


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_read(path) or "{}")


# -------------------------------------------------------------------------------------------------------------- pieces
def _cards(steps: Sequence[Record], records: Sequence[Record], facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    losses = [(r["step"], r["loss"]) for r in steps if r["loss"] is not None and "skipped" not in r]
    checks = [r["val_loss"] for r in records if r.get("val_loss") is not None]
    entries = [("steps", f"{steps[-1]['step']:,}", f"{facts.get('parameters', 0) / 1e6:,.1f} M parameters")]
    if losses:
        note = f"held out {checks[-1]:.4f}, best {min(checks):.4f}" if checks else "nats per token"
        entries.append(("training loss", f"{losses[-1][1]:.4f}", note))
    rates = [r["tokens_per_s"] for r in steps if r.get("tokens_per_s")]
    if rates:
        entries.append(("tokens a second", f"{statistics.median(rates):,.0f}", "median of the recorded steps"))
    utilisation = [r["mfu"] for r in steps if r.get("mfu") is not None]
    of_products = [r["mfu_of_gemm"] for r in steps if r.get("mfu_of_gemm") is not None]
    if utilisation:
        note = f"{statistics.median(of_products):.1%} of the measured products" if of_products else ""
        entries.append(("MFU", f"{statistics.median(utilisation):.1%}", note))
    memory = [r["peak_memory_gib"] for r in steps if r.get("peak_memory_gib") is not None]
    if memory:
        entries.append(("peak memory", f"{max(memory):.1f} GiB", "of the first GPU"))
    return entries


def _curves(steps: Sequence[Record], records: Sequence[Record]) -> str:
    checks = _points(records, "val_loss")
    sources = sorted({name for record in steps for name in record.get("loss_by_source") or {}})
    drawn = [("grad_norm", "gradient norm"), ("lr", "learning rate"), ("tokens_per_s", "tokens a second")]
    drawn += [
        (key, title) for key, title in (("mfu", "MFU"), ("peak_memory_gib", "peak memory, GiB"), ("z_loss", "z-loss"))
    ]
    shown = [(key, title) for key, title in drawn if _points(steps, key)[0]]
    number = 1 + bool(sources) + len(shown)
    figure, grid = plt.subplots(-(-number // 2), 2, figsize=(10, 3.0 * -(-number // 2)), squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for axis in axes[number:]:
        axis.set_visible(False)
    first, *rest = axes
    _draw(first, _points(steps, "loss"), "training", BLUE)
    if checks[0]:
        first.plot(*checks, "o-", color=RED, markersize=3, linewidth=1, label="held out")
    first.set(ylabel="nats per token")
    first.legend()
    if sources:
        axis = rest.pop(0)
        for name in sources:
            values = [{"step": r["step"], "value": (r.get("loss_by_source") or {}).get(name)} for r in steps]
            _draw(axis, _points(values, "value"), name, None)
        axis.set(ylabel="loss by source")
        axis.legend(fontsize="small")
    for axis, (key, title) in zip(rest, shown, strict=False):
        _draw(axis, _points(steps, key), None, BLUE)
        axis.set(ylabel=title)
        if key == "grad_norm":
            axis.set_yscale("log")
        if key in ("mfu", "peak_memory_gib", "tokens_per_s"):
            axis.set_ylim(bottom=0)
    for axis in axes[:number]:
        axis.set(xlabel="step")
        axis.grid(alpha=0.25)
    return page.svg(figure)


def _mini(records: Sequence[Record]) -> str:
    """Scores of the mini-suite over the steps; bits per byte by themselves, as their scale is another."""
    names = list(dict.fromkeys(name for r in records for name in r.get("mini") or {} if name != "seconds"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.0), squeeze=False)
    for name in names:
        values = [{"step": r["step"], "value": r["mini"].get(name)} for r in records if r.get("mini")]
        axis = axes[0, int(name == "bits_per_byte")]
        axis.plot(*_points(values, "value"), "o-", markersize=3, linewidth=1, label=name)
    for axis, title in zip(axes.flat, ("score", "bits per byte"), strict=True):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize="small")
    return page.svg(figure)


def _points(records: Sequence[Record], key: str) -> Curve:
    """Steps and values of a metric; thinned out to means, which keep level and shape."""
    found = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
    width = -(-len(found) // POINTS)
    stretches = [found[start : start + width] for start in range(0, len(found), width)] if found else []
    return [part[-1][0] for part in stretches], [statistics.fmean(value for _, value in part) for part in stretches]


def _draw(axis: Axes, curve: Curve, label: str | None, color: str | None) -> None:
    axis.plot(*curve, color=color, linewidth=0.9, label=label)


def _skipped(steps: Sequence[Record]) -> str:
    rows = [[f"{r['step']:,}", page.text(r["skipped"])] for r in steps if "skipped" in r]
    if not rows:
        return "<p>None.</p>"
    more = f"<p>The first 50 of {len(rows)}.</p>" if len(rows) > 50 else ""
    return page.table(["step", "reason"], rows[:50], numeric=(0,)) + more


def _profile(profile: dict[str, Any]) -> str:
    shares, missing = profile["shares"], profile["missing"]
    names = [name for name, share in shares.items() if share > 0][::-1]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.32 * len(names)))
    bars = axis.barh(names, [100 * shares[name] for name in names], color=[RED if n == "idle" else GREY for n in names])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set(xlabel="share of the steps' time, %", xlim=(0, 112 * max(shares.values())))
    rows = [
        [page.text(name), f"{shares[name]:.1%}", f"{missing[name]:.1%}"]
        for name in sorted(shares, key=lambda name: -missing[name])
        if shares[name] or missing[name]
    ]
    longest = [
        [page.text(e["category"]), f"<code>{page.text(e['name'][:140])}</code>", f"{e['ms']:.3f}", f"{e['share']:.1%}"]
        for e in profile["largest"]
    ]
    peak = profile["peak_flops"]
    last = profile["first_step"] + profile["steps"] - 1
    note = (
        f"<p>Steps {profile['first_step']} to {last} on {page.text(profile['device'])}, "
        f"{1e3 * profile['seconds_per_step']:.1f} ms each: MFU {profile['mfu']:.1%} of {peak['value'] / 1e12:,.1f} "
        f"TFLOP/s ({page.text(peak['source'])}), {profile['mfu_of_gemm']:.1%} of the "
        f"{profile['gemm_flops'] / 1e12:,.1f} TFLOP/s that matrix products were measured to sustain. The second column "
        "is the time that a step at that rate would not "
        f"need; it adds up to {1 - profile['mfu_of_gemm']:.1%}. Communication that something hides is not counted.</p>"
    )
    return (
        note
        + page.svg(figure)
        + page.table(["", "share of the time", "missing to the measured rate"], rows, numeric=(1, 2))
        + page.table(["category", "what ran longest", "ms a step", "share"], longest, numeric=(2, 3))
    )
