"""Pipeline schedules: what each rank computes in which order, and when results travel. Pure functions, no tensors.

    rank_actions(num_ranks=4, virtual_stages=1, num_micro_batches=8, rank=0)   # [Action("forward", 0, 0), ...]
    plan_rounds(4, 1, 8)[rank]                                                 # the same with what travels when

The layers are cut into P * V stages for P ranks with V stages each: rank r has the stages r, r + P, r + 2 P, ...; the
v-th of them is its chunk v. With V = 1 the order is 1F1B [PipeDream-Flush, Narayanan 2021]: rank r runs P - 1 - r
forward passes ahead, then a forward and a backward pass in turn. With V > 1 it is interleaved 1F1B [Narayanan 2021,
section 2.2]: P micro-batches pass through a chunk before the next chunk has its turn, which makes the idle time at both
ends V times shorter and sends V times as much.

Rounds: in a round every rank computes one action or none, then what was computed is sent. A rank receives in the round
in which the other one sends, maybe earlier than it needs it. So all ranks exchange in one order, whoever sends is never
kept waiting by a rank that waits for something later, and no schedule can stand still.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch through one of a rank's chunks."""

    kind: Literal["forward", "backward"]
    chunk: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Round:
    """What a rank does between two exchanges, and what it exchanges then."""

    action: Action | None
    send_to: int | None
    """The rank that gets the result: hidden states of a forward pass, the gradient of the input of a backward pass."""
    receive: tuple[tuple[Action, int], ...]
    """(an action of this rank, the rank that its input comes from)."""


def bubble_share(num_ranks: int, virtual_stages: int, num_micro_batches: int) -> float:
    """Time that a rank waits in a step as a share of the time that it computes, if all stages take the same time."""
    return (num_ranks - 1) / (virtual_stages * num_micro_batches)


def check_schedule(num_ranks: int, virtual_stages: int, num_micro_batches: int) -> None:
    """Raise ValueError for a schedule that is not possible."""
    if virtual_stages < 1:
        raise ValueError(f"parallel.virtual_stages is {virtual_stages}; give 1 (not interleaved) or more")
    if virtual_stages > 1 and num_ranks == 1:
        raise ValueError(
            f"parallel.virtual_stages is {virtual_stages}, but parallel.pipeline is 1; leave it out, or choose "
            "a pipeline"
        )
    if virtual_stages > 1 and num_micro_batches % num_ranks:
        more = -(-num_micro_batches // num_ranks) * num_ranks
        raise ValueError(
            f"an interleaved pipeline (parallel.virtual_stages={virtual_stages}) takes micro-batches in groups of "
            f"parallel.pipeline={num_ranks}, and a step has {num_micro_batches} on each pipeline; choose "
            f"loop.batch_rows and loop.micro_batch_rows so that there are {more}, or parallel.virtual_stages=1"
        )


def rank_actions(num_ranks: int, virtual_stages: int, num_micro_batches: int, rank: int) -> list[Action]:
    """The forward and backward passes of one rank in order. Raises ValueError as `check_schedule` does."""
    check_schedule(num_ranks, virtual_stages, num_micro_batches)
    assert 0 <= rank < num_ranks
    forwards = forward_actions(num_ranks, virtual_stages, num_micro_batches)
    last = virtual_stages - 1
    backwards = [Action("backward", last - action.chunk, action.micro_batch) for action in forwards]
    # Interleaved, a chunk's input comes back from the last rank, so that a rank must run further ahead.
    lead = num_ranks - 1 - rank if virtual_stages == 1 else 2 * (num_ranks - 1 - rank) + last * num_ranks
    lead = min(lead, len(forwards))
    actions = forwards[:lead]
    for forward, backward in zip(forwards[lead:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(forwards) - lead :]


def forward_actions(num_ranks: int, virtual_stages: int, num_micro_batches: int) -> list[Action]:
    """The forward passes alone, for validation; the same on all ranks, for any number of micro-batches."""
    return [
        Action("forward", chunk, micro_batch)
        for group in range(0, num_micro_batches, num_ranks)
        for chunk in range(virtual_stages)
        for micro_batch in range(group, min(group + num_ranks, num_micro_batches))
    ]


def peak_kept(actions: Sequence[Action]) -> int:
    """Forward passes whose activations are kept at one time, at most: P - rank for 1F1B with enough micro-batches.

    Each is of one chunk, a V-th of the rank's layers.
    """
    kept = most = 0
    for action in actions:
        kept += 1 if action.kind == "forward" else -1
        most = max(most, kept)
    return most


@functools.lru_cache(maxsize=16)
def plan_rounds(
    num_ranks: int, virtual_stages: int, num_micro_batches: int, *, backward: bool = True
) -> tuple[tuple[Round, ...], ...]:
    """All rounds of each rank of a pipeline of at least 2. Raises ValueError as `check_schedule` does."""
    assert num_ranks > 1
    if backward:
        queues = [rank_actions(num_ranks, virtual_stages, num_micro_batches, rank) for rank in range(num_ranks)]
    else:
        queues = [forward_actions(num_ranks, virtual_stages, num_micro_batches)] * num_ranks
    last = num_ranks * virtual_stages - 1
    places, arrived = [0] * num_ranks, set[tuple[int, Action]]()
    rounds: list[list[Round]] = [[] for _ in range(num_ranks)]
    while any(place < len(queue) for place, queue in zip(places, queues, strict=True)):
        acting: list[Action | None] = []
        for rank in range(num_ranks):
            action = queues[rank][places[rank]] if places[rank] < len(queues[rank]) else None
            ready = action is not None and (_needs_nothing(action, rank, num_ranks, last) or (rank, action) in arrived)
            acting.append(action if ready else None)
        assert any(acting), "the ranks wait for each other"
        receive: list[list[tuple[Action, int]]] = [[] for _ in range(num_ranks)]
        send_to: list[int | None] = [None] * num_ranks
        for rank, action in enumerate(acting):
            if action is None:
                continue
            places[rank] += 1
            for peer, wanted in _followers(action, rank, num_ranks, last):
                send_to[rank] = peer
                receive[peer].append((wanted, rank))
                arrived.add((peer, wanted))
        for rank in range(num_ranks):
            rounds[rank].append(Round(acting[rank], send_to[rank], tuple(receive[rank])))
    return tuple(tuple(by_rank) for by_rank in rounds)


def _needs_nothing(action: Action, rank: int, num_ranks: int, last: int) -> bool:
    """An action whose input does not come from another rank; the loss follows the forward pass on its own rank."""
    stage = action.chunk * num_ranks + rank
    return stage == 0 if action.kind == "forward" else stage == last


def _followers(action: Action, rank: int, num_ranks: int, last: int) -> Iterator[tuple[int, Action]]:
    """The rank that needs the result of an action, and for what; nothing at the pipeline's ends."""
    stage = action.chunk * num_ranks + rank + (1 if action.kind == "forward" else -1)
    if 0 <= stage <= last:
        chunk, peer = divmod(stage, num_ranks)
        yield peer, Action(action.kind, chunk, action.micro_batch)


def draw(num_ranks: int, virtual_stages: int, num_micro_batches: int) -> str:
    """A picture of the rounds as text: F or B and the micro-batch; chunks, where there are several, as a, b, ..."""
    width = len(str(num_micro_batches - 1)) + 1 + (virtual_stages > 1)
    lines: list[str] = []
    for rank, rounds in enumerate(plan_rounds(num_ranks, virtual_stages, num_micro_batches)):
        cells = [_cell(each.action, virtual_stages).ljust(width) for each in rounds]
        lines.append(f"rank {rank}  {' '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(action: Action | None, virtual_stages: int) -> str:
    if action is None:
        return "."
    chunk = "" if virtual_stages == 1 else chr(ord("a") + action.chunk)
    return f"{action.kind[0].upper()}{action.micro_batch}{chunk}"
