"""Runs a list of stages in order, once: a finished stage leaves its results in OUT/stages/ and is not run again.

A stage is data: its name, what it does, how long it should take, and a function from the context to its results. A
stage runs again when the part of the configuration that it reads has changed, or when an earlier stage has run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qwench.config import to_dict
from qwench.demo.config import DemoConfig
from qwench.run import console, write_atomically

Results = dict[str, Any]


@dataclasses.dataclass(slots=True)
class Context:
    """What stages share: the configuration and the results of the stages before."""

    cfg: DemoConfig
    results: dict[str, Results] = dataclasses.field(default_factory=dict)

    def path(self, *parts: str) -> Path:
        return self.cfg.out.joinpath(*parts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    title: str
    reads: tuple[str, ...]
    """Dotted keys of DemoConfig that this stage depends on."""
    estimate: Callable[[DemoConfig], float]
    """Seconds that it should take on this machine."""
    run: Callable[[Context], Results]
    command: Callable[[DemoConfig], str] = lambda cfg: ""
    """The same step as a command of its own, where there is one."""


def fingerprint(stage: Stage, cfg: DemoConfig, before: str) -> str:
    table = to_dict(cfg)
    values = []
    for key in stage.reads:
        value: Any = table
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values.append(value)
    return hashlib.sha256(json.dumps([before, stage.name, values], sort_keys=True).encode()).hexdigest()[:16]


def run_stages(stages: Sequence[Stage], cfg: DemoConfig) -> Context:
    """Run what is not done yet, telling before it starts how long everything should take."""
    context = Context(cfg)
    marks = _fingerprints(stages, cfg)
    pending = [stage for stage in stages if _finished(context, stage, marks[stage.name]) is None]
    _announce(stages, pending, cfg)
    rerun = False
    for number, stage in enumerate(stages, 1):
        done = None if rerun else _finished(context, stage, marks[stage.name])
        if done is not None:
            context.results[stage.name] = done
            continue
        rerun = True
        console.print(f"[bold]{number}/{len(stages)} {stage.title}[/]")
        started = time.perf_counter()
        results = stage.run(context)
        results["seconds"] = round(time.perf_counter() - started, 2)
        context.results[stage.name] = results
        context.path("stages").mkdir(parents=True, exist_ok=True)
        record = {"fingerprint": marks[stage.name], "results": results}
        write_atomically(_mark(context, stage), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        console.print(f"  {results.get('summary', 'done')} [dim]({results['seconds']:.1f} s)[/]")
    return context


def _fingerprints(stages: Sequence[Stage], cfg: DemoConfig) -> dict[str, str]:
    marks, before = {}, ""
    for stage in stages:
        before = marks[stage.name] = fingerprint(stage, cfg, before)
    return marks


def _mark(context: Context, stage: Stage) -> Path:
    return context.path("stages", f"{stage.name}.json")


def _finished(context: Context, stage: Stage, mark: str) -> Results | None:
    try:
        record = json.loads(_mark(context, stage).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return record["results"] if record.get("fingerprint") == mark else None


def _announce(stages: Sequence[Stage], pending: Sequence[Stage], cfg: DemoConfig) -> None:
    table = Table(title="qwench demo", title_justify="left")
    table.add_column("stage")
    table.add_column("expected", justify="right")
    total = 0.0
    for number, stage in enumerate(stages, 1):
        if stage in pending:
            seconds = stage.estimate(cfg)
            total += seconds
            table.add_row(f"{number} {stage.title}", f"{seconds:.0f} s")
        else:
            table.add_row(f"{number} {stage.title}", "finished before")
    table.add_section()
    table.add_row("total", f"{total / 60:.1f} min")
    console.print(table)
