"""One next token from one row of logits, written to be read: what the batched `ops.sampling` is tested against.

The order of the steps is that of `SamplingParams`: repetition penalty, presence and frequency penalties, logit bias,
(masks of the caller), temperature, top-k, top-p, min-p, draw. The noise of the draw is that of `ops.sampling`; the
filters are their definitions, on sorted probabilities in fp64.
Shape suffixes: V vocabulary rows, N the likeliest tokens in order.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qwench.ops.sampling import COLDEST, HOTTEST, exponential, noise_bits, wrap_seed
from qwench.types import SamplingParams


def pick_seed(seed: int | None) -> int:
    """The int64 that a request draws with: its seed modulo 2**64, or a new random one for None."""
    return secrets.randbits(63) if seed is None else wrap_seed(seed)


def penalised(
    logits_V: Tensor, prompt_ids: Collection[int], answer_ids: Sequence[int], params: SamplingParams
) -> Tensor:
    """fp32 logits after the three penalties and the bias.

    The repetition penalty divides positive and multiplies negative logits of tokens in prompt or answer [Keskar 2019];
    the presence penalty is subtracted once from those in the answer, the frequency penalty once for each time.
    Ids beyond V (rows of the model without a token) have no logit to change.
    """
    logits_V = logits_V.float().clone()
    times = {token: number for token, number in Counter(answer_ids).items() if token < logits_V.numel()}
    seen = sorted({token for token in prompt_ids if token < logits_V.numel()} | times.keys())
    if params.repetition_penalty != 1 and seen:
        x_N, penalty = logits_V[seen], params.repetition_penalty
        logits_V[seen] = torch.where(x_N > 0, x_N / penalty, x_N * penalty)
    for token, number in times.items():
        logits_V[token] -= params.presence_penalty + params.frequency_penalty * number
    for token, bias in params.logit_bias.items():
        if token < logits_V.numel():
            logits_V[token] += bias
    return logits_V


def kept_tokens(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """[V] bool: the tokens that top-k, top-p and min-p leave. Needs temperature > 0."""
    ordered_N, ids_N = logits_V.double().sort(descending=True, stable=True)
    kept_N = ordered_N > float("-inf")
    if 0 < params.top_k < ordered_N.numel():
        kept_N &= ordered_N >= ordered_N[params.top_k - 1]
    probs_N = probabilities(ordered_N, kept_N, params.temperature)
    if params.top_p < 1:
        reached_N = probs_N.cumsum(0) >= params.top_p
        if reached_N.any():  # rounding may leave the sum below a top_p next to 1
            kept_N &= ordered_N >= ordered_N[reached_N.int().argmax()]
    kept_N &= probs_N >= params.min_p * probs_N[0]
    return torch.zeros_like(kept_N).index_put_((ids_N,), kept_N)


def probabilities(logits_V: Tensor, kept_V: Tensor, temperature: float) -> Tensor:
    """[V] fp64: the distribution over the kept tokens at a temperature; zeros if there are none."""
    cold_V = (logits_V.double() - logits_V.double().max()) / min(max(temperature, COLDEST), HOTTEST)
    return cold_V.masked_fill(~kept_V, float("-inf")).softmax(0).nan_to_num(0.0)


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] fp64 after temperature, top-k, top-p and min-p: what `draw` draws from."""
    return probabilities(logits_V, kept_tokens(logits_V, params), params.temperature)


def draw(logits_V: Tensor, params: SamplingParams, seed: int, step: int) -> int:
    """The token of the answer's place `step` (from 0); greedy (lowest id on ties) at temperature 0.

    Every kept token has p / e for its luck, with e ~ Exp(1): token i is the luckiest with probability p_i.
    """
    if params.temperature == 0:
        return int(logits_V.argmax())
    ids_V = torch.arange(logits_V.numel(), device=logits_V.device)
    bits_V = noise_bits(torch.tensor(seed), torch.tensor(step), ids_V.cpu()).to(ids_V.device)
    return int((filtered_probabilities(logits_V, params) / exponential(bits_V)).argmax())
