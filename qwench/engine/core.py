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
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What the grammars of some sequences allow next."""

    sequences: list[Sequence]
    masks: np.ndarray


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
        masks = None
        if before is not None:
            heard = self._hear(before)
            handed_out = self._second_thread.submit(self._hand_out, before, *heard)
            masks = self._masks_ahead([s for _, s in rows])
            handed_out.result()
        return draw(self._extras([(s, range(row, row + 1)) for row, s in rows], {}, masks)), None

    def _extras(self, places: Places, further_masks: dict[int, np.ndarray], ahead: _Ahead | None = None) -> Extras:
        """What the host adds to the logits of each sequence's next tokens: the first one, and those behind drafts.

        `further_masks` has what grammars allow behind drafts, by the row of the logits; `ahead` are masks that are
        known already.
        """
        extras = Extras()
        constrained: list[tuple[int, Sequence]] = []
        banned: list[tuple[int, Sequence]] = []
        for sequence, rows in places:
            params = sequence.params
            if sequence.is_finished:
                continue
            if params.logit_bias:
                extras.edits += [(row, token, value) for row in rows for token, value in params.logit_bias.items()]
            if (num_banned := params.min_tokens - sequence.num_launched + 1) > 0:
                banned += [(row, sequence) for row in rows[:num_banned]]
            if params.top_logprobs > extras.num_top:
                extras.num_top = params.top_logprobs
            if sequence.matcher is not None:
                constrained.append((rows.start, sequence))
        if constrained:
            extras.masks = self._masks([sequence for _, sequence in constrained], ahead)
            if further_masks:
                owners = {row: sequence for sequence, rows in places for row in rows}
                constrained += [(row, owners[row]) for row in further_masks]
                extras.masks = np.concatenate((extras.masks, list(further_masks.values())))
            extras.masked = [row for row, _ in constrained]
        only_end = self._rows_that_must_end(constrained, extras.masks) if banned else ()
        for row, sequence in banned:
            if row not in only_end:
                extras.edits += [(row, token, float("-inf")) for token in sequence.answer.ends if token < self._num_ids]
        return extras

    @property
    def _num_ids(self) -> int:
        return self.runner.model.config.vocab_size

    @staticmethod
    def _rows_that_must_end(constrained: list[tuple[int, Sequence]], masks: np.ndarray | None) -> set[int]:
        """Rows whose grammar allows nothing but end tokens; min_tokens cannot forbid those."""
        if masks is None:
            return set()
        allowed = np.bitwise_count(masks.view(np.uint32)).sum(1)
        return {
            row
            for (row, sequence), mask, count in zip(constrained, masks, allowed, strict=True)
            if count == sum(bool(mask[t // 32] >> (t % 32) & 1) for t in sequence.answer.ends if t // 32 < len(mask))
        }

    def _masks_ahead(self, sequences: list[Sequence]) -> _Ahead | None:
        """What the grammars of these allow next, while some of them may be found to have ended."""
        sequences = [s for s in sequences if s.matcher is not None and not s.is_finished]
        if not sequences or self.config.tensor_parallel > 1:  # there, other ranks hear of each mask by itself
            return None
        masks = self.runner.masks.room(len(sequences))
        return _Ahead(sequences, masks) if self._fill(sequences, masks) else None

    @staticmethod
    def _fill(sequences: list[Sequence], masks: np.ndarray) -> bool:
        from qwench.engine.grammar import fill_masks  # llguidance is loaded when the first grammar comes

        try:
            fill_masks([sequence.matcher for sequence in sequences if sequence.matcher is not None], masks)
        except ValueError:
            return False
        return True

    def _masks(self, sequences: list[Sequence], ahead: _Ahead | None) -> np.ndarray:
        """What each grammar allows next, [sequences, V / 32] int32. One that fails ends its sequence only."""
        if ahead is not None:
            if ahead.sequences == sequences:
                return ahead.masks
            row_of = {sequence: row for row, sequence in enumerate(ahead.sequences)}
            if all(sequence in row_of for sequence in sequences):
                return ahead.masks[[row_of[sequence] for sequence in sequences]]
        masks = self.runner.masks.room(len(sequences))
        if self.config.tensor_parallel == 1 and self._fill(sequences, masks):
            return masks
        matchers = [sequence.matcher for sequence in sequences if sequence.matcher is not None]
        for sequence, matcher, mask in zip(sequences, matchers, masks, strict=True):
            try:
                matcher.fill_mask(mask)
            except ValueError as error:
                mask[:] = -1
                self.fail(sequence, error)
        return masks

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
            matcher, sequence.grammar_end = sequence.matcher, None
            if matcher is None or sequence.is_finished:
                continue
            try:
                for place, token in enumerate(tokens[column]):
                    if token in sequence.answer.ends and place >= sequence.num_to_skip:
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
        for sequence, values in flight.prompt_logprobs:
            known = sequence.answer.prompt_logprobs = sequence.answer.prompt_logprobs or [None]
            known.extend(values.tolist())
        top = (flight.top[0].tolist(), flight.top[1].tolist()) if flight.top is not None else None
        for column, sequence in flight.columns:
            if sequence.is_finished:
                continue
            num_before = len(sequence.outputs)
            line, values = tokens[column], logprobs[column]
            skipped = min(sequence.num_to_skip, len(line))
            if skipped:
                sequence.num_to_skip -= skipped
                line, values = line[skipped:], values[skipped:]
            if sequence.needs_host:
                last = None if sequence.grammar_end is None else sequence.grammar_end - skipped
                likeliest = None if top is None else (top[0][column], top[1][column])
                self._push_each(sequence, line, values, likeliest, last)
            else:
                sequence.answer.extend(line, values)
            self.num_generated += len(sequence.outputs) - num_before
            if sequence.is_finished:
                self._leave(sequence)
            elif sequence.sink is not None and len(sequence.outputs) > num_before:
                sequence.sink(sequence.answer.take())

    def _push_each(
        self,
        sequence: Sequence,
        line: list[int],
        values: list[float],
        top: tuple[list[list[int]], list[list[float]]] | None,
        last: int | None,
    ) -> None:
        """The next tokens of a sequence that has a grammar, whose `last` one has completed it, or that wants to see the
        likeliest ones."""
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
