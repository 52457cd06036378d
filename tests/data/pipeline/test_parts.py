"""Part files: what is written comes back, in groups of bounded size, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.data.pipeline import parts
from qwench.data.pipeline.parts import DROPPED_SCHEMA, PartWriter, num_rows, read_columns, read_part, write_part
from qwench.types import Document

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
DOCUMENTS = st.lists(
    st.builds(
        Document,
        id=TEXT,
        text=TEXT,
        source=TEXT,
        kind=TEXT,
        lang=TEXT,
        meta=st.dictionaries(TEXT, st.integers() | TEXT, max_size=2),
    ),
    max_size=5,
)


@given(documents=DOCUMENTS)
def test_round_trip(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("parts") / "docs.parquet"
    assert write_part(path, documents) == len(documents) == num_rows(path)
    assert list(read_part(path)) == documents
    first = path.read_bytes()
    write_part(path, documents)
    assert path.read_bytes() == first


def test_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_BYTES", 1000)
    documents = [Document(id=str(n), text="é" * 150) for n in range(20)]
    with PartWriter(tmp_path / "p") as writer:
        for document in documents:
            writer.add(document)
    assert (writer.num_documents, writer.num_bytes) == (20, 6000)
    assert pq.ParquetFile(tmp_path / "p").num_row_groups == 5
    assert [batch.num_rows for batch in read_columns(tmp_path / "p", ["id"])] == [4] * 5
    assert list(read_part(tmp_path / "p")) == documents


def test_dropped_documents_keep_their_reason(tmp_path: Path) -> None:
    with PartWriter(tmp_path / "p", DROPPED_SCHEMA) as writer:
        writer.add(Document(id="a", text="x"), "rules", "too_short", 1.0)
        writer.add(Document(id="b", text="y"), "language", "unknown", None)
    assert [d.id for d in read_part(tmp_path / "p")] == ["a", "b"]
    rows = [row for batch in read_columns(tmp_path / "p", ["reason", "value"]) for row in batch.to_pylist()]
    assert rows == [{"reason": "too_short", "value": 1.0}, {"reason": "unknown", "value": None}]


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    write_part(tmp_path / "p", [Document(id="a\udc80", text="x\ud800y")])
    assert list(read_part(tmp_path / "p")) == [Document(id="a\ufffd", text="x\ufffdy")]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write_part(tmp_path / "p", [Document(id="a", text="x" * 1000)])
    data = (tmp_path / "p").read_bytes()
    (tmp_path / "p").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="p is damaged"):
        list(read_part(tmp_path / "p"))
