"""Tensors that all ranks write into the same safetensors files at the same time, each its blocks at their places.

A file's header follows from the names, shapes and dtypes of its tensors, so every rank knows where each byte belongs.
What comes out does not depend on the number of ranks or on their layout, and is read like any other such file: there is
no second format, nothing to be merged, and any other layout reads the blocks that it needs.

The directory must be one that all hosts share, on a file system that lets several hosts write to different parts of a
file (local disks of one host, Lustre, GPFS, BeeGFS, NFS; not an object store behind a file interface).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwench.model.tensor_files import BUFFER_BYTES, SafetensorsStore, byte_view, make_header
from qwench.parallel.blocks import Block

Specs = Sequence[tuple[str, tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class BlockSum:
    """CRC-32 of the bytes of a block, row by row, as they went into a file."""

    file: str
    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    crc: int


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """Files to be written together: relative path -> the whole tensors in it, in order."""

    def __init__(self, directory: Path, files: Mapping[str, Specs]) -> None:
        self.directory = directory
        self._headers = {directory / name: make_header(specs) for name, specs in files.items()}
        self._places = {
            tensor: _Place(directory / name, self._headers[directory / name][1][tensor], shape, dtype)
            for name, specs in files.items()
            for tensor, shape, dtype in specs
        }

    def create(self) -> None:
        """The files with their headers and full sizes; by one rank, before any writes. Raises OSError."""
        for path, (header, begins) in self._headers.items():
            ends = [begin + self._num_bytes(name) for name, begin in begins.items()]
            with path.open("wb") as file:
                file.write(header)
                file.truncate(max(ends, default=len(header)))

    @property
    def headers(self) -> dict[str, bytes]:
        """The beginnings of the files, by relative path."""
        return {path.relative_to(self.directory).as_posix(): header for path, (header, _) in self._headers.items()}

    def _num_bytes(self, name: str) -> int:
        place = self._places[name]
        return torch.Size(place.shape).numel() * place.dtype.itemsize

    def write(self, blocks: Iterable[Block]) -> list[BlockSum]:
        """Write blocks, cast to their tensor's dtype, and sync them to disk; their checksums. Raises OSError."""
        descriptors: dict[Path, int] = {}
        sums: list[BlockSum] = []
        try:
            for block in blocks:
                place = self._places[block.name]
                if place.path not in descriptors:
                    descriptors[place.path] = os.open(place.path, os.O_WRONLY)
                crc = _write_block(descriptors[place.path], place, block)
                file = place.path.relative_to(self.directory).as_posix()
                sums.append(BlockSum(file, block.name, block.start, tuple(block.values.shape), crc))
            for descriptor in descriptors.values():
                os.fsync(descriptor)
            return sums
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def _write_block(descriptor: int, place: _Place, block: Block) -> int:
    """The CRC-32 of what was written."""
    row_items = torch.Size(place.shape[1:]).numel()
    row_bytes = row_items * place.dtype.itemsize
    if block.values.ndim == 0:
        view = byte_view(block.values.to("cpu", place.dtype).reshape(1))
        _write_bytes(descriptor, view, place.begin)
        return zlib.crc32(view)
    crc = 0
    whole_rows = block.values.ndim == 1 or block.values.shape[1] == place.shape[1]
    for first, rows in _host_rows(block.values, place.dtype):
        begin = place.begin + (block.start[0] + first) * row_bytes
        crc = zlib.crc32(byte_view(rows), crc)
        if whole_rows:
            _write_bytes(descriptor, byte_view(rows), begin)
            continue
        for index, row in enumerate(rows):
            _write_bytes(descriptor, byte_view(row), begin + index * row_bytes + block.start[1] * place.dtype.itemsize)
    return crc


def _host_rows(values: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor, some megabytes at a time, contiguous on the host."""
    row_bytes = max(1, values[0].numel() * dtype.itemsize)
    step = max(1, BUFFER_BYTES // row_bytes)
    for first in range(0, len(values), step):
        yield first, values[first : first + step].detach().to("cpu", dtype).contiguous()


def _write_bytes(descriptor: int, view: memoryview, begin: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], begin + done)


@torch.no_grad()
def read_blocks(store: SafetensorsStore, blocks: Iterable[Block]) -> None:
    """Fill blocks from stored tensors, whose presence and shape the caller has checked. Raises ValueError, OSError."""
    for block in blocks:
        shape = store.tensors[block.name].shape
        whole_rows = block.values.ndim < 2 or block.values.shape[1] == shape[1]
        if whole_rows and block.values.is_contiguous():
            store.read_rows(block.name, block.start[0] if block.start else 0, block.values)
            continue
        # Columns: whole rows pass through the host, some megabytes at a time.
        width, column = shape[1], block.start[1]
        step = max(1, BUFFER_BYTES // (width * block.values.element_size()))
        for first in range(0, len(block.values), step):
            out = block.values[first : first + step]
            rows = torch.empty((len(out), width), dtype=out.dtype)
            store.read_rows(block.name, block.start[0] + first, rows)
            out.copy_(rows[:, column : column + out.shape[1]])
