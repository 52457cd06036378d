"""Grammar compilers: of the tiny vocabulary, and of the real one where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwench.engine.grammar import GrammarCompiler
from qwench.tokenizer import Tokenizer

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
RANKS = ASSETS / "qwen.tiktoken"
EXTRA_ROWS = 75


@pytest.fixture(scope="module")
def compiler(tiny_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size + EXTRA_ROWS)


@pytest.fixture(scope="module")
def real() -> GrammarCompiler:
    if not RANKS.exists():
        pytest.skip(f"no {RANKS.name} in QWENCH_ASSETS ({ASSETS})")
    return GrammarCompiler(Tokenizer.load(RANKS), 151_936)
