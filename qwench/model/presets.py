"""Every published size by name: `preset("qwen2.5-0.5b")`, `preset("qwen2.5-0.5b-instruct")`, `preset("qwen-7b-chat")`.

One TOML file a size lies in `presets/`; a table `[instruct]` or `[chat]` in it holds what the tuned model changes.
They hold dimensions, not weights. Sources are at the top of each file; "unconfirmed" marks second-hand values.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from qwench.config import from_dict, merge, read_toml
from qwench.model.config import ModelConfig

PRESETS = Path(__file__).parent / "presets"
_TUNED = ("instruct", "chat")


def preset_names() -> list[str]:
    """All names, sorted."""
    return sorted(_tables())


def preset(name: str) -> ModelConfig:
    """The dimensions of a published model; upper and lower case are the same. Raises ValueError naming the nearest."""
    tables = _tables()
    key = name.lower()
    if key not in tables:
        near = difflib.get_close_matches(key, tables, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(tables))}"
        raise ValueError(f"no preset {name!r}; {hint}")
    return from_dict(ModelConfig, tables[key])


@cache
def _tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for path in PRESETS.glob("*.toml"):
        table = read_toml(path)
        tuned = {key: table.pop(key) for key in _TUNED if key in table}
        tables[path.stem] = table
        tables |= {f"{path.stem}-{key}": merge(table, changes) for key, changes in tuned.items()}
    return tables
