"""checksums.json of a checkpoint: a CRC-32 for every block that a rank wrote, and for every small file.

    {"model/model.safetensors": {"bytes": 1234, "header": [208, 123], "blocks": [["norm.weight", [0], [64], 456], ...]},
     "state.json": {"bytes": 310, "crc32": 789}, ...}

A block's sum is taken from the bytes in memory as they are written, so it finds what went wrong anywhere between there
and the next load; reading back would find less and cost more. Blocks are rectangles of whole tensors, so that a job of
another layout can check what this one wrote. CRC-32 finds damage, not forgery; it is in Python, which gives the lock
away meanwhile, and was measured at 3.5 GB/s on one core (blake2b 0.75 GB/s).
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwench.model.tensor_files import BUFFER_BYTES, SafetensorsStore, byte_view
from qwench.parallel.blocks import Block
from qwench.train.sharded_files import BlockSum, read_blocks

MANIFEST = "checksums.json"
THREADS = 4
"""Of a rank, while it checks: a sum, and mostly the file system, take the time."""


def write_manifest(directory: Path, headers: Mapping[str, bytes], sums: Iterable[BlockSum]) -> None:
    """Write the manifest of a directory that is otherwise complete; `headers` by path of the files with tensors."""
    table: dict[str, Any] = {}
    for name, header in headers.items():
        size = (directory / name).stat().st_size
        table[name] = {"bytes": size, "header": [len(header), zlib.crc32(header)], "blocks": []}
    for item in sums:
        table[item.file]["blocks"].append([item.tensor, item.start, item.shape, item.crc])
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in table:
            content = path.read_bytes()
            table[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    lines = (f" {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in table.items())
    (directory / MANIFEST).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Check:
    """One thing to compare: a small file, a header, or a block of a tensor."""

    name: str
    num_bytes: int
    run: Callable[[], str | None]


def find_damage(
    directory: Path, share: int = 0, shares: int = 1, progress: Callable[[], None] | None = None
) -> str | None:
    """What is wrong with the files of a checkpoint, in one sentence that names the file; None if nothing is.

    Of `shares` ranks that call this together each reads its share of the bytes. A directory without a manifest, as an
    earlier version wrote it, has nothing to be compared with.
    """
    manifest = directory / MANIFEST
    if not manifest.exists():
        return None
    try:
        checks = list(_checks(directory, json.loads(manifest.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{manifest} is damaged ({error})"
    mine = _dealt(checks, share, shares)
    with ThreadPoolExecutor(THREADS) as pool:
        for damage in pool.map(_guarded, mine):
            if progress is not None:
                progress()
            if damage is not None:
                pool.shutdown(cancel_futures=True)
                return damage
    return None


def _dealt(checks: Sequence[_Check], share: int, shares: int) -> list[_Check]:
    """About as many bytes for every rank: the largest first, to whoever has least."""
    loads = [0] * shares
    mine = []
    for check in sorted(checks, key=lambda check: (-check.num_bytes, check.name)):
        least = loads.index(min(loads))
        loads[least] += check.num_bytes + 4096
        if least == share:
            mine.append(check)
    return mine


def _guarded(check: _Check) -> str | None:
    try:
        return check.run()
    except (OSError, ValueError, KeyError) as error:
        return f"{check.name} cannot be read ({error})"


def _checks(directory: Path, table: Mapping[str, Any]) -> Iterable[_Check]:
    for name, entry in table.items():
        path = directory / name
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if "crc32" in entry:
            yield _Check(name, entry["bytes"], _prefix_check(path, entry["bytes"], entry["crc32"]))
            continue
        yield _Check(name, entry["header"][0], _prefix_check(path, *entry["header"]))
        store = _Store(path)
        for tensor, start, shape, crc in entry["blocks"]:
            num_bytes = torch.Size(shape).numel() * 4
            yield _Check(f"{name}:{tensor}", num_bytes, _block_check(store, tensor, tuple(start), tuple(shape), crc))


def _prefix_check(path: Path, length: int, crc: int) -> Callable[[], str | None]:
    def run() -> str | None:
        with path.open("rb") as file:
            return None if zlib.crc32(file.read(length)) == crc else f"{path} is damaged: its first {length} bytes"

    return run


class _Store:
    """The tensors of a file, whose header is parsed when one of them is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store: SafetensorsStore | None = None

    def open(self) -> SafetensorsStore:
        if self._store is None:
            self._store = SafetensorsStore([self.path])
        return self._store


def _block_check(
    store: _Store, tensor: str, start: tuple[int, ...], shape: tuple[int, ...], wanted: int
) -> Callable[[], str | None]:
    def run() -> str | None:
        opened, crc = store.open(), 0
        dtype = opened.tensors[tensor].dtype
        if dtype is None:  # the header, which another check finds damaged too
            return f"{store.path} is damaged: tensor {tensor} has no type that was written"
        width = torch.Size(shape[1:]).numel()
        step = max(1, BUFFER_BYTES // max(1, width * dtype.itemsize))
        for first in itertools.count(0, step):
            if first and (not shape or first >= shape[0]):
                break
            rows = torch.empty((min(step, shape[0] - first), *shape[1:]) if shape else (), dtype=dtype)
            read_blocks(opened, [Block(tensor, (start[0] + first, *start[1:]) if start else (), rows)])
            crc = zlib.crc32(byte_view(rows), crc)
        if crc == wanted:
            return None
        place = f"rows {start[0]} to {start[0] + shape[0] - 1} of " if shape else ""
        return f"{store.path} is damaged: the bytes of {place}tensor {tensor} are not what was saved"

    return run
