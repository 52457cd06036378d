import random

import numpy as np
import pytest

from qwench.data.substring import anchors

WORDS = [f"word{i}" for i in range(500)]


def text_of(draw: random.Random, count: int) -> str:
    return "".join(draw.choice(WORDS) + draw.choice([" ", ", ", ".\n"]) for _ in range(count))


def test_equal_hashes_are_equal_characters_and_others_are_not():
    draw = random.Random(1)
    text = text_of(draw, 300)
    text = text + text[:900] + text_of(draw, 100) + text[300:700]
    hashes, places = anchors(text, 10, 4)
    by_hash: dict[bytes, set[str]] = {}
    for row, (begin, end) in zip(hashes, places.tolist(), strict=True):
        by_hash.setdefault(row.tobytes(), set()).add(text[begin:end])
    assert all(len(windows) == 1 for windows in by_hash.values())
    assert len(by_hash) == len({window for windows in by_hash.values() for window in windows})
    assert len(by_hash) < len(places)


@pytest.mark.parametrize("slack", [1, 3, 16])
def test_a_common_passage_of_tokens_plus_slack_shares_an_anchor(slack):
    draw = random.Random(slack)
    for _ in range(50):
        common = text_of(draw, 12 + slack)
        left, right = (text_of(draw, draw.randint(0, 40)) + common + "tail" + text_of(draw, 20) for _ in range(2))
        shared = set(map(bytes, anchors(left, 12, slack)[0])) & set(map(bytes, anchors(right, 12, slack)[0]))
        assert shared


def test_windows_begin_and_end_at_words_and_letters():
    text = "aa bb, cc dd。春眠不觉晓"
    _, places = anchors(text, 3, 1)
    windows = [text[a:b] for a, b in places.tolist()]
    assert windows == [
        "aa bb, cc ", "bb, cc dd。", "cc dd。春", "dd。春眠", "春眠不", "眠不觉", "不觉晓",
    ]  # fmt: skip
    assert anchors("one two!", 2, 5)[1].tolist() == [[0, 7]]


def test_too_short_texts_have_none():
    for text in ("", "one two", "?! --"):
        hashes, places = anchors(text, 3, 2)
        assert hashes.shape == places.shape == (0, 2)


def test_anchors_cover_a_text_and_are_few():
    text = text_of(random.Random(9), 5000)
    places = anchors(text, 50, 16)[1]
    assert np.all(places[1:, 0] <= places[:-1, 1])
    assert places[0, 0] < 16 * 10
    assert places[-1, 1] > len(text) - 16 * 10
    assert len(places) < 5000 * 2.3 / 17
