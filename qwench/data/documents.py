"""Reading documents from files and folders, writing them as JSONL.

What is read: plain text and markup (.txt .md .rst ...), source code, HTML (as text), JSON lines (.jsonl, .ndjson) and
Parquet; text and JSON lines also compressed (.gz, .zst). Files are streamed in sorted order, so the same folder gives
the same documents in the same order everywhere. A file or record that holds no readable text is skipped with a
recorded reason, never silently and never with a crash. Cleaning is not done here (`data.text`), duplicates stay
(`data.dedup`).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from qwench.data.html import html_to_text
from qwench.types import Document

_TEXT = ".txt .text .md .markdown .rst .adoc .org .tex .pod .srt .po"
_CODE = (
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .java .kt .scala .groovy .js .mjs .jsx .ts .tsx .go .rs .rb "
    ".php .pl .pm .lua .r .jl .m .mm .swift .cs .fs .vb .hs .ml .mli .erl .ex .exs .clj .lisp .el .scm .sh .bash .zsh "
    ".fish .ps1 .bat .sql .css .scss .less .vue .proto .cmake .toml .yaml .yml .ini .cfg .nix .tf .dart .zig .v .sv "
    ".vhd .asm .s .f .f90 .pas .d .nim .sol .glsl .ipynb"
)
_NAMES = "readme license licence copying notice authors news changes changelog makefile dockerfile"
TEXT_SUFFIXES = frozenset(_TEXT.split())
CODE_SUFFIXES = frozenset(_CODE.split())
TEXT_NAMES = frozenset(_NAMES.split())
"""Files without suffix that are read as text."""
HTML_SUFFIXES = frozenset((".html", ".htm", ".xhtml"))
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
PARQUET_SUFFIXES = frozenset((".parquet",))
COMPRESSED_SUFFIXES = frozenset((".gz", ".zst"))

_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))
_TEXT_FIELDS = ("text", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What was not read, and why: `Skipped(id="docs/logo.txt", reason="binary (NUL bytes)")`."""

    id: str
    reason: str


@dataclass(slots=True)
class InputPosition:
    """How far a reader has come, in bytes on disk: `read_documents` keeps it up to date for a progress bar."""

    done_bytes: int = 0
    total_bytes: int = 0


def read_documents(
    paths: Iterable[str | Path],
    *,
    text_field: str | Sequence[str] = _TEXT_FIELDS,
    skipped: list[Skipped] | None = None,
    piece_bytes: int = 1 << 20,
    position: InputPosition | None = None,
) -> Iterator[Document]:
    """Documents of files and folders (recursive, sorted; hidden files and links to folders are left out).

    Ids are paths below the given one, with `:line` for records of JSON lines and Parquet and for the later pieces of
    plain text longer than `piece_bytes`, which is cut at blank lines so that memory stays bounded. `text_field` names
    the field of a record, several are tried in order. What could not be read is appended to `skipped`. Records written
    by `write_documents` come back as they were.

    Raises ValueError at the call if a path does not exist or nothing has a readable kind of file, and at the end of the
    iteration if no file held any text.
    """
    fields = (text_field,) if isinstance(text_field, str) else tuple(text_field)
    given = [Path(path) for path in paths]
    problems: list[Skipped] = [] if skipped is None else skipped
    if not given:
        raise ValueError("no documents given; name files or folders with text, source code, HTML, .jsonl or .parquet")
    for path in given:
        if not path.exists():
            raise ValueError(f"{path} does not exist; give a file or folder with documents")
    first_problem = len(problems)
    files = list(_find_files(given, problems))
    shown = ", ".join(str(path) for path in given[:3]) + (" ..." if len(given) > 3 else "")
    if not files:
        raise ValueError(
            f"no readable documents in {shown}{_summary(problems[first_problem:])}; looked for text (.txt, .md, ...), "
            f"source code, .html, .jsonl and .parquet files"
        )
    position = position or InputPosition()
    position.total_bytes = sum(file.stat().st_size for _, file in files if file.exists())
    return _read_all(files, fields, problems, first_problem, piece_bytes, shown, position)


def _read_all(
    files: Sequence[tuple[str, Path]],
    fields: tuple[str, ...],
    problems: list[Skipped],
    first_problem: int,
    piece_bytes: int,
    shown: str,
    position: InputPosition,
) -> Iterator[Document]:
    found = False
    for name, path in files:
        before = position.done_bytes
        try:
            for document in _read_file(name, path, fields, problems, piece_bytes, position):
                if document.text.strip():
                    found = True
                    yield document
                else:
                    problems.append(Skipped(id=document.id, reason="empty"))
        except (OSError, EOFError, UnicodeError, _Unreadable) as error:
            problems.append(Skipped(id=name, reason=_reason(error)))
        position.done_bytes = before + (path.stat().st_size if path.exists() else 0)
    if not found:
        raise ValueError(
            f"no text in the {len(files)} files of {shown}{_summary(problems[first_problem:])}; give files with text"
        )


class _Unreadable(Exception):
    """A file's content is not what its suffix says; the message is the recorded reason."""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "undecodable (not UTF-8)"
    if isinstance(error, _Unreadable):
        return str(error)
    return f"unreadable ({error.strerror or error})" if isinstance(error, OSError) else f"unreadable ({error})"


def _summary(problems: Sequence[Skipped]) -> str:
    if not problems:
        return ""
    counts = Counter(problem.reason for problem in problems)
    return f" (skipped: {', '.join(f'{count} {reason}' for reason, count in counts.most_common(3))})"


# ------------------------------------------------------------------------------------------------------ finding files
def _find_files(given: Sequence[Path], problems: list[Skipped]) -> Iterator[tuple[str, Path]]:
    names = [path.resolve().name for path in given]
    for path, short in zip(given, names, strict=True):
        root = short if names.count(short) == 1 else path.as_posix()
        if path.is_file():  # named by the user, therefore read whatever its suffix says
            yield root, path
            continue
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and d not in _SKIPPED_FOLDERS)
            for file in sorted(files):
                full = Path(folder, file)
                name = f"{root}/{full.relative_to(path).as_posix()}"
                if file.startswith("."):
                    continue
                if _kind(full):
                    yield name, full
                else:
                    problems.append(Skipped(id=name, reason="no known kind of text file"))


def _suffix(path: Path) -> str:
    """The suffix that tells the format, compression aside: ".jsonl" for `a.jsonl.zst`."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def _kind(path: Path) -> str:
    """ "text", "code", "web", "records", "parquet", or "" for what is not read."""
    suffix = _suffix(path)
    if suffix in JSONL_SUFFIXES:
        return "records"
    if suffix in TEXT_SUFFIXES or (not suffix and path.name.partition(".")[0].lower() in TEXT_NAMES):
        return "text"
    if suffix in CODE_SUFFIXES:
        return "code"
    if suffix in HTML_SUFFIXES:
        return "web"
    return "parquet" if path.suffix.lower() in PARQUET_SUFFIXES else ""


def _read_file(
    name: str,
    path: Path,
    fields: tuple[str, ...],
    problems: list[Skipped],
    piece_bytes: int,
    position: InputPosition,
) -> Iterator[Document]:
    kind = _kind(path) or "text"
    if kind == "parquet":
        yield from _read_parquet(name, path, fields, problems)
        return
    before = position.done_bytes
    with open(path, "rb") as raw, _decompressed(raw, path.suffix.lower()) as file:
        if kind == "records":
            for document in _read_records(name, file, fields, problems):
                position.done_bytes = before + raw.tell()
                yield document
        elif kind == "web":
            yield Document(id=name, text=html_to_text(decode_html(file.read())), source=_root(name), kind="web")
        else:
            seen: Counter[int] = Counter()
            for line, text in _text_pieces(file, path, piece_bytes):
                position.done_bytes = before + raw.tell()
                seen[line] += 1
                place = f"{name}:{line}" if seen.total() > 1 else name
                if seen[line] > 1:  # a line so long that it was cut
                    place += f".{seen[line]}"
                yield Document(id=place, text=text, source=_root(name), kind=kind)


def _root(name: str) -> str:
    return name.partition("/")[0] if not name.startswith("/") else name


# --------------------------------------------------------------------------------------------------------- plain text
def _text_pieces(file: BinaryIO, path: Path, piece_bytes: int) -> Iterator[tuple[int, str]]:
    """(first line, text) of pieces of at most `piece_bytes`, cut at a blank line, else a line end, else anywhere."""
    rest, line, first = b"", 1, True
    encoding = "utf-8"
    while True:
        data = rest + file.read(piece_bytes - len(rest))
        if first:
            encoding, data, first = _encoding_of(data, path), data.removeprefix(b"\xef\xbb\xbf"), False
            if encoding == "utf-16":
                # Rare and never huge: read whole, so that no character is cut.
                yield 1, (data + file.read()).decode("utf-16")
                return
        if b"\0" in data:
            raise _Unreadable("binary (NUL bytes)")
        if len(data) < piece_bytes:
            if data:
                yield line, data.decode(encoding)
            return
        cut = _cut(data)
        piece = data[:cut].decode(encoding)
        yield line, piece
        line += piece.count("\n")
        rest = data[cut:]


def _cut(data: bytes) -> int:
    half = len(data) // 2
    for mark in (b"\n\n", b"\n"):
        if (place := data.rfind(mark, half)) >= 0:
            return place + len(mark)
    cut = len(data)
    while cut > half and data[cut - 1] & 0xC0 == 0x80:  # not inside a UTF-8 character
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else len(data)


def _encoding_of(data: bytes, path: Path) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if path.suffix.lower() in (".py", ".pyi"):
        try:
            return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        except SyntaxError:
            raise _Unreadable("undecodable (not UTF-8)") from None
    return "utf-8"


def decode_html(data: bytes) -> str:
    """Bytes of a page as text: by byte order mark, UTF-8, or the charset its head declares. Raises UnicodeError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = re.search(rb"charset\s*=\s*[\"']?([\w-]+)", data[:4096])
        if declared is None:
            raise
        try:
            return data.decode(declared[1].decode())
        except LookupError:
            raise _Unreadable(f"undecodable (unknown charset {declared[1].decode()})") from None


# ------------------------------------------------------------------------------------------------------------ records
def _read_records(name: str, file: BinaryIO, fields: tuple[str, ...], problems: list[Skipped]) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError:
            problems.append(Skipped(id=where, reason="no valid JSON"))
            continue
        if (document := _from_record(record, where, _root(name), fields, problems)) is not None:
            yield document


def _read_parquet(name: str, path: Path, fields: tuple[str, ...], problems: list[Skipped]) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            known = [c for c in (*fields, "id", "source", "kind", "lang", "meta") if c in table.schema_arrow.names]
            if not set(known) & set(fields):
                raise _Unreadable(f"no column {' or '.join(map(repr, fields))}")
            for batch in table.iter_batches(batch_size=256, columns=known):
                for record in batch.to_pylist():
                    number += 1
                    document = _from_record(record, f"{name}:{number}", _root(name), fields, problems)
                    if document is not None:
                        yield document
    except pa.ArrowException as error:
        raise _Unreadable(f"damaged Parquet file ({str(error).splitlines()[0][:80]})") from None


def _from_record(
    record: Any, where: str, source: str, fields: tuple[str, ...], problems: list[Skipped]
) -> Document | None:
    text = (
        next((record[f] for f in fields if isinstance(record.get(f), str)), None) if isinstance(record, dict) else None
    )
    if text is None:
        problems.append(Skipped(id=where, reason=f"no text in field {' or '.join(map(repr, fields))}"))
        return None

    def labelled(key: str, default: str) -> str:
        value = record.get(key)
        return value if isinstance(value, str) and value else default

    meta = record.get("meta")
    return Document(
        id=labelled("id", where),
        text=text,
        source=labelled("source", source),
        kind=labelled("kind", ""),
        lang=labelled("lang", ""),
        meta=meta if isinstance(meta, dict) else {},
    )


def write_documents(path: str | Path, documents: Iterable[Document]) -> int:
    """Write JSON lines (.jsonl, .jsonl.zst or .jsonl.gz) and return how many; the file appears when it is complete."""
    path = Path(path)
    if _suffix(path) not in JSONL_SUFFIXES:
        raise ValueError(f"cannot write documents to {path}; give a name that ends in .jsonl, .jsonl.zst or .jsonl.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as raw, _compressor(raw, path.suffix.lower()) as file:
            for document in documents:
                table: dict[str, Any] = {"id": document.id, "text": document.text}
                table |= {key: v for key in ("source", "kind", "lang") if (v := getattr(document, key))}
                if document.meta:
                    table["meta"] = dict(document.meta)
                file.write(_json_line(table))
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _json_line(table: dict[str, Any]) -> bytes:
    try:
        return json.dumps(table, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only the escaped form can carry
        return json.dumps(table).encode() + b"\n"


# -------------------------------------------------------------------------------------------------------- compression
@contextmanager
def _decompressed(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """The bytes of an open file, decompressed by suffix. A damaged archive raises OSError or EOFError while reading."""
    if suffix == ".gz":
        with gzip.open(raw) as file:
            yield cast(BinaryIO, file)
    elif suffix == ".zst":
        yield cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), 1 << 17))
    else:
        yield raw


@contextmanager
def _compressor(raw: BinaryIO, suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as file:
            yield cast(IO[bytes], file)
    elif suffix == ".zst":
        with _zstandard().ZstdCompressor(level=3).stream_writer(raw, closefd=False) as stream:
            yield stream
    else:
        yield raw


class _ZstdFile(io.RawIOBase):
    """Frames of zstd one after the other. Unlike zstandard's own reader it does not take a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._module = _zstandard()
        self._raw = raw
        self._frame: Any = None
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        rest = b""
        while not self._plain:
            # Little at a time: what it becomes can be a thousand times as long
            data = rest or self._raw.read(1 << 12)
            rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ends too early")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor().decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(data))
            except self._module.ZstdError as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
                if rest and self._plain:
                    self._raw.seek(-len(rest), io.SEEK_CUR)
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError("files that end in .zst need the zstandard package; pip install 'qwench[data]'") from None
    return zstandard
