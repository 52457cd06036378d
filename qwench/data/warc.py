"""Records of WARC and WET files through fastwarc: pages of responses, texts of conversions.

Broken archives are expected. A record cut by the end of the file is left out, damage in the middle costs the records
up to the next readable one, and both are recorded. Old ARC files are not read.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from qwench.data.opening import READ_ERRORS, ReadLimits

_PAGE_TYPES = frozenset(("text/html", "application/xhtml+xml", "application/xhtml", "text/plain", "text/markdown"))
_CRAWLER_URLS = ("metadata:", "urn:")
"""Notes of the crawler on itself."""
_GZIP_MAGIC = b"\x1f\x8b\x08"
_WARC_MAGIC = b"WARC/1."
_CUT = "record cut by the end of the file"
_SEARCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A page or a text: `Record(url="https://...", media_type="text/html", data=b"<html>...", offset=4711)`.

    `media_type` is "text/plain" for WET texts; `charset` what the server declared; `offset` the record's first byte."""

    url: str
    media_type: str
    data: bytes
    offset: int
    charset: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that was not read: `Damage(offset=100, reason=_CUT)`."""

    offset: int
    reason: str


def read_warc(file: BinaryIO, limits: ReadLimits) -> Iterator[Record | Damage]:
    """Records of a seekable open file, compressed (.gz, .zst) or not, in order, with what could not be read."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType  # pyright: ignore[reportMissingImports]

    wanted = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    head = file.read(4)
    magic = _GZIP_MAGIC if head.startswith(_GZIP_MAGIC) else _WARC_MAGIC if head == _WARC_MAGIC[:4] else b""
    start, damaged = 0, -1
    while True:
        file.seek(start)
        last = start
        try:
            # fastwarc closes what it reads from; positions are its own, counted from 0
            records = ArchiveIterator(_View(file, start), parse_http=False)
            for record in records:
                last = start + record.stream_pos
                # The kinds are chosen here, not in fastwarc: so that `last` is right when the next one is damaged.
                if record.record_type & wanted:
                    made = _read_record(record, last, limits)
                    damaged = made.offset if isinstance(made, Damage) else -1
                    yield made
            # fastwarc takes a member that is cut before its record begins for the end.
            place = _find_cut_member(file, last) if magic == _GZIP_MAGIC else None
            if place is not None and place != damaged:
                yield Damage(offset=place, reason=_CUT)
            return
        except READ_ERRORS as error:
            if not magic:
                reason = "no WARC records" if "Invalid WARC" in str(error) else str(error)
                yield Damage(offset=last, reason=f"unreadable ({reason})")
                return
            yield Damage(offset=last, reason=f"damaged WARC ({error})")
            found = _find(file, magic, last + 1)
            if found is None:
                return
            start = found


class _View:
    """A file from a place on, as fastwarc wants it: read, seek, tell, close."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._start if whence == 0 else offset, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def close(self) -> None:
        pass


def _find(file: BinaryIO, magic: bytes, start: int) -> int | None:
    """Where `magic` stands next, at a line's begin if it is text."""
    needle = magic if magic == _GZIP_MAGIC else b"\n" + magic
    file.seek(start)
    tail, place = b"", start
    while chunk := file.read(_SEARCH_BYTES):
        data = tail + chunk
        if (found := data.find(needle)) >= 0:
            return place - len(tail) + found + (needle is not magic)
        place += len(chunk)
        tail = data[-len(needle) :]
    return None


def _find_cut_member(file: BinaryIO, start: int) -> int | None:
    """Where a gzip member begins that the file's end cuts, if the last one is; `start` is where some member begins."""
    file.seek(start)
    member, place, data = zlib.decompressobj(31), start, b""
    inside = False
    while data := data or file.read(1 << 16):
        inside = True
        try:
            while data and not member.eof:
                member.decompress(data, 1 << 20)
                data = member.unconsumed_tail
        except zlib.error:
            return None  # no member: bytes after the last one
        if member.eof:
            data = member.unused_data
            place, member, inside = file.tell() - len(data), zlib.decompressobj(31), False
    return place if inside else None


def _read_record(record: Any, offset: int, limits: ReadLimits) -> Record | Damage:
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
    media_type = (record.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if record.headers.get("Content-Length") is None:
        return Damage(offset=offset, reason="record without length")
    if record.content_length > limits.max_page_bytes:
        return Damage(offset=offset, reason="page too large")
    headers: dict[str, str] = {}
    charset = ""
    if media_type.startswith("application/http"):
        record.parse_http()
        if record.http_headers is None:
            return Damage(offset=offset, reason="damaged HTTP header")
        headers = {key.lower(): value for key, value in record.http_headers.to_tuples()}
        media_type = (record.http_content_type or "").lower()
        charset = record.http_charset or ""
        status = record.http_headers.status_code
        if status is not None and not 200 <= status < 300:
            return Damage(offset=offset, reason=f"HTTP status {status}")
    if media_type not in _PAGE_TYPES or url.startswith(_CRAWLER_URLS):
        return Damage(offset=offset, reason=f"no page ({media_type or 'unknown type'})")
    length = record.content_length
    data = record.reader.read(length)
    if len(data) < length:
        return Damage(offset=offset, reason=_CUT)
    if headers:
        decoded = _decode_body(data, headers, limits.max_page_bytes)
        if decoded is None:
            return Damage(offset=offset, reason="page too large")
        data = decoded
    meta = {"date": record.headers.get("WARC-Date") or ""}
    return Record(url=url, media_type=media_type, data=data, offset=offset, charset=charset, headers=meta)


def _decode_body(data: bytes, headers: Mapping[str, str], max_bytes: int) -> bytes | None:
    """The body without chunks and compression, None if it grows too large; as it is where the headers are wrong."""
    from fastwarc.stream_io import (  # pyright: ignore[reportMissingImports]
        BrotliReader,
        ChunkedReader,
        GzipReader,
        ZstdReader,
    )

    steps: list[Any] = []
    if "chunked" in headers.get("transfer-encoding", "").lower():
        steps.append(ChunkedReader)
    encoding = headers.get("content-encoding", "").lower()
    if "gzip" in encoding:
        steps.append(GzipReader)
    elif encoding.strip() == "deflate":
        steps.append(lambda stream: GzipReader(stream, zlib=True))
    elif encoding.strip() == "br":
        steps.append(BrotliReader)
    elif encoding.strip() == "zstd":
        steps.append(ZstdReader)
    for step in steps:
        try:
            decoded = step(io.BytesIO(data)).read(max_bytes + 1)
        except READ_ERRORS:
            continue  # crawlers store the body decoded and keep the header
        if len(decoded) > max_bytes:
            return None
        data = decoded or data
    return data
