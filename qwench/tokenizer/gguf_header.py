"""Chosen metadata of a GGUF file, without its tensors.

The `gguf` package's reader builds one NumPy array for every string and takes some ten seconds for a vocabulary of
150,000; this one reads the header in well under a second and skips what is not asked for. It reads versions 2 and 3,
little-endian, as every published Qwen file is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    """The metadata entries named in `keys`, where present. Raises ValueError for what is no readable GGUF file."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(4) != b"GGUF":
            raise ValueError("this is no GGUF file (its first bytes are not 'GGUF')")
        reader = _Reader(file, size)
        version = reader.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} cannot be read; versions 2 and 3 (little-endian) can")
        reader.scalar("Q")  # number of tensors
        found: dict[str, Any] = {}
        for _ in range(reader.scalar("Q")):
            key = reader.string()
            kind = reader.scalar("I")
            if key in keys:
                found[key] = reader.value(kind)
            else:
                reader.skip(kind)
    return found


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        # The comparison comes first so that a damaged length cannot ask for terabytes.
        if count > self.size - self.file.tell():
            raise ValueError("the GGUF header ends too early; the file is truncated or damaged")
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a string in the GGUF header is not UTF-8; the file is damaged") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                code = f"<{count}{_SCALARS[inner]}"
                return list(struct.unpack(code, self.take(struct.calcsize(f"<{_SCALARS[inner]}") * count)))
            return [self.value(inner) for _ in range(count)]
        return self.scalar(self._code(kind))

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            self._forward(self.scalar("Q"))
        elif kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                self._forward(struct.calcsize(f"<{_SCALARS[inner]}") * count)
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            self.scalar(self._code(kind))

    def _forward(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("the GGUF header ends too early; the file is truncated or damaged")
        self.file.seek(count, 1)

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"the GGUF header has a value of unknown type {kind}; the file is damaged")
        return _SCALARS[kind]
