"""Part files: documents as Parquet, written in one pass and read back in row groups of bounded size.

    docs.parquet      id, text, source, kind, lang, meta (JSON)
    dropped.parquet   the same, and which stage dropped it, why, and the measured value

Equal documents give equal bytes. A row group holds about eight megabytes of text, which is what a reader holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwench.types import Document

DOCS = "docs.parquet"
DROPPED = "dropped.parquet"
GROUP_BYTES = 8 << 20
COLUMNS = ("id", "text", "source", "kind", "lang", "meta")
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in COLUMNS])
DROPPED_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
    ]
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_LABELS = ["source", "kind", "lang", "stage", "reason"]


class PartWriter:
    """Writes documents one after the other; a file without any has the columns and no rows.

    >>> with PartWriter(directory / DOCS) as part:
    ...     part.add(document)
    """

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA) -> None:
        self.schema = schema
        labels: Any = [name for name in _LABELS if name in schema.names]  # pyarrow's types know bool only
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", compression_level=1, use_dictionary=labels, write_statistics=False
        )
        self._rows: list[tuple[Any, ...]] = []
        self._pending_bytes = 0
        self.num_documents = 0
        self.num_bytes = 0
        """UTF-8 bytes of the texts."""

    def add(self, document: Document, *further: Any) -> None:
        """Append a document; `further` are the values of the columns that the schema has beyond a document's."""
        meta = json.dumps(dict(document.meta), ensure_ascii=False, sort_keys=True) if document.meta else ""
        row = (document.id, document.text, document.source, document.kind, document.lang, meta, *further)
        size = len(document.text.encode("utf-8", "surrogatepass"))
        self._rows.append(row)
        self.num_documents += 1
        self.num_bytes += size
        self._pending_bytes += size
        if self._pending_bytes >= GROUP_BYTES or len(self._rows) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = list(zip(*self._rows, strict=True))
            arrays = [_array(list(values), f.type) for values, f in zip(columns, self.schema, strict=True)]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self._rows, self._pending_bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # lone surrogates, which no UTF-8 holds
        return pa.array(
            [_SURROGATES.sub("\ufffd", value) if isinstance(value, str) else value for value in values], kind
        )


def write_part(path: Path, documents: Iterable[Document]) -> int:
    """Write documents into a part file and return how many."""
    with PartWriter(path) as part:
        for document in documents:
            part.add(document)
    return part.num_documents


def read_part(path: Path) -> Iterator[Document]:
    """The documents of a part file in order. Raises ValueError for a damaged file."""
    for batch in read_columns(path, COLUMNS):
        columns = [batch.column(name).to_pylist() for name in COLUMNS]
        for row in zip(*columns, strict=True):
            yield document_of(*row)


def document_of(id: str, text: str, source: str, kind: str, lang: str, meta: str) -> Document:
    """A row of a part file as a document."""
    return Document(id=id, text=text, source=source, kind=kind, lang=lang, meta=json.loads(meta) if meta else {})


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a Parquet file, in order, at most a row group in memory. Raises ValueError for a damaged file."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=list(columns), use_threads=False).to_batches()
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); delete it and run again") from None


def num_rows(path: Path) -> int:
    """Documents in a part file, from its footer."""
    return pq.read_metadata(path).num_rows
