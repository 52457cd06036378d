"""Several directories of token shards as one stream that knows where each token is from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwench.data.packing import PretrainDataset
from qwench.data.shards import ShardWriter, TokenShards
from qwench.data.sources import JoinedShards, names_of


def write(directory: Path, first: int, num_documents: int, tokenizer: str = "a" * 64) -> Path:
    """Documents of 3, 4, 5, ... tokens, numbered from `first` on through all of them, in shards of some documents."""
    with ShardWriter(directory, tokenizer_fingerprint=tokenizer, vocab_size=1000, shard_tokens=20) as writer:
        for length in range(3, 3 + num_documents):
            writer.add(np.arange(first, first + length))
            first += length
    return directory


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "web", 0, 8), write(tmp_path / "code", 500, 5)]


def test_one_stream(directories: list[Path]) -> None:
    parts = [TokenShards.open(directory) for directory in directories]
    joined = JoinedShards.open(directories, "a" * 64)
    assert joined.names == ("web", "code")
    assert joined.num_tokens == sum(part.num_tokens for part in parts)
    assert joined.num_documents == 13
    starts, lengths = joined.document_spans(np.array([12, 0, 8, 7]))
    documents = [joined.tokens(int(s), int(s + n)).tolist() for s, n in zip(starts, lengths, strict=True)]
    assert documents == [
        [*range(518, 525)], [0, 1, 2], [500, 501, 502], [*range(42, 52)],
    ]  # fmt: skip
    assert [joined.source_of(int(start)) for start in starts] == [1, 0, 1, 0]
    joined.verify()


def test_rows_know_their_sources(directories: list[Path]) -> None:
    """Every token of an epoch comes once, from the directory that it says."""
    dataset = PretrainDataset(JoinedShards.open(directories), 7, seed=3)
    assert dataset.source_names == ("web", "code")
    rows = [dataset.row(1, index) for index in range(dataset.num_rows)]
    for row in rows:
        assert row.sources is not None
        assert row.sources.tolist() == [int(token >= 500) for token in row.tokens]
    tokens = np.concatenate([row.tokens for row in rows])
    assert len(set(tokens.tolist())) == len(tokens) == dataset.num_rows * 7


def test_one_directory_is_what_it_was(directories: list[Path]) -> None:
    """The same rows and fingerprint, so that runs of earlier versions go on."""
    plain = PretrainDataset(TokenShards.open(directories[0]), 7)
    joined = PretrainDataset(JoinedShards.open(directories[:1]), 7)
    assert joined.fingerprint == plain.fingerprint
    assert joined.source_names == ()
    assert joined.row(0, 2).sources is None
    assert np.array_equal(joined.row(0, 2).tokens, plain.row(0, 2).tokens)
    both = [PretrainDataset(JoinedShards.open(order), 7).fingerprint for order in (directories, directories[::-1])]
    assert len({*both, plain.fingerprint}) == 3


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of([tmp_path / "a/train", tmp_path / "b/train"]) == ["a/train", "b/train"]
    assert names_of([tmp_path / "a/train", tmp_path / "b/web"]) == ["train", "web"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="given twice"):
        names_of([Path("web"), tmp_path / "web"])


def test_refusals(directories: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", 0, 3, tokenizer="b" * 64)
    with pytest.raises(ValueError, match=r"web and .*other were made with different tokenizers"):
        JoinedShards.open([directories[0], other])
    with pytest.raises(ValueError, match="one directory at least"):
        JoinedShards.open([])
    with pytest.raises(ValueError, match="too few for one row"):
        PretrainDataset(JoinedShards.open(directories), 1000)
