"""Scores code that a model wrote by running it with its problem's tests in the sandbox: HumanEval, MBPP, MultiPL-E,
and HumanEval+ and MBPP+ in EvalPlus's own file format.

A program is the prompt, the completion and the tests. It has passed when it ran to its last line, which says a word
that the program does not know beforehand: a solution that leaves early with exit code 0 has not. Time limits are
processor seconds. What ended by wall time or with its worker is run once more alone, with nothing beside it.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwench.tools.sandbox import Program, Sandbox, SandboxLimits, SandboxResult

CodeStatus = Literal["passed", "failed", "error", "timeout", "memory", "output", "killed"]
LIMITS = SandboxLimits(cpu_s=10.0, wall_s=120.0, memory_mb=2048, output_bytes=16 << 20)
EVALPLUS_LIMITS = SandboxLimits(cpu_s=62.0, wall_s=300.0, memory_mb=4096, output_bytes=1 << 20, file_mb=256)
_EVALPLUS_PROGRAM = Path(__file__).with_name("evalplus_program.py")


@dataclass(frozen=True)
class CodeProblem:
    """One problem. `tests` follow the solution in the same file; they fail by raising.

    `evalplus` holds the inputs of an EvalPlus problem, whose expected outputs come from `reference`, its canonical
    solution run in the sandbox; `tests` is empty then.
    """

    task_id: str
    prompt: str
    tests: str
    entry_point: str
    language: str = "python"
    reference: str = ""
    evalplus: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.language not in _ENDINGS:
            raise ValueError(f"{self.task_id}: code is tested in {', '.join(_ENDINGS)}, not in {self.language!r}")
        if not self.tests.strip() and not self.evalplus:
            raise ValueError(f"{self.task_id} has no tests")


@dataclass(frozen=True)
class CodeResult:
    """How one completion did. "failed": a test did not hold; "error": it raised or did not end as it should.

    `base_passed` is None except for EvalPlus problems: whether the benchmark's original inputs passed.
    """

    passed: bool
    status: CodeStatus
    detail: str
    base_passed: bool | None = None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, when c of n did: 1 - C(n-c, k) / C(n, k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= passed <= samples and 1 <= k <= samples, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------------------- problems from rows


def _field(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    known = row.get("task_id", row.get("name", "a problem without a name"))
    raise ValueError(f"{known}: the field {' or '.join(names)} is missing (there are {', '.join(row)})")


def humaneval_problem(row: Mapping[str, Any]) -> CodeProblem:
    """A row of HumanEval: task_id, prompt, entry_point, test (defines check). ValueError for a missing field."""
    name = str(_field(row, "entry_point"))
    tests = f"{_field(row, 'test')}\ncheck({name})\n"
    return CodeProblem(str(_field(row, "task_id")), str(_field(row, "prompt")), tests, name)


def multipl_e_problem(row: Mapping[str, Any]) -> CodeProblem:
    """A row of MultiPL-E: name, language (js, py, sh, pl), prompt, tests. ValueError for what cannot be run."""
    task_id, short = str(_field(row, "name", "task_id")), str(_field(row, "language"))
    languages = {"js": "javascript", "py": "python", "sh": "bash", "pl": "perl"}
    if short not in languages:
        raise ValueError(f"{task_id}: MultiPL-E's {short!r} is not run here (there are {', '.join(languages)})")
    prompt = str(_field(row, "prompt"))
    heads = re.findall(r"^(?:async )?(?:function|def|sub)?\s*(\w+)\s*[({]", prompt, re.MULTILINE)
    return CodeProblem(task_id, prompt, str(_field(row, "tests", "test")), heads[-1] if heads else "", languages[short])


def mbpp_problem(row: Mapping[str, Any]) -> CodeProblem:
    """A row of MBPP: text, code, test_list, test_setup_code. The completion is the whole code, so there is no prompt
    in the program."""
    task_id, tests = f"Mbpp/{_field(row, 'task_id')}", [str(test) for test in _field(row, "test_list")]
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    defined = re.findall(r"^(?:def|class)\s+(\w+)", str(row.get("code") or ""), re.MULTILINE)
    called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", tests[0]) if tests else []
    name = next((name for name in called if name in defined), called[0] if called else "")
    return CodeProblem(task_id, "", "\n".join(filter(None, [setup, *tests])), name)


def evalplus_problem(row: Mapping[str, Any], base_only: bool = False) -> CodeProblem:
    """A row of HumanEvalPlus.jsonl or MbppPlus.jsonl. ValueError for a missing field or another benchmark's row."""
    task_id, prompt = str(_field(row, "task_id")), str(_field(row, "prompt"))
    dataset, _, number = task_id.lower().partition("/")
    if dataset not in ("humaneval", "mbpp") or not number.isdigit():
        raise ValueError(f"EvalPlus's problems are HumanEval/N and Mbpp/N, not {task_id}")
    inputs = {"base": _field(row, "base_input")} | ({} if base_only else {"plus": _field(row, "plus_input")})
    if not inputs["base"]:
        raise ValueError(f"{task_id} has no inputs")
    name = str(_field(row, "entry_point"))
    task = {"dataset": dataset, "number": int(number), "entry_point": name, "atol": row.get("atol") or 0}
    reference = prompt + str(_field(row, "canonical_solution"))
    return CodeProblem(task_id, prompt, "", name, "python", reference, task | {"inputs": inputs})


# ---------------------------------------------------------------------------------------------- programs

# What a program does when it has come to its end. Python leaves at once: no thread that the solution left running is
# waited for, and nothing that it does at the exit counts.
_ENDINGS = {
    "python": "\nimport os\nos.write(1, b'\\n{word}\\n')\nos._exit(0)\n",
    "javascript": "\n\nprocess.stdout.write('\\n{word}\\n');\n",  # waits where a pipe is full, unlike fs.writeSync
    "bash": "\n\nprintf '\\n%s\\n' '{word}'\n",
    "perl": '\n\nprint "\\n{word}\\n";\n',
}
_HEADS = {
    "python": r"^(?:async\s+)?def\s+{name}\b|^class\s+{name}\b|^{name}\s*=",
    "javascript": r"^(?:export\s+)?(?:async\s+)?function\*?\s+{name}\b|^(?:const|let|var)\s+{name}\s*=",
    "bash": r"^(?:function\s+)?{name}\s*\(\)|^function\s+{name}\b",
    "perl": r"^sub\s+{name}\b",
}


def solution(problem: CodeProblem, completion: str) -> str:
    """Prompt and completion as one source. A completion that defines the function itself replaces the prompt's head of
    it and keeps what stands before (imports and helpers); any other continues the prompt."""
    if not problem.entry_point or not problem.prompt:
        return problem.prompt + completion
    if not _head(problem).search(completion) or re.match(r"\s*^[ \t]", completion, re.MULTILINE):
        return problem.prompt + completion  # a body, even where the function is defined again behind it
    before = _before(problem)
    return f"{before.rstrip()}\n\n{completion}" if before.strip() else completion


def alone(problem: CodeProblem) -> CodeProblem:
    """The same for answers that are whole programs, with nothing of the prompt before them. Functions of the prompt
    that the tests call (three problems of HumanEval) are there for the tests, out of the answer's sight."""
    before = _before(problem) if problem.language == "python" and problem.entry_point else ""
    helpers = re.findall(r"^def\s+(\w+)", before, re.MULTILINE)
    tests = problem.tests
    if any(re.search(rf"\b{name}\b", tests) for name in helpers):
        tests = f"exec({before + tests!r}, dict(globals()))\n"
    return replace(problem, prompt="", tests=tests)


def _head(problem: CodeProblem) -> re.Pattern[str]:
    return re.compile(_HEADS[problem.language].format(name=re.escape(problem.entry_point)), re.MULTILINE)


def _before(problem: CodeProblem) -> str:
    """What stands in the prompt before the head of the function that is asked for: imports and helpers."""
    places = [match.start() for match in _head(problem).finditer(problem.prompt)]
    return problem.prompt[: places[-1]] if places else problem.prompt


def _test_program(problem: CodeProblem, completion: str) -> tuple[Program, str]:
    word = secrets.token_hex(16)
    ending = _ENDINGS[problem.language].replace("{word}", word)
    source = f"{solution(problem, completion)}\n\n{problem.tests}"
    if problem.language == "python":  # in an empty namespace, as HumanEval's own harness does: `__name__` is no main
        source = f"exec(compile({source!r}, 'solution.py', 'exec'), {{}})"
    return Program(source + ending, problem.language, limits=LIMITS), word


def _evalplus_program(problem: CodeProblem, source: str, mode: str, word: str, expected: bytes = b"") -> Program:
    task = dict(problem.evalplus) | {"mode": mode, "token": word}
    files: dict[str, bytes | str] = {"solution.py": source, "task.json": json.dumps(task)}
    if mode == "check":
        files["expected.pickle"] = expected
    program = _EVALPLUS_PROGRAM.read_text(encoding="utf-8")
    return Program(program, files=files, limits=EVALPLUS_LIMITS)


# ---------------------------------------------------------------------------------------------- verdicts

_ASSERTIONS = ("AssertionError", "assert.AssertionError")


def _verdict(result: SandboxResult, word: str) -> CodeResult:
    if result.status == "ok":
        if word in result.stdout.splitlines():  # what the solution printed itself may come later
            return CodeResult(True, "passed", "")
        return CodeResult(False, "error", "it ended before its tests did")
    if result.status != "error":
        return CodeResult(False, result.status, result.detail)
    raised = any(f"\n{name}" in f"\n{result.stderr}" for name in _ASSERTIONS)
    told = [
        line for line in result.stderr.splitlines() if re.match(r"[\w.]*(?:Error|Exception|Interrupt|Exit)\b", line)
    ]
    detail = told[-1] if told else result.detail
    return CodeResult(False, "failed" if raised else "error", detail[:500])


def _evalplus_verdict(result: SandboxResult, word: str, parts: Sequence[str]) -> CodeResult:
    told = [line[len(word) + 1 :] for line in result.stdout.splitlines() if line.startswith(word)]
    wrong: dict[str, str] = dict(json.loads(line) for line in told)
    base = wrong.get("base") == ""
    if result.status == "ok" and all(wrong.get(part) == "" for part in parts):
        return CodeResult(True, "passed", "", base_passed=True)
    if result.status not in ("ok", "error"):
        return CodeResult(False, result.status, result.detail, base_passed=base)
    why = next(filter(None, wrong.values()), "") or result.detail or "it ended before its tests did"
    status: CodeStatus = "failed" if " is expected" in why else "timeout" if "OutOfTime" in why else "error"
    return CodeResult(False, status, why[:500], base_passed=base)


def _lost(result: SandboxResult) -> bool:
    """Whether the machine rather than the program may be the reason."""
    return (result.status == "timeout" and "wall" in result.detail) or (
        result.status == "killed" and "worker" in result.detail
    )


def _run(sandbox: Sandbox, programs: Sequence[Program]) -> list[SandboxResult]:
    results = sandbox.run_many(programs)
    for number, result in enumerate(results):
        if _lost(result):
            again = sandbox.run_many([programs[number]])[0]
            results[number] = replace(again, detail=f"{again.detail} (run alone a second time)".strip())
    return results


@contextmanager
def _pool(sandbox: Sandbox | None, workers: int) -> Iterator[Sandbox]:
    if sandbox is not None:
        yield sandbox
        return
    with Sandbox(LIMITS, workers) as made:
        yield made


def score_programs(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    *,
    workers: int = 0,
    sandbox: Sandbox | None = None,
) -> list[list[CodeResult]]:
    """Results of every completion of every problem, in their order.

    `workers` 0: one for each processor; `sandbox`: an open one to use instead. Raises ValueError where the lists do
    not fit, where a canonical solution fails to give expected outputs, and SandboxUnavailable without a sandbox.
    """
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems but completions of {len(completions)}")
    with _pool(sandbox, workers) as pool:
        expected = _expected_outputs(pool, [problem for problem in problems if problem.evalplus])
        programs: list[Program] = []
        words: list[str] = []
        for problem, answers in zip(problems, completions, strict=True):
            for completion in answers:
                if problem.evalplus:
                    word = secrets.token_hex(16)
                    whole = solution(problem, completion)
                    program = _evalplus_program(problem, whole, "check", word, expected[problem.task_id])
                else:
                    program, word = _test_program(problem, completion)
                programs.append(program)
                words.append(word)
        ran = iter(zip(_run(pool, programs), words, strict=True))
    return [
        [
            _evalplus_verdict(*next(ran), parts=list(problem.evalplus["inputs"]))
            if problem.evalplus
            else _verdict(*next(ran))
            for _ in answers
        ]
        for problem, answers in zip(problems, completions, strict=True)
    ]


def _expected_outputs(sandbox: Sandbox, problems: Sequence[CodeProblem]) -> dict[str, bytes]:
    """What the canonical solutions give, pickled; only programs in the sandbox ever read it."""
    programs = [_evalplus_program(problem, problem.reference, "reference", "") for problem in problems]
    expected: dict[str, bytes] = {}
    for problem, result in zip(problems, _run(sandbox, programs), strict=True):
        if result.status != "ok" or "expected.pickle" not in result.files:
            raise ValueError(
                f"the canonical solution of {problem.task_id} gave no expected outputs: {result.status} {result.detail}"
            )
        expected[problem.task_id] = result.files["expected.pickle"]
    return expected
