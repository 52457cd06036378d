"""Weights between disk and memory, streamed: into an allocated model, out of one, or from file to file.

One buffer of some megabytes moves between the two, so a model is never in memory twice. Where models lie and what their
files mean is `checkpoint.py`'s business; `convert.py` goes from file to file with the same functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwench.model.atomic import atomic_directory, sync_directory
from qwench.model.checkpoint import Checkpoint, ModelStore, open_checkpoint
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.names import Layout, pieces
from qwench.model.tensor_files import Entry, write_safetensors, write_shards

__all__ = ["load_weights", "parse_dtype", "plan", "save_pretrained", "sync_directory", "write_safetensors"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5_000_000_000


class Savable(Protocol):
    """A tokenizer, as far as saving a model needs to know it."""

    def save(self, path: Path, /) -> Any: ...


# ---------------------------------------------------------------------------------------------------------- loading
@torch.no_grad()
def load_weights(model: CausalLM, source: Checkpoint | str | Path, *, progress: bool = False) -> None:
    """Fill an allocated model in place, parameter by parameter, casting to the parameter's dtype on the way.

    Raises ValueError, before anything is changed, if the source does not hold exactly this model.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    table = checkpoint.checked_table()
    parameters = dict(model.named_parameters())
    stored = {name: (sum(piece.shape[0] for piece in parts), *parts[0].shape[1:]) for name, parts in table.items()}
    for name in sorted(parameters.keys() | stored.keys()):
        shapes = [tuple(parameters[name].shape) if name in parameters else None, stored.get(name)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{checkpoint.path} is another model: {name} is {shapes[1]} there and {shapes[0]} here")
    read = checkpoint.reader()
    total = sum(p.numel() * p.element_size() for p in parameters.values())
    with progress_bar("loading", total, show=progress) as advance:
        for name, parameter in parameters.items():
            read(name, 0, parameter.detach())
            advance(parameter.numel() * parameter.element_size())


# ----------------------------------------------------------------------------------------------------------- saving
def save_pretrained(
    model: CausalLM,
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    tokenizer: Savable | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write a Hugging Face model directory: config files, safetensors, and the tokenizer's files if one is given.

    dtype "auto" keeps the parameters' own. The directory appears complete or not at all (see `atomic.py`); a model
    directory that stands there is replaced. Raises ValueError if another non-empty directory does.
    """
    target = Path(directory)
    checkpoint = Checkpoint(model.config, ModelStore(model, target), "qwench", target)
    with atomic_directory(target, overwrite=(target / "config.json").is_file()) as partial:
        write_directory(
            checkpoint,
            partial,
            "hf",
            dtype=dtype,
            generation_config=generation_config,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        if tokenizer is not None:
            tokenizer.save(partial)


def write_directory(
    checkpoint: Checkpoint,
    directory: Path,
    layout: Literal["hf", "qwen1"],
    *,
    dtype: str | torch.dtype = "auto",
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Config files and weights of a checkpoint, in Hugging Face's or Qwen-1's layout, into an empty directory."""
    entries = plan(checkpoint, layout, dtype)
    widest = entries[0].dtype
    for entry in entries:
        widest = torch.promote_types(widest, entry.dtype)
    write_configs(checkpoint.config, directory, layout, widest, generation_config)
    with progress_bar("writing", sum(entry.num_bytes for entry in entries), show=progress) as advance:
        write_shards(directory, entries, checkpoint.reader(), max_shard_bytes, advance)


def write_configs(
    config: ModelConfig,
    directory: Path,
    layout: Literal["hf", "qwen1"],
    dtype: torch.dtype,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """config.json and generation_config.json for weights in `dtype`."""
    table = config.to_hf() if layout == "hf" else config.to_qwen1()
    table["torch_dtype"] = str(dtype).removeprefix("torch.")
    if layout == "qwen1":
        flags = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        table |= {flag: dtype == kind for flag, kind in flags.items()}
    write_json(directory / "config.json", table)
    write_json(directory / "generation_config.json", generation_config or default_generation(config))


def plan(checkpoint: Checkpoint, layout: Layout, dtype: str | torch.dtype) -> list[Entry]:
    """The tensors to write for a layout, in order of their names; dtype "auto" keeps every value exact."""
    checkpoint.checked_table()
    fixed = None if dtype == "auto" else parse_dtype(dtype)
    entries: list[Entry] = []
    for parameter, parts in pieces(checkpoint.config, layout).items():
        start = 0
        kept = fixed or checkpoint.dtype([parameter])
        for piece in parts:
            entries.append(Entry(piece.name, piece.shape, kept, parameter, start))
            start += piece.shape[0]
    return entries


def default_generation(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json of a model that brings none: greedy, with the config's own end tokens."""
    eos = list(config.eos_token_ids)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return {key: value for key, value in ids.items() if value is not None} | {"do_sample": False}


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """ "bfloat16" or torch.bfloat16 as a torch dtype. Raises ValueError for another than float32, float16, bfloat16."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def progress_bar(what: str, total_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if wanted and a terminal; yields a function that takes the bytes done since its last call."""
    hidden = not (show and sys.stderr.isatty())
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
