"""What a finished run of the pipeline has left on disk, counted for its report.

    found = read_findings(out)
    found.stages[1].kept["en", "web"]        # documents of the second stage by language and kind
    found.dropped["rules", "too_short"].values, .samples

Counts come from the small columns of all part files; texts are read for a few samples alone. Which documents are
samples is decided by a hash of their place, so the same run gives the same report. Nothing is drawn here
(`pipeline.report`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from qwench.data.minhash import mix
from qwench.data.pipeline.parts import DOCS, DROPPED, read_columns
from qwench.data.pipeline.work import DONE

SAMPLES = 3
"""Documents shown of each reason and each kind."""
_VALUES = 4096
"""Values of a reason that its histogram is drawn from, at most."""
_SCORED_FILES, _SCORED_ROWS = 64, 512
"""Part files, and documents of each, whose scores are read."""
_NO_SCORES = frozenset(("duplicates", "text_chars", "removed_lines", "held_out"))
"""Numbers in `meta` that say nothing about quality."""
_CHARS = 1200
_KEPT_BYTES = ("kept_bytes", "text_bytes", "bytes")
"""What stages call the bytes of the documents they leave, the plainest name first."""

LangKind = tuple[str, str]


DEDUP_COUNTS = {
    "documents": "documents left",
    "bytes": "> bytes of text",
    "dropped": "documents dropped",
    "exact_duplicate": "> for being equal to another",
    "exact_duplicate_chars": ">> characters in these",
    "near_duplicate": "> for being nearly equal to another",
    "near_duplicate_chars": ">> characters in these",
    "duplicate_pieces": "> for having nothing left but what others say",
    "duplicate_pieces_chars": ">> characters in these",
    "cut_documents": "documents that lost paragraphs which stand in others",
    "cut_chars": "> characters in these paragraphs",
    "cluster_clusters": "clusters of duplicates",
    "cluster_members": "> documents in them",
    "largest_cluster": "> documents in the largest",
    "cluster_exact": "> members equal to the one that stayed",
    "cluster_near": "> members nearly equal to it",
    "cluster_displaced": "documents of an earlier run that others replaced",
    "cluster_unresolved": "documents that resembled no survivor and stayed",
    "match_exact_groups": "groups of equal hashes of whole texts",
    "match_exact_in_groups": "> entries in them",
    "match_near_groups": "groups of equal bands of MinHash",
    "match_near_in_groups": "> entries in them",
    "match_edges": "links between documents from both",
    "pieces_paragraphs": "long paragraphs and lines compared",
    "pieces_distinct": "> different ones among them",
    "pieces_cuts": "> places that were cut",
}
"""What the counts of the stage "dedup" are; what belongs to the entry above has a mark for every step to the right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The beginning of a document, with its number of characters."""

    id: str
    source: str
    kind: str
    lang: str
    text: str
    chars: int
    value: float | None = None


@dataclass(slots=True, kw_only=True)
class StageFindings:
    """`name` as in work/NAME. `kept` and `dropped` are documents by language and kind."""

    name: str
    kept: Counter[LangKind] = field(default_factory=Counter)
    dropped: Counter[LangKind] = field(default_factory=Counter)
    rewrites: bool = False
    """Whether the stage has written documents, or only dropped or counted some."""
    kept_bytes: int = 0
    items: int = 0
    work_seconds: float = 0.0
    """Of all items together, whenever they were done."""
    peak_mb: float = 0.0
    """The highest resident memory of a process that did an item."""


@dataclass(slots=True)
class ReasonFindings:
    """Documents that one rule dropped."""

    count: int = 0
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """A sample of the measured values."""
    samples: list[Shown] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Findings:
    """Everything that the report shows, besides summary.json."""

    stages: list[StageFindings]
    dropped: dict[tuple[str, str], ReasonFindings]
    """(stage as documents name it, reason) -> what it dropped, the most frequent first."""
    kept: dict[str, list[Shown]]
    """Kind -> a few documents that are left in the end."""
    scores: dict[str, dict[str, np.ndarray]]
    """Name of a number in `meta` -> values of sampled documents: {"kept": ..., "dropped": ...}."""
    pairs: list[dict[str, Any]]
    """Rows of pairs.parquet."""
    largest: list[tuple[str, int]]
    """Survivors of the largest clusters, and the documents they stand for."""


def read_findings(out: Path, summary: Mapping[str, Any], *, num_pairs: int = 12) -> Findings:
    """Read the part files that summary.json speaks of. Raises ValueError for damaged ones."""
    stages = [_read_stage(out / "work" / entry["stage"]) for entry in summary.get("stages", [])]
    files = [path for stage in stages for path in sorted((out / "work" / stage.name).glob(f"*/{DROPPED}"))]
    final = [out / part for part in summary["documents"]["parts"]]
    scores = {"kept": _read_scores(final), "dropped": _read_scores(files)}
    names = sorted(scores["kept"].keys() | scores["dropped"].keys())
    empty = np.zeros(0)
    return Findings(
        stages=[stage for stage in stages if stage.items],
        dropped=_read_dropped(files),
        kept=_read_kept(final),
        scores={name: {side: values.get(name, empty) for side, values in scores.items()} for name in names},
        pairs=_read_pairs(out, summary, num_pairs),
        largest=_read_largest(out, summary),
    )


def _read_stage(directory: Path) -> StageFindings:
    stage = StageFindings(name=directory.name)
    for item in sorted(path for path in directory.glob("[0-9]*") if (path / DONE).is_file()):
        record = json.loads((item / DONE).read_bytes())
        stage.items += 1
        stage.work_seconds += record["seconds"]
        stage.peak_mb = max(stage.peak_mb, record.get("peak_mb", 0.0))
        counts = record["counts"]
        if (item / DOCS).is_file():
            stage.rewrites = True
            stage.kept_bytes += next((counts[name] for name in _KEPT_BYTES if name in counts), 0)
            stage.kept += _count(item / DOCS)
        if (item / DROPPED).is_file():
            stage.dropped += _count(item / DROPPED)
    return stage


def _count(path: Path) -> Counter[LangKind]:
    counts: Counter[LangKind] = Counter()
    for batch in read_columns(path, ("lang", "kind")):
        counts.update(zip(batch.column("lang").to_pylist(), batch.column("kind").to_pylist(), strict=True))
    return counts


# ------------------------------------------------------------------------------------------------------------- dropped
@dataclass(slots=True)
class _Sample:
    """The rows with the smallest keys."""

    count: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, places: np.ndarray, values: np.ndarray, most: int) -> None:
        self.count += len(places)
        keys = np.concatenate([self.keys, mix(places)])
        order = np.argsort(keys, kind="stable")[:most]
        self.keys = keys[order]
        self.places = np.concatenate([self.places, places])[order]
        self.values = np.concatenate([self.values, values])[order]


def _read_dropped(files: Sequence[Path]) -> dict[tuple[str, str], ReasonFindings]:
    samples: dict[tuple[str, str], _Sample] = {}
    for number, path in enumerate(files):
        first = number << 32
        for batch in read_columns(path, ("stage", "reason", "value")):
            labels = list(zip(batch.column("stage").to_pylist(), batch.column("reason").to_pylist(), strict=True))
            values = batch.column("value").to_numpy(zero_copy_only=False).astype(np.float64)
            places = np.arange(first, first + len(labels), dtype=np.uint64)
            first += len(labels)
            numbers = {label: place for place, label in enumerate(sorted(set(labels)))}
            which = np.array([numbers[label] for label in labels], np.int64)
            for label, place in numbers.items():
                here = which == place
                samples.setdefault(label, _Sample()).add(places[here], values[here], _VALUES)
    wanted: dict[int, dict[int, float]] = {}
    for sample in samples.values():
        for place, value in zip(sample.places[:SAMPLES].tolist(), sample.values[:SAMPLES].tolist(), strict=True):
            wanted.setdefault(place >> 32, {})[place & 0xFFFFFFFF] = value
    shown = {
        (number << 32) + row: document
        for number, rows in sorted(wanted.items())
        for row, document in _read_rows(files[number], rows)
    }
    found = {
        label: ReasonFindings(
            count=sample.count,
            values=sample.values[np.isfinite(sample.values)],
            samples=[shown[place] for place in sample.places[:SAMPLES].tolist()],
        )
        for label, sample in samples.items()
    }
    return dict(sorted(found.items(), key=lambda entry: (-entry[1].count, entry[0])))


def _read_rows(path: Path, rows: Mapping[int, float | None]) -> Iterator[tuple[int, Shown]]:
    """Documents of some rows of a part file; only their row groups are read."""
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            here = sorted(row for row in rows if first <= row < first + size)
            if here:
                columns = ["id", "text", "source", "kind", "lang"]
                table = file.read_row_group(group, columns=columns, use_threads=False)
                for row in here:
                    record = {name: table.column(name)[row - first].as_py() for name in columns}
                    text = record.pop("text")
                    value = rows[row]
                    value = None if value is None or not np.isfinite(value) else value
                    yield row, Shown(**record, text=text[:_CHARS], chars=len(text), value=value)
            first += size


# ---------------------------------------------------------------------------------------------------------------- kept
def _read_kept(files: Sequence[Path]) -> dict[str, list[Shown]]:
    """Samples of each kind."""
    samples: dict[str, _Sample] = {}
    for number, path in enumerate(files):
        first = number << 32
        for batch in read_columns(path, ("kind",)):
            kinds = np.array(batch.column("kind").to_pylist(), object)
            places = np.arange(first, first + len(kinds), dtype=np.uint64)
            first += len(kinds)
            for kind in sorted(set(kinds.tolist())):
                here = kinds == kind
                samples.setdefault(kind, _Sample()).add(places[here], np.zeros(int(here.sum())), SAMPLES)
    found: dict[str, list[Shown]] = {}
    for kind, sample in sorted(samples.items(), key=lambda entry: (-entry[1].count, entry[0])):
        places = sample.places.tolist()
        found[kind] = [
            document for place in places for _, document in _read_rows(files[place >> 32], {place & 0xFFFFFFFF: None})
        ]
    return found


def _read_scores(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Numbers in `meta`, of some documents of some files, spread evenly."""
    step = max(1, -(-len(files) // _SCORED_FILES))
    found: dict[str, list[float]] = {}
    for path in files[::step]:
        left = _SCORED_ROWS
        for batch in read_columns(path, ("meta",)):
            for meta in batch.column("meta").slice(0, left).to_pylist():
                for name, value in _numbers(json.loads(meta) if meta else {}):
                    found.setdefault(name, []).append(value)
            left -= batch.num_rows
            if left <= 0:
                break
    return {name: np.array(values) for name, values in found.items()}


def _numbers(meta: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in meta.items():
        if isinstance(value, Mapping) and not prefix and name.endswith("scores"):
            yield from _numbers(value, f"{name}.")
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or name in _NO_SCORES:
            continue
        if np.isfinite(value):
            yield prefix + name, float(value)


# ---------------------------------------------------------------------------------------------------------- duplicates
def _read_pairs(out: Path, summary: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Sampled near duplicates from the least alike to the most, evenly spread."""
    name = summary.get("dedup", {}).get("pairs")
    if not name:
        return []
    rows = pq.read_table(out / name).to_pylist()
    rows.sort(key=lambda row: (row["jaccard"], row["left_id"], row["right_id"]))
    if len(rows) <= most:
        return rows
    return [rows[round(place)] for place in np.linspace(0, len(rows) - 1, most)]


def _read_largest(out: Path, summary: Mapping[str, Any], most: int = 10) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for name in summary.get("dedup", {}).get("clusters", []):
        for batch in read_columns(out / name, ("survivor", "size", "kept", "reason")):
            sizes = batch.column("size").to_numpy()
            kept = np.flatnonzero(batch.column("kept").to_numpy(zero_copy_only=False))
            kept = kept[np.argsort(-sizes[kept], kind="stable")[:most]]
            found += [(batch.column("survivor")[row].as_py(), int(sizes[row])) for row in kept.tolist()]
            found = sorted(found, key=lambda entry: (-entry[1], entry[0]))[:most]
    return found
