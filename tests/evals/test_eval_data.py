"""Local files as data sets: every layout, and what is said of files that are broken, empty or missing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwench.evals.choice_answers import ENGLISH, MMLU_PRO, bbh_answers, chinese_letters, letter, letter_of_choices
from qwench.evals.local_data import LAYOUTS, splits_of
from qwench.evals.local_files import Files, MissingDataError, data_roots
from qwench.evals.math_answers import boxed, equal, extract, normalise


def write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def load(root: Path, path: str, name: str | None = None, shots: int = 0) -> tuple[dict[str, Any], Files]:
    files = Files((root,), shots)
    return splits_of(path, name, files), files


def test_mmlu_with_and_without_a_head(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text(
        'question,choice0,choice1,choice2,choice3,answer\n"a, b?",1,2,3,4,2\n'
    )
    (tmp_path / "mmlu/dev/anatomy_dev.csv").write_text("q?,1,2,3,4,B\n")
    splits, files = load(tmp_path, "cais/mmlu", "anatomy")
    assert splits["test"] == [{"question": "a, b?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 2}]
    assert splits["dev"][0]["answer"] == 1
    assert [path.name for path in files.read] == ["anatomy_test.csv", "anatomy_dev.csv"]
    assert all(len(digest) == 64 for digest in files.read.values())
    assert load(tmp_path, "cais/mmlu", "all")[0]["test"] == splits["test"]
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q?,1,2,3,4,E\n")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv row 1: the answer is 'E'; it should be A to D"):
        load(tmp_path, "cais/mmlu", "anatomy")
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q?,1,2,3,4,A\nq?,1,2\n")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv line 2 has 3 cells, the first line 6"):
        load(tmp_path, "cais/mmlu", "anatomy")
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv holds no rows"):
        load(tmp_path, "cais/mmlu", "anatomy")


def test_cmmlu(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        (tmp_path / "cmmlu" / split).mkdir(parents=True)
        (tmp_path / f"cmmlu/{split}/arts.csv").write_text(
            ",Question,A,B,C,D,Answer\n0,问？,一,二,三,四,D\n", encoding="utf-8"
        )
    splits, _ = load(tmp_path, "haonan-li/cmmlu", "arts")
    assert splits["dev"] == [{"Question": "问？", "A": "一", "B": "二", "C": "三", "D": "四", "Answer": "D"}]
    for split in ("val", "dev"):
        (tmp_path / "ceval" / split).mkdir(parents=True)
        (tmp_path / f"ceval/{split}/law_{split}.csv").write_text("id,question,A,B,C,D,answer\n0,问？,一,二,三,四,D\n")
    splits, _ = load(tmp_path, "ceval/ceval-exam", "law")
    assert splits["val"] == [{"question": "问？", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "D"}]
    (tmp_path / "cmmlu/test/arts.csv").write_text("Question,A,B\nx,1,2\n")
    with pytest.raises(ValueError, match="it needs Question, A, B, C, D, Answer"):
        load(tmp_path, "haonan-li/cmmlu", "arts")


def test_mmlu_pro_without_worked_examples_is_asked_without(tmp_path: Path) -> None:
    row = {"question": "q", "options": ["x", "y"], "answer": "B", "answer_index": 1, "category": "law"}
    write(tmp_path / "mmlu_pro_a.jsonl", [row] * 2)
    splits, files = load(tmp_path, "TIGER-Lab/MMLU-Pro", shots=5)
    assert files.no_shots
    assert "0 shots" in files.notes[0]
    write(tmp_path / "mmlu_pro_validation.jsonl", [{**row, "cot_content": "A: Let's think"}])
    splits, files = load(tmp_path, "TIGER-Lab/MMLU-Pro", shots=5)
    assert not files.no_shots
    assert len(splits["test"]) == 2
    assert splits["validation"][0]["cot_content"]


def test_common_sense_sets_come_back_in_lm_evals_form(tmp_path: Path) -> None:
    write(
        tmp_path / "hellaswag.jsonl",
        [
            {"ctx": "High jump: A boy runs. He jumps. then he", "endings": ["a", "b"], "label": 1},
            {"ctx": "Food: How to cook. Take an egg. Break it.", "endings": ["a", "b"], "label": 0},
            {"activity_label": "Go", "ctx_a": "One.", "ctx_b": "two", "endings": ["a", "b"], "label": "0"},
        ],
    )
    rows = load(tmp_path, "Rowan/hellaswag")[0]["validation"]
    assert (rows[0]["activity_label"], rows[0]["ctx_a"], rows[0]["ctx_b"]) == (
        "High jump",
        "A boy runs. He jumps.",
        "then he",
    )
    assert (rows[1]["ctx_a"], rows[1]["ctx_b"]) == ("How to cook. Take an egg. Break it.", "")
    assert (rows[2]["ctx_b"], rows[2]["label"]) == ("two", "0")
    write(tmp_path / "icl/arc_easy.jsonl", [{"query": "Question: Why?", "choices": ["x", "y", "z"], "gold": 2}])
    (arc,) = load(tmp_path, "allenai/ai2_arc", "ARC-Easy")[0]["test"]
    assert (arc["question"], arc["choices"], arc["answerKey"]) == (
        "Why?",
        {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "C",
    )
    write(tmp_path / "icl/piqa.jsonl", [{"query": "Question: How?\n", "choices": ["so", "or so"], "gold": 1}])
    assert load(tmp_path, "baber/piqa")[0]["validation"] == [
        {"goal": "How?", "sol1": "so", "sol2": "or so", "label": 1}
    ]
    write(
        tmp_path / "icl/boolq.jsonl",
        [{"query": "Passage: Text.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}],
    )
    assert load(tmp_path, "aps/super_glue", "boolq")[0]["validation"] == [
        {"passage": "Text.", "question": "is it", "label": 1}
    ]
    options = ["Ann beat Bo as Ann", "Ann beat Bo as Bo"]
    write(tmp_path / "icl/winogrande.jsonl", [{"context_options": options, "continuation": "was fast.", "gold": 0}])
    (wino,) = load(tmp_path, "allenai/winogrande")[0]["validation"]
    assert wino == {"sentence": "Ann beat Bo as _ was fast.", "option1": "Ann", "option2": "Bo", "answer": "1"}
    write(
        tmp_path / "icl/commonsense_qa.jsonl",
        [{"query": "Question: Where?\nChoices:\nA. bank\nB. shop\nAnswer:", "gold": 1}],
    )
    (csqa,) = load(tmp_path, "tau/commonsense_qa")[0]["validation"]
    assert csqa == {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "shop"]}, "answerKey": "B"}
    write(tmp_path / "icl/lambada_openai.jsonl", [{"context": "To the", "continuation": " end"}])
    assert load(tmp_path, "EleutherAI/lambada_openai")[0]["test"] == [{"text": "To the end"}]


def test_examples_are_set_aside_where_there_is_no_training_file(tmp_path: Path) -> None:
    write(tmp_path / "hellaswag.jsonl", [{"ctx": f"A: b {n}.", "endings": ["a"], "label": 0} for n in range(20)])
    splits, files = load(tmp_path, "Rowan/hellaswag", shots=2)
    assert (len(splits["validation"]), len(splits["train"])) == (4, 16)
    assert not {row["ctx_a"] for row in splits["validation"]} & {row["ctx_a"] for row in splits["train"]}
    assert "the last 16 rows serve as examples" in files.notes[0]
    with pytest.raises(ValueError, match="too few to set 24 aside"):
        load(tmp_path, "Rowan/hellaswag", shots=3)


def test_agieval_is_asked_in_its_own_words(tmp_path: Path) -> None:
    write(
        tmp_path / "agieval/lsat-ar.jsonl",
        [{"passage": "P. ", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B"}],
    )
    (row,) = load(tmp_path, "hails/agieval-lsat-ar")[0]["test"]
    assert row["query"] == "P. Q: Q? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is"
    assert row["gold"] == [1]
    write(
        tmp_path / "agieval/logiqa-zh.jsonl", [{"passage": None, "question": "问", "options": ["(A)甲"], "label": "A"}]
    )
    assert (
        load(tmp_path, "hails/agieval-logiqa-zh")[0]["test"][0]["query"]
        == "问题：问 选项：(A)甲\n答案：从A到A, 我们应选择"
    )
    write(tmp_path / "agieval/lsat-ar.jsonl", [{"question": "Q?", "options": ["(A)x"], "label": "C"}])
    with pytest.raises(ValueError, match=r"row 1: label 'C' names none of its 1 options"):
        load(tmp_path, "hails/agieval-lsat-ar")


def test_code_files(tmp_path: Path) -> None:
    plus = {
        "task_id": "Mbpp/2", "prompt": '"""x"""', "entry_point": "f", "canonical_solution": "def f(x): return x",
        "base_input": [[1, [2, "a"]]], "plus_input": [[{"k": 1}]], "atol": 0, "contract": "",
        "assertion": "assert f(1)",
    }  # fmt: skip
    with gzip.open(tmp_path / "MbppPlus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(plus) + "\n")
    (row,) = load(tmp_path, "evalplus/mbppplus")[0]["test"]
    assert json.loads(row["base_input"]) == [[1, [2, "a"]]]
    assert json.loads(row["plus_input"]) == [[{"k": 1}]]
    write(tmp_path / "HumanEvalPlus.jsonl", [{"task_id": "HumanEval/0", "prompt": "p"}])
    with pytest.raises(
        ValueError, match=r"HumanEvalPlus\.jsonl line 1 has no field 'entry_point' \(its fields: task_id, prompt\)"
    ):
        load(tmp_path, "evalplus/humanevalplus")
    write(
        tmp_path / "mbpp.jsonl",
        [{"task_id": n, "text": "t", "code": "c", "test_list": ["assert 1"]} for n in range(1, 975)],
    )
    rows = load(tmp_path, "google-research-datasets/mbpp", "full")[0]["test"]
    assert (rows[0]["task_id"], rows[-1]["task_id"]) == (11, 510)


def test_ifeval_and_mathematics(tmp_path: Path) -> None:
    good = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(tmp_path / "ifeval_a.jsonl", [good, {**good, "kwargs": []}])
    with pytest.raises(ValueError, match=r"row 2 has 1 instructions but 0 kwargs"):
        load(tmp_path, "google/IFEval")
    write(tmp_path / "math500.jsonl", [{"question": "q", "answer": "So $\\boxed{2}$.The answer is: 2"}])
    (row,) = load(tmp_path, "HuggingFaceH4/MATH-500")[0]["test"]
    assert row == {"problem": "q", "solution": "So $\\boxed{2}$.", "answer": "2"}
    write(tmp_path / "gsm8k_test_a.jsonl", [{"question": "q", "answer": "#### 1"}])
    assert load(tmp_path, "openai/gsm8k", "main")[0]["train"] == [{"question": "q", "answer": "#### 1"}]
    with pytest.raises(ValueError, match="too few to set 32 aside as examples; use --num-fewshot 0"):
        load(tmp_path, "openai/gsm8k", "main", shots=4)
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/snarks.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "i", "target": "(A)"}]})
    )
    assert load(tmp_path, "SaylorTwift/bbh", "snarks")[0]["test"] == [{"input": "i", "target": "(A)"}]


def test_broken_files_are_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "svamp.jsonl"
    path.write_text('{"Body": "b", "Question": "q", "Answer": 1}\n\n{"Body": \n')
    with pytest.raises(ValueError, match=r"svamp\.jsonl line 3 is no JSON .*; repair or remove the line"):
        load(tmp_path, "ChilleD/SVAMP")
    path.write_text('{"Body": "b", "Answer": 1}\n')
    with pytest.raises(
        ValueError, match=r"svamp\.jsonl line 1 has no field 'Question'.*; it needs Body, Question, Answer"
    ):
        load(tmp_path, "ChilleD/SVAMP")
    path.write_text('["a list"]\n')
    with pytest.raises(ValueError, match="line 1 should be an object, not list"):
        load(tmp_path, "ChilleD/SVAMP")
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        load(tmp_path, "ChilleD/SVAMP")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"svamp\.jsonl cannot be read"):
        load(tmp_path, "ChilleD/SVAMP")
    path.unlink()
    with pytest.raises(
        MissingDataError, match=r"no file svamp\*\.jsonl \(looked in: .*\); give the directory by --data-dir"
    ):
        load(tmp_path, "ChilleD/SVAMP")
    with pytest.raises(ValueError, match="is no directory"):
        data_roots([path])


def test_every_layout_says_which_file_it_misses(tmp_path: Path) -> None:
    names = {"aps/super_glue": "boolq", "allenai/ai2_arc": "ARC-Easy"}
    for path in LAYOUTS:
        with pytest.raises(MissingDataError, match="no file "):
            load(tmp_path, path, names.get(path, "x"))


def test_parts_of_a_collection_are_found_beside_each_other(tmp_path: Path) -> None:
    for part in ("eval", "math", "other"):
        (tmp_path / part).mkdir()
    assert data_roots([tmp_path / "eval"]) == (tmp_path / "eval", tmp_path / "math")
    assert data_roots([tmp_path]) == (tmp_path, tmp_path / "eval", tmp_path / "math")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the result is $\\boxed{\\frac{1}{2}}$ and not \\boxed{3}... no: \\boxed{\\dfrac12}.", "\\frac{1}{2}"),
        ("Therefore, the answer is 1,234 dollars.", "1234"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("所以答案是 7。\n\n因为…", "7。"),
        ("First 3 apples, then 4.5 more, 7.50 in all", "7.50"),
        ("nothing at all", ""),
        ("The answer is x = 5.", "5"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{12.0}", "12"),
    ],
)
def test_final_answers_are_found(text: str, answer: str) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("0.5", "\\frac{1}{2}", True),
        ("50\\%", "0.5", True),
        ("1/2", "0.5001", False),
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("(3,4)", "(4,3)", False),
        ("x+y", "y+x", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("\\sqrt3", "\\sqrt{12}", False),
        ("", "3", False),
        ("10001", "10000", True),
        ("10002", "10000", False),
        ("b", "B", True),
    ],
)
def test_equal_answers(mine: str, theirs: str, same: bool) -> None:
    assert equal(normalise(mine), normalise(theirs)) is same


def test_boxes_match_their_braces() -> None:
    assert boxed("a \\boxed{x_{1}+{2}} b") == "x_{1}+{2}"
    assert boxed("\\boxed{never closed") == "never closed"
    assert boxed("\\fbox{3}") is None
    assert boxed("no box") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Let us see what option A says. Therefore, the correct answer is \\boxed{D}.", "D"),
        ("The most suitable answer is:\n\nB. It grows.", "B"),
        ("The correct answer is: B. Because A is wrong.", "B"),
        ("The answer isn't A. I choose C.", "C"),
        ("A is not correct; D is correct", "D"),
        ("C. the third one", "C"),
        ("Either is fine: B", "B"),
        ("it must be the RED one.", "B"),
        ("something rad", "B"),  # nothing says a letter: the choice that is most like it
        ("", ""),
    ],
)
def test_letters_of_english_answers(text: str, found: str) -> None:
    """As Qwen's published script reads them."""
    assert letter_of_choices(text, ["the blue one", "the red one.", "Go", "Zz"], ENGLISH) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("因此正确答案是：C。", "C"),
        ("应该选B选项。", "B"),
        ("答案不是A，而是D选项正确", "D"),
        ("A选项不正确，B选项符合题意", "B"),
        ("（C）", "C"),
        ("传输层的面向连接服务的特性是保证可靠", "B"),
        ("", ""),
    ],
)
def test_letters_of_chinese_answers(text: str, found: str) -> None:
    doc = {"question": "传输层的面向连接服务的特性是____。", "A": "不可靠。", "B": "保证可靠", "C": "慢", "D": "快"}
    assert chinese_letters([[text]], [doc]) == [found]


def test_letters_of_mmlu_pro() -> None:
    assert letter("I think A, but the answer is (C).", MMLU_PRO) == "C"
    assert letter("Answer: D", MMLU_PRO) == "D"
    assert letter("Either B or E", MMLU_PRO) == "E"
    assert letter("none", MMLU_PRO) == ""


def test_answers_of_bbh() -> None:
    answers = bbh_answers([["So the answer is (B).\n\nQ: more the answer is X."], ["no idea"]], [{}, {}])
    assert answers == ["(B)", ""]


def test_values_that_break_a_benchmark_are_told_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "svamp.jsonl"
    path.write_text('{"Body": null, "Question": "q", "Answer": 1}\n')
    with pytest.raises(ValueError, match=r"svamp\.jsonl line 1: the field 'Body' is null"):
        load(tmp_path, "ChilleD/SVAMP")
    path.write_text('{"Body": "b", "Question": "q", "Answer": ' + "9" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"svamp\.jsonl line 1 is no JSON"):
        load(tmp_path, "ChilleD/SVAMP")
    for split in ("test", "dev"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
    for answer in ("AB", "01"):
        (tmp_path / "mmlu/test/virology_test.csv").write_text(f"Which?,1,2,3,4,{answer}\n")
        with pytest.raises(ValueError, match=f"row 1: the answer is '{answer}'"):
            load(tmp_path, "cais/mmlu", "virology")
    for label in ("", 2):
        write(tmp_path / "hellaswag.jsonl", [{"ctx": "A: b.", "endings": ["a", "b"], "label": label}])
        with pytest.raises(ValueError, match=rf"row 1: the label is {label!r}; it should be 0 to 1"):
            load(tmp_path, "Rowan/hellaswag")
    row = {
        "task_id": "HumanEval/0", "prompt": "def f(x):", "entry_point": "f", "canonical_solution": " return x",
        "base_input": [[1]], "plus_input": [], "atol": 0,
    }  # fmt: skip
    for name, value, told in (("atol", "x", "atol is 'x'"), ("base_input", [1], "base_input should be a list")):
        write(tmp_path / "HumanEvalPlus.jsonl", [{**row, name: value}])
        with pytest.raises(ValueError, match=f"row 1: {told}"):
            load(tmp_path, "evalplus/humanevalplus")
