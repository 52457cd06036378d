"""Data parallelism of a built model: FSDP2 within a shard group, replicas of it beside each other (HSDP).

Each block is gathered when its turn comes and sharded again after it, or gathered once a step where memory allows;
embedding, final norm and output matrix are one more unit that stays gathered from the beginning of a pass to its end,
because the loss reads the output matrix outside of the model's `forward`. Master weights, gradients and optimiser
states are fp32 shards; a pass sees its weights in the dtype of the activations.

Gradients are sums over the ranks, not means: every loss is divided by the weight of the whole step before the backward
pass, so that neither the number of ranks nor an uneven share of the loss changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwench.model.decoder import CausalLM
from qwench.parallel.layout import Team

T = TypeVar("T")


def apply_data_parallel(
    model: CausalLM,
    team: Team,
    compute_dtype: torch.dtype,
    *,
    reshard_after_forward: bool = True,
    before_unit: Callable[[nn.Module, str], None] | None = None,
) -> None:
    """Shard the parameters of a model, in place, over `team.data_mesh`; for one process nothing happens.

    `before_unit(module, prefix)` is called before each unit (a block, then what is left) is sharded, with the prefix of
    its parameters' names: the place to fill a model that was built without memory, one unit at a time.
    """
    if team.is_alone:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second, which one process saves

    assert team.data_mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units: list[tuple[nn.Module, str]] = [
        (layer, f"model.layers.{number}.") for number, layer in model.model.layers.named_children()
    ]
    for module, prefix in [*units, (model, "")]:
        if before_unit is not None:
            before_unit(module, prefix)
        reshard = reshard_after_forward and module is not model
        unit = fully_shard(module, mesh=team.data_mesh, reshard_after_forward=reshard, mp_policy=policy)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanges:
    """When FSDP exchanges weights and gradients within a step of several micro-batches."""

    keep_whole: bool = True
    """Gradients stay whole on every rank until the last micro-batch: one exchange a step, the memory of whole
    gradients. Else they are scattered over the shard group every time, and only the sum over replicas waits."""
    reshard_after_forward: bool = True
    """As the model was sharded. False: weights stay gathered until the step's last backward pass too."""


def prepare_exchanges(model: nn.Module, last: bool, exchanges: Exchanges) -> None:
    """Say before a micro-batch's forward pass whether it is the last of its step."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or exchanges.reshard_after_forward)
    if exchanges.keep_whole:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)


class WholeModel:
    """The passes of a step over a model that a rank has all layers of; the same methods as `pipeline.Pipeline`."""

    def __init__(self, model: nn.Module, exchanges: Exchanges) -> None:
        self._model, self._exchanges = model, exchanges

    def train(self, number: int, batch_at: Callable[[int], T], loss_of: Callable[[T], Tensor]) -> None:
        """Add the gradients of the sum of `number` micro-batches' losses, one after the other."""
        for index in range(number):
            prepare_exchanges(self._model, index == number - 1, self._exchanges)
            loss_of(batch_at(index)).backward()

    def validate(self, number: int, batch_at: Callable[[int], T], loss_of: Callable[[T], Tensor]) -> None:
        """Forward passes alone."""
        for index in range(number):
            loss_of(batch_at(index))


@contextmanager
def no_gradients(model: nn.Module) -> Iterator[None]:
    """`torch.no_grad()` for passes without a backward pass, after which the parameters are shards again."""
    with torch.no_grad():
        yield
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
