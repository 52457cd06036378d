"""Resumable training states: RUN/checkpoints/step_000001000/.

    model/                  Hugging Face directory (fp32 master weights), loadable by itself
    optimizer.safetensors   optimiser state by parameter name
    state.json              step, data position, guard, best validation loss
    checksums.json          of all these files (`checksums.py`), compared before a checkpoint is loaded
    COMPLETE                written last

The files are the same for any number of ranks: all of them write into them at once (`sharded_files.py`), and a rank of
any layout reads the parts that it needs. A checkpoint is built in a hidden sibling directory and renamed into place, so
that a crash of any rank at any moment leaves the previous ones whole; the next process removes what is left over.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from rich.markup import escape
from torch import Tensor, nn

from qwench.model.atomic import atomic_directory
from qwench.model.checkpoint import open_checkpoint
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.names import pieces
from qwench.model.tensor_files import Entry, SafetensorsStore, split_files, write_index
from qwench.model.weights import MAX_SHARD_BYTES, sync_directory, write_configs
from qwench.parallel.blocks import Block, blocks_of, parameter_blocks, speaks_for, whole_shapes
from qwench.parallel.layout import Team
from qwench.run import console
from qwench.tokenizer import Tokenizer
from qwench.train.checksums import find_damage, write_manifest
from qwench.train.optim import Optimizers, allocate_states, optimizer_states
from qwench.train.sharded_files import BlockSum, Specs, TensorFiles, read_blocks

log = logging.getLogger("qwench.train")

T = TypeVar("T")

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
    """The checkpoints of one run: save atomically, find, load, prune. All ranks call its methods together.

    With `background`, `save` copies the rank's share to the host and returns; a thread writes it. At most one save is
    under way: the next one, and `wait`, wait for it and raise what went wrong.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        keep_best: bool,
        team: Team | None = None,
        *,
        background: bool = False,
        verify: bool = True,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {keep_last}; keep at least 1")
        self.directory, self.keep_last, self.keep_best = directory, keep_last, keep_best
        self.team = team or Team.alone(torch.device("cpu"))
        self.background, self.verify = background, verify
        self._begun: set[int] = set()
        self._staging: list[Tensor] = []
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:09d}"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending; what this rank sees."""
        found = (_NAME.fullmatch(marker.parent.name) for marker in self.directory.glob("step_*/COMPLETE"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, model: CausalLM, tokenizer: Tokenizer | None, optimizer: Optimizers, state: TrainState) -> Path:
        """Raises OSError (disk full, no permission) after removing what it had written; older checkpoints stay.

        A step is saved once: replacing a checkpoint would leave a moment in which there is none.
        """
        self.wait()
        final = self.path(state.step)
        if state.step not in self._begun and not self.team.agree((final / "COMPLETE").exists()):
            blocks = list(_all_blocks(model, optimizer, self.team))
            files = _model_files(model.config, torch.float32, "model/") | _optimizer_files(model, optimizer, self.team)
            text = json.dumps(_to_json(state), indent=1)
            if self.background:
                blocks = self._stage(blocks)
            arguments = (final, model.config, tokenizer, blocks, files, text, state.best_step)
            if self.background:
                self._thread = Thread(target=self._write_and_keep_error, args=arguments, name="qwench-checkpoint")
                self._thread.start()
            else:
                self._write(*arguments)
        self._begun.add(state.step)
        return final

    def wait(self) -> None:
        """Until the save in the background is complete on all ranks. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _stage(self, blocks: list[Block]) -> list[Block]:
        """The blocks in the host's memory, which is pinned for a GPU and kept for the next time."""
        pinned = self.team.device.type == "cuda"
        shapes = [(block.values.shape, block.values.dtype) for block in blocks]
        if shapes != [(buffer.shape, buffer.dtype) for buffer in self._staging]:
            self._staging = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in shapes]
        for block, buffer in zip(blocks, self._staging, strict=True):
            buffer.copy_(block.values, non_blocking=True)
        if pinned:
            torch.cuda.current_stream(self.team.device).synchronize()
        return [replace(block, values=buffer) for block, buffer in zip(blocks, self._staging, strict=True)]

    def _write_and_keep_error(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            log.exception("saving a checkpoint")
            self._error = error

    def _write(
        self,
        final: Path,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        blocks: list[Block],
        files: dict[str, Specs],
        state_text: str,
        best_step: int,
    ) -> None:
        partial = final.with_name(f".{final.name}")
        writer = TensorFiles(partial, files)

        def begin() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            (partial / "model").mkdir()
            writer.create()

        def end(sums: list[list[BlockSum]]) -> None:
            _write_model_parts(partial / "model", config, tokenizer, torch.float32)
            (partial / "state.json").write_text(state_text)
            write_manifest(partial, writer.headers, (item for items in sums for item in items))
            (partial / "COMPLETE").touch()
            sync_directory(partial / "model")
            sync_directory(partial)
            if final.exists():  # without COMPLETE: the rest of an interrupted removal
                shutil.rmtree(final)
            partial.rename(final)
            sync_directory(self.directory)

        try:
            _in_turn(self.team, begin, lambda: writer.write(blocks), end)
        except BaseException:
            if self.team.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.team.is_main:
            self.prune(best_step)

    def prune(self, best_step: int) -> None:
        """Remove checkpoints that are neither new nor the best, and what an interrupted save or removal left.

        By one rank alone.
        """
        for leftover in sorted(self.directory.glob(".step_*")):
            shutil.rmtree(leftover)
        steps = self.steps()
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            keep.add(best_step)
        for path in sorted(self.directory.glob("step_*")):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) not in keep:
                # COMPLETE goes first: a crash in the middle of the removal leaves no checkpoint that looks whole.
                (path / "COMPLETE").unlink(missing_ok=True)
                shutil.rmtree(path)

    def newest_whole(self, progress: Callable[[], None] | None = None) -> int | None:
        """The newest checkpoint whose files hold what was written; None if there are no checkpoints.

        Damaged ones after it are moved aside, as damaged_step_N, with a warning that names the file. Raises ValueError
        when there are checkpoints and all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.team.agree(self.steps())):
            failed = None
            if self.verify:
                team = self.team
                failed = team.gather_errors(find_damage(self.path(step), team.rank, team.layout.world, progress))
            if failed is None:
                if self.team.is_main:
                    self._set_aside(damaged, step)
                self.team.barrier()
                return step
            damaged[step] = failed[1]
        if damaged:
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged: {'; '.join(damaged.values())}. Restore one of "
                "them, or remove them to begin anew; checkpoint.verify=false loads one without looking"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], whole: int) -> None:
        for step, damage in damaged.items():
            aside = self.directory / f"damaged_{self.path(step).name}"
            message = f"{damage}; going back to step {whole}, the damaged checkpoint is now {aside}"
            log.warning("%s", message)
            console.print(f"[yellow]warning[/]: {escape(message)}")
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)

    def load(self, step: int, model: CausalLM, optimizer: Optimizers) -> TrainState:
        """Fill model and optimiser in place: this rank's share, whatever layout wrote it.

        Raises ValueError, before anything is changed, when the checkpoint does not fit them.
        """
        path = self.path(step)
        store = SafetensorsStore([path / "optimizer.safetensors"])
        allocate_states(model, optimizer, {name: info.shape for name, info in store.tensors.items()})
        shapes = whole_shapes(model)
        for name, key, _, _ in optimizer_states(model, optimizer):
            whole = store.tensors[f"{name}/{key}"].shape
            if whole and whole != shapes[name]:
                raise ValueError(
                    f"the saved optimiser state {name}/{key} has shape {list(whole)}; it is another model's"
                )
        read_model(path / "model", model, self.team)
        read_blocks(store, _optimizer_blocks(model, optimizer, self.team))
        return self.read_state(step)

    def read_state(self, step: int) -> TrainState:
        """The small part of a checkpoint."""
        return _from_json(json.loads((self.path(step) / "state.json").read_text()))


# ------------------------------------------------------------------------------------------------------ all and blocks
def _in_turn(team: Team, begin: Callable[[], None], work: Callable[[], T], end: Callable[[list[T]], None]) -> None:
    """`begin` on rank 0, `work` on all ranks, `end` on rank 0 with all results; an error of one is an error of all."""
    _together(team, begin if team.is_main else None)
    mine = _together(team, work)
    assert mine is not None
    results = team.gather_saved(mine)
    _together(team, (lambda: end(results)) if team.is_main else None)


def _together(team: Team, action: Callable[[], T] | None) -> T | None:
    """What `action` gives on this rank, once those of all ranks have succeeded."""
    result, error = None, None
    try:
        result = action() if action is not None else None
    except Exception as caught:
        error = caught
    failed = team.gather_errors(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed:
        rank, what = failed
        raise OSError(f"rank {rank} could not write its share of a checkpoint: {what}")
    return result


def _all_blocks(model: CausalLM, optimizer: Optimizers, team: Team) -> Iterator[Block]:
    yield from blocks_of(model, team, once=True)
    yield from _optimizer_blocks(model, optimizer, team, once=True)


def _optimizer_blocks(model: CausalLM, optimizer: Optimizers, team: Team, *, once: bool = False) -> Iterator[Block]:
    """The optimiser's state by "<parameter name>/<state name>", in the shapes of our parameters."""
    for name, key, parameter, value in optimizer_states(model, optimizer):
        if value.ndim == 0:
            if speaks_for(name, team) or not once:
                yield Block(f"{name}/{key}", (), value)
            continue
        for block in parameter_blocks(name, parameter, value, model.config, team, once=once):
            yield replace(block, name=f"{name}/{key}")


def _optimizer_files(model: CausalLM, optimizer: Optimizers, team: Team) -> dict[str, Specs]:
    states: dict[str, list[tuple[str, bool, torch.dtype]]] = {}
    for name, key, _, value in optimizer_states(model, optimizer):
        states.setdefault(name, []).append((key, value.ndim > 0, value.dtype))
    if team.layout.pipeline > 1:  # a rank has some layers only
        states = {name: keys for mine in team.gather(states) for name, keys in mine.items()}
    specs = [
        (f"{name}/{key}", shape if is_tensor else (), dtype)
        for name, shape in whole_shapes(model).items()
        for key, is_tensor, dtype in states.get(name, [])
    ]
    return {"optimizer.safetensors": specs}


def _model_entries(config: ModelConfig, dtype: torch.dtype) -> dict[str, list[Entry]]:
    table = pieces(config, "hf")
    entries = [Entry(piece.name, piece.shape, dtype, name, 0) for name, parts in table.items() for piece in parts]
    return split_files(entries, MAX_SHARD_BYTES)


def _model_files(config: ModelConfig, dtype: torch.dtype, prefix: str) -> dict[str, Specs]:
    return {
        prefix + file: [(entry.name, entry.shape, entry.dtype) for entry in entries]
        for file, entries in _model_entries(config, dtype).items()
    }


def _write_model_parts(directory: Path, config: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> None:
    """What belongs to a model directory beside the weights."""
    write_configs(config, directory, "hf", dtype)
    write_index(directory, _model_entries(config, dtype))
    if tokenizer is not None:
        tokenizer.save(directory)


def read_model(directory: Path, model: CausalLM, team: Team) -> None:
    """This rank's share of a Hugging Face directory. Raises ValueError if it holds another model."""
    checkpoint = open_checkpoint(directory)
    checkpoint.checked_table()
    stored, wanted = checkpoint.table, pieces(model.config, "hf")
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            shapes = [[piece.shape for piece in table.get(name, ())] for table in (stored, wanted)]
            raise ValueError(f"{directory} is another model: {name} is {shapes[0]} there and {shapes[1]} here")
    assert isinstance(checkpoint.store, SafetensorsStore)
    read_blocks(checkpoint.store, blocks_of(model, team))


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


def export(
    model: nn.Module, tokenizer: Tokenizer | None, directory: Path, dtype: torch.dtype, team: Team | None = None
) -> None:
    """The result of a run as a Hugging Face directory in `dtype`, complete or not at all. By all ranks together."""
    assert isinstance(model, CausalLM)
    team = team or Team.alone(torch.device("cpu"))
    overwrite = (directory / "config.json").is_file()
    with atomic_directory(directory, overwrite=overwrite) if team.is_main else nullcontext(directory) as mine:
        partial = team.agree(mine)
        writer = TensorFiles(partial, _model_files(model.config, dtype, ""))
        _in_turn(
            team,
            writer.create,
            lambda: writer.write(blocks_of(model, team, once=True)),
            lambda _: _write_model_parts(partial, model.config, tokenizer, dtype),
        )
    team.barrier()
    log.info("saved %s", directory)
