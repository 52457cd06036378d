"""EvalPlus' files as its releases have them: names, versions, types of inputs, rules; and the reading of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwench.evals import code_tests
from qwench.evals.code_tests import CodeResult, evalplus_problem, score_programs
from qwench.evals.local_data import layouts
from qwench.evals.local_files import Files
from qwench.evals.needed_code import function_body, needed_code
from qwench.tools.sandbox import Sandbox


def row(task_id: str, entry_point: str, solution: str, base: Any, plus: Any = (), atol: float = 0) -> dict[str, Any]:
    """A row in the release's form; MBPP+'s prompts are a docstring, HumanEval+'s the function's head."""
    head, _, body = solution.partition("\n")
    mbpp = task_id.startswith("Mbpp")
    told = f'"""\nSays what {entry_point} does.\nassert {entry_point}\n"""\n'
    return {
        "task_id": task_id,
        "prompt": told if mbpp else f'\n\n{head}\n    """Says."""\n',
        "entry_point": entry_point,
        "canonical_solution": f"\n{solution}\n" if mbpp else f"{body}\n",
        "base_input": base, "atol": atol, "plus_input": plus or {},
        "contract": "\n  assert True # $_CONTRACT_$\n", "assertion": f"\nassert {entry_point}\n",
    }  # fmt: skip


# A row, a solution of one's own that is right, and one that is wrong.
ROWS: list[tuple[dict[str, Any], str, str]] = [
    (
        row(
            "HumanEval/32",
            "find_zero",
            "def find_zero(xs: list):\n    return -xs[0] / xs[1]",
            [[[4, 2]]],
            [[[-9, 3]]],
            1e-4,
        ),
        "def find_zero(xs): return -xs[0] / xs[1] + 1e-6",
        "def find_zero(xs): return 1.0",
    ),
    (
        row("HumanEval/2", "truncate", "def truncate(x: float):\n    return x % 1.0", [[3.5]], [[1.33], [1e30]], 1e-6),
        "def truncate(x): return x - int(x)",
        "def truncate(x): return x - int(x) + 1e-3",
    ),
    (
        row("HumanEval/139", "huge", "def huge(n):\n    return 7 ** n", [[3]], [[9000]]),  # no text holds this number
        "import math\ndef huge(n): return math.prod([7] * n)",
        "def huge(n): return 7 ** n + (n > 99)",
    ),
    (
        row("HumanEval/15", "listing", "def listing(n):\n    return ' '.join(map(str, range(n)))", [[3]], [[400_000]]),
        "def listing(n): return ' '.join(f'{i}' for i in range(n))",
        "def listing(n): return ' '.join(f'{i}' for i in range(n)) + ' '",
    ),
    (
        row(
            "Mbpp/2",
            "similar_elements",
            "def similar_elements(a, b):\n  return tuple(set(a) & set(b))",
            [[[3, 4], [4]]],
        ),
        "def similar_elements(a, b): return [x for x in a if x in b]",
        "def similar_elements(a, b): return a",
    ),
    (
        row(
            "Mbpp/63", "most", "def most(pairs):\n  return max({a: b for a, b in pairs}.items())", [[[[1, 2], [3, 4]]]]
        ),
        "def most(pairs): return sorted(set(pairs))[-1]",  # only tuples can be in a set
        "def most(pairs): return list(max(pairs))",
    ),
    (
        row(
            "Mbpp/115",
            "all_empty",
            "def all_empty(items):\n  return all(d == {} for d in items)",
            [[[{}]], [[[1], []]]],
        ),
        "def all_empty(items): return not any(items)",
        "def all_empty(items): return False",
    ),
    (
        row(
            "Mbpp/124",
            "angle",
            "import cmath\ndef angle(a, b):\n  return cmath.phase(a + b)",
            [["0", "1j"]],
            [["-2", "3+1j"]],
        ),
        "import cmath\ndef angle(a, b): return cmath.polar(complex(a, b.imag) + b.real)[1]",
        "def angle(a, b): return 1.5707963",
    ),
    (
        row("Mbpp/307", "filled", "def filled(t, i, v):\n  t[i].append(v)\n  return t", [[["HI", 5, [], True], 2, 50]]),
        "def filled(t, i, v): return (*t[:i], [*t[i], v], *t[i + 1:])",
        "def filled(t, i, v): return [*t[:i], [*t[i], v], *t[i + 1:]]",
    ),
    (
        row("Mbpp/580", "evens", "def evens(t):\n  return t[::2]", [[[4, 5, [7, [2]]]]]),
        "def evens(t): return (t[0], (7, (2,)))",
        "def evens(t): return tuple(t)",
    ),
    (
        row(
            "Mbpp/722",
            "tall",
            "def tall(d, h):\n  return {k: d[k] for k in d if d[k] >= (h,)}",
            [[{"a": [6.2, 7], "b": [5.9, 6]}, 6.0]],
        ),
        "def tall(d, h): return {k: v for k, v in d.items() if v[0] >= h}",
        "def tall(d, h): return list(d)",
    ),
    (
        row(
            "Mbpp/794",
            "text_starta_endb",
            "import re\ndef text_starta_endb(t):\n  return re.search('^a.*b$', t)",
            [["ab"], ["bc"]],
        ),
        "def text_starta_endb(t): return 'found' if t[0] == 'a' and t[-1] == 'b' else None",
        "def text_starta_endb(t): return 'no match'",
    ),
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(code_tests.LIMITS, workers=2) as made:
        yield made


def test_releases_rows_accept_what_is_right_and_nothing_else(sandbox: Sandbox) -> None:
    problems = [evalplus_problem(given) for given, _, _ in ROWS]
    answers = [
        [given["canonical_solution"] if given["task_id"][0] == "M" else problem.reference, right, wrong]
        for problem, (given, right, wrong) in zip(problems, ROWS, strict=True)
    ]
    results = score_programs(problems, answers, sandbox=sandbox)
    for (given, _, _), line in zip(ROWS, results, strict=True):
        assert [result.passed for result in line] == [True, True, False], (given["task_id"], line)
    assert results[2][2] == CodeResult(
        False, "failed", "plus input 0: <int that cannot be printed: ValueError> where "
        "<int that cannot be printed: ValueError> is expected", base_passed=True,
    )  # fmt: skip


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    def write(name: str, *rows: dict[str, Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")

    return write


def load(root: Path, path: str, name: str | None = None) -> tuple[list[dict[str, Any]], Files]:
    files = Files((root,))
    (rows,) = layouts()[path](files, name).values()
    return rows, files


@pytest.mark.parametrize(
    "name", ["MbppPlus.jsonl", "MbppPlus-v0.1.0.jsonl", "MbppPlus-Mini.jsonl", "mbpp_plus.jsonl", "mbppplus_0.2.jsonl"]
)
def test_names_of_the_file(put: Callable[..., None], tmp_path: Path, name: str) -> None:
    put(name, ROWS[4][0])
    for config in (None, "default"):
        rows, files = load(tmp_path, "evalplus/mbppplus", config)
        assert [one["task_id"] for one in rows] == ["Mbpp/2"]
        assert files.notes == (
            ["MbppPlus-Mini.jsonl: fewer tests than the full file, which published scores are for"]
            if "Mini" in name
            else []
        )
    with pytest.raises(ValueError, match=r"no file mbpp\.jsonl"):  # it is no file of MBPP itself
        load(tmp_path, "google-research-datasets/mbpp", "full")


def test_the_newer_version_is_read(put: Callable[..., None], tmp_path: Path) -> None:
    put("MbppPlus-v0.1.0.jsonl", ROWS[4][0], ROWS[5][0])
    put("MbppPlus-v0.2.0.jsonl", ROWS[5][0])
    put("HumanEvalPlus-v0.1.10.jsonl", ROWS[0][0])
    put("HumanEvalPlus-v0.1.9.jsonl", ROWS[1][0])
    assert [one["task_id"] for one in load(tmp_path, "evalplus/mbppplus")[0]] == ["Mbpp/63"]
    assert [one["task_id"] for one in load(tmp_path, "evalplus/humanevalplus")[0]] == ["HumanEval/32"]


def test_mbpp_for_chat_models_without_the_file_of_mbpp_plus(put: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file MbppPlus\*\.jsonl or mbpp\.jsonl"):
        load(tmp_path, "evalplus/mbppplus", "default")
    checked = {
        "task_id": 11,
        "prompt": "Square.",
        "code": "c",
        "test_imports": ["import math"],
        "test_list": ["assert 1"],
    }
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([checked]), encoding="utf-8")
    (one,), files = load(tmp_path, "evalplus/mbppplus", "default")
    assert (one["prompt"], one["text"], one["test_setup_code"]) == ("Square.", "Square.", "import math")
    assert "EvalPlus' MBPP is 378 of them" in files.notes[0]
    with pytest.raises(ValueError, match=r"no file MbppPlus\.jsonl"):
        load(tmp_path, "evalplus/mbppplus")


def test_parts_of_a_file_are_read_together(put: Callable[..., None], tmp_path: Path) -> None:
    for part in "ab":
        put(f"gsm8k_test_{part}.jsonl", {"question": part, "answer": "#### 1"})
    put("gsm8k_test_old.jsonl", {"question": "other", "answer": "#### 1"})
    files = Files((tmp_path,))
    assert [one["question"] for one in layouts()["openai/gsm8k"](files, "main")["test"]] == ["a", "b"]
    assert [path.name for path in files.read] == ["gsm8k_test_a.jsonl", "gsm8k_test_b.jsonl"]


SOLVED = """import math

def helper(x):
    return math.floor(x)

LIMIT: int = 3

def solve(x):
    return helper(x) + LIMIT"""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (SOLVED + "\n\nassert solve(1) == 99", SOLVED),
        (SOLVED + "\n\nresult = solve(1)\n\ndef other():\n    return 1", SOLVED),
        (SOLVED + "\n\nassert solve(", SOLVED),  # cut in the middle
        ("Sure, here it is:\n" + SOLVED + "\nHope that helps!", SOLVED),
        (SOLVED + "\n\ndef solve(x):\n    return 0", SOLVED),  # the first one counts
        ("def print_it():\n    print(1)", "def print_it():\n    print(1)"),  # nothing is needed: all of it
        ("@cache\ndef solve(x):\n    return x\n\nsolve(1)", "@cache\ndef solve(x):\n    return x"),
        ("import math\ndef solve(x):\n    print(x)", "import math"),
        ("import math\nsolve = 1 if math else 2\n", "import math\nsolve = 1 if math else 2"),
        ("no code at all", "no code at all"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_a_function_needs(text: str, kept: str) -> None:
    lines = [line for line in needed_code(text, "solve").split("\n") if line.strip()]
    assert lines == [line for line in kept.split("\n") if line.strip()]


def test_the_code_is_found_in_a_long_text() -> None:
    """However long: short code before, between and behind much that is none."""
    prose = ["This sentence (which has a bracket is no code.", "It's not, either.", "- nor is this"] * 80
    for place in (0, 100, len(prose)):
        text = "\n".join([*prose[:place], SOLVED, *prose[place:]])
        assert [line for line in needed_code(text, "solve").split("\n") if line] == [
            line for line in SOLVED.split("\n") if line
        ]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (
            "Sure:\n```python\nimport math\ndef f(x):\n    y = x\n\n    return y\n```\nDone.",
            "    y = x\n\n    return y",
        ),
        ("def f(x):\n    return x\nprint(f(1))", "    return x"),
        ("Here:\ndef other(x):\n    return 2\nBye", "    return 2"),
        ("return x", "    return x"),
    ],
)
def test_bodies_of_functions_in_answers(answer: str, body: str) -> None:
    assert function_body(answer, "f") == body
