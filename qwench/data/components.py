"""Connected components of a graph given as edges on disk, in parallel and in bounded memory.

Large-star and small-star [Kiveris et al. 2014, "Connected Components in MapReduce and Beyond"] take turns until every
component is a star around its smallest node. Nodes are 64-bit numbers. Edges lie in bucket files: an item of a round
owns the nodes of one bucket, reads their edges slice by slice (twice: for the smallest neighbours, then to emit), and
writes edges for the next round. It holds one number for every node of its bucket, never all edges, so a node with a
billion neighbours is no different. A graph that fits into one item is done there at once (`components`); no stage needs
one process for more than that.

Which edges there are is not decided here (`data.pipeline.dedup_jobs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwench.data.pipeline.buckets import BucketWriter, bucket_of, iterate, offsets
from qwench.data.pipeline.work import Item, Room, run_stage

EDGE = np.dtype([("at", "<u8"), ("to", "<u8")])
"""An edge as its bucket's owner sees it: `at` is a node of the bucket."""
EDGES = "edges.bin"
MOST_ROUNDS = 100
"""Rounds grow with the logarithm of the longest path; more than this is a bug."""


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (sorted uint64) of the edges [n, 2] and the smallest node of the component of each.

    >>> components(np.array([[1, 2], [2, 3], [7, 9]], np.uint64))
    (array([1, 2, 3, 7, 9], dtype=uint64), array([1, 1, 1, 7, 7], dtype=uint64))
    """
    nodes, places = np.unique(np.asarray(edges, np.uint64), return_inverse=True)
    left, right = places.reshape(-1, 2).T
    label = np.arange(len(nodes))
    while len(left):
        np.minimum.at(label, np.maximum(left, right), np.minimum(left, right))
        while True:  # every label becomes the root of its tree: labels only ever point to smaller places
            root = label[label]
            if np.array_equal(root, label):
                break
            label = root
        left, right = label[left], label[right]
        apart = left != right
        left, right = left[apart], right[apart]
    return nodes, nodes[label]


def stars(edges: np.ndarray) -> np.ndarray:
    """The fewest edges [m, 2] with the same components: (smallest node, other node)."""
    nodes, roots = components(edges)
    leaf = nodes != roots
    return np.stack([roots[leaf], nodes[leaf]], axis=1)


# ------------------------------------------------------------------------------------------------------- in parallel
def find_components(room: Room, name: str, files: Sequence[Path], num_buckets: int) -> list[Path]:
    """Bucket files of the stars of the graph whose edges are in `files` (bucket files of EDGE with any buckets).

    An edge of the result is (`at` = smallest node of the component, `to` = other node), in the bucket of `at`. Stages
    are called `name`-000, `name`-001, ...; how many there are depends on the graph alone.
    """
    items: list[Item] = [{"files": [str(path)], "num_buckets": num_buckets} for path in files]
    stage = run_stage(room, f"{name}-000", spread_job, items)
    quiet = 0
    for round_ in range(1, MOST_ROUNDS):
        small = round_ % 2 == 0
        # The last round read these files from both ends; large-star needs an edge at both, small-star at the larger.
        inputs = [str(done.directory / EDGES) for done in stage]
        items = [{"files": inputs, "bucket": k, "num_buckets": num_buckets, "small": small} for k in range(num_buckets)]
        stage = run_stage(room, f"{name}-{round_:03d}", star_job, items)
        quiet = quiet + 1 if not any(done.counts["changes"] for done in stage) else 0
        if small and quiet >= 2:
            return [done.directory / EDGES for done in stage]
    raise AssertionError(f"components did not settle in {MOST_ROUNDS} rounds")


def spread_job(item: Item, directory: Path) -> dict[str, Any]:
    """Edges of one file, contracted, to the buckets of both their ends."""
    writer = BucketWriter(directory / EDGES, EDGE, item["num_buckets"])
    for chunk in _all_edges([Path(file) for file in item["files"]]):
        _emit(writer, stars(np.stack([chunk["at"], chunk["to"]], axis=1)), both=True)
    writer.close()
    return {"edges": writer.num_records}


def star_job(item: Item, directory: Path) -> dict[str, Any]:
    """One round for the nodes of a bucket. Counts "changes": edges that this round moved."""
    files, bucket = [Path(file) for file in item["files"]], item["bucket"]
    small: bool = item["small"]
    writer = BucketWriter(directory / EDGES, EDGE, item["num_buckets"])
    nodes, least = _smallest_neighbours(files, bucket)
    changes = 0
    for chunk in iterate(files, bucket, EDGE):
        at, to = chunk["at"], chunk["to"]
        smallest = least[np.searchsorted(nodes, at)]
        if small:  # at the larger end: it and its smaller neighbours go to the smallest of them
            mine = to < at
            at, to, smallest = at[mine], to[mine], smallest[mine]
            moved = to != smallest
            changes += int(moved.sum())
            edges = [np.stack([smallest[moved], to[moved]], axis=1), np.stack([smallest, at], axis=1)]
            _emit(writer, np.unique(np.concatenate(edges), axis=0), both=True)
        else:  # at every node: its larger neighbours go to the smallest one
            mine = to > at
            centre = np.minimum(at, smallest)[mine]
            changes += int((centre != at[mine]).sum())
            _emit(writer, np.unique(np.stack([centre, to[mine]], axis=1), axis=0), both=False)
    writer.close()
    return {"edges": writer.num_records, "changes": changes}


def _smallest_neighbours(files: Sequence[Path], bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of a bucket, sorted, and the smallest neighbour of each."""
    nodes, least = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    for chunk in iterate(files, bucket, EDGE):
        at, to = np.concatenate([nodes, chunk["at"]]), np.concatenate([least, chunk["to"]])
        order = np.lexsort((to, at))
        at, to = at[order], to[order]
        first = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]])[: len(at)])
        nodes, least = at[first], to[first]
    return nodes, least


def _emit(writer: BucketWriter, edges: np.ndarray, both: bool) -> None:
    """Write edges (smaller, larger) to the bucket of the larger end, and of the smaller if `both`."""
    small, large = edges[:, 0], edges[:, 1]
    records = np.zeros(len(edges) * (1 + both), EDGE)
    records["at"][: len(edges)], records["to"][: len(edges)] = large, small
    if both:
        records["at"][len(edges) :], records["to"][len(edges) :] = small, large
    writer.add(bucket_of(records["at"], writer.num_buckets), records)


def _all_edges(files: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in files:
        for bucket in range(len(offsets(path)) - 1):
            yield from iterate([path], bucket, EDGE)
