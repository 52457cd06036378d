"""Schedules of pipelines as lists: complete, without deadlock, and as good as the textbook says."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import deque
from pathlib import Path

import pytest

from qwench.model.config import ModelConfig
from qwench.model.presets import preset
from qwench.parallel.schedule import (
    Action,
    Round,
    bubble_share,
    check_schedule,
    draw,
    forward_actions,
    peak_kept,
    plan_rounds,
    rank_actions,
)
from qwench.parallel.stages import Stage, deal_layers, stages_of_rank

SIZES = [(p, 1, m) for p in (2, 3, 4, 8) for m in (1, 2, 3, 7, 8, 32)] + [
    (p, v, m) for p in (2, 3, 4, 8) for v in (2, 3, 4) for m in (p, 2 * p, 4 * p)
]
"""Ranks, virtual stages, micro-batches."""


@pytest.mark.parametrize(("num_ranks", "virtual", "number"), SIZES)
def test_every_action_once_and_in_order(num_ranks: int, virtual: int, number: int) -> None:
    for rank in range(num_ranks):
        actions = rank_actions(num_ranks, virtual, number, rank)
        wanted = itertools.product(("forward", "backward"), range(virtual), range(number))
        assert sorted(actions, key=repr) == sorted((Action(*each) for each in wanted), key=repr)  # pyright: ignore[reportArgumentType]
        for action in actions:
            if action.kind == "backward":
                forward = dataclasses.replace(action, kind="forward")
                assert actions.index(forward) < actions.index(action)


@pytest.mark.parametrize(("num_ranks", "virtual", "number"), SIZES)
def test_rounds_neither_stand_still_nor_miss_anything(num_ranks: int, virtual: int, number: int) -> None:
    """With the least that a backend promises: nobody can send before the other one receives, one batch at a time."""
    for backward in (True, False):
        rounds = plan_rounds(num_ranks, virtual, number, backward=backward)
        for rank, mine in enumerate(rounds):
            got = [each.action for each in mine if each.action is not None]
            assert got == (
                rank_actions(num_ranks, virtual, number, rank)
                if backward
                else forward_actions(num_ranks, virtual, number)
            )
        meet(rounds, num_ranks * virtual - 1)


def meet(rounds: tuple[tuple[Round, ...], ...], last: int) -> None:
    """Every rank acts, exchanges, and goes on when all of its messages have met their other side."""
    num_ranks = len(rounds)
    queues = [deque(mine) for mine in rounds]
    # Messages of the batch that a rank waits in: (from, to), what it receives there.
    waiting: list[dict[tuple[int, int], Action | None]] = [{} for _ in rounds]
    arrived: set[tuple[int, Action]] = set()
    sent: dict[tuple[int, int], Action] = {}
    while any(queues) or any(waiting):
        before = [len(each) for each in (*queues, *waiting)]
        for rank, queue in enumerate(queues):
            while queue and not waiting[rank]:
                each = queue.popleft()
                action = each.action
                if action is not None:
                    stage = action.chunk * num_ranks + rank
                    begins = stage == (0 if action.kind == "forward" else last)
                    assert begins or (rank, action) in arrived, f"rank {rank} lacks the input of {action}"
                batch: dict[tuple[int, int], Action | None] = {(peer, rank): wanted for wanted, peer in each.receive}
                assert len(batch) == len(each.receive), "two messages of one rank in a round"
                if each.send_to is not None:
                    assert action is not None
                    batch[rank, each.send_to] = None
                    sent[rank, each.send_to] = action
                waiting[rank] = batch
        for rank, mine in enumerate(waiting):
            for (source, target), wanted in list(mine.items()):
                if wanted is None or (source, target) not in waiting[source]:
                    continue
                message = sent[source, target]
                assert (message.kind, message.micro_batch) == (wanted.kind, wanted.micro_batch)
                arrived.add((rank, wanted))
                del waiting[source][source, target], mine[source, target]
        assert before != [len(each) for each in (*queues, *waiting)], "deadlock"


@pytest.mark.parametrize(("num_ranks", "number"), [(2, 2), (4, 4), (4, 16), (8, 3)])
def test_1f1b_keeps_as_many_activations_as_ranks_follow(num_ranks: int, number: int) -> None:
    kept = [peak_kept(rank_actions(num_ranks, 1, number, rank)) for rank in range(num_ranks)]
    assert kept == [min(num_ranks - rank, number) for rank in range(num_ranks)]


def test_interleaved_keeps_more_but_smaller_ones() -> None:
    kept = [peak_kept(rank_actions(4, 2, 16, rank)) for rank in range(4)]
    assert kept == [2 * (4 - rank - 1) + 4 + 1 for rank in range(4)]


@pytest.mark.parametrize(("num_ranks", "virtual", "number"), [(2, 1, 4), (4, 1, 8), (4, 1, 32), (2, 2, 8), (4, 2, 16)])
def test_the_bubble_is_the_textbooks(num_ranks: int, virtual: int, number: int) -> None:
    """Forward 1, backward 2; a message arrives when both sides have come to its round."""
    rounds, costs = plan_rounds(num_ranks, virtual, number), {"forward": 1.0, "backward": 2.0}
    free, sending = [0.0] * num_ranks, [0.0] * num_ranks
    arrived: dict[tuple[int, Action], float] = {}
    for batch in zip(*rounds, strict=True):
        for rank, each in enumerate(batch):
            if each.action is not None:
                free[rank] = max(free[rank], arrived.get((rank, each.action), 0.0)) + costs[each.action.kind]
        ready = [max(pair) for pair in zip(free, sending, strict=True)]
        for rank, each in enumerate(batch):
            peers = [peer for _, peer in each.receive] + ([] if each.send_to is None else [each.send_to])
            if peers:
                sending[rank] = max(ready[rank], *(ready[peer] for peer in peers))
            arrived |= {(rank, action): sending[rank] for action, _ in each.receive}
    working = virtual * number * sum(costs.values())
    assert max(free) / working - 1 == pytest.approx(bubble_share(num_ranks, virtual, number))


def test_picture() -> None:
    assert draw(2, 1, 3).splitlines() == ["rank 0  F0 F1 .  B0 F2 B1 .  B2", "rank 1  .  F0 B0 F1 B1 F2 B2 ."]
    assert draw(2, 2, 2).splitlines()[0].startswith("rank 0  F0a F1a F0b F1b")


def test_what_the_documentation_shows() -> None:
    text = (Path(__file__).parents[2] / "docs/parallel.md").read_text()
    assert f"{draw(4, 1, 6)}\n\n{draw(2, 2, 4)}\n" in text
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+%) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for *sizes, waits, first, last in rows:
        num_ranks, virtual, number = (int(size) for size in sizes)
        kept = [peak_kept(rank_actions(num_ranks, virtual, number, r)) / virtual for r in (0, num_ranks - 1)]
        assert (waits, first, last) == (
            f"{bubble_share(num_ranks, virtual, number):.1%}",
            f"{kept[0]:g}",
            f"{kept[1]:g}",
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 0, 4), r"parallel\.virtual_stages is 0; give 1"),
        ((1, 2, 4), r"parallel\.pipeline is 1; leave it out, or choose a pipeline"),
        ((4, 2, 6), r"in groups of parallel\.pipeline=4, and a step has 6 .* so that there are 8, or"),
    ],
)
def test_what_is_not_possible(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(*sizes)


# -------------------------------------------------------------------------------------------------------------- stages
def test_layers_are_dealt_by_what_they_cost() -> None:
    """The output matrix of the 0.5B model costs nine layers, that of the 72B model one and a half."""
    assert deal_layers(preset("qwen2.5-0.5b"), 2) == [17, 7]
    assert deal_layers(preset("qwen2.5-72b"), 4) == [21, 20, 20, 19]
    for stages in range(1, 25):
        counts = deal_layers(preset("qwen2.5-0.5b"), stages)
        assert sum(counts) == 24
        assert min(counts) >= 1
        assert counts[:-1] == sorted(counts[:-1], reverse=True)
    with pytest.raises(ValueError, match=r"a pipeline of 25 stages .* has only 24 layers"):
        deal_layers(preset("qwen2.5-0.5b"), 25)


def test_a_rank_has_every_p_th_stage() -> None:
    counts = [3, 2, 2, 1]
    assert stages_of_rank(counts, 0, 2) == [Stage(range(3), True, False), Stage(range(5, 7), False, False)]
    assert stages_of_rank(counts, 1, 2) == [Stage(range(3, 5), False, False), Stage(range(7, 8), False, True)]


def test_even_layers_without_a_large_vocabulary() -> None:
    config = ModelConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    assert deal_layers(config, 4) == [2, 2, 2, 2]
