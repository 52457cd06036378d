"""From a recipe to its ranks: check the layout, start the processes, give each its place and its run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwench.model.checkpoint import open_checkpoint, read_config
from qwench.model.config import ModelConfig
from qwench.model.names import pieces
from qwench.ops.hardware import pick_device
from qwench.parallel.launch import attempt, connected, job_size, local_device, place_in_environment, run_job
from qwench.parallel.layout import Layout, Team, check_model, plan_layout
from qwench.parallel.restart import Restarts, living_gpus
from qwench.parallel.schedule import bubble_share, check_schedule
from qwench.parallel.stages import deal_layers
from qwench.run import Resume, Run, console, refuse_other_run
from qwench.train.checkpoint import Checkpoints
from qwench.train.config import ParallelConfig
from qwench.train.layouts import settle, smallest_gpu
from qwench.train.recipe import TrainingRecipe

log = logging.getLogger("qwench.train")


R = TypeVar("R", bound=TrainingRecipe)
T = TypeVar("T")


def run_stage(
    stage: Callable[[R, Team], T],
    recipe: R,
    model_config: Callable[[R], ModelConfig],
    *,
    check_data: Callable[[R], None] = lambda recipe: None,
) -> T:
    """`stage(recipe, team)` on every rank of the recipe's layout; rank 0's result.

    Raises ValueError, before anything is started and any GPU is touched, for a layout that does not fit the model, the
    rows or this machine, for a run directory of another recipe or model, and where `check_data` does. `stage` is a
    function of a module, since other processes import it.
    """
    device = recipe.loop.device
    world = job_size(recipe.gpus, device != "cpu")
    if world > 1 and device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"loop.device={device} names one device, but there are {world} processes; leave it out")
    arguments = _arguments(stage, recipe, model_config, world)
    check_checkpoints(recipe, model_config(recipe))
    check_data(recipe)
    return run_job(
        _rank,
        arguments,
        gpus=recipe.gpus,
        on_gpu=device != "cpu",
        logs=recipe.out / "logs",
        restarts=_restarts(stage, recipe, model_config),
    )


def _arguments(
    stage: Callable[[R, Team], T], recipe: R, model_config: Callable[[R], ModelConfig], world: int
) -> tuple[Callable[[R, Team], T], R, Layout]:
    """What `_rank` gets in a job of `world` processes. Raises ValueError if the recipe does not fit so many."""
    if recipe.parallel.auto:
        recipe = settle(recipe, model_config(recipe), world, None if recipe.loop.device == "cpu" else smallest_gpu())
    layout = plan_layout(world, **sizes_of(recipe.parallel))
    if layout.tensor > 1 and recipe.optim.kind == "muon":
        raise ValueError("optim.kind=muon needs whole matrices, which parallel.tensor cuts; use shard, or adamw")
    if world > 1:
        check_model(layout, model_config(recipe), seq_len=recipe.seq_len, batch_rows=recipe.loop.batch_rows)
    if (warmup := recipe.loop.batch_warmup) is not None and warmup.start_rows % layout.data:
        raise ValueError(
            f"loop.batch_warmup.start_rows is {warmup.start_rows}, which does not divide over {layout.data} "
            f"data-parallel ranks; give a multiple of {layout.data}"
        )
    check_pipeline(recipe, layout, model_config)
    return stage, recipe, layout


def _restarts(stage: Callable[[R, Team], T], recipe: R, model_config: Callable[[R], ModelConfig]) -> Restarts:
    """How a job goes on after it has lost a process: from its newest checkpoint, in a layout for what is left."""
    limit = recipe.guard.max_restarts
    checkpoints = Checkpoints(recipe.out / "checkpoints", 1, False)

    def arguments_for(world: int) -> tuple[Any, ...] | None:
        try:
            return _arguments(stage, recipe, model_config, world)
        except ValueError:
            return None

    return Restarts(
        limit=limit if limit is not None else (3 if recipe.gpus > 1 else 0),
        progress=lambda: max(checkpoints.steps(), default=-1),
        arguments_for=arguments_for,
        living=living_gpus if recipe.loop.device != "cpu" and torch.cuda.device_count() else None,
    )


def check_checkpoints(recipe: TrainingRecipe, config: ModelConfig) -> None:
    """Raise ValueError for a checkpoint to start from whose weights are not those of its config, and for a run
    directory that this recipe does not continue. Headers are read, no weights."""
    if recipe.model.path is not None:
        open_checkpoint(recipe.model.path).checked_table()
    refuse_other_run(recipe.out, recipe, _resume(recipe))
    checkpoints = Checkpoints(recipe.out / "checkpoints", 1, False)
    for step in checkpoints.steps()[-1:]:
        directory = checkpoints.path(step) / "model"
        try:
            stored = pieces(read_config(directory), "hf")
        except (ValueError, OSError):  # damaged; loading goes back to the one before and says so
            return
        if stored != pieces(config, "hf"):
            raise ValueError(
                f"{directory} is a checkpoint of another model; give another out=..., or that model's shape"
            )


def _resume(recipe: TrainingRecipe) -> Resume:
    """What a restarted job finds in its directory is its own."""
    return "auto" if recipe.resume == "never" and attempt() else recipe.resume


def check_pipeline(recipe: R, layout: Layout, model_config: Callable[[R], ModelConfig]) -> None:
    """Raise ValueError for a pipeline that is not possible, warn about one that mostly waits."""
    loop, num_ranks, virtual = recipe.loop, layout.pipeline, recipe.parallel.virtual_stages
    first = loop.batch_warmup.start_rows if loop.batch_warmup is not None else loop.batch_rows
    number = 0
    for batch_rows in range(first, loop.batch_rows + 1, first):
        num_rows = max(1, batch_rows // layout.data)
        number = -(-num_rows // (loop.micro_batch_rows or num_rows))
        check_schedule(num_ranks, virtual, number)
    if num_ranks == 1:
        return
    deal_layers(model_config(recipe), num_ranks * virtual)
    if number < num_ranks and place_in_environment().rank == 0:
        parts = f"{number} micro-batch" + "es" * (number > 1)
        console.print(
            f"[yellow]warning[/]: {parts} a step for a pipeline of {num_ranks} ranks: a rank waits "
            f"{bubble_share(num_ranks, virtual, number):.0%} as long as it computes; choose a smaller "
            "loop.micro_batch_rows or more loop.batch_rows"
        )


def sizes_of(parallel: ParallelConfig) -> dict[str, int]:
    return {axis: getattr(parallel, axis) for axis in ("pipeline", "replicate", "shard", "context", "tensor")}


def _rank(stage: Callable[[Any, Team], T], recipe: TrainingRecipe, layout: Layout) -> T:
    place = place_in_environment()
    if place.world == 1:
        return stage(recipe, Team.alone(pick_device(recipe.loop.device)))
    console.quiet = place.rank > 0
    device = local_device(recipe.loop.device, place)
    with connected(device):
        return stage(recipe, Team.join(layout, device))


class Follower:
    """What ranks other than 0 have for a run directory: they know where it is and write nothing but their log."""

    def __init__(self, path: Path, stage: str, rank: int) -> None:
        self.path, self.stage = path, stage
        (path / "logs").mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(path / "logs" / f"rank_{rank}.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("qwench").addHandler(self._handler)
        logging.getLogger("qwench").setLevel(logging.INFO)

    def record(self, **values: Any) -> None:
        """Rank 0 records the same."""

    def forget_after(self, step: int) -> None:
        """Rank 0 does."""

    def write_provenance(self, **extra: Any) -> None:
        """Rank 0 does."""

    def close(self) -> None:
        logging.getLogger("qwench").removeHandler(self._handler)
        self._handler.close()


@contextmanager
def open_run(recipe: TrainingRecipe, stage: str, team: Team) -> Iterator[Run | Follower]:
    """The run directory: rank 0 holds and writes it. Raises ValueError on rank 0 if it is another run's."""
    if team.is_main:
        with Run(recipe.out, recipe, stage, _resume(recipe)) as run:
            team.barrier()
            yield run
        return
    team.barrier()
    follower = Follower(recipe.out, stage, team.rank)
    try:
        yield follower
    except Exception:
        log.exception("rank %d stopped", team.rank)
        raise
    finally:
        follower.close()
