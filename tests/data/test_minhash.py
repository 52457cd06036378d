import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.data import minhash
from qwench.data.dedup import normalise, text_hash
from qwench.data.minhash import MinHasher, MinHashSettings, band_keys, estimated_jaccard, exact_jaccard, s_curve

HASHER = MinHasher()
NUMPY = MinHasher(compiled=False)
WORDS = [f"w{i}" for i in range(4000)]
SCRIPTS = [
    "Straße ﬁn ÅNGSTRÖM e\u0301 x\u0323\u0307",
    "日本語の文章、ＡＢＣ。",
    "ไทยไม่มีช่องว่าง",
    "한국어 문장 \u1112\u1161\u11ab",
    "नमस्ते दुनिया",
]


def jaccard_by_hand(left: str, right: str, word: int, letter: int) -> float:
    """Of ASCII words and Han letters, written without anything of the module."""

    def shingles(text: str) -> set[str]:
        tokens = []
        for token in normalise(text).split():
            tokens += list(token) if "\u4e00" <= token[0] <= "\u9fff" else [token]
        found = set()
        for i, token in enumerate(tokens):
            size = letter if "\u4e00" <= token[0] <= "\u9fff" else word
            if i + size <= len(tokens):
                found.add("\0".join(tokens[i : i + size]))
        return found

    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def edited(words: list[str], share: float, draw: random.Random) -> list[str]:
    return [draw.choice(WORDS) if draw.random() < share else word for word in words]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=60) | st.sampled_from(SCRIPTS), max_size=6))
def test_compiled_and_numpy_agree_in_every_bit_and_with_normalise(texts):
    assert HASHER.is_compiled, "these tests need a C compiler"
    assert not NUMPY.is_compiled
    left, right = HASHER.hash_texts(texts), NUMPY.hash_texts(texts)
    assert HASHER.normalise(texts) == [normalise(text).encode("utf-8", "surrogatepass") for text in texts]
    assert [row.tobytes() for row in left.exact] == [text_hash(text) for text in texts]
    np.testing.assert_array_equal(left.exact, right.exact)
    np.testing.assert_array_equal(left.signatures, right.signatures)
    np.testing.assert_array_equal(left.num_shingles, right.num_shingles)


def test_every_code_point_alone_and_between_others_is_normalised_as_python_does():
    codes = [chr(c) for c in range(0x110000) if not 0x32400 < c < 0xDFF00 and c < 0xE1000]
    texts = ["".join(f"a{c}b " for c in codes[i : i + 64]) for i in range(0, len(codes), 64)]
    texts += codes[:0x3200:3]
    assert HASHER.normalise(texts) == [normalise(text).encode("utf-8", "surrogatepass") for text in texts]


def test_classes_of_the_ranges_that_are_not_looked_at_one_by_one():
    table = minhash._classes()
    for first, last in (*minhash._IDEOGRAPHS, minhash._SYLLABLES):
        assert all(chr(code).isalnum() for code in range(first, last + 1))
        assert len(set(table[first : last + 1].tolist())) == 1
    assert table[ord("中")] == table[0x20123] == table[ord("ก")] == 2
    assert table[ord("한")] == table[ord("é")] == table[ord("_")] == 1
    assert table[ord(" ")] == table[ord("。")] == 0


def test_shingle_lengths_and_counts_follow_the_script():
    def count(text: str) -> int:
        return int(HASHER.hash_texts([text]).num_shingles[0])

    assert count("a b c d e f") == 2  # two of five words
    assert count("a, b! (c) d") == 1  # shorter than a shingle: one of all
    assert count("春眠不觉晓处处闻啼鸟") == 3  # ten letters, eight a shingle
    assert count("!!! --- ...") == count("") == 0
    assert (HASHER.hash_texts(["!?"]).signatures == 0xFFFFFFFF).all()
    five = MinHasher(MinHashSettings(letter_shingle=5)).hash_texts(["春眠不觉晓处处闻啼鸟"])
    assert five.num_shingles[0] == 6


def test_exact_jaccard_is_that_counted_by_hand():
    draw = random.Random(1)
    for case in range(30):
        words = [draw.choice(WORDS) for _ in range(80)]
        if case % 2:
            words = [
                draw.choice("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少") if draw.random() < 0.8 else w for w in words
            ]
        left, right = " ".join(words), " ".join(edited(words, 0.05, draw))
        assert exact_jaccard(left, right) == pytest.approx(jaccard_by_hand(left, right, 5, 8))


def test_estimates_are_unbiased_and_spread_as_112_draws_do():
    """Over pairs with known Jaccard the error has mean 0 and the variance J (1 - J) / 112."""
    draw = random.Random(2)
    texts, truth = [], []
    for _ in range(400):
        words = [draw.choice(WORDS) for _ in range(300)]
        pair = " ".join(words), " ".join(edited(words, draw.uniform(0.0, 0.1), draw))
        truth.append(jaccard_by_hand(*pair, 5, 8))
        texts += pair
    signatures = HASHER.hash_texts(texts).signatures
    real = np.array(truth)
    for rows, extra in ((signatures, 0.0), (signatures.astype(np.uint8), 0.005)):
        scaled = (estimated_jaccard(rows[::2], rows[1::2]) - real) / np.sqrt(real * (1 - real) / 112 + 1e-4)
        assert abs(scaled.mean()) < 4 / np.sqrt(len(real)) + extra
        assert 0.8 < scaled.std() < 1.2


def test_the_measured_s_curve_is_the_formula():
    """Among pairs of similar Jaccard the share that collide in a band is 1 - (1 - J^8)^14 within 4 standard errors."""
    draw = random.Random(3)
    texts, truth = [], []
    for _ in range(1200):
        words = [draw.choice(WORDS) for _ in range(200)]
        pair = " ".join(words), " ".join(edited(words, draw.uniform(0.01, 0.09), draw))
        truth.append(jaccard_by_hand(*pair, 5, 8))
        texts += pair
    keys = band_keys(HASHER.hash_texts(texts).signatures, 14)
    found = (keys[::2] == keys[1::2]).any(axis=1)
    chance = s_curve(MinHashSettings(), truth)
    for low, high in ((0.3, 0.5), (0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.95)):
        mine = (np.array(truth) >= low) & (np.array(truth) < high)
        assert mine.sum() > 30
        error = np.sqrt((chance[mine] * (1 - chance[mine])).sum()) / mine.sum()
        assert abs(found[mine].mean() - chance[mine].mean()) < 4 * error + 0.01


def test_the_s_curve_of_fineweb():
    assert s_curve(MinHashSettings(), [0.75, 0.8, 0.85]) == pytest.approx([0.772, 0.924, 0.988], abs=1e-3)
    assert "0.75:0.772" in minhash.describe_s_curve(MinHashSettings())


def test_signs_and_case_do_not_count_and_words_do():
    a = "It was the best of times, it was the worst of times; it was the age of wisdom"
    assert exact_jaccard(a, a.upper().replace(",", " -- ")) == 1
    assert exact_jaccard("un deux trois quatre cinq", "un deux trois quatre six") == 0
    assert exact_jaccard("", "") == 0


@pytest.mark.parametrize("wrong", [{"word_shingle": 0}, {"letter_shingle": 65}, {"bands": 0}, {"verify": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* (to|least)"):
        MinHashSettings(**wrong)


def test_without_a_compiler_numpy_takes_over_and_says_so(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    load = minhash._load.__wrapped__
    assert load() is None
    assert "no-such-compiler" in caplog.text
