"""The oracle generator: one sequence at a time, one forward pass a token, nothing clever.

It is what the fast engine is tested against. Its only economy is a key/value cache: one block for the whole sequence,
which doubles when it is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwench.engine.answer import held_back
from qwench.engine.sampling import draw, penalised, pick_seed
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.cross_entropy import token_logprobs
from qwench.tokenizer import StreamDecoder, Tokenizer
from qwench.types import Chunk, Completion, FinishReason, SamplingParams

if TYPE_CHECKING:
    from qwench.engine.grammar import GrammarCompiler, Matcher


class SequenceCache:
    """Keys and values of one sequence: a pair of [1, capacity, K, D] tensors a layer."""

    def __init__(self, model: CausalLM, capacity: int) -> None:
        config, embedding = model.config, model.model.embed_tokens.weight
        dtype = model.model.compute_dtype or embedding.dtype
        shape = (1, capacity, config.num_key_value_heads, config.d_head)
        self.layers: list[KVCache] = [
            (
                torch.zeros(shape, dtype=dtype, device=embedding.device),
                torch.zeros(shape, dtype=dtype, device=embedding.device),
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.capacity, self.length = capacity, 0

    def append(self, model: CausalLM, token_ids: Sequence[int]) -> Tensor:
        """Run the tokens after those already cached; hidden states [T, D] of the new ones."""
        if self.length + len(token_ids) > self.capacity:
            self._grow(self.length + len(token_ids))
        device = self.layers[0][0].device
        start, stop = self.length, self.length + len(token_ids)
        positions_T = torch.arange(start, stop, device=device)
        meta = AttnMeta(
            cu_q=torch.tensor([0, len(token_ids)], dtype=torch.int32, device=device),
            max_q=len(token_ids),
            lens_k=torch.tensor([stop], dtype=torch.int32, device=device),
            max_k=stop,
            block_table=torch.zeros((1, 1), dtype=torch.int32, device=device),
            slots=positions_T,
        )
        hidden_TD = model(torch.tensor(token_ids, device=device), positions_T, meta, self.layers)
        self.length = stop
        return hidden_TD

    def _grow(self, needed: int) -> None:
        extra = max(needed, 2 * self.capacity) - self.capacity
        pad = (0, 0, 0, 0, 0, extra)
        self.layers = [
            (torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad)) for keys, values in self.layers
        ]
        self.capacity += extra


class NaiveGenerator:
    """A `Generator` over a model and its tokenizer."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, grammars: GrammarCompiler | None = None) -> None:
        """Without `grammars`, requests with a grammar are refused."""
        self.model, self.tokenizer, self.grammars = model, tokenizer, grammars
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue one prompt. Raises ValueError as `stream` does."""
        completion = None
        for chunk in self.stream(token_ids, params):
            completion = chunk.completion
        assert completion is not None
        return completion

    @torch.inference_mode()
    def stream(self, token_ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """Yield a chunk for each token; the last one carries the completion.

        Text that could still turn into a stop string is held back. Rows of the model without a token are never drawn.
        The answer also ends ("length") where the context is full, and ("stop") where its grammar allows no more.
        Raises ValueError for a prompt that is empty, has ids outside the model's rows or leaves no room for an answer,
        for a bias of an id that does not exist, for n > 1, and for a grammar that nothing here can compile.
        """
        token_ids = self._checked(token_ids, params)
        matcher = self._matcher(params)
        seed = pick_seed(params.seed)
        ends = set() if params.ignore_eos else {*self.tokenizer.eos_token_ids, *self.model.config.eos_token_ids}
        ends |= set(params.stop_token_ids)
        max_tokens = min(params.max_tokens, self.model.config.max_position_embeddings - len(token_ids))
        cache = SequenceCache(self.model, len(token_ids) + min(max_tokens, 256))
        hidden_TD = cache.append(self.model, token_ids)
        prompt_logprobs, prompt_greedy = self._prompt_logprobs(hidden_TD, token_ids, params)
        first_logprobs: dict[int, float] | None = None
        ids: list[int] = []
        logprobs: list[float] = []
        top_logprobs: list[dict[int, float]] = []
        text, num_sent, cut = "", 0, False
        decoder = StreamDecoder(self.tokenizer)
        finish: FinishReason | None = None
        while True:
            logits_V = self.model.head(hidden_TD[-1:])[0]
            banned = ends if len(ids) < params.min_tokens else set()
            token = self._draw(logits_V, token_ids, ids, params, seed, banned, matcher)
            logprobs_V = logits_V.log_softmax(-1)
            if not ids and params.first_logprobs:
                first_logprobs = {wanted: float(logprobs_V[wanted]) for wanted in params.first_logprobs}
            ids.append(token)
            logprobs.append(float(logprobs_V[token]))
            top = _likeliest(logprobs_V, params.top_logprobs)
            top_logprobs += [top] if params.top_logprobs else []
            if token in ends:
                finish = "stop"
            else:
                num_before = len(text)
                text += decoder.push(token)
                if len(ids) >= params.min_tokens and (found := _completed(text, num_before, params.stop)):
                    text, finish, cut = text[: min(found)], "stop", True
                elif matcher is not None:
                    matcher.consume(token)
                    finish = "stop" if matcher.is_finished else None
                if finish is None and len(ids) == max_tokens:
                    finish = "length"
            if finish is not None:
                break
            safe = max(num_sent, len(text) - held_back(text, params.stop))
            yield Chunk(
                text=text[num_sent:safe],
                token_ids=[token],
                logprobs=logprobs[-1:],
                top_logprobs=[top] if params.top_logprobs else [],
            )
            num_sent = safe
            hidden_TD = cache.append(self.model, [token])
        if not cut:
            text += decoder.flush()
        yield Chunk(
            text=text[num_sent:],
            token_ids=[token],
            logprobs=logprobs[-1:],
            top_logprobs=[top] if params.top_logprobs else [],
            completion=Completion(
                token_ids=ids,
                text=text,
                logprobs=logprobs,
                finish_reason=finish,
                top_logprobs=top_logprobs if params.top_logprobs else None,
                prompt_logprobs=prompt_logprobs,
                prompt_greedy=prompt_greedy,
                first_logprobs=first_logprobs,
            ),
        )

    def _draw(
        self,
        logits_V: Tensor,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        banned: set[int],
        matcher: Matcher | None,
    ) -> int:
        """The next token: of the tokenizer's ids, allowed by the grammar, not banned.

        A grammar that allows nothing but banned ids wins over the ban.
        """
        logits_V = penalised(logits_V[: self.tokenizer.vocab_size], prompt_ids, answer_ids, params)
        if matcher is not None:
            logits_V = logits_V.masked_fill(~self._allowed(matcher, logits_V), float("-inf"))
        ban = [token for token in banned if token < logits_V.numel()]
        without_V = logits_V.index_fill(0, torch.tensor(ban, dtype=torch.int64, device=logits_V.device), float("-inf"))
        if matcher is None or bool((without_V > float("-inf")).any()):
            logits_V = without_V
        return draw(logits_V, params, seed, len(answer_ids))

    def _allowed(self, matcher: Matcher, logits_V: Tensor) -> Tensor:
        """[V] bool: the tokens whose bit in the grammar's mask is set."""
        words = np.zeros(-(-self.model.config.vocab_size // 32), dtype=np.int32)
        matcher.fill_mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits_V.numel()]
        return torch.from_numpy(bits).to(logits_V.device, torch.bool)

    def _prompt_logprobs(
        self, hidden_TD: Tensor, token_ids: Sequence[int], params: SamplingParams
    ) -> tuple[list[float | None] | None, list[bool | None] | None]:
        if not params.prompt_logprobs:
            return None, None
        first = max(1, params.prompt_logprobs_from)
        targets_T = torch.tensor(token_ids[first:], dtype=torch.int64, device=hidden_TD.device)
        none: list[None] = [None] * first
        if not targets_T.numel():
            return [*none], [*none]
        rows_TD = hidden_TD[first - 1 : -1]
        greedy_T = self.model.head(rows_TD).argmax(-1) == targets_T
        logprobs = token_logprobs(rows_TD, self.model.lm_head.weight, targets_T).tolist()
        return [*none, *logprobs], [*none, *greedy_T.tolist()]

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.n != 1:
            raise ValueError(f"n is {params.n}; one call gives one answer: call once for each, with seed + i")
        if params.grammar is None:
            return None
        if self.grammars is None:
            raise ValueError("this generator has no grammar compiler; make it with grammars=GrammarCompiler(...)")
        return self.grammars.compile(params.grammar)

    def _checked(self, token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        if isinstance(token_ids, str):
            raise ValueError("the prompt is a string; give token ids, for example tokenizer.encode(text)")
        ids = [int(token) for token in token_ids]
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        rows = self.model.config.vocab_size
        if bad := [token for token in ids if not 0 <= token < rows]:
            raise ValueError(f"token id {bad[0]} is outside the model's rows 0 to {rows - 1}")
        if len(ids) >= (length := self.model.config.max_position_embeddings):
            raise ValueError(f"the prompt has {len(ids)} tokens; the context of {length} leaves no room for an answer")
        if unknown := [token for token in params.logit_bias if not 0 <= token < self.tokenizer.vocab_size]:
            raise ValueError(f"logit_bias names token {unknown[0]}; ids run from 0 to {self.tokenizer.vocab_size - 1}")
        return ids


def _likeliest(logprobs_V: Tensor, num: int) -> dict[int, float]:
    """The `num` likeliest ids with their log-probabilities, best first."""
    best = logprobs_V.topk(num)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _completed(text: str, num_before: int, stops: Sequence[str]) -> list[int]:
    """Where the stop strings begin that end behind the first `num_before` characters of the text."""
    return [at for stop in stops if stop and (at := text.find(stop, max(0, num_before - len(stop) + 1))) >= 0]
