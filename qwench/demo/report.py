"""report.html: what the demo did, in one file that needs no network.

Text from corpus and models is escaped; figures are inline SVG. Numbers come from the stages' results and the runs'
metrics.jsonl, never from here.
"""

from __future__ import annotations

import json

import matplotlib.pyplot as plt

from qwench import page
from qwench.demo.pipeline import Context, Results
from qwench.run import provenance, read_metrics


def write_report(context: Context) -> Results:
    from qwench.demo.stages import STAGES

    results = context.results
    titles = {stage.name: stage.title for stage in STAGES}
    commands = {stage.name: stage.command(context.cfg) for stage in STAGES}
    body = [
        _cards(results),
        page.section("What was done", _stage_table(results, titles, commands)),
        page.section("Text", _corpus(results["collect"], results["clean"])),
        page.section("Tokenizer", _tokenizer(results["tokenizer"], results["shards"])),
        page.section("Training", _training(context)),
        page.section("Bits per byte of held-out text", _compression(results["evaluate"]["bits_per_byte"])),
        page.section("Before and after fine-tuning", _scores(results["evaluate"])),
        page.section("Conversations learnt from", _conversations(results["conversations"])),
        page.section("The saved model", _model(context, results["export"])),
        page.section("Where this ran", f"<pre>{page.text(json.dumps(provenance(), indent=2))}</pre>"),
    ]
    content = page.document(
        "qwench demo", "Raw text in, a chat model out: one run of the whole recipe on this machine.", body
    )
    path = context.path("report.html")
    path.write_text(content, encoding="utf-8")
    return {"summary": f"{path} ({len(content.encode()) / 1e3:.0f} kB, one offline file)", "path": str(path)}


# ------------------------------------------------------------------------------------------------------------- pieces
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
    return page.cards(cards)


def _stage_table(results: dict[str, Results], titles: dict[str, str], commands: dict[str, str]) -> str:
    def cells(name: str, title: str) -> list[str]:
        result = results.get(name, {})
        speed = result.get("tokens_per_s")
        command = f"<br><code>{page.text(commands[name])}</code>" if commands[name] else ""
        return [
            page.text(title),
            page.text(result.get("summary", "this page")) + command,
            f"{speed:,.0f}" if speed else "",
            f"{result.get('seconds', 0):.1f}" if name in results else "",
        ]

    rows = [cells(name, title) for name, title in titles.items()]
    return page.table(["stage", "result and command", "tokens/s", "seconds"], rows, numeric=(2, 3))


def _corpus(collect: Results, clean: Results) -> str:
    rows = [
        [page.text(s["source"]), page.text(s["kind"] or "text"), f"{s['documents']:,}", f"{s['bytes'] / 1e6:.2f}"]
        for s in collect["sources"]
    ]
    total = sum(clean["kinds"].values()) or 1
    shares = ", ".join(f"{page.text(kind)} {size / total:.0%}" for kind, size in clean["kinds"].items())
    reasons = [[page.text(reason), f"{count:,}"] for reason, count in sorted(clean["reasons"].items()) if count]
    return (
        page.table(["source", "kind", "documents", "MB"], rows, numeric=(2, 3))
        + f"<p>{page.text(clean['summary'])}. By kind: {shares}. Every drop with its reason, duplicates side by side: "
        '<a href="data/report.html">data/report.html</a>.</p>'
        + (page.table(["dropped for", "count"], reasons, numeric=(1,)) if reasons else "")
    )


def _tokenizer(tokenizer: Results, shards: Results) -> str:
    longest = " ".join(
        f"<code>{page.text(json.dumps(token, ensure_ascii=False))}</code>" for token in tokenizer["longest"]
    )
    return f"<p>{page.text(tokenizer['summary'])}. {page.text(shards['summary'])}. The longest tokens: {longest}</p>"


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
        f"<p>Activations in {page.text(result['precision'])}, weights in float32. Operations: {page.text(ops)}. "
        "MFU is the share of this machine's measured matrix-product rate that the model's own operations reach.</p>"
    )
    return page.svg(figure) + page.table(head, rows, numeric=range(1, 7)) + note


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
    return page.svg(figure) + note


def _scores(evaluation: Results) -> str:
    scores = evaluation["scores"]
    rows = [
        [page.text(name), f"{scores['before'][name]:.1%}", f"{scores['after'][name]:.1%}"] for name in scores["before"]
    ]
    samples = [
        [
            page.text(sample["task"]),
            page.text(sample["question"]),
            f'<span class="answer">{page.text(sample["before"])}</span>',
            f'<span class="answer {"right" if sample["right"] else "wrong"}">{page.text(sample["after"])}</span>',
        ]
        for sample in evaluation["samples"]
    ]
    return (
        page.table(
            ["share of answers that are right, or have the form asked for", "before", "after"], rows, numeric=(1, 2)
        )
        + "<p>The sums and the documented functions below were never in the training data. Greedy answers.</p>"
        + page.table(["task", "question", "before", "after"], samples)
    )


def _conversations(conversations: Results) -> str:
    rows = [[page.text(e["task"]), page.text(e["question"]), page.text(e["answer"])] for e in conversations["examples"]]
    return f"<p>{page.text(conversations['summary'])}. One of each:</p>" + page.table(
        ["task", "question", "answer"], rows
    )


def _model(context: Context, export: Results) -> str:
    files = ", ".join(f"<code>{page.text(name)}</code>" for name in export["files"])
    shape = page.text(json.dumps(export["config"], indent=2))
    return (
        f"<p>{page.text(export['summary'])}. Files: {files}.</p>"
        f"<p>Talk to it: <code>qwench chat {page.text(context.path('model'))}</code></p><pre>{shape}</pre>"
    )
