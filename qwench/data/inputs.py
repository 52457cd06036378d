"""Finding input files: what of the given files, folders, globs and fsspec URLs is read, and as what.

Nothing is opened but Parquet footers (`row_group_bytes`). Reading is `data.documents`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwench.data.opening import COMPRESSED_SUFFIXES, is_url, open_raw
from qwench.data.source_code import language_of_file

_TEXT = ".txt .text .md .markdown .rst .adoc .org .tex .pod .srt .po"
_NAMES = "readme license licence copying notice authors news changes changelog"
TEXT_SUFFIXES = frozenset(_TEXT.split())
TEXT_NAMES = frozenset(_NAMES.split())
"""Files without suffix that are read as text."""
HTML_SUFFIXES = frozenset((".html", ".htm", ".xhtml"))
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
_FORMATS = {suffix: "text" for suffix in TEXT_SUFFIXES} | {suffix: "records" for suffix in JSONL_SUFFIXES}
_FORMATS |= {suffix: "web" for suffix in HTML_SUFFIXES} | {".parquet": "parquet", ".warc": "warc", ".wet": "warc"}
_FORMATS |= {".xml": "wiki"}
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What was not read, and why: `Skipped(id="docs/logo.txt", reason="binary (NUL bytes)")`."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file that can be read: `InputFile(name="web/a.warc.gz", path="s3://bucket/web/a.warc.gz", format="warc", ...)`.

    `name` begins its documents' ids. `pieces` says how it may be cut for workers: "bytes" (plain JSON lines: any range
    of bytes; a line belongs to the range that holds its first byte), "row_groups" (Parquet) or "" (only whole).
    """

    name: str
    path: str
    format: str
    num_bytes: int
    pieces: str = ""


def suffix_of(path: str) -> str:
    """The suffix that tells the format, compression aside: ".jsonl" for `a.jsonl.zst`."""
    inner = PurePosixPath(path)
    if inner.suffix.lower() in COMPRESSED_SUFFIXES:
        inner = PurePosixPath(inner.stem)
    return inner.suffix.lower()


def format_of(path: str) -> str:
    """ "text", "code", "web", "records", "parquet", "warc", "wiki", or "" for what is not read."""
    path = path.replace("\\", "/")
    plain = PurePosixPath(path)
    name = plain.stem if plain.suffix.lower() in COMPRESSED_SUFFIXES else plain.name
    suffix = suffix_of(path)
    if suffix == ".parquet" and plain.suffix.lower() != ".parquet":
        return ""  # no Parquet file is compressed once more
    if suffix in _FORMATS:
        return _FORMATS[suffix]
    if language_of_file(name):
        return "code"
    return "text" if not suffix and name.partition(".")[0].lower() in TEXT_NAMES else ""


def find_inputs(paths: Iterable[str | Path], problems: list[Skipped]) -> list[InputFile]:
    """Readable files of files, folders (recursive, sorted; hidden ones and links to folders left out), globs and URLs.

    What has no known format is appended to `problems`; a file that is named itself is read as text if nothing else is
    known of it. Raises ValueError if a path does not exist.
    """
    given = [str(path) for path in paths]
    expanded = [one for path in given for one in _expand(path)]
    names = [_base_name(path) for path in expanded]
    found: list[InputFile] = []
    for path, short in zip(expanded, names, strict=True):
        root = short if names.count(short) == 1 else path
        files = _find_remote(path, root) if is_url(path) else _find_local(Path(path), root)
        for name, full, size, named in files:
            kind = format_of(full) or ("text" if named else "")
            if not kind:
                problems.append(Skipped(id=name, reason="no known kind of text file"))
                continue
            pieces = {"parquet": "row_groups", "records": "bytes"}.get(kind, "")
            if PurePosixPath(full).suffix.lower() in COMPRESSED_SUFFIXES:
                pieces = ""
            found.append(InputFile(name=name, path=full, format=kind, num_bytes=size, pieces=pieces))
    return found


def _base_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] if is_url(path) else Path(path).resolve().name


def _expand(path: str) -> Sequence[str]:
    """A glob's matches, sorted; anything else as it is."""
    if not any(mark in path for mark in "*?[") or (not is_url(path) and os.path.exists(path)):
        return [path]
    if is_url(path):
        system, inner = _file_system(path)
        matches = sorted(system.unstrip_protocol(match) for match in system.glob(inner))
    else:
        import glob

        matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise ValueError(f"nothing matches {path}; give files or folders with documents")
    return matches


def _find_local(path: Path, root: str) -> Iterator[tuple[str, str, int, bool]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a file or folder with documents")
    if path.is_file():
        yield root, str(path), _size(path), True
        return
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and d not in _SKIPPED_FOLDERS)
        for file in sorted(files):
            if not file.startswith("."):
                full = Path(folder, file)
                yield f"{root}/{full.relative_to(path).as_posix()}", str(full), _size(full), False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link; reading it will say so
        return 0


def _file_system(path: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"{path} cannot be opened: {error}; install that package") from None


def _find_remote(path: str, root: str) -> Iterator[tuple[str, str, int, bool]]:
    system, inner = _file_system(path)
    try:
        info = system.info(inner)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a file or folder with documents") from None
    if info["type"] == "file":
        yield root, path, int(info.get("size") or 0), True
        return
    listed = system.find(inner, detail=True)
    base = info["name"].rstrip("/") + "/"
    for full in sorted(listed):
        relative = full.removeprefix(base)
        parts = relative.split("/")
        if not any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in parts):
            yield f"{root}/{relative}", system.unstrip_protocol(full), int(listed[full].get("size") or 0), False


def row_group_bytes(file: InputFile) -> list[int]:
    """Compressed bytes of every row group of a Parquet file, for cutting it into items; [] if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_raw(file.path) as raw:
            metadata = pq.ParquetFile(raw).metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            return [
                sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                for group in groups
            ]
    except (OSError, pa.ArrowException):
        return []
