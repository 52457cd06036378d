"""Scoring of code by running it: each benchmark's format, what passes and what must not, EvalPlus's rules."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from qwench.evals import code_tests, evalplus_program
from qwench.evals.code_tests import (
    LIMITS,
    CodeProblem,
    CodeResult,
    alone,
    evalplus_problem,
    humaneval_problem,
    mbpp_problem,
    multipl_e_problem,
    pass_at_k,
    score_programs,
    solution,
)
from qwench.tools.sandbox import Program, Sandbox, SandboxResult

ADD = {
    "task_id": "HumanEval/900",
    "prompt": "import math\n\ndef half(x):\n    return x / 2\n\ndef add(a, b):\n    '''Sum.'''\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as made:
        yield made


def one(sandbox: Sandbox, problem: CodeProblem, *completions: str) -> list[CodeResult]:
    return score_programs([problem], [completions], sandbox=sandbox)[0]


def test_humaneval(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_tests, "LIMITS", dataclasses.replace(LIMITS, cpu_s=0.5))
    results = one(
        sandbox,
        humaneval_problem(ADD),
        "    return a + b\n",
        "def add(a, b):\n    return int(half(2 * (a + b)))\n",  # whole, with a helper of the prompt
        "    print('x' * 100_000)\n    return a + b\n",
        "    return a - b\n",
        "    return a +\n",
        "    raise AssertionError('own')\n",
        "    while True: pass\n",
        "    import sys; sys.exit(0)\n",
        "    import os; os._exit(0)\n",
        "    return undefined\n",
    )
    assert [result.status for result in results] == [
        "passed", "passed", "passed", "failed", "error", "failed", "timeout", "error", "error", "error",
    ]  # fmt: skip
    assert [result.passed for result in results] == [True] * 3 + [False] * 7
    assert results[4].detail == "SyntaxError: invalid syntax"
    assert results[8].detail == "it ended before its tests did"
    assert "processor" in results[6].detail
    assert results[9].detail.startswith("NameError")


def test_what_a_solution_does_besides_is_no_failure(sandbox: Sandbox):
    """It runs in an empty namespace, as in HumanEval's own harness, and what it prints is ignored, early or late."""
    results = one(
        sandbox,
        humaneval_problem(ADD),
        "    print('some', 'text', end='')\n    return a + b\n",  # still in Python's buffer when the tests are done
        "    import atexit\n    atexit.register(print, 'bye')\n    return a + b\n",
        "    return a + b\n\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n",
        "    return a + b\n\nif __name__ == '__main__':\n    import unittest\n    unittest.main()\n",
        "    import threading, time\n    threading.Thread(target=time.sleep, args=(999,)).start()\n    return a + b\n",
        "    return a + b\n\ndef add(a, b):\n    return b + a\n",  # a body, and then the whole again
        "    return a - b\n\nif __name__ == '__main__':\n    pass\n",
    )
    assert [result.status for result in results] == ["passed"] * 6 + ["failed"], results


def test_a_whole_function_replaces_the_prompts():
    problem = humaneval_problem(ADD)
    assert solution(problem, "    return 1\n") == ADD["prompt"] + "    return 1\n"
    whole = solution(problem, "from typing import List\n\ndef add(a, b):\n    return 1\n")
    assert whole.count("def add") == 1
    assert "def half" in whole
    assert "Sum." not in whole
    assert solution(problem, "    def add(x): return x\n").startswith(ADD["prompt"])  # an inner one is no head
    method = "def add_all(a): ...\n"
    assert solution(problem, method).startswith(ADD["prompt"])


def test_mbpp(sandbox: Sandbox):
    row = {
        "task_id": 7, "text": "Square.",
        "code": "def helper(x):\r\n  return x\r\ndef square(x):\r\n  return helper(x) * x",
        "test_setup_code": "import math", "test_list": ["assert math.isclose(square(2), 4)", "assert square(-3) == 9"],
    }  # fmt: skip
    problem = mbpp_problem(row)
    assert (problem.task_id, problem.entry_point, problem.prompt) == ("Mbpp/7", "square", "")
    results = one(sandbox, problem, row["code"], "def square(x): return 4", "square = abs")
    assert [result.status for result in results] == ["passed", "failed", "failed"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_multipl_e_javascript(sandbox: Sandbox):
    row = {
        "name": "HumanEval_23_strlen", "language": "js", "prompt": "//Length\nfunction strlen(string){\n",
        "tests": "const assert = require('node:assert');\nfunction test() {\n  let candidate = strlen;\n"
        "  assert.deepEqual(candidate('abc'), 3);\n}\ntest();",
    }  # fmt: skip
    problem = multipl_e_problem(row)
    assert (problem.entry_point, problem.language) == ("strlen", "javascript")
    results = one(
        sandbox, problem, "  return string.length;\n}\n", "const strlen = s => s.length;", "  return 1;\n}\n",
        "  return (;\n}\n", "  process.exit(0);\n}\n", "  process.stdout.write('x'.repeat(3e5)); return 3;\n}\n",
    )  # fmt: skip
    assert [result.status for result in results] == ["passed", "passed", "failed", "error", "error", "passed"]
    assert results[3].detail.startswith("SyntaxError")
    with pytest.raises(ValueError, match="'rkt' is not run here"):
        multipl_e_problem(row | {"language": "rkt"})


PLUS: dict[str, Any] = {
    **ADD,
    "base_input": [[1, 2], [3, 4]],
    "plus_input": [[10**30, 1], [0.1, 0.2], [[1], [2]]],
    "atol": 0,
}


def test_evalplus_expected_outputs_come_from_the_canonical_solution(sandbox: Sandbox):
    results = one(
        sandbox,
        evalplus_problem(PLUS),
        ADD["canonical_solution"],
        "    return a + b + 1e-9 if isinstance(a, float) else a + b\n",  # within 1e-6 of a float
        "    return a + b + 1e-3 if isinstance(a, float) else a + b\n",
        "    return a + b if isinstance(a, int) and a < 100 else None\n",
        "    return 0\n",
        "    import sys; sys.exit(0)\n",
        "    return open('expected.pickle', 'rb').read()\n",
        "    return a +\n",
    )
    assert [result.status for result in results] == [
        "passed", "passed", "failed", "failed", "failed", "error", "error", "error",
    ]  # fmt: skip
    assert [result.base_passed for result in results] == [True, True, True, True, False, False, False, False]
    assert results[3].detail == f"plus input 0: None where {10**30 + 1} is expected"
    assert "FileNotFoundError" in results[6].detail
    base = one(sandbox, evalplus_problem(PLUS, base_only=True), "    return a + b if a < 100 else None\n")
    assert base == [CodeResult(True, "passed", "", True)]


def test_evalplus_a_solution_runs_in_a_namespace_of_nothing(sandbox: Sandbox):
    """As evalplus runs it: names in annotations must exist, and classes belong to a module that there is."""
    results = one(
        sandbox,
        alone(evalplus_problem(PLUS)),
        "def add(a: List[int], b):\n    return a + b\n",
        "from typing import List\ndef add(a: List[int], b):\n    return a + b\n",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    a: ClassVar\n"
        "def add(a, b):\n    return a + b\n",
        "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    1 / 0\n",
    )
    assert [result.status for result in results] == ["error", "passed", "passed", "passed"], results
    assert results[0].detail == "base: NameError: NameError(\"name 'List' is not defined\")"


def test_evalplus_a_call_out_of_time_fails(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    program = code_tests._EVALPLUS_PROGRAM.read_text().replace(
        "LEAST_S, REFERENCE_FACTOR = 4.0, 4.0", "LEAST_S, REFERENCE_FACTOR = 0.2, 4.0"
    )
    monkeypatch.setattr(type(code_tests._EVALPLUS_PROGRAM), "read_text", lambda self, encoding="": program)
    loop = "    try:\n        while a == 10**30: pass\n    except Exception: pass\n    return a + b\n"
    (result,) = one(sandbox, evalplus_problem(PLUS), loop)
    assert (result.status, result.base_passed) == ("timeout", True), result


def test_evalplus_rows_that_are_broken(sandbox: Sandbox):
    for name in ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input"):
        row = {key: value for key, value in PLUS.items() if key != name}
        with pytest.raises(ValueError, match=f"field {name} is missing"):
            evalplus_problem(row)
    with pytest.raises(ValueError, match="HumanEval/N and Mbpp/N, not Other/3"):
        evalplus_problem(PLUS | {"task_id": "Other/3"})
    with pytest.raises(ValueError, match="has no inputs"):
        evalplus_problem(PLUS | {"base_input": []})
    with pytest.raises(
        ValueError, match=r"canonical solution of HumanEval/900 gave no expected outputs: error .*NameError"
    ):
        one(sandbox, evalplus_problem(PLUS | {"canonical_solution": "    return nothing\n"}), "")


@pytest.mark.parametrize(
    ("dataset", "name", "given", "out", "expected", "atol", "holds"),
    [
        ("humaneval", "f", [], [1.0, 2.0], [1.0, 2.0 + 1e-9], 1e-6, True),
        ("humaneval", "f", [], (1.0,), [1.0], 1e-6, False),  # the type counts where the value does not equal
        ("humaneval", "f", [], [1, 2], (1, 2), 0, False),
        ("humaneval", "f", [], 1, 1.0, 0, True),
        ("humaneval", "f", [], "a", "b", 1e-6, False),
        ("humaneval", "f", [], [1.0], [1.0, 2.0], 1e-6, False),
        ("humaneval", "f", [], [[1.0 + 1e-8]], [[1.0]], 1e-6, True),
        ("humaneval", "f", [], [[1.0 + 1e-8], [1.0, 2.0]], [[1.0], [1.0, 2.0]], 1e-6, False),  # ragged: numpy has none
        ("humaneval", "f", [], [1.0], [[1.0 + 1e-8]], 1e-6, True),  # numpy broadcasts
        ("humaneval", "f", [], math.nan, math.nan, 1e-6, False),
        ("humaneval", "f", [], 5.0, math.inf, 1e-6, False),
        ("humaneval", "f", [], None, 1.0, 1e-6, False),
        ("humaneval", "find_zero", [[-6.0, 2.0]], 3.0, 2.5, 1e-6, True),
        ("humaneval", "find_zero", [[-6.0, 2.0]], 3.1, 3.1, 1e-6, False),
        ("mbpp", "are_equivalent", [], "anything", True, 0, True),
        ("mbpp", "sum_div", [], 0, 7, 0, True),
        ("mbpp", "digit_distance_nums", [1, 256], 12, 0, 0, True),
        ("mbpp", "surface_Area", [3, 4], 35, 33, 0, True),
        ("mbpp", "similar_elements", [], [2, 1, 1], (1, 2), 0, True),
        ("mbpp", "similar_elements", [], [2], (1, 2), 0, False),
        ("humaneval", "similar_elements", [], [2, 1], [1, 2], 0, False),
        ("mbpp", "check_str", [], "a match", True, 0, True),
        ("mbpp", "check_str", [], None, False, 0, True),
        ("mbpp", "check_str", [], False, True, 0, False),
    ],
)
def test_evalplus_comparison(
    dataset: str, name: str, given: list[Any], out: Any, expected: Any, atol: float, holds: bool
):
    assert evalplus_program.accepts(dataset, name, given, out, expected, atol) is holds


def test_mbpp_inputs_get_their_types():
    decode = evalplus_program.decode_mbpp
    assert decode(2, [[1, 2], [3]]) == [(1, 2), (3,)]
    assert decode(63, [[[1, 2], [3, 4]]]) == [[(1, 2), (3, 4)]]
    assert decode(75, [[[1, 2]], 6]) == [[(1, 2)], 6]
    assert decode(106, [[1], [2]]) == [[1], (2,)]
    assert decode(115, [[[1, 2], []]]) == [[{1, 2}, {}]]
    assert decode(124, ["1.5", "2+3j"]) == [1.5, 2 + 3j]
    assert decode(250, [[1, 2], 1]) == [(1, 2), 1]
    assert decode(259, [[[1, 2]], [[3, 4]]]) == [((1, 2),), ((3, 4),)]
    assert decode(278, [[1, [2, 3]]]) == [(1, (2, 3))]
    assert decode(307, [[1], 0, 5]) == [(1,), 0, 5]
    assert decode(722, [{"a": [1, 2]}, 3]) == [{"a": (1, 2)}, 3]
    assert decode(252, ["3+4j"]) == [3 + 4j]
    assert decode(580, [[1, [2, [3]]]]) == [(1, (2, (3,)))]
    assert decode(3, [[1]]) == [[1]]


def test_pass_at_k():
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(5, 0, 3) == 0
    assert pass_at_k(5, 3, 3) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(200, 7, 100) == pytest.approx(1 - math.prod((100 - i) / (200 - i) for i in range(7)))
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_order_and_shape_and_broken_problems(sandbox: Sandbox):
    problems = [humaneval_problem(ADD), humaneval_problem(ADD | {"test": "def check(c):\n    assert c(1, 1) == 5\n"})]
    results = score_programs(
        problems, [["    return a + b\n"], ["    return 5\n", "    return a + b\n"]], sandbox=sandbox
    )
    assert [[result.passed for result in answers] for answers in results] == [[True], [True, False]]
    assert score_programs(problems, [[], []], sandbox=sandbox) == [[], []]
    with pytest.raises(ValueError, match="2 problems but completions of 1"):
        score_programs(problems, [[]], sandbox=sandbox)
    with pytest.raises(ValueError, match="has no tests"):
        CodeProblem("x", "", " ", "f")
    with pytest.raises(ValueError, match="not in 'cobol'"):
        CodeProblem("x", "", "assert f()", "f", "cobol")
    with pytest.raises(ValueError, match="HumanEval/900: the field test is missing"):
        humaneval_problem({key: value for key, value in ADD.items() if key != "test"})


def test_what_the_machine_may_have_ended_runs_once_more_alone():
    """A pool whose first runs end by wall time or with their worker; processor time is believed at once."""
    asked: list[int] = []
    slow = SandboxResult("timeout", "", "", -9, 0.1, 120.0, {}, "more than 120 s of wall time")
    lost = SandboxResult("killed", "", "", -9, 0.0, 0.0, {}, "the sandbox's worker was lost: it ended")
    loop = SandboxResult("timeout", "", "", -9, 10.0, 11.0, {}, "more than 10 s of processor time")

    class Busy(Sandbox):
        def __init__(self) -> None: ...

        def run_many(self, programs: Sequence[str | Program]) -> list[SandboxResult]:
            if not programs:
                return []
            asked.append(len(programs))
            if len(programs) == 3:
                return [slow, lost, loop]
            (program,) = programs
            assert isinstance(program, Program)
            (word,) = re.findall("[0-9a-f]{32}", program.source)
            return [SandboxResult("ok", f"\n{word}\n", "", 0, 0.1, 0.1, {})]

    (results,) = score_programs([humaneval_problem(ADD)], [["    return 1\n"] * 3], sandbox=Busy())
    assert asked == [3, 1, 1]
    assert [result.status for result in results] == ["passed", "passed", "timeout"]


def test_tests_call_the_prompts_helpers_and_whole_answers_do_not(sandbox: Sandbox) -> None:
    problem = CodeProblem(
        "HumanEval/38",
        'import math\n\n\ndef helper(x):\n    return math.floor(x) + 1\n\n\ndef inverse(x):\n    """Undo helper."""\n',
        "def check(candidate):\n    assert candidate(helper(3)) == 3\ncheck(inverse)\n",
        "inverse",
    )
    answers = [
        "def inverse(x):\n    return x - 1\n",
        "def inverse(x):\n    return x\n",
        "def inverse(x):\n    return helper(x) - 2\n",
    ]
    right, wrong, leaning = one(sandbox, alone(problem), *answers)
    assert right.passed
    assert (wrong.status, leaning.status) == ("failed", "error")
    assert "helper" in leaning.detail
    (behind,) = one(sandbox, problem, answers[2])
    assert behind.passed
