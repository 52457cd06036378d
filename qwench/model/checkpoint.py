"""A stored model, readable row by row, wherever it lies.

A `Checkpoint` is a config, a store of tensors and the table that says which stored tensor is which part of which
parameter. It reads rows of *our* parameters out of a Hugging Face directory or hub id, a Qwen-1 directory, a GGUF file,
a qwench run or a model in memory, so every direction of loading, saving and converting is the same loop (`weights.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.gguf_file import GgufStore, config_of
from qwench.model.names import Layout, Piece, embedding_name, head_name, pieces
from qwench.model.tensor_files import ReadRows, TensorInfo, TensorStore, open_safetensors

# Buffers that old versions of transformers and Qwen-1's code wrote beside the weights; they follow from the config.
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_STEP = re.compile(r"step_(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be read row by row."""

    config: ModelConfig
    store: TensorStore
    layout: Layout
    path: Path
    """Where it lies, for messages and for the files beside it."""

    @property
    def table(self) -> dict[str, tuple[Piece, ...]]:
        return pieces(self.config, self.layout)

    def checked_table(self) -> dict[str, tuple[Piece, ...]]:
        """The table, after making sure that the store has exactly these tensors in these shapes.

        Raises ValueError naming the first missing, mis-shaped, unreadable or surplus tensor and its file.
        """
        table = self.table
        expected = {piece.name: piece.shape for parts in table.values() for piece in parts}
        stored = self.store.tensors
        for name, shape in expected.items():
            if name not in stored:
                raise ValueError(
                    f"{self.path} has no tensor {name!r}, which its config needs; the checkpoint is incomplete"
                )
            info = stored[name]
            if info.shape != shape:
                raise ValueError(
                    f"tensor {name!r} in {info.file} has shape {list(info.shape)}; its config makes it {list(shape)}"
                )
            if info.dtype is None:
                raise ValueError(
                    f"tensor {name!r} in {info.file} is stored as {info.stored_as}, which is no type that qwench reads"
                )
        for name in sorted(stored.keys() - expected.keys()):
            if name == head_name(self.layout) and self.config.tie_word_embeddings:
                self._check_tied_head(stored)
            elif not _BUFFERS.fullmatch(name):
                raise ValueError(
                    f"tensor {name!r} in {stored[name].file} is no part of the model that its config describes"
                )
        return table

    def _check_tied_head(self, stored: Mapping[str, TensorInfo]) -> None:
        """An output matrix beside tied embeddings is a harmless copy, or the config is wrong."""
        head, embedding = head_name(self.layout), embedding_name(self.layout)
        same = stored[head].shape == stored[embedding].shape and stored[head].dtype == stored[embedding].dtype
        rows, columns = stored[embedding].shape
        for begin in range(0, rows if same else 0, 4096):
            pair = [torch.empty((min(4096, rows - begin), columns), dtype=stored[embedding].dtype) for _ in range(2)]
            self.store.read_rows(head, begin, pair[0])
            self.store.read_rows(embedding, begin, pair[1])
            if not torch.equal(*pair):
                same = False
                break
        if not same:
            raise ValueError(
                f"tensor {head!r} in {stored[head].file} differs from the embedding although config.json ties them; "
                "set tie_word_embeddings to false"
            )

    def dtype(self, names: Sequence[str]) -> torch.dtype:
        """The dtype that holds all stored tensors of these parameters exactly."""
        table = self.table
        result: torch.dtype | None = None
        for name in names:
            for piece in table[name]:
                dtype = self.store.tensors[piece.name].dtype
                assert dtype is not None, "checked_table has refused it"
                result = dtype if result is None else torch.promote_types(result, dtype)
        assert result is not None, "a parameter has at least one piece"
        return result

    def reader(self) -> ReadRows:
        """A function read(parameter, start, out) that fills `out` with rows of one of our parameters."""
        table = self.table

        def read(parameter: str, start: int, out: Tensor) -> None:
            end, top = start + len(out), 0
            for piece in table[parameter]:
                bottom = top + piece.shape[0]
                first, last = max(start, top), min(end, bottom)
                if first < last:
                    self.store.read_rows(piece.name, first - top, out[first - start : last - start])
                top = bottom
            assert end <= top, f"{parameter} has {top} rows, not {end}"

        return read


class ModelStore:
    """The parameters of a model in memory, as a store."""

    def __init__(self, model: CausalLM, where: Path) -> None:
        self._parameters = dict(model.named_parameters())
        self.tensors = {
            name: TensorInfo(tuple(p.shape), p.dtype, str(p.dtype), where) for name, p in self._parameters.items()
        }

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._parameters[name].detach()[start : start + len(out)])


# --------------------------------------------------------------------------------------------------------- locating
def read_config(path: str | Path) -> ModelConfig:
    """The dimensions of a model, without reading weights (of a hub id, only its small files are fetched)."""
    place = locate(path, weights=False)
    return config_of(GgufStore(place)) if place.is_file() else _directory_config(place)[0]


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The content of generation_config.json, or an empty table if the model brings none."""
    place = locate(path, weights=False)
    file = place / "generation_config.json"
    return _read_json(file) if place.is_dir() and file.is_file() else {}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The config and the readable tensors of a model, nothing loaded yet."""
    place = locate(path)
    if place.is_file():
        store = GgufStore(place)
        return Checkpoint(config_of(store), store, "gguf", place)
    config, kind = _directory_config(place)
    return Checkpoint(config, open_safetensors(place), "qwen1" if kind == "qwen" else "hf", place)


def locate(path: str | Path, *, weights: bool = True) -> Path:
    """The GGUF file or model directory that `path` means. Raises ValueError saying what was looked for."""
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if (place / "config.json").is_file():
        return place
    if place.is_dir():
        if found := _newest_of_run(place):
            return found
        files = sorted(file.name for file in place.glob("*.gguf"))
        hint = f"; name the GGUF file: {', '.join(files)}" if files else ""
        raise ValueError(f"{place} is neither a model directory (no config.json) nor a run with a saved model{hint}")
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        return _download(path, weights)
    raise ValueError(
        f"there is no model at {path!s}; give a model directory, a GGUF file, a run, or a hub id owner/name"
    )


def _newest_of_run(run: Path) -> Path | None:
    """RUN/model if the run has finished, else the newest complete RUN/checkpoints/step_*/model."""
    if (run / "model" / "config.json").is_file():
        return run / "model"
    complete = [path.parent for path in run.glob("checkpoints/step_*/COMPLETE")]
    steps = [(int(match[1]), path) for path in complete if (match := _STEP.fullmatch(path.name))]
    return max(steps)[1] / "model" if steps else None


def _download(hub_id: str, weights: bool) -> Path:
    patterns = ["*.json", "*.txt", "*.jinja", "*.tiktoken"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{hub_id} is no local path and could not be fetched from the Hugging Face hub ({reason}); "
            "check the name and the network, or give a local directory"
        ) from None


def _directory_config(directory: Path) -> tuple[ModelConfig, str]:
    path = directory / "config.json"
    table = _read_json(path)
    try:
        config = ModelConfig.from_hf(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ends = directory / "generation_config.json"
    if config.generation == "qwen" and config.eos_token_id is None and ends.is_file():
        # Qwen-1 keeps its end tokens in generation_config.json only.
        ids = _read_json(ends)
        eos = ids.get("eos_token_id")
        config = dataclasses.replace(config, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
    return config, table["model_type"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds no JSON object")
    return table
