"""report.html: what the demo did, in one file that needs no network.

Text from corpus and models is escaped; figures are inline SVG. Numbers come from the stages' results and the runs'
metrics.jsonl, never from here.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from qwench.demo.pipeline import Context, Results
from qwench.run import provenance, read_metrics

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a9d63; --bad: #c8553d; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .93em; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; background: var(--soft); border-radius: 4px; }
code { padding: .1em .3em; overflow-wrap: anywhere; } pre { padding: .8rem; overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5em; } .right { color: var(--good); } .wrong { color: var(--bad); }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } .wrap { overflow-x: auto; }
"""


def write_report(context: Context) -> Results:
    from qwench.demo.stages import STAGES

    results = context.results
    titles = {stage.name: stage.title for stage in STAGES}
    commands = {stage.name: stage.command(context.cfg) for stage in STAGES}
    body = [
        _cards(results),
        _section("What was done", _stage_table(results, titles, commands)),
        _section("Text", _corpus(results["collect"], results["clean"])),
        _section("Tokenizer", _tokenizer(results["tokenizer"], results["shards"])),
        _section("Training", _training(context)),
        _section("Bits per byte of held-out text", _compression(results["evaluate"]["bits_per_byte"])),
        _section("Before and after fine-tuning", _scores(results["evaluate"])),
        _section("Conversations learnt from", _conversations(results["conversations"])),
        _section("The saved model", _model(context, results["export"])),
        _section("Where this ran", f"<pre>{_text(json.dumps(provenance(), indent=2))}</pre>"),
    ]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>qwench demo</title><style>{STYLE}</style></head><body>
<h1>qwench demo</h1><p>Raw text in, a chat model out: one run of the whole recipe on this machine.</p>
{"".join(body)}
</body></html>
"""
    path = context.path("report.html")
    path.write_text(page, encoding="utf-8")
    return {"summary": f"{path} ({len(page.encode()) / 1e3:.0f} kB, one offline file)", "path": str(path)}


# ------------------------------------------------------------------------------------------------------------- pieces
def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in `numeric` are aligned right."""

    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{' class=n' if place in numeric else ''}>{cell}</{tag}>" for place, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    return f'<div class="wrap"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    # No date in the file: the same run gives the same report.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _cards(results: dict[str, Results]) -> str:
    scores, bits = results["evaluate"]["scores"], results["evaluate"]["bits_per_byte"]
    seconds = sum(result.get("seconds", 0) for result in results.values())
    cards = [
        ("time", f"{seconds / 60:.1f} min", "all stages"),
        ("parameters", f"{results['pretrain']['parameters'] / 1e6:.1f} M", "Qwen2.5 shape"),
        ("bits per byte", f"{bits['model']:.3f}", f"xz {bits['xz -9e']:.3f}"),
        ("held-out sums", f"{scores['after']['sums']:.0%}", f"{scores['before']['sums']:.0%} before fine-tuning"),
        ("pretraining", f"{results['pretrain']['tokens_per_s']:,.0f}", "tokens a second"),
    ]
    inner = "".join(
        f'<div class="card">{_text(name)}<b>{_text(value)}</b>{_text(note)}</div>' for name, value, note in cards
    )
    return f'<div class="cards">{inner}</div>'


def _stage_table(results: dict[str, Results], titles: dict[str, str], commands: dict[str, str]) -> str:
    def cells(name: str, title: str) -> list[str]:
        result = results.get(name, {})
        speed = result.get("tokens_per_s")
        command = f"<br><code>{_text(commands[name])}</code>" if commands[name] else ""
        return [
            _text(title),
            _text(result.get("summary", "this page")) + command,
            f"{speed:,.0f}" if speed else "",
            f"{result.get('seconds', 0):.1f}" if name in results else "",
        ]

    rows = [cells(name, title) for name, title in titles.items()]
    return _table(["stage", "result and command", "tokens/s", "seconds"], rows, numeric=(2, 3))


def _corpus(collect: Results, clean: Results) -> str:
    rows = [
        [_text(s["source"]), _text(s["kind"] or "text"), f"{s['documents']:,}", f"{s['bytes'] / 1e6:.2f}"]
        for s in collect["sources"]
    ]
    total = sum(clean["kinds"].values()) or 1
    shares = ", ".join(f"{_text(kind)} {size / total:.0%}" for kind, size in clean["kinds"].items())
    reasons = [[_text(reason), f"{count:,}"] for reason, count in sorted(clean["reasons"].items()) if count]
    return (
        _table(["source", "kind", "documents", "MB"], rows, numeric=(2, 3))
        + f"<p>{_text(clean['summary'])}. By kind: {shares}.</p>"
        + (_table(["dropped for", "count"], reasons, numeric=(1,)) if reasons else "")
    )


def _tokenizer(tokenizer: Results, shards: Results) -> str:
    longest = " ".join(f"<code>{_text(json.dumps(token, ensure_ascii=False))}</code>" for token in tokenizer["longest"])
    return f"<p>{_text(tokenizer['summary'])}. {_text(shards['summary'])}. The longest tokens: {longest}</p>"


def _training(context: Context) -> str:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, name, title in zip(axes, ("pretrain", "sft"), ("Pretraining", "Fine-tuning"), strict=True):
        records = read_metrics(context.path(name))
        losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
        checks = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        axis.plot(*zip(*losses, strict=True), color="#4a7fb5", linewidth=0.9, label="training")
        if checks:
            axis.plot(*zip(*checks, strict=True), "o-", color="#c8553d", markersize=4, label="held out")
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.grid(alpha=0.25)
        axis.legend()
        if name == "sft":
            axis.set_yscale("log")
    rows = [
        [
            title,
            f"{r['steps']:,}",
            f"{r['tokens'] / 1e6:.2f} M",
            f"{r['val_loss']:.3f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['mfu']:.1%}",
            str(r["skipped_steps"]),
        ]
        for name, title in (("pretrain", "pretraining"), ("sft", "fine-tuning"))
        for r in [context.results[name]]
    ]
    head = ["", "steps", "tokens", "held-out loss", "tokens/s", "MFU", "skipped steps"]
    result = context.results["pretrain"]
    ops = ", ".join(f"{name} {choice}" for name, choice in result["ops"].items())
    note = (
        f"<p>Activations in {_text(result['precision'])}, weights in float32. Operations: {_text(ops)}. "
        "MFU is the share of this machine's measured matrix-product rate that the model's own operations reach.</p>"
    )
    return _svg(figure) + _table(head, rows, numeric=range(1, 7)) + note


def _compression(bits: dict[str, float]) -> str:
    ordered = sorted(bits.items(), key=lambda item: item[1])
    figure, axis = plt.subplots(figsize=(8, 2.2))
    names = [name for name, _ in ordered][::-1]
    bars = axis.barh(
        names, [bits[name] for name in names], color=["#2a9d63" if n == "model" else "#9db4c8" for n in names]
    )
    axis.bar_label(bars, fmt="%.3f", padding=3)
    axis.set(xlabel="bits per byte (less is better)", xlim=(0, max(bits.values()) * 1.12))
    note = (
        "<p>The same held-out documents for all. The model pays for every token, the closing one of each document "
        "included; compressors read the documents joined; the unigram model knows the token frequencies of the "
        "training text.</p>"
    )
    return _svg(figure) + note


def _scores(evaluation: Results) -> str:
    scores = evaluation["scores"]
    rows = [[_text(name), f"{scores['before'][name]:.1%}", f"{scores['after'][name]:.1%}"] for name in scores["before"]]
    samples = [
        [
            _text(sample["task"]),
            _text(sample["question"]),
            f'<span class="answer">{_text(sample["before"])}</span>',
            f'<span class="answer {"right" if sample["right"] else "wrong"}">{_text(sample["after"])}</span>',
        ]
        for sample in evaluation["samples"]
    ]
    return (
        _table(["share of answers that are right, or have the form asked for", "before", "after"], rows, numeric=(1, 2))
        + "<p>The sums and the documented functions below were never in the training data. Greedy answers.</p>"
        + _table(["task", "question", "before", "after"], samples)
    )


def _conversations(conversations: Results) -> str:
    rows = [[_text(e["task"]), _text(e["question"]), _text(e["answer"])] for e in conversations["examples"]]
    return f"<p>{_text(conversations['summary'])}. One of each:</p>" + _table(["task", "question", "answer"], rows)


def _model(context: Context, export: Results) -> str:
    files = ", ".join(f"<code>{_text(name)}</code>" for name in export["files"])
    shape = _text(json.dumps(export["config"], indent=2))
    return (
        f"<p>{_text(export['summary'])}. Files: {files}.</p>"
        f"<p>Talk to it: <code>qwench chat {_text(context.path('model'))}</code></p><pre>{shape}</pre>"
    )
