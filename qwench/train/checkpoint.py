"""Resumable training states: RUN/checkpoints/step_000001000/.

    model/                  Hugging Face directory (fp32 master weights), loadable by itself
    optimizer.safetensors   optimiser state by parameter name
    state.json              step, data position, guard, best validation loss
    COMPLETE                written last

A checkpoint is built in a hidden sibling directory and renamed into place, so that a crash at any moment leaves the
previous ones whole; the next process removes what is left over.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qwench.model.decoder import CausalLM
from qwench.model.weights import load_weights, save_pretrained, sync_directory, write_safetensors
from qwench.tokenizer import Tokenizer
from qwench.train.optim import Optimizers, load_optimizer_tensors, optimizer_tensors

log = logging.getLogger("qwench.train")

_NAME = re.compile(r"step_(\d{9,})")


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run is, beside weights and optimiser: everything that must survive a restart."""

    step: int = 0
    """Optimiser steps taken, skipped ones included."""
    tokens: int = 0
    best_loss: float = float("inf")
    best_step: int = -1
    precision: str = ""
    """Dtype of the activations: "auto" must not change in the middle of a run, and it is measured anew every time."""
    loader: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: save atomically, find, load, prune."""

    def __init__(self, directory: Path, keep_last: int, keep_best: bool) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {keep_last}; keep at least 1")
        self.directory, self.keep_last, self.keep_best = directory, keep_last, keep_best

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:09d}"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        found = (_NAME.fullmatch(marker.parent.name) for marker in self.directory.glob("step_*/COMPLETE"))
        return sorted(int(match[1]) for match in found if match)

    def is_saved(self, step: int) -> bool:
        return (self.path(step) / "COMPLETE").exists()

    def save(self, model: CausalLM, tokenizer: Tokenizer | None, optimizer: Optimizers, state: TrainState) -> Path:
        """Raises OSError (disk full, no permission) after removing what it had written; older checkpoints stay.

        A step is saved once: replacing a checkpoint would leave a moment in which there is none.
        """
        if self.is_saved(state.step):
            return self.path(state.step)
        self.directory.mkdir(parents=True, exist_ok=True)
        final, partial = self.path(state.step), self.directory / f".step_{state.step:09d}"
        try:
            partial.mkdir()
            save_pretrained(model, partial / "model", tokenizer=tokenizer)
            write_safetensors(partial / "optimizer.safetensors", optimizer_tensors(model, optimizer))
            (partial / "state.json").write_text(json.dumps(_to_json(state), indent=1))
            (partial / "COMPLETE").touch()
            sync_directory(partial)
            if final.exists():  # without COMPLETE: the rest of an interrupted removal
                shutil.rmtree(final)
            partial.rename(final)
            sync_directory(self.directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.prune(state)
        return final

    def prune(self, state: TrainState) -> None:
        """Remove checkpoints that are neither new nor the best, and what an interrupted save or removal left."""
        for leftover in sorted(self.directory.glob(".step_*")):
            shutil.rmtree(leftover)
        steps = self.steps()
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            keep.add(state.best_step)
        for path in sorted(self.directory.glob("step_*")):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) not in keep:
                # COMPLETE goes first: a crash in the middle of the removal leaves no checkpoint that looks whole.
                (path / "COMPLETE").unlink(missing_ok=True)
                shutil.rmtree(path)

    def load(self, step: int, model: CausalLM, optimizer: Optimizers) -> TrainState:
        """Fill model and optimiser in place. Raises ValueError when the checkpoint does not fit them."""
        path = self.path(step)
        load_weights(model, path / "model")
        with safe_open(path / "optimizer.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        load_optimizer_tensors(model, optimizer, tensors)
        return _from_json(json.loads((path / "state.json").read_text()))


def _to_json(state: TrainState) -> dict[str, Any]:
    best = None if state.best_step < 0 else state.best_loss
    return {
        "step": state.step,
        "tokens": state.tokens,
        "best_loss": best,
        "best_step": state.best_step,
        "precision": state.precision,
        "loader": state.loader,
        "guard": state.guard,
    }


def _from_json(table: dict[str, Any]) -> TrainState:
    best = table.pop("best_loss")
    return TrainState(**table, best_loss=float("inf") if best is None else best)


def export(model: nn.Module, tokenizer: Tokenizer | None, directory: Path, dtype: torch.dtype) -> None:
    """The result of a run as a Hugging Face directory in `dtype`."""
    assert isinstance(model, CausalLM)
    save_pretrained(model, directory, tokenizer=tokenizer, dtype=dtype)
    log.info("saved %s", directory)
