"""What to compute next: which prompts to read (in chunks), which answers to continue, and who must wait.

First come, first served. A step is either a mix of prompt chunks and single decoding rows within a budget of tokens,
or, with no prompt to read, several decoding steps of all running sequences. When the cache is full, the sequence that
came last gives its blocks back and is read again later. No tensors here.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwench.engine.blocks import BlockPool
from qwench.engine.sequence import Sequence


@dataclass(slots=True)
class Step:
    """`chunks`: (sequence, first position, number of tokens) to prefill; `decodes`: sequences that draw `num_steps`
    tokens each (1 where there are chunks)."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int, int]] = field(default_factory=list)
    num_steps: int = 1
    drafts: dict[Sequence, int] = field(default_factory=dict)
    """Of the decodes, those that have drafts to be checked, and how many; only in a step of one, without chunks."""


class NeedsDrain(Exception):
    """The cache is full and tokens are still on their way: read them, then plan again."""


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        max_seqs: int,
        max_step_tokens: int,
        decode_steps: int,
        *,
        idle_step_tokens: int | None = None,
        deterministic: bool = False,
        draft_model: bool = False,
    ) -> None:
        """Each of `max_seqs` sequences needs a token of the `max_step_tokens`, so that all of them get on.
        `idle_step_tokens` is the budget of a step in which no answer goes on.

        `draft_model`: blocks are shared with a draft model, and can be found again only when both have filled them.
        """
        assert max_seqs <= max_step_tokens
        self.pool, self.max_seqs, self.max_step_tokens = pool, max_seqs, max_step_tokens
        self.idle_step_tokens = idle_step_tokens or max_step_tokens
        self.decode_steps, self.deterministic, self.draft_model = decode_steps, deterministic, draft_model
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""
        self.free_slots = list(range(max_seqs))
        """A heap: the lowest free row first, so that the rows in use stay close together."""
        self._admissions = itertools.count()
        self.num_changes = 0
        """How often a sequence has begun or stopped to run."""
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def plan(
        self, *, in_flight: bool, max_steps: int | None = None, drafts: Mapping[Sequence, int] | None = None
    ) -> Step | None:
        """The next step, or None when everything is launched already. Raises NeedsDrain, see there.

        `drafts`: tokens that sequences would like to have checked in a step of one token. One is counted in the plan;
        who reads the step counts those that were accepted.
        """
        step, size = Step(), self.pool.block_size
        prefilling = [s for s in self.running if s.num_computed < s.num_to_prefill]
        reading = bool(prefilling) or bool(self.waiting and self.free_slots)
        wanted = 1 if reading else min(self.decode_steps, max_steps or self.decode_steps)
        decoding = [s for s in self.running if s.num_computed >= s.num_to_prefill] if prefilling else self.running
        decodes = [s for s in decoding if s.num_launched < s.answer.limit]
        if wanted > 1 and decodes:
            wanted = min(wanted, max(s.answer.limit - s.num_launched for s in decodes))
        preempted = self.num_preemptions
        for sequence in decodes:
            if sequence.slot < 0:  # preempted while an earlier one of this list grew
                continue
            num_positions = sequence.num_computed + wanted
            if num_positions > len(sequence.blocks) * size and not self._grow(sequence, num_positions, in_flight):
                continue
            step.decodes.append(sequence)
        if self.num_preemptions > preempted:
            step.decodes, prefilling, decoding = (
                [s for s in side if s.slot >= 0] for side in (step.decodes, prefilling, decoding)
            )
        budget = self.max_step_tokens - len(step.decodes) if decoding else self.idle_step_tokens
        for sequence in prefilling:
            if budget > 0:
                budget -= self._add_chunk(step, sequence, budget)
        while self.waiting and self.free_slots and budget > 0:
            sequence = self.waiting[0]
            if not self._admit(sequence, keep=len(step.decodes)):
                break
            self.waiting.popleft()
            budget -= self._add_chunk(step, sequence, budget)
        step.num_steps = 1 if step.chunks else wanted
        for sequence in step.decodes:
            sequence.num_computed += step.num_steps
            sequence.num_launched += step.num_steps
        if drafts and not step.chunks and step.num_steps == 1:
            wishes = [(s, self._room(s, drafts[s])) for s in step.decodes if s in drafts]
            step.drafts = {sequence: count for sequence, count in wishes if count > 0}
        return step if step.decodes or step.chunks else None

    def _room(self, sequence: Sequence, wanted: int) -> int:
        """For how many drafts behind the next token there are blocks, its own and free ones."""
        size = self.pool.block_size
        needed = -(-(sequence.num_computed + wanted) // size) - len(sequence.blocks)
        if needed > 0:
            sequence.blocks += self.pool.allocate(needed) or []
        return min(wanted, len(sequence.blocks) * size - sequence.num_computed)

    def _add_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed
        count = min(budget, sequence.num_to_prefill - start)
        step.chunks.append((sequence, start, count))
        sequence.num_computed += count
        sequence.num_drafted = sequence.num_computed
        if not sequence.is_prefilling:
            sequence.num_launched = sequence.num_kept + 1
        self.name_blocks(sequence)
        return count

    def name_blocks(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens are known and whose keys are computed or on their way."""
        if not self.pool.caching:
            return
        known = sequence.prompt if self.deterministic else sequence.known_tokens()
        num_ready = min(sequence.num_computed, sequence.num_drafted) if self.draft_model else sequence.num_computed
        num_full = min(num_ready, len(known)) // self.pool.block_size
        if num_full <= sequence.num_named:
            return
        hashes = sequence.update_hashes(self.pool.block_size)
        for index in range(sequence.num_named, num_full):
            self.pool.name(sequence.blocks[index], hashes[index])
        sequence.num_named = num_full

    def _admit(self, sequence: Sequence, keep: int) -> bool:
        """Give a waiting sequence a slot and the blocks of all its known tokens, leaving `keep` blocks to others."""
        size = self.pool.block_size
        sequence.num_to_prefill = len(sequence.prompt) + sequence.num_kept
        matched: list[int] = []
        if self.pool.caching:
            # The last token is always computed: its hidden state is needed. So is that before a token with a wanted
            # log-probability.
            usable = min(sequence.num_to_prefill - 1, sequence.num_reusable) // size
            matched = self.pool.match(sequence.update_hashes(size)[:usable])
        needed = -(-sequence.num_to_prefill // size) - len(matched)
        blocks = self.pool.allocate(needed) if needed + (keep if self.running else 0) <= self.pool.num_free else None
        if blocks is None:
            self.pool.release(matched)
            return False
        sequence.blocks = matched + blocks
        sequence.num_named = len(matched)
        sequence.num_computed = len(matched) * size
        sequence.num_launched = sequence.num_kept
        sequence.slot = heapq.heappop(self.free_slots)
        is_new, sequence.admission = sequence.admission < 0, next(self._admissions)
        self.running.append(sequence)
        self.num_changes += 1
        if is_new:
            sequence.answer.num_cached_tokens = sequence.num_computed
            self.num_prompt_tokens += len(sequence.prompt)
            self.num_cached_tokens += sequence.num_computed
        return True

    def _grow(self, sequence: Sequence, num_positions: int, in_flight: bool) -> bool:
        """Blocks for so many positions (never more than the answer may need); preempts the last comer when full."""
        last = len(sequence.prompt) + sequence.answer.limit
        needed = -(-min(num_positions, last) // self.pool.block_size) - len(sequence.blocks)
        while needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is not None:
                sequence.blocks += blocks
                return True
            if in_flight:
                raise NeedsDrain
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits in front and will be read again."""
        self.num_preemptions += 1
        self.name_blocks(sequence)
        self._leave(sequence)
        sequence.num_computed = 0
        if self.deterministic and sequence.outputs:
            # Kernels for reading and for decoding differ in their last bits: draw the same tokens again instead.
            sequence.start_again()
        self.waiting.appendleft(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a running or waiting sequence and free its blocks."""
        if sequence.slot >= 0:
            self.name_blocks(sequence)
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def compact(self) -> list[tuple[int, int]]:
        """Give the sequences in the highest slots the lowest free ones, until there are no gaps: (from, to) pairs."""
        moves: list[tuple[int, int]] = []
        num_running = len(self.running)
        for sequence in self.running:
            if sequence.slot >= num_running:
                to = heapq.heappop(self.free_slots)
                moves.append((sequence.slot, to))
                sequence.slot = to
        for slot, _ in moves:
            heapq.heappush(self.free_slots, slot)
        return moves

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.num_changes += 1
        heapq.heappush(self.free_slots, sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.num_named = -1, [], 0
