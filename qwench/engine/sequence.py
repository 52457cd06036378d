"""One request inside the engine: its tokens, its cache blocks, and how far the device has been sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qwench.engine.answer import Answer
from qwench.engine.blocks import prefix_hashes
from qwench.ops.sampling import uses_filters
from qwench.types import Chunk, SamplingParams

if TYPE_CHECKING:
    from qwench.engine.grammar import Matcher
    from qwench.engine.speculate import Drafting


class Sequence:
    """The device runs ahead of what the host has read: `num_computed` positions have keys in the cache, and
    `num_launched` tokens of the answer are drawn, once the steps already launched are done. `outputs` are the tokens
    that the host has read. While it decodes, num_computed == len(prompt) + num_launched - 1.
    """

    def __init__(
        self,
        prompt: np.ndarray | list[int],
        params: SamplingParams,
        seed: int,
        answer: Answer,
        sink: Callable[[Chunk], None] | None,
    ) -> None:
        self._prompt = np.asarray(prompt, np.int32)  # for hashes, where a long list would take time
        self.prompt: list[int] = prompt if isinstance(prompt, list) else prompt.tolist()
        self.params, self.seed, self.answer = params, seed, answer
        self.sink = sink
        """Called on the engine's thread with what is new after each step; None for who reads only the end."""
        self.on_end: Callable[[], None] = lambda: None
        self.on_failure: Callable[[BaseException], None] = lambda failure: None
        self.matcher: Matcher | None = None
        self.grammar_end: int | None = None
        """Which of the tokens that were heard last has completed the grammar."""
        self.penalised, self.filtered = is_penalised(params), uses_filters(params)
        self.needs_more = bool(params.logit_bias or params.min_tokens or params.top_logprobs)
        """`needs_host` for other reasons than a grammar."""
        self.needs_host = self.needs_more or params.grammar is not None
        """Each token needs something from the host before it can be drawn, or more of the logits afterwards."""
        self.slot = -1
        """Its row in the device's state while it runs."""
        self.admission = -1
        """Number of the admission by which it runs: a new one after each preemption."""
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_launched = 0
        self.num_to_prefill = len(prompt)
        """Tokens to read before the next one can be drawn: the prompt, after a preemption also the answer so far."""
        self.hashes: list[bytes] = []
        self.num_named = 0
        """Full blocks whose prefix the pool knows."""
        self.num_scored = max(0, params.prompt_logprobs_from - 1)
        """Prompt positions whose next token's log-probability is computed, on its way, or not asked for."""
        self.num_reusable = self.num_scored if params.prompt_logprobs else len(self.prompt)
        """Tokens of the prompt whose hidden states nobody needs."""
        self.drafting: Drafting | None = None
        """How speculative decoding has fared in this answer, once it was tried."""
        self.num_drafted = 0
        """Positions with keys in the draft model's cache, where there is one."""
        self.aborted = False
        self.num_to_skip = 0
        """Tokens of the answer that are drawn again after a preemption in deterministic mode, and not handed out."""

    @property
    def outputs(self) -> list[int]:
        return self.answer.token_ids

    @property
    def num_kept(self) -> int:
        """Tokens of the answer that are read again, not drawn again, when the sequence is admitted."""
        return 0 if self.num_to_skip else len(self.outputs)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_to_prefill

    @property
    def is_launched(self) -> bool:
        """Every token that the answer may have is drawn or on its way."""
        return self.num_launched >= self.answer.limit

    @property
    def is_finished(self) -> bool:
        return self.answer.finish is not None

    def start_again(self) -> None:
        """Draw the answer's tokens again from the first on; its grammar is taken back as far."""
        if self.matcher is not None:
            self.matcher.rollback(len(self.outputs) - self.num_to_skip)
        self.num_to_skip = len(self.outputs)

    def known_tokens(self) -> list[int]:
        return self.prompt + self.outputs if self.outputs else self.prompt

    def update_hashes(self, block_size: int) -> list[bytes]:
        tokens = self.known_tokens() if self.outputs else self._prompt
        self.hashes = prefix_hashes(tokens, block_size, self.hashes)
        return self.hashes


def is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
