"""Where drafts come from in speculative decoding: repetitions in the text, or a small model.

A proposer only guesses; what is kept is decided by `speculate.py` from the model's own draws, so nothing here can
change an answer.

Shape suffixes: B rows of the step, T tokens, K drafts of a row, V vocabulary rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwench.engine.draw import Mode, draw_at
from qwench.engine.rows import grid
from qwench.engine.sequence import Sequence
from qwench.model.checkpoint import locate
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.sampling import count_
from qwench.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwench.engine.runner import Runner

LONGEST_MATCH, SHORTEST_MATCH = 3, 1
"""Last tokens that must have occurred before; the longest is tried first."""
_TOKEN_BITS = 21
assert LONGEST_MATCH * _TOKEN_BITS < 64


class NgramIndex:
    """Prompt lookup: what followed when the text last had its present ending.

    Keeps where each run of up to LONGEST_MATCH tokens last ended, so a proposal looks up a few numbers, however long
    the text is.
    """

    def __init__(self, prompt: list[int]) -> None:
        self._tokens = list(prompt)
        self._num_prompt = len(prompt)
        self._after: list[dict[int, int]] = []
        """For each length, the packed run -> the place behind its last occurrence; the text's own end is not in it."""
        ids = np.asarray(prompt, np.int64)
        for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            count = max(0, len(prompt) - size)
            keys = np.zeros(count, np.int64)
            for place in range(size):
                keys = (keys << _TOKEN_BITS) | ids[place : place + count]
            self._after.append(dict(zip(keys.tolist(), range(size, len(prompt)), strict=True)))

    def extend(self, answer: list[int]) -> None:
        """Take in what the answer has gained; `answer` is all of it."""
        tokens = self._tokens
        for token in answer[len(tokens) - self._num_prompt :]:
            self._note_end()
            tokens.append(token)

    def _note_end(self) -> None:
        key, tokens = 0, self._tokens
        for size in range(1, min(LONGEST_MATCH, len(tokens)) + 1):
            key |= tokens[-size] << (_TOKEN_BITS * (size - 1))
            if size >= SHORTEST_MATCH:
                self._after[size - SHORTEST_MATCH][key] = len(tokens)

    def propose(self, count: int, shortest: int = SHORTEST_MATCH) -> list[int]:
        """`count` tokens that may come next, or none. A repetition that reaches the text's end goes on in circles.

        At least the last `shortest` tokens must have occurred before.
        """
        tokens = self._tokens
        for size in range(min(LONGEST_MATCH, len(tokens)), shortest - 1, -1):
            key = 0
            for token in tokens[-size:]:
                key = key << _TOKEN_BITS | token
            at = self._after[size - SHORTEST_MATCH].get(key)
            if at is not None:
                found = tokens[at : at + count]
                period = len(tokens) - at
                while len(found) < count:
                    found.append(found[len(found) - period])
                return found
        return []


PROBES = ("def f(x):\n    return x + 1\n", "The quick brown fox, 1234567 times.", "今天天气很好。", "🙂 naïve\t\r\n")


def load_draft_model(path: str, device: torch.device, dtype: torch.dtype, tokenizer: Tokenizer) -> CausalLM:
    """The draft model. Raises ValueError when it cannot be loaded or does not share the tokenizer."""
    where = locate(path)
    own = Tokenizer.load(where)
    refusal = "; give a draft model of the same family, or speculate=ngram, which needs none"
    if own.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the draft model's tokenizer has {own.vocab_size} ids, the model's {tokenizer.vocab_size}{refusal}"
        )
    for text in PROBES:
        if own.encode(text) != tokenizer.encode(text):
            raise ValueError(f"the draft model's tokenizer encodes {text!r} otherwise than the model's{refusal}")
    model = load_model(where, device=device, dtype=dtype)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"the draft model has {model.config.vocab_size} rows for {own.vocab_size} ids{refusal}")
    return model


class DraftModel:
    """A small model with a key/value cache of its own that shares the block numbers of the large one's.

    It reads what the large model reads (`follow`), so a block that is named in the pool is right in both caches. Where
    it was left behind (while too many answers ran to speculate), `catch_up` closes the gap.
    """

    def __init__(self, model: CausalLM, runner: Runner) -> None:
        self.model, self._runner = model, runner
        self.caches: list[KVCache] = []

    def follow(self, tokens_T: Tensor, positions_T: Tensor, meta: AttnMeta) -> None:
        """Store keys and values of the same tokens at the same places."""
        self.model(self._known(tokens_T), positions_T, meta, self.caches)

    def note_decoded(self, sequences: list[Sequence]) -> None:
        """Sequences whose last token was among those that `follow` read."""
        for sequence in sequences:
            if sequence.num_drafted == sequence.num_computed - 1:
                sequence.num_drafted += 1

    def _known(self, tokens: Tensor) -> Tensor:
        """Rows without a token may be fewer than in the large model; a prompt may name one that is not there."""
        return tokens.clamp(max=self.model.config.vocab_size - 1)

    def catch_up(self, sequence: Sequence, stop: int, max_tokens: int) -> None:
        """Read the positions before `stop` that it has not read, in passes of at most `max_tokens`."""
        while sequence.num_drafted < stop:
            count = min(max_tokens, stop - sequence.num_drafted)
            batch = self._runner.pack([sequence], [sequence.num_drafted], [count], num_decodes=0)
            self.follow(batch.tokens_T, batch.positions_T, batch.meta)
            sequence.num_drafted += count

    def propose(self, before_B: Tensor, drafts_BK: Tensor, mode: Mode) -> None:
        """Fill `drafts_BK` with draws from this model's logits and the noise that the large model's draws will have.

        `before_B` is the token before the last one of each row: its key is written again, as it is the one that may be
        missing after a step whose drafts were all accepted. Nothing here needs the host.
        """
        runner, (num_rows, count) = self._runner, drafts_BK.shape
        rows = runner.rows
        first, last_token_B = slice(0, num_rows), rows.last_token[:num_rows]
        counts_BV = self._counts(num_rows) if mode.penalised else None
        slots_B = torch.arange(num_rows, device=runner.device)
        tokens_T, start_B, width = torch.stack((before_B, last_token_B), 1).flatten(), rows.position[first] - 1, 2
        for place in range(count):
            positions_T, meta = grid(rows, start_B, width, runner.block_size)
            hidden_TD = self.model(self._known(tokens_T), positions_T, meta, self.caches)
            logits_BV = self.model.lm_head(hidden_TD[width - 1 :: width].contiguous())
            tokens_T, _ = draw_at(
                logits_BV, rows, first, rows.step[first] + place, mode, counts_BV, slots_B, runner.vocab_size
            )
            if counts_BV is not None:
                count_(counts_BV, slots_B, tokens_T)
            drafts_BK[:, place] = tokens_T
            start_B, width = rows.position[first] + (place + 1), 1

    def _counts(self, num_rows: int) -> Tensor:
        """A copy of the rows' counts, as wide as this model's logits."""
        counts_RV = self._runner.counts_RV
        assert counts_RV is not None
        width = self.model.config.vocab_size
        counts_BV = counts_RV.new_zeros((num_rows, width))
        shared = min(width, counts_RV.shape[1])
        counts_BV[:, :shared] = counts_RV[:num_rows, :shared]
        return counts_BV

    def rehearse(self, num_tokens: int) -> None:
        """The largest step there can be, without a cache, see `Runner.rehearse`."""
        device = self._runner.device
        tokens_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.model(tokens_T, torch.arange(num_tokens, device=device), AttnMeta.packed([num_tokens], device))
