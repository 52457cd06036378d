"""THE training loop: next batch, loss function, step, validate, save. Stages give it a model, data and a loss.

Every step's rows are split into micro-batches whose losses are divided by the step's total loss weight, so that the
gradient does not depend on how the rows were split. Host work (rows for the next step) runs in the loader's thread.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from qwench.data.loader import RowLoader
from qwench.data.packing import PackedRow, RowSource
from qwench.model.decoder import CausalLM
from qwench.model.flops import training_flops_per_token
from qwench.ops import dispatch
from qwench.ops.hardware import peak_flops, pick_device, pick_dtype
from qwench.run import Run, console, progress
from qwench.tokenizer import Tokenizer
from qwench.train.batch import Batch, make_batch
from qwench.train.checkpoint import Checkpoints, TrainState, export
from qwench.train.config import (
    CheckpointConfig,
    GuardConfig,
    LoopConfig,
    OpsConfig,
    OptimConfig,
    ScheduleConfig,
)
from qwench.train.guard import Guard
from qwench.train.loss import next_token_loss
from qwench.train.optim import build_optimizer, clip_gradients
from qwench.train.schedule import lr_ratio

log = logging.getLogger("qwench.train")

LossFunction = Callable[[CausalLM, Batch], Tensor]
"""(model, batch) -> sum of weighted losses; the loop divides by the total weight of the step."""


class Recipe(Protocol):
    """The part of every training recipe that the loop reads."""

    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def guard(self) -> GuardConfig: ...
    @property
    def ops(self) -> OpsConfig: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training stage ends with; losses in nats per weighted token, speed over this process's steps."""

    steps: int
    tokens: int
    train_loss: float
    val_loss: float | None
    tokens_per_s: float
    mfu: float
    skipped_steps: int


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        source: RowSource,
        val_source: RowSource | None = None,
        loss_function: LossFunction = next_token_loss,
    ) -> None:
        self.recipe, self.run, self.model, self.tokenizer = recipe, run, model, tokenizer
        self.cfg, self.loss_function, self.val_source = recipe.loop, loss_function, val_source
        self.device = model.model.embed_tokens.weight.device
        self._compute_in(pick_dtype(self.cfg.precision, self.device))
        self.loader = RowLoader(source, self.cfg.batch_rows, self.cfg.seed)
        steps_per_epoch = source.num_rows / self.cfg.batch_rows
        self.total_steps = self.cfg.steps or max(1, round((self.cfg.epochs or 0) * steps_per_epoch))
        self.optimizer = build_optimizer(model, recipe.optim)
        self.guard = Guard(recipe.guard)
        self.checkpoints = Checkpoints(
            run.path / "checkpoints", recipe.checkpoint.keep_last, recipe.checkpoint.keep_best
        )
        self.state = TrainState()
        self._stop_signal = False

    def _compute_in(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model.set_compute_dtype(dtype)
        self.peak, self.peak_source = peak_flops(self.device, dtype)

    # ------------------------------------------------------------------------------------------------------- running
    def train(self) -> TrainResult:
        """Run to the last step, resuming from the newest checkpoint; export RUN/model.

        Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after saving a checkpoint.
        """
        choices = {name: value for name, value in _fields(self.recipe.ops).items() if value}
        with dispatch.forced(choices):
            self._resume()
            self.run.write_provenance(
                ops=dispatch.chosen(self.device),
                device=str(self.device),
                precision=_name(self.dtype),
                parameters=sum(p.numel() for p in self.model.parameters()),
                peak_flops={"value": self.peak, "source": self.peak_source},
            )
            return self._loop()

    def _resume(self) -> None:
        steps = self.checkpoints.steps()
        if not steps:
            self.checkpoints.prune(self.state)
            self.run.forget_after(-1)
            return
        self.state = self.checkpoints.load(steps[-1], self.model, self.optimizer)
        self.loader.load_state_dict(self.state.loader)
        self.guard.load_state_dict(self.state.guard)
        if self.cfg.precision == "auto" and self.state.precision != _name(self.dtype):
            self._compute_in(getattr(torch, self.state.precision))
        self.checkpoints.prune(self.state)
        self.run.forget_after(self.state.step)
        console.print(f"resuming {escape(str(self.run.path))} at step {self.state.step} of {self.total_steps}")

    def _loop(self) -> TrainResult:
        first_step, trained, started, skipped = self.state.step, 0, time.perf_counter(), 0
        loss, val_loss, seconds = float("nan"), None, 0.0
        columns = ("loss {task.fields[loss]}", "{task.fields[rate]}")
        with closing(self.loader), progress(*columns) as bar, self._interruptible():
            task = bar.add_task(self.run.stage, total=self.total_steps, completed=first_step, loss="-", rate="")
            while self.state.step < self.total_steps:
                step_start = time.perf_counter()
                record = self._step()
                trained += record["tokens"]
                skipped += "skipped" in record
                seconds = time.perf_counter() - started
                step_seconds = time.perf_counter() - step_start
                rate = record["tokens"] / step_seconds
                mfu = rate * record.pop("flops_per_token") / self.peak
                loss = record["loss"] if "skipped" not in record else loss
                if self.state.step % self.cfg.log_every == 0 or self.state.step == self.total_steps:
                    self.run.record(**record, tokens_per_s=round(rate, 1), mfu=round(mfu, 4))
                bar.update(
                    task, completed=self.state.step, loss=f"{loss:.3f}", rate=f"{rate:,.0f} tok/s, MFU {mfu:.0%}"
                )
                if self._validation_due():
                    val_loss = self._validate()
                if self._checkpoint_due():
                    self._save()
                if self._stop_signal:
                    self._save()
                    raise KeyboardInterrupt
        if val_loss is None and self.val_source is not None:  # nothing was left to train; the record is there already
            val_loss = self._validation_loss()
        export(self.model, self.tokenizer, self.run.path / "model", self.dtype)
        rate = trained / seconds if seconds else 0.0
        return TrainResult(
            steps=self.state.step,
            tokens=self.state.tokens,
            train_loss=loss,
            val_loss=val_loss,
            tokens_per_s=rate,
            mfu=rate * training_flops_per_token(self.model.config, self._mean_length()) / self.peak,
            skipped_steps=skipped,
        )

    def _mean_length(self) -> int:
        row = self.loader.source.row(0, 0)
        return max(1, row.num_tokens // len(row.seq_lens))

    # ---------------------------------------------------------------------------------------------------------- steps
    def _step(self) -> dict[str, Any]:
        first_row = self.loader.rows_consumed
        rows = next(self.loader)
        self.state.step += 1
        ratio = lr_ratio(self.state.step - 1, self.total_steps, self.recipe.schedule)
        self.optimizer.set_lr_ratio(ratio)
        self.optimizer.zero_grad()
        weight = float(sum(row.loss_weights.sum(dtype=np.float64) for row in rows))
        size = self.cfg.micro_batch_rows or len(rows)
        losses = [self._backward(part, weight) for part in self._micro_batches(rows, size)] if weight else []
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        grad_norm = float(clip_gradients(self.model, self.recipe.optim.grad_clip)) if losses else 0.0
        num_tokens = sum(row.num_tokens for row in rows)
        self.state.tokens += num_tokens
        mean_length = max(1, round(num_tokens / sum(len(row.seq_lens) for row in rows)))
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": self.recipe.optim.lr * ratio,
            "tokens": num_tokens,
            "flops_per_token": training_flops_per_token(self.model.config, mean_length),
        }
        if not losses:
            return record | {"skipped": "no token of the step has a loss weight"}
        if reason := self.guard.verdict(loss, grad_norm):
            self._set_aside(rows, first_row, reason)
            return record | {"skipped": reason}
        self.optimizer.step()
        return record

    def _backward(self, rows: Sequence[PackedRow], total_weight: float) -> Tensor:
        loss = self.loss_function(self.model, make_batch(rows, self.device)) / total_weight
        loss.backward()
        return loss.detach()

    def _micro_batches(self, rows: Sequence[PackedRow], size: int) -> Iterator[Sequence[PackedRow]]:
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _set_aside(self, rows: Sequence[PackedRow], first_row: int, reason: str) -> None:
        """Keep the batch of a bad step for inspection and stop the run when bad steps follow each other."""
        directory = self.run.path / "bad_batches"
        directory.mkdir(exist_ok=True)
        path = directory / f"step_{self.state.step:09d}.npz"
        arrays = {f"{name}_{i}": array for i, row in enumerate(rows) for name, array in _fields(row).items()}
        np.savez_compressed(path, **arrays)
        where = f"rows {first_row} to {first_row + len(rows) - 1} of the data order"
        log.warning("step %d skipped: %s; %s, kept in %s", self.state.step, reason, where, path)
        console.print(f"[yellow]step {self.state.step} skipped[/]: {escape(f'{reason} ({where}, kept in {path})')}")
        if self.guard.exhausted:
            raise ValueError(
                f"{self.guard.consecutive} steps in a row were skipped, the last because {reason} ({where}); the run "
                f"stopped at step {self.state.step}. Look at {directory}; to go on from the last checkpoint, run it "
                "again with resume=force and a lower optim.lr or another guard.grad_norm_factor"
            )

    # ------------------------------------------------------------------------------------------- validating and saving
    def _validation_due(self) -> bool:
        if self.val_source is None:
            return False
        every = self.cfg.eval_every
        return self.state.step == self.total_steps or (every > 0 and self.state.step % every == 0)

    def _validate(self) -> float:
        loss = self._validation_loss()
        self.run.record(step=self.state.step, val_loss=loss)
        if loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            if self.recipe.checkpoint.keep_best:
                self._save()
        return loss

    def _validation_loss(self) -> float:
        assert self.val_source is not None
        total, weight = 0.0, 0.0
        rows = [self.val_source.row(0, index) for index in range(min(self.cfg.eval_rows, self.val_source.num_rows))]
        with torch.no_grad():
            for part in self._micro_batches(rows, self.cfg.micro_batch_rows or self.cfg.batch_rows):
                total += float(self.loss_function(self.model, make_batch(part, self.device)))
                weight += float(sum(row.loss_weights.sum(dtype=np.float64) for row in part))
        return total / max(weight, 1e-9)

    def _checkpoint_due(self) -> bool:
        return self.state.step == self.total_steps or self.state.step % self.recipe.checkpoint.every_steps == 0

    def _save(self) -> None:
        self.state.loader = self.loader.state_dict()
        self.state.guard = self.guard.state_dict()
        self.state.precision = _name(self.dtype)
        self.checkpoints.save(self.model, self.tokenizer, self.optimizer, self.state)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step in flight and save; a second Ctrl-C stops at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            if self._stop_signal:
                raise KeyboardInterrupt
            self._stop_signal = True
            console.print("stopping after this step; the state is saved (Ctrl-C again stops at once, without saving)")

        try:
            previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are the owner's
            yield
            return
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def training_device(cfg: LoopConfig) -> torch.device:
    return pick_device(cfg.device)
