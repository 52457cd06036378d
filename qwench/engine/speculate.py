"""Speculative decoding: guess tokens, run the model over all of them in one pass, keep those that it draws itself.

The noise of a draw is a function of the request's seed, the place in the answer and the token id (`ops.sampling`). So a
draft is not accepted by chance: the model draws at each place as plain decoding would, given the drafts before it, and
as long as the draw is the draft, the next place is valid too. The first draw that differs is itself the next token.
The answer is the one without speculation, greedy or sampled, whatever was proposed; only rounding differs, as the
kernels for several tokens are others than for one.

A step is synchronous: the drafts need the tokens before them. It covers the first rows of `RowState`, all with the
same number of places; rows with fewer drafts carry filler behind them, which is never accepted. Keys of rejected places
stay in the cache until the next step overwrites them, and are seen by nobody.

Steps that read prompts decode without drafts, and drafts never preempt anyone: they take free blocks only. With an
n-gram index all requests get drafts; with a draft model those with a grammar get none.

Shape suffixes: B rows of the step, K drafts of a row, W = K + 1 places, T = B * W, V vocabulary rows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwench.engine.config import EngineConfig
from qwench.engine.draw import Extras, Mode, draw_at
from qwench.engine.proposers import LONGEST_MATCH, SHORTEST_MATCH, NgramIndex
from qwench.engine.rows import grid
from qwench.engine.runner import Flight, Runner
from qwench.engine.scheduler import Step
from qwench.engine.sequence import Sequence
from qwench.ops.sampling import count_

log = logging.getLogger("qwench.engine")

LENGTHS = (1, 2, 4, 8)
"""Numbers of drafts, beside the most, for which steps are recorded; others are filled up."""
PATIENCE = 2
"""Steps in a row whose first draft was wrong, before an answer goes on without drafts for a while.

A draft from the longest match of an n-gram index is tried also then: a passage that is copied begins suddenly."""
LONGEST_PAUSE = 64
"""Tokens until drafts are tried again, at most."""
LOG_EVERY = 8192
"""Drafts between two lines of the log."""

Places = list[tuple[Sequence, range]]
"""Sequences with the rows of the logits that belong to them: one for each token that may be drawn."""


@dataclass(slots=True)
class Drafting:
    """How drafts have fared in one answer."""

    length: int
    """Drafts to propose next time."""
    index: NgramIndex | None
    num_misses: int = 0
    """Steps in a row without an accepted draft."""
    resume_at: int = 0
    """Tokens of the answer before which only the safest drafts are proposed."""

    def learn(self, drafted: int, accepted: int, num_tokens: int, most: int) -> None:
        """Twice as many drafts after a full success, one more than were right after another; pause after failures.

        `num_tokens` of the answer are known now; `most` drafts are allowed.
        """
        if accepted == drafted:
            self.length = min(most, 2 * max(self.length, drafted))
        else:
            self.length = min(most, accepted + 1)
        self.num_misses = 0 if accepted else self.num_misses + 1
        if self.num_misses >= PATIENCE:
            self.resume_at = num_tokens + min(2**self.num_misses, LONGEST_PAUSE)


@dataclass(slots=True)
class Proposal:
    count: int
    tokens: list[int] = field(default_factory=list)
    """Empty where the draft model proposes on the device."""
    masks: list[np.ndarray] = field(default_factory=list)
    """What a grammar allows behind each draft."""


class Speculator:
    def __init__(self, runner: Runner, config: EngineConfig, max_step_tokens: int) -> None:
        """The draft model, if there is one, is `runner.draft`."""
        self._runner, self._most, self._max_step_tokens = runner, config.draft_tokens, max_step_tokens
        self._max_seqs = config.speculate_max_seqs or (8 if runner.on_gpu else 2)
        self._max_steps, self._plain_steps = config.decode_steps or 1, 1
        self._lengths = sorted({n for n in LENGTHS if n < self._most} | {self._most})
        self._proposals: dict[Sequence, Proposal] = {}
        self._launched: tuple[Step, int] = Step(), 0
        num_rows, device = runner.max_seqs, runner.device
        # One upload and two downloads a step; recorded steps need them at fixed addresses.
        self._inputs = torch.zeros(num_rows * (self._most + 2), dtype=torch.int64, device=device)
        self._outputs = torch.zeros(num_rows * (self._most + 2), dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(num_rows * (self._most + 1), dtype=torch.float32, device=device)
        self.num_drafts = self.num_accepted = 0

    # ---------------------------------------------------------------------------------------------------- proposing
    def wants(self, running: list[Sequence]) -> bool:
        """Whether the next step may have drafts: few answers run (a large batch keeps the device busy by itself), and
        none is still reading its prompt."""
        return 0 < len(running) <= self._max_seqs and not any(s.is_prefilling for s in running)

    def propose(self, running: list[Sequence]) -> dict[Sequence, int]:
        """How many drafts each sequence would like to have checked. Every token drawn so far must be read."""
        self._proposals = {}
        for sequence in running:
            drafting = sequence.drafting
            if drafting is None:
                index = NgramIndex(sequence.prompt) if self._runner.draft is None else None
                drafting = sequence.drafting = Drafting(self._most, index)
            count = min(drafting.length, sequence.answer.limit - sequence.num_launched - 1)
            proposal = self._proposal(sequence, drafting, count) if count > 0 else None
            if proposal is not None:
                self._proposals[sequence] = proposal
        self._plain_steps = 1 if self._proposals else min(2 * self._plain_steps, self._max_steps)
        return {sequence: proposal.count for sequence, proposal in self._proposals.items()}

    @property
    def max_plain_steps(self) -> int:
        """Steps to launch at once while nothing is proposed: more, the longer that lasts."""
        return self._plain_steps

    def _proposal(self, sequence: Sequence, drafting: Drafting, count: int) -> Proposal | None:
        pauses = len(sequence.outputs) < drafting.resume_at
        if drafting.index is None:
            return Proposal(count) if sequence.matcher is None and not pauses else None
        drafting.index.extend(sequence.outputs)
        tokens = drafting.index.propose(count, LONGEST_MATCH if pauses else SHORTEST_MATCH)
        # An id of the prompt may be one that cannot be drawn.
        allowed = next((i for i, token in enumerate(tokens) if token >= self._runner.vocab_size), len(tokens))
        tokens = tokens[:allowed]
        masks = self._masks_behind(sequence, tokens)
        if masks is not None:
            tokens = tokens[: len(masks)]
        return Proposal(len(tokens), tokens, masks or []) if tokens else None

    def _masks_behind(self, sequence: Sequence, tokens: list[int]) -> list[np.ndarray] | None:
        """What the grammar allows behind each draft, up to the first that it forbids or that completes it."""
        if sequence.matcher is None:
            return None
        matcher, masks = sequence.matcher.copy(), []
        for token in tokens:
            mask = np.zeros(-(-self._runner.model.config.vocab_size // 32), np.int32)
            try:
                matcher.consume(token)
                if matcher.is_finished:
                    break
                matcher.fill_mask(mask)
            except ValueError:  # forbidden, or too expensive: that is for the real matcher to find, if it gets there
                break
            masks.append(mask)
        return masks

    # ----------------------------------------------------------------------------------------------------- checking
    def launch(
        self, step: Step, mode: Mode, extras_for: Callable[[Places, dict[int, np.ndarray]], Extras] | None
    ) -> Flight:
        """Draft (with a draft model), run the model over last tokens and drafts, draw, and move the rows on.

        `extras_for` gives what only the host knows of the drawing, if anything, and may take its time: the device
        computes meanwhile. The flight's columns are rows of the state; read it with `settle` before the next plan.
        """
        runner = self._runner
        num_rows, count = 1 + max(s.slot for s in step.decodes), max(step.drafts.values())
        if runner.graphs is not None:
            num_rows = runner.graphs.size_for(num_rows)
            count = next(length for length in self._lengths if length >= count)
        width = count + 1
        if runner.draft is not None:
            for sequence in step.drafts:
                runner.draft.catch_up(sequence, sequence.num_computed - 2, self._max_step_tokens)
        inputs = self._inputs[: num_rows * (count + 2)].view(num_rows, count + 2)
        inputs.copy_(runner.upload(self._host_inputs(step, num_rows, count)), non_blocking=True)
        work = functools.partial(self._compute, inputs, mode, extras_for is None)
        if runner.graphs is None:
            logits_TV = work()
        else:
            key = ("verify", num_rows, count, mode, extras_for is None)
            logits_TV = runner.graphs.perform(key, work)
        columns = [(s.slot, s) for s in step.decodes]
        top = None
        if extras_for is not None:
            assert logits_TV is not None
            places = [(s, range(slot * width, slot * width + 1 + step.drafts.get(s, 0))) for slot, s in columns]
            masks = {
                row: mask
                for sequence, rows in places
                if sequence in step.drafts
                for row, mask in zip(rows[1:], self._proposals[sequence].masks, strict=False)
            }
            extras = extras_for(places, masks)
            if extras.num_top:
                values, ids = logits_TV.float().log_softmax(-1).topk(extras.num_top)
                ids, values = (runner.download(x.unflatten(0, (num_rows, width))) for x in (ids, values))
                top = ids, values
            self._decide(logits_TV, inputs, mode, extras)
        self._launched = step, count
        outputs = runner.download(self._outputs[: num_rows * (width + 1)]).view(num_rows, width + 1)
        logprobs = runner.download(self._logprobs[: num_rows * width]).view(num_rows, width)
        return Flight(
            columns=columns,
            tokens=outputs[:, 1:].T,
            logprobs=logprobs.T,
            event=runner.record(),
            top=top,
            num_new=outputs[:, 0],
        )

    def _host_inputs(self, step: Step, num_rows: int, count: int) -> Tensor:
        """[B, 2 + K]: number of drafts, the token before the last, the drafts where the host knows them."""
        values = np.zeros((num_rows, count + 2), np.int64)
        for sequence in step.decodes:
            row, outputs = values[sequence.slot], sequence.outputs
            row[0] = step.drafts.get(sequence, 0)
            row[1] = outputs[-2] if len(outputs) > 1 else sequence.prompt[-1]
            if row[0] and (tokens := self._proposals[sequence].tokens):
                row[2 : 2 + row[0]] = tokens[: row[0]]
        return torch.from_numpy(values)

    def _compute(self, inputs: Tensor, mode: Mode, decides: bool) -> Tensor | None:
        """The step's work on the device; the logits [T, V] where the host has a say in the draw."""
        runner, rows, num_rows = self._runner, self._runner.rows, inputs.shape[0]
        drafts_BK = inputs[:, 2:]
        if runner.draft is not None:
            runner.draft.propose(inputs[:, 1], drafts_BK, mode)
        tokens_BW = torch.cat((rows.last_token[:num_rows, None], drafts_BK), 1)
        positions_T, meta = grid(rows, rows.position[:num_rows], tokens_BW.shape[1], runner.block_size)
        logits_TV = runner.model.lm_head(runner.model(tokens_BW.flatten(), positions_T, meta, runner.caches))
        if not decides:
            return logits_TV
        self._decide(logits_TV, inputs, mode, None)
        return None

    def _decide(self, logits_TV: Tensor, inputs: Tensor, mode: Mode, extras: Extras | None) -> None:
        """Draw at every place, accept drafts while they are the draws, and note the result in rows and outputs."""
        runner, rows = self._runner, self._runner.rows
        num_drafts_B, drafts_BK = inputs[:, 0], inputs[:, 2:]
        num_rows, width = drafts_BK.shape[0], drafts_BK.shape[1] + 1
        slots_T = torch.arange(num_rows * width, device=runner.device)
        row_T, place_T = slots_T // width, slots_T % width
        counts_TV = self._counts_along(drafts_BK) if mode.penalised else None
        tokens_T, logprobs_T = draw_at(
            logits_TV, rows, row_T, rows.step[row_T] + place_T, mode, counts_TV, slots_T, runner.vocab_size, extras,
            runner.upload,
        )  # fmt: skip
        drawn_BW = tokens_T.view(num_rows, width)
        place_W = slots_T[:width]
        right_BK = (drawn_BW[:, :-1] == drafts_BK) & (place_W[:-1] < num_drafts_B[:, None])
        accepted_B = right_BK.long().cumprod(1).sum(1)
        if mode.penalised:
            assert runner.counts_RV is not None
            kept_BW = place_W <= accepted_B[:, None]
            nowhere = runner.counts_RV.shape[0] - 1
            count_(runner.counts_RV, torch.where(kept_BW.flatten(), row_T, nowhere), tokens_T)
        new_B = (accepted_B + 1) * rows.live[:num_rows]
        rows.last_token[:num_rows].copy_(drawn_BW.gather(1, accepted_B[:, None])[:, 0])
        rows.position[:num_rows].add_(new_B)
        rows.step[:num_rows].add_(new_B)
        outputs = self._outputs[: num_rows * (width + 1)].view(num_rows, width + 1)
        outputs[:, 0], outputs[:, 1:] = new_B, drawn_BW
        self._logprobs[: num_rows * width].copy_(logprobs_T)

    def _counts_along(self, drafts_BK: Tensor) -> Tensor:
        """Counts [T, V] for the penalties at each place: the answer's own, and the drafts before the place."""
        counts_RV = self._runner.counts_RV
        assert counts_RV is not None
        num_rows, most = drafts_BK.shape
        counts_BWV = counts_RV[:num_rows, None].repeat(1, most + 1, 1)
        place_N, draft_N = _pairs(most, drafts_BK.device)
        first_B = torch.arange(num_rows, device=drafts_BK.device) * (most + 1)
        counts_TV = counts_BWV.flatten(0, 1)
        count_(counts_TV, (first_B[:, None] + place_N).flatten(), drafts_BK[:, draft_N].flatten())
        return counts_TV

    # ------------------------------------------------------------------------------------------------------ reading
    def settle(self, flight: Flight, lines: list[list[int]]) -> None:
        """Set how far the sequences of a flight have come, before its tokens are handed out."""
        step, count = self._launched
        for slot, sequence in flight.columns:
            if sequence.is_finished:
                continue
            position, accepted = sequence.num_computed - 1, len(lines[slot]) - 1
            sequence.num_computed += accepted  # the plan has counted one token
            sequence.num_launched += accepted
            if self._runner.draft is not None and sequence.num_drafted >= position - 1:
                sequence.num_drafted = position + min(accepted + 1, count)
            if drafted := step.drafts.get(sequence, 0):
                assert sequence.drafting is not None
                sequence.drafting.learn(drafted, accepted, len(sequence.outputs) + accepted + 1, self._most)
                self._note(drafted, accepted)

    def _note(self, drafted: int, accepted: int) -> None:
        before = self.num_drafts // LOG_EVERY
        self.num_drafts += drafted
        self.num_accepted += accepted
        if self.num_drafts // LOG_EVERY > before:
            log.info(
                "speculation: %d of %d drafted tokens accepted (%.0f %%)",
                self.num_accepted, self.num_drafts, 100 * self.num_accepted / self.num_drafts,
            )  # fmt: skip


@functools.cache
def _pairs(most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each (place, draft) such that the draft stands before the place: draft j (from 0) before the places j + 1 on."""
    with torch.inference_mode(False):
        place_N, draft_N = torch.tril_indices(most, most, device=device)
    return place_N + 1, draft_N
