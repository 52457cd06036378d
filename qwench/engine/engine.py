"""The front of generation: open a checkpoint by path and continue prompts.

Prompts go one after the other through the naive generator; `stream` gives one answer piece by piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import torch

from qwench.engine.naive import NaiveGenerator
from qwench.model.checkpoint import locate
from qwench.model.load import load_model
from qwench.ops.hardware import pick_device
from qwench.tokenizer import Tokenizer
from qwench.types import Chunk, Completion, SamplingParams


class Engine:
    """A model that generates.

    >>> engine = Engine("path")
    >>> engine.generate([engine.tokenizer.encode("Hello")], SamplingParams(temperature=0, max_tokens=8))[0].text
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        tokenizer: str | Path | None = None,
    ) -> None:
        """`dtype` "auto" takes bf16 on a GPU and fp32 on a CPU. `tokenizer` overrides the one beside the model."""
        place = pick_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if place.type == "cuda" else "float32"
        where = locate(path)
        self.tokenizer = Tokenizer.load(tokenizer or where)
        self.model = load_model(where, device=place, dtype=dtype)
        self.generator = NaiveGenerator(self.model, self.tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """One completion a prompt, in order. `params` are shared, or one a prompt."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one a prompt")
        return [self.generator.generate(prompt, one) for prompt, one in zip(prompts, each, strict=True)]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """The pieces of one answer as they become final; the last one carries the completion."""
        return self.generator.stream(prompt, params)

    async def astream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncIterator[Chunk]:
        """`stream` for asyncio. Leaving the loop early (break, cancellation) gives the answer up and frees its cache."""
        pieces = self.stream(prompt, params)
        while (chunk := await asyncio.to_thread(next, pieces, None)) is not None:
            yield chunk

    @property
    def max_len(self) -> int:
        return self.model.config.max_position_embeddings

    def close(self) -> None: ...
