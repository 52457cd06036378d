"""Tensors on disk, row by row: the interface of a tensor store, and the safetensors format behind it.

Files are read with plain reads into the destination (or through a small buffer when dtype or device differ) and
written from a small buffer, so a model is never in memory twice. Which tensor means what is `names.py`'s business.
The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, raw data.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_CODES = {dtype: code for code, dtype in (_DTYPES | _INTEGERS | {"BOOL": torch.bool}).items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """What `read_rows` yields exactly; None where the stored type is no floating-point type we read."""
    stored_as: str
    """Name of the type in the file, for example "BF16" or "Q4_K"."""
    file: Path


class TensorStore(Protocol):
    """Stored tensors by name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the rows of `name` from `start` on, cast to its dtype. Raises ValueError if unreadable."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its stored name, and the rows of our parameter that it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


ReadRows = Callable[[str, int, Tensor], None]


# ---------------------------------------------------------------------------------------------------------- reading
class SafetensorsStore:
    """The tensors of one or more safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        for file in files:
            for name, (info, offset) in read_header(file).items():
                if name in self.tensors:
                    raise ValueError(f"tensor {name!r} is in {self.tensors[name].file} and again in {file}")
                self.tensors[name] = info
                self._offsets[name] = offset

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        info = self.tensors[name]
        if info.dtype is None:
            raise ValueError(
                f"tensor {name!r} in {info.file} has type {info.stored_as}; qwench reads {', '.join(_DTYPES)}"
            )
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        with open(info.file, "rb", buffering=0) as file:
            read_raw(
                file.fileno(), self._offsets[name] + start * row_bytes, info.dtype, out, f"{name!r} in {info.file}"
            )


def open_safetensors(directory: Path) -> SafetensorsStore:
    """The weights of a model directory: model.safetensors, or the shards that the index names.

    Raises ValueError when there are none, when a file is damaged, or when index and shards disagree.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return SafetensorsStore([single])
    if not index.is_file():
        if any(directory.glob("*.bin")):
            raise ValueError(
                f"{directory} has weights as pickle (*.bin) only, which can run code; get the safetensors files"
            )
        raise ValueError(f"{directory} has neither model.safetensors nor {INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r})") from None
    for file in files:
        if Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{index} names the file {file!r}, which is not in {directory}")
    store = SafetensorsStore([directory / file for file in files])
    for name, file in weight_map.items():
        if name not in store.tensors or store.tensors[name].file.name != file:
            raise ValueError(f"{index} says that tensor {name!r} is in {file}, but it is not there")
    return store


def read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Name -> (what it is, where its bytes begin in the file), checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: its header does not fit into {size} bytes")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        table = {name: (str(e["dtype"]), tuple(map(int, e["shape"])), *e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: its header does not parse ({error!r})") from None
    result: dict[str, tuple[TensorInfo, int]] = {}
    for name, (code, shape, begin, end) in table.items():
        dtype = _DTYPES.get(code)
        if not 0 <= begin <= end or 8 + length + end > size:
            missing = 8 + length + end - size
            raise ValueError(f"{path} is truncated: tensor {name!r} ends {missing} bytes after the end of the file")
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{path} is damaged: tensor {name!r} {list(shape)} {code} has {end - begin} bytes")
        result[name] = TensorInfo(shape, dtype, code, path), 8 + length + begin
    return result


def read_raw(descriptor: int, offset: int, dtype: torch.dtype, out: Tensor, what: str) -> None:
    """Fill `out` with its number of elements of type `dtype`, stored from byte `offset` on."""
    assert sys.byteorder == "little", "safetensors and GGUF data are little-endian"
    if out.numel() == 0:
        return
    if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
        _read_bytes(descriptor, offset, out, what)
        return
    flat = out.view(-1) if out.is_contiguous() else None
    assert flat is not None, "rows of a parameter are contiguous"
    step = min(BUFFER_BYTES // dtype.itemsize, flat.numel())
    buffer = torch.empty(step, dtype=dtype)
    for begin in range(0, flat.numel(), step):
        part = buffer[: min(step, flat.numel() - begin)]
        _read_bytes(descriptor, offset + begin * dtype.itemsize, part, what)
        flat[begin : begin + len(part)].copy_(part)


def _read_bytes(descriptor: int, offset: int, out: Tensor, what: str) -> None:
    view = byte_view(out)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"the file ends inside tensor {what}; it is truncated")
        done += count


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(cast(Any, tensor.detach().view(-1).view(torch.uint8).numpy()))


# ---------------------------------------------------------------------------------------------------------- writing
def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a table of tensors as one file, fsynced; what is not contiguous on the CPU is copied, one at a time."""
    specs = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    _write_file(path, specs, (tensor.detach().cpu().contiguous() for tensor in tensors.values()))


def _write_entries(path: Path, entries: Sequence[Entry], read: ReadRows, advance: Callable[[int], None]) -> None:
    def chunks() -> Iterator[Tensor]:
        for entry in entries:
            for rows in row_chunks(entry, read):
                yield rows
                advance(rows.numel() * rows.element_size())

    _write_file(path, [(entry.name, entry.shape, entry.dtype) for entry in entries], chunks())


Specs = Sequence[tuple[str, tuple[int, ...], torch.dtype]]


def _write_file(path: Path, specs: Specs, data: Iterator[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(make_header(specs)[0])
        for part in data:
            file.write(byte_view(part))
        file.flush()
        os.fsync(file.fileno())


def make_header(specs: Specs) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file with these tensors in this order, and the byte at which each begins in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name, shape, dtype in specs:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        begins[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


def row_chunks(entry: Entry, read: ReadRows) -> Iterator[Tensor]:
    """The tensor of an entry from top to bottom in pieces of about BUFFER_BYTES; each is valid until the next one."""
    row = math.prod(entry.shape[1:])
    step = max(1, min(BUFFER_BYTES // (row * entry.dtype.itemsize), entry.shape[0]))
    buffer = torch.empty((step, *entry.shape[1:]), dtype=entry.dtype)
    for begin in range(0, entry.shape[0], step):
        rows = buffer[: min(step, entry.shape[0] - begin)]
        read(entry.parameter, entry.start + begin, rows)
        if entry.dtype == torch.float16 and not torch.isfinite(rows).all():
            raise ValueError(f"tensor {entry.name!r} has values beyond float16's 65504 (or none at all); use bfloat16")
        yield rows


def write_shards(
    directory: Path, entries: Sequence[Entry], read: ReadRows, max_shard_bytes: int, advance: Callable[[int], None]
) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and so on with an index, as Hugging Face does."""
    files = split_files(entries, max_shard_bytes)
    for name, shard in files.items():
        _write_entries(directory / name, shard, read, advance)
    write_index(directory, files)


def split_files(entries: Sequence[Entry], max_shard_bytes: int) -> dict[str, list[Entry]]:
    """Which of Hugging Face's file names holds which tensors: one file, or several of at most `max_shard_bytes`."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(directory: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """The index beside several files; one file needs none."""
    if len(files) == 1:
        return
    weight_map = {entry.name: name for name, shard in files.items() for entry in shard}
    total = sum(entry.num_bytes for shard in files.values() for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
