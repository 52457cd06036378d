"""The mini-suite for a model in memory, as it is being trained: `mini.every=500` in a recipe calls `mini_suite`.

Training and evaluation do not import each other, and neither knows the engine; they meet here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwench.engine import Engine
from qwench.engine.config import EngineConfig
from qwench.evals import mini
from qwench.model.decoder import CausalLM
from qwench.tokenizer import Tokenizer

MAX_LEN = 2048
CACHE_TOKENS = 16 * MAX_LEN
"""Few, as the cache stands beside gradients and the optimiser's state."""


def mini_suite(
    model: CausalLM | Engine, tokenizer: Tokenizer, data_dirs: Sequence[Path], seconds: float = 60
) -> dict[str, float]:
    """Scores of `model` as it is now, by task; see `evals.mini`. Its weights are used where they are, not copied.

    Raises ValueError where no task has its data, or the cache does not fit.
    """
    if isinstance(model, Engine):
        return mini.mini_suite(model, data_dirs, seconds)
    settings = EngineConfig(
        max_len=min(MAX_LEN, model.config.max_position_embeddings),
        cache_tokens=CACHE_TOKENS,
        max_seqs=16,
        max_step_tokens=4096,
        cuda_graphs=False,  # recording them would take longer than they save in a minute
    )
    with Engine(model, tokenizer=tokenizer, config=settings) as engine:
        return mini.mini_suite(engine, data_dirs, seconds)
