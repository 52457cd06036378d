"""How many bits a byte of held-out text costs: for a language model, for a unigram model, and for gzip and xz.

Every predictor gets the same bytes: the documents' texts. The model pays for all tokens of the stream of documents,
each closed by <|endoftext|>, in windows of its training length; only the very first token is free. Compressors get
the documents joined by newlines, which lets them learn from one document for the next.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from qwench.model.decoder import CausalLM
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import token_logprobs


def model_bits(model: CausalLM, stream: np.ndarray, seq_len: int, batch_tokens: int = 4096) -> float:
    """Total bits that the model pays for stream[1:], int token ids [T], read in windows of `seq_len`."""
    device = model.model.embed_tokens.weight.device
    nats = 0.0
    windows = max(1, batch_tokens // seq_len)
    targets = len(stream) - 1
    with torch.no_grad():
        for start in range(0, targets, windows * seq_len):
            piece = torch.from_numpy(stream[start : start + windows * seq_len + 1].astype(np.int64)).to(device)
            inputs_T, targets_T = piece[:-1], piece[1:]
            lens = [min(seq_len, len(inputs_T) - at) for at in range(0, len(inputs_T), seq_len)]
            positions_T = torch.cat([torch.arange(n, device=device) for n in lens])
            hidden_TD = model(inputs_T, positions_T, AttnMeta.packed(lens, device))
            nats -= float(token_logprobs(hidden_TD, model.lm_head.weight, targets_T).double().sum())
    return nats / math.log(2)


def unigram_bits(train_counts: np.ndarray, stream: np.ndarray) -> float:
    """Total bits of stream[1:] under token frequencies of the training data, every count raised by one."""
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-np.log2(probabilities[stream[1:]]).sum())


def compressor_bits(texts: Sequence[str]) -> dict[str, float]:
    """Total bits of the texts joined by newlines under gzip and xz at their strongest settings."""
    data = "\n".join(texts).encode()
    return {
        "gzip -9": 8.0 * len(zlib.compress(data, 9)),
        "xz -9e": 8.0 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
