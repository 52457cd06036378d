"""How hard documents are for one of our own language models: bits per byte, a filter for text that is none.

A `data.scoring.Scorer`, opened by name from the data pipeline, which itself needs no torch. High is noise, garbled or
foreign text; very low is repetition or what the model knows by heart. Only a document's beginning is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qwench.evals.compression import model_bits
from qwench.model.checkpoint import locate
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.ops.hardware import pick_device
from qwench.tokenizer import Tokenizer

MAX_BYTES = 4096
"""Of a document, from its beginning, cut at a character."""


class PerplexityScorer:
    """Bits per byte of texts under a model that was trained on documents closed by <|endoftext|>."""

    labels = ("bits_per_byte",)
    threshold = float("nan")

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, max_tokens: int = 1024) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts, 1]; nan for an empty text. Every token is paid for, the first after <|endoftext|>."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # how sums are split, and so their last digits, must not depend on the machine's cores
        try:
            return self._score(texts)
        finally:
            torch.set_num_threads(threads)

    def _score(self, texts: Sequence[str]) -> np.ndarray:
        scores = np.full((len(texts), 1), np.nan)
        end = self.tokenizer.eod_id
        for place, text in enumerate(texts):
            data = text.encode("utf-8", "replace")[:MAX_BYTES]
            beginning = data.decode("utf-8", "ignore")
            tokens = self.tokenizer.encode(beginning)[: self.max_tokens]
            if not tokens:
                continue
            num_bytes = len(self.tokenizer.decode(tokens).encode("utf-8", "replace"))
            stream = np.array([end, *tokens])
            scores[place, 0] = model_bits(self.model, stream, seq_len=len(tokens)) / max(1, num_bytes)
        return scores


def open_scorer(path: Path) -> PerplexityScorer:
    """A model directory, a GGUF file or a qwench run. Raises ValueError for what cannot be loaded."""
    where = locate(path)
    return PerplexityScorer(load_model(where, pick_device("auto"), "auto"), Tokenizer.load(where))
