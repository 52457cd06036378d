"""Opening what readers read: local files and fsspec URLs, decompressed by suffix, with limits that keep memory bounded.

A path with a scheme (`s3://`, `gs://`, `https://`, `memory://`, ...) goes through fsspec; the rest are local files.
Limits are in `ReadLimits`: what lies beyond them is named by a `Limit` error or a too long line, never read whole.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, cast

from qwench.config import config

COMPRESSED_SUFFIXES = frozenset((".gz", ".zst", ".bz2", ".xz"))
READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)
"""What reading a damaged, vanished or mislabelled file raises."""


@config
class ReadLimits:
    """What one file may cost to read."""

    max_line_bytes: int = 64 << 20
    """A longer line is left out: "line too long"."""
    max_page_bytes: int = 16 << 20
    """A larger HTML page or WARC record is left out: "page too large"."""
    max_expansion: float = 200.0
    """A compressed file that becomes more than so many times as long is given up as a bomb ..."""
    min_bomb_bytes: int = 64 << 20
    """... once it has given so many bytes."""
    max_encoded_share: float = 0.05
    """More undecodable bytes than this share of a text: "undecodable"; fewer become U+FFFD."""


class Limit(OSError):
    """A limit was reached; the message is the recorded reason."""


def is_url(path: str) -> bool:
    return "://" in path


@contextmanager
def open_raw(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file as they lie there. Raises OSError; ValueError if the URL's scheme needs a missing package."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    try:
        import fsspec

        opened: Any = fsspec.open(path, "rb")
    except ImportError as error:
        raise ValueError(f"{path} cannot be opened: {error}; install that package") from None
    try:
        with opened as file:
            # fsspec's files have no readline with a limit
            yield cast(BinaryIO, io.BufferedReader(file, 1 << 20))
    except READ_ERRORS:
        raise
    except Exception as error:  # every file system has its own errors for the network; those of ours are in READ_ERRORS
        if type(error).__module__.split(".")[0] in ("aiohttp", "botocore", "gcsfs", "s3fs", "fsspec", "google"):
            raise OSError(str(error)) from error
        raise


@contextmanager
def decompressed(raw: BinaryIO, suffix: str, limits: ReadLimits | None = None) -> Iterator[BinaryIO]:
    """The bytes of an open file, decompressed by suffix. While reading, a bomb raises `Limit`, damage a READ_ERROR."""
    stream: Any
    if suffix == ".gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        stream = bz2.BZ2File(raw)
    elif suffix == ".xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115
    elif suffix == ".zst":
        stream = _ZstdFile(raw)
    else:
        yield raw
        return
    yield cast(BinaryIO, io.BufferedReader(_Guarded(stream, raw, limits or ReadLimits()), 1 << 17))


class _Guarded(io.RawIOBase):
    """Counts what a decompressor gives against what it has read."""

    def __init__(self, stream: Any, raw: BinaryIO, limits: ReadLimits) -> None:
        self._stream, self._raw, self._limits = stream, raw, limits
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # What is there, not a full buffer: filling it would lose the good bytes before damage.
        read = getattr(self._stream, "readinto1", self._stream.readinto)
        size = read(buffer)
        self._given += size
        if self._given > self._limits.min_bomb_bytes and self._given > self._limits.max_expansion * max(
            1, self._raw.tell()
        ):
            raise Limit(f"expands more than {self._limits.max_expansion:g} times (a bomb)")
        return size


def read_lines(
    file: BinaryIO, limits: ReadLimits, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines whose first byte is at `start` <= offset < `stop`; None for a line that is too long.

    `file` may be positioned anywhere when `start` is 0 (reading begins where it is, offsets count from there);
    otherwise it must be seekable.
    """
    offset = start
    if start:
        file.seek(start - 1)
        while chunk := file.readline(1 << 20):  # the rest of a line that belongs to the range before
            offset = start = file.tell()
            if chunk.endswith(b"\n"):
                break
    limit = limits.max_line_bytes
    while stop is None or offset < stop:
        line = file.readline(limit + 1)
        if not line:
            return
        begin, size = offset, len(line)
        if size > limit and not line.endswith(b"\n"):
            line = b""
            while chunk := file.readline(1 << 20):
                size += len(chunk)
                if chunk.endswith(b"\n"):
                    break
            offset += size
            yield begin, None
        else:
            offset += size
            yield begin, line


@contextmanager
def compressor(raw: BinaryIO, suffix: str) -> Iterator[IO[bytes]]:
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
