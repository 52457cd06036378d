"""THE training loop: next batch, loss function, step, validate, save. Stages give it a model, data and a loss.

Every step's rows are split over data-parallel ranks and micro-batches, and all loss weights are divided by the step's
total, so that the gradient does not depend on how the rows were split.

A GPU is waited for once a step, for loss and gradient norm. Whether the step is taken it decides itself
(`guard.decide`): the optimiser is launched behind the gradients, the next step's first batch is sent, and what the host
does between the wait and the next launch is hidden behind the optimiser. Rows come from the loader's thread.

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
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from qwench.data.loader import RowLoader
from qwench.data.packing import PackedRow, RowSource
from qwench.model.decoder import CausalLM
from qwench.model.flops import training_flops_per_token
from qwench.ops import dispatch
from qwench.ops.hardware import Download
from qwench.parallel.blocks import whole_shapes
from qwench.parallel.data import Exchanges, WholeModel, no_gradients
from qwench.parallel.layout import Team
from qwench.parallel.pipeline import Pipeline
from qwench.parallel.stages import StagedLM
from qwench.run import Run, console, progress
from qwench.tokenizer import Tokenizer
from qwench.train.batch import Batch, padding_row
from qwench.train.checkpoint import Checkpoints, TrainState, export
from qwench.train.checkup import Checkup
from qwench.train.compile import IN_BLOCKS, uncompiled
from qwench.train.guard import Guard, StepDecision, decide
from qwench.train.job import Follower
from qwench.train.loss import next_token_losses
from qwench.train.observe import Observers
from qwench.train.optim import build_optimizer, squared_gradient_norm
from qwench.train.prepare import Prepared, forced_operations
from qwench.train.recipe import TrainingRecipe
from qwench.train.schedule import batch_growth, lr_ratio, num_steps
from qwench.train.verify import verify_export
from qwench.train.work import Work, WorkMaker

log = logging.getLogger("qwench.train")

LossFunction = Callable[[CausalLM, Batch, float], tuple[Tensor, Tensor]]
"""(model, batch, z_loss) -> (sum of weighted losses, losses of the tokens before weight and z-loss), as
`next_token_losses` gives them; the weights of a training batch are divided by the total weight of the step.

Ranks that divide the tokens of a batch (context) each return the sum of their own, ranks that divide matrices (tensor)
the same sum."""


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
        recipe: TrainingRecipe,
        run: Run | Follower,
        prepared: Prepared,
        tokenizer: Tokenizer | None,
        source: RowSource,
        val_source: RowSource | None = None,
        loss_function: LossFunction = next_token_losses,
        *,
        team: Team | None = None,
    ) -> None:
        """Raises ValueError when batch_rows does not divide over the data-parallel ranks."""
        self.recipe, self.run, self.prepared, self.tokenizer = recipe, run, prepared, tokenizer
        self.model, self.dtype = prepared.model, prepared.dtype
        self.cfg, self.loss_function, self.val_source = recipe.loop, loss_function, val_source
        self.team = team or Team.alone(next(self.model.parameters()).device)
        self.device = self.team.device
        self.growth = batch_growth(self.cfg, recipe.seq_len)
        parts = self.team.layout.data
        self.loader = RowLoader(
            source, self.cfg.batch_rows, self.cfg.seed, self.team.data_rank, parts, rows_at=self.growth
        )
        self.total_steps = num_steps(self.cfg, source.num_rows, recipe.seq_len)
        rows = (self.growth(0) if self.growth else self.cfg.batch_rows) // parts
        micro_rows = min(self.cfg.micro_batch_rows or rows, rows)
        self.work_maker = WorkMaker(self.loader, prepared, self.team, micro_rows)
        self.optimizer = build_optimizer(self.model, recipe.optim)
        fsdp = Exchanges(
            keep_whole=recipe.parallel.accumulate == "whole", reshard_after_forward=prepared.reshard_after_forward
        )
        self.passes: WholeModel | Pipeline = WholeModel(self.model, fsdp)
        if isinstance(self.model, StagedLM):
            self.passes = Pipeline(self.model, self.team, fsdp)
        self.guard = Guard(recipe.guard)
        self.checkup = Checkup(recipe.mini, self.team, tokenizer) if recipe.mini.every else None
        background = {"auto": self.device.type == "cuda", "on": True, "off": False}[recipe.checkpoint.background]
        self.checkpoints = Checkpoints(
            run.path / "checkpoints",
            recipe.checkpoint.keep_last,
            recipe.checkpoint.keep_best,
            self.team,
            background=background,
            verify=recipe.checkpoint.verify,
        )
        self.observers = Observers(recipe, run, self.team, self.device, self.dtype, self.model.config, self.total_steps)
        self.state = TrainState()
        self._next: Work | None = None
        self._stop_signal: int | None = None
        self._stop = False

    # ------------------------------------------------------------------------------------------------------- running
    def train(self) -> TrainResult:
        """Run to the last step, resuming from the newest checkpoint; export RUN/model.

        Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after saving a checkpoint.
        """
        with dispatch.forced(forced_operations(self.recipe.ops)), self.observers:
            compiled = self.prepared.compiled
            self.observers.mark(0, "loading", is_long=True)
            self._resume()
            self.run.write_provenance(
                ops=dispatch.chosen(self.device) | (dict.fromkeys(IN_BLOCKS, "compiled") if compiled else {}),
                device=str(self.device),
                precision=_name(self.dtype),
                compiled=compiled,
                remat=self.prepared.remat,
                fp8=self.prepared.fp8,
                parameters=sum(math.prod(shape) for shape in whole_shapes(self.model).values()),
                layout=dataclasses.asdict(self.team.layout),
                **self.observers.provenance(),
            )
            return self._loop()

    def _resume(self) -> None:
        step = self.checkpoints.newest_whole(self.observers.alive)
        if step is not None:
            self.state = self.checkpoints.load(step, self.model, self.optimizer)
            self.loader.load_state_dict(self.state.loader)
            self.guard.load_state_dict(self.state.guard)
            self.prepared.refresh()
        self.team.barrier()  # nobody reads any more
        if self.team.is_main:
            self.checkpoints.prune(self.state.best_step)
        self.run.forget_after(-1 if step is None else step)
        if step is None:
            return
        console.print(f"resuming {escape(str(self.run.path))} at step {self.state.step} of {self.total_steps}")

    def _loop(self) -> TrainResult:
        first_step, trained, started, skipped = self.state.step, 0, time.perf_counter(), 0
        loss, val_loss, seconds = float("nan"), None, 0.0
        columns = ("loss {task.fields[loss]}", "{task.fields[rate]}")
        with closing(self.loader), progress(*columns) as bar, self._interruptible():
            task = bar.add_task(self.run.stage, total=self.total_steps, completed=first_step, loss="-", rate="")
            if not first_step:
                self._check_up()
            while self.state.step < self.total_steps:
                self.observers.begin_step(self.state.step + 1)
                step_start = time.perf_counter()
                record = self._step()
                trained += record["tokens"]
                skipped += "skipped" in record
                seconds = time.perf_counter() - started
                step_seconds = time.perf_counter() - step_start
                rate = record["tokens"] / step_seconds
                flops_per_token = record.pop("flops_per_token")
                self.observers.end_step(self.state.step, record["tokens"], flops_per_token)
                loss = record["loss"] if "skipped" not in record else loss
                if self.state.step % self.cfg.log_every == 0 or self.state.step == self.total_steps:
                    measures = self.observers.measures(rate * flops_per_token)
                    self.run.record(**record, tokens_per_s=round(rate, 1), **measures)
                mfu = rate * flops_per_token / self.observers.peak_flops
                bar.update(
                    task, completed=self.state.step, loss=f"{loss:.3f}", rate=f"{rate:,.0f} tok/s, MFU {mfu:.0%}"
                )
                if self._validation_due():
                    val_loss = self._validate()
                self._check_up()
                if self._checkpoint_due():
                    self._save()
                if self._stop or (self.team.is_alone and self._stop_signal is not None):
                    self._save()
                    self.checkpoints.wait()
                    raise KeyboardInterrupt
            self.observers.mark(self.state.step, "waiting for the last checkpoint", is_long=True)
            self.checkpoints.wait()
        if val_loss is None and self.val_source is not None:  # nothing was left to train; the record is there already
            val_loss = self._validation_loss()
        self.observers.mark(self.state.step, "exporting the model", is_long=True)
        export(self.model, self.tokenizer, self.run.path / "model", self.dtype, self.team)
        self.observers.mark(self.state.step, "reading the exported model back", is_long=True)
        with uncompiled() if self.prepared.compiled else nullcontext():
            verify_export(self.model, self.run.path / "model", self.dtype, self.team)
        rate = trained / seconds if seconds else 0.0
        return TrainResult(
            steps=self.state.step,
            tokens=self.state.tokens,
            train_loss=loss,
            val_loss=val_loss,
            tokens_per_s=rate,
            mfu=rate * training_flops_per_token(self.model.config, self._mean_length()) / self.observers.peak_flops,
            skipped_steps=skipped,
        )

    def _mean_length(self) -> int:
        row = self.loader.source.row(0, 0)
        return max(1, row.num_tokens // len(row.seq_lens))

    # ---------------------------------------------------------------------------------------------------------- steps
    def _step(self) -> dict[str, Any]:
        first_row = self.loader.rows_consumed
        work, self._next = self._next or self.work_maker.next_work(), None
        rows = next(self.loader)
        assert rows is work.rows
        self.state.step += 1
        ratio = lr_ratio(self.state.step - 1, self.total_steps, self.recipe.schedule)
        self.optimizer.set_lr_ratio(ratio)
        self.optimizer.zero_grad()
        sums = self._sums(self._gradients(work), bool(work.micro_batches))
        numbers = Download(sums)
        decision = decide(
            sums[2] + sums[3] if self.cfg.z_loss else sums[2], sums[1], self.guard.largest_norm,
            self.recipe.optim.grad_clip,
        )  # fmt: skip
        launched = bool(work.micro_batches) and self.optimizer.decides_on_device
        if launched:
            self._update_weights(decision)
        if self.state.step < self.total_steps:
            self._next = self.work_maker.next_work()
        stops, squares, loss, *further = numbers.tensor().tolist()  # waits for the device, not for the optimiser
        self._stop = stops > 0
        grad_norm = math.sqrt(squares) if squares >= 0 else math.nan
        self.state.tokens += work.num_tokens
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": self.recipe.optim.lr * ratio,
            "tokens": work.num_tokens,
            "flops_per_token": training_flops_per_token(
                self.model.config, max(1, round(work.num_tokens / work.num_seqs))
            ),
        }
        if self.cfg.z_loss:
            record["z_loss"] = further.pop(0)
        if names := self.loader.source.source_names:
            by_source = zip(names, further, work.source_weights, strict=True)
            record["loss_by_source"] = {
                name: sum_of / weight * work.weight for name, sum_of, weight in by_source if weight
            }
        if not work.micro_batches:
            return record | {"skipped": "no token of the step has a loss weight"}
        if reason := self.guard.verdict(loss + record.get("z_loss", 0.0), grad_norm):
            if launched:
                self.optimizer.uncount()
            self._set_aside(first_row, reason)
            return record | {"skipped": reason}
        if not launched:
            self._update_weights(decision)
        return record

    def _update_weights(self, decision: StepDecision) -> None:
        self.optimizer.step(decision)
        self.prepared.refresh()

    def _gradients(self, work: Work) -> list[Tensor]:
        """Leaves the step's gradients behind. The shares of each micro-batch, on the last stage of a pipeline alone."""
        shares: list[Tensor] = []

        def batch_at(number: int) -> Batch:
            self.observers.alive()
            first = work.first_batch if number == 0 else None
            return first or self.work_maker.batch(work.micro_batches, number, work.weight)

        def loss_of(batch: Batch) -> Tensor:
            loss, losses_T = self.loss_function(self.model, batch, self.cfg.z_loss)
            shares.append(self._shares(work, batch, loss.detach(), losses_T))
            return loss

        if work.micro_batches:
            self.passes.train(len(work.micro_batches), batch_at, loss_of)
        return shares

    def _shares(self, work: Work, batch: Batch, total: Tensor, losses_T: Tensor) -> Tensor:
        """A micro-batch's shares of the step's loss, z-loss (if there is one) and sources' losses."""
        weighted_T = losses_T * batch.loss_weights_T if self.cfg.z_loss or batch.sources_T is not None else None
        if weighted_T is None:
            return total[None]
        loss = weighted_T.sum() if self.cfg.z_loss else total
        shares = torch.stack((loss, total - loss) if self.cfg.z_loss else (loss,))
        if batch.sources_T is None:
            return shares
        sources_S1 = torch.arange(len(work.source_weights), device=self.device)[:, None]
        return torch.cat((shares, torch.where(batch.sources_T == sources_S1, weighted_T, 0.0).sum(1)))

    def _sums(self, shares: Sequence[Tensor], gradients: bool) -> Tensor:
        """fp64 on the device, over all ranks: those who want to stop, squared gradient norm, then the micro-batches'
        shares: all that the ranks must agree on in one exchange."""
        num_shares = 1 + (self.cfg.z_loss > 0) + len(self.loader.source.source_names)
        sums = torch.zeros(2 + num_shares, dtype=torch.float64, device=self.device)
        if gradients and self.team.layout.tensor > 1:
            from qwench.parallel.axes import sum_gradients

            sum_gradients(self.model, tensor=self.team.group("tensor"))
        sums[0].fill_(self._stop_signal is not None)  # assigned, a number would make the host wait for the device
        if gradients:
            sums[1] = squared_gradient_norm(self.model, self.team)
        if shares and self.team.counts_tokens:
            sums[2:] = torch.stack(list(shares)).sum(0, dtype=torch.float64)
        return self.team.total_on_device(sums)

    def _rows_of_all_ranks(self, first_row: int) -> list[PackedRow]:
        source = self.loader.source
        loader = RowLoader(source, self.cfg.batch_rows, self.cfg.seed, prefetch=0, rows_at=self.growth)
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
            arrays = {
                f"{name}_{i}": array
                for i, row in enumerate(rows)
                for name, array in _fields(row).items()
                if array is not None
            }
            np.savez_compressed(path, **arrays)
        where = f"rows {first_row} to {self.loader.rows_consumed - 1} of the data order"
        log.warning("step %d skipped: %s; %s, kept in %s", self.state.step, reason, where, path)
        console.print(f"[yellow]step {self.state.step} skipped[/]: {escape(f'{reason} ({where}, kept in {path})')}")
        if self.guard.exhausted:
            self.checkpoints.wait()  # a rank that ends with an error does not wait for its threads
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
        losses: list[Tensor] = []
        parts, part = self.team.layout.data, self.team.data_rank
        number = min(self.cfg.eval_rows, self.val_source.num_rows)
        rows = [self.val_source.row(0, index) for index in range(part, number, parts)]
        # Every rank makes the same number of passes, since a pass gathers weights.
        rows += [padding_row(1)] * (-(-number // parts) - len(rows))
        micro_batches = self.work_maker.micro_batches(rows)

        def batch_at(number: int) -> Batch:
            self.observers.mark(self.state.step, "validation", is_long=number == 0)  # the first may compile
            return self.work_maker.batch(micro_batches, number)

        def loss_of(batch: Batch) -> Tensor:
            losses.append(self.loss_function(self.model, batch, 0.0)[0])
            return losses[-1]

        with no_gradients(self.model):
            self.passes.validate(len(micro_batches), batch_at, loss_of)
        weight = float(sum(row.loss_weights.sum(dtype=np.float64) for row in rows))
        team, total = self.team, float(torch.stack(losses).sum(dtype=torch.float64)) if losses else 0.0
        total, weight = team.total([total if team.counts_tokens else 0.0, weight if team.leads_data else 0.0])
        return total / max(weight, 1e-9)

    def _check_up(self) -> None:
        """The mini-suite, where it is due."""
        if self.checkup is None or not self.checkup.is_due(self.state.step, self.total_steps):
            return
        self.observers.mark(self.state.step, "the mini-suite", is_long=True)
        if scores := self.checkup.scores(self.model, is_first=not self.state.step):
            self.run.record(step=self.state.step, mini=scores)

    def _checkpoint_due(self) -> bool:
        return self.state.step == self.total_steps or self.state.step % self.recipe.checkpoint.every_steps == 0

    def _save(self) -> None:
        self.observers.mark(self.state.step, "saving a checkpoint", is_long=True)
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
