"""Where the time of a step goes: some steps under torch.profiler, every moment given to one category.

    profile = StepProfile(first_step=10, last_step=12, run=path, device=device)
    profile.begin(10); ...; profile.end(10, flops)       # around every step
    profile.result                                        # after the last of them; also RUN/profile.json

On a GPU the moments come from its own timeline (kernels, copies), on a CPU from the innermost operation that runs. When
two things run at once, the moment belongs to the one that computes: "communication" is only what nothing hides. What is
left is idle: on a GPU nothing to do, on a CPU Python and torch's bookkeeping. So the shares add up to one.

`missing` says where the distance to the measured rate of matrix products goes: the time of products and of attention
beyond what their FLOPs would take at that rate, and all the time of the rest. It adds up to 1 - mfu_of_gemm.

The trace (RUN/profile.trace.json.gz) opens in https://ui.perfetto.dev. The profiler costs host time, and the device is
waited for before the first and after the last step, so the steps are a little slower than others.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwench.run import console, write_atomically

log = logging.getLogger("qwench.train")

Interval = tuple[float, float, str]
"""Begin and end in microseconds, category."""

STEP = "qwench step"
NUM_STEPS = 3
CATEGORIES = (
    "matrix products",
    "attention",
    "loss",
    "norms and elementwise",
    "optimiser",
    "copies",
    "communication",
    "idle",
)
"""In the order in which they win a moment that several have."""

_OPTIMISER_RANGE = re.compile(r"^Optimizer\.step#")
_GPU_NAMES = (
    ("communication", re.compile(r"nccl|nvshmem|symm_mem|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE)),
    ("optimiser", re.compile(r"multi_tensor_apply|adam", re.IGNORECASE)),
    ("loss", re.compile(r"cross_entropy|softmax|nll_loss|logsumexp", re.IGNORECASE)),
    ("norms and elementwise", re.compile(r"^triton_(poi|red|per|for)_")),
    (
        "matrix products",
        re.compile(r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_tem|_mm_|matmul", re.IGNORECASE),
    ),
    ("copies", re.compile(r"memcpy|memset|copy|CatArray|chunk_cat|fill", re.IGNORECASE)),
)
_CPU_NAMES = (
    ("communication", re.compile(r"^c10d|^gloo|nccl|record_param_comms|functional_collectives", re.IGNORECASE)),
    ("attention", re.compile(r"attention|flash", re.IGNORECASE)),
    ("loss", re.compile(r"cross_entropy|softmax|nll_loss|logsumexp", re.IGNORECASE)),
    (
        "matrix products",
        re.compile(r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|dot|mv|_scaled_mm)|gemm|mkldnn_linear"),
    ),
    ("copies", re.compile(r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|pin_memory)$")),
    ("norms and elementwise", re.compile(r"^(aten|qwench|prims)::")),
)
_WHOLE = ("attention", "optimiser", "communication")
"""On a CPU, operations called by one of these belong to it."""


# ------------------------------------------------------------------------------------------------------ classification
def gpu_category(name: str, in_optimiser: bool) -> str:
    """The category of a kernel or copy by its name, and by whether the optimiser launched it."""
    for category, pattern in _GPU_NAMES:
        if pattern.search(name):
            return "optimiser" if in_optimiser and category != "communication" else category
    return "optimiser" if in_optimiser else "norms and elementwise"


def cpu_category(name: str, above: str | None) -> str | None:
    """The category of an operation inside one of category `above`; None for what only calls others."""
    if above in _WHOLE:
        return above
    for category, pattern in _CPU_NAMES:
        if pattern.search(name):
            return above if category in ("norms and elementwise", "copies") and above == "matrix products" else category
    return above


@dataclass(frozen=True, slots=True)
class Busy:
    """What the device did: intervals with categories, and the same by name."""

    intervals: list[Interval]
    names: list[str]


def read_trace(events: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[float, float]], Busy]:
    """The windows of the steps and what ran, from a chrome trace's events."""
    spans = [event for event in events if event.get("ph") == "X"]
    windows = [_extent(event) for event in spans if event.get("cat") == "user_annotation" and event["name"] == STEP]
    on_gpu = any(event.get("cat") == "kernel" for event in spans)
    return sorted(windows), (_gpu_busy(spans) if on_gpu else _cpu_busy(spans))


def _extent(event: Mapping[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


def _gpu_busy(spans: Sequence[Mapping[str, Any]]) -> Busy:
    optimising: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    launched: dict[Any, tuple[Any, float]] = {}
    for event in spans:
        if event.get("cat") == "user_annotation" and _OPTIMISER_RANGE.match(event["name"]):
            optimising[event.get("tid")].append(_extent(event))
        elif event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
            launched[event["args"]["correlation"]] = (event.get("tid"), float(event["ts"]))
    busy = Busy([], [])
    for event in spans:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        thread, at = launched.get(event.get("args", {}).get("correlation"), (None, 0.0))
        inside = any(begin <= at <= end for begin, end in optimising.get(thread, ()))
        busy.intervals.append((*_extent(event), gpu_category(event["name"], inside)))
        busy.names.append(event["name"])
    return busy


def _cpu_busy(spans: Sequence[Mapping[str, Any]]) -> Busy:
    """The time that each operation runs itself, without those that it calls."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in spans:
        optimiser = event.get("cat") == "user_annotation" and _OPTIMISER_RANGE.match(event["name"])
        if event.get("cat") == "cpu_op" or optimiser:
            threads[event.get("tid")].append(event)
    busy = Busy([], [])

    def ran(begin: float, end: float, category: str | None, name: str) -> None:
        if end > begin and category is not None:
            busy.intervals.append((begin, end, category))
            busy.names.append(name)

    for events in threads.values():
        open_: list[tuple[float, str | None, str]] = []  # end, category, name
        at = 0.0
        for event in sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
            begin, end = _extent(event)
            while open_ and open_[-1][0] <= begin:
                ran(at, open_[-1][0], *open_[-1][1:])
                at = open_.pop()[0]
            above = open_[-1][1] if open_ else None
            if open_:
                ran(at, begin, *open_[-1][1:])
            optimiser = _OPTIMISER_RANGE.match(event["name"])
            open_.append((end, "optimiser" if optimiser else cpu_category(event["name"], above), event["name"]))
            at = begin
        while open_:
            ran(at, open_[-1][0], *open_[-1][1:])
            at = open_.pop()[0]
    return busy


def shares_of_time(intervals: Iterable[Interval], windows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The share of each category in the windows' time; they add up to 1."""
    total = sum(end - begin for begin, end in windows)
    spent: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    edges: list[tuple[float, int, int]] = []
    for begin, end, category in _within(intervals, windows):
        place = CATEGORIES.index(category)
        edges += [(begin, 1, place), (end, -1, place)]
    running, before = [0] * len(CATEGORIES), 0.0
    for at, change, place in sorted(edges):
        winner = next((number for number, count in enumerate(running) if count), None)
        if winner is not None:
            spent[CATEGORIES[winner]] += at - before
        running[place] += change
        before = at
    spent["idle"] = max(0.0, total - sum(spent.values()))
    return {category: time / total for category, time in spent.items()} if total else spent


def _within(intervals: Iterable[Interval], windows: Sequence[tuple[float, float]]) -> Iterator[Interval]:
    for begin, end, category in intervals:
        for low, high in windows:
            if begin < high and end > low:
                yield max(begin, low), min(end, high), category


def missing_shares(shares: Mapping[str, float], products: float, attention: float) -> dict[str, float]:
    """Where the rest of the time goes, given the shares that the FLOPs of products and attention would need at best."""
    missing = {name: share for name, share in shares.items()}
    missing["matrix products"] -= products
    missing["attention"] -= attention
    return missing


def largest(busy: Busy, windows: Sequence[tuple[float, float]], number: int = 25) -> list[dict[str, Any]]:
    """What ran longest, by name."""
    total = sum(end - begin for begin, end in windows)
    table: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for (begin, end, category), name in zip(busy.intervals, busy.names, strict=True):
        if inside := list(_within([(begin, end, category)], windows)):
            entry = table[name, category]
            entry[0] += sum(high - low for low, high, _ in inside)
            entry[1] += 1
    ordered = sorted(table.items(), key=lambda item: -item[1][0])[:number]
    return [
        {"name": name, "category": category, "share": time / total, "ms": time / 1e3 / len(windows), "calls": count}
        for (name, category), (time, count) in ordered
    ]


# ----------------------------------------------------------------------------------------------------------- recording
@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What MFU refers to on one device, in FLOP/s."""

    datasheet: float
    datasheet_source: str
    products: float
    """Measured, sustained matrix products."""


class StepProfile:
    """Records some steps of a run on this rank; a profiler that fails costs a warning, never the run."""

    def __init__(self, *, first_step: int, last_step: int, run: Path, device: torch.device, rates: Rates) -> None:
        self.first_step, self.last_step = first_step, last_step
        self.run, self.device, self.rates = run, device, rates
        self.result: dict[str, Any] | None = None
        self._profiler: Any = None
        self._step: Any = None
        self._flops: list[tuple[float, float]] = []
        self._over = False

    def begin(self, step: int) -> None:
        """Before a step. The one before the first warms the profiler up."""
        if self._over or not self.first_step - 1 <= step <= self.last_step:
            return
        with self._guarded():
            if self._profiler is None and (step == self.first_step - 1 or step == self.first_step):
                self._profiler = self._start(warm_up=step < self.first_step)
            if self._profiler is not None and step >= self.first_step:
                if step == self.first_step:
                    self._wait()
                self._step = torch.profiler.record_function(STEP)
                self._step.__enter__()

    def end(self, step: int, product_flops: float, attention_flops: float) -> None:
        """After a step, with the FLOPs that this device's share of it needs."""
        if self._profiler is None or self._over:
            return
        with self._guarded():
            if self._step is not None:
                if step == self.last_step:
                    self._wait()
                self._step.__exit__(None, None, None)
                self._step = None
                self._flops.append((product_flops, attention_flops))
            if step == self.last_step:
                self._over = True
                self._profiler.stop()
                self._read()
            else:
                self._profiler.step()

    def _start(self, *, warm_up: bool) -> Any:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=NUM_STEPS + 1) if warm_up else None
        profiler = torch.profiler.profile(activities=kinds, schedule=schedule)
        profiler.start()
        return profiler

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _guarded(self) -> _Guarded:
        return _Guarded(self)

    def close(self) -> None:
        """At the end of the run, which may have come before the profile's."""
        if self._profiler is not None and not self._over:
            self._over = True
            with self._guarded():
                self._profiler.stop()

    def give_up(self, error: Exception) -> None:
        self._over = True
        log.warning("the profile of steps %d to %d failed", self.first_step, self.last_step, exc_info=error)
        console.print("[yellow]warning[/]: the profile failed; the log says why")

    def _read(self) -> None:
        plain, path = self.run / "profile.trace.json", self.run / "profile.trace.json.gz"
        self._profiler.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        path.write_bytes(gzip.compress(content, 5))
        plain.unlink()
        windows, busy = read_trace(json.loads(content)["traceEvents"])
        seconds = sum(end - begin for begin, end in windows) / 1e6
        products, attention = (sum(flops) for flops in zip(*self._flops, strict=True))
        shares = shares_of_time(busy.intervals, windows)
        at_best = [flops / seconds / self.rates.products for flops in (products, attention)]
        self.result = {
            "first_step": self.first_step,
            "steps": len(windows),
            "seconds_per_step": seconds / len(windows),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "flops_per_step": (products + attention) / len(windows),
            "peak_flops": {"value": self.rates.datasheet, "source": self.rates.datasheet_source},
            "gemm_flops": self.rates.products,
            "mfu": (products + attention) / seconds / self.rates.datasheet,
            "mfu_of_gemm": sum(at_best),
            "shares": shares,
            "missing": missing_shares(shares, *at_best),
            "largest": largest(busy, windows),
        }
        write_atomically(self.run / "profile.json", json.dumps(self.result, indent=1) + "\n")
        line = summary(self.result)
        log.info("%s", line)
        console.print(line, highlight=False)


class _Guarded:
    """A profiler's error ends the profile, not the run."""

    def __init__(self, profile: StepProfile) -> None:
        self.profile = profile

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.profile.give_up(error)
            return True
        return False


def summary(result: Mapping[str, Any]) -> str:
    """One line: MFU by both measures, and what the time beyond the FLOPs at the measured rate goes to."""
    missing = sorted(result["missing"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {share:.1%}" for name, share in missing if abs(share) >= 0.0005)
    last = result["first_step"] + result["steps"] - 1
    return (
        f"profile of steps {result['first_step']} to {last}: MFU {result['mfu']:.1%} of the "
        f"{'datasheet' if 'datasheet' in result['peak_flops']['source'] else 'measured'} rate, "
        f"{result['mfu_of_gemm']:.1%} of the sustained rate of matrix products; missing: {parts}"
    )
