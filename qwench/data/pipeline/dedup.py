"""Dedup of a corpus in parts: from the hashes that the prepare stage left to parts without duplicates.

    writer = HashWriter(settings, directory)              # in the prepare stage, for the documents it keeps
    result = run_dedup(room, prepared, settings)          # stages dedup-match, -label, -annotate, -elect, ...
    result.parts[3].docs, .dropped, .keep                 # Parquet files of part 3
    result.clusters                                       # a table of every document in a cluster (Parquet files)

Every stage is `run_stage`'s: items that depend on the input and the settings only, any number of workers, files all the
way. Near duplicates are looked for in the components of the graph of candidates; with verification, what goes resembles
what stays (`pipeline.dedup_elect`), without, A and C may be one cluster because both resemble B.

An index (DedupSettings.index) holds the hashes of earlier runs. A run with one treats their documents as parts that
come before its own, matches only what is new, and adds itself when it is finished:

    INDEX/manifest.json            settings of the hashes; the generations, one a run
    INDEX/00000/parts/00000/...    hashes of a part, and kept.npy: which rows stayed
    INDEX/00000/labels/, kept/     clusters of all documents so far; parts of earlier runs that changed
"""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwench.config import to_dict
from qwench.data.components import EDGES, find_components
from qwench.data.dedup import DedupSettings
from qwench.data.minhash import describe_s_curve
from qwench.data.pipeline import dedup_jobs as jobs
from qwench.data.pipeline.dedup_elect import CLUSTERS, DECISIONS, PAIRS, elect_job
from qwench.data.pipeline.dedup_hashes import BANDS, EXACT, GROUP_PARTS, ROWS, SIGNATURES, gather_job
from qwench.data.pipeline.dedup_pieces import CUTS, PIECES, match_pieces_job, piece_job
from qwench.data.pipeline.parts import DOCS, DROPPED
from qwench.data.pipeline.work import Finished, Item, Room, run_stage
from qwench.run import write_atomically

VERSION = 1
_FAN_IN = 256
"""Parts whose tables are merged into one run before matching, if there are more."""
_RECORD_BYTES = 64
"""What a record of 16 to 50 bytes costs while it is sorted."""
_MEMBER_BYTES = 120
"""About what the annotated member of a cluster takes."""
_ALONE_RECORDS = 64 << 20
_ALONE_TEXT = 192 << 20
"""Bytes of records and of text below which a stage takes this process less time than starting others would."""
_SAMPLE_CHARS = 4000
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupPart:
    """What became of a part; without any dedup in the settings `docs` is the prepared part and the rest is None."""

    docs: Path
    dropped: Path | None
    keep: Path | None
    """A row for every prepared document: keep, cluster, size."""
    counts: dict[str, Any]
    """documents, bytes, dropped, exact_duplicate, near_duplicate, duplicate_pieces, cut_documents, cut_chars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupResult:
    parts: list[DedupPart]
    clusters: list[Path]
    """Parquet files with columns id, part, row, cluster, size, kept, reason, survivor: who is in a cluster."""
    pairs: Path | None
    """Parquet file of sampled near duplicates: left_id, right_id, jaccard, left_text, right_text."""
    counts: dict[str, Any]
    """Sums over the parts and the stages; "sizes": clusters by size (from that power of two up to the next)."""
    s_curve: str
    """The MinHash setting and its S-curve, for people."""


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    hashes: Path
    docs: Path | None
    """None for a part of an earlier run."""
    kept: Path | None = None


def run_dedup(room: Room, prepared: Sequence[Finished], settings: DedupSettings) -> DedupResult:
    """Find and take out the duplicates among the prepared parts (docs.parquet and what HashWriter wrote, in each
    directory), and those of the index. Raises ValueError for an index made with other settings."""
    index = _Index(settings, prepared) if settings.index is not None else None
    old = index.parts if index is not None else []
    parts = old + [_Part(len(old) + n, done.directory, done.directory / DOCS) for n, done in enumerate(prepared)]
    num_groups = -(-len(parts) // GROUP_PARTS)
    counts: Counter[str] = Counter()
    clusters: list[Path] = []
    decisions: list[str] = []
    labels: list[Path] = []
    pairs = None
    if settings.exact or settings.near:
        elected = _find_clusters(room, parts, index.labels if index is not None else [], settings, num_groups, counts)
        for done in elected:
            clusters.append(done.directory / CLUSTERS)
            decisions.append(str(done.directory / DECISIONS))
            labels.append(done.directory / EDGES)
        pairs = _sample(room, parts, elected, settings)
    cuts = _find_cuts(room, parts, decisions, settings, num_groups, counts)
    if not (decisions or cuts):
        rewritten = [DedupPart(docs=done.directory / DOCS, dropped=None, keep=None, counts={}) for done in prepared]
    else:
        rewritten = _rewrite(room, parts, decisions, cuts, settings, counts)
    if index is not None:
        index.add(
            [part for part in parts if part.docs is not None], rewritten, labels, _changed(room, parts, decisions)
        )
    sizes = {name[5:]: count for name, count in sorted(counts.items()) if name.startswith("size ")}
    summary: dict[str, Any] = {name: count for name, count in sorted(counts.items()) if not name.startswith("size ")}
    summary["sizes"] = dict(sorted(sizes.items(), key=lambda pair: int(pair[0])))
    return DedupResult(
        parts=rewritten, clusters=clusters, pairs=pairs, counts=summary, s_curve=describe_s_curve(settings.minhash)
    )


def _records(settings: DedupSettings) -> int:
    return max(1, settings.memory_mb * 1_000_000 // _RECORD_BYTES)


def _add(counts: Counter[str], finished: Sequence[Finished], prefix: str = "") -> None:
    for done in finished:
        for name, value in done.counts.items():
            if name == "sizes":
                counts.update({f"size {size}": number for size, number in value.items()})
            elif name == "largest":
                counts["largest_cluster"] = max(counts["largest_cluster"], value)
            elif isinstance(value, int):
                counts[prefix + name] += value


# ---------------------------------------------------------------------------------------------------------- clusters
def _find_clusters(
    room: Room,
    parts: Sequence[_Part],
    known: Sequence[Path],
    settings: DedupSettings,
    num_groups: int,
    counts: Counter[str],
) -> list[Finished]:
    num_documents = sum(len(np.load(part.hashes / EXACT, mmap_mode="r")) for part in parts)
    runs = _runs(room, parts, settings)
    first_new = next((part.number for part in parts if part.docs is not None), len(parts))
    verify = settings.minhash.verify if settings.near else 0.0
    items: list[Item] = [
        {
            "runs": runs,
            "work": work,
            "first_new": first_new << 32,
            "bytes": sum(16 * num_documents // slices for _, _, slices in work),
        }
        for work in _match_work(num_documents, settings)
    ]
    matched = run_stage(room, "dedup-match", jobs.match_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS)
    _add(counts, matched, "match_")
    files = [done.directory / EDGES for done in matched] + list(known)
    limit = _records(settings)
    num_edges = sum(done.counts["edges"] for done in matched) + sum(path.stat().st_size // 16 for path in known)
    if num_edges <= limit:
        items = [{"files": [str(file) for file in files], "num_groups": num_groups, "bytes": 16 * num_edges}]
    else:
        num_buckets = -(-2 * num_edges // limit)
        stars = [str(file) for file in find_components(room, "dedup-components", files, num_buckets)]
        items = [{"files": stars, "bucket": k, "num_groups": num_groups} for k in range(num_buckets)]
    labelled = run_stage(room, "dedup-label", jobs.label_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS)
    num_labels = sum(done.counts["labels"] for done in labelled)
    num_buckets = max(1, -(-4 * num_labels // limit))
    files = [str(done.directory / jobs.LABELS) for done in labelled]
    items = [
        {
            "group": group,
            "labels": files,
            "parts": [
                [part.number, str(part.hashes), str(part.kept or "")]
                for part in parts[group * GROUP_PARTS : (group + 1) * GROUP_PARTS]
            ],
            "num_buckets": num_buckets,
            "signatures": bool(verify),
            "bytes": num_labels * _MEMBER_BYTES // num_groups,
        }
        for group in range(num_groups)
    ]
    annotated = run_stage(room, "dedup-annotate", jobs.annotate_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS)
    items = [
        {
            "bucket": bucket,
            "files": [str(done.directory / jobs.MEMBERS) for done in annotated],
            "bytes": num_labels * _MEMBER_BYTES // num_buckets,
            "verify": verify,
            "keep_published": settings.keep_published,
            "sample_pairs": settings.sample_pairs,
        }
        for bucket in range(num_buckets)
    ]
    elected = run_stage(room, "dedup-elect", elect_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS)
    _add(counts, elected, "cluster_")
    return elected


def _runs(room: Room, parts: Sequence[_Part], settings: DedupSettings) -> list[list[Any]]:
    if len(parts) <= _FAN_IN:
        return [[str(part.hashes), part.number] for part in parts]
    bands = settings.minhash.bands if settings.near else 0
    items: list[Item] = [
        {
            "first": first,
            "directories": [str(part.hashes) for part in parts[first : first + _FAN_IN]],
            "bands": bands,
        }
        for first in range(0, len(parts), _FAN_IN)
    ]
    return [[str(done.directory), None] for done in run_stage(room, "dedup-gather", gather_job, items, version=VERSION)]


def _match_work(num_documents: int, settings: DedupSettings) -> list[list[list[int]]]:
    """(table, slice, slices) of every item: about as many records each as fit."""
    tables = [*([-1] if settings.exact else []), *(range(settings.minhash.bands) if settings.near else [])]
    limit = _records(settings)
    slices = max(1, -(-num_documents // limit))
    together = max(1, limit // max(1, num_documents)) if slices == 1 else 1
    work = [[table, slice_, slices] for table in tables for slice_ in range(slices)]
    return [work[first : first + together] for first in range(0, len(work), together)]


def _sample(room: Room, parts: Sequence[_Part], elected: Sequence[Finished], settings: DedupSettings) -> Path | None:
    """Texts of sampled pairs of this run."""
    found = np.sort(np.concatenate([np.load(done.directory / PAIRS) for done in elected]))
    docs = {part.number: str(part.docs) for part in parts if part.docs is not None}
    chosen = [(left, right) for _, left, right in found.tolist() if left >> 32 in docs and right >> 32 in docs]
    chosen = chosen[: settings.sample_pairs]
    if not chosen:
        return None
    needed = sorted({node >> 32 for pair in chosen for node in pair})
    item = {
        "pairs": chosen,
        "docs": [[part, docs[part]] for part in needed],
        "chars": _SAMPLE_CHARS,
        "word_shingle": settings.minhash.word_shingle,
        "letter_shingle": settings.minhash.letter_shingle,
    }
    return run_stage(room, "dedup-pairs", jobs.sample_job, [item], version=VERSION)[0].directory / jobs.SAMPLES


# -------------------------------------------------------------------------------------------------------- cuts, parts
def _find_cuts(
    room: Room,
    parts: Sequence[_Part],
    decisions: Sequence[str],
    settings: DedupSettings,
    num_groups: int,
    counts: Counter[str],
) -> list[str]:
    """Files of the places to be cut, [] if nothing is asked for."""
    if not (settings.paragraph_chars or settings.line_chars or settings.substring_tokens):
        return []
    new = [(part, part.docs) for part in parts if part.docs is not None]
    limit = _records(settings)
    num_bytes = 3 * sum(docs.stat().st_size for _, docs in new)  # about that of the texts
    expected = sum(num_bytes // least for least in (settings.paragraph_chars, settings.line_chars) if least)
    if settings.substring_tokens:
        expected += num_bytes * 2 // (4 * (settings.substring_slack + 1))
    num_buckets = max(1, -(-expected // limit))
    wanted = {
        name: getattr(settings, name)
        for name in ("paragraph_chars", "line_chars", "substring_tokens", "substring_slack")
    }
    items: list[Item] = [
        {
            "part": part.number,
            "hashes": str(part.hashes),
            "docs": str(docs),
            "decisions": decisions,
            "num_buckets": num_buckets,
            "records": limit,
            "bytes": 3 * docs.stat().st_size,
            **wanted,
        }
        for part, docs in new
    ]
    pieces = run_stage(room, "dedup-pieces", piece_job, items, version=VERSION, alone_bytes=_ALONE_TEXT)
    _add(counts, pieces, "pieces_")
    items = [
        {
            "bucket": bucket,
            "files": [str(done.directory / PIECES) for done in pieces],
            "num_ranks": len(settings.prefer),
            "num_groups": num_groups,
            "records": limit,
            "bytes": sum((done.directory / PIECES).stat().st_size for done in pieces) // num_buckets,
        }
        for bucket in range(num_buckets)
    ]
    matched = run_stage(
        room, "dedup-match-pieces", match_pieces_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS
    )
    _add(counts, matched, "pieces_")
    return [str(done.directory / CUTS) for done in matched]


def _rewrite(
    room: Room,
    parts: Sequence[_Part],
    decisions: Sequence[str],
    cuts: Sequence[str],
    settings: DedupSettings,
    counts: Counter[str],
) -> list[DedupPart]:
    items: list[Item] = [
        {
            "part": part.number,
            "docs": str(part.docs),
            "decisions": decisions,
            "cuts": cuts,
            "min_left_chars": settings.min_left_chars,
            "bytes": 3 * part.docs.stat().st_size,
        }
        for part in parts
        if part.docs is not None
    ]
    rewritten = run_stage(room, "dedup", jobs.rewrite_job, items, version=VERSION, alone_bytes=_ALONE_TEXT)
    _add(counts, rewritten)
    return [
        DedupPart(
            docs=done.directory / DOCS,
            dropped=done.directory / DROPPED,
            keep=done.directory / jobs.KEEP,
            counts=done.counts,
        )
        for done in rewritten
    ]


def _changed(room: Room, parts: Sequence[_Part], decisions: Sequence[str]) -> dict[int, Path]:
    """kept.npy of the parts of earlier runs, as they are now."""
    old = [part for part in parts if part.docs is None]
    items: list[Item] = [{"part": part.number, "kept": str(part.kept), "decisions": decisions} for part in old]
    if not (items and decisions):
        return {}
    done = run_stage(room, "dedup-earlier", jobs.decide_job, items, version=VERSION, alone_bytes=_ALONE_RECORDS)
    return {part.number: result.directory / jobs.KEPT for part, result in zip(old, done, strict=True)}


# -------------------------------------------------------------------------------------------------------------- index
class _Index:
    """An index directory as this run sees it: the generations before its own."""

    def __init__(self, settings: DedupSettings, prepared: Sequence[Finished]) -> None:
        assert settings.index is not None
        self.path = settings.index.absolute()
        hashing = {"minhash": to_dict(settings.minhash), "near": settings.near, "prefer": list(settings.prefer)}
        self._settings = {**hashing, "version": VERSION, "unicode": unicodedata.unidata_version}
        names = [done.digest for done in prepared]
        self._run = hashlib.sha256(json.dumps([names, to_dict(settings)], sort_keys=True).encode()).hexdigest()
        self._generations: list[dict[str, Any]] = []
        manifest = self.path / _MANIFEST
        if manifest.exists():
            table = json.loads(manifest.read_bytes())
            if table["settings"] != self._settings:
                different = sorted(k for k in self._settings if table["settings"].get(k) != self._settings[k])
                raise ValueError(
                    f"{self.path} was made with other {', '.join(different)} of dedup; use those or another index"
                )
            self._generations = table["generations"]
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is no index of ours and not empty; give another directory for dedup.index")
        runs = [generation["run"] for generation in self._generations]
        self._before = runs.index(self._run) if self._run in runs else len(runs)
        self.parts = self._earlier_parts()
        self.labels = sorted((self._directory(self._before - 1) / "labels").iterdir()) if self._before else []

    def _directory(self, generation: int) -> Path:
        return self.path / f"{generation:05d}"

    def _earlier_parts(self) -> list[_Part]:
        parts: list[_Part] = []
        for generation in range(self._before):
            for number in range(self._generations[generation]["parts"]):
                hashes = self._directory(generation) / "parts" / f"{number:05d}"
                kept = hashes / jobs.KEPT
                for later in range(generation + 1, self._before):
                    changed = self._directory(later) / "kept" / f"{len(parts):05d}.npy"
                    kept = changed if changed.exists() else kept
                parts.append(_Part(len(parts), hashes, None, kept))
        return parts

    def add(
        self, new: Sequence[_Part], rewritten: Sequence[DedupPart], labels: Sequence[Path], changed: dict[int, Path]
    ) -> None:
        """Add this run, unless it is in."""
        if self._before < len(self._generations):
            return
        directory = self._directory(self._before)
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for folder in ("parts", "labels", "kept"):
            (partial / folder).mkdir(parents=True)
        for number, (part, made) in enumerate(zip(new, rewritten, strict=True)):
            to = partial / "parts" / f"{number:05d}"
            to.mkdir()
            for name in (ROWS, EXACT, BANDS, SIGNATURES):
                if (part.hashes / name).exists():
                    shutil.copyfile(part.hashes / name, to / name)
            if made.keep is not None:
                shutil.copyfile(made.keep.with_name(jobs.KEPT), to / jobs.KEPT)
            else:
                np.save(to / jobs.KEPT, np.ones(len(np.load(part.hashes / EXACT, mmap_mode="r")), bool))
        for number, path in enumerate(labels):
            shutil.copyfile(path, partial / "labels" / f"{number:05d}.bin")
        for number, path in changed.items():
            shutil.copyfile(path, partial / "kept" / f"{number:05d}.npy")
        shutil.rmtree(directory, ignore_errors=True)  # of an attempt that did not reach the manifest
        partial.rename(directory)
        self._generations.append({"run": self._run, "parts": len(new)})
        table = {"settings": self._settings, "generations": self._generations}
        write_atomically(self.path / _MANIFEST, json.dumps(table, indent=1) + "\n")
