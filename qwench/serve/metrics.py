"""Figures for Prometheus: what the HTTP side counts, and the engine's own counters read at each scrape."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from qwench.engine.engine import EngineStats

TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
FIRST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES = {
    "num_running": ("qwench_sequences_running", "Answers that the engine works on"),
    "num_waiting": ("qwench_sequences_waiting", "Answers that wait for a place in the engine"),
    "num_blocks": ("qwench_cache_blocks", "Blocks of the key/value cache"),
    "num_free_blocks": ("qwench_cache_blocks_free", "Blocks of the key/value cache that are free"),
}
COUNTERS = {
    "prompt_tokens": ("qwench_prompt_tokens", "Prompt tokens of all requests"),
    "cached_prompt_tokens": ("qwench_cached_prompt_tokens", "Prompt tokens that were found in the cache"),
    "generated_tokens": ("qwench_generated_tokens", "Tokens drawn"),
    "num_preemptions": ("qwench_preemptions", "Sequences put back because the cache was full"),
    "draft_tokens": ("qwench_draft_tokens", "Tokens proposed by speculative decoding"),
    "accepted_draft_tokens": ("qwench_accepted_draft_tokens", "Proposed tokens that were accepted"),
}


class Metrics:
    """All figures of one server, in a registry of its own."""

    def __init__(self, read_engine: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(read_engine))
        self.requests = Counter(
            "qwench_http_requests",
            "Requests by route and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "qwench_request_seconds", "From the request's arrival to the end of its answer", ["route"],
            buckets=REQUEST_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token_seconds = Seconds(
            "qwench_time_to_first_token_seconds", "From the request's arrival to the first token of an answer",
            FIRST_SECONDS,
        )  # fmt: skip
        self.inter_token_seconds = Seconds(
            "qwench_inter_token_seconds",
            "Time between two steps of an answer, divided by the tokens of the later one; one value a step",
            TOKEN_SECONDS,
        )
        self.registry.register(self.first_token_seconds)
        self.registry.register(self.inter_token_seconds)

    def request_done(self, route: str, method: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        self.requests.labels(route, known, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Seconds(Collector):
    """A histogram for what happens with every token: prometheus_client's own takes several microseconds a value.

    Values come from one thread, the event loop's, which is also where they are read.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self.counts = [0] * (len(bounds) + 1)
        """Values up to each bound and above the one before; the last for those above all."""
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def describe(self) -> Iterator[Metric]:
        return iter((HistogramMetricFamily(self.name, self.text),))

    def collect(self) -> Iterator[Metric]:
        names = [floatToGoString(bound) for bound in (*self.bounds, inf)]
        yield HistogramMetricFamily(
            self.name, self.text, list(zip(names, itertools.accumulate(self.counts), strict=True)), self.total
        )


class _EngineFigures(Collector):
    def __init__(self, read: Callable[[], EngineStats]) -> None:
        self.read = read

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not ask the engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self.read()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
