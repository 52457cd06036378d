"""Local files in place of data sets of the Hugging Face hub, in the very form that lm-eval's tasks expect.

A layout is found by a task's `dataset_path` and gives the rows of each split; prompts and metrics stay those of the
task. It reads the benchmark's own files as its authors publish them, and common re-packagings of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwench.evals.local_files import Files

Rows = list[dict[str, Any]]
Layout = Callable[[Files, str | None], Mapping[str, Rows]]
"""(files, dataset_name) -> split -> rows."""
LETTERS = "ABCDEFGHIJ"


def with_pool(files: Files, rows: Rows, split: str = "validation") -> dict[str, Rows]:
    """A benchmark of which only the questions are there: examples come from rows at the end, which are not asked."""
    if not files.shots:
        return {split: rows, "train": rows[:1]}
    count = 8 * files.shots
    if len(rows) <= count:
        raise ValueError(
            f"{next(iter(files.read))} has {len(rows)} rows, too few to set {count} aside as examples; "
            "use --num-fewshot 0"
        )
    files.notes.append(f"no training file: the last {count} rows serve as examples and are not asked")
    return {split: rows[:-count], "train": rows[-count:]}


# ------------------------------------------------------------------------------------------------------ knowledge
def mmlu(files: Files, name: str | None) -> dict[str, Rows]:
    """Tables with the question, four choices and the answer, with a head (answer a number) or without (a letter)."""
    subjects = [name]
    if name in (None, "all"):
        found = files.search("mmlu/test/*_test.csv", "test/*_test.csv", "data/test/*_test.csv")
        subjects = [path.name.split("_test.csv")[0] for path in found]
        if not subjects:
            files.find("mmlu/test/*_test.csv")
    splits: dict[str, Rows] = {"test": [], "dev": []}
    for subject in subjects:
        for split, rows in splits.items():
            table = files.csv(*(f"{at}{split}/{subject}_{split}.csv" for at in ("mmlu/", "", "data/")))
            rows += _mmlu_rows(table, subject or "", list(files.read)[-1])
    return splits


def _mmlu_rows(table: list[list[str]], subject: str, path: Any) -> Rows:
    head = [cell.strip().lower() for cell in table[0]]
    has_head = head[-1] == "answer"
    rows: Rows = []
    for number, cells in enumerate(table[has_head:], 1 + has_head):
        if len(cells) != 6:
            raise ValueError(
                f"{path} row {number} has {len(cells)} cells; it needs a question, four choices and the answer"
            )
        answer = cells[5].strip()
        if len(answer) != 1 or answer not in "0123ABCD":
            raise ValueError(f"{path} row {number}: the answer is {answer!r}; it should be A to D, or 0 to 3")
        index = int(answer) if answer.isdigit() else LETTERS.index(answer)
        rows.append({"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": index})
    return rows


def cmmlu(files: Files, name: str | None) -> dict[str, Rows]:
    columns = ("Question", "A", "B", "C", "D", "Answer")
    splits = ("test", "dev")
    return {split: _lettered(files, (f"cmmlu/{split}/{name}.csv", f"{split}/{name}.csv"), columns) for split in splits}


def ceval(files: Files, name: str | None) -> dict[str, Rows]:
    columns = ("question", "A", "B", "C", "D", "answer")
    splits = ("val", "dev")
    return {
        split: _lettered(files, (f"ceval/{split}/{name}_{split}.csv", f"{split}/{name}_{split}.csv"), columns)
        for split in splits
    }


def _lettered(files: Files, names: Sequence[str], columns: Sequence[str]) -> Rows:
    """Questions with the choices A to D in columns of their own; the last column has the right letter."""
    table = files.csv(*names)
    path, head = list(files.read)[-1], table[0]
    if not set(columns) <= set(head):
        raise ValueError(f"{path} has the columns {', '.join(head)}; it needs {', '.join(columns)}")
    rows = [{column: cells[head.index(column)] for column in columns} for cells in table[1:]]
    for number, row in enumerate(rows, 2):
        if row[columns[-1]] not in ("A", "B", "C", "D"):
            raise ValueError(f"{path} row {number}: the answer is {row[columns[-1]]!r}; it should be A, B, C or D")
    if not rows:
        raise ValueError(f"{path} holds no questions")
    return rows


def mmlu_pro(files: Files, name: str | None) -> dict[str, Rows]:
    need = ("question", "options", "answer", "answer_index", "category")
    test = files.jsonl(
        "mmlu_pro*test*.jsonl", "mmlu_pro/test.jsonl", "mmlu_pro_[!v]*.jsonl", "mmlu_pro.jsonl", need=need
    )
    patterns = ("mmlu_pro*validation*.jsonl", "mmlu_pro/validation.jsonl", "mmlu_pro_val*.jsonl")
    if files.search(*patterns):
        return {"test": test, "validation": files.jsonl(*patterns, need=(*need, "cot_content"))}
    files.no_shots = True
    files.notes.append("mmlu_pro_validation.jsonl with the worked examples is missing: asked with 0 shots")
    return {"test": test, "validation": [{**row, "cot_content": ""} for row in test[:1]]}


def agieval(files: Files, name: str | None, set_name: str = "") -> dict[str, Rows]:
    """Original form: passage, question, options "(A)...", label. lm-eval's: query, choices, gold."""
    rows = files.jsonl(f"agieval/{set_name}.jsonl", f"{set_name}.jsonl")
    if "query" in rows[0]:
        return {"test": rows}
    rows = files.jsonl(f"agieval/{set_name}.jsonl", f"{set_name}.jsonl", need=("question", "options", "label"))
    path = list(files.read)[-1]
    chinese = set_name.endswith("-zh") or set_name.startswith(("gaokao", "jec"))
    made: Rows = []
    for number, row in enumerate(rows, 1):
        labels = [row["label"]] if isinstance(row["label"], str) else list(row["label"])
        options, passage = row["options"], row.get("passage") or ""
        if not isinstance(options, list) or any(label not in LETTERS[: len(options)] for label in labels):
            raise ValueError(
                f"{path} row {number}: label {row['label']!r} names none of its {len(options or [])} options"
            )
        letters = LETTERS[: len(options)]
        if chinese:
            query = f"{passage}问题：{row['question']} 选项：{' '.join(options)}\n答案：从A到{letters[-1]}, 我们应选择"
        else:
            query = (
                f"{passage}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
                f"A: Among A through {letters[-1]}, the answer is"
            )
        made.append({"query": query, "choices": options, "gold": [letters.index(label) for label in labels]})
    return {"test": made}


def bbh(files: Files, name: str | None) -> dict[str, Rows]:
    return {"test": files.json(f"bbh/{name}.json", f"{name}.json", inside="examples", need=("input", "target"))}


# ----------------------------------------------------------------------------------------------- mathematics
def gsm8k(files: Files, name: str | None) -> dict[str, Rows]:
    need = ("question", "answer")
    splits = {"test": files.jsonl("gsm8k_test*.jsonl", "gsm8k/test.jsonl", "gsm8k.jsonl", need=need)}
    patterns = ("gsm8k_train*.jsonl", "gsm8k/train.jsonl")
    if files.search(*patterns):
        splits["train"] = files.jsonl(*patterns, need=need)
    elif files.shots:
        splits |= with_pool(files, splits["test"], "test")
    else:
        splits["train"] = splits["test"][:1]
    return splits


def math500(files: Files, name: str | None) -> dict[str, Rows]:
    rows = files.jsonl("math500*.jsonl", "math_500*.jsonl", "MATH-500*.jsonl", "math500/test.jsonl")
    if "problem" in rows[0]:
        rows = files.jsonl(
            "math500*.jsonl", "math_500*.jsonl", "MATH-500*.jsonl", "math500/test.jsonl", need=("problem", "solution")
        )
        return {"test": rows}
    rows = files.jsonl("math500*.jsonl", "math_500*.jsonl", need=("question", "answer"))
    made: Rows = []
    for row in rows:
        solution, _, answer = row["answer"].rpartition("The answer is: ")
        made.append({"problem": row["question"], "solution": solution or row["answer"], "answer": answer})
    return {"test": made}


def asdiv(files: Files, name: str | None) -> dict[str, Rows]:
    return {"validation": files.jsonl("asdiv*.jsonl", need=("body", "question", "answer"))}


def mawps(files: Files, name: str | None) -> dict[str, Rows]:
    return {"test": files.jsonl("mawps*.jsonl", need=("input", "target"))}


def svamp(files: Files, name: str | None) -> dict[str, Rows]:
    return {"test": files.jsonl("svamp*.jsonl", need=("Body", "Question", "Answer"))}


def cmath(files: Files, name: str | None) -> dict[str, Rows]:
    return {"test": files.jsonl("cmath*.jsonl", need=("question", "answer", "grade"))}


# ---------------------------------------------------------------------------------------------------- common sense
def hellaswag(files: Files, name: str | None) -> dict[str, Rows]:
    """lm-eval builds the question anew from its parts; a file with the finished context is taken apart again."""
    rows = files.jsonl("hellaswag*.jsonl", "hellaswag/*val*.jsonl", need=("endings", "label"))
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if "ctx_a" in row and "ctx_b" in row and "activity_label" in row:
            parts = {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b")}
        elif "ctx" in row:
            label, _, context = row["ctx"].partition(": ")
            # In the original the second part is a sentence's beginning in lower case: "... on a roof. he".
            found = re.search(r"^(.*[.!?;\"')]) ([a-z][^.!?]*)$", context, re.DOTALL)
            first, second = found.groups() if found else (context, "")
            parts = {"activity_label": label, "ctx_a": first, "ctx_b": second}
        else:
            raise ValueError(f"{path} row {number} has neither ctx nor ctx_a, ctx_b and activity_label")
        endings, label = row["endings"], str(row["label"])
        if not isinstance(endings, list) or not endings or not all(endings):
            raise ValueError(f"{path} row {number}: endings should be a list of texts that are not empty")
        if label not in map(str, range(len(endings))):
            raise ValueError(
                f"{path} row {number}: the label is {row['label']!r}; it should be 0 to {len(endings) - 1} (the test "
                "part comes without)"
            )
        made.append({**parts, "endings": endings, "label": label})
    return with_pool(files, made)


def arc(files: Files, name: str | None) -> dict[str, Rows]:
    """AI2's form, or choices with the number of the right one under a query that begins with "Question: "."""
    easy = name == "ARC-Easy"
    stem = "arc_easy" if easy else "arc_challenge"
    rows = files.jsonl(f"icl/{stem}*.jsonl", f"{stem}*.jsonl", f"{name}-Test.jsonl", f"arc/{stem}*.jsonl")
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if {"query", "choices", "gold"} <= row.keys():
            labels = list(LETTERS[: len(row["choices"])])
            question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:").strip()
            choices = {"text": row["choices"], "label": labels}
            made.append({"id": str(number), "question": question, "choices": choices, "answerKey": labels[row["gold"]]})
        elif {"question", "choices", "answerKey"} <= row.keys():
            made.append(row if isinstance(row["question"], str) else _arc_original(row))
        else:
            raise ValueError(
                f"{path} row {number} has neither query, choices and gold nor question, choices and answerKey"
            )
    splits = with_pool(files, made, "test")
    return {**splits, "validation": splits["test"]}


def _arc_original(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = row["question"]["choices"]
    return {
        "id": row.get("id", ""),
        "question": row["question"]["stem"],
        "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
        "answerKey": row["answerKey"],
    }


def piqa(files: Files, name: str | None) -> dict[str, Rows]:
    rows = files.jsonl("icl/piqa*.jsonl", "piqa*.jsonl")
    if "query" in rows[0]:
        rows = files.jsonl("icl/piqa*.jsonl", "piqa*.jsonl", need=("query", "choices", "gold"))
        rows = [
            {
                "goal": row["query"].removeprefix("Question: ").strip("\n"),
                "sol1": row["choices"][0],
                "sol2": row["choices"][1],
                "label": row["gold"],
            }
            for row in rows
        ]
    else:
        rows = files.jsonl("icl/piqa*.jsonl", "piqa*.jsonl", need=("goal", "sol1", "sol2", "label"))
    return with_pool(files, rows)


def super_glue(files: Files, name: str | None) -> dict[str, Rows]:
    """BoolQ alone, of which files are common."""
    if name != "boolq":
        raise ValueError(f"super_glue {name} has no local form; boolq has one")
    rows = files.jsonl("icl/boolq*.jsonl", "boolq*.jsonl")
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if {"query", "gold"} <= row.keys():
            passage, found, question = row["query"].rpartition("\nQuestion: ")
            if not found:
                raise ValueError(f"{path} row {number}: the query has no line that begins with 'Question: '")
            question = question.removesuffix("\nAnswer:").removesuffix("?")
            made.append({"passage": passage.removeprefix("Passage: "), "question": question, "label": int(row["gold"])})
        elif {"passage", "question"} <= row.keys() and ("label" in row or "answer" in row):
            label = int(row["label"] if "label" in row else row["answer"])
            made.append({"passage": row["passage"], "question": row["question"], "label": label})
        else:
            raise ValueError(f"{path} row {number} has neither query and gold nor passage, question and label")
    return with_pool(files, made)


def winogrande(files: Files, name: str | None) -> dict[str, Rows]:
    rows = files.jsonl("icl/winogrande*.jsonl", "winogrande*.jsonl", "winogrande*/dev.jsonl")
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if {"context_options", "continuation", "gold"} <= row.keys():
            first, second = row["context_options"]
            size = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
            size = first.rfind(" ", 0, size + 1) + 1
            sentence = f"{first[:size]}_ {row['continuation']}"
            answer = str(row["gold"] + 1)
            made.append({"sentence": sentence, "option1": first[size:], "option2": second[size:], "answer": answer})
        elif {"sentence", "option1", "option2", "answer"} <= row.keys():
            made.append({key: row[key] for key in ("sentence", "option1", "option2", "answer")})
        else:
            raise ValueError(
                f"{path} row {number} has neither context_options, continuation and gold nor sentence, options "
                "and answer"
            )
    return with_pool(files, made)


def lambada(files: Files, name: str | None) -> dict[str, Rows]:
    rows = files.jsonl("icl/lambada*.jsonl", "lambada*.jsonl")
    if "text" in rows[0]:
        return {"test": files.jsonl("icl/lambada*.jsonl", "lambada*.jsonl", need=("text",))}
    rows = files.jsonl("icl/lambada*.jsonl", "lambada*.jsonl", need=("context", "continuation"))
    return {"test": [{"text": f"{row['context']} {row['continuation'].strip()}"} for row in rows]}


def commonsense_qa(files: Files, name: str | None) -> dict[str, Rows]:
    rows = files.jsonl("icl/commonsense_qa*.jsonl", "commonsense_qa*.jsonl", "csqa*.jsonl")
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if {"query", "gold"} <= row.keys():
            found = re.fullmatch(
                r"Question: (.*?)\nChoices:\n(.*?)(?:\nAnswer:)?", row["query"].rstrip("\n"), re.DOTALL
            )
            choices = re.findall(r"^([A-Z])\. (.*)$", found[2], re.MULTILINE) if found else []
            if not found or len(choices) <= row["gold"]:
                raise ValueError(
                    f"{path} row {number}: the query should read 'Question: ...', 'Choices:', 'A. ...', ..."
                )
            labels, texts = [label for label, _ in choices], [text for _, text in choices]
            made.append(
                {"question": found[1], "choices": {"label": labels, "text": texts}, "answerKey": labels[row["gold"]]}
            )
        elif {"question", "choices", "answerKey"} <= row.keys():
            made.append({key: row[key] for key in ("question", "choices", "answerKey")})
        else:
            raise ValueError(f"{path} row {number} has neither query and gold nor question, choices and answerKey")
    return with_pool(files, made)


# ------------------------------------------------------------------------------------------------------ following
def ifeval(files: Files, name: str | None) -> dict[str, Rows]:
    need = ("key", "prompt", "instruction_id_list", "kwargs")
    rows = files.jsonl("ifeval*.jsonl", "IFEval*.jsonl", "input_data.jsonl", need=need)
    path = list(files.read)[-1]
    for number, row in enumerate(rows, 1):
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise ValueError(
                f"{path} row {number} has {len(row['instruction_id_list'])} instructions but "
                f"{len(row['kwargs'])} kwargs"
            )
    return {"train": [{key: row[key] for key in need} for row in rows]}


# ----------------------------------------------------------------------------------------------------------- code
def humaneval(files: Files, name: str | None) -> dict[str, Rows]:
    need = ("task_id", "prompt", "entry_point", "test")
    patterns = ("humaneval.jsonl", "HumanEval.jsonl", "human-eval*.jsonl", "humaneval/test.jsonl")
    return {"test": files.jsonl(*patterns, need=need)}


def multipl_e(files: Files, name: str | None) -> dict[str, Rows]:
    """`name`: humaneval-LANGUAGE, as in MultiPL-E's own files."""
    language = (name or "humaneval-js").removeprefix("humaneval-")
    need = ("name", "language", "prompt", "tests", "stop_tokens")
    patterns = (
        f"humaneval_{language}.jsonl",
        f"humaneval-{language}*.jsonl",
        f"multipl_e*/humaneval-{language}*.jsonl",
    )
    rows = files.jsonl(*patterns, need=need)
    return {"test": [{key: row[key] for key in need} for row in rows]}


MBPP_FILES = ("mbpp.jsonl", "mbpp_test*.jsonl", "mbpp/mbpp.jsonl", "mbpp[_-][!p]*.jsonl", "sanitized-mbpp.jsonl")
SANITIZED_MBPP = "sanitized-mbpp.json"
"""MBPP's authors publish the part that they checked as one list."""


def mbpp(files: Files, name: str | None) -> dict[str, Rows]:
    need = ("task_id", "text", "test_list")
    if not files.search(*MBPP_FILES) and files.search(SANITIZED_MBPP):
        rows = files.json(SANITIZED_MBPP, need=("task_id", "test_list"))
    else:
        rows = files.jsonl(*MBPP_FILES, need=("task_id", "test_list"))
    rows = [{**row, "text": row.get("text") or row.get("prompt", "")} for row in rows]
    if missing := [row for row in rows if not row["text"]]:
        raise ValueError(
            f"{list(files.read)[-1]}: task {missing[0]['task_id']} has no text; it needs {', '.join(need)}"
        )
    path = list(files.read)[-1]
    if path.name.startswith("mbpp_train"):
        files.notes.append(f"{path.name}: tasks of MBPP's training part, not its test part")
    elif len(rows) == 974:  # all of MBPP in one file: 11 to 510 are its test part
        rows = [row for row in rows if 11 <= int(row["task_id"]) <= 510]
    keep = ("task_id", "text", "code", "test_list")
    return {
        "test": [
            {
                **{key: row.get(key, "") for key in keep},
                "test_setup_code": row.get("test_setup_code") or "\n".join(row.get("test_imports") or ()),
            }
            for row in rows
        ]
    }


def mbpp_of_evalplus(files: Files, name: str | None) -> dict[str, Rows]:
    """The file of MBPP+. Where its own tests alone count (`name` "default") a file of MBPP does as well."""
    if name != "default" or files.search(*_evalplus_files("MbppPlus")):
        return evalplus(files, name, "MbppPlus")
    if not files.search(*MBPP_FILES, SANITIZED_MBPP):
        files.find("MbppPlus*.jsonl", *MBPP_FILES)  # says which files it could be
    rows = mbpp(files, name)["test"]
    files.notes.append("problems of MBPP in its own words; EvalPlus' MBPP is 378 of them, in MbppPlus.jsonl")
    return {"test": [{**row, "prompt": row["text"]} for row in rows]}


def _evalplus_files(stem: str) -> tuple[str, ...]:
    # MBPP+ 0.2 has the 378 problems of the published scores, 0.1 has 399
    own = (f"{stem}.jsonl", f"{stem}-v0.2*.jsonl", f"{stem}-v*.jsonl", f"{stem}*.jsonl", f"evalplus/{stem}*.jsonl")
    plain = stem.lower().removesuffix("plus")
    return *own, f"{plain}_plus*.jsonl", f"{plain}plus*.jsonl"


def evalplus(files: Files, name: str | None, stem: str = "") -> dict[str, Rows]:
    """EvalPlus' files. Inputs of tests are values of many types, which stay JSON text until programs are built."""
    need = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
    rows = files.jsonl(*_evalplus_files(stem), need=need, may_be_null=("plus_input", "atol"))
    path = list(files.read)[-1]
    for number, row in enumerate(rows, 1):
        if not isinstance(row["atol"] or 0, (int, float)):
            raise ValueError(f"{path} row {number}: atol is {row['atol']!r}; it should be a number")
        for name in ("base_input", "plus_input"):
            if row[name] and not (isinstance(row[name], list) and all(isinstance(given, list) for given in row[name])):
                raise ValueError(f"{path} row {number}: {name} should be a list with a list of arguments for each call")
    if any(less in path.name.lower() for less in ("mini", "noextreme")):
        files.notes.append(f"{path.name}: fewer tests than the full file, which published scores are for")
    texts = ("task_id", "prompt", "entry_point", "canonical_solution", "contract", "test", "assertion")
    made = [
        {
            **{key: str(row.get(key) or "") for key in texts},
            "base_input": json.dumps(row["base_input"]),
            "plus_input": json.dumps(row["plus_input"]),
            "atol": float(row["atol"] or 0),
        }
        for row in rows
    ]
    return {"test": made}


AGIEVAL_SETS = (
    "aqua-rat", "gaokao-biology", "gaokao-chemistry", "gaokao-chinese", "gaokao-english", "gaokao-geography",
    "gaokao-history", "gaokao-mathqa", "gaokao-physics", "logiqa-en", "logiqa-zh", "lsat-ar", "lsat-lr", "lsat-rc",
    "sat-en", "sat-en-without-passage", "sat-math",
)  # fmt: skip


def _named(layout: Callable[[Files, str | None, str], dict[str, Rows]], fixed: str) -> Layout:
    return lambda files, name: layout(files, name, fixed)


def layouts() -> dict[str, Layout]:
    """Every layout, by the `dataset_path` of tasks."""
    from qwench.evals.own_data import OWN_LAYOUTS

    return {**LAYOUTS, **OWN_LAYOUTS}


LAYOUTS: dict[str, Layout] = {
    "cais/mmlu": mmlu,
    "haonan-li/cmmlu": cmmlu,
    "lmlmcat/cmmlu": cmmlu,
    "ceval/ceval-exam": ceval,
    "TIGER-Lab/MMLU-Pro": mmlu_pro,
    "SaylorTwift/bbh": bbh,
    "lukaemon/bbh": bbh,
    "openai/gsm8k": gsm8k,
    "HuggingFaceH4/MATH-500": math500,
    "EleutherAI/asdiv": asdiv,
    "MU-NLPC/Calc-mawps": mawps,
    "ChilleD/SVAMP": svamp,
    "weitianwen/cmath": cmath,
    "Rowan/hellaswag": hellaswag,
    "allenai/ai2_arc": arc,
    "baber/piqa": piqa,
    "aps/super_glue": super_glue,
    "allenai/winogrande": winogrande,
    "EleutherAI/lambada_openai": lambada,
    "tau/commonsense_qa": commonsense_qa,
    "google/IFEval": ifeval,
    "openai/openai_humaneval": humaneval,
    "nuprl/MultiPL-E": multipl_e,
    "google-research-datasets/mbpp": mbpp,
    "evalplus/humanevalplus": _named(evalplus, "HumanEvalPlus"),
    "evalplus/mbppplus": mbpp_of_evalplus,
    **{f"hails/agieval-{name}": _named(agieval, name) for name in AGIEVAL_SETS},
}


def splits_of(path: str, name: str | None, files: Files) -> dict[str, Sequence[dict[str, Any]]]:
    """The rows of a data set from local files. Raises MissingDataError or ValueError; KeyError without a layout."""
    return dict(layouts()[path](files, name))
