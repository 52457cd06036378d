"""THE training loop: next batch, loss function, step, validate, save. Stages give it a model, data and a loss.

Every step's rows are split over data-parallel ranks and micro-batches, and all losses are divided by the step's total
loss weight, so that the gradient does not depend on how the rows were split. Host work (rows for the next step) runs in
the loader's thread.

With several ranks, everything that decides what happens next - weight, loss, gradient norm, "stop" - is a sum that all
of them get, so they decide alike; rank 0 alone records. One process does the same without any exchange.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from qwench.ops.hardware import peak_flops, pick_dtype
from qwench.parallel.blocks import whole_shapes
from qwench.parallel.data import no_gradients, reduce_gradients_now
from qwench.parallel.layout import Team
from qwench.run import Run, console, progress
from qwench.tokenizer import Tokenizer
from qwench.train.batch import Batch, make_batch, padding_row
from qwench.train.checkpoint import Checkpoints, TrainState, export
from qwench.train.config import (
    CheckpointConfig,
    GuardConfig,
    LoopConfig,
    OpsConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    StartConfig,
)
from qwench.train.guard import Guard
from qwench.train.job import Follower
from qwench.train.loss import next_token_loss
from qwench.train.optim import build_optimizer, clip_gradients, scale_gradients, squared_gradient_norm
from qwench.train.schedule import lr_ratio
from qwench.train.start import build_sharded
from qwench.train.verify import verify_export

log = logging.getLogger("qwench.train")

LossFunction = Callable[[CausalLM, Batch], Tensor]
"""(model, batch) -> sum of weighted losses; the loop divides by the total weight of the step.

Ranks that divide the tokens of a batch (context) each return the sum of their own, ranks that divide matrices (tensor)
the same sum."""


class Recipe(Protocol):
    """The part of every training recipe that the loop reads."""

    @property
    def out(self) -> Path: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
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


def prepare_model(recipe: Recipe, start: StartConfig, tokenizer: Tokenizer, team: Team) -> tuple[torch.dtype, CausalLM]:
    """The dtype of a run's activations, and this rank's share of its model."""
    dtype = run_precision(recipe.loop, team, recipe.out)
    reshard = recipe.parallel.reshard_after_forward
    model = build_sharded(start, tokenizer, team, recipe.loop.seed, dtype, reshard_after_forward=reshard)
    return dtype, model


def run_precision(cfg: LoopConfig, team: Team, run: Path) -> torch.dtype:
    """Dtype of the activations: what the recipe says, or what a run on "auto" has begun with, or what is best here."""
    dtype = pick_dtype(cfg.precision, team.device) if team.is_main else None
    checkpoints = Checkpoints(run / "checkpoints", 1, False)
    if team.is_main and cfg.precision == "auto" and (steps := checkpoints.steps()):
        dtype = getattr(torch, checkpoints.read_state(steps[-1]).precision)
    dtype = team.agree(dtype)
    assert dtype is not None
    return dtype


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        run: Run | Follower,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        source: RowSource,
        val_source: RowSource | None = None,
        loss_function: LossFunction = next_token_loss,
        *,
        team: Team | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises ValueError when batch_rows does not divide over the data-parallel ranks.

        `dtype` is that of the activations, as `run_precision` gives it; None asks it.
        """
        self.recipe, self.run, self.model, self.tokenizer = recipe, run, model, tokenizer
        self.cfg, self.loss_function, self.val_source = recipe.loop, loss_function, val_source
        self.device = model.model.embed_tokens.weight.device
        self.team = team or Team.alone(self.device)
        self.dtype = dtype or run_precision(self.cfg, self.team, run.path)
        self.model.set_compute_dtype(self.dtype)
        self.peak, self.peak_source = peak_flops(self.device, self.dtype) if self.team.is_main else (math.inf, "")
        self.peak *= self.team.layout.world
        self.loader = RowLoader(source, self.cfg.batch_rows, self.cfg.seed, self.team.data_rank, self.team.layout.data)
        steps_per_epoch = source.num_rows / self.cfg.batch_rows
        self.total_steps = self.cfg.steps or max(1, round((self.cfg.epochs or 0) * steps_per_epoch))
        self.optimizer = build_optimizer(model, recipe.optim)
        self.guard = Guard(recipe.guard)
        background = {"auto": self.device.type == "cuda", "on": True, "off": False}[recipe.checkpoint.background]
        self.checkpoints = Checkpoints(
            run.path / "checkpoints",
            recipe.checkpoint.keep_last,
            recipe.checkpoint.keep_best,
            self.team,
            background=background,
        )
        self.state = TrainState()
        self._stop_signal: int | None = None
        self._stop = False

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
                parameters=sum(math.prod(shape) for shape in whole_shapes(self.model).values()),
                peak_flops={"value": self.peak, "source": self.peak_source},
                layout=dataclasses.asdict(self.team.layout),
            )
            return self._loop()

    def _resume(self) -> None:
        steps = self.team.agree(self.checkpoints.steps())
        if steps:
            self.state = self.checkpoints.load(steps[-1], self.model, self.optimizer)
            self.loader.load_state_dict(self.state.loader)
            self.guard.load_state_dict(self.state.guard)
        self.team.barrier()  # nobody reads any more
        if self.team.is_main:
            self.checkpoints.prune(self.state.best_step)
        self.run.forget_after(self.state.step if steps else -1)
        if not steps:
            return
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
                if self._stop or (self.team.is_alone and self._stop_signal is not None):
                    self._save()
                    self.checkpoints.wait()
                    raise KeyboardInterrupt
            self.checkpoints.wait()
        if val_loss is None and self.val_source is not None:  # nothing was left to train; the record is there already
            val_loss = self._validation_loss()
        export(self.model, self.tokenizer, self.run.path / "model", self.dtype, self.team)
        verify_export(self.model, self.run.path / "model", self.dtype, self.team)
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
        weight, num_tokens, num_seqs = self._count(rows)
        parts = list(self._micro_batches(rows, self.cfg.micro_batch_rows or len(rows))) if weight else []
        losses = [self._backward(part, weight, part is parts[-1]) for part in parts]
        loss, grad_norm = self._loss_and_norm(losses)
        self.state.tokens += int(num_tokens)
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": self.recipe.optim.lr * ratio,
            "tokens": int(num_tokens),
            "flops_per_token": training_flops_per_token(self.model.config, max(1, round(num_tokens / num_seqs))),
        }
        if not losses:
            return record | {"skipped": "no token of the step has a loss weight"}
        if reason := self.guard.verdict(loss, grad_norm):
            self._set_aside(first_row, reason)
            return record | {"skipped": reason}
        self.optimizer.step()
        return record

    def _count(self, rows: Sequence[PackedRow]) -> list[float]:
        """Loss weight, tokens and sequences of the step on all ranks."""
        weight = float(sum(row.loss_weights.sum(dtype=np.float64) for row in rows))
        mine = [weight, sum(row.num_tokens for row in rows), sum(len(row.seq_lens) for row in rows)]
        return self.team.total(mine if self.team.leads_data else [0.0, 0.0, 0.0])

    def _backward(self, rows: Sequence[PackedRow], total_weight: float, last: bool) -> Tensor:
        reduce_gradients_now(self.model, last, keep_whole=self.recipe.parallel.accumulate == "whole")
        loss = self.loss_function(self.model, make_batch(rows, self.device, self.team)) / total_weight
        loss.backward()
        return loss.detach()

    def _loss_and_norm(self, losses: Sequence[Tensor]) -> tuple[float, float]:
        """Loss and gradient norm of the step, the same on all ranks; the gradients are clipped afterwards."""
        limit = self.recipe.optim.grad_clip
        if self.team.is_alone:
            loss = float(torch.stack(list(losses)).sum()) if losses else 0.0
            return loss, float(clip_gradients(self.model, limit)) if losses else 0.0
        # One exchange, and one wait for the device, for all that the ranks must agree on.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if losses and self.team.layout.tensor > 1:
            from qwench.parallel.axes import sum_gradients

            sum_gradients(self.model, tensor=self.team.group("tensor"))
        if losses:
            sums[0] = squared_gradient_norm(self.model, self.team)
        if losses and self.team.counts_tokens:
            sums[1] = torch.stack(list(losses)).sum()
        sums[2] = self._stop_signal is not None
        squares, loss, stops = self.team.total_on_device(sums).tolist()
        self._stop = stops > 0
        grad_norm = math.sqrt(squares) if squares >= 0 else math.nan
        if 0 < limit < grad_norm:
            scale_gradients(self.model, limit / (grad_norm + 1e-6))
        return loss, grad_norm

    def _micro_batches(self, rows: Sequence[PackedRow], size: int) -> Iterator[Sequence[PackedRow]]:
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _rows_of_all_ranks(self, first_row: int) -> list[PackedRow]:
        source = self.loader.source
        loader = RowLoader(source, self.cfg.batch_rows, self.cfg.seed, prefetch=0)
        epoch, position = divmod(first_row, source.num_rows)
        loader.load_state_dict(self.loader.state_dict() | {"epoch": epoch, "position": position})
        return next(loader)

    def _set_aside(self, first_row: int, reason: str) -> None:
        """Keep the batch of a bad step for inspection and stop the run when bad steps follow each other."""
        directory = self.run.path / "bad_batches"
        path = directory / f"step_{self.state.step:09d}.npz"
        if self.team.is_main:
            directory.mkdir(exist_ok=True)
            rows = self._rows_of_all_ranks(first_row)
            arrays = {f"{name}_{i}": array for i, row in enumerate(rows) for name, array in _fields(row).items()}
            np.savez_compressed(path, **arrays)
        where = f"rows {first_row} to {self.loader.rows_consumed - 1} of the data order"
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
        parts, part = self.team.layout.data, self.team.data_rank
        number = min(self.cfg.eval_rows, self.val_source.num_rows)
        rows = [self.val_source.row(0, index) for index in range(part, number, parts)]
        # Every rank makes the same number of passes, since a pass gathers weights.
        rows += [padding_row(1)] * (-(-number // parts) - len(rows))
        with no_gradients(self.model):
            for micro in self._micro_batches(rows, self.cfg.micro_batch_rows or self.cfg.batch_rows // parts):
                total += float(self.loss_function(self.model, make_batch(micro, self.device, self.team)))
                weight += float(sum(row.loss_weights.sum(dtype=np.float64) for row in micro))
        team = self.team
        total, weight = team.total([total if team.counts_tokens else 0.0, weight if team.leads_data else 0.0])
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
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number
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
