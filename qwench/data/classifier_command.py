"""`qwench classifier`: train, apply and measure the linear scorer of `data.classifier`.

qwench classifier train safety/ labelled.csv --text-field TEXT --positive 1 --recall 0.9
qwench classifier train quality/ --class bad=crawl.jsonl --class good=books.jsonl --class good=wiki/
qwench classifier measure quality/ held_out.jsonl
qwench classifier apply quality/ documents.jsonl --out scored.jsonl
qwench classifier label LLM documents.jsonl --out labelled.jsonl        (engine.label_command)
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwench.config import load
from qwench.data.classifier import Classifier, ClassifierSettings, train_classifier
from qwench.data.documents import read_documents, write_documents
from qwench.data.scoring import (
    class_figures,
    describe,
    guesses_of,
    held_out,
    in_batches,
    ranking,
    read_labelled,
    threshold_for_recall,
)

_BATCH = 512


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench classifier",
        description="Train, apply and measure small text classifiers: quality, safety, domain. "
        "`qwench classifier label --help`: labels by a language model, to be distilled by train.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,apply,measure,label}")
    train = commands.add_parser("train", help="from labelled texts", description="Train from labelled texts.")
    train.add_argument("out", type=Path, help="directory of the classifier")
    train.add_argument("labelled", type=Path, nargs="*", help=".jsonl, .csv or .parquet with a text and a label each")
    train.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="LABEL=PATH",
        help="all documents of a file or folder have this label; of two labels the last one is the positive one",
    )  # fmt: skip
    _fields(train)
    train.add_argument("--positive", help="of two labels, the one that is looked for (default: the last)")
    train.add_argument("--recall", type=float, help="choose the threshold that finds this share of the positives")
    train.add_argument("--held-out", type=float, default=0.1, help="share that is measured on, not trained (0.1)")
    train.add_argument("--most", type=int, default=50_000, help="documents of one --class at most (50000)")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_settings_help())
    measure = commands.add_parser("measure", help="precision and recall", description="Measure on labelled texts.")
    measure.add_argument("model", type=Path)
    measure.add_argument("labelled", type=Path, nargs="+")
    _fields(measure)
    apply = commands.add_parser("apply", help="scores for documents", description="Write documents with their scores.")
    apply.add_argument("model", type=Path)
    apply.add_argument("inputs", type=Path, nargs="+")
    apply.add_argument("--out", type=Path, required=True, help="JSON lines; meta.scores has a number for each label")
    commands.add_parser("label", help="labels by a language model")
    args = parser.parse_args(argv)
    return {"train": _train, "measure": _measure, "apply": _apply}[args.command](args)


def _fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--label-field", default="label")
    parser.add_argument(
        "--map", action="append", default=[], metavar="LABEL=NAME", help="rename labels; NAME may be that of several"
    )


def _settings_help() -> str:
    shown = (f"{field.name} ({field.default})" for field in dataclasses.fields(ClassifierSettings))
    return "a setting: " + ", ".join(shown)


def _pairs(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = []
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise ValueError(f"{option} {text!r} is no pair; write {option} NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _labelled(args: argparse.Namespace) -> list[tuple[str, str]]:
    names = dict(_pairs(args.map, "--map"))
    rows = [row for path in args.labelled for row in read_labelled(path, args.text_field, args.label_field)]
    return [(text, names.get(label, label)) for text, label in rows if text.strip()]


def _train(args: argparse.Namespace) -> int:
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out is {args.held_out}; give a number between 0 and 1")
    rows = _labelled(args)
    order = []
    for label, path in _pairs(args.classes, "--class"):
        order.append(label)
        documents = itertools.islice(read_documents([path]), args.most)
        rows += [(document.text, label) for document in documents if document.text.strip()]
    if not rows:
        raise ValueError("no labelled texts; give files with labels, or --class LABEL=PATH for each class")
    labels = list(dict.fromkeys(order)) + sorted({label for _, label in rows} - set(order))
    if args.positive is not None:
        if len(labels) != 2 or args.positive not in labels:
            raise ValueError(f"--positive {args.positive} needs two labels with it among them; there are {labels}")
        labels = [label for label in labels if label != args.positive] + [args.positive]
    if args.recall is not None and len(labels) != 2:
        raise ValueError(f"--recall is for two labels; there are {len(labels)}")
    settings = load(ClassifierSettings, args.set)
    learnt = [row for row in rows if not held_out(row[0], args.held_out)]
    tested = [row for row in rows if held_out(row[0], args.held_out)]
    if not learnt or not tested:
        raise ValueError(f"{len(rows)} texts are too few to hold {args.held_out:.0%} out")
    model = train_classifier([text for text, _ in learnt], [label for _, label in learnt], settings, labels)
    threshold = 0.5
    if args.recall is not None:
        positive = np.array([label == labels[1] for _, label in tested])
        threshold = threshold_for_recall(model.score([text for text, _ in tested])[:, 1], positive, args.recall)
    model = dataclasses.replace(model, threshold=threshold)
    table, figures = measured(model, tested)
    counts = Counter(label for _, label in learnt)
    model = dataclasses.replace(model, figures={"trained": {label: counts[label] for label in labels}, **figures})
    model.save(args.out)
    print(f"trained on {len(learnt):,} texts, measured on {len(tested):,} others\n{table}\nwrote {args.out}")
    return 0


def _measure(args: argparse.Namespace) -> int:
    model = Classifier.load(args.model)
    rows = _labelled(args)
    if unknown := sorted({label for _, label in rows} - set(model.labels)):
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(model.labels)}; rename it with --map")
    print(measured(model, rows)[0])
    return 0


def measured(model: Classifier, rows: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    """A table for people and the same for the model's file."""
    scores = model.score([text for text, _ in rows])
    truth = [label for _, label in rows]
    guesses = guesses_of(scores, model.labels, model.threshold)
    figures = class_figures(truth, guesses, model.labels)
    accuracy = sum(t == g for t, g in zip(truth, guesses, strict=True)) / max(1, len(truth))
    auc = ranking(scores[:, 1], np.array([t == model.labels[1] for t in truth])) if len(model.labels) == 2 else None
    told: dict[str, Any] = {
        "accuracy": round(accuracy, 4),
        "classes": {f.label: [round(f.precision, 4), round(f.recall, 4), round(f.f1, 4), f.documents] for f in figures},
    }
    if auc is not None and np.isfinite(auc):
        told["auc"] = round(auc, 4)
    return describe(figures, accuracy, auc, model.threshold), told


def _apply(args: argparse.Namespace) -> int:
    model = Classifier.load(args.model)
    totals: Counter[str] = Counter()

    def scored() -> Any:
        for batch in in_batches(read_documents(args.inputs), _BATCH):
            scores = model.score([document.text for document in batch])
            for document, row, guess in zip(
                batch, scores, guesses_of(scores, model.labels, model.threshold), strict=True
            ):
                totals[guess] += 1
                table = {label: round(float(score), 6) for label, score in zip(model.labels, row, strict=True)}
                yield dataclasses.replace(document, meta={**document.meta, "scores": table, "label": guess})

    written = write_documents(args.out, scored())
    print(
        f"{written:,} documents in {args.out}: "
        + ", ".join(f"{count:,} {label}" for label, count in totals.most_common())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
