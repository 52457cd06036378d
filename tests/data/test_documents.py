import gzip
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qwench.data.documents import InputPosition, read_documents, write_documents
from qwench.types import Document


def read(*paths, **options):
    skipped = []
    documents = list(read_documents(paths, skipped=skipped, **options))
    return {d.id: d.text for d in documents}, {s.id: s.reason for s in skipped}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "b.txt").write_text("second", encoding="utf-8")
    (root / "a.md").write_text("# first", encoding="utf-8")
    (root / "sub" / "x.py").write_text("x = 1\n", encoding="utf-8")
    (root / "sub" / "page.html").write_text(
        "<title>no</title><p>Hello <b>you</b><script>no()</script>", encoding="utf-8"
    )
    (root / "LICENSE").write_text("free", encoding="utf-8")
    (root / "sub" / ".git" / "config.txt").write_text("hidden", encoding="utf-8")
    return root


def test_a_folder_is_read_sorted_with_relative_ids(folder):
    documents = list(read_documents([folder]))
    assert [(d.id, d.text, d.kind) for d in documents] == [
        ("corpus/LICENSE", "free", "text"),
        ("corpus/a.md", "# first", "text"),
        ("corpus/b.txt", "second", "text"),
        ("corpus/sub/page.html", "Hello you", "web"),
        ("corpus/sub/x.py", "x = 1\n", "code"),
    ]
    assert {d.source for d in documents} == {"corpus"}


def test_what_holds_no_text_is_skipped_with_its_reason(folder):
    (folder / "binary.txt").write_bytes(b"ab\0cd")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n[1]\n{"body": "x"}\n')
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"long text " * 1000)[:50])
    (folder / "cut.txt.zst").write_bytes(zstandard.compress(bytes(range(32, 127)) * 10 + b"text" * 1000)[:60])
    (folder / "no.txt.gz").write_bytes(b"plain")
    (folder / "no.jsonl.zst").write_bytes(b"plain")
    texts, reasons = read(folder)
    assert texts["corpus/bad.jsonl:1"] == "good"
    assert len(texts) == 6
    assert reasons["corpus/binary.txt"] == "binary (NUL bytes)"
    assert reasons["corpus/latin.txt"] == "undecodable (not UTF-8)"
    assert reasons["corpus/empty.txt"] == "empty"
    assert reasons["corpus/photo.png"] == "no known kind of text file"
    assert reasons["corpus/bad.jsonl:2"] == "no valid JSON"
    assert reasons["corpus/bad.jsonl:3"] == reasons["corpus/bad.jsonl:4"] == "no text in field 'text' or 'content'"
    assert "damaged Parquet" in reasons["corpus/bad.parquet"]
    for name in ("cut.txt.gz", "cut.txt.zst", "no.txt.gz", "no.jsonl.zst"):
        assert "unreadable" in reasons[f"corpus/{name}"]


def test_missing_and_empty_inputs_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; give a file or folder"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no readable documents in .*; looked for text"):
        read_documents([tmp_path])
    with pytest.raises(ValueError, match="no documents given"):
        read_documents([])
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"no text in the 1 files of .*\(skipped: 1 binary"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.zst", "d.jsonl.gz"])
def test_written_documents_come_back(tmp_path, name):
    documents = [
        Document(id="a", text="first\nline", source="s", kind="web", lang="zh", meta={"url": "x", "n": [1]}),
        Document(id="b", text="第二 \ud800"),
    ]
    assert write_documents(tmp_path / name, iter(documents)) == 2
    back = list(read_documents([tmp_path / name]))
    assert back[0] == documents[0]
    assert (back[1].id, back[1].text) == ("b", "第二 \ud800")
    first = (tmp_path / name).read_bytes()
    write_documents(tmp_path / name, documents)
    assert (tmp_path / name).read_bytes() == first


def test_writing_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl"
    write_documents(path, [Document(id="a", text="old")])

    def broken():
        yield Document(id="b", text="new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_documents(path, broken())
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]
    assert json.loads(path.read_text())["text"] == "old"
    with pytest.raises(ValueError, match=r"give a name that ends in \.jsonl"):
        write_documents(tmp_path / "d.csv", [])


def test_records_and_columns_with_another_text_field(tmp_path):
    rows = [{"id": "r0", "body": "zero", "content": "c0"}, {"id": None, "body": "one", "content": "c1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "q.ndjson").write_text("\n".join(json.dumps(row) for row in rows))
    assert read(tmp_path / "p.parquet")[0] == {"r0": "c0", "p.parquet:2": "c1"}
    assert read(tmp_path / "p.parquet", text_field="body")[0] == {"r0": "zero", "p.parquet:2": "one"}
    assert read(tmp_path / "q.ndjson", text_field="body")[0] == {"r0": "zero", "q.ndjson:2": "one"}
    with pytest.raises(ValueError, match="no column 'story'"):
        read(tmp_path / "p.parquet", text_field="story")


def test_encodings_that_files_declare(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "wide.txt").write_bytes("你好".encode("utf-16"))
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\n# café\n".encode("latin-1"))
    (tmp_path / "old.html").write_bytes('<meta charset="gb2312"><p>你好'.encode("gb2312"))
    texts, reasons = read(tmp_path)
    values = {name.partition("/")[2]: text for name, text in texts.items()}
    assert values["bom.txt"] == "hello"
    assert values["wide.txt"] == "你好"
    assert "café" in values["old.py"]
    assert values["old.html"] == "你好"
    assert reasons == {}


@pytest.mark.parametrize("text", ["a line\n\n" * 500, "a line\n" * 500, "é世🙂" * 700])
def test_long_texts_are_cut_without_loss_and_in_bounded_memory(tmp_path, text):
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    texts, _ = read(path, piece_bytes=256)
    assert "".join(texts.values()) == text
    assert max(len(t.encode()) for t in texts.values()) <= 256
    assert len(texts) > 10
    for name, piece in list(texts.items())[1:3] if "\n" in text else ():
        line = int(name.partition(":")[2])
        assert "".join(text.splitlines(keepends=True)[line - 1 :]).startswith(piece)


def test_a_huge_file_streams(tmp_path):
    path = tmp_path / "huge.jsonl.zst"
    rng = random.Random(0)
    documents = (Document(id=str(i), text=rng.randbytes(10_000).hex()) for i in range(1000))
    write_documents(path, documents)
    tracemalloc.start()
    position = InputPosition()
    count = sum(1 for _ in read_documents([path], position=position))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak < 4_000_000  # of 20 MB of text
    assert position.done_bytes == position.total_bytes == path.stat().st_size


def test_several_frames_of_zstd_are_one_file(tmp_path):
    frames = [zstandard.compress(b"word " * 50_000), zstandard.compress(b""), zstandard.compress(b"end")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert "".join(read(tmp_path)[0].values()) == "word " * 50_000 + "end"


def test_two_folders_of_one_name_keep_their_ids_apart(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "data").mkdir(parents=True)
        (tmp_path / parent / "data" / "a.txt").write_text(parent)
    texts, _ = read(tmp_path / "one" / "data", tmp_path / "two" / "data")
    assert len(texts) == 2
