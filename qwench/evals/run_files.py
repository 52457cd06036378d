"""The directory of an evaluation run, read: results and samples, as `harness` writes them. No torch, no lm-eval."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = "results.json"
Sample = dict[str, Any]


def is_eval_run(path: Path) -> bool:
    return (path / RESULTS).is_file()


def document_digest(doc: Any) -> str:
    """A short name of a document's content."""
    data = json.dumps(doc, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sample_file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in task) + ".jsonl"


@dataclass
class EvalRun:
    """One run: `EvalRun.open(Path("evals/0.5b")).tasks["gsm8k"]["metrics"]`."""

    path: Path
    results: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    """What was wrong with files that were read."""

    @classmethod
    def open(cls, path: Path) -> EvalRun:
        """Raises ValueError for a directory that holds no evaluation."""
        file = path / RESULTS
        if not file.is_file():
            raise ValueError(f"{path} has no {RESULTS}; give the directory that qwench eval wrote (its --out)")
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            tasks = results["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not what qwench eval writes ({error!r}); run the evaluation again") from None
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError(f"{file} has no finished task yet")
        return cls(path, results)

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.results["tasks"]

    @property
    def name(self) -> str:
        """The model's name, else the directory's."""
        return str((self.results.get("model") or {}).get("name") or self.path.resolve().name)

    def leaves(self) -> list[str]:
        """Tasks that have samples: no groups."""
        return [name for name, entry in self.tasks.items() if not entry.get("group")]

    def members(self, task: str) -> list[str]:
        """The leaves below a group, or the task itself."""
        entry = self.tasks[task]
        return list(entry.get("subtasks", ())) if entry.get("group") else [task]

    def samples(self, task: str) -> Iterator[Sample]:
        """One by one; a line that is none is left out and noted."""
        path = self.path / "samples" / sample_file_name(task)
        if not path.is_file():
            self.notes.append(f"{task}: no samples at {path}")
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    sample = json.loads(line)
                    if "id" not in sample or not isinstance(sample["metrics"], dict):
                        raise ValueError
                except (ValueError, KeyError, TypeError):
                    self.notes.append(f"{task}: line {number} of {path.name} is no sample and was left out")
                    continue
                yield sample


def main_metric(entry: Mapping[str, Any]) -> str | None:
    """The metric that stands for a task."""
    metrics = entry.get("metrics") or {}
    chosen = entry.get("primary")
    return chosen if chosen in metrics else next(iter(metrics), None)


def question(doc: Any, prompt: Any = "") -> str:
    """One line by which a person knows a document again."""
    if isinstance(doc, Mapping):
        for name in ("question", "problem", "Question", "query", "input", "text", "goal", "ctx", "sentence", "prompt",
                     "Problem", "Body", "code", "turns", "instruction"):  # fmt: skip
            value = doc.get(name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = next((item for item in value if isinstance(item, str)), None)
            if isinstance(value, str) and value.strip():
                return " ".join(value.split())[:200]
    return " ".join(str(prompt)[-400:].split())[-200:]
