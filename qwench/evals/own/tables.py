"""Reading tables: made-up ones in Markdown, CSV and HTML, with questions that have one exact answer.

Look-up, count, sum, maximum and comparison, in English and Chinese. Numbers count by value, names as they stand in
the table; of a longer answer the first line that has one is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from qwench.evals import context
from qwench.evals.own.filler import words
from qwench.evals.own.lengths import dataset, read_count, refuse_unknown, seeded

FORMATS = ("markdown", "csv", "html")
KINDS = ("lookup", "count", "sum", "max", "compare")
_NAMES = {
    "en": words(
        "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Marta Nils Olga Peter Rosa Simon "
        "Tessa Victor"
    ),
    "zh": words("王芳 李强 张敏 刘洋 陈静 杨磊 赵丽 黄勇 周杰 吴娟 徐涛 孙霞 马超 朱琳 胡斌 郭燕 何平 林峰 罗丹 高飞"),
}
_TOPICS: dict[str, list[tuple[str, str, list[str], str, list[str]]]] = {
    # (who, group, groups, name column, number columns)
    "en": [
        ("employee", "Department", ["Sales", "Support", "Research", "Finance"], "Name", ["Age", "Salary", "Holidays"]),
        ("student", "Class", ["North", "South", "East", "West"], "Name", ["Maths", "History", "Biology"]),
        ("runner", "Team", ["Red", "Blue", "Green"], "Name", ["Races", "Wins", "Points"]),
    ],
    "zh": [
        ("员工", "部门", ["销售部", "客服部", "研发部", "财务部"], "姓名", ["年龄", "工资", "假期"]),
        ("学生", "班级", ["一班", "二班", "三班"], "姓名", ["数学", "历史", "生物"]),
        ("队员", "球队", ["红队", "蓝队", "绿队"], "姓名", ["场次", "胜场", "积分"]),
    ],
}
_ASK = {
    "en": {
        "lookup": "What is the value in the column {column} for {name}?",
        "count": "How many rows have {value} in the column {group}?",
        "sum": "What is the sum of the column {column} over all rows with {value} in the column {group}?",
        "max": "Who has the largest value in the column {column}?",
        "compare": "Who has the larger value in the column {column}, {name} or {other}?",
    },
    "zh": {
        "lookup": "{name}的“{column}”一列的值是多少？",
        "count": "“{group}”一列为“{value}”的有多少行？",
        "sum": "“{group}”一列为“{value}”的所有行，“{column}”一列的总和是多少？",
        "max": "“{column}”一列的值最大的是谁？",
        "compare": "{name}和{other}相比，谁的“{column}”一列的值更大？",
    },
}
_FRAME = {
    "en": ("Here is a table:\n\n{table}\n\nQuestion: {ask} Answer with the {what} only.", "number", "name", "Answer:"),
    "zh": ("下面是一个表格：\n\n{table}\n\n问题：{ask}只回答{what}。", "数字", "名字", "答案："),
}


def render(head: Sequence[str], rows: Sequence[Sequence[object]], form: str) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    if form == "csv":
        return "\n".join(",".join(row) for row in [list(head), *cells])
    if form == "html":
        lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells]
        return "\n".join(
            ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>", *lines, "</table>"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *cells]]
    return "\n".join(lines)


def make(rng: Random, language: str, kind: str, form: str, size: int) -> dict[str, Any]:
    """One document: table, question, answer. Values of a column differ, so that a maximum is one row's."""
    _, group, groups, first, columns = rng.choice(_TOPICS[language])
    names = rng.sample(_NAMES[language], size)
    numbers = {column: rng.sample(range(10, 1000), size) for column in columns}
    members = [rng.choice(groups) for _ in names]
    rows = [[name, members[n], *(numbers[column][n] for column in columns)] for n, name in enumerate(names)]
    column, value = rng.choice(columns), rng.choice(members)
    one, two = rng.sample(range(size), 2)
    answers: dict[str, Callable[[], object]] = {
        "lookup": lambda: numbers[column][one],
        "count": lambda: members.count(value),
        "sum": lambda: sum(number for number, member in zip(numbers[column], members, strict=True) if member == value),
        "max": lambda: names[numbers[column].index(max(numbers[column]))],
        "compare": lambda: names[one if numbers[column][one] > numbers[column][two] else two],
    }
    asked = _ASK[language][kind].format(column=column, name=names[one], other=names[two], group=group, value=value)
    frame, number, name, prefix = _FRAME[language]
    what = name if kind in ("max", "compare") else number
    table = render([first, group, *columns], rows, form)
    return {
        "question": frame.format(table=table, ask=asked, what=what),
        "answer": str(answers[kind]()),
        "names": names,
        "kind": kind,
        "format": form,
        "gen_prefix": prefix,
    }


def _docs(language: str, options: Mapping[str, Any]) -> Any:
    refuse_unknown(options)
    running = context.current()
    samples = read_count("samples", options.get("samples", 150))
    size = read_count("rows", options.get("rows", 12), len(_NAMES[language]))
    if size < 2:
        raise ValueError("metadata rows is 1; comparisons need at least 2 rows")
    rows = [
        make(
            seeded("table", language, running.seed, number),
            language,
            KINDS[number % len(KINDS)],
            FORMATS[number // len(KINDS) % len(FORMATS)],
            size,
        )
        for number in range(samples)
    ]
    return dataset(rows)


def docs_en(**options: Any) -> Any:
    """Documents; options: samples (150), rows of a table (12)."""
    return _docs("en", options)


def docs_zh(**options: Any) -> Any:
    return _docs("zh", options)


def read_answer(text: str, doc: Mapping[str, Any]) -> str:
    """The number or name that an answer gives; "" where it gives none, or several."""
    wants_name = doc["kind"] in ("max", "compare")
    text = re.split(r"(?i)answer is|答案是|答案为", text)[-1]
    for line in text.split("\n"):
        if wants_name:
            found = [name for name in doc["names"] if re.search(_whole(name), line)]
        else:
            found = [number.replace(",", "") for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)]
        if found:
            return found[0] if len(set(found)) == 1 else ""
    return ""


def _whole(name: str) -> str:
    return rf"\b{name}\b" if name.isascii() else name


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`acc`, and the same for the kind of question and for the format of the table."""
    found, wanted = read_answer(results[0], doc), doc["answer"]
    same = found == wanted
    if not same and found and doc["kind"] not in ("max", "compare"):
        same = float(found) == float(wanted)
    return {name: float(same) for name in ("acc", f"acc_{doc['kind']}", f"acc_{doc['format']}")}
