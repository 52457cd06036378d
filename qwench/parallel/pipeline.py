"""Pipeline parallelism: a step's micro-batches through the stages of several ranks, forward and backward.

    model = StagedLM(model, stages)              # before FSDP and compilation; see stages.py
    pipeline = Pipeline(model, team, Exchanges(reshard_after_forward=False))
    pipeline.train(number, batch_at, loss_of)    # leaves gradients behind
    pipeline.validate(number, batch_at, loss_of)

`batch_at(n)` makes the n-th of `number` micro-batches, on every rank; `loss_of(batch)` is called on the last stage.

All ranks of a pipeline get the same batches, so that positions and sequences are known everywhere, and only hidden
states and their gradients travel: [T, D] in the dtype of the activations, of the rank's own tokens where context or
tensor parallelism divide them. `schedule.py` says who computes and sends when; a round's messages are one batch of NCCL
or gloo operations, and a rank waits for a message only when it needs it.

Loss functions need not know: on the last stage the batch has the hidden states of the stage before in the place of its
tokens, and `model(batch.tokens_T, ...)` makes of them what it makes of tokens elsewhere.

With FSDP a chunk's weights stay gathered from its first forward pass to its last backward pass of the step, and its
gradients are exchanged in that one, unless `reshard_after_forward` or `keep_whole` say otherwise: with several
micro-batches on their way, weights that are given back after each pass are gathered twice a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwench.ops.attention import AttnMeta
from qwench.parallel.blocks import local_part
from qwench.parallel.data import Exchanges
from qwench.parallel.layout import Team
from qwench.parallel.schedule import Action, Round, plan_rounds
from qwench.parallel.stages import StagedLM


class Stream(Protocol):
    """The part of a batch that a pipeline reads; a dataclass."""

    @property
    def tokens_T(self) -> Tensor: ...
    @property
    def positions_T(self) -> Tensor: ...
    @property
    def meta(self) -> AttnMeta: ...


B = TypeVar("B", bound=Stream)


class Pipeline:
    """A rank's part in the pipeline that it belongs to. All ranks of it call the same methods with the same batches."""

    def __init__(self, model: StagedLM, team: Team, exchanges: Exchanges) -> None:
        self._model, self._team, self._group = model, team, team.group("pipeline")
        self._num_ranks, self._rank = team.layout.pipeline, team.place("pipeline")
        self._exchanges = exchanges
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """(chunk, micro-batch) -> input and output, of those whose backward pass is to come."""
        self._arriving: dict[Action, tuple[Tensor, list[dist.Work]]] = {}
        self._sent: deque[tuple[Tensor, list[dist.Work]]] = deque()
        self._connect()

    def train(self, number: int, batch_at: Callable[[int], B], loss_of: Callable[[B], Tensor]) -> None:
        """Add the gradients of the sum of the batches' losses to those of the parameters.

        The batches have the same number of tokens. `loss_of` gives a scalar; it is called on the last stage alone, in
        the order of the batches. Raises ValueError as `schedule.check_schedule` does.
        """
        rounds = plan_rounds(self._num_ranks, len(self._model.stages), number)[self._rank]
        ends: dict[int, Action] = {}  # the last backward pass of every chunk, the last one of all at the end
        for each in rounds:
            if each.action is not None and each.action.kind == "backward":
                ends.pop(each.action.chunk, None)
                ends[each.action.chunk] = each.action
        self._begin_step()
        self._run(rounds, batch_at, loss_of, list(ends.values()))
        assert not self._kept
        self._sum_tied_gradients()

    @torch.no_grad()
    def validate(self, number: int, batch_at: Callable[[int], B], loss_of: Callable[[B], Tensor]) -> None:
        """Forward passes alone. Weights stay gathered; see `data.no_gradients`."""
        rounds = plan_rounds(self._num_ranks, len(self._model.stages), number, backward=False)[self._rank]
        self._run(rounds, batch_at, loss_of, [])

    def _connect(self) -> None:
        """A message to and from each neighbour on the ring. NCCL makes a communicator in a group's first operation, in
        which all ranks must take part, and the connection of two ranks in their first message, which makes hosts wait.
        """
        operations: list[dist.P2POp] = []
        for peer in sorted({(self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks}):
            for kind in (dist.isend, dist.irecv):
                operations.append(self._operation(kind, torch.zeros(1, device=self._team.device), peer))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    # --------------------------------------------------------------------------------------------------------- rounds
    def _run(
        self,
        rounds: Sequence[Round],
        batch_at: Callable[[int], B],
        loss_of: Callable[[B], Tensor],
        ends: Sequence[Action],
    ) -> None:
        batches = {0: batch_at(0)}  # from a micro-batch's first forward pass on this rank to its last
        num_tokens = batches[0].tokens_T.numel()
        shape = (num_tokens // self._team.layout.tensor, self._model.config.hidden_size)
        for each in rounds:
            result = None
            if each.action is not None and each.action.kind == "forward":
                number = each.action.micro_batch
                batch = batches.pop(number) if number in batches else batch_at(number)
                assert batch.tokens_T.numel() == num_tokens, "pad micro-batches to the same number of tokens"
                if each.action.chunk < len(self._model.stages) - 1:
                    batches[number] = batch
                result = self._forward(each.action, batch, loss_of)
            elif each.action is not None:
                result = self._backward(each.action, ends)
            self._exchange(each, result, shape)
        self._let_go_of_sent(but=0)

    def _forward(self, action: Action, batch: B, loss_of: Callable[[B], Tensor]) -> Tensor:
        stage = self._model.stages[action.chunk]
        x = batch.tokens_T
        if not stage.first:
            x = self._arrived(action).requires_grad_(torch.is_grad_enabled())
            batch = dataclasses.replace(batch, tokens_T=x)  # pyright: ignore[reportArgumentType, reportType]
        self._model.select(stage)
        out = loss_of(batch) if stage.last else self._model(x, batch.positions_T, batch.meta)
        if torch.is_grad_enabled():
            self._kept[action.chunk, action.micro_batch] = (x, out)
        return out.detach()

    def _backward(self, action: Action, ends: Sequence[Action]) -> Tensor | None:
        x, out = self._kept.pop((action.chunk, action.micro_batch))
        gradient = None if self._model.stages[action.chunk].last else self._arrived(action)
        if action in ends:
            self._end_chunk(action.chunk, action == ends[-1])
        torch.autograd.backward([out], [gradient])
        return x.grad

    # ------------------------------------------------------------------------------------------------------- messages
    def _exchange(self, each: Round, result: Tensor | None, shape: tuple[int, int]) -> None:
        operations: list[dist.P2POp] = []
        buffers: dict[Action, Tensor] = {}
        for action, peer in each.receive:
            dtype = self._model.model.compute_dtype or torch.float32
            buffers[action] = torch.empty(shape, dtype=dtype, device=self._team.device)
            operations.append(self._operation(dist.irecv, buffers[action], peer))
        if each.send_to is not None:
            assert result is not None
            result = result.contiguous()
            operations.append(self._operation(dist.isend, result, each.send_to))
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        one_each = len(works) == len(operations)  # gloo; NCCL has one for all
        for number, (action, buffer) in enumerate(buffers.items()):
            self._arriving[action] = (buffer, works[number : number + 1] if one_each else works)
        if result is not None and each.send_to is not None:
            self._sent.append((result, works[-1:]))
        # So long ago that it has arrived: waiting for it costs nothing, and then its memory is free.
        self._let_go_of_sent(but=self._num_ranks)

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=peer)

    def _arrived(self, action: Action) -> Tensor:
        """The input of an action. On a GPU the stream waits for it, not the host."""
        buffer, works = self._arriving.pop(action)
        for work in works:
            work.wait()
        return buffer

    def _let_go_of_sent(self, *, but: int) -> None:
        """Wait for what has been sent, `but` for the last messages. Tensors must stay where they are till then."""
        while len(self._sent) > but:
            _, works = self._sent.popleft()
            for work in works:
                work.wait()

    # ----------------------------------------------------------------------------------------------------------- FSDP
    def _begin_step(self) -> None:
        """Until a chunk's last backward pass: see `data.prepare_exchanges`."""
        for unit in _fsdp_units(self._model):
            unit.set_requires_gradient_sync(not self._exchanges.keep_whole, recurse=False)
            unit.set_requires_all_reduce(False, recurse=False)
            unit.set_reshard_after_backward(self._exchanges.reshard_after_forward, recurse=False)
            unit.set_is_last_backward(False)

    def _end_chunk(self, chunk: int, last: bool) -> None:
        """The backward pass to come is the last one of a chunk, `last`: of the step."""
        stage = self._model.stages[chunk]
        ending: set[nn.Module] = {self._model.model.layers.get_submodule(str(number)) for number in stage.layers}
        if stage.first or stage.last:
            ending.add(self._model)  # FSDP exchanges in a pass in which there are gradients, not later
        for unit in _fsdp_units(self._model):
            if unit in ending:
                unit.set_requires_gradient_sync(True, recurse=False)
            # Every chunk's pass begins by gathering what belongs to the model itself: the embedding, the output matrix.
            if last or (unit in ending and unit is not self._model):
                unit.set_reshard_after_backward(True, recurse=False)
            unit.set_is_last_backward(last)

    @torch.no_grad()
    def _sum_tied_gradients(self) -> None:
        """The first and the last stage have the one matrix of tied embeddings: both get the sum of their gradients."""
        ends = (0, self._num_ranks - 1)
        if not self._model.config.tie_word_embeddings or self._rank not in ends:
            return
        grad = self._model.model.embed_tokens.weight.grad
        if grad is None:
            return
        mine, peer = local_part(grad), ends[0] if self._rank else ends[1]
        if not mine.numel():
            return
        theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
        sent = mine.contiguous()
        operations = [self._operation(dist.irecv, theirs, peer), self._operation(dist.isend, sent, peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine.add_(theirs)


def _fsdp_units(model: nn.Module) -> list[Any]:
    """The modules that FSDP gathers one at a time, and the model itself; none without FSDP."""
    from torch.distributed.fsdp import FSDPModule  # a second, which one process saves

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
