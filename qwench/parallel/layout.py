"""How the processes of a training job are arranged: the sizes of the axes, and the groups that a rank belongs to.

    layout = plan_layout(world=8, replicate=2, shard=-1, tensor=2)     # shard becomes 2
    check_model(layout, model.config, seq_len=4096, batch_rows=64)     # ValueError for what does not divide
    team = Team.join(layout, device)                                 # after `launch.connect`

Ranks count through the axes in the order pipeline, replicate, shard, context, tensor, the last one fastest, so that a
tensor group lies within one host. `replicate` and `shard` are data parallel: each of their ranks takes its own rows.
One process has a `Team` too, whose groups are None and whose sums are the identity; nothing of torch.distributed is
initialised for it. Applying an axis to a model is not done here (`data.py`, `axes.py`), nor starting processes
(`launch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwench.model.config import ModelConfig
from qwench.parallel import plan

T = TypeVar("T")

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The size of every axis, each at least 1."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world(self) -> int:
        return math.prod(self.sizes)

    @property
    def data(self) -> int:
        """Parts into which the rows of a step are divided."""
        return self.replicate * self.shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        assert 0 <= rank < self.world
        places: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return places

    def __str__(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one process"


def plan_layout(
    world: int, *, pipeline: int = 1, replicate: int = 1, shard: int = -1, context: int = 1, tensor: int = 1
) -> Layout:
    """The layout of `world` processes; shard = -1 takes what the other axes leave.

    Raises ValueError, with sizes that work, when the product of the sizes is not the number of processes.
    """
    sizes = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "context": context, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1 and not (axis == "shard" and size == -1):
            extra = ", or -1 for all processes that are left" if axis == "shard" else ""
            raise ValueError(f"parallel.{axis} is {size}; give a positive number{extra}")
    others = math.prod(size for axis, size in sizes.items() if axis != "shard")
    named = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "shard" and size > 1)
    if shard == -1:
        if world % others:
            raise ValueError(
                f"parallel: {named} makes groups of {others} processes, and {world} processes do not divide into "
                f"such groups; start a multiple of {others} processes, or choose smaller axes"
            )
        sizes["shard"] = world // others
    elif others * shard != world:
        raise ValueError(
            f"parallel: {', '.join(part for part in (named, f'shard {shard}') if part)} needs {others * shard} "
            f"processes, but there {'is' if world == 1 else 'are'} {world}; start gpus={others * shard}, or set "
            "parallel.shard=-1 to use all processes that are left"
        )
    return Layout(**sizes)


def axes_in_use(layout: Layout) -> list[str]:
    """Axes larger than 1 that change what a rank computes of a row; replicas and shards do not."""
    return [axis for axis in ("pipeline", "context", "tensor") if getattr(layout, axis) > 1]


def check_model(layout: Layout, config: ModelConfig, *, seq_len: int, batch_rows: int) -> None:
    """Raise ValueError if rows, tokens, heads or layers do not divide over the layout. No GPU is touched."""
    if batch_rows % layout.data:
        nearest = max(layout.data, round(batch_rows / layout.data) * layout.data)
        raise ValueError(
            f"loop.batch_rows is {batch_rows}, which does not divide over {layout.data} data-parallel ranks "
            f"(replicate {layout.replicate} x shard {layout.shard}); give a multiple, for example {nearest}"
        )
    if layout.tensor > 1:
        try:
            plan.check(config, layout.tensor, plan.TRAINING_PLAN)
        except ValueError as error:
            raise ValueError(f"parallel.tensor is {layout.tensor}: {error}") from None
    if layout.context > 1 and seq_len % (2 * layout.context):
        raise ValueError(
            f"seq_len is {seq_len}, which does not divide into the {2 * layout.context} pieces that parallel.context="
            f"{layout.context} cuts a row into; give a multiple of {2 * layout.context}"
        )
    if layout.pipeline > config.num_hidden_layers:
        raise ValueError(
            f"parallel.pipeline is {layout.pipeline}, but the model has only {config.num_hidden_layers} layers; "
            "a stage needs one layer at least"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """A rank's place in the job, and what it exchanges with the others. All ranks call its methods in one order."""

    layout: Layout
    rank: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """The axes under their names; None for one process."""
    data_mesh: DeviceMesh | None = None
    """["replicate", "shard"] for FSDP; its second dimension runs over the context axis too, whose ranks hold the same
    weights and different tokens, as the ranks of the shard axis do."""
    host: Any = None
    """A gloo group of all ranks for what the hosts agree on; it never waits for a GPU."""
    saving: Any = None
    """Another one, for the thread that writes checkpoints."""

    @classmethod
    def alone(cls, device: torch.device) -> Team:
        return cls(layout=Layout(), rank=0, device=device)

    @classmethod
    def join(cls, layout: Layout, device: torch.device) -> Team:
        """The groups of this rank; torch.distributed is initialised with layout.world processes."""
        assert dist.get_world_size() == layout.world
        mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES)
        if layout.context == 1:
            data_mesh = mesh["replicate", "shard"]
        else:
            sizes = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
            names = ("pipeline", "replicate", "shard", "tensor")
            data_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)["replicate", "shard"]
        groups = [dist.new_group(backend="gloo") for _ in range(2)]
        return cls(
            layout=layout,
            rank=dist.get_rank(),
            device=device,
            mesh=mesh,
            data_mesh=data_mesh,
            host=groups[0],
            saving=groups[1],
        )

    @property
    def is_main(self) -> bool:
        """This rank speaks for the job: metrics, console, small files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.mesh is None

    def place(self, axis: str) -> int:
        return self.layout.coordinates(self.rank)[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in `axis` alone. Not for one process."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    @property
    def data_rank(self) -> int:
        """Which part of a step's rows is this rank's, 0 <= data_rank < layout.data."""
        return self.place("replicate") * self.layout.shard + self.place("shard")

    @property
    def counts_tokens(self) -> bool:
        """Among the ranks that compute the loss of the same tokens (a tensor group) this one counts it."""
        return self.place("tensor") == 0 and self.place("pipeline") == self.layout.pipeline - 1

    @property
    def leads_data(self) -> bool:
        """Among the ranks that read the same rows (context, tensor, pipeline) this one counts them."""
        return self.place("tensor") == self.place("context") == self.place("pipeline") == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks in double precision, equal on all of them."""
        if self.is_alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.host)
        return sums.tolist()

    def total_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """The same for a tensor on the device, without waiting for the device."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def agree(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.is_alone:
            return value
        box: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.host, device=torch.device("cpu"))
        return box[0]

    def gather(self, mine: T) -> list[T]:
        """Every rank's value, on all ranks."""
        if self.is_alone:
            return [mine]
        values: list[Any] = [None] * self.layout.world
        dist.all_gather_object(values, mine, group=self.host)
        return values

    def gather_errors(self, mine: str | None) -> tuple[int, str] | None:
        """The first rank that has an error, and the error; None if nobody has. For the thread that saves."""
        if self.is_alone:
            return None if mine is None else (0, mine)
        errors: list[str | None] = [None] * self.layout.world
        dist.all_gather_object(errors, mine, group=self.saving)
        return next(((rank, error) for rank, error in enumerate(errors) if error is not None), None)

    def gather_saved(self, mine: T) -> list[T]:
        """Every rank's value, on rank 0; nothing on the others. For the thread that saves."""
        if self.is_alone:
            return [mine]
        values: list[Any] | None = [None] * self.layout.world if self.is_main else None
        dist.gather_object(mine, values, dst=0, group=self.saving)
        return values or []

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.total([0.0])
