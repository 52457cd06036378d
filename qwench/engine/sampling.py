"""One next token from one row of logits: penalty, temperature, top-k, top-p, draw.

Order of the steps as in Hugging Face's generation: repetition penalty, temperature, top-k, top-p.
Shape suffix: V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.types import SamplingParams


def penalised(logits_V: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    """Positive logits of seen tokens divided, negative ones multiplied by `penalty` [Keskar 2019].

    Seen ids beyond V (rows of the model without a token) have no logit to change.
    """
    seen_set = {token for token in seen_ids if token < logits_V.numel()}
    if penalty == 1.0 or not seen_set:
        return logits_V
    ids = torch.tensor(sorted(seen_set), device=logits_V.device)
    seen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after temperature, top-k and top-p; they sum to 1. Needs temperature > 0."""
    logits_V = logits_V.float()
    logits_V = (logits_V - logits_V.max()) / params.temperature  # below 0, so that a tiny temperature cannot overflow
    if 0 < params.top_k < logits_V.numel():
        smallest_kept = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest_kept, float("-inf"))
    probs_V = logits_V.softmax(-1)
    if params.top_p < 1:
        ordered, order = probs_V.sort(descending=True, stable=True)
        # A token stays when the mass before it is below top_p, so the token that crosses the line stays.
        dropped = order[ordered.cumsum(0) - ordered >= params.top_p]
        probs_V = probs_V.index_fill(0, dropped, 0.0)
        probs_V = probs_V / probs_V.sum()
    return probs_V


def sample(logits_V: Tensor, seen_ids: Sequence[int], params: SamplingParams, generator: torch.Generator) -> int:
    """The next token id; greedy (lowest id on ties) at temperature 0."""
    logits_V = penalised(logits_V.float(), seen_ids, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(filtered_probabilities(logits_V, params), 1, generator=generator))
