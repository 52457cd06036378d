"""From a recipe to its ranks: check the layout, start the processes, give each its place and its run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qwench.model.config import ModelConfig
from qwench.ops.hardware import pick_device
from qwench.parallel.launch import connected, job_size, local_device, place_in_environment, run_job
from qwench.parallel.layout import Layout, Team, check_model, plan_layout
from qwench.run import Resume, Run, console
from qwench.train.config import LoopConfig, OptimConfig, ParallelConfig

log = logging.getLogger("qwench.train")


class Recipe(Protocol):
    """The part of every training recipe that says where it runs."""

    @property
    def out(self) -> Path: ...
    @property
    def resume(self) -> Resume: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def gpus(self) -> int: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


R = TypeVar("R", bound=Recipe)
T = TypeVar("T")


def run_stage(stage: Callable[[R, Team], T], recipe: R, model_config: Callable[[R], ModelConfig]) -> T:
    """`stage(recipe, team)` on every rank of the recipe's layout; rank 0's result.

    Raises ValueError, before anything is started and any GPU is touched, for a layout that does not fit the model, the
    rows or this machine. `stage` is a function of a module, since other processes import it.
    """
    device = recipe.loop.device
    world = job_size(recipe.gpus, device != "cpu")
    if world > 1 and device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"loop.device={device} names one device, but there are {world} processes; leave it out")
    layout = plan_layout(world, **sizes_of(recipe.parallel))
    if layout.pipeline > 1:
        raise ValueError("parallel.pipeline larger than 1 is not supported yet; use the other axes")
    if layout.tensor > 1 and recipe.optim.kind == "muon":
        raise ValueError("optim.kind=muon needs whole matrices, which parallel.tensor cuts; use shard, or adamw")
    if world > 1:
        check_model(layout, model_config(recipe), seq_len=recipe.seq_len, batch_rows=recipe.loop.batch_rows)
    arguments = (stage, recipe, layout)
    return run_job(_rank, arguments, gpus=recipe.gpus, on_gpu=device != "cpu", logs=recipe.out / "logs")


def sizes_of(parallel: ParallelConfig) -> dict[str, int]:
    return {axis: getattr(parallel, axis) for axis in ("pipeline", "replicate", "shard", "context", "tensor")}


def _rank(stage: Callable[[Any, Team], T], recipe: Recipe, layout: Layout) -> T:
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
def open_run(recipe: Recipe, stage: str, team: Team) -> Iterator[Run | Follower]:
    """The run directory: rank 0 holds and writes it. Raises ValueError on rank 0 if it is another run's."""
    if team.is_main:
        with Run(recipe.out, recipe, stage, recipe.resume) as run:
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
