"""The jobs of document dedup, from the hashes of every part to which documents stay.

    match      equal exact hashes and equal band keys, range by range of hash values -> edges between nodes
    label      edges -> (node, smallest node of its cluster), grouped by part (beyond one item: data.components)
    annotate   what decides who survives is joined to every node of a cluster, part by part -> grouped by cluster
    elect      survivors and sizes -> decisions grouped by part; clusters.parquet (`pipeline.dedup_elect`)
    rewrite    every part without its duplicates, and what was dropped with the reason

Each is a function from an item to files and counts (`pipeline.work`), holds about DedupSettings.memory_mb and gives the
same bytes whatever the number of workers. `pipeline.dedup` strings them together; cuts inside documents are
`pipeline.dedup_pieces`'.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwench.data import components
from qwench.data.components import EDGE, EDGES
from qwench.data.minhash import MinHasher, MinHashSettings, estimated_jaccard, shingle_hashes
from qwench.data.pipeline.buckets import BucketWriter, bucket_of, iterate, write_tables
from qwench.data.pipeline.dedup_hashes import (
    ROW,
    SIGNATURES,
    RunReader,
    decisions_of,
    group_of,
    open_runs,
    part_of,
    read_rows,
)
from qwench.data.pipeline.dedup_pieces import cut_text, read_cuts
from qwench.data.pipeline.parts import DOCS, DROPPED, DROPPED_SCHEMA, PartWriter, read_part
from qwench.data.pipeline.work import Item

LABEL = np.dtype([("node", "<u8"), ("root", "<u8")])
LABELS, MEMBERS = "labels.bin", "members.arrow"
KEPT, KEEP, SAMPLES = "kept.npy", "keep.parquet", "pairs.parquet"
STAGE = "dedup"
_SAMPLE_CHARS = 1_000_000
"""Of a text of a sampled pair, no more is held and compared."""
_LONG_CHARS = 500_000


# ------------------------------------------------------------------------------------------------------------- match
def match_job(item: Item, directory: Path) -> dict[str, Any]:
    """Edges of the candidates in ranges of hash values: `work` is a list of (table, slice, slices); table -1: exact.

    Groups without a node from `first_new` on are left out: an earlier run has matched them.
    """
    runs = list(open_runs(item))
    counts: Counter[str] = Counter()
    edges: list[np.ndarray] = []
    for table, slice_, slices in item["work"]:
        begin, end = (slice_ << 64) // slices, ((slice_ + 1) << 64) // slices
        nodes, groups = _groups(runs, table, begin, end, item["first_new"])
        name = "exact" if table < 0 else "near"
        counts[f"{name}_groups"] += int(groups.max(initial=-1)) + 1
        counts[f"{name}_in_groups"] += len(nodes)
        first = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])[: len(groups)])
        leader = nodes[first][groups] if len(groups) else nodes
        found = np.stack([leader, nodes], axis=1)[leader != nodes]
        edges.append(components.stars(found))
    joined = components.stars(np.concatenate(edges)) if edges else np.zeros((0, 2), np.uint64)
    _write_edges(directory / EDGES, joined)
    return {**counts, "edges": len(joined)}


def _groups(
    runs: Sequence[RunReader], table: int, begin: int, end: int, first_new: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and numbers of the groups (0, 1, ...) of all nodes that share their hash with another one."""
    rows = np.concatenate([run.exact(begin, end) if table < 0 else run.band(table, begin, end) for run in runs])
    if table < 0:
        rows = rows[np.lexsort((rows["low"], rows["hash"]))]
        same = (rows["hash"][1:] == rows["hash"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    else:
        rows = rows[np.argsort(rows["hash"], kind="stable")]
        same = rows["hash"][1:] == rows["hash"][:-1]
    shared = np.zeros(len(rows), bool)
    shared[1:] |= same
    shared[:-1] |= same
    number = np.cumsum(np.concatenate([[True], ~same])[: len(rows)]) - 1
    rows, number = rows[shared], number[shared]
    new = np.zeros(int(number.max(initial=-1)) + 1, bool)
    new[number[rows["node"] >= np.uint64(first_new)]] = True
    rows, number = rows[new[number]], number[new[number]]
    return rows["node"], np.unique(number, return_inverse=True)[1]


def _write_edges(path: Path, edges: np.ndarray) -> None:
    """Edges [n, 2] (smaller, larger) as one bucket."""
    writer = BucketWriter(path, EDGE, 1)
    records = np.zeros(len(edges), EDGE)
    records["at"], records["to"] = edges[:, 0], edges[:, 1]
    writer.add(np.zeros(len(edges), np.int64), records)
    writer.close()


# ------------------------------------------------------------------------------------------------------------- label
def label_job(item: Item, directory: Path) -> dict[str, Any]:
    """All nodes of the clusters with the smallest node of each, to the groups of parts.

    With `bucket` the files hold that bucket of finished stars; without, they hold edges that fit into memory.
    """
    writer = BucketWriter(directory / LABELS, LABEL, item["num_groups"])
    files = [Path(file) for file in item["files"]]
    if "bucket" not in item:
        edges = np.concatenate([chunk for file in files for chunk in iterate([file], 0, EDGE)] or [np.zeros(0, EDGE)])
        nodes, roots = components.components(np.stack([edges["at"], edges["to"]], axis=1))
        _add_labels(writer, nodes, roots)
    else:
        known = np.zeros(0, np.uint64)
        for chunk in iterate(files, item["bucket"], EDGE):
            chunk = np.unique(chunk[chunk["at"] < chunk["to"]])
            roots = np.setdiff1d(chunk["at"], known)
            known = np.union1d(known, roots)
            _add_labels(writer, np.concatenate([roots, chunk["to"]]), np.concatenate([roots, chunk["at"]]))
    writer.close()
    return {"labels": writer.num_records}


def _add_labels(writer: BucketWriter, nodes: np.ndarray, roots: np.ndarray) -> None:
    records = np.zeros(len(nodes), LABEL)
    records["node"], records["root"] = nodes, roots
    writer.add(group_of(nodes), records)


# ---------------------------------------------------------------------------------------------------------- annotate
def annotate_job(item: Item, directory: Path) -> dict[str, Any]:
    """The members of clusters in one group of parts with id, exact hash and rank, to the buckets of their clusters.

    `parts`: [number, directory of its hashes, "" or the file that says which rows an earlier run kept] each.
    """
    labels = np.concatenate(list(iterate(map(Path, item["labels"]), item["group"], LABEL)) or [np.zeros(0, LABEL)])
    labels = np.unique(labels)  # by node
    tables: list[pa.Table] = []
    parts = part_of(labels["node"])
    schema = None
    for part, source, kept in item["parts"]:
        mine = labels[parts == part]
        rows = read_rows(Path(source))
        places = (mine["node"] & ROW).astype(np.int64)
        published = np.load(kept)[places] if kept else np.zeros(len(mine), bool)
        chosen = rows.take(pa.array(places))
        columns = {"root": mine["root"], "node": mine["node"], "published": published.astype(np.uint8)}
        for name in rows.column_names:
            columns[name] = chosen.column(name).combine_chunks()
        if item["signatures"]:
            signatures = np.ascontiguousarray(np.load(Path(source) / SIGNATURES, mmap_mode="r")[places])
            kind = pa.binary(signatures.shape[1])
            columns["signature"] = pa.Array.from_buffers(kind, len(places), [None, pa.py_buffer(signatures)])
        tables.append(pa.table(columns))
        schema = tables[-1].schema
    table = pa.concat_tables(tables)
    assert schema is not None
    buckets = bucket_of(table.column("root").to_numpy(), item["num_buckets"])
    write_tables(directory / MEMBERS, table, buckets, item["num_buckets"])
    return {"members": table.num_rows}


# ----------------------------------------------------------------------------------------------------------- rewrite
def rewrite_job(item: Item, directory: Path) -> dict[str, Any]:
    """docs.parquet without the duplicates and with the cuts made, dropped.parquet, keep.parquet (a row a document)."""
    decisions, cuts = decisions_of(item), read_cuts(item)
    counts: Counter[str] = Counter()
    kept_rows: list[bool] = []
    rows: list[tuple[int, int]] = []
    with PartWriter(directory / DOCS) as docs, PartWriter(directory / DROPPED, DROPPED_SCHEMA) as dropped:
        for row, document in enumerate(read_part(Path(item["docs"]))):
            decision = decisions.get(row)
            size = decision["size"] if decision else 1
            rows.append((decision["cluster"] if decision else (item["part"] << 32) + row, size))
            kept_rows.append(decision is None or decision["kept"])
            if decision is not None and not decision["kept"]:
                meta = {**document.meta, "duplicate_of": decision["survivor"]}
                dropped.add(dataclasses.replace(document, meta=meta), STAGE, decision["reason"], float(size))
                counts[decision["reason"]] += 1
                counts[f"{decision['reason']}_chars"] += len(document.text)
                continue
            if size > 1:
                document = dataclasses.replace(document, meta={**document.meta, "duplicates": size})
            if row in cuts:
                text = cut_text(document.text, cuts[row])
                counts["cut_documents"] += 1
                counts["cut_chars"] += len(document.text) - len(text)
                if len(text.strip()) < max(1, item["min_left_chars"]):
                    dropped.add(document, STAGE, "duplicate_pieces", float(len(text)))
                    counts["duplicate_pieces"] += 1
                    kept_rows[-1] = False
                    continue
                document = dataclasses.replace(document, text=text)
            docs.add(document)
        counts.update({"documents": docs.num_documents, "bytes": docs.num_bytes, "dropped": dropped.num_documents})
    _write_keep(directory, kept_rows, rows)
    return dict(counts)


def decide_job(item: Item, directory: Path) -> dict[str, Any]:
    """keep.parquet of a part of an earlier run, whose documents are not at hand; `kept` says what it kept then."""
    kept = np.load(item["kept"])
    rows = [((item["part"] << 32) + row, 1) for row in range(len(kept))]
    for row, decision in decisions_of(item).items():
        rows[row] = (decision["cluster"], decision["size"])
        kept[row] = decision["kept"]
    _write_keep(directory, kept.tolist(), rows)
    return {"documents": int(kept.sum())}


def _write_keep(directory: Path, kept: Sequence[bool], rows: Sequence[tuple[int, int]]) -> None:
    np.save(directory / KEPT, np.array(kept, bool))
    columns = {
        "keep": pa.array(kept, pa.bool_()),
        "cluster": pa.array([cluster for cluster, _ in rows], pa.int64()),
        "size": pa.array([size for _, size in rows], pa.int64()),
    }
    pq.write_table(pa.table(columns), directory / KEEP, compression="zstd", write_statistics=False)


# ----------------------------------------------------------------------------------------------------------- samples
def sample_job(item: Item, directory: Path) -> dict[str, Any]:
    """pairs.parquet: the texts (their first `chars`) and the Jaccard similarity of near duplicates, for a person."""
    wanted = {tuple(pair) for pair in item["pairs"]}
    nodes = {node for pair in wanted for node in pair}
    texts: dict[int, tuple[str, str]] = {}
    for part, path in item["docs"]:
        rows = sorted(node & int(ROW) for node in nodes if node >> 32 == part)
        for row, document in _rows_of(Path(path), rows):
            texts[(part << 32) + row] = (document.id, document.text[:_SAMPLE_CHARS])
    hasher = MinHasher(MinHashSettings(word_shingle=item["word_shingle"], letter_shingle=item["letter_shingle"]))
    table: dict[str, list[Any]] = {name: [] for name in ("left_id", "right_id", "jaccard", "left_text", "right_text")}
    for left, right in sorted(wanted):
        (left_id, left_text), (right_id, right_text) = texts[left], texts[right]
        similarity = _similarity(left_text, right_text, hasher)
        row = (left_id, right_id, similarity, left_text[: item["chars"]], right_text[: item["chars"]])
        for name, value in zip(table, row, strict=True):
            table[name].append(value)
    types = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.string()]
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(table, types, strict=True)])
    pq.write_table(pa.table(table, schema=schema), directory / SAMPLES, compression="zstd")
    return {"pairs": len(wanted)}


def _similarity(left: str, right: str, hasher: MinHasher) -> float:
    """The Jaccard similarity of the sets of shingles; of long texts as signatures estimate it."""
    if len(left) + len(right) > _LONG_CHARS:
        signatures = hasher.hash_texts([left, right]).signatures
        return float(estimated_jaccard(signatures[0], signatures[1]))
    sets = [np.unique(shingle_hashes(text, hasher.settings)) for text in hasher.normalise([left, right])]
    common = len(np.intersect1d(*sets, assume_unique=True))
    return common / max(1, len(sets[0]) + len(sets[1]) - common)


def _rows_of(path: Path, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
    wanted = set(rows)
    for row, document in enumerate(read_part(path)):
        if row in wanted:
            yield row, document
