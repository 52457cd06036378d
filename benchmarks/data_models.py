"""Classifiers and decontamination: precision and recall on held-out data and speed, beside fastText and scikit-learn.

    python benchmarks/data_models.py DATA [--peers PYTHON] [--only NAME ...]

DATA has the parts `pipeline`, `pretrain`, `sft`, `math` and `eval`. Classifiers learn from one half and are measured on
the other; what belongs together (a page, a book) is in one half. Tasks:

    offensive_en   tweets: hate or offensive language against neither
    offensive_zh   comments (COLD): offensive against safe; its own split
    quality        a web page's main text against what else stands on the page (menus, notices, lists of links)
    domain         pieces of 1,500 characters of books, documentation, maths, code, poetry, tweets, ... in two languages

Decontamination: questions of evaluation sets with changed numbers, cut and hidden in novels, have to be found; novels,
documentation and source code are searched as they are.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from results import write_result

from qwench.data.classifier import Classifier, ClassifierSettings, train_classifier
from qwench.data.decontaminate import (
    ContaminationFinder,
    DecontaminateSettings,
    build_index,
    evaluation_files,
    read_samples,
)
from qwench.data.html import decode_html, html_to_text
from qwench.data.scoring import class_figures

Rows = list[tuple[str, str]]
_PIECE = 1500


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def half(name: str) -> bool:
    return hashlib.blake2b(name.encode("utf-8", "replace")).digest()[0] % 2 == 0


def split(rows: Sequence[tuple[str, str, str]]) -> tuple[Rows, Rows]:
    """Rows of (text, label, what belongs together) as a half to learn from and one to measure on."""
    return [(t, label) for t, label, name in rows if half(name)], [
        (t, label) for t, label, name in rows if not half(name)
    ]


def offensive_en(data: Path) -> tuple[Rows, Rows]:
    tweets = lines(data / "pipeline/hate_en.jsonl")
    return split([(row["text"], "safe" if row["label"] == 2 else "offensive", row["text"]) for row in tweets])


def offensive_zh(data: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        with open(data / "pipeline" / name, encoding="utf-8-sig", newline="") as file:
            return [(row["TEXT"], "offensive" if row["label"] == "1" else "safe") for row in csv.DictReader(file)]

    return read("cold_zh_train.csv"), read("cold_zh_dev.csv")


def quality(data: Path) -> tuple[Rows, Rows]:
    rows = []
    for path in sorted((data / "pipeline/web_html").glob("*.html")):
        page = decode_html(path.read_bytes())
        text = html_to_text(page)
        main = {" ".join(line.split()) for line in text.split("\n")}
        everything = re.sub(r"(?is)<(script|style|noscript).*?</\1>|<!--.*?-->", " ", page)
        parts = re.sub(r"<[^>]+>", "\n", everything).split("\n")
        others = [part for line in parts if (part := " ".join(line.split())) and not any(part in kept for kept in main)]
        rows += [(text, "main", path.name), ("\n".join(others), "rest", path.name)]
    return split([row for row in rows if len(row[0]) >= 100])


def domain(data: Path) -> tuple[Rows, Rows]:
    rows: list[tuple[str, str, str]] = []

    def add(label: str, path: str, read: Callable[[dict[str, Any]], str] = lambda row: row["text"], most: int = 1200):
        """Up to `most` pieces, a few of each document."""
        found = []
        for number, row in enumerate(lines(data / path)):
            text = read(row)
            starts = range(0, max(1, len(text) - _PIECE // 2), _PIECE)
            for start in random.Random(number).sample(starts, min(len(starts), 30)):
                found.append((text[start : start + _PIECE], label, f"{path}:{number}"))
        random.Random(0).shuffle(found)
        rows.extend(row for row in found[:most] if len(row[0]) >= 40)

    def joined(row: dict[str, Any]) -> str:
        return "\n".join(value for value in row.values() if isinstance(value, str))

    add("books", "pretrain/en_novels.jsonl")
    add("books", "pretrain/zh_modern.jsonl")
    add("poetry", "pretrain/zh_poetry.jsonl")
    add("technology", "pretrain/en_docs.jsonl")
    add("technology", "pretrain/zh_docs.jsonl")
    add("reference", "pretrain/en_dictionary.jsonl")
    add("maths", "pretrain/math_latex.jsonl")
    add("maths", "math/math_train.jsonl", joined)
    for name in ("python_stdlib", "go_std", "rust_std"):
        add("code", f"pretrain/code_{name}.jsonl", most=600)
    add("social_media", "pipeline/hate_en.jsonl")
    rows.extend((text, "social_media", text) for text, _ in offensive_zh(data)[1][:1200])
    add("instructions", "sft/dolly.jsonl", joined)
    add("instructions", "sft/alpaca_zh.jsonl", joined)
    return split(rows)


TASKS: dict[str, tuple[Callable[[Path], tuple[Rows, Rows]], dict[str, Any]]] = {
    "offensive_en": (offensive_en, {"unspaced": False, "positive": "offensive"}),
    "offensive_zh": (offensive_zh, {"unspaced": True, "positive": "offensive"}),
    "quality": (quality, {"unspaced": False, "positive": "main"}),
    "domain": (domain, {"unspaced": False, "settings": ClassifierSettings(bucket_bits=18)}),
}


def figures_of(truth: Sequence[str], guesses: Sequence[str], positive: str | None) -> dict[str, Any]:
    labels = sorted(set(truth))
    figures = {f.label: f for f in class_figures(truth, guesses, labels)}
    right = sum(t == g for t, g in zip(truth, guesses, strict=True)) / len(truth)
    told: dict[str, Any] = {"accuracy": right, "mean_f1": sum(f.f1 for f in figures.values()) / len(figures)}
    if positive:
        one = figures[positive]
        return {"precision": one.precision, "recall": one.recall, "f1": one.f1, **told}
    return {**told, "f1": {label: figure.f1 for label, figure in figures.items()}}


def classify(name: str, data: Path, peers: str | None) -> dict[str, Any]:
    read, options = TASKS[name]
    learnt, tested = read(data)
    texts, truth = [text for text, _ in tested], [label for _, label in tested]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    settings = options.get("settings") or ClassifierSettings()
    started = time.process_time()
    model = train_classifier([text for text, _ in learnt], [label for _, label in learnt], settings)
    trained = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        model = Classifier.load(Path(folder))
    loaded = time.process_time()
    guesses = [model.labels[place] for place in model.score(texts).argmax(axis=1)]
    runs = {"qwench": (guesses, trained - started, time.process_time() - loaded)}
    if peers is not None:
        with tempfile.TemporaryDirectory() as folder:
            given, got = Path(folder, "in.json"), Path(folder, "out.json")
            table = {"train": learnt, "test": texts, "unspaced": options["unspaced"]}
            given.write_text(json.dumps(table), encoding="utf-8")
            script = Path(__file__).parent / "data_models_peers.py"
            subprocess.run([peers, str(script), str(given), str(got)], check=True)
            for peer, run in json.loads(got.read_text(encoding="utf-8")).items():
                runs[peer] = (run["labels"], run["train_s"], run["apply_s"])
    result: dict[str, Any] = {"learnt": len(learnt), "tested": len(tested), "tested_mb": size, "models": {}}
    for who, (labels, train_s, apply_s) in runs.items():
        row = figures_of(truth, labels, options.get("positive"))
        result["models"][who] = {**row, "train_s": train_s, "apply_mb_s": size / apply_s}
        shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
        print(
            f"{name:13} {who:13} {shown}  trained in {train_s:.1f} s, applied at {size / apply_s:.1f} MB/s", flush=True
        )
    if "positive" not in options:
        print("  ", {label: round(value, 3) for label, value in result["models"]["qwench"]["f1"].items()})
    return result


def contamination(data: Path) -> dict[str, Any]:
    samples = list(read_samples(evaluation_files([data / "eval"])))
    draw = random.Random(0)
    novels = [row["text"] for row in lines(data / "pretrain/en_novels.jsonl")]
    chosen = [s for s in samples if s.id.endswith((":question", ":input")) and 25 <= len(s.text.split()) <= 120]
    planted: dict[str, list[str]] = {"as they are": [], "other numbers": [], "three quarters": [], "in a chapter": []}
    for sample in draw.sample(chosen, 300):
        words = sample.text.split()
        planted["as they are"].append(sample.text)
        planted["other numbers"].append(re.sub(r"\d+", lambda _: str(draw.randint(2, 999)), sample.text))
        planted["three quarters"].append(" ".join(words[: len(words) * 3 // 4]))
        novel = draw.choice(novels)
        start = draw.randrange(max(1, len(novel) - 20_000))
        planted["in a chapter"].append(
            f"{novel[start : start + 10_000]}\n\n{sample.text}\n\n{novel[start + 10_000 : start + 20_000]}"
        )
    clean = {
        name: [row["text"] for row in lines(data / f"pretrain/{name}.jsonl")]
        for name in ("en_novels", "en_docs", "zh_modern", "code_python_stdlib")
    }
    searched = {
        name: ["\n".join(v for v in row.values() if isinstance(v, str)) for row in lines(data / path)]
        for name, path in {
            "dolly": "sft/dolly.jsonl", "alpaca_en": "sft/alpaca_en.jsonl",
            "gsm8k_train": "math/gsm8k_train.jsonl", "math_train": "math/math_train.jsonl",
        }.items()
    }  # fmt: skip
    results: dict[str, Any] = {"samples": len(samples)}
    for rule in ("qwen", "qwen2", "qwen2.5-math"):
        settings = DecontaminateSettings(rule=rule)
        started = time.process_time()
        index = build_index(samples, settings)
        indexed = time.process_time() - started
        finder = ContaminationFinder(index, settings)

        def share(texts: list[str], finder: ContaminationFinder = finder) -> float:
            return sum(found is not None for found in _find(finder, texts)) / len(texts)

        row: dict[str, Any] = {"index_s": indexed, "found": {name: share(texts) for name, texts in planted.items()}}
        started, size = time.process_time(), 0
        row["dropped"] = {}
        for name, texts in clean.items():
            row["dropped"][name] = [sum(found is not None for found in _find(finder, texts)), len(texts)]
            size += sum(len(text.encode("utf-8", "replace")) for text in texts)
        row["mb_s"] = size / 1e6 / (time.process_time() - started)
        for name, texts in searched.items():
            row["dropped"][name] = [sum(found is not None for found in _find(finder, texts)), len(texts)]
        results[rule] = row
        found = ", ".join(f"{name} {value:.3f}" for name, value in row["found"].items())
        dropped = ", ".join(f"{name} {count}/{total}" for name, (count, total) in row["dropped"].items())
        print(
            f"{rule}: index {indexed:.1f} s, {row['mb_s']:.1f} MB/s\n  found: {found}\n  dropped: {dropped}", flush=True
        )
    return results


def _find(finder: ContaminationFinder, texts: Sequence[str]) -> list[Any]:
    found, batch, size = [], [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 1 << 20:
            found += finder.find(batch)
            batch, size = [], 0
    return found + finder.find(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", help="Python with fasttext and scikit-learn")
    parser.add_argument("--only", nargs="+", choices=[*TASKS, "contamination"], default=[*TASKS, "contamination"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        name: classify(name, arguments.data, arguments.peers) for name in TASKS if name in arguments.only
    }
    if "contamination" in arguments.only:
        figures["contamination"] = contamination(arguments.data)
    if len(arguments.only) == len(TASKS) + 1:
        write_result("data_models", figures)


if __name__ == "__main__":
    main()
