"""The engine's loop on one thread: plan a step, launch it, and while the device works, read what came before.

    core.add(sequence); while core.has_work: core.step()

With overlap the device is always one launch ahead: a sequence that has just ended may compute once more for nothing,
and what it draws then is thrown away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from qwench.engine.blocks import BlockPool
from qwench.engine.config import EngineConfig
from qwench.engine.draw import Extras, mode_of
from qwench.engine.runner import Flight, Runner
from qwench.engine.scheduler import NeedsDrain, Scheduler, Step
from qwench.engine.sequence import Sequence
from qwench.engine.speculate import Places, Speculator
from qwench.ops.dispatch import batch_invariant_kernels


class Core:
    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        config: EngineConfig,
        max_seqs: int,
        max_step_tokens: int,
        idle_step_tokens: int,
    ) -> None:
        self.runner, self.pool, self.config = runner, pool, config
        self.scheduler = Scheduler(
            pool,
            max_seqs,
            max_step_tokens,
            config.decode_steps or 1,
            idle_step_tokens=idle_step_tokens,
            deterministic=config.deterministic,
            draft_model=runner.draft is not None,
        )
        self.speculator = Speculator(runner, config, max_step_tokens) if config.speculate != "off" else None
        self.overlap = config.overlap and runner.on_gpu
        self.num_generated = 0
        self.on_tokens: Callable[[Flight, list[list[int]]], None] = lambda flight, lines: None
        """Called with the tokens of each flight before they are handed out. What it raises stops the engine."""
        self._flight: Flight | None = None
        self._second_thread = ThreadPoolExecutor(1, "qwench-answers")
        self._placed: dict[int, int] = {}
        """Admission -> row, as the device knows them."""
        self._placed_at = -1
        """The scheduler's number of changes at that time."""

    @property
    def has_work(self) -> bool:
        return self._flight is not None or self.scheduler.has_work

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence at once and free its blocks."""
        if not sequence.is_finished:
            sequence.answer.abort()
            self._leave(sequence)

    @torch.inference_mode()
    def step(self) -> None:
        """Launch one step, and read the one before (or the same, without overlap or with drafts)."""
        with self._kernels():
            planned = self._plan(self._drafts())
            before, self._flight = self._flight, None
            if planned is not None:
                self._place()
                self._flight, before = self._launch(planned, before)
            if before is not None:
                self._read(before)
            if not self.overlap or (planned is not None and planned.drafts):
                self._drain()

    def _kernels(self) -> AbstractContextManager[None]:
        return batch_invariant_kernels() if self.config.deterministic else nullcontext()

    def _drafts(self) -> dict[Sequence, int] | None:
        """How many tokens sequences propose to check in the next step; None where it is a plain one anyway."""
        running = self.scheduler.running
        if self.speculator is None or not self.speculator.wants(running):
            return None
        self._drain()
        return self.speculator.propose(running)

    def _plan(self, drafts: dict[Sequence, int] | None) -> Step | None:
        most = self._max_steps(drafts)
        try:
            return self.scheduler.plan(in_flight=self._flight is not None, max_steps=most, drafts=drafts)
        except NeedsDrain:
            self._drain()
            return self.scheduler.plan(in_flight=False, max_steps=most, drafts=drafts)

    def _max_steps(self, drafts: dict[Sequence, int] | None) -> int | None:
        if drafts or any(s.needs_host for s in self.scheduler.running):
            return 1
        if drafts is not None and self.speculator is not None:
            return self.speculator.max_plain_steps
        return self.config.decode_steps

    def _drain(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._read(flight)

    # ---------------------------------------------------------------------------------------------------- launching
    def _place(self) -> None:
        """Tell the device which rows have left, which have come, and which have gained blocks."""
        runner, running = self.runner, self.scheduler.running
        if self._placed_at != self.scheduler.num_changes:
            self._placed_at = self.scheduler.num_changes
            present = {s.admission: s.slot for s in running}
            runner.rows.retire([slot for admission, slot in self._placed.items() if admission not in present])
            arrived = [s for s in running if s.admission not in self._placed]
            if arrived:
                runner.admit(arrived)
            if runner.wants_compact(1 + max(present.values()), len(running)):
                runner.move(self.scheduler.compact())
            self._placed = {s.admission: s.slot for s in running}
        runner.rows.extend(running)

    def _launch(self, step: Step, before: Flight | None) -> tuple[Flight, Flight | None]:
        """The step's flight, and the earlier flight if it is still unread."""
        runner, everyone = self.runner, step.decodes + [s for s, _, _ in step.chunks]
        mode, special = mode_of(everyone), any(s.needs_host for s in everyone)
        if step.drafts and self.speculator is not None:
            return self.speculator.launch(step, mode, self._extras if special else None), before
        if not step.chunks and not special:
            return runner.decode(step, mode), before
        if step.chunks:
            pending = runner.forward_mixed(step)
            rows, draw = list(enumerate(pending.sequences)), functools.partial(runner.draw, pending, mode)
            if not special:
                return draw(None), before
        else:
            logits_BV = runner.forward_decode(step)
            rows = [(s.slot, s) for s in step.decodes]
            draw = functools.partial(runner.draw_decode, rows, logits_BV, mode)
        # Grammars must know the last tokens, which the others get while masks are computed. The device computes logits.
        masks_known = False
        if before is not None:
            heard = self._hear(before)
            handed_out = self._second_thread.submit(self._hand_out, before, *heard)
            masks_known = self._masks_ahead(rows)
            handed_out.result()
        return draw(self._extras([(s, range(row, row + 1)) for row, s in rows], None, masks_known)), None

    def _extras(self, places: Places, masks_behind: dict[int, np.ndarray] | None, masks_known: bool = False) -> Extras:
        """What the host adds to the logits of each sequence's next tokens: the first one, and those behind drafts.

        `masks_behind` has what grammars allow behind drafts, by the row of the logits. It is None for logits of one
        row a sequence: masks then go to the runner's table, where they may be already.
        """
        extras = Extras()
        constrained: list[tuple[int, Sequence]] = []
        banned: list[tuple[int, Sequence]] = []
        for sequence, rows in places:
            if sequence.answer.finish is not None:
                continue
            if sequence.matcher is not None:
                constrained.append((rows.start, sequence))
            if not sequence.needs_more:
                continue
            params = sequence.params
            extras.edits += [(row, token, value) for row in rows for token, value in params.logit_bias.items()]
            if (num_banned := params.min_tokens - sequence.num_launched + 1) > 0:
                banned += [(row, sequence) for row in rows[:num_banned]]
            extras.num_top = max(extras.num_top, params.top_logprobs)
        if constrained:
            self._add_masks(extras, constrained, masks_behind, masks_known)
        masked = set(extras.masked) if banned else ()
        for row, sequence in banned:
            if row in masked and extras.masks is not None and _must_end(sequence, extras.masks[row]):
                continue
            extras.edits += [(row, token, float("-inf")) for token in sequence.answer.ends if token < self._num_ids]
        return extras

    @property
    def _num_ids(self) -> int:
        return self.runner.model.config.vocab_size

    def _add_masks(
        self,
        extras: Extras,
        constrained: list[tuple[int, Sequence]],
        masks_behind: dict[int, np.ndarray] | None,
        known: bool,
    ) -> None:
        extras.masked = [row for row, _ in constrained]
        if masks_behind is None:
            extras.masks = self.runner.masks.take(extras.masked)
            if not known:
                self._fill_or_fail(constrained, extras.masks)
            return
        first = np.empty((len(constrained), -(-self._num_ids // 32)), np.int32)
        self._fill_or_fail([(index, sequence) for index, (_, sequence) in enumerate(constrained)], first)
        extras.masks = dict(zip(extras.masked, first, strict=True)) | masks_behind
        extras.masked = list(extras.masks)

    def _masks_ahead(self, rows: list[tuple[int, Sequence]]) -> bool:
        """Compute what grammars allow next, while some answers may be found to have ended; whether that is done."""
        constrained = [(row, s) for row, s in rows if s.matcher is not None and s.answer.finish is None]
        if not constrained or self.config.tensor_parallel > 1:  # there, other ranks hear of each mask by itself
            return False
        return self._fill(constrained, self.runner.masks.take([row for row, _ in constrained]))

    @staticmethod
    def _fill(constrained: list[tuple[int, Sequence]], masks: np.ndarray) -> bool:
        """What each grammar allows next, in its row of `masks` [any, V / 32] int32; False if one has failed."""
        from qwench.engine.grammar import fill_masks  # llguidance is loaded when the first grammar comes

        matchers = [sequence.matcher for _, sequence in constrained if sequence.matcher is not None]
        try:
            fill_masks(matchers, masks, [row for row, _ in constrained])
        except ValueError:
            return False
        return True

    def _fill_or_fail(self, constrained: list[tuple[int, Sequence]], masks: np.ndarray) -> None:
        """The same, where a grammar that fails ends its sequence only."""
        if self.config.tensor_parallel == 1 and self._fill(constrained, masks):
            return
        for row, sequence in constrained:
            assert sequence.matcher is not None
            try:
                sequence.matcher.fill_mask(masks[row])
            except ValueError as error:
                masks[row] = -1
                self.fail(sequence, error)

    # ------------------------------------------------------------------------------------------------------ reading
    def _read(self, flight: Flight) -> None:
        """Wait for a flight and hand its tokens to their answers."""
        self._hand_out(flight, *self._hear(flight))

    def _hear(self, flight: Flight) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for a flight's tokens and log-probabilities, and let the grammars know of them."""
        tokens, logprobs = flight.wait()
        self.on_tokens(flight, tokens)
        if flight.num_new is not None and self.speculator is not None:
            self.speculator.settle(flight, tokens)
        for column, sequence in flight.columns:
            if (matcher := sequence.matcher) is None:
                continue
            answer, sequence.grammar_end = sequence.answer, None
            if answer.finish is not None:
                continue
            try:
                for place, token in enumerate(tokens[column]):
                    if token in answer.ends and place >= sequence.num_to_skip:
                        break
                    matcher.consume(token)
                    if matcher.is_finished:
                        sequence.grammar_end = place
                        break
            except ValueError as error:  # a grammar that became too expensive ends its own answer only
                self.fail(sequence, error)
        return tokens, logprobs

    def _hand_out(self, flight: Flight, tokens: list[list[int]], logprobs: list[list[float]]) -> None:
        """Give the tokens of a flight to their answers. Grammars are not asked."""
        for sequence, values, greedy in flight.prompt_logprobs:
            sequence.answer.add_prompt_logprobs(values.tolist(), greedy.tolist())
        if flight.first_logprobs is not None:
            asking, values = flight.first_logprobs
            for sequence, part in zip(
                asking, values.split([len(s.params.first_logprobs) for s in asking]), strict=True
            ):
                ids = sequence.params.first_logprobs
                sequence.answer.first_logprobs = dict(zip(ids, part.tolist(), strict=True))
        top = (flight.top[0].tolist(), flight.top[1].tolist()) if flight.top is not None else None
        for column, sequence in flight.columns:
            answer = sequence.answer
            if answer.finish is not None:
                continue
            num_before, line, values = len(answer.token_ids), tokens[column], logprobs[column]
            skipped = 0
            if sequence.num_to_skip:
                skipped = min(sequence.num_to_skip, len(line))
                sequence.num_to_skip -= skipped
                line, values = line[skipped:], values[skipped:]
            if sequence.grammar_end is not None or sequence.params.top_logprobs:
                last = None if sequence.grammar_end is None else sequence.grammar_end - skipped
                likeliest = None if top is None else (top[0][column], top[1][column])
                self._push_each(sequence, line, values, likeliest, last)
            else:
                answer.extend(line, values)
            num_new = len(answer.token_ids) - num_before
            self.num_generated += num_new
            if answer.finish is not None:
                self._leave(sequence)
            elif num_new and sequence.sink is not None:
                sequence.sink(answer.take())

    def _push_each(
        self,
        sequence: Sequence,
        line: list[int],
        values: list[float],
        top: tuple[list[list[int]], list[list[float]]] | None,
        last: int | None,
    ) -> None:
        """The next tokens of a sequence whose grammar the `last` one has completed, or that wants to see the likeliest
        ones."""
        count = sequence.params.top_logprobs
        for place, (token, logprob) in enumerate(zip(line, values, strict=True)):
            best = None
            if count and top is not None:
                best = dict(zip(top[0][place][:count], top[1][place][:count], strict=True))
            sequence.answer.push(token, logprob, best)
            if place == last and sequence.answer.finish != "stop":  # also where the limit is reached at once
                sequence.answer.stop()
            if sequence.is_finished:
                break

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        if sequence.sink is not None:
            sequence.sink(sequence.answer.take())
        sequence.on_end()

    def fail(self, sequence: Sequence, failure: Exception) -> None:
        """End one sequence with an error; the others go on."""
        sequence.answer.abort()
        sequence.sink = None
        self.scheduler.finish(sequence)
        sequence.on_failure(failure)


def _must_end(sequence: Sequence, mask: np.ndarray) -> bool:
    """Whether a grammar allows nothing but end tokens; min_tokens cannot forbid those."""
    num_allowed = int(np.bitwise_count(mask.view(np.uint32)).sum())
    ends = [t for t in sequence.answer.ends if t // 32 < len(mask)]
    return num_allowed == sum(bool(mask[t // 32] >> (t % 32) & 1) for t in ends)
