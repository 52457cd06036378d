"""The oracle generator: one sequence at a time, one forward pass a token, nothing clever.

It is what the fast engine is tested against, and what chat and the small evaluations use. Its only economy is a
key/value cache: one block for the whole sequence, which doubles when it is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwench.engine.sampling import sample
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta, KVCache
from qwench.tokenizer import StreamDecoder, Tokenizer
from qwench.types import Chunk, Completion, FinishReason, SamplingParams


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

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue one prompt. Raises ValueError for an empty prompt or ids outside the model's rows."""
        completion = None
        for chunk in self.stream(token_ids, params):
            completion = chunk.completion
        assert completion is not None
        return completion

    @torch.inference_mode()
    def stream(self, token_ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """Yield the answer as it becomes final; the last chunk carries the completion.

        Text that could still turn into a stop string is held back. Rows of the model without a token are never drawn.
        """
        token_ids = self._checked(token_ids)
        device = self.model.model.embed_tokens.weight.device
        generator = torch.Generator(device)
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        ends = set() if params.ignore_eos else {*self.tokenizer.eos_token_ids, *self.model.config.eos_token_ids}
        ends |= set(params.stop_token_ids)
        cache = SequenceCache(self.model, len(token_ids) + min(params.max_tokens, 256))
        hidden_TD = cache.append(self.model, token_ids)
        ids: list[int] = []
        logprobs: list[float] = []
        text, sent = "", 0
        decoder = StreamDecoder(self.tokenizer)
        finish: FinishReason = "length"
        cut = False
        while True:
            logits_V = self.model.head(hidden_TD[-1:])[0]
            token = sample(logits_V[: self.tokenizer.vocab_size], [*token_ids, *ids], params, generator)
            ids.append(token)
            logprobs.append(float(logits_V.log_softmax(-1)[token]))
            if token in ends:
                finish = "stop"
                break
            text += decoder.push(token)
            found = [at for stop in params.stop if stop and (at := text.find(stop)) >= 0]
            if found:
                text, finish, cut = text[: min(found)], "stop", True
                break
            if len(ids) == params.max_tokens:
                break
            safe = max(sent, len(text) - held_back(text, params.stop))
            if safe > sent:
                yield Chunk(text=text[sent:safe])
                sent = safe
            hidden_TD = cache.append(self.model, [token])
        if not cut:
            text += decoder.flush()
        yield Chunk(
            text=text[sent:],
            completion=Completion(token_ids=ids, text=text, logprobs=logprobs, finish_reason=finish),
        )

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        if isinstance(token_ids, str):
            raise ValueError("the prompt is a string; give token ids, for example tokenizer.encode(text)")
        ids = [int(token) for token in token_ids]
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        rows = self.model.config.vocab_size
        if bad := [token for token in ids if not 0 <= token < rows]:
            raise ValueError(f"token id {bad[0]} is outside the model's rows 0 to {rows - 1}")
        return ids


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
