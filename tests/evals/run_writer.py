"""Writes directories of evaluation runs in the form of `evals.harness`, for tests of what reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwench.evals.run_files import sample_file_name

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def choice_sample(number: int, question: str, logprobs: Sequence[float], right: int, **changes: Any) -> dict[str, Any]:
    texts = [f" {letter}" for letter in "ABCD"[: len(logprobs)]]
    taken = max(range(len(logprobs)), key=lambda at: logprobs[at])
    return {
        "id": number,
        "doc": {"question": question, "answer": right},
        "prompt": f"{question}\nAnswer:",
        "choices": [
            {"text": text, "logprob": value, "greedy": at == taken}
            for at, (text, value) in enumerate(zip(texts, logprobs, strict=True))
        ],
        "target": texts[right],
        "metrics": {"acc": float(taken == right)},
    } | changes


def answer_sample(number: int, question: str, answer: str, target: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "doc": {"question": question, "answer": target},
        "prompt": f"Question: {question}\nAnswer:",
        "response": [answer],
        "extracted": answer.split()[-1] if answer.split() else "",
        "target": target,
        "metrics": {"exact_match": float(answer.split()[-1:] == [target])},
    } | changes


def write_run(
    path: Path,
    samples: Samples,
    *,
    model: str = "tiny",
    groups: Mapping[str, Sequence[str]] | None = None,
    setting: Mapping[str, Any] | None = None,
    **results: Any,
) -> Path:
    """Means of the samples' metrics as scores; `groups` are weighted by size. `setting` is added to every task's."""
    (path / "samples").mkdir(parents=True, exist_ok=True)
    tasks: dict[str, Any] = {}
    for name, records in samples.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (path / "samples" / sample_file_name(name)).write_text("\n".join(lines) + "\n", encoding="utf-8")
        metrics = {}
        for metric in records[0]["metrics"]:
            values = [record["metrics"][metric] for record in records]
            mean = math.fsum(values) / len(values)
            spread = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
            metrics[metric] = {
                "value": mean, "stderr": math.sqrt(spread / len(values)), "n": len(values), "filter": "none",
                "higher_is_better": True,
            }  # fmt: skip
        tasks[name] = {
            "alias": name, "group": False, "subtasks": [], "metrics": metrics, "primary": next(iter(metrics)),
            "n": len(records), "seconds": 1.5, "tokens_per_second": 800.0, "tokens": {"prompt": 900, "generated": 300},
            "setting": {
                "task": name, "num_fewshot": 0, "prompt_digest": "0" * 64, "chat": False, "chat_template": None,
                "system": None, "stop": ["\n"], "extraction": "the answer as it is", "generation": {"temperature": 0.0},
                "seed": 1234,
            } | dict(setting or {}),
        }  # fmt: skip
    for name, members in (groups or {}).items():
        metric = next(iter(tasks[members[0]]["metrics"]))
        counts = [tasks[member]["n"] for member in members]
        mean = sum(tasks[m]["metrics"][metric]["value"] * n for m, n in zip(members, counts, strict=True)) / sum(counts)
        tasks[name] = {
            "alias": name, "group": True, "subtasks": list(members), "n": sum(counts), "primary": metric, "tokens": {},
            "metrics": {metric: {"value": mean, "stderr": None, "n": sum(counts), "higher_is_better": True}},
        }  # fmt: skip
    whole = {
        "model": {"name": model, "hash": f"sha256:{model}"}, "engine": {"name": "qwench", "dtype": "float32"},
        "machine": {"cpu": "a processor"}, "tasks": tasks, "preset": None, "command": "qwench eval",
        "commit": "0123abc", "started": "2026-11-22T10:00:00+00:00", "seconds": 3.0, "limit": None, "seed": 1234,
        "skipped": {}, "complete": True,
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps(whole | results), encoding="utf-8")
    return path
