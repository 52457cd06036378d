"""Generation. `Engine` is the front door: a model and its tokenizer, opened by path, that continue prompts."""

from qwench.engine.config import EngineConfig
from qwench.engine.engine import Engine, EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats"]
