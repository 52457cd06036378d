"""Encoding equals the `tokenizers` library on every input, and our own definition of BPE."""

import functools
import random
import threading
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.tokenizer import Tokenizer, bpe, bpe_native
from qwench.tokenizer.backend import GigatokenBackend, TokenizersBackend, doubtful, normalise
from qwench.tokenizer.special import CONTROL_SETS
from qwench.tokenizer.vocabulary import Vocabulary

ALPHABET = st.characters(exclude_categories=("Cs",))
MARKS = ("e\u0301", "\u0300", "\u0345", "\u1100\u1161\u11a8", "\u00a0", "\u2028", "\x85", "\u200d", "\ufe0f")
NEW_LETTERS = ("\U000323b0", "\U00016ff0", "\u0378")
LONGER = ("\r\n", "  ", "\n\n", "'s", "'LL", "'ſ", "👩\u200d👩\u200d👧")
ODD = st.sampled_from(
    (*"aZ 0\n\r\t'.<|>\x00🙂你", *LONGER, *MARKS, *NEW_LETTERS, *CONTROL_SETS["qwen2.5"], "<|im_", "start|>")
)
TEXT = st.lists(st.one_of(ODD, ALPHABET), max_size=40).map("".join)


def in_bulk(tok: Tokenizer, texts: list[str], **how) -> list[list[int]]:
    """`encode_utf8` of texts that lie between other bytes."""
    data = [text.encode() for text in texts]
    starts = np.cumsum([3, *map(len, data)])
    laid_out = np.frombuffer(b"abc" + b"".join(data), np.uint8)
    found = tok.encode_utf8(laid_out, starts, **how)
    assert all(ids.dtype == np.uint32 for ids in found)
    return [ids.tolist() for ids in found]


@given(text=TEXT)
@settings(max_examples=600, deadline=None)
def test_equal_to_tokenizers_and_to_the_definition(small, small_oracle, text: str) -> None:
    ids = small.encode(text)
    assert ids == small_oracle.encode(text, add_special_tokens=False).ids
    assert in_bulk(small, [text, text[::2]]) == [ids, small.encode(text[::2])]
    # Python's and regex's Unicode tables are of other versions than those of `tokenizers`.
    if not doubtful()[[ord(char) for char in text]].any() and unicodedata.normalize("NFC", text) == normalise(text):
        assert ids == bpe.encode(text, small.vocabulary.ranks)


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_parsing_control_tokens_equals_tokenizers(small, small_oracle_parsing, text: str) -> None:
    assert small.encode(text, parse_special=True) == small_oracle_parsing.encode(text, add_special_tokens=False).ids


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_decoding_gives_the_normalised_text(small, text: str) -> None:
    assert small.decode(small.encode(text)) == normalise(text)
    assert max(small.encode(text), default=0) < small.num_regular


@pytest.mark.real
@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_the_real_vocabulary_equals_tokenizers(real, real_oracle, text: str) -> None:
    ids = real_oracle.encode(text, add_special_tokens=False).ids
    assert real.encode(text) == ids
    assert in_bulk(real, [text]) == [ids]


def test_every_code_point_is_classed_alike(small, small_oracle) -> None:
    """All assigned code points, each where its class decides how the text is cut: letters keep "'s" whole."""
    assert small.backend == "gigatoken"
    assert b"'s" in small.vocabulary.ranks
    codes = np.arange(0x40000)
    codes = codes[~doubtful()[codes] & ((codes < 0xD800) | (codes > 0xDFFF))]
    for first in range(0, len(codes), 4096):
        text = "".join(f"a{chr(code)}'s\n{chr(code)}\n 1{chr(code)}  x" for code in codes[first : first + 4096])
        text = normalise(text)
        assert small.encode(text) == small_oracle.encode(text, add_special_tokens=False).ids
        assert in_bulk(small, [text]) == [small.encode(text)]


def test_normalisation_is_that_of_tokenizers() -> None:
    """Our shortcut (Python's check first) on every code point after a letter and after a mark."""
    from tokenizers.normalizers import NFC

    nfc = NFC()
    codes = [code for code in range(0x30000) if not 0xD800 <= code < 0xE000 and not chr(code).isascii()]
    for first in range(0, len(codes), 256):
        text = " ".join(f"e{chr(code)}\u0327\u0301 {chr(code)}\u0300" for code in codes[first : first + 256])
        assert normalise(text) == nfc.normalize_str(text)
    assert all(normalise(chr(code)) == nfc.normalize_str(chr(code)) for code in codes)


@pytest.mark.parametrize(
    "text",
    [*("a", " ", "\n", "0", "你", "\r\n", "\x00", "e\u0301", "🙂", "!", " \t")],
    ids=ascii,
)
def test_long_lines(small, small_oracle, text: str) -> None:
    text = text * (300_000 // len(text)) + "x"
    assert small.encode(text) == small_oracle.encode(text, add_special_tokens=False).ids
    assert in_bulk(small, [text]) == [small.encode(text)]


def test_lone_surrogates_become_the_replacement_character(small) -> None:
    assert small.encode("a\ud800b") == small.encode("a\ufffdb")
    assert small.encode("\ud83d\ude42") == small.encode("🙂")  # a pair is the character it spells
    assert small.encode_batch(["\udfff"])[0].tolist() == small.encode("\ufffd")


def test_both_backends_agree(small) -> None:
    fast, exact = GigatokenBackend(small.vocabulary), TokenizersBackend(small.vocabulary)
    for text in ("", "x", "I'm 42\n\n", "你好 🙂 \U000323b0's e\u0301\U00016ff0\u0300"):
        assert fast.encode(text).tolist() == exact.encode(text).tolist()
        assert fast.encode(text).dtype == exact.encode(text).dtype == np.int32
        for batch in ([text], [text + "\ud800", "a" * 100_000, "", text, "\U000323b0's"]):
            for parallel in (None, False, True):
                expected = [fast.encode(one).tolist() for one in batch]
                assert [ids.tolist() for ids in fast.encode_batch(batch, parallel=parallel)] == expected
                assert [ids.tolist() for ids in exact.encode_batch(batch, parallel=parallel)] == expected


def test_the_encoder_is_renewed_without_a_change(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwench.tokenizer.backend.RENEW_AFTER_CHARS", 10)
    backend = GigatokenBackend(small.vocabulary)
    first = backend._encoder
    ids = [backend.encode("some words to remember").tolist() for _ in range(3)]
    assert ids == [small.encode("some words to remember")] * 3
    assert backend._encoder is not first


def test_batches_in_threads(small) -> None:
    texts = [f"{number} some text with é and 你好 " * (number % 7) for number in range(3000)]
    expected = [small.encode(text) for text in texts]
    for threads in (1, 3, None):
        batch = small.encode_batch(texts, num_threads=threads)
        assert [ids.tolist() for ids in batch] == expected
        assert all(ids.dtype == np.int32 for ids in batch)
    with pytest.raises(ValueError, match="num_threads"):
        small.encode_batch(texts, num_threads=0)


def test_many_threads_share_one_tokenizer(small: Tokenizer) -> None:
    texts = [
        unicodedata.normalize("NFD", f"Überzeugung {number} é") + "\U000323b0" * (number % 2) for number in range(400)
    ]
    expected = [small.encode(text) for text in texts]
    wrong: list[int] = []

    def work(start: int) -> None:
        for number in range(start, len(texts), 4):
            if small.encode(texts[number]) != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start % 4,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WORDS = st.lists(st.sampled_from("abcdeXYé你好吗 "), max_size=80).map("".join)


@given(text=WORDS, seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_long_words_of_a_vocabulary_that_merges_across_characters(text: str, seed: int) -> None:
    """Half-merged characters, and tokens of which none is a word: where a greedy choice is nearly always wrong."""
    tok = _merging_at_random(seed)
    assert tok._bulk is not None
    text = normalise(text)
    assert in_bulk(tok, [text]) == [bpe.encode(text, tok.vocabulary.ranks)]


@functools.cache
def _merging_at_random(seed: int) -> Tokenizer:
    draw = random.Random(seed)
    pieces = ["".join(draw.choices("abcdeXYé你好吗", k=12)).encode() for _ in range(40)]
    tokens = [bytes([byte]) for byte in bpe.BYTE_ORDER]
    for _ in range(60):
        parts = bpe.merge(draw.choice(pieces), {token: rank for rank, token in enumerate(tokens)})
        at = draw.randrange(len(parts) - 1) if len(parts) > 1 else 0
        if (new := b"".join(parts[at : at + 2])) not in tokens:
            tokens.append(new)
    return Tokenizer(Vocabulary.from_tokens(tokens, "qwen2.5"))


@pytest.mark.parametrize("compiled", [True, False])
def test_many_texts_of_a_column(small, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an end each, in threads, those that need a second look among them; and where nothing can be compiled."""
    if not compiled:
        monkeypatch.setitem(small.__dict__, "_bulk", None)
    assert (small._bulk is not None) == compiled
    texts = ["", "e\u0301 and \u1100\u1161", "\U000323b0's", *(f"{n} some words, 你好 " * (n % 9) for n in range(9000))]
    expected = [[*small.encode(text), small.eod_id] for text in texts]
    assert in_bulk(small, texts, closing=small.eod_id, num_threads=3) == expected
    assert in_bulk(small, texts, closing=small.eod_id) == expected
    assert in_bulk(small, []) == []


def test_splits_of_tokens_are_those_of_the_definition(small) -> None:
    tokens = small.vocabulary.tokens
    assert bpe_native.split_tokens(tokens) == bpe.recover_merges(tokens) == list(small.vocabulary.merges)
    assert bpe_native.split_tokens([*tokens, b"\xff\xfe\xfd no merge"]) is None
    assert bpe_native.split_tokens([*tokens, tokens[300]]) is None


@pytest.mark.real
def test_splits_of_the_real_vocabulary(real) -> None:
    assert bpe_native.split_tokens(real.vocabulary.tokens) == bpe.recover_merges(real.vocabulary.tokens)


def test_a_vocabulary_whose_tokens_cannot_be_reached_is_for_the_libraries() -> None:
    """A token "abc" that is made of "a" and "bc", while "ab" is merged first."""
    base = [bytes([byte]) for byte in bpe.BYTE_ORDER]
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]
    assert bpe_native.load([*base, b"ab", b"bc"], merges[:2]) is not None
    assert bpe_native.load([*base, b"ab", b"bc", b"abc"], merges) is None
