"""What dedup remembers of a part file's documents: exact hashes, MinHash bands, and what decides who survives.

    rows.arrow       id, exact hash (high, low), tie, chars, shingles, rank: one row a document, in the part's order
    exact.npy        (hash, low, row) sorted by hash
    bands.npy        [bands, texts] of (hash, row), each band sorted by hash
    signatures.npy   [rows, P] low bytes of the signatures, only if candidates are verified

About 260 bytes a document by default. A document is a node: its part's number << 32 | its row. `RunReader` reads any
range of hash values of a table without reading the rest, and `gather_job` merges the files of many parts, so that the
number of reads stays small.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qwench.data.dedup import DedupSettings
from qwench.data.minhash import MinHasher, band_keys
from qwench.data.pipeline.buckets import iterate_tables
from qwench.data.pipeline.work import Item
from qwench.types import Document

ROWS, EXACT, BANDS, SIGNATURES = "rows.arrow", "exact.npy", "bands.npy", "signatures.npy"
GROUP_PARTS = 16
"""Parts whose decisions travel together."""
ROW = np.uint64(0xFFFFFFFF)
"""The bits of a node that are its row."""
_BATCH_CHARS = 4 << 20
_EXACT_ROW = np.dtype([("hash", "<u8"), ("low", "<u8"), ("row", "<u4")])
_BAND_ROW = np.dtype([("hash", "<u8"), ("row", "<u4")])
EXACT_NODE = np.dtype([("hash", "<u8"), ("low", "<u8"), ("node", "<u8")])
BAND_NODE = np.dtype([("hash", "<u8"), ("node", "<u8")])


def part_of(nodes: np.ndarray) -> np.ndarray:
    return (nodes >> np.uint64(32)).astype(np.int64)


def group_of(nodes: np.ndarray) -> np.ndarray:
    return part_of(nodes) // GROUP_PARTS


class HashWriter:
    """Hashes the documents of a part, in the order in which the part file has them.

    >>> writer = HashWriter(settings, directory)
    >>> writer.add(documents)     # as often as wanted
    >>> counts = writer.close()   # {"hashed": 812, "unshingled": 3}
    """

    def __init__(self, settings: DedupSettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        self._hasher = MinHasher(settings.minhash)
        self._waiting: list[str] = []
        self._waiting_chars = 0
        self._ids: list[str] = []
        self._names: list[str] = []
        self._rank: list[list[float]] = []
        self._chars: list[int] = []
        self._exact: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []

    def add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self._ids.append(document.id)
            self._names.append(f"{document.source}\0{document.id}")
            self._chars.append(len(document.text))
            self._rank.append([rank_value(document, name) for name in self.settings.prefer])
            self._waiting.append(document.text)
            self._waiting_chars += len(document.text)
            if self._waiting_chars >= _BATCH_CHARS:
                self._hash()

    def _hash(self) -> None:
        batch = self._hasher.hash_texts(self._waiting)
        self._waiting, self._waiting_chars = [], 0
        self._exact.append(batch.exact)
        self._shingles.append(batch.num_shingles)
        if self.settings.near:
            self._keys.append(band_keys(batch.signatures, self.settings.minhash.bands))
            if self.settings.minhash.verify:
                self._signatures.append(batch.signatures.astype(np.uint8))

    def close(self) -> dict[str, int]:
        self._hash()
        exact, shingles = np.concatenate(self._exact), np.concatenate(self._shingles)
        count = len(exact)
        rank = np.array(self._rank, np.float64).reshape(count, len(self.settings.prefer))
        columns: dict[str, Any] = {
            "id": pa.array(_without_surrogates(self._ids), pa.string()),
            "high": exact[:, 0],
            "low": exact[:, 1],
            "tie": tie_breakers(self._names),
            "chars": np.array(self._chars, np.uint64),
            "shingles": shingles,
            **{f"rank{place}": rank[:, place] for place in range(rank.shape[1])},
        }
        table = pa.table(columns)
        with pa.OSFile(str(self.directory / ROWS), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        rows = np.zeros(count, _EXACT_ROW)
        rows["hash"], rows["low"], rows["row"] = exact[:, 0], exact[:, 1], np.arange(count)
        np.save(self.directory / EXACT, rows[np.argsort(rows["hash"], kind="stable")])
        if self.settings.near:
            chosen = np.flatnonzero(shingles >= self.settings.minhash.min_shingles)
            keys = np.concatenate(self._keys)[chosen]
            tables = np.zeros((keys.shape[1], len(chosen)), _BAND_ROW)
            for band in range(keys.shape[1]):
                order = np.argsort(keys[:, band], kind="stable")
                tables[band]["hash"], tables[band]["row"] = keys[order, band], chosen[order]
            np.save(self.directory / BANDS, tables)
            if self.settings.minhash.verify:
                np.save(self.directory / SIGNATURES, np.concatenate(self._signatures))
        few = int((shingles < self.settings.minhash.min_shingles).sum())
        return {"hashed": count, "unshingled": few}


def rank_value(document: Document, name: str) -> float:
    """How much of the field `name` a document has, as DedupSettings.prefer counts it; -inf if it has none."""
    field = name.lstrip("-")
    value: Any = len(document.text) if field == "chars" else document.meta.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return -np.inf
    return -float(value) if name.startswith("-") else float(value)


def tie_breakers(names: Sequence[str]) -> np.ndarray:
    """uint64 [names]: an order that depends on the names alone."""
    digests = [blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u8")


def _without_surrogates(ids: Sequence[str]) -> list[str]:
    return [id if id.isascii() else id.encode("utf-8", "replace").decode() for id in ids]


def descending(values: np.ndarray) -> np.ndarray:
    """uint64 in the opposite order of the floats (no NaN among them)."""
    bits = (values + 0.0).view(np.uint64)  # one zero
    sign = np.uint64(1 << 63)
    return ~np.where(bits & sign, ~bits, bits | sign)


def read_rows(directory: Path) -> pa.Table:
    """rows.arrow of a part. Raises ValueError if it is damaged."""
    try:
        with pa.OSFile(str(directory / ROWS), "rb") as file:
            return pa.ipc.open_file(file).read_all()
    except pa.ArrowException as error:
        raise ValueError(f"{directory / ROWS} is damaged ({error}); delete its directory and run again") from None


class RunReader:
    """The tables of a part (`part` is its number) or of a gathered run of parts (`part` is None)."""

    def __init__(self, directory: Path, part: int | None) -> None:
        self.directory, self.part = directory, part

    def exact(self, begin: int, end: int) -> np.ndarray:
        """EXACT_NODE records with begin <= hash < end, sorted by hash, equal ones by node."""
        return self._slice(np.load(self.directory / EXACT, mmap_mode="r"), begin, end, EXACT_NODE)

    def band(self, band: int, begin: int, end: int) -> np.ndarray:
        """BAND_NODE records of one band, in the same way."""
        return self._slice(np.load(self.directory / BANDS, mmap_mode="r")[band], begin, end, BAND_NODE)

    def _slice(self, table: np.ndarray, begin: int, end: int, dtype: np.dtype) -> np.ndarray:
        def place(bound: int) -> int:
            return bisect.bisect_left(range(len(table)), bound, key=lambda i: int(table["hash"][i]))

        first = place(begin) if begin else 0
        rows = np.array(table[first : place(end) if end < 1 << 64 else len(table)])
        if self.part is None:
            return rows
        nodes = np.zeros(len(rows), dtype)
        for name in dtype.names[:-1] if dtype.names else ():
            nodes[name] = rows[name]
        nodes["node"] = rows["row"].astype(np.uint64) + np.uint64(self.part << 32)
        return nodes


def gather_job(item: Item, directory: Path) -> dict[str, Any]:
    """Merge the tables of the parts `first`, `first` + 1, ... in `directories` into one run."""
    runs = [RunReader(Path(path), item["first"] + place) for place, path in enumerate(item["directories"])]
    exact = _merged([run.exact(0, 1 << 64) for run in runs])
    np.save(directory / EXACT, exact)
    if item["bands"]:
        count = sum(np.load(run.directory / BANDS, mmap_mode="r").shape[1] for run in runs)
        tables = np.lib.format.open_memmap(directory / BANDS, "w+", BAND_NODE, (item["bands"], count))
        for band in range(item["bands"]):
            tables[band] = _merged([run.band(band, 0, 1 << 64) for run in runs])
        tables.flush()
    return {"documents": len(exact)}


def _merged(tables: Sequence[np.ndarray]) -> np.ndarray:
    table = np.concatenate(tables)
    return table[np.argsort(table["hash"], kind="stable")]


def open_runs(item: Item) -> Iterator[RunReader]:
    """The runs that an item names: [directory, part number or None] each, in the order of their nodes."""
    for directory, part in item["runs"]:
        yield RunReader(Path(directory), part)


def decisions_of(item: Item) -> dict[int, Mapping[str, Any]]:
    """Row -> decision, for the rows of part `part` that are in a cluster; `decisions` are the files of elect."""
    found: dict[int, Mapping[str, Any]] = {}
    for table in iterate_tables(map(Path, item["decisions"]), item["part"] // GROUP_PARTS):
        mine = table.filter(pa.array(part_of(table.column("node").to_numpy()) == item["part"]))
        for decision in mine.to_pylist():
            found[decision["node"] & int(ROW)] = decision
    return found
