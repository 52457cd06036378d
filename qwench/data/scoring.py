"""Scores of documents: what gives them, thresholds with what they cost, and precision and recall.

A scorer turns texts into numbers: `data.classifier` (quality, safety, domain) or a language model's perplexity. The
latter needs torch and lies above this floor, so scorers are found by name when they are opened, like commands.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from qwench.config import config
from qwench.data.opening import ReadLimits, decompressed

T = TypeVar("T")
SCORERS = {
    "classifier": "qwench.data.classifier:open_scorer",
    "perplexity": "qwench.evals.perplexity:open_scorer",
}
"""Kind -> function from a path to a Scorer."""


class Scorer(Protocol):
    """Numbers for texts."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What the columns of `score` are."""
        ...

    @property
    def threshold(self) -> float:
        """Where the last column divides, as chosen when the scorer was made; nan if nothing was."""
        ...

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float [texts, labels]; the same for a text whatever stands beside it."""
        ...


@config
class ModelConfig:
    """A model that scores every document, and what follows from its score."""

    path: Path
    """Directory of a classifier (qwench classifier train), or for perplexity a language model."""
    scorer: Literal["classifier", "perplexity"] = "classifier"
    """perplexity: bits per byte of the document's beginning; low is usual text, very low is repetition."""
    label: str = ""
    """Class whose probability is the score; empty: the last one."""
    field: str = ""
    """Key of a document's meta that gets the score; empty: the model's name in the recipe. `quality` decides which of
    several duplicates stays, with before_dedup."""
    drop_below: float | Literal["trained"] | None = None
    """Documents with a lower score are dropped; "trained": at the threshold chosen in training."""
    drop_above: float | Literal["trained"] | None = None
    """Documents with this or a higher score are dropped."""
    set_kind: bool = False
    """The likeliest class becomes the document's kind, so the mixture's groups are domains."""
    min_share: float = 0.0
    """With set_kind: documents whose likeliest class is less likely keep their kind."""
    kinds: tuple[str, ...] = ()
    """Score documents of these kinds only; empty: all."""
    langs: tuple[str, ...] = ()
    """Score documents in these languages only; empty: all."""
    before_dedup: bool = False
    """Score (and drop) while documents are prepared: more to score, but the score can choose among duplicates."""

    def __post_init__(self) -> None:
        if self.scorer == "perplexity" and (
            self.set_kind or self.label or "trained" in (self.drop_below, self.drop_above)
        ):
            raise ValueError('perplexity has one number and no classes; leave set_kind, label and "trained" out')
        if (
            self.drop_below is not None
            and self.drop_above is not None
            and "trained" in (self.drop_below, self.drop_above)
        ):
            raise ValueError('"trained" is one threshold; give drop_below or drop_above')


def open_scorer(kind: str, path: Path) -> Scorer:
    """Raises ValueError for a path that holds no such model."""
    module, _, name = SCORERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)(path)


def fingerprint(path: Path) -> str:
    """Of a model's files, so that other weights under the same path are noticed. Raises ValueError for no path."""
    if not path.exists():
        raise ValueError(f"there is no model at {path}")
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{os.path.getsize(file)}\0".encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------ measures
@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """`ClassFigures(label="good", precision=0.92, recall=0.9, f1=0.91, documents=4000)`"""

    label: str
    precision: float
    recall: float
    f1: float
    documents: int


def class_figures(truth: Sequence[str], guesses: Sequence[str], labels: Sequence[str]) -> list[ClassFigures]:
    """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
    right = np.array([t == g for t, g in zip(truth, guesses, strict=True)], bool)
    figures = []
    for label in labels:
        true = np.array([t == label for t in truth], bool)
        guessed = np.array([g == label for g in guesses], bool)
        hits = int((right & true).sum())
        precision, recall = hits / max(1, int(guessed.sum())), hits / max(1, int(true.sum()))
        f1 = 2 * hits / max(1, int(true.sum() + guessed.sum()))
        figures.append(ClassFigures(label=label, precision=precision, recall=recall, f1=f1, documents=int(true.sum())))
    return figures


def guesses_of(scores: np.ndarray, labels: Sequence[str], threshold: float) -> list[str]:
    """The likeliest class; of two, the second from `threshold` on."""
    if len(labels) == 2:
        return [str(labels[int(score >= threshold)]) for score in scores[:, 1]]
    return [str(labels[place]) for place in scores.argmax(axis=1)]


def threshold_for_recall(scores: np.ndarray, positive: np.ndarray, recall: float) -> float:
    """The highest threshold at which at least `recall` of the positives have `score >= threshold`.

    >>> threshold_for_recall(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, True, False, True]), 0.6)
    0.8
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; give a number in (0, 1]")
    found = np.sort(scores[positive])[::-1]
    if not len(found):
        raise ValueError("no held-out document is positive; give more documents or a larger held-out share")
    return float(found[int(np.ceil(recall * len(found) - 1e-9)) - 1])


def ranking(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive has the higher score, ties counting half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    num = int(positive.sum())
    if not num or num == len(scores):
        return float("nan")
    return float((ranks[inverse][positive].sum() - num * (num + 1) / 2) / (num * (len(scores) - num)))


def describe(figures: Sequence[ClassFigures], accuracy: float, auc: float | None, threshold: float) -> str:
    """A table for a terminal."""
    width = max(8, *(len(f.label) for f in figures))
    lines = [f"{'class':<{width}} precision recall     F1 documents"]
    lines += [f"{f.label:<{width}}    {f.precision:.4f} {f.recall:.4f} {f.f1:.4f} {f.documents:>9,}" for f in figures]
    end = f"accuracy {accuracy:.4f}, mean F1 {sum(f.f1 for f in figures) / len(figures):.4f}"
    if auc is not None:
        end += f", area under the ROC curve {auc:.4f}, threshold {threshold:.4f}"
    return "\n".join([*lines, end])


# ------------------------------------------------------------------------------------------------------ labelled texts
def read_labelled(path: Path, text_field: str, label_field: str) -> Iterator[tuple[str, str]]:
    """Texts and labels of JSON lines, CSV or Parquet, compressed too; a whole number is the label "0", "1", ...

    Raises ValueError naming the record that has none.
    """
    kind = (
        "".join(s for s in path.suffixes if s.lower() not in (".gz", ".zst", ".bz2", ".xz")).lower().rpartition(".")[2]
    )
    with open(path, "rb") as raw:
        if kind == "parquet":
            import pyarrow.parquet as pq

            rows: Iterator[Any] = iter(pq.read_table(raw).to_pylist())
        else:
            with decompressed(raw, path.suffix.lower(), ReadLimits()) as stream:
                text = stream.read().decode("utf-8-sig", "replace")
            if kind in ("csv", "tsv"):
                rows = iter(csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if kind == "tsv" else ","))
            elif kind in ("jsonl", "ndjson"):
                rows = (json.loads(line) for line in text.split("\n") if line.strip())
            else:
                raise ValueError(f"{path}: labels are read from .jsonl, .csv, .tsv and .parquet files")
        for number, row in enumerate(rows, 1):
            value, label = _field(row, text_field), _field(row, label_field)
            if not isinstance(value, str) or not isinstance(label, (str, int, bool)):
                has = ", ".join(map(str, row))
                raise ValueError(
                    f"{path}, record {number} has no text in {text_field!r} or no label in {label_field!r} "
                    f"(it has {has}); say which with --text-field and --label-field"
                )
            yield value, str(int(label) if isinstance(label, bool) else label)


def _field(row: Any, name: str) -> Any:
    """`meta.label` is the field label of the table meta."""
    for part in [name] if isinstance(row, dict) and name in row else name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one perhaps shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out share; equal texts always do so together."""
    digest = hashlib.blake2b(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest) < share * 2**32
