"""What a rank holds of every parameter, as rectangular blocks of whole tensors: the language of checkpoints.

    blocks_of(model, team)                    weights under their stored (Hugging Face) names
    parameter_blocks(name, p, exp_avg, ...)   another tensor of a parameter's shape, such as an optimiser state

Tensor parallelism cuts a parameter by the plan, part by part; FSDP then cuts the rest by rows into equal runs, the last
ones shorter or empty. Both are undone here by arithmetic alone. A block's `values` are a view of the rank's memory, so
writing its blocks saves a rank's share and filling them loads it, whatever layout the other side has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.names import pieces
from qwench.parallel import plan
from qwench.parallel.layout import Team

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Block:
    """`values` stand in the tensor `name` from `start` on: first row, and first column of a matrix."""

    name: str
    start: tuple[int, ...]
    values: Tensor


def blocks_of(model: CausalLM, team: Team, *, once: bool = False) -> Iterator[Block]:
    """This rank's weights as blocks of the tensors of a Hugging Face checkpoint; `once` as in `parameter_blocks`."""
    table = pieces(model.config, "hf")
    for name, parameter in model.named_parameters():
        for block in parameter_blocks(name, parameter, parameter, model.config, team, once=once):
            first, top = block.start[0], 0
            for piece in table[name]:
                low, high = max(first, top), min(first + len(block.values), top + piece.shape[0])
                if low < high:
                    yield Block(piece.name, (low - top, *block.start[1:]), block.values[low - first : high - first])
                top += piece.shape[0]


def parameter_blocks(
    name: str, parameter: Tensor, values: Tensor, config: ModelConfig, team: Team, *, once: bool = False
) -> Iterator[Block]:
    """Blocks of a whole parameter of ours, of `values`, a tensor that is laid out as `parameter` is.

    With `once`, rows that several ranks hold alike are dealt out among them, so that each is written by one rank.
    """
    if once and is_second_copy(name, team):
        return
    copies, copy = team.layout.replicate, team.place("replicate")
    if not is_cut(name, team):
        copies, copy = copies * team.layout.tensor, copy * team.layout.tensor + team.place("tensor")
    for block in _held(name, parameter, values, config, team):
        if once:
            yield from _written_here(block, copies, copy)
        else:
            yield block


def _held(name: str, parameter: Tensor, values: Tensor, config: ModelConfig, team: Team) -> Iterator[Block]:
    local, first_row = local_part(values), first_local_row(parameter)
    if not local.numel():
        return
    last_row = first_row + len(local)
    split, tensor = plan.split_of(name, plan.TRAINING_PLAN), team.layout.tensor
    columns = (0,) * (local.ndim - 1)
    if not is_cut(name, team):
        yield Block(name, (first_row, *columns), local)
        return
    top = 0
    for start, stop in plan.spans(name, config, team.place("tensor"), tensor, plan.TRAINING_PLAN):
        size = stop - start
        if split.axis == 1:
            yield Block(name, (first_row, start), local[:, top : top + size])
        else:
            low, high = max(first_row, top), min(last_row, top + size)
            if low < high:
                yield Block(name, (start + low - top, *columns), local[low - first_row : high - first_row])
        top += size


def local_part(values: Tensor) -> Tensor:
    """The rank's own memory of a tensor that FSDP has cut or not."""
    to_local = getattr(values.detach(), "to_local", None)  # a DTensor has it, whose import one process can do without
    return values.detach() if to_local is None else to_local()


def first_local_row(parameter: Tensor) -> int:
    """Where the rank's rows begin in a parameter that FSDP has cut into runs of ceil(rows / ranks)."""
    for dim, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard():
            assert placement.is_shard(0), "FSDP cuts rows"
            mesh, num_rows = cast("DTensor", parameter).device_mesh, parameter.shape[0]
            return min(num_rows, -(-num_rows // mesh.size(dim)) * mesh.get_local_rank(dim))
    return 0


def _written_here(block: Block, number: int, place: int) -> Iterator[Block]:
    """Of a block that `number` ranks hold alike, the rows that the one at `place` writes."""
    low, high = (len(block.values) * at // number for at in (place, place + 1))
    if low < high:
        yield Block(block.name, (block.start[0] + low, *block.start[1:]), block.values[low:high])


def is_cut(name: str, team: Team) -> bool:
    """The ranks of a tensor group hold different parts of this parameter."""
    return team.layout.tensor > 1 and plan.split_of(name, plan.TRAINING_PLAN).axis is not None


def is_second_copy(name: str, team: Team) -> bool:
    """The matrix of tied embeddings on the last stage of a pipeline, which the first one has too."""
    return name == "model.embed_tokens.weight" and team.place("pipeline") > 0


def speaks_for(name: str, team: Team) -> bool:
    """Among the ranks that hold some of this parameter, or all of it, exactly one does."""
    others = ("replicate", "shard", "context", "tensor")
    return not is_second_copy(name, team) and all(team.place(axis) == 0 for axis in others)


def whole_shapes(model: CausalLM) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the whole parameters, by our names."""
    return {name: parts[0].shape for name, parts in pieces(model.config, "qwench").items()}


def cut(name: str, whole: Tensor, config: ModelConfig, team: Team) -> Tensor:
    """What tensor parallelism leaves of a whole parameter on this rank."""
    return plan.shard(name, whole, config, team.place("tensor"), team.layout.tensor, plan.TRAINING_PLAN)
