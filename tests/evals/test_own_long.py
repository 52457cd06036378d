"""Needle, passkey and RULER: prompts of the length that was asked for, and scores of right and wrong answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwench.evals import context
from qwench.evals.local_files import MissingDataError
from qwench.evals.own import filler, needles, ruler
from qwench.evals.own.heat_map import needle_grid, needle_heat_map
from qwench.evals.own.lengths import count_tokens, largest, read_lengths
from qwench.tokenizer import Tokenizer

LENGTH = 6000
"""Tokens of a vocabulary of 512, which needs about three times as many as Qwen's."""


def squad(count: int) -> dict:
    paragraphs = [
        {
            "context": f"The tower of Ort {number} was built by the mason Kell {number}. " + "It is old. " * 20,
            "qas": [
                {
                    "question": f"Who built the tower of Ort {number}?",
                    "answers": [{"text": f"Kell {number}"}, {"text": f"the mason Kell {number}"}],
                }
            ],
        }
        for number in range(count)
    ]
    return {"data": [{"paragraphs": paragraphs}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "squad.json").write_text(json.dumps(squad(6)), encoding="utf-8")
    (tmp_path / "hotpot.json").write_text(
        json.dumps(
            [
                {
                    "question": "Which is older?",
                    "answer": "the bridge",
                    "context": [["Bridge", ["Built in 1801. ", "Of stone."]], ["Mill", ["Built in 1902."]]],
                },
                {"question": "Is it?", "answer": "yes", "context": [["Fact", ["It is."]]]},
            ]
        ),
        encoding="utf-8",
    )
    return tmp_path


@pytest.fixture
def running(tiny_tokenizer: Tokenizer, data: Path) -> Iterator[context.TaskContext]:
    made = context.TaskContext(tokenizer=tiny_tokenizer, max_len=8192, data_dirs=(data,), seed=7)
    with context.using(made):
        yield made


@pytest.mark.usefixtures("running")
class TestLengths:
    def test_lengths_are_read_in_all_their_spellings(self) -> None:
        assert read_lengths([4096, "8k", "1M", "4k"], 1 << 20) == [4096, 8192, 1 << 20]
        assert read_lengths(None, 300) == [300]
        assert read_lengths("2k", 4096) == [2048]

    @pytest.mark.parametrize("bad", ["4x", 0, [], -1, "k", 1.5, True])
    def test_what_is_no_length_is_refused(self, bad: object) -> None:
        with pytest.raises(ValueError, match="length"):
            read_lengths(bad, 1 << 20)

    def test_a_length_beyond_the_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the model holds 4096"):
            read_lengths("128k", 4096)

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'lenghts' is no option"):
            needles.needle_en(lenghts=4096)
        with pytest.raises(ValueError, match="samples is 0"):
            ruler.docs("vt", samples=0)

    def test_largest_is_the_largest_within_some_pieces(self) -> None:
        found = largest(lambda pieces: "word and " * pieces, 1000)
        assert count_tokens("word and " * found) <= 1000 < count_tokens("word and " * (found + 3))

    def test_what_cannot_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="give a larger length"):
            largest(lambda pieces: "word " * (pieces + 500), 100)


@pytest.mark.usefixtures("running")
class TestNeedles:
    @pytest.mark.parametrize("task", ["needle_en", "needle_zh", "passkey_en", "passkey_zh"])
    def test_the_grid_is_whole_and_prompts_fill_their_length(self, task: str) -> None:
        docs = getattr(needles, task)(lengths=[3000, LENGTH], depths=3, instances=2)["test"]
        cells = [(doc["length"], doc["depth"]) for doc in docs]
        assert len(cells) == 12
        assert set(cells) == {(n, d) for n in (3000, LENGTH) for d in (0.0, 50.0, 100.0)}
        for doc in docs:
            prompt = needles.question(doc)
            assert doc["answer"] in prompt
            assert prompt == needles.question(doc)
            spent = count_tokens(prompt) + count_tokens(doc["gen_prefix"]) + 32 + 64
            assert 0.93 * doc["length"] < spent <= doc["length"]

    def test_the_needle_stands_at_its_depth(self) -> None:
        docs = needles.needle_en(lengths=LENGTH, depths=5, instances=1)["test"]
        for doc in docs:
            prompt = needles.question(doc)
            place = prompt.index("the secret ingredient of the famous soup is") / len(prompt)
            assert abs(place - doc["depth"] / 100) < 0.1

    def test_right_scores_one_and_wrong_zero(self) -> None:
        doc = needles.passkey_en(lengths=4096, depths=1, instances=1)["test"][0]
        assert needles.score(doc, [f" {doc['answer']}. That is it."]) == {"acc": 1.0, "acc_4096": 1.0}
        assert needles.score(doc, [" 12."])["acc"] == 0 == needles.score(doc, [""])["acc"]
        soup = needles.needle_en(lengths=LENGTH, depths=1, instances=1)["test"][0]
        assert needles.score(soup, [soup["answer"].upper()]) == {"acc": 1.0}  # no metric for odd lengths

    def test_the_seed_changes_the_questions(self, running: context.TaskContext) -> None:
        first = needles.passkey_zh(lengths=LENGTH)["test"]["answer"]
        assert first == needles.passkey_zh(lengths=LENGTH)["test"]["answer"]
        other = context.TaskContext(tokenizer=running.tokenizer, max_len=8192, seed=8)
        with context.using(other):
            assert first != needles.passkey_zh(lengths=LENGTH)["test"]["answer"]

    def test_essays_of_a_data_directory_are_the_haystack(self, data: Path) -> None:
        (data / "essays").mkdir()
        (data / "essays" / "a.txt").write_text("Ships sail far. Do they?\n\nThey do!", encoding="utf-8")
        doc = needles.needle_en(lengths=2000, depths=1, instances=1)["test"][0]
        assert "Ships sail far. Do they? They do! Ships sail far." in needles.question(doc)


class TestHeatMap:
    @staticmethod
    def samples() -> list[dict]:
        places = [(0.0, 4096, 1.0), (0.0, 4096, 0.0), (100.0, 4096, 1.0), (0.0, 131072, 0.0)]
        return [{"doc": {"depth": d, "length": n}, "metrics": {"acc": s}} for d, n, s in places]

    def test_cells_are_means(self) -> None:
        assert needle_grid(self.samples()) == {(0.0, 4096): (0.5, 2), (100.0, 4096): (1.0, 1), (0.0, 131072): (0.0, 1)}

    def test_the_picture_is_xml_with_a_box_a_measured_cell(self) -> None:
        root = ElementTree.fromstring(needle_heat_map(self.samples(), title="a <b> & 'c'"))
        assert len(root.findall(".//{http://www.w3.org/2000/svg}rect")) == 3
        texts = [element.text for element in root.iter() if element.text]
        assert {"a <b> & 'c'", "128k", "4k", "50", "4096 tokens, depth 0 %: 50% of 2"} <= set(texts)

    def test_other_samples_give_no_picture(self) -> None:
        assert needle_heat_map([{"doc": {"question": "?"}, "metrics": {"acc": 1.0}}]) == "" == needle_heat_map([])


@pytest.mark.usefixtures("running")
class TestRuler:
    @pytest.mark.parametrize("task", sorted(ruler.ANSWER_TOKENS))
    def test_prompts_fit_hold_the_answers_and_oracles_score_one(self, task: str) -> None:
        docs = ruler.docs(task, lengths=LENGTH if task != "cwe" else 2500, samples=2)["test"]
        assert len(docs) == 2
        for doc in docs:
            prompt = ruler.question(doc)
            spent = count_tokens(prompt) + count_tokens(doc["gen_prefix"]) + ruler.ANSWER_TOKENS[task] + 64
            assert 0.85 * doc["length"] < spent <= doc["length"]
            if task != "qa_2":
                assert all(reference in prompt for reference in doc["outputs"])
            assert ruler.score(doc, [" and ".join(doc["outputs"]).upper()])["score"] == 1
            assert ruler.score(doc, ["none of it"])["score"] == 0

    def test_the_thirteen_are_there(self) -> None:
        assert len(ruler.ANSWER_TOKENS) == 13

    def test_half_of_the_references_score_half_but_any_will_do_for_questions(self) -> None:
        values = ruler.docs("niah_multivalue", lengths=LENGTH, samples=1)["test"][0]
        assert len(values["outputs"]) == 4
        assert ruler.score(values, [", ".join(values["outputs"][:2])])["score"] == 0.5
        question = next(doc for doc in ruler.docs("qa_1", lengths=4096, samples=6)["test"])
        assert ruler.score(question, [f"It was\n{question['outputs'][0]}."]) == {"score": 1.0, "score_4096": 1.0}

    def test_common_words_are_the_most_common_ones(self) -> None:
        doc = ruler.docs("cwe", lengths=2500, samples=1)["test"][0]
        listed = ruler.question(doc).split("\nQuestion:")[-2].split("Notice which.\n")[-1].split()[1::2]
        counts = {word: listed.count(word) for word in set(listed)}
        assert {counts.pop(word) for word in doc["outputs"]} == {6}
        assert len(doc["outputs"]) == 10
        assert set(counts.values()) == {1}

    def test_frequent_words_rank_behind_the_noise(self) -> None:
        doc = ruler.docs("fwe", lengths=LENGTH, samples=1)["test"][0]
        words = ruler.question(doc).split("words occurs. ")[1].split("\nQuestion")[0].split()
        counts = sorted(set(words), key=words.count, reverse=True)
        assert counts[0] == "..."
        assert counts[1:4] == doc["outputs"]

    def test_a_chain_leads_to_its_variables(self) -> None:
        doc = ruler.docs("vt", lengths=LENGTH, samples=1)["test"][0]
        prompt = ruler.question(doc)
        text = prompt[prompt.rindex("Variables are set") :]
        value = text.split("have the value ")[1].split(" ")[0]
        known = {value}
        for line in text.split("\n"):
            if line.startswith("VAR "):
                name, source = line.removeprefix("VAR ").split(" = ")
                assert source.removeprefix("VAR ") in known
                known.add(name)
        assert known == {value, *doc["outputs"]}
        assert len(doc["outputs"]) == 5

    def test_distractor_keys_never_repeat_the_asked_one(self) -> None:
        doc = ruler.docs("niah_multikey_2", lengths=LENGTH, samples=1)["test"][0]
        prompt = ruler.question(doc)
        key = prompt.split(" give for ")[-1].partition("?")[0]
        assert prompt.count(f"for {key} reads:") == 1

    def test_missing_and_broken_files_are_named(self, data: Path) -> None:
        (data / "squad.json").write_text('{"data": [{"paragraphs": [{"context": "x"}]}]}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"squad\.json: KeyError 'qas'.*SQuAD"):
            ruler.docs("qa_1", lengths=LENGTH)
        (data / "squad.json").write_text("[1, 2", encoding="utf-8")
        with pytest.raises(ValueError, match=r"squad\.json is no JSON"):
            ruler.docs("qa_1", lengths=LENGTH)
        (data / "squad.json").unlink()
        with pytest.raises(MissingDataError, match=r"ruler_qa_1.*--data-dir"):
            ruler.docs("qa_1", lengths=LENGTH)


def test_filler_is_text_without_digits_and_does_not_repeat() -> None:
    for language in ("en", "zh"):
        made = filler.Haystack(language, seed=3).sentences(400)
        assert made == filler.Haystack(language, seed=3).sentences(500)[:400]
        assert not any(char.isdigit() for sentence in made for char in sentence)
        assert len(set(made)) > 390
    assert not any(" a a" in s or " a e" in s or " a o" in s for s in filler.Haystack("en", seed=3).sentences(400))
    with pytest.raises(ValueError, match="en and zh"):
        filler.Haystack("fr", seed=1)
