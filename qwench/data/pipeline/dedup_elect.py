"""The job that elects the survivors of clusters: which of their documents stay, and in whose place.

Without verification the whole cluster goes but for its best document. With it, the best one stands for those whose
signatures resemble its own; of the others the best stands for those that resemble it, and so on. So a chain of
documents, each like the next and its ends unlike, is not reduced to one end, and every document that goes has one like
it that stays.

Members come group of parts by group of parts, as `annotate_job` wrote them; what is held is a row for every cluster and
a number for every member of a bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwench.data.components import EDGE, EDGES
from qwench.data.minhash import estimated_jaccard, mix
from qwench.data.pipeline.buckets import BucketWriter, iterate_tables
from qwench.data.pipeline.dedup_hashes import ROW, descending, part_of
from qwench.data.pipeline.work import Item

DECISIONS, CLUSTERS, PAIRS = "decisions.arrow", "clusters.parquet", "pairs.npy"
PAIR = np.dtype([("key", "<u8"), ("left", "<u8"), ("right", "<u8")])
_KEPT, _EXACT, _NEAR = "", "exact_duplicate", "near_duplicate"
_MOST_ROUNDS = 256
"""Elections in a component of the graph of candidates; what then resembles no survivor stays ("unresolved")."""
_ALIVE = -1
DECISION_SCHEMA = pa.schema(
    [
        ("node", pa.uint64()),
        ("cluster", pa.uint64()),
        ("size", pa.int64()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("survivor", pa.string()),
    ]
)
CLUSTER_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("survivor", pa.string(), nullable=False),
    ]
)


def elect_job(item: Item, directory: Path) -> dict[str, Any]:
    """Survivors of the clusters of a bucket, and what becomes of each member."""
    files, bucket = [Path(file) for file in item["files"]], item["bucket"]
    survivors, assigned, unresolved = _elect(files, bucket, item["verify"], item["keep_published"])
    counts: Counter[str] = Counter({"unresolved": unresolved})
    labels = BucketWriter(directory / EDGES, EDGE, 1)
    pairs = np.zeros(0, PAIR)
    with (
        pq.ParquetWriter(directory / CLUSTERS, CLUSTER_SCHEMA, compression="zstd", write_statistics=False) as clusters,
        pa.OSFile(str(directory / DECISIONS), "wb") as file,
        pa.ipc.new_file(file, DECISION_SCHEMA) as decisions,
    ):
        for path, places in zip(files, assigned, strict=True):  # one a group of parts; so is a batch of the decisions
            members = next(iterate_tables([path], bucket), None)
            if members is None:
                decisions.write_batch(pa.RecordBatch.from_pylist([], schema=DECISION_SCHEMA))
                continue
            table = _decided(members, survivors, places, item["keep_published"])
            decisions.write_batch(table.combine_chunks().to_batches()[0])
            kept, reasons = table.column("kept").to_numpy(), Counter(table.column("reason").to_pylist())
            old = members.column("published").to_numpy().astype(bool)
            counts.update({"exact": reasons[_EXACT], "near": reasons[_NEAR], "displaced": int((old & ~kept).sum())})
            _write_clusters(clusters, members, table)
            root, node = members.column("root").to_numpy(), members.column("node").to_numpy()
            records = np.zeros(int((root != node).sum()), EDGE)
            records["at"], records["to"] = root[root != node], node[root != node]
            labels.add(np.zeros(len(records), np.int64), records)
            pairs = _sampled(pairs, table, item["sample_pairs"])
    labels.close()
    np.save(directory / PAIRS, pairs)
    sizes = survivors.size[survivors.size > 1]
    histogram = Counter(int(size).bit_length() - 1 for size in sizes.tolist())
    return {
        **counts,
        "clusters": len(sizes),
        "members": int(sizes.sum()),
        "largest": int(sizes.max(initial=0)),
        "sizes": {str(1 << power): count for power, count in sorted(histogram.items())},
    }


@dataclass(slots=True)
class _Best:
    """The best document of every cluster, sorted by root, with what it is compared by."""

    root: np.ndarray
    keys: np.ndarray
    """uint64 [keys, clusters]: what orders members, the most important last, as `np.lexsort` wants it."""
    id: pa.Array
    signature: np.ndarray
    """uint8 [clusters, P], or [clusters, 0] without verification."""
    size: np.ndarray
    """Documents that it stands for, itself included."""

    def take(self, order: np.ndarray) -> _Best:
        ids = self.id.take(pa.array(order))
        return _Best(self.root[order], self.keys[:, order], ids, self.signature[order], self.size[order])


def _elect(
    files: Sequence[Path], bucket: int, verify: float, keep_published: bool
) -> tuple[_Best, list[np.ndarray], int]:
    """Survivors, for every member of every file the place of its own among them, and how many were left over."""
    assigned = [
        np.full(sum(table.num_rows for table in iterate_tables([path], bucket)), _ALIVE, np.int64) for path in files
    ]
    elected: list[_Best] = []
    first = unresolved = 0
    for _ in range(_MOST_ROUNDS):
        best: _Best | None = None
        for members, places in _members(files, bucket, assigned):
            alive = np.flatnonzero(places == _ALIVE)
            if len(alive):
                best = _better(best, _candidates(members.take(pa.array(alive)), keep_published))
        if best is None:
            break
        for members, places in _members(files, bucket, assigned):
            alive = np.flatnonzero(places == _ALIVE)
            if not len(alive):
                continue
            mine = _candidates(members.take(pa.array(alive)), keep_published)
            place = np.searchsorted(best.root, mine.root)
            like = mine.keys[:3] == best.keys[:3, place]
            stands = like[0] | (like[1] & like[2])  # it is the survivor or equal to it
            if verify:
                stands |= estimated_jaccard(mine.signature, best.signature[place]) >= verify
            else:
                stands[:] = True
            np.add.at(best.size, place[stands], 1)
            places[alive[stands]] = first + place[stands]
        first += len(best.root)
        elected.append(best)
    for members, places in _members(files, bucket, assigned):
        alive = np.flatnonzero(places == _ALIVE)
        if len(alive):
            alone = _candidates(members.take(pa.array(alive)), keep_published)
            alone.size[:] = 1
            places[alive] = first + np.arange(len(alive))
            first += len(alive)
            unresolved += len(alive)
            elected.append(alone)
    return _joined(elected), assigned, unresolved


def _members(
    files: Sequence[Path], bucket: int, assigned: Sequence[np.ndarray]
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    for path, places in zip(files, assigned, strict=True):
        if (places == _ALIVE).any():
            for members in iterate_tables([path], bucket):
                yield members, places


def _candidates(members: pa.Table, keep_published: bool) -> _Best:
    """The members as they are compared; they stand for nobody yet."""
    ranks = [name for name in members.column_names if name.startswith("rank")]
    # By rank, then by name, text and, if all that is equal, place.
    columns = [members.column(name).to_numpy() for name in ("node", "low", "high", "tie")]
    columns += [descending(members.column(name).to_numpy()) for name in reversed(ranks)]
    if keep_published:
        columns.append(np.uint64(1) - members.column("published").to_numpy().astype(np.uint64))
    signature = np.zeros((members.num_rows, 0), np.uint8)
    if "signature" in members.column_names:
        signatures = members.column("signature").combine_chunks()
        width = signatures.type.byte_width
        begin = signatures.offset * width
        signature = np.frombuffer(signatures.buffers()[1], np.uint8)[begin : begin + len(signatures) * width]
        signature = signature.reshape(-1, width)
    root, ids = members.column("root").to_numpy(), members.column("id").combine_chunks()
    return _Best(root, np.stack(columns), ids, signature, np.zeros(len(root), np.int64))


def _joined(parts: Sequence[_Best]) -> _Best:
    if not parts:
        empty = np.zeros(0, np.uint64)
        return _Best(empty, np.zeros((5, 0), np.uint64), pa.array([], pa.string()), empty, np.zeros(0, np.int64))
    return _Best(
        np.concatenate([part.root for part in parts]),
        np.concatenate([part.keys for part in parts], axis=1),
        pa.concat_arrays([part.id for part in parts]),
        np.concatenate([part.signature for part in parts]),
        np.concatenate([part.size for part in parts]),
    )


def _better(best: _Best | None, further: _Best) -> _Best:
    """The best of `best` and further candidates, one a cluster."""
    both = further if best is None else _joined([best, further])
    order = np.lexsort((*both.keys, both.root))
    root = both.root[order]
    return both.take(order[np.concatenate([[True], root[1:] != root[:-1]])[: len(root)]])


def _decided(members: pa.Table, survivors: _Best, places: np.ndarray, keep_published: bool) -> pa.Table:
    node = members.column("node").to_numpy()
    survivor = survivors.keys[0][places]
    kept = node == survivor
    if keep_published:
        kept |= members.column("published").to_numpy().astype(bool)
    low, high = survivors.keys[1][places], survivors.keys[2][places]
    exact = (members.column("low").to_numpy() == low) & (members.column("high").to_numpy() == high)
    return pa.table(
        {
            "node": node,
            "cluster": survivor,
            "size": survivors.size[places],
            "kept": kept,
            "reason": pa.array(np.where(kept, _KEPT, np.where(exact, _EXACT, _NEAR)).tolist(), pa.string()),
            "survivor": survivors.id.take(pa.array(places)),
        },
        schema=DECISION_SCHEMA,
    )


def _write_clusters(writer: pq.ParquetWriter, members: pa.Table, decided: pa.Table) -> None:
    """Rows of those that are not alone."""
    node = decided.column("node").to_numpy()
    columns = {
        "id": members.column("id"),
        "part": part_of(node),
        "row": (node & ROW).astype(np.int64),
        "cluster": decided.column("cluster").to_numpy().astype(np.int64),
        **{name: decided.column(name) for name in ("size", "kept", "reason", "survivor")},
    }
    table = pa.table(columns, schema=CLUSTER_SCHEMA)
    writer.write_table(table.filter(pa.array(decided.column("size").to_numpy() > 1)))


def _sampled(pairs: np.ndarray, decided: pa.Table, count: int) -> np.ndarray:
    """`pairs` with further ones of near duplicates and their survivors, the `count` with the smallest random keys."""
    near = np.flatnonzero(np.array(decided.column("reason").to_pylist(), object) == _NEAR)
    further = np.zeros(len(near), PAIR)
    further["left"] = decided.column("cluster").to_numpy()[near]
    further["right"] = decided.column("node").to_numpy()[near]
    further["key"] = mix(mix(further["left"]) ^ further["right"])
    return np.sort(np.concatenate([pairs, further]))[:count]
