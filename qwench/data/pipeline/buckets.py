"""Files of records grouped into buckets: how data is shuffled between the items of one stage and those of the next.

An item writes one file with all its records in bucket order; the item of the next stage that owns bucket k reads slice
k of each of those files. So a shuffle of n items costs n files, not n x k, and nothing is larger in memory than a slice
of one file (`iterate`) or one bucket (`read`). Records are numpy structured arrays; what they mean is their owners'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from qwench.data.minhash import mix

_MAGIC = b"qwbucket"


def bucket_of(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """Which bucket a uint64 key belongs to: spread evenly, the same everywhere."""
    return (mix(keys.astype(np.uint64)) % np.uint64(num_buckets)).astype(np.int64)


class BucketWriter:
    """Collects records in chunks and writes them bucket by bucket; at most `chunk_records` wait in memory.

    Chunks that do not fit wait in spill files beside `path`, and `close` joins them.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_buckets: int, chunk_records: int = 4 << 20) -> None:
        self.path, self.dtype, self.num_buckets, self.chunk_records = path, dtype, num_buckets, chunk_records
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0
        self._spilled: list[Path] = []
        self.num_records = 0

    def add(self, buckets: np.ndarray, records: np.ndarray) -> None:
        assert len(buckets) == len(records)
        for first in range(0, len(records), self.chunk_records):
            chunk = records[first : first + self.chunk_records]
            self._waiting.append((buckets[first : first + self.chunk_records], chunk))
            self._num_waiting += len(chunk)
            if self._num_waiting >= self.chunk_records:
                self._spilled.append(self.path.with_name(f"{self.path.name}.{len(self._spilled)}.spill"))
                self._write(self._spilled[-1])
        self.num_records += len(records)

    def close(self) -> None:
        if not self._spilled:
            self._write(self.path)
            return
        if self._num_waiting:
            self._spilled.append(self.path.with_name(f"{self.path.name}.{len(self._spilled)}.spill"))
            self._write(self._spilled[-1])
        sizes = sum(np.diff(offsets(path)) for path in self._spilled)
        with self.path.open("wb") as file:
            _write_header(file, np.concatenate([[0], np.cumsum(sizes)]), self.dtype)
            for bucket in range(self.num_buckets):
                for slice_ in iterate(self._spilled, bucket, self.dtype):
                    file.write(slice_.tobytes())
        for path in self._spilled:
            path.unlink()

    def _write(self, path: Path) -> None:
        buckets = np.concatenate([b for b, _ in self._waiting]) if self._waiting else np.zeros(0, np.int64)
        records = np.concatenate([r for _, r in self._waiting]) if self._waiting else np.zeros(0, self.dtype)
        self._waiting, self._num_waiting = [], 0
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(self.num_buckets + 1))
        with path.open("wb") as file:
            _write_header(file, bounds, self.dtype)
            file.write(records[order].astype(self.dtype, copy=False).tobytes())


def _write_header(file, bounds: np.ndarray, dtype: np.dtype) -> None:
    file.write(_MAGIC + np.array([dtype.itemsize, len(bounds)], "<i8").tobytes() + bounds.astype("<i8").tobytes())


def offsets(path: Path) -> np.ndarray:
    """Where the buckets of a file begin and end, in records. Raises ValueError for a damaged file."""
    with path.open("rb") as file:
        head = file.read(24)
        if len(head) == 24 and head.startswith(_MAGIC):
            itemsize, count = np.frombuffer(head[8:], "<i8").tolist()
            bounds = np.frombuffer(file.read(8 * count), "<i8")
            if len(bounds) == count and path.stat().st_size == 24 + 8 * count + itemsize * int(bounds[-1]):
                return bounds
    raise ValueError(f"{path} is damaged; delete its directory and run again")


def iterate(paths: Iterable[Path], bucket: int, dtype: np.dtype, chunk_records: int = 4 << 20) -> Iterator[np.ndarray]:
    """The records of a bucket, slice by slice in the order of the files, none longer than `chunk_records`."""
    for path in paths:
        bounds = offsets(path)
        begin, end = int(bounds[bucket]), int(bounds[bucket + 1])
        start = 24 + 8 * len(bounds)
        for first in range(begin, end, chunk_records):
            count = min(chunk_records, end - first)
            yield np.fromfile(path, dtype, count, offset=start + dtype.itemsize * first)


def read(paths: Sequence[Path], bucket: int, dtype: np.dtype) -> np.ndarray:
    """All records of a bucket."""
    slices = list(iterate(paths, bucket, dtype))
    return np.concatenate(slices) if slices else np.zeros(0, dtype)


# ------------------------------------------------------------------------------------------- records with strings
def write_tables(path: Path, table: pa.Table, buckets: np.ndarray, num_buckets: int) -> None:
    """The rows of a table by bucket, as an Arrow file with a batch for every bucket."""
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1)).tolist()
    table = table.take(pa.array(order)).combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        for begin, end in itertools.pairwise(bounds):
            rows = table.slice(begin, end - begin).combine_chunks().to_batches()
            writer.write_batch(rows[0] if rows else pa.RecordBatch.from_pylist([], schema=table.schema))


def iterate_tables(paths: Iterable[Path], bucket: int) -> Iterator[pa.Table]:
    """The rows of a bucket, file by file. Raises ValueError for a damaged file."""
    for path in paths:
        try:
            with pa.OSFile(str(path), "rb") as file:
                batch = pa.ipc.open_file(file).get_batch(bucket)
        except pa.ArrowException as error:
            raise ValueError(f"{path} is damaged ({error}); delete its directory and run again") from None
        if batch.num_rows:
            yield pa.Table.from_batches([batch])
