"""Requests that are finished: an append-only file, so that an interrupted evaluation goes on where it stopped.

One JSON line a request: {"key": digest, "value": ...}. The key names all that decides the value (the request, the
model, the sampling), so a file may serve several tasks and settings, and nothing in it can become wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger("qwench.evals")


def digest(*parts: Any) -> str:
    """A short name of values that JSON can write."""
    data = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Finished:
    """What is known of finished requests. Without a path, in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        if path.exists():
            self._read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def _read(self, path: Path) -> None:
        """All whole lines; what a crash cut short at the end is removed."""
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self.values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                log.warning("%s line %d is no finished request; it is computed again", path, number)
        if end < len(data):
            with path.open("rb+") as file:
                file.truncate(end)

    def get(self, key: str) -> Any | None:
        return self.values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember a request's value, on disk before the next one is asked for."""
        self.values[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Finished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
