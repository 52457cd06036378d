from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from qwench.data import components
from qwench.data.components import EDGE, find_components
from qwench.data.pipeline.buckets import BucketWriter, bucket_of, iterate, iterate_tables, read, write_tables
from qwench.data.pipeline.work import Room


def random_graph(kind: str, draw: np.random.Generator) -> np.ndarray:
    if kind == "path":
        order = draw.permutation(3000)
        edges = np.stack([order[:-1], order[1:]], axis=1)
    elif kind == "hub":
        edges = np.stack([np.full(2000, 700), draw.permutation(2000)], axis=1)
    elif kind == "tree":
        edges = np.stack([np.arange(1, 2000), np.arange(1, 2000) // 2], axis=1)
    else:
        edges = draw.integers(0, 3000, (int(kind), 2))
    # nodes as they are in use: part << 32 | row
    return (edges.astype(np.uint64) % np.uint64(7) << np.uint64(32)) + edges.astype(np.uint64)


def truth(edges: np.ndarray) -> dict[int, int]:
    graph = nx.Graph(edges.tolist())
    return {node: min(members) for members in nx.connected_components(graph) for node in members}


KINDS = ["path", "hub", "tree", "300", "1500", "6000"]


@pytest.mark.parametrize("kind", KINDS)
def test_components_in_memory_are_networkx(kind):
    edges = random_graph(kind, np.random.default_rng(1))
    nodes, roots = components.components(edges)
    assert dict(zip(nodes.tolist(), roots.tolist(), strict=True)) == truth(edges)
    stars = components.stars(edges)
    assert {b: a for a, b in stars.tolist()} == {n: r for n, r in truth(edges).items() if n != r}


@pytest.mark.parametrize("kind", KINDS)
def test_components_over_bucket_files_are_networkx(kind, tmp_path: Path):
    edges = random_graph(kind, np.random.default_rng(2))
    files = write_edges(tmp_path, edges)
    room = Room(path=tmp_path / "work", in_process=True)
    found: dict[int, int] = {}
    for bucket in range(5):
        for chunk in iterate(find_components(room, "cc", files, 5), bucket, EDGE):
            chunk = chunk[chunk["at"] < chunk["to"]]
            assert (bucket_of(chunk["at"], 5) == bucket).all()
            found |= dict(zip(chunk["to"].tolist(), chunk["at"].tolist(), strict=True))
    assert found == {n: r for n, r in truth(edges).items() if n != r}
    assert len(list((tmp_path / "work").iterdir())) < 25  # rounds


def write_edges(directory: Path, edges: np.ndarray) -> list[Path]:
    files = []
    for number, part in enumerate(np.array_split(edges, 3)):
        files.append(directory / f"{number}.bin")
        records = np.zeros(len(part), EDGE)
        records["at"], records["to"] = part.T
        writer = BucketWriter(files[-1], EDGE, 1)
        writer.add(np.zeros(len(part), np.int64), records)
        writer.close()
    return files


def test_no_edges_are_no_components(tmp_path: Path):
    nodes, roots = components.components(np.zeros((0, 2), np.uint64))
    assert len(nodes) == len(roots) == 0
    files = write_edges(tmp_path, np.zeros((0, 2), np.uint64))
    out = find_components(Room(path=tmp_path / "work", in_process=True), "cc", files, 3)
    assert sum(len(read(out, bucket, EDGE)) for bucket in range(3)) == 0


def test_spilled_buckets_are_those_written_at_once(tmp_path: Path):
    draw = np.random.default_rng(3)
    records = np.zeros(5000, EDGE)
    records["at"], records["to"] = draw.integers(0, 1 << 60, (2, 5000))
    buckets = bucket_of(records["at"], 7)
    for name, chunk in (("one", 1 << 20), ("spilled", 300)):
        writer = BucketWriter(tmp_path / name, EDGE, 7, chunk_records=chunk)
        for first in range(0, 5000, 900):
            writer.add(buckets[first : first + 900], records[first : first + 900])
        writer.close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "spilled").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "spilled"]
    np.testing.assert_array_equal(read([tmp_path / "spilled"], 4, EDGE), records[buckets == 4])


def test_a_cut_file_is_named(tmp_path: Path):
    (file, *_) = write_edges(tmp_path, np.array([[1, 2], [3, 4]], np.uint64).repeat(5, axis=0))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"0\.bin is damaged"):
        list(iterate([file], 0, EDGE))


def test_tables_come_back_by_bucket(tmp_path: Path):
    import pyarrow as pa

    table = pa.table({"id": ["a", "b", "c", "d"], "n": [1, 2, 3, 4]})
    write_tables(tmp_path / "t.arrow", table, np.array([2, 0, 2, 0]), 3)
    got = [pa.concat_tables(list(iterate_tables([tmp_path / "t.arrow"], k))).to_pylist() for k in (0, 2)]
    assert got == [[{"id": "b", "n": 2}, {"id": "d", "n": 4}], [{"id": "a", "n": 1}, {"id": "c", "n": 3}]]
    assert not list(iterate_tables([tmp_path / "t.arrow"], 1))
