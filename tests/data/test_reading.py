"""Items of work, inputs by URL, and what files may do to a reader."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zlib

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qwench.data.documents import read_documents, read_item
from qwench.data.inputs import InputFile, find_inputs, format_of, row_group_bytes
from qwench.data.opening import ReadLimits


def item(path, **part):
    return {"files": [{"name": path.name, "path": str(path), **part}]}


def texts(work, limits=None):
    problems = []
    found = [d.text for d in read_item(work, problems, limits)]
    return found, [(p.id, p.reason) for p in problems]


# ------------------------------------------------------------------------------------------------------------- pieces
@pytest.mark.parametrize("ends", ["\n", ""])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_every_line_is_in_exactly_one_byte_range(tmp_path, ends, size):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {n} " + "x" * (n * 7 % 31)}) for n in range(40)]
    path.write_text("\n".join(lines) + ends)
    whole = list(read_item(item(path), []))
    total = path.stat().st_size
    pieces = [list(read_item(item(path, start=start, stop=start + size), [])) for start in range(0, total, size)]
    assert [document for piece in pieces for document in piece] == whole
    assert len(whole) == 40
    assert whole[1].id == f"a.jsonl@{len(lines[0]) + 1}"


def test_every_row_is_in_exactly_one_range_of_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(10)]}), path, row_group_size=3)
    (file,) = find_inputs([path], [])
    assert (file.pieces, len(row_group_bytes(file))) == ("row_groups", 4)
    whole = list(read_item(item(path), []))
    parts = [d for start in (0, 1, 3) for d in read_item(item(path, start=start, stop={0: 1, 1: 3, 3: 9}[start]), [])]
    assert parts == whole
    assert whole[9].id == "a.parquet:10"
    assert row_group_bytes(InputFile(name="x", path=str(tmp_path / "none"), format="parquet", num_bytes=0)) == []


def test_labels_of_an_item_win(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "text", "kind": "old", "lang": "de"}\n')
    work = item(path) | {"text_field": "body", "source": "s", "kind": "news"}
    (document,) = read_item(work, [])
    assert (document.text, document.source, document.kind, document.lang) == ("text", "s", "news", "de")


# --------------------------------------------------------------------------------------------------------------- URLs
def test_inputs_through_fsspec():
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.txt", b"first")
    system.pipe("/corpus/sub/b.jsonl.gz", gzip.compress(b'{"text": "second"}\n'))
    system.pipe("/corpus/.hidden/c.txt", b"no")
    system.pipe("/corpus/d.bin", b"no")
    system.pipe("/plain.jsonl", b'{"text": "third"}\n')
    try:
        problems = []
        files = find_inputs(["memory://corpus"], problems)
        assert [(f.name, f.format, f.pieces) for f in files] == [
            ("corpus/a.txt", "text", ""),
            ("corpus/sub/b.jsonl.gz", "records", ""),
        ]
        assert [p.id for p in problems] == ["corpus/d.bin"]
        assert [f.name for f in find_inputs(["memory://corpus/*.txt"], [])] == ["a.txt"]
        assert [d.text for d in read_documents(["memory://corpus"])] == ["first", "second"]
        work = {"files": [{"name": "b", "path": files[1].path}, {"name": "gone", "path": "memory://corpus/gone.txt"}]}
        found, skipped = texts(work)
        assert found == ["second"]
        assert skipped[0] == ("gone", "unreadable (not found or not reachable)")
        assert [d.text for d in read_documents(["memory://plain.jsonl"])] == ["third"]
        with pytest.raises(ValueError, match="does not exist"):
            find_inputs(["memory://nowhere"], [])
    finally:
        system.rm("/corpus", recursive=True)


def test_globs(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [f.name for f in find_inputs([tmp_path / "*.txt"], [])] == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match="nothing matches"):
        find_inputs([tmp_path / "*.none"], [])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl.zst", "records"),
        ("a.warc.gz", "warc"),
        ("a.warc.wet.gz", "warc"),
        ("dump.xml.bz2", "wiki"),
        ("a.py", "code"),
        ("a.htm", "web"),
        ("README", "text"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", ""),
        ("a.png", ""),
        ("Makefile", "code"),
    ],
)
def test_formats(name, kind):
    assert format_of(f"some/where/{name}") == kind


# ------------------------------------------------------------------------------------------------------------- limits
def test_a_huge_line_is_left_out_and_the_rest_read_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    found, skipped = texts(item(path), ReadLimits(max_line_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["before", "after"]
    assert skipped == [("a.jsonl@19", "line too long")]
    assert peak < 12 << 20  # of a line of 200 MB


def test_a_huge_line_of_plain_text_is_given_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first line\n" + b"y" * (6 << 20))
    found, skipped = texts(item(path), ReadLimits(max_line_bytes=3 << 20))
    assert found[0].startswith("first line")
    assert skipped == [("a.txt", "line too long (the rest of line 2 and of the file)")]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress)],
)
def test_bombs_are_given_up(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "good"}\n' + b" " * (8 << 20)))
    found, skipped = texts(item(path), ReadLimits(min_bomb_bytes=1 << 20, max_line_bytes=1 << 20))
    assert found == ["good"]
    assert skipped == [(path.name, "unreadable (expands more than 200 times (a bomb))")]


def test_what_expands_less_is_no_bomb(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"the same line\n" * 100_000))
    times = 1_400_000 / path.stat().st_size
    found, skipped = texts(item(path), ReadLimits(min_bomb_bytes=1 << 10, max_expansion=times + 1))
    assert (sum(map(len, found)), skipped) == (1_400_000, [])
    assert texts(item(path), ReadLimits(min_bomb_bytes=1 << 10, max_expansion=times - 1))[1]


def test_a_large_page_is_named(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<p>" + "word " * 1000)
    assert texts(item(path), ReadLimits(max_page_bytes=100)) == ([], [("a.html", "page too large")])


def test_vanished_files_and_folders_cost_only_themselves(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("here")
    work = {
        "files": [
            {"name": n, "path": str(tmp_path / n)} for n in ("gone.txt", "good.txt", "gone.parquet", "gone.warc.gz")
        ]
    }
    found, skipped = texts(work)
    assert found == ["here"]
    assert skipped == [
        (name, "unreadable (No such file or directory)") for name in ("gone.txt", "gone.parquet", "gone.warc.gz")
    ]


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_stray_bytes_become_marks_and_many_make_a_text_undecodable(tmp_path, share):
    good, bad = b"letters " * 100, b"\xff" * int(800 * share)
    (tmp_path / "a.txt").write_bytes(good + bad)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + good + bad + b'"}\n{"text": "next"}\n')
    found, skipped = texts(item(tmp_path / "a.txt"))
    lines, bad_lines = texts(item(tmp_path / "a.jsonl"))
    if share < 0.05:
        assert found[0].count("\ufffd") == len(bad) == lines[0].count("\ufffd")
        assert skipped == bad_lines == []
    else:
        assert found == []
        assert skipped == [("a.txt", "undecodable (not UTF-8)")]
        assert bad_lines == [("a.jsonl@0", "undecodable (not UTF-8)")]
    assert lines[-1] == "next"


@pytest.mark.parametrize(
    ("suffix", "pack", "decompressor"),
    [
        (".gz", gzip.compress, lambda: zlib.decompressobj(wbits=31)),
        (".bz2", lambda data: bz2.compress(data, 1), bz2.BZ2Decompressor),
        (".xz", lambda data: lzma.compress(data, preset=0), lzma.LZMADecompressor),
        (".zst", zstandard.compress, lambda: zstandard.ZstdDecompressor().decompressobj()),
    ],
)
def test_every_record_before_the_cut_of_a_file_is_kept(tmp_path, suffix, pack, decompressor):
    path = tmp_path / f"a.jsonl{suffix}"
    packed = pack(b"".join(b'{"text": "line %d"}\n' % n for n in range(50_000)))
    path.write_bytes(packed[: len(packed) * 7 // 10])
    whole = decompressor().decompress(path.read_bytes()).count(b"\n")
    assert 10_000 < whole < 50_000
    found, skipped = texts(item(path))
    assert found == [f"line {n}" for n in range(whole)]
    ((name, reason),) = skipped
    assert (name, "unreadable" in reason) == (path.name, True)
