"""Presets: the settings with which published scores were measured, and the scores, as TOML files beside this module.

    base = "qwen2.5-instruct"              # tasks and figures of another preset come first
    about = "..."
    [tasks.gsm8k]                          # the name on the command line and in the results
    task = "gsm8k_instruct"                # lm-eval's task, or one of ours
    chat, system, num_fewshot, metric      # as in harness.Item
    note = "..."                           # how the setting differs from the published one
    [tasks.gsm8k.override]                 # fields of the task's YAML file
    [published."Qwen2.5-7B-Instruct"]
    gsm8k = 91.6
    [relatives]                            # whose figure stands where the model's own was not published
    "Qwen2.5-Coder-7B-Instruct" = ["Qwen2.5-7B-Instruct"]

A text "function:module.name" in an override is that function.
"""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qwench.evals.harness import Item

PRESETS = Path(__file__).parent / "presets"
TASK_KEYS = {"task", "chat", "system", "multiturn", "num_fewshot", "metric", "note", "override"}
KEYS = {"base", "about", "source", "tasks", "published", "relatives"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    name: str
    about: str
    source: str
    tasks: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Mapping[str, float]]
    relatives: Mapping[str, list[str]] = field(default_factory=dict)

    def item(self, label: str) -> Item:
        """A task of this preset, ready to run."""
        task = self.tasks[label]
        return Item(
            task=task["task"],
            label=label,
            chat=task.get("chat"),
            system=task.get("system"),
            multiturn=task.get("multiturn", True),
            num_fewshot=task.get("num_fewshot"),
            overrides=_with_functions(task.get("override", {})),
            metric=task.get("metric", ""),
        )

    def model_named(self, name: str) -> str | None:
        """The published model that a file, directory or hub id is: the longest name that occurs in it."""
        plain = name.lower().replace("_", "-")
        found = [known for known in {*self.published, *self.relatives} if known.lower() in plain]
        return max(found, key=len, default=None)

    def figure(self, label: str, model: str) -> dict[str, Any] | None:
        """The published score of a task for a model, or of its nearest relative that has one."""
        for place, name in enumerate([model, *self.relatives.get(model, [])]):
            if label in self.published.get(name, {}):
                told = {"value": self.published[name][label], "model": name, "same_model": place == 0}
                note = self.tasks.get(label, {}).get("note", "")
                return {**told, "preset": self.name, "source": self.source, "note": note}
        return None


def names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


@cache
def load(name: str) -> Preset:
    """A preset by name, or a file of one's own. Raises ValueError."""
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"there is no preset {name!r}; {hint}")
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if unknown := sorted(set(text) - KEYS):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    tasks, published, relatives = {}, {}, {}
    about, source = "", ""
    if "base" in text:
        base = load(text["base"])
        tasks, published, relatives = dict(base.tasks), dict(base.published), dict(base.relatives)
        about, source = base.about, base.source
    for label, task in text.get("tasks", {}).items():
        if unknown := sorted(set(task) - TASK_KEYS):
            raise ValueError(
                f"{path}: tasks.{label} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(TASK_KEYS))}"
            )
        if "task" not in task:
            raise ValueError(f'{path}: tasks.{label} does not say which task it runs; add task = "..."')
        tasks[label] = task
    for model, figures in text.get("published", {}).items():
        published[model] = {**published.get(model, {}), **figures}
    return Preset(
        name=path.stem,
        about=text.get("about", about),
        source=text.get("source", source),
        tasks=tasks,
        published=published,
        relatives={**relatives, **text.get("relatives", {})},
    )


def of_model(name: str) -> Preset | None:
    """The preset that has published figures of a model, by the model's name."""
    found = [(preset, model) for preset in map(load, names()) if (model := preset.model_named(name))]
    own = [(preset, model) for preset, model in found if model in preset.published]
    return max(own or found, key=lambda pair: len(pair[1]))[0] if found else None


def _with_functions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_functions(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_functions(inner) for inner in value]
    if isinstance(value, str) and value.startswith("function:"):
        module, _, name = value.removeprefix("function:").rpartition(".")
        return getattr(importlib.import_module(module), name)
    return value
