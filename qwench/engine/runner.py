"""The device's side of the engine: forward passes over prompts and answers, drawing tokens, recorded decoding steps.

Everything is enqueued and nothing waited for: a `Flight` holds the tokens of steps that were launched, and reading it
is the only wait. The host never needs the tokens to launch the next step, as `RowState` keeps them on the device.

Shape suffixes: T tokens, D hidden size, B rows of the step, V vocabulary rows, S steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwench.engine.config import EngineConfig
from qwench.engine.draw import Extras, MaskTable, Mode, draw
from qwench.engine.graphs import DecodeGraphs
from qwench.engine.prompts import ShortPrompts
from qwench.engine.rows import RowState
from qwench.engine.scheduler import Step
from qwench.engine.sequence import Sequence
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.attention_paged import HALF
from qwench.ops.paging import advance, locate
from qwench.ops.sampling import start_counts_

if TYPE_CHECKING:
    from qwench.engine.proposers import DraftModel

RING = 64
"""Decoding steps whose tokens the device keeps until the host has copied them."""
LOGPROB_ROWS = 512
"""Prompt rows whose logits exist at a time when their log-probabilities are asked for."""


@dataclass(slots=True)
class Flight:
    """Tokens on their way: `tokens[s, column]` is the s-th of the sequence with that column."""

    columns: list[tuple[int, Sequence]]
    tokens: Tensor
    logprobs: Tensor
    event: torch.cuda.Event | None
    top: tuple[Tensor, Tensor] | None = None
    """Ids and log-probabilities [B, S, k] of the likeliest tokens."""
    prompt_logprobs: list[tuple[Sequence, Tensor, Tensor]] = field(default_factory=list)
    """Log-probabilities of prompt tokens, and whether each is the likeliest."""
    first_logprobs: tuple[list[Sequence], Tensor] | None = None
    """Sequences that asked for ids' log-probabilities as first token, and these of all of them, end to end."""
    num_new: Tensor | None = None
    """How many of a column's tokens [B] count: the others come after a draft that was rejected. None: all."""

    def wait(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities by column, each a list over the steps."""
        if self.event is not None:
            self.event.synchronize()
        lines, values = self.tokens.numpy().T.tolist(), self.logprobs.numpy().T.tolist()  # numpy's is ten times faster
        if self.num_new is not None:
            kept = self.num_new.tolist()
            lines, values = ([one[:n] for one, n in zip(side, kept, strict=True)] for side in (lines, values))
        return lines, values


@dataclass(slots=True)
class Pending:
    """Logits of a step whose tokens are not drawn yet; row i belongs to `sequences[i]`."""

    logits_BV: Tensor
    sequences: list[Sequence]
    rows_B: Tensor
    """The sequences' rows in `RowState`."""
    positions: list[int]
    """Of the tokens to be drawn."""
    prompt_logprobs: list[tuple[Sequence, Tensor, Tensor]]


@dataclass(slots=True)
class Packed:
    """Runs of tokens of several sequences, laid end to end on the device."""

    tokens_T: Tensor
    positions_T: Tensor
    meta: AttnMeta
    last: np.ndarray
    """[B]: the last token of each run."""


class Runner:
    def __init__(self, model: CausalLM, config: EngineConfig, vocab_size: int, max_seqs: int, max_blocks: int) -> None:
        """`vocab_size`: ids that may be drawn (the model may have more rows). `max_blocks`: of one sequence."""
        self.model, self.config, self.vocab_size, self.max_seqs = model, config, vocab_size, max_seqs
        self.device = model.model.embed_tokens.weight.device
        self.on_gpu = self.device.type == "cuda"
        self.block_size = config.block_size
        self.rows = RowState(max_seqs, max_blocks, self.device)
        self._cu_q = torch.arange(max_seqs + 1, dtype=torch.int32, device=self.device)
        self.caches: list[KVCache] = []
        self.draft: DraftModel | None = None
        self.counts_RV: Tensor | None = None
        """How often each token stands in each row's answer, for penalties; made when first needed."""
        self.ring_tokens = torch.zeros((RING, max_seqs), dtype=torch.int64, device=self.device)
        self.ring_logprobs = torch.zeros((RING, max_seqs), dtype=torch.float32, device=self.device)
        self.ring_at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring_next = 0
        # Where the tokens that were drawn with the host's help go: never two flights of them at a time.
        self._drawn_tokens = torch.zeros(max_seqs, dtype=torch.int64, pin_memory=self.on_gpu)
        self._drawn_logprobs = torch.zeros(max_seqs, dtype=torch.float32, pin_memory=self.on_gpu)
        self._masks: MaskTable | None = None
        # Attention in fp32 has no kernel that reads lengths on the device, which a recorded step must.
        recordable = model.model.norm.weight.dtype in HALF and self.on_gpu and config.cuda_graphs
        self.graphs = DecodeGraphs(self) if recordable else None
        self.short_prompts = ShortPrompts(self, self.graphs) if self.graphs is not None else None

    # ------------------------------------------------------------------------------------------------------- rows
    def admit(self, sequences: list[Sequence]) -> None:
        self.rows.admit(sequences)
        if penalised := [s for s in sequences if s.penalised]:
            self._count_known(penalised)

    def _count_known(self, sequences: list[Sequence]) -> None:
        if self.counts_RV is None:
            shape = (self.max_seqs + 1, self.model.config.vocab_size)  # the last row takes what does not count
            self.counts_RV = torch.zeros(shape, dtype=torch.int16, device=self.device)
        for sequence in sequences:
            answer = torch.tensor(sequence.outputs[: sequence.num_kept], dtype=torch.int64)
            start_counts_(
                self.counts_RV, sequence.slot, self.upload(torch.tensor(sequence.prompt)), self.upload(answer)
            )

    def wants_compact(self, num_rows: int, num_live: int) -> bool:
        """Whether decoding `num_live` sequences in the first `num_rows` rows wastes work."""
        if self.graphs is not None:
            return self.graphs.size_for(num_rows) > self.graphs.size_for(num_live)
        return num_rows > num_live

    def move(self, pairs: list[tuple[int, int]]) -> None:
        """Move rows, see `RowState.move`."""
        if not pairs:
            return
        if self.counts_RV is not None:
            sources, targets = (list(side) for side in zip(*pairs, strict=True))
            self.counts_RV[targets] = self.counts_RV[sources]
        self.rows.move(pairs)

    # ----------------------------------------------------------------------------------------------------- forward
    def forward_mixed(self, step: Step) -> Pending:
        """One pass over prompt chunks and single decoding rows, up to the logits of those that can draw."""
        decodes, chunks = step.decodes, step.chunks
        if (short := self._short_prompt(step)) is not None:
            return short
        num_decodes = len(decodes)
        sequences = decodes + [s for s, _, _ in chunks]
        starts = [s.num_computed - 1 for s in decodes] + [start for _, start, _ in chunks]
        counts = [1] * num_decodes + [count for _, _, count in chunks]
        batch = self.pack(sequences, starts, counts, num_decodes)
        hidden_TD = self.model(batch.tokens_T, batch.positions_T, batch.meta, self.caches)
        if self.draft is not None:
            self.draft.follow(batch.tokens_T, batch.positions_T, batch.meta)
            self.draft.note_decoded(decodes)
        ready = list(range(num_decodes)) + [
            num_decodes + i for i, (s, _, _) in enumerate(chunks) if not s.is_prefilling
        ]
        chosen = np.array([batch.last[ready], [sequences[i].slot for i in ready]], np.int64)
        last_B, rows_B = self.upload(torch.from_numpy(chosen))
        logits_BV = self.model.lm_head(hidden_TD[last_B])
        return Pending(
            logits_BV=logits_BV,
            sequences=[sequences[i] for i in ready],
            rows_B=rows_B,
            positions=[int(starts[i] + counts[i]) for i in ready],
            prompt_logprobs=self._prompt_logprobs(chunks, hidden_TD[num_decodes:]),
        )

    def _short_prompt(self, step: Step) -> Pending | None:
        """The same for a step that is one short new prompt, or the short end of one, and nothing else: a recorded
        pass."""
        if self.short_prompts is None or self.draft is not None or step.decodes or len(step.chunks) != 1:
            return None
        sequence, start, count = step.chunks[0]
        if sequence.is_prefilling or sequence.params.prompt_logprobs or not self.short_prompts.knows(start, count):
            return None
        places, size = np.arange(start, start + count), self.block_size
        blocks = np.asarray(sequence.blocks[start // size :], np.int64)
        slots = torch.from_numpy(blocks[places // size - start // size] * size + places % size)
        tokens = sequence.known_tokens()[start : start + count]
        logits_1V = self.short_prompts.logits(tokens, slots, start, sequence.slot)
        return Pending(logits_1V, [sequence], self.upload(torch.tensor([sequence.slot])), [start + count], [])

    def pack(self, sequences: list[Sequence], starts: list[int], counts: list[int], num_decodes: int) -> Packed:
        """`counts[i]` tokens of sequence i from position `starts[i]` on. The first `num_decodes` have one each, which
        only the device knows."""
        size = self.block_size
        cu_q = np.concatenate(([0], np.cumsum(counts)))
        singles = list(zip(sequences, starts, strict=True))[:num_decodes]  # many, so without an array for each
        runs = list(zip(sequences, starts, counts, strict=True))[num_decodes:]
        ranges = [np.arange(a, a + n) for _, a, n in runs]
        positions = np.concatenate([np.array(starts[:num_decodes], np.int64), *ranges])
        slots = np.concatenate(
            [
                np.array([s.blocks[a // size] * size + a % size for s, a in singles], np.int64),
                *(
                    np.asarray(s.blocks)[at // size] * size + at % size
                    for (s, _, _), at in zip(runs, ranges, strict=True)
                ),
            ]
        )
        known = [np.asarray(s.known_tokens()[a : a + n], np.int64) for s, a, n in runs]
        tokens = np.concatenate([np.zeros(num_decodes, np.int64), *known])
        lens = np.add(starts, counts)
        width = -(-int(lens.max()) // size)
        slot_rows = np.array([s.slot for s in sequences])
        packed = torch.from_numpy(np.concatenate([tokens, positions, slots, cu_q, lens, slot_rows]))
        on_device = self.upload(packed)
        num_tokens, num_seqs = len(tokens), len(sequences)
        tokens_T, positions_T, slots_T, cu, lens_k, rows_B = on_device.split(
            [num_tokens, num_tokens, num_tokens, num_seqs + 1, num_seqs, num_seqs]
        )
        if num_decodes:
            tokens_T[:num_decodes] = self.rows.last_token[rows_B[:num_decodes]]
        meta = AttnMeta(
            cu_q=cu.int(),
            max_q=max(counts),
            lens_k=lens_k.int(),
            max_k=int(lens.max()),
            block_table=self.rows.table[rows_B, :width],
            slots=slots_T,
            num_decodes=num_decodes,
            history=any(start > 0 for _, start, _ in runs),
            num_keys=int(lens[num_decodes:].sum()),
        )
        return Packed(tokens_T, positions_T, meta, cu_q[1:] - 1)

    def _prompt_logprobs(
        self, chunks: list[tuple[Sequence, int, int]], hidden_TD: Tensor
    ) -> list[tuple[Sequence, Tensor, Tensor]]:
        """Log-probability of each prompt token that the rows of this step predict, and whether it is the likeliest."""
        found: list[tuple[Sequence, Tensor, Tensor]] = []
        at = 0
        for sequence, start, count in chunks:
            first, stop = max(start, sequence.num_scored), min(start + count, len(sequence.prompt) - 1)
            if sequence.params.prompt_logprobs and first < stop:
                targets = self.upload(torch.tensor(sequence.prompt[first + 1 : stop + 1]))
                rows_ND = hidden_TD[at + first - start : at + stop - start]
                for part, wanted in zip(rows_ND.split(LOGPROB_ROWS), targets.split(LOGPROB_ROWS), strict=True):
                    logprobs_NV = self.model.head(part).log_softmax(-1)
                    logprobs_N = self.download(logprobs_NV.gather(1, wanted[:, None])[:, 0])
                    found.append((sequence, logprobs_N, self.download(logprobs_NV.argmax(-1) == wanted)))
                sequence.num_scored = stop
            at += count
        return found

    def decode_logits(self, num_rows: int) -> Tensor:
        """One decoding pass of the first rows of `RowState`, live or not; logits [B, V]."""
        rows = self.rows
        table = rows.table[:num_rows]
        slots, lens = locate(rows.position[:num_rows], rows.live[:num_rows], table, self.block_size)
        meta = AttnMeta(
            cu_q=self._cu_q[: num_rows + 1],
            max_q=1,
            lens_k=lens,
            max_k=self.rows.width * self.block_size,
            block_table=table,
            slots=slots,
            num_decodes=num_rows,
        )
        hidden_BD = self.model(rows.last_token[:num_rows], rows.position[:num_rows], meta, self.caches)
        return self.model.lm_head(hidden_BD)

    def decode_step(self, num_rows: int, mode: Mode) -> None:
        """One decoding pass that draws and moves every live row on; the tokens go to the ring."""
        self.draw_step(self.decode_logits(num_rows), mode)

    def draw_step(
        self, logits_BV: Tensor, mode: Mode, extras: Extras | None = None, mask_BW: Tensor | None = None
    ) -> None:
        """Draw for the first rows of `RowState` and move the live ones on; the tokens go to the ring."""
        rows, num_rows = self.rows, logits_BV.shape[0]
        tokens_B, logprobs_B = draw(
            logits_BV, rows, slice(0, num_rows), mode, self.counts_RV, self.vocab_size, extras, self.upload, mask_BW
        )
        advance(
            tokens_B, logprobs_B, rows.last_token[:num_rows], rows.position[:num_rows], rows.step[:num_rows],
            rows.live[:num_rows], self.ring_tokens, self.ring_logprobs, self.ring_at,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- launches
    def decode(self, step: Step, mode: Mode) -> Flight:
        """Launch `step.num_steps` decoding steps of sequences without special wishes."""
        num_rows = 1 + max(s.slot for s in step.decodes)
        first = self._ring_place(step.num_steps)
        for _ in range(step.num_steps):
            if self.graphs is None or not self.graphs.replay(num_rows, mode):
                self.decode_step(num_rows, mode)
        return self._ring_flight([(s.slot, s) for s in step.decodes], first)

    def _ring_place(self, num_steps: int) -> int:
        """Where the tokens of the next steps will stand in the ring."""
        if self._ring_next + num_steps > RING:
            self.ring_at.zero_()
            self._ring_next = 0
        first, self._ring_next = self._ring_next, self._ring_next + num_steps
        return first

    def _ring_flight(self, columns: list[tuple[int, Sequence]], first: int) -> Flight:
        part, num_rows = slice(first, self._ring_next), 1 + max(slot for slot, _ in columns)
        return Flight(
            columns=columns,
            tokens=self.download(self.ring_tokens[part, :num_rows]),
            logprobs=self.download(self.ring_logprobs[part, :num_rows]),
            event=self.record(),
        )

    def forward_decode(self, step: Step) -> Tensor:
        """One decoding pass up to the logits [B, V] of the first rows, for a draw that needs the host."""
        num_rows = 1 + max(s.slot for s in step.decodes)
        logits_BV = self.graphs.replay_logits(num_rows) if self.graphs is not None else None
        return self.decode_logits(num_rows) if logits_BV is None else logits_BV

    def draw_decode(self, columns: list[tuple[int, Sequence]], logits_BV: Tensor, mode: Mode, extras: Extras) -> Flight:
        """Draw the tokens of a decoding pass. `columns`: the slots that its sequences had when it was launched, which
        `extras` refer to. The flight before it must have been read."""
        first, num_rows = self._ring_place(1), logits_BV.shape[0]
        mask_BW = None if extras.masks is None else self.masks.put(num_rows)
        if extras.is_masks_alone and self.graphs is not None:
            self.graphs.draw(logits_BV, mode, mask_BW)
        else:
            self.draw_step(logits_BV, mode, extras, mask_BW)
        top = self._top(logits_BV, extras)
        self._drawn_tokens.copy_(self.ring_tokens[first], non_blocking=True)
        self._drawn_logprobs.copy_(self.ring_logprobs[first], non_blocking=True)
        tokens, logprobs = self._drawn_tokens[None, :num_rows], self._drawn_logprobs[None, :num_rows]
        return Flight(columns, tokens, logprobs, self.record(), top)

    @property
    def masks(self) -> MaskTable:
        if self._masks is None:
            self._masks = MaskTable(self.max_seqs, -(-self.model.config.vocab_size // 32), self.device)
        return self._masks

    def _top(self, logits_BV: Tensor, extras: Extras | None) -> tuple[Tensor, Tensor] | None:
        """Ids and log-probabilities [B, 1, k] of the likeliest tokens, on their way to the host."""
        if extras is None or not extras.num_top:
            return None
        values, ids = logits_BV.float().log_softmax(-1).topk(extras.num_top)
        return self.download(ids[:, None]), self.download(values[:, None])

    def draw(self, pending: Pending, mode: Mode, extras: Extras | None = None) -> Flight:
        """Draw the tokens of a step's logits and note them in the sequences' rows."""
        if not pending.sequences:
            empty = torch.zeros((1, 0))
            return Flight([], empty.long(), empty, self.record(), None, pending.prompt_logprobs)
        rows, rows_B = self.rows, pending.rows_B
        numbers = torch.tensor([pending.positions, [s.num_launched - 1 for s in pending.sequences]])
        positions_B, steps_B = self.upload(numbers)
        rows.step.index_copy_(0, rows_B, steps_B)
        top, first = self._top(pending.logits_BV, extras), self._first_logprobs(pending)
        mask_BW = None if extras is None or extras.masks is None else self.masks.put(len(pending.sequences))
        tokens_B, logprobs_B = draw(
            pending.logits_BV, rows, rows_B, mode, self.counts_RV, self.vocab_size, extras, self.upload, mask_BW
        )
        rows.last_token.index_copy_(0, rows_B, tokens_B)
        rows.position.index_copy_(0, rows_B, positions_B)
        rows.step.index_copy_(0, rows_B, steps_B + 1)
        rows.live.index_fill_(0, rows_B, 1)
        return Flight(
            columns=list(enumerate(pending.sequences)),
            tokens=self.download(tokens_B[None]),
            logprobs=self.download(logprobs_B[None]),
            event=self.record(),
            top=top,
            prompt_logprobs=pending.prompt_logprobs,
            first_logprobs=first,
        )

    def _first_logprobs(self, pending: Pending) -> tuple[list[Sequence], Tensor] | None:
        """Log-probabilities of the ids that sequences asked for, where the first token of their answer is drawn now."""
        asking = [(row, s) for row, s in enumerate(pending.sequences) if s.params.first_logprobs and s.num_kept == 0]
        if not asking:
            return None
        found: list[Tensor] = []
        for at in range(0, len(asking), LOGPROB_ROWS):
            part = asking[at : at + LOGPROB_ROWS]
            line = [index for index, (_, s) in enumerate(part) for _ in s.params.first_logprobs]
            places = self.upload(torch.tensor([line, [token for _, s in part for token in s.params.first_logprobs]]))
            logits_NV = pending.logits_BV[self.upload(torch.tensor([row for row, _ in part]))].float()
            found.append(logits_NV[places[0], places[1]] - logits_NV.logsumexp(-1)[places[0]])
        return [s for _, s in asking], self.download(torch.cat(found))

    # --------------------------------------------------------------------------------------------------- transfers
    def upload(self, values: Tensor) -> Tensor:
        return self.rows.upload(values)

    def download(self, values: Tensor) -> Tensor:
        """A host copy that is complete when an event recorded later has passed."""
        if not self.on_gpu:
            return values.clone()
        out = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return out.copy_(values, non_blocking=True)

    def record(self) -> torch.cuda.Event | None:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def release(self) -> None:
        """Give the memory of caches and recorded steps back; nothing can be computed afterwards."""
        if self.on_gpu:
            with contextlib.suppress(RuntimeError):  # the failure that has ended the engine, once more
                torch.cuda.synchronize(self.device)
        self.caches, self.counts_RV = [], None
        self.graphs = self.short_prompts = self._masks = None
        if self.draft is not None:
            self.draft.caches = []

    def rehearse(self, num_tokens: int) -> None:
        """The largest step there can be, without a cache, so that its memory can be measured."""
        tokens_T = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        hidden_TD = self.model(
            tokens_T, torch.arange(num_tokens, device=self.device), AttnMeta.packed([num_tokens], self.device)
        )
        if self.draft is not None:
            self.draft.rehearse(num_tokens)
        num_rows = min(self.max_seqs, num_tokens)
        draw(
            self.model.lm_head(hidden_TD[:num_rows]),
            self.rows,
            slice(0, num_rows),
            Mode(filtered=True),
            None,
            self.vocab_size,
        )
