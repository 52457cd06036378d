"""Generation. `Engine` is the front door: a model and its tokenizer, opened by path, that continue prompts."""

from qwench.engine.engine import Engine

__all__ = ["Engine"]
