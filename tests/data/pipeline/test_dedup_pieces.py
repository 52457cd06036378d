"""Cutting repeated paragraphs, lines and passages out of documents that stay."""

import itertools
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dedup_stages import dropped, kept, run

from qwench.data.dedup import DedupSettings, normalise
from qwench.data.pipeline import dedup
from qwench.data.pipeline.dedup_pieces import cut_text, lines, paragraphs
from qwench.types import Document

ONLY = {"exact": False, "near": False}
BOILERPLATE = "Subscribe to our newsletter and never miss another one of our many wonderful offers again."


def documents(*texts: str, better: int = 0) -> list[Document]:
    return [Document(id=str(n), text=t, meta={"quality": float(n == better)}) for n, t in enumerate(texts)]


def one_after_the_other(texts: list[str], min_chars: int) -> dict[str, str]:
    """What is left of texts whose long paragraphs stay where they stand first; a paragraph that goes takes the break
    before it along."""
    seen: set[str] = set()
    left: dict[str, str] = {}
    for number, text in enumerate(texts):
        pieces: list[str] = []
        parts = re.split(r"(\n(?:[ \t]*\n)+)", text)
        for place in range(0, len(parts), 2):
            key = normalise(parts[place])
            if len(parts[place]) >= min_chars:
                if key in seen:
                    continue
                seen.add(key)
            pieces += [*([parts[place - 1]] if pieces and place else []), parts[place]]
        if "".join(pieces).strip() or text == "".join(pieces):
            left[str(number)] = "".join(pieces)
    return left


def test_a_repeated_paragraph_stays_in_the_best_document_only(tmp_path: Path):
    texts = [f"Head {name}\n\n{BOILERPLATE}\n\nEnd {name}" for name in ("one", "two", "three")]
    asked = DedupSettings(paragraph_chars=50, **ONLY)
    for better, order in itertools.product(range(3), (1, -1)):
        given_ = documents(*texts, better=better)[::order]
        result = run(tmp_path / f"{better}{order}", [given_[:1], given_[1:]], asked)
        expected = {str(n): text.replace(f"\n\n{BOILERPLATE}", "") for n, text in enumerate(texts)}
        assert kept(result) == expected | {str(better): texts[better]}
        assert result.counts["cut_documents"] == 2
        assert result.counts["cut_chars"] == 2 * (len(BOILERPLATE) + 2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["A" * 9, "B" * 9, "C" * 9, "d", "e"]), max_size=6), max_size=5))
def test_in_order_of_quality_paragraph_cuts_are_those_of_the_stream(contents):
    """Where the first document is the best, the second the next, ..., both must agree."""
    texts = ["\n\n".join(parts) for parts in contents]
    given_ = [Document(id=str(n), text=t, meta={"quality": -float(n)}) for n, t in enumerate(texts)]
    expected = one_after_the_other(texts, min_chars=9)
    with tempfile.TemporaryDirectory() as directory:
        result = run(Path(directory), [given_], DedupSettings(paragraph_chars=9, **ONLY))
        got = kept(result)
    untouched = {d.id for d in given_ if not d.text.strip()}
    assert {k: v for k, v in got.items() if k not in untouched} == {
        k: v for k, v in expected.items() if k not in untouched
    }


def test_lines_are_cut_with_their_line_end(tmp_path: Path):
    texts = ["a\n== the same menu ==\nb", "== the same menu ==\nc", "d\n== the same menu =="]
    result = run(tmp_path, [documents(*texts)], DedupSettings(paragraph_chars=0, line_chars=10, **ONLY))
    assert kept(result) == {"0": texts[0], "1": "c", "2": "d"}


def test_a_document_of_which_nothing_is_left_is_dropped_with_the_reason(tmp_path: Path):
    result = run(tmp_path, [documents(f"x\n\n{BOILERPLATE}", BOILERPLATE)], DedupSettings(paragraph_chars=50, **ONLY))
    assert list(kept(result)) == ["0"]
    assert dropped(result) == {"1": ("duplicate_pieces", "")}


def test_pieces_of_dropped_documents_do_not_win(tmp_path: Path):
    body = " ".join(f"word{n}" for n in range(200))
    texts = [f"{body}\n\n{BOILERPLATE}", body + " more words\n\n" + BOILERPLATE + " ", f"other\n\n{BOILERPLATE}"]
    given_ = [
        Document(id=str(n), text=t, meta={"quality": q}) for n, (t, q) in enumerate(zip(texts, (2, 3, 1), strict=True))
    ]
    result = run(tmp_path, [given_], DedupSettings(paragraph_chars=50))
    assert kept(result) == {"1": texts[1], "2": "other"}


@pytest.mark.parametrize("memory", [1 << 6, 1 << 14])
def test_repeated_passages_are_cut_down_to_one(tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dedup, "_RECORD_BYTES", memory)
    draw = random.Random(3)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3000)}" for _ in range(count))

    passage = words(200)
    texts = [f"{words(100)} {passage} {words(50)}" for _ in range(4)]
    asked = DedupSettings(paragraph_chars=0, substring_tokens=30, substring_slack=8, memory_mb=1, **ONLY)
    given_ = documents(*texts, better=2)
    result = kept(run(tmp_path, [given_[:2], given_[2:]], asked))
    assert result["2"] == texts[2]
    for number in (0, 1, 3):
        begin, end = texts[number].split(passage)
        left = result[str(number)]
        assert left.startswith(begin)
        assert left.endswith(end)
        assert 0 <= len(left.split()) - len((begin + end).split()) < 2 * 8


def test_endless_repetition_keeps_a_window(tmp_path: Path):
    asked = DedupSettings(paragraph_chars=0, substring_tokens=10, substring_slack=1, **ONLY)
    result = kept(run(tmp_path, [documents("abc def ghi " * 100, "啊" * 500)], asked))
    assert result["0"].split()[:10] == [*["abc", "def", "ghi"] * 3, "abc"]
    assert 10 <= len(result["0"].split()) < 20
    assert 10 <= len(result["1"]) < 20


def test_places_of_paragraphs_and_lines():
    text = "ab\n\n  \nlong one\n\nx\nlong two"
    assert [text[b:e] for _, b, e in paragraphs(text, 5)] == ["long one", "x\nlong two"]
    assert [text[c:e] for c, _, e in paragraphs(text, 5)] == ["\n\n  \nlong one", "\n\nx\nlong two"]
    assert [text[c:e] for c, _, e in lines(text, 5)] == ["\nlong one", "\nlong two"]
    assert cut_text("0123456789", np.array([[2, 5], [4, 6], [8, 9]])) == "01679"
    assert cut_text("head\n\nbody", np.array([[0, 4]])) == "body"
