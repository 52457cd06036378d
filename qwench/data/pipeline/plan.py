"""The plan: input files of all sources as items of work of about the same size.

What an item holds follows from the files and the recipe only. Large plain JSON lines and Parquet files are cut into
ranges, small files are put together, and an item never mixes sources. A file's size and date are part of its item, so
that a changed file is read again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from qwench.config import to_dict
from qwench.data.inputs import InputFile, Skipped, find_inputs, row_group_bytes
from qwench.data.opening import is_url
from qwench.data.pipeline.models_job import model_tables
from qwench.data.pipeline.recipe import DataConfig, SourceConfig

_MAX_FILES = 4096


def plan_items(recipe: DataConfig, problems: list[Skipped]) -> list[dict[str, Any]]:
    """Items of the prepare stage in the order of the sources. Raises ValueError for paths that do not exist and for
    sources without readable files."""
    common = {
        "read": to_dict(recipe.read),
        "rules": to_dict(recipe.rules),
        "dedup": to_dict(recipe.dedup),
        "models": model_tables(recipe.models, before_dedup=True),
    }
    items = []
    for name, source in recipe.sources.items():
        paths = [_below(recipe, path) for path in source.paths]
        files = find_inputs(paths, problems)
        if not files:
            shown = ", ".join(paths[:3]) + (" ..." if len(paths) > 3 else "")
            raise ValueError(
                f"sources.{name}: no readable files in {shown}; looked for text (.txt, .md, ...), source code, .html, "
                ".warc, .jsonl, .parquet and .xml files"
            )
        labels = _labels(name, source)
        for group, size in _grouped(files, int(recipe.part_mb * 1e6)):
            items.append({**labels, "files": group, "bytes": size, **common})
    return items


def _below(recipe: DataConfig, path: str) -> str:
    return path if is_url(path) or recipe.inputs is None else os.path.join(recipe.inputs, path)


def _labels(name: str, source: SourceConfig) -> dict[str, Any]:
    return {
        "source": name,
        "kind": source.kind,
        "lang": source.lang,
        "text_field": list(source.text_field),
        "conversations": source.conversations,
    }


def _grouped(files: list[InputFile], part_bytes: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Pieces of files that make up one item each, with their bytes."""
    group: list[dict[str, Any]] = []
    size = 0
    for piece, piece_bytes in _pieces(files, part_bytes):
        if group and (size + piece_bytes > part_bytes or len(group) >= _MAX_FILES):
            yield group, size
            group, size = [], 0
        group.append(piece)
        size += piece_bytes
    if group:
        yield group, size


def _pieces(files: list[InputFile], part_bytes: int) -> Iterator[tuple[dict[str, Any], int]]:
    for file in files:
        table = {"name": file.name, "path": _absolute(file.path), "format": file.format, "stamp": _stamp(file)}
        ranges: list[tuple[int, int, int]] = []
        if file.pieces == "bytes" and file.num_bytes > part_bytes:
            num = -(-file.num_bytes // part_bytes)
            bounds = [file.num_bytes * number // num for number in range(num + 1)]
            ranges = [(low, high, high - low) for low, high in itertools.pairwise(bounds)]
        elif file.pieces == "row_groups" and file.num_bytes > part_bytes:
            ranges = list(_row_group_ranges(row_group_bytes(file), part_bytes))
        if not ranges:
            yield table, file.num_bytes
        for start, stop, size in ranges:
            yield {**table, "start": start, "stop": stop}, size


def _row_group_ranges(sizes: list[int], part_bytes: int) -> Iterator[tuple[int, int, int]]:
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if total and total + size > part_bytes:
            yield first, number, total
            first, total = number, 0
        total += size
    if total:
        yield first, len(sizes), total


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _stamp(file: InputFile) -> list[int]:
    """What tells a changed file: its size, and the time of its last change where there is one."""
    if is_url(file.path):
        return [file.num_bytes]
    try:
        return [file.num_bytes, os.stat(file.path).st_mtime_ns]
    except OSError:
        return [file.num_bytes]


def plan_of(items: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Items, files and bytes of each source, for people."""
    table: dict[str, dict[str, Any]] = {}
    for item in items:
        entry = table.setdefault(item["source"], {"source": item["source"], "items": 0, "files": set(), "bytes": 0})
        entry["items"] += 1
        entry["files"] |= {file["path"] for file in item["files"]}
        entry["bytes"] += item["bytes"]
    return [{**entry, "files": len(entry["files"])} for entry in table.values()]
