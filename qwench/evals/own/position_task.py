"""The lm-eval task of `positions`: several log-likelihoods a window, and metrics that are named by their bins.

Imported by the YAML file that names it, when lm-eval is loaded anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from qwench.evals import context
from qwench.evals.own.positions import bin_name, parts


def _mean(pairs: Sequence[tuple[float, int]]) -> float:
    """Of losses in nats with their numbers of tokens: nats a token."""
    return sum(nats for nats, _ in pairs) / max(1, sum(tokens for _, tokens in pairs))


def _perplexity(pairs: Sequence[tuple[float, int]]) -> float:
    mean = _mean(pairs)
    return math.exp(mean) if mean < 700 else math.inf


class PositionPerplexity(ConfigurableTask):
    """Metrics: perplexity over all tokens, and nats a token in each bin, `nll_FROM_TO` in positions."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def _names(self) -> list[str]:
        edges = self.dataset["test"][0]["edges"]
        return [bin_name(edges, number) for number in range(len(edges) - 1)]

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> list[Instance]:
        """One a bin. The document begins behind <|endoftext|>, as in training, so the very first token is paid for."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        tokenizer = context.current().tokenizer
        start = tokenizer.token_bytes(tokenizer.eod_id).decode()
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=(start + before, text), idx=number, **kwargs)
            for number, (before, text, _) in enumerate(parts(doc))
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        edges = doc["edges"]
        if len(results) != len(edges) - 1:
            raise ValueError(f"a window of {len(edges) - 1} bins has {len(results)} log-likelihoods")
        bins = [(-value, last - first) for (value, _), first, last in zip(results, edges, edges[1:], strict=False)]
        whole = (sum(nats for nats, _ in bins), sum(tokens for _, tokens in bins))
        return {"perplexity": whole, **{bin_name(edges, number): pair for number, pair in enumerate(bins)}}

    def aggregation(self) -> dict[str, Callable[[Sequence[tuple[float, int]]], float]]:
        return {"perplexity": _perplexity, **dict.fromkeys(self._names(), _mean)}

    def higher_is_better(self) -> dict[str, bool]:
        return {"perplexity": False, **dict.fromkeys(self._names(), False)}
