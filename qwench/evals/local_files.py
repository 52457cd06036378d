"""Data files of benchmarks on this machine: found by pattern, read, and checked line by line.

Every mistake in a file is a ValueError that says file, line and what was expected.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
PARTS = ("eval", "math", "code")
"""Folders beside or under a data directory that belong to the same collection."""


class MissingDataError(ValueError):
    """No file of a benchmark was found."""


@dataclass
class Files:
    """The files of one task: `Files(roots=(Path("data/eval"),)).jsonl("svamp.jsonl", need=("Body", "Answer"))`."""

    roots: Sequence[Path]
    shots: int = 0
    """Examples that the task will show before each question; a layout without a training file sets rows aside."""
    read: dict[Path, str] = field(default_factory=dict)
    """Files that were read, with the SHA-256 of their bytes."""
    notes: list[str] = field(default_factory=list)
    """What differs from the benchmark as published, because of these files; stands beside the score."""
    no_shots: bool = False
    """Set by a layout that has no examples to show."""

    def search(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that has any, in order of their names."""
        for pattern in patterns:
            for root in self.roots:
                found = sorted(path for path in root.glob(pattern) if path.is_file())
                if not found:
                    found = sorted(path for path in root.glob(pattern + ".gz") if path.is_file())
                if found:
                    return found
        return []

    def find(self, *patterns: str) -> Path:
        """One file. Raises MissingDataError."""
        found = self.search(*patterns)
        if not found:
            places = ", ".join(map(str, self.roots)) or "no directory was given"
            names = " or ".join(patterns)
            raise MissingDataError(f"no file {names} (looked in: {places}); give the directory by --data-dir")
        return found[0]

    def text(self, *patterns: str) -> str:
        return self._load(self.find(*patterns))

    def jsonl(self, *patterns: str, need: Sequence[str] = (), may_be_null: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file, each with the fields `need`, of which those of `may_be_null` may hold
        nothing. Parts of one (NAME_a, NAME_b, ...) are read together."""
        first = self.find(*patterns)
        parts = [path for path in self.search(*patterns) if _whole(path) == _whole(first)]
        return [row for path in parts for row in self._objects(path, need, may_be_null)]

    def _objects(self, path: Path, need: Sequence[str], may_be_null: Sequence[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(self._load(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits are no JSONDecodeError
                raise ValueError(f"{path} line {number} is no JSON ({error}); repair or remove the line") from None
            rows.append(_checked(row, need, f"{path} line {number}", may_be_null))
        return _not_empty(rows, path)

    def json(self, *patterns: str, inside: str = "", need: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The objects of a list in a JSON file, which stands under the key `inside` if one is given."""
        path = self.find(*patterns)
        try:
            value = json.loads(self._load(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}); repair the file") from None
        if inside:
            value = _checked(value, (inside,), str(path))[inside]
        if not isinstance(value, list):
            raise ValueError(f"{path} should hold a list of objects, not {type(value).__name__}")
        return _not_empty([_checked(row, need, f"{path} item {n}") for n, row in enumerate(value, 1)], path)

    def csv(self, *patterns: str) -> list[list[str]]:
        """All lines of a table, its head included, as cells; all have as many cells as the first."""
        path = self.find(*patterns)
        reader = csv.reader(io.StringIO(self._load(path), newline=""))  # not splitlines: U+0085 ends no line here
        rows: list[list[str]] = []
        for row in reader:
            if not row:
                continue
            if rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{path} line {reader.line_num} has {len(row)} cells, the first line {len(rows[0])}; repair "
                    "the line"
                )
            rows.append(row)
        return _not_empty(rows, path)

    def _load(self, path: Path) -> str:
        data = path.read_bytes()
        self.read[path] = hashlib.sha256(data).hexdigest()
        try:
            if path.suffix == ".gz":
                data = gzip.decompress(data)
            return data.decode("utf-8-sig")
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}; it should be UTF-8 text") from None


def _whole(path: Path) -> str:
    """The name of the file that a part belongs to; a file that is no part is one by itself."""
    return re.sub(r"_[a-z]\.jsonl", ".jsonl", path.name.removesuffix(".gz"))


def _checked(row: Any, need: Sequence[str], where: str, may_be_null: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} should be an object, not {type(row).__name__}")
    if missing := [name for name in need if name not in row]:
        has = ", ".join(map(str, row)) or "none"
        raise ValueError(f"{where} has no field {missing[0]!r} (its fields: {has}); it needs {', '.join(need)}")
    if empty := [name for name in need if row[name] is None and name not in may_be_null]:
        raise ValueError(f"{where}: the field {empty[0]!r} is null; repair or remove the line")
    return row


def _not_empty(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise ValueError(f"{path} holds no rows; a task needs at least one")
    return rows


def data_roots(given: Sequence[Path]) -> tuple[Path, ...]:
    """Directories in which files are looked for: those given, then the parts of the same collection around them.

    Raises ValueError for a directory that does not exist.
    """
    roots: list[Path] = []
    for directory in given:
        if not directory.is_dir():
            raise ValueError(f"--data-dir {directory} is no directory; give one that holds data files of benchmarks")
        roots.append(directory)
    for directory in given:
        whole = directory.resolve()
        bases = [directory, whole.parent] if whole.name in PARTS else [directory]
        roots += [base / part for base in bases for part in PARTS if (base / part).is_dir()]
    unique: dict[Path, Path] = {}
    for root in roots:
        unique.setdefault(root.resolve(), root)
    return tuple(unique.values())
