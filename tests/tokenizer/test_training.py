"""Training: Qwen's layout, determinism, and clear words where a corpus is too small."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

from qwench.tokenizer import bpe, train
from qwench.tokenizer.train import read_blocks


def test_layout(small) -> None:
    tokens = small.vocabulary.tokens
    assert (tokens[197], tokens[198]) == (b"\t", b"\n")
    assert (tokens[220], tokens[0], tokens[187]) == (b" ", b"!", b"\xff")
    assert small.vocab_size == 1500
    assert small.num_regular == 1500 - 22
    assert small.special_ids["<|endoftext|>"] == small.num_regular
    assert len(small.encode("def __init__(self):")) < 10  # something was learnt


def test_digits_stay_single(small) -> None:
    assert not [token for token in small.vocabulary.tokens if len(token) > 1 and any(48 <= byte < 58 for byte in token)]
    assert len(small.encode("2024")) == 4


def test_the_same_corpus_gives_the_same_vocabulary(library_texts: list[str]) -> None:
    texts = library_texts[:3]
    first = train(texts, 700)
    shuffled = texts[:]
    random.Random(0).shuffle(shuffled)
    assert train(texts, 700).fingerprint == first.fingerprint
    assert train(shuffled, 700).fingerprint == first.fingerprint
    assert train(texts[:2], 700).fingerprint != first.fingerprint


def test_a_smaller_vocabulary_is_a_prefix(library_texts: list[str]) -> None:
    texts = library_texts[:2]
    small, large = train(texts, 400), train(texts, 600)
    assert list(large.vocabulary.tokens[: small.num_regular]) == list(small.vocabulary.tokens)


def test_merges_are_those_of_the_trainer(small, library_texts: list[str], tmp_path: Path) -> None:
    """Recovered merges applied by the definition and by `tokenizers` give one result on all training words."""
    small.save(tmp_path)
    oracle = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = library_texts[0][:20_000]
    assert oracle.encode(text).ids == bpe.encode(text, small.vocabulary.ranks)


def test_text_is_normalised_before_counting() -> None:
    tok = train(["e\u0301te\u0301 " * 20], 261, generation="qwen2")
    assert b"\xc3\xa9" in tok.vocabulary.ranks


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["abc"], 200, "at least 278"),
        (["abab"], 5000, "supports a vocabulary of 279 at most"),
        ([], 400, "278 at most"),
        ("one string", 400, "give a list"),
    ],
)
def test_mistakes(texts, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(texts, size)


def test_files_are_read_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nzwei\n".encode() * 1000 + b"\xff")
    blocks = list(read_blocks(path, num_chars=100))
    assert len(blocks) > 10
    assert "".join(blocks) == "é\r\nzwei\n" * 1000 + "\ufffd"
    (tmp_path / "b.jsonl").write_text('{"text": "aa\\nbb"}\n\n{"text": "cc"}\n')
    assert list(read_blocks(tmp_path / "b.jsonl")) == ["aa\nbb", "cc"]
    assert train([path, tmp_path / "b.jsonl"], 280).vocab_size == 280
    (tmp_path / "c.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(ValueError, match="field 'text'"):
        list(read_blocks(tmp_path / "c.jsonl"))
    (tmp_path / "d.bin").write_bytes(b"\0\1\2")
    with pytest.raises(ValueError, match="no text file"):
        list(read_blocks(tmp_path / "d.bin"))
