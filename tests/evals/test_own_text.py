"""Perplexity by position and texts: where windows are cut, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwench.evals import context
from qwench.evals.local_files import Files, MissingDataError
from qwench.evals.own import positions, texts
from qwench.tokenizer import Tokenizer

STORY = "The mill stands by the river. In spring, water runs over the wheel; nobody counts how often it turns.\n" * 60


@pytest.fixture
def running(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Iterator[context.TaskContext]:
    (tmp_path / "wikitext2_valid.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text(
        "".join(json.dumps({"text": "清晨，木匠在河边修好了一件旧的木船。" * n}) + "\n" for n in (2, 30)),
        encoding="utf-8",
    )
    made = context.TaskContext(tokenizer=tiny_tokenizer, max_len=2048, data_dirs=(tmp_path,))
    with context.using(made):
        yield made


class TestPositions:
    def test_bins_cover_every_window_and_are_clean(self, running: context.TaskContext) -> None:
        docs = positions.docs(length=512, bins=4, windows=5)["test"]
        assert len(docs) == 5
        tokens = running.tokenizer.encode(STORY)
        for number, doc in enumerate(docs):
            window = tokens[512 * number : 512 * (number + 1)]
            parts = positions.parts(doc)
            assert "".join(text for _, text, _ in parts).encode() == running.tokenizer.decode_bytes(window)
            assert sum(count for *_, count in parts) == 512
            assert doc["edges"][0] == 0
            assert doc["edges"][-1] == 512
            for before, text, count in parts[1:]:
                whole = running.tokenizer.encode(before + text)
                assert whole == window[: len(whole)]
                assert len(whole) - len(running.tokenizer.encode(before)) == count
                assert before == before.rstrip()

    def test_chinese_windows_are_cut_between_characters(self, running: context.TaskContext) -> None:
        doc = positions.docs(length=1024, bins=8, files="zh.jsonl")["test"][0]
        assert doc["text"] == 1  # the first line is shorter than a window
        assert all("\ufffd" not in text for _, text, _ in positions.parts(doc)[1:-1])

    def test_names_of_bins_do_not_depend_on_moved_edges(self) -> None:
        assert positions.bin_name([0, 131, 250, 512], 1) == "nll_170_341"

    def test_texts_that_are_too_short_or_missing_are_refused(self, running: context.TaskContext) -> None:
        with pytest.raises(ValueError, match="no text of 2047 tokens"):
            positions.docs(files="zh.jsonl", length=2047)
        with pytest.raises(MissingDataError, match=r"none\.txt"):
            positions.docs(files="none.txt")
        with pytest.raises(ValueError, match="bins is 0"):
            positions.docs(bins=0)

    def test_results_are_weighted_by_tokens(self) -> None:
        pytest.importorskip("lm_eval")
        from qwench.evals.own.position_task import _mean, _perplexity

        pairs = [(10.0, 10), (30.0, 10), (0.0, 20)]
        assert _mean(pairs) == 1.0
        assert _perplexity(pairs) == math.e
        assert _perplexity([(1e6, 1)]) == math.inf


class TestTexts:
    def test_pieces_join_to_the_text(self) -> None:
        found = texts.pieces(STORY, size=500)
        assert "".join(found) == STORY
        assert max(map(len, found)) <= 500
        assert all(p.endswith("\n") for p in found)
        assert texts.pieces("x" * 1200, size=500) == ["x" * 500, "x" * 500, "x" * 200]

    def test_bits_per_byte_weighs_by_bytes(self, running: context.TaskContext) -> None:
        metrics = pytest.importorskip("lm_eval.api.metrics")
        docs = texts.docs()["test"]
        assert "".join(docs["text"]) == STORY
        assert docs["file"] == ["wikitext2_valid.txt"] * len(docs)
        scores = texts.score({"text": "naïve 🙂"}, [-10 * math.log(2)])
        assert scores["bits_per_byte"][1] == 11
        assert metrics.bits_per_byte([scores["bits_per_byte"]]) == pytest.approx(10 / 11)
        assert metrics.bits_per_byte([scores["xz_bits_per_byte"]]) > 8  # xz has a head of some 60 bytes
        assert scores["word_perplexity"][1] == 2

    def test_a_line_without_text_is_named(self, running: context.TaskContext, tmp_path: Path) -> None:
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=r"bad\.jsonl row 2 has neither text nor content \(its fields: body\)"):
            texts.documents(Files(running.data_dirs), "bad.jsonl")
        (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
        with pytest.raises(ValueError, match="holds no text"):
            texts.documents(Files(running.data_dirs), "empty.txt")
