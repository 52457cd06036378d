"""Decontamination: what each rule finds and what it leaves, in English and Chinese, in short and long documents."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from qwench.data.decontaminate import (
    ContaminationFinder,
    DecontaminateSettings,
    Overlap,
    TestSample,
    build_index,
    evaluation_files,
    lcs_length,
    read_samples,
)

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
CHINESE = "小明有四十八个苹果，他把其中的一半分给了妹妹，又买了十二个，请问小明现在一共有多少个苹果？"
WORDS = [
    "river",
    "stone",
    "cloud",
    "market",
    "window",
    "letter",
    "garden",
    "engine",
    "summer",
    "branch",
    "copper",
    "island",
    "winter",
    "harbour",
]


def find(texts: list[str], samples: list[str], **settings) -> list[Overlap | None]:
    chosen = DecontaminateSettings(**settings)
    named = [TestSample(f"set.jsonl:{number}", text) for number, text in enumerate(samples, 1)]
    return ContaminationFinder(build_index(named, chosen), chosen).find(texts)


def noise(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def slow_lcs(left: list[int], right: list[int]) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        before = list(row)
        for j, b in enumerate(right):
            row[j + 1] = before[j] + 1 if a == b else max(row[j], before[j + 1])
    return row[-1]


def test_the_subsequence_is_as_long_as_by_the_definition():
    draw = np.random.default_rng(3)
    for size in (0, 1, 5, 63, 64, 65, 200):
        left, right = draw.integers(0, 9, size), draw.integers(0, 9, size // 2 + 40)
        assert lcs_length(left, right) == slow_lcs(left.tolist(), right.tolist())


def test_a_question_is_found_whatever_its_punctuation_case_and_surroundings():
    shouted = QUESTION.upper().replace(",", " -- ").replace(".", "!")
    inside = f"{noise(3000)} {shouted} {noise(3000, 1)}"
    plain, long, other = find([QUESTION, inside, noise(500)], [QUESTION])
    assert plain is not None
    assert plain.share == 1
    assert plain.sample == "set.jsonl:1"
    assert long is not None
    assert long.share == 1
    assert long.document_tokens > 6000
    assert long.excerpt.endswith("april and may") or "natalia sell altogether in april and may" in long.excerpt
    assert other is None


def test_a_question_with_other_numbers_is_found_by_the_subsequence_and_not_by_the_ngram():
    changed = QUESTION.replace("48", "52").replace("April", "June").replace("half", "twice").replace("May", "July")
    assert find([changed], [QUESTION], rule="qwen") == [None]
    assert find([changed], [QUESTION], rule="qwen2.5-math") == [None]
    (found,) = find([changed], [QUESTION], prefilter_tokens=4)
    assert found is not None
    assert 0.6 <= found.share < 1


def test_a_quoted_ngram_is_found_by_the_ngram_rule_alone():
    quoted = f"{noise(200)} {' '.join(QUESTION.split()[:14])} {noise(200, 1)}"
    (found,) = find([quoted], [QUESTION], rule="qwen")
    assert found is not None
    assert found.tokens == 13
    assert find([quoted], [QUESTION], rule="qwen2") == find([quoted], [QUESTION], rule="qwen2.5-math") == [None]


@pytest.mark.parametrize(("kept", "contaminated"), [(11, False), (12, True)])
def test_the_share_is_reached_or_not(kept: int, contaminated: bool):
    # A sample of 20 words: 12 are 0.6 of it; min_tokens is lowered so that only the share decides.
    sample = [f"word{n}" for n in range(20)]
    text = " ".join(sample[:kept] + [f"other{n}" for n in range(20)])
    (found,) = find([text], [" ".join(sample)], min_tokens=10, prefilter_tokens=8)
    assert (found is not None) == contaminated


@pytest.mark.parametrize(("length", "contaminated"), [(12, False), (13, True)])
def test_shorter_samples_than_thirteen_tokens_are_never_found(length: int, contaminated: bool):
    sample = " ".join(f"word{n}" for n in range(length))
    for rule in ("qwen", "qwen2", "qwen2.5-math"):
        assert (find([sample], [sample], rule=rule)[0] is not None) == contaminated


def test_a_subsequence_scattered_over_a_long_document_is_no_contamination():
    words = QUESTION.split()
    scattered = " ".join(word + " " + noise(40, n) for n, word in enumerate(words[8:]))
    assert find([" ".join(words[:8]) + " " + scattered], [QUESTION]) == [None]


def test_chinese_is_compared_by_characters():
    changed = CHINESE.replace("四十八", "三十六").replace("，", " ")
    other = "今天的天气非常好，我们一起去公园散步，看见了许多美丽的花朵和小鸟，大家都很高兴地拍照留念。"
    found, none = find([f"题目：{changed}答案是三十。", other], [CHINESE])
    assert found is not None
    assert found.sample_tokens > 35
    assert found.share > 0.9
    assert none is None


def test_the_wording_of_a_benchmark_is_not_contamination():
    frame = "Read the following passage carefully and then choose the one best answer to the question below it"
    samples = [f"{frame} {noise(40, seed)}" for seed in range(30)]
    text = f"{frame} unlike the samples {noise(60, 99)}"
    assert find([text], samples, rule="qwen") == [None]
    assert find([text], samples, rule="qwen", common=0) != [None]


def test_batches_do_not_run_into_each_other():
    half = len(QUESTION) // 2
    assert find([QUESTION[:half], QUESTION[half:]], [QUESTION], rule="qwen", min_tokens=20) == [None, None]


def test_every_form_of_evaluation_file_is_read(tmp_path: Path):
    folder = tmp_path / "eval"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text(json.dumps({"question": QUESTION, "options": ["one", "two"], "id": 7}) + "\n")
    (folder / "b.json").write_text(json.dumps({"version": "1", "examples": [{"input": QUESTION}]}))
    (folder / "deep" / "c.csv").write_text(f'"{QUESTION}",A,B\n')
    (folder / "d.txt").write_text(f"first\n\n{QUESTION}\n")
    samples = {sample.id: sample.text for sample in read_samples(evaluation_files([folder]))}
    assert samples["eval/a.jsonl:1:question"] == samples["eval/b.json:1:input"] == QUESTION
    assert samples["eval/deep/c.csv:1:0"] == QUESTION
    assert samples["eval/d.txt:2"].strip() == QUESTION
    assert samples["eval/a.jsonl:1"] == f"{QUESTION}\none\ntwo"


def test_what_most_records_say_is_a_prompt(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    prompt = "You are given a problem; think step by step and write the answer after four number signs."
    path.write_text("".join(json.dumps({"prompt": prompt, "q": noise(20, n)}) + "\n" for n in range(50)))
    assert all(prompt not in sample.text for sample in read_samples([("set.jsonl", path)]))


def test_a_missing_or_broken_evaluation_set_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no evaluation set at .*nowhere"):
        evaluation_files([tmp_path / "nowhere"])
    (tmp_path / "bad.jsonl").write_text('{"a": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read"):
        list(read_samples(evaluation_files([tmp_path / "bad.jsonl"])))
