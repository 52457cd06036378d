"""Shards written from known documents, and a real tokenizer of a few hundred ids."""

from pathlib import Path

import numpy as np
import pytest

from qwench.data.shards import ShardWriter, TokenShards
from qwench.tokenizer import Tokenizer, train

EOD = 0


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the quick brown fox jumps over the lazy dog. ", "def add(a, b):\n    return a + b\n", "你好，世界。"]
    return train([text * 5 for text in texts], 300)


@pytest.fixture
def make_shards(tmp_path: Path):
    """Write documents (arrays with their closing EOD) and open them again."""

    def make(documents, name="shards", shard_tokens=50, vocab_size=1000) -> TokenShards:
        directory = tmp_path / name
        with ShardWriter(
            directory, tokenizer_fingerprint="f" * 64, vocab_size=vocab_size, shard_tokens=shard_tokens
        ) as writer:
            for document in documents:
                writer.add(np.asarray(document))
        return TokenShards.open(directory)

    return make
