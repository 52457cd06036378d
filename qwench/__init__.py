"""qwench: the Qwen recipe as software. The names below are loaded on first use, so that importing qwench is instant."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwench.engine import Engine
    from qwench.model.load import load_model
    from qwench.tokenizer import Tokenizer
    from qwench.types import Completion, Message, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "load_model": "qwench.model.load",
    "Tokenizer": "qwench.tokenizer",
    "Engine": "qwench.engine",
    "SamplingParams": "qwench.types",
    "Completion": "qwench.types",
    "Message": "qwench.types",
}

__all__ = ["Completion", "Engine", "Message", "SamplingParams", "Tokenizer", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qwench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
