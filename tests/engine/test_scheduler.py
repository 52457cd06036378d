"""The scheduler against a device made of Python lists: what it plans must be computable, fair and complete.

The device keeps, for every position of every block, the tokens up to there, as a real cache keeps keys that depend on
them. It draws tokens by a pure function of the tokens before, so the right answers are known beforehand. Requests
arrive, are given up and end at random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine.answer import Answer
from qwench.engine.blocks import BlockPool
from qwench.engine.scheduler import NeedsDrain, Scheduler, Step
from qwench.engine.sequence import Sequence
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

END = 3


def drawn(tokens: tuple[int, ...]) -> int:
    """The next token: END about once in twelve times."""
    number = hash(tokens) % 1009
    return END if number % 12 == 0 else 4 + number % 5


def answer_to(prompt: list[int], limit: int) -> list[int]:
    tokens = tuple(prompt)
    while len(tokens) == len(prompt) or (len(tokens) < len(prompt) + limit and tokens[-1] != END):
        tokens += (drawn(tokens),)
    return list(tokens[len(prompt) :])


class Grammar:
    """Counts what it hears, as a matcher does."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def rollback(self, count: int) -> None:
        assert 0 <= count <= len(self.heard)
        del self.heard[len(self.heard) - count :]


@dataclass
class Device:
    """The steps of a scheduler, computed and checked; `ahead` reads a step's tokens only after the next is launched."""

    scheduler: Scheduler
    ahead: bool
    cells: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    streams: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Admission -> tokens, those that the host has not read included."""
    flight: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)

    def step(self, max_steps: int | None) -> None:
        scheduler = self.scheduler
        try:
            step = scheduler.plan(in_flight=bool(self.flight), max_steps=max_steps)
        except NeedsDrain:
            self.read()
            step = scheduler.plan(in_flight=False, max_steps=max_steps)
        unread, self.flight = self.flight, []
        if step is not None:
            self.check(step)
            moves = scheduler.compact()
            assert sorted(s.slot for s in scheduler.running) == list(range(len(scheduler.running)))
            assert all(source >= len(scheduler.running) > target for source, target in moves)
            self.flight = self.compute(step)
        self.read(unread)
        if not self.ahead:
            self.read()

    def check(self, step: Step) -> None:
        scheduler, size = self.scheduler, self.scheduler.pool.block_size
        num_tokens = len(step.decodes) + sum(count for _, _, count in step.chunks)
        assert 0 < num_tokens <= scheduler.max_step_tokens
        assert 1 <= step.num_steps <= (1 if step.chunks else scheduler.decode_steps)
        slots = [s.slot for s in scheduler.running]
        assert len(set(slots)) == len(slots)
        assert set(slots) | set(scheduler.free_slots) == set(range(scheduler.max_seqs))
        planned = [*step.decodes, *(s for s, _, _ in step.chunks)]
        assert len(set(map(id, planned))) == len(planned)
        assert all(s in scheduler.running and s.blocks for s in planned)
        in_use = [block for s in scheduler.running for block in s.blocks]
        assert 0 not in in_use
        assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1 - len(set(in_use))
        is_new = [s.admission < 0 for s in scheduler.waiting]
        assert is_new == sorted(is_new), "who gave its blocks back goes before those who have never run"
        prefilling = [s for s, _, _ in step.chunks]
        assert all(s in prefilling or not s.is_prefilling for s in scheduler.running[:1]), "the first one gets on"
        for s, start, count in step.chunks:
            assert count > 0
            assert start + count <= s.num_to_prefill <= len(s.blocks) * size
        for s in step.decodes:
            assert s.num_computed == len(s.prompt) + s.num_launched - 1
            needed = min(s.num_computed, len(s.prompt) + s.answer.limit)
            assert needed <= len(s.blocks) * size

    def compute(self, step: Step) -> list[tuple[Sequence, list[int]]]:
        launched: list[tuple[Sequence, list[int]]] = []
        for s in step.decodes:
            tokens = self.streams[s.admission]
            for _ in range(step.num_steps):
                self.write(s, tokens, len(tokens) - 1)
                tokens += (drawn(tokens),)
            self.streams[s.admission] = tokens
            launched.append((s, list(tokens[-step.num_steps :])))
        for s, start, count in step.chunks:
            if s.admission not in self.streams:
                self.streams[s.admission] = tuple(s.known_tokens()[: s.num_to_prefill])
                self.admitted += [s] if s not in self.admitted else []
            for position in range(start, start + count):
                self.write(s, self.streams[s.admission], position)
        for s, _, _ in step.chunks:  # blocks that others fill in the same step may be read
            tokens = self.streams[s.admission]
            self.see(s, tokens, s.num_computed)
            if not s.is_prefilling:
                self.streams[s.admission] = (*tokens, drawn(tokens))
                launched.append((s, [drawn(tokens)]))
        for s in step.decodes:
            length = len(s.prompt) + s.answer.limit
            self.see(s, self.streams[s.admission], min(s.num_computed, length))
        return launched

    def write(self, s: Sequence, tokens: tuple[int, ...], position: int) -> None:
        index, offset = divmod(position, self.scheduler.pool.block_size)
        if index < len(s.blocks):  # beyond the last block, a real device writes to block 0
            self.cells[s.blocks[index], offset] = tokens[: position + 1]

    def see(self, s: Sequence, tokens: tuple[int, ...], num_keys: int) -> None:
        size = self.scheduler.pool.block_size
        for position in range(num_keys):
            assert self.cells[s.blocks[position // size], position % size] == tokens[: position + 1]

    def read(self, flight: list[tuple[Sequence, list[int]]] | None = None) -> None:
        if flight is None:
            flight, self.flight = self.flight, []
        for s, tokens in flight:
            if s.is_finished:
                continue
            skipped = min(s.num_to_skip, len(tokens))
            if skipped:
                at = len(s.outputs) - s.num_to_skip
                assert tokens[:skipped] == s.outputs[at : at + skipped], "what is drawn again is what was drawn"
                s.num_to_skip -= skipped
            num_before = len(s.outputs)
            s.answer.extend(tokens[skipped:], [0.0] * (len(tokens) - skipped))
            if s.matcher is not None:
                heard: Any = s.matcher
                heard.heard += tokens[:skipped] + s.outputs[num_before:]
                assert heard.heard == s.outputs[: len(s.outputs) - s.num_to_skip]
            if s.is_finished:
                self.scheduler.finish(s)


prompts = st.tuples(st.integers(0, 2), st.lists(st.integers(4, 5), min_size=1, max_size=14)).map(
    lambda pair: [7, 8, 9, 8, 7, 7][: 3 * pair[0]] + pair[1]
)
arrivals = st.lists(
    st.tuples(prompts, st.integers(1, 17), st.integers(0, 12), st.one_of(st.none(), st.integers(0, 25))),
    min_size=1,
    max_size=8,
)


def run(
    tokenizer: Tokenizer, requests: list[tuple[list[int], int, int, int | None]], spare: int, size: int, max_seqs: int,
    step_tokens: int, decode_steps: int, deterministic: bool, ahead: bool, caching: bool, grammar: bool,
) -> Scheduler:  # fmt: skip
    """Serve the requests (prompt, limit, step of arrival, step at which it is given up) and check everything."""
    longest = max(-(-(len(prompt) + limit) // size) for prompt, limit, _, _ in requests)
    pool = BlockPool(1 + longest + spare, size, caching=caching)
    scheduler = Scheduler(pool, max_seqs, max_seqs + step_tokens, decode_steps, deterministic=deterministic)
    device = Device(scheduler, ahead)
    served: list[tuple[Sequence, list[int], int | None]] = []
    coming = sorted(requests, key=lambda request: request[2])
    for now in range(2000):
        while coming and coming[0][2] <= now:
            prompt, limit, _, until = coming.pop(0)
            answer = Answer(tokenizer, SamplingParams(max_tokens=limit), frozenset([END]), limit, streaming=False)
            sequence = Sequence(prompt, answer.params, 0, answer, None)
            sequence.matcher = Grammar() if grammar else None  # pyright: ignore[reportAttributeAccessIssue]
            scheduler.add(sequence)
            served.append((sequence, answer_to(prompt, limit), until))
        for sequence, _, until in served:
            if until == now and not sequence.is_finished:
                sequence.answer.abort()
                scheduler.finish(sequence)
        if scheduler.has_work or device.flight:
            device.step(1 if grammar else None)
        elif not coming:
            break
    assert not scheduler.has_work, "everything must come to an end"
    for sequence, expected, until in served:
        if sequence.answer.finish == "abort":
            assert until is not None
            assert sequence.outputs == expected[: len(sequence.outputs)]
        else:
            assert sequence.outputs == expected
    first_come = [s for s, _, _ in served if s in device.admitted]
    assert device.admitted == first_come, "who comes first is read first"
    assert pool.num_free == pool.num_blocks - 1
    assert sorted(scheduler.free_slots) == list(range(max_seqs))
    assert scheduler.num_prompt_tokens == sum(len(s.prompt) for s in device.admitted)
    assert caching or scheduler.num_cached_tokens == 0
    return scheduler


@settings(max_examples=150, deadline=None)
@given(
    requests=arrivals, spare=st.integers(0, 8), size=st.integers(1, 4), max_seqs=st.integers(1, 4),
    step_tokens=st.integers(0, 12), decode_steps=st.integers(1, 5), deterministic=st.booleans(), ahead=st.booleans(),
    caching=st.booleans(), grammar=st.booleans(),
)  # fmt: skip
def test_any_requests(tiny_tokenizer: Tokenizer, **case: Any) -> None:
    run(tiny_tokenizer, **case)


CROWD: list[tuple[list[int], int, int, int | None]] = [([4 + i % 2] * (3 + i), 17 - i, 0, None) for i in range(6)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("grammar", [False, True])
def test_a_crowd(deterministic: bool, ahead: bool, grammar: bool, tiny_tokenizer: Tokenizer) -> None:
    """Six sequences and room for hardly two: they take turns, also where the same tokens must be drawn again."""
    assert max(len(answer_to(prompt, limit)) for prompt, limit, _, _ in CROWD) > 5
    scheduler = run(tiny_tokenizer, CROWD, 1, 2, 4, 8, 3, deterministic, ahead, True, grammar)
    assert scheduler.num_preemptions > 0


def test_a_long_pass_while_nobody_waits(tiny_tokenizer: Tokenizer) -> None:
    """Prompts are read in larger chunks while no answer is being written."""

    def sequence(length: int) -> Sequence:
        answer = Answer(tiny_tokenizer, SamplingParams(max_tokens=9), frozenset(), 9, streaming=False)
        return Sequence([5] * length, answer.params, 0, answer, None)

    scheduler = Scheduler(BlockPool(60, 4, caching=False), 3, 10, 4, idle_step_tokens=24)
    first, second = sequence(20), sequence(40)
    scheduler.add(first)
    scheduler.add(second)
    sizes = []
    while second.is_prefilling:
        step = scheduler.plan(in_flight=False)
        assert step is not None
        sizes.append((len(step.decodes), [count for _, _, count in step.chunks]))
        if first.num_launched == 1:
            first.answer.push(5, 0.0)
    assert sizes == [(0, [20, 4]), (1, [9]), (1, [9]), (1, [9]), (1, [9])]


def test_budget_goes_to_answers_first(tiny_tokenizer: Tokenizer) -> None:
    """A long prompt is read in the room that running answers leave, and they get a token in every step."""

    def sequence(length: int) -> Sequence:
        answer = Answer(tiny_tokenizer, SamplingParams(max_tokens=9), frozenset(), 9, streaming=False)
        return Sequence([5] * length, answer.params, 0, answer, None)

    scheduler = Scheduler(BlockPool(60, 4, caching=False), 3, 10, 4)
    short, long, third = sequence(3), sequence(30), sequence(4)
    scheduler.add(short)
    step = scheduler.plan(in_flight=False)
    assert step is not None
    assert (step.decodes, step.chunks) == ([], [(short, 0, 3)])
    short.answer.push(5, 0.0)
    scheduler.add(long)
    scheduler.add(third)
    sizes = []
    while short.num_launched < 6:
        step = scheduler.plan(in_flight=False)
        assert step is not None
        assert short in step.decodes
        assert step.num_steps == (1 if step.chunks else 4)
        sizes.append([(s, count) for s, _, count in step.chunks])
        for decoding in step.decodes:
            decoding.answer.extend([5] * step.num_steps, [0.0] * step.num_steps)
    assert sizes[:4] == [[(long, 9)], [(long, 9)], [(long, 9)], [(long, 3), (third, 4)]]
