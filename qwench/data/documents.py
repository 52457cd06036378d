"""Reading documents from files, folders and URLs, writing them as JSONL.

What is read: plain text and markup (.txt .md .rst ...), source code, notebooks, HTML pages, JSON lines (.jsonl,
.ndjson), Parquet, WARC and WET archives, Wikipedia-style XML dumps; all but Parquet also compressed (.gz .zst .bz2
.xz). Files are streamed in sorted order, so the same folder gives the same documents in the same order everywhere. A
file, page or record that cannot be read is skipped with a recorded reason, never silently and never with a crash, and
the rest goes on. Cleaning is not done here (`data.prepare`), duplicates stay (`data.dedup`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from qwench.data.html import decode_html, html_to_text
from qwench.data.inputs import JSONL_SUFFIXES, InputFile, Skipped, find_inputs, format_of, suffix_of
from qwench.data.opening import READ_ERRORS, ReadLimits, compressor, decompressed, open_raw, read_lines
from qwench.data.source_code import language_of_file, licence_of_header
from qwench.types import Document

_TEXT_FIELDS = ("text", "content")


@dataclass(slots=True)
class InputPosition:
    """How far a reader has come, in bytes on disk: `read_documents` keeps it up to date for a progress bar."""

    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How files are read, the same for all of them."""

    fields: tuple[str, ...]
    problems: list[Skipped]
    limits: ReadLimits
    piece_bytes: int
    position: InputPosition
    by_offset: bool = False
    """Records without an id are named by their offset ("a.jsonl@4711") instead of their line ("a.jsonl:12")."""

    def skip(self, place: str, reason: str) -> None:
        self.problems.append(Skipped(id=place, reason=reason))


def read_documents(
    paths: Iterable[str | Path],
    *,
    text_field: str | Sequence[str] = _TEXT_FIELDS,
    skipped: list[Skipped] | None = None,
    piece_bytes: int = 1 << 20,
    position: InputPosition | None = None,
    limits: ReadLimits | None = None,
) -> Iterator[Document]:
    """Documents of files and folders (recursive, sorted; hidden files and links to folders are left out).

    Ids are paths below the given one, with `:line` for records of JSON lines and Parquet and for the later pieces of
    plain text longer than `piece_bytes`, which is cut at blank lines so that memory stays bounded. `text_field` names
    the field of a record, several are tried in order. What could not be read is appended to `skipped`. Records written
    by `write_documents` come back as they were.

    Raises ValueError at the call if a path does not exist or nothing has a readable kind of file, and at the end of the
    iteration if no file held any text.
    """
    given = list(paths)
    problems: list[Skipped] = [] if skipped is None else skipped
    if not given:
        raise ValueError("no documents given; name files or folders with text, source code, HTML, .jsonl or .parquet")
    first_problem = len(problems)
    files = find_inputs(given, problems)
    shown = ", ".join(str(path) for path in given[:3]) + (" ..." if len(given) > 3 else "")
    if not files:
        raise ValueError(
            f"no readable documents in {shown}{_summary(problems[first_problem:])}; looked for text (.txt, .md, ...), "
            f"source code, .html, .jsonl, .parquet and .warc files"
        )
    reading = _Reading(
        fields=(text_field,) if isinstance(text_field, str) else tuple(text_field),
        problems=problems,
        limits=limits or ReadLimits(),
        piece_bytes=piece_bytes,
        position=position or InputPosition(),
    )
    reading.position.total_bytes = sum(file.num_bytes for file in files)
    return _read_all(files, reading, first_problem, shown)


def _read_all(files: Sequence[InputFile], reading: _Reading, first_problem: int, shown: str) -> Iterator[Document]:
    found = False
    position = reading.position
    for file in files:
        before = position.done_bytes
        for document in _read_safely(file, reading, 0, None):
            found = True
            yield document
        position.done_bytes = before + file.num_bytes
    if not found:
        raise ValueError(
            f"no text in the {len(files)} files of {shown}{_summary(reading.problems[first_problem:])}; "
            "give files with text"
        )


def read_item(item: Mapping[str, Any], problems: list[Skipped], limits: ReadLimits | None = None) -> Iterator[Document]:
    """Documents of one item of work, a JSON-able table:

        {"files": [{"name": "web/a.jsonl", "path": "/data/web/a.jsonl", "format": "records", "start": 0, "stop": 9}],
         "source": "web", "kind": "", "lang": "", "text_field": ["text"]}

    Only "files" with their "name" and "path" is needed. `start` (first) and `stop` (after the last) are bytes or row
    groups (see `InputFile.pieces`), absent for whole files. `source`, `kind` and `lang` win over what the reader finds
    when they are not "". Records without an id are named by their offset ("web/a.jsonl@4711"), so that ids do not
    depend on how files are cut. Nothing raises for what the data is like: a broken or vanished file is appended to
    `problems` and the next one read.
    """
    field = item.get("text_field") or _TEXT_FIELDS
    reading = _Reading(
        fields=(field,) if isinstance(field, str) else tuple(field),
        problems=problems,
        limits=limits or ReadLimits(),
        piece_bytes=1 << 20,
        position=InputPosition(),
        by_offset=True,
    )
    labels = {key: item[key] for key in ("source", "kind", "lang") if item.get(key)}
    for part in item["files"]:
        kind = part.get("format") or format_of(part["path"]) or "text"
        file = InputFile(name=part["name"], path=part["path"], format=kind, num_bytes=0)
        for document in _read_safely(file, reading, part.get("start") or 0, part.get("stop")):
            yield dataclasses.replace(document, **labels) if labels else document


def _read_safely(file: InputFile, reading: _Reading, start: int, stop: int | None) -> Iterator[Document]:
    """Documents with text; whatever goes wrong ends the file with a recorded reason."""
    try:
        for document in _read_file(file, reading, start, stop):
            if document.text and not document.text.isspace():
                yield document
            else:
                reading.skip(document.id, "empty")
    except (*READ_ERRORS, _Unreadable) as error:
        reading.skip(file.name, _reason(error))


class _Unreadable(Exception):
    """A file's content is not what its suffix says; the message is the recorded reason."""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "undecodable (not UTF-8)"
    if isinstance(error, _Unreadable):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"unreadable ({error.strerror or 'not found or not reachable'})"
    return f"unreadable ({error.strerror or error})" if isinstance(error, OSError) else f"unreadable ({error})"


def _summary(problems: Sequence[Skipped]) -> str:
    if not problems:
        return ""
    counts = Counter(problem.reason for problem in problems)
    return f" (skipped: {', '.join(f'{count} {reason}' for reason, count in counts.most_common(3))})"


def _read_file(file: InputFile, reading: _Reading, start: int, stop: int | None) -> Iterator[Document]:
    name, before = file.name, reading.position.done_bytes
    with open_raw(file.path) as raw:
        if file.format == "parquet":
            yield from _read_parquet(name, raw, reading, start, stop)
            return
        if file.format == "warc":
            documents = _read_warc(name, raw, reading)
        else:
            documents = _read_stream(file, raw, reading, start, stop)
        for document in documents:
            reading.position.done_bytes = before + raw.tell()
            yield document


def _read_stream(file: InputFile, raw: BinaryIO, reading: _Reading, start: int, stop: int | None) -> Iterator[Document]:
    name = file.name
    with decompressed(raw, PurePosixPath(file.path).suffix.lower(), reading.limits) as stream:
        if file.format == "records":
            yield from _read_records(name, stream, reading, start, stop)
        elif file.format == "wiki":
            yield from _read_wiki(name, stream, reading)
        elif file.format == "web":
            data = stream.read(reading.limits.max_page_bytes + 1)
            if len(data) > reading.limits.max_page_bytes:
                raise _Unreadable("page too large")
            yield Document(id=name, text=html_to_text(decode_html(data)), source=_root(name), kind="web")
        else:
            yield from _read_text(file, stream, reading)


def _root(name: str) -> str:
    return name.partition("/")[0] if not name.startswith("/") else name


# --------------------------------------------------------------------------------------------------------- plain text
def _read_text(file: InputFile, stream: BinaryIO, reading: _Reading) -> Iterator[Document]:
    name, source = file.name, _root(file.name)
    path = file.path.lower()
    if path.endswith(".ipynb"):
        yield _read_notebook(name, stream, reading.limits)
        return
    inner = path[: -len(PurePosixPath(path).suffix)] if suffix_of(path) != PurePosixPath(path).suffix else path
    lang = language_of_file(inner) if file.format == "code" else ""
    seen: Counter[int] = Counter()
    meta: dict[str, str] = {}
    for line, text in _text_pieces(stream, path, reading):
        if not seen and lang and (licence := licence_of_header(text)):
            meta = {"licence": licence}
        seen[line] += 1
        place = f"{name}:{line}" if seen.total() > 1 else name
        if seen[line] > 1:  # a line so long that it was cut
            place += f".{seen[line]}"
        yield Document(id=place, text=text, source=source, kind=file.format, lang=lang, meta=meta)


def _text_pieces(file: BinaryIO, path: str, reading: _Reading) -> Iterator[tuple[int, str]]:
    """(first line, text) of pieces of at most `piece_bytes`, cut at a blank line, else a line end, else anywhere."""
    rest, line, first = b"", 1, True
    unbroken = 0
    encoding = "utf-8"
    while True:
        data = rest + file.read(reading.piece_bytes - len(rest))
        if first:
            encoding, data, first = _encoding_of(data, path), data.removeprefix(b"\xef\xbb\xbf"), False
            if encoding == "utf-16":
                # Rare and never huge: read whole, so that no character is cut.
                data += file.read(reading.limits.max_line_bytes)
                yield 1, data[: len(data) & ~1].decode("utf-16", "replace")
                return
        if b"\0" in data:
            raise _Unreadable("binary (NUL bytes)")
        if len(data) < reading.piece_bytes:
            if data:
                yield line, _decode(data, encoding, reading.limits)
            return
        unbroken = 0 if b"\n" in data else unbroken + len(data)
        if unbroken > reading.limits.max_line_bytes:
            raise _Unreadable(f"line too long (the rest of line {line} and of the file)")
        cut = _cut(data)
        piece = _decode(data[:cut], encoding, reading.limits)
        yield line, piece
        line += piece.count("\n")
        rest = data[cut:]


def _decode(data: bytes, encoding: str, limits: ReadLimits) -> str:
    """Text with U+FFFD for some stray bytes. Raises UnicodeError if there are more than `max_encoded_share` of them."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        if text.count("\ufffd") > limits.max_encoded_share * len(text):
            raise
        return text


def _cut(data: bytes) -> int:
    half = len(data) // 2
    for mark in (b"\n\n", b"\n"):
        if (place := data.rfind(mark, half)) >= 0:
            return place + len(mark)
    cut = len(data)
    while cut > half and data[cut - 1] & 0xC0 == 0x80:  # not inside a UTF-8 character
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else len(data)


def _encoding_of(data: bytes, path: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if path.endswith((".py", ".pyi")):
        try:
            return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        except SyntaxError:
            raise _Unreadable("undecodable (not UTF-8)") from None
    return "utf-8"


def _read_notebook(name: str, stream: BinaryIO, limits: ReadLimits) -> Document:
    """The cells' sources, text in between as comments; outputs are left out."""
    data = stream.read(limits.max_page_bytes + 1)
    if len(data) > limits.max_page_bytes:
        raise _Unreadable("page too large")
    try:
        notebook = json.loads(data)
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language") or "python"
        parts: list[str] = []
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                source = "\n".join(f"# {line}".rstrip() for line in source.split("\n"))
            parts.append(source)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Unreadable("no valid notebook") from None
    return Document(id=name, text="\n\n".join(parts), source=_root(name), kind="code", lang=str(language).lower())


# ------------------------------------------------------------------------------------------------- pages and articles
def _read_warc(name: str, raw: BinaryIO, reading: _Reading) -> Iterator[Document]:
    from qwench.data.warc import Damage, read_warc

    for record in read_warc(raw, reading.limits):
        place = f"{name}@{record.offset}"
        if isinstance(record, Damage):
            reading.skip(place, record.reason)
            continue
        text = decode_html(record.data, record.charset)
        if record.media_type != "text/plain":
            text = html_to_text(text)
        meta = {"url": record.url, **record.headers}
        yield Document(id=place, text=text, source=_root(name), kind="web", meta=meta)


def _read_wiki(name: str, stream: BinaryIO, reading: _Reading) -> Iterator[Document]:
    from qwench.data.wikitext import read_pages, wikitext_to_text

    try:
        for number, page in enumerate(read_pages(stream, reading.limits.max_page_bytes), 1):
            if isinstance(page, str):
                reading.skip(f"{name}:{number}", page)
                continue
            text = f"{page.title}\n\n{wikitext_to_text(page.wikitext)}"
            place = f"{name}:{page.id or number}"
            meta = {"title": page.title}
            yield Document(id=place, text=text, source=_root(name), kind="encyclopedia", meta=meta)
    except ValueError as error:
        raise _Unreadable(str(error)) from None


# ------------------------------------------------------------------------------------------------------------ records
def _read_records(name: str, file: BinaryIO, reading: _Reading, start: int, stop: int | None) -> Iterator[Document]:
    for number, (offset, line) in enumerate(read_lines(file, reading.limits, start, stop), 1):
        where = f"{name}@{offset}" if reading.by_offset else f"{name}:{number}"
        if line is None:
            reading.skip(where, "line too long")
            continue
        if line.isspace():
            continue
        try:
            record = _parse(line, reading.limits)
        except (ValueError, RecursionError) as error:
            reading.skip(where, _reason(error) if isinstance(error, UnicodeError) else "no valid JSON")
            continue
        if (document := _from_record(record, where, _root(name), reading)) is not None:
            yield document


def _parse(line: bytes, limits: ReadLimits) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return json.loads(_decode(line, "utf-8", limits))


def _read_parquet(name: str, raw: BinaryIO, reading: _Reading, start: int, stop: int | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = reading.fields
    try:
        table = pq.ParquetFile(raw)
        known = [c for c in (*fields, "id", "source", "kind", "lang", "meta") if c in table.schema_arrow.names]
        if not set(known) & set(fields):
            raise _Unreadable(f"no column {' or '.join(map(repr, fields))}")
        number = sum(table.metadata.row_group(group).num_rows for group in range(start))
        groups = range(start, table.num_row_groups if stop is None else min(stop, table.num_row_groups))
        for batch in table.iter_batches(batch_size=256, columns=known, row_groups=list(groups)):
            for record in batch.to_pylist():
                number += 1
                document = _from_record(record, f"{name}:{number}", _root(name), reading)
                if document is not None:
                    yield document
    except pa.ArrowException as error:
        raise _Unreadable(f"damaged Parquet file ({str(error).splitlines()[0][:80]})") from None


def _from_record(record: Any, where: str, source: str, reading: _Reading) -> Document | None:
    fields = reading.fields
    text = (
        next((record[f] for f in fields if isinstance(record.get(f), str)), None) if isinstance(record, dict) else None
    )
    if text is None:
        reading.skip(where, f"no text in field {' or '.join(map(repr, fields))}")
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
    if suffix_of(path.as_posix()) not in JSONL_SUFFIXES or path.suffix.lower() in (".bz2", ".xz"):
        raise ValueError(f"cannot write documents to {path}; give a name that ends in .jsonl, .jsonl.zst or .jsonl.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as raw, compressor(raw, path.suffix.lower()) as file:
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
