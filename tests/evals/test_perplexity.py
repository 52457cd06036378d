"""Perplexity as a score of documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwench.data.scoring import open_scorer
from qwench.evals.perplexity import PerplexityScorer
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.tokenizer import Tokenizer


def test_bits_per_byte_are_those_of_the_definition(
    make_model: Callable[..., CausalLM], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
):
    model = make_model(tiny_config)
    text = "def insort(a, x): 你好"
    ids = tiny_tokenizer.encode(text)
    stream = torch.tensor([tiny_tokenizer.eod_id, *ids])
    with torch.no_grad():
        hidden = model(stream[:-1], torch.arange(len(ids)), AttnMeta.packed([len(ids)], stream.device))
        logprobs = model.head(hidden).log_softmax(-1)
    bits = -float(logprobs[torch.arange(len(ids)), stream[1:]].sum()) / math.log(2)
    scores = PerplexityScorer(model, tiny_tokenizer).score([text, "", text + " "])
    assert scores[0, 0] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert np.isnan(scores[1, 0])
    assert scores.shape == (3, 1)


def test_what_a_model_has_learnt_is_likelier_than_noise(parrot: Path, dialogues: list[tuple[str, str]]):
    scorer = open_scorer("perplexity", parrot)
    known = "\n".join(answer for _, answer in dialogues)
    noise = "".join(reversed(known))
    (learnt,), (garbled,) = scorer.score([known, noise])
    assert learnt < garbled
