"""Functions of the tasks for code: programs from answers, their tests in the sandbox, and pass@k."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks

from qwench.evals.code_tests import (
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
from qwench.evals.context import current
from qwench.evals.needed_code import function_body, needed_code

Answers = list[list[str]]
Docs = list[dict[str, Any]]
Outcomes = list[list[dict[str, Any]]]
KS = (1, 10, 100)


def _run(resps: Answers, docs: Docs, problem: Callable[[dict[str, Any]], CodeProblem]) -> Outcomes:
    """What became of every answer's program, with the program itself."""
    problems = [problem(doc) for doc in docs]
    completions = [[answer.replace("\t", "    ") for answer in answers] for answers in resps]
    results = score_programs(problems, completions, workers=current().workers)
    return [
        [_outcome(one, text, result) for text, result in zip(texts, line, strict=True)]
        for one, texts, line in zip(problems, completions, results, strict=True)
    ]


def _outcome(problem: CodeProblem, answer: str, result: CodeResult) -> dict[str, Any]:
    base = {"base_passed": result.base_passed} if "plus" in problem.evalplus.get("inputs", ()) else {}
    told = {"status": result.status, "detail": result.detail, "program": solution(problem, answer)}
    return {"passed": result.passed, **base, **told}


def score(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """pass@k from the outcomes of one problem's answers; base_pass@k where a problem has tests in two parts."""
    outcomes = results[0]
    scores: dict[str, float] = {}
    for name, key in (("", "passed"), ("base_", "base_passed")):
        if key in outcomes[0]:
            num_right = sum(outcome[key] for outcome in outcomes)
            scores |= {f"{name}pass@{k}": pass_at_k(len(outcomes), num_right, k) for k in KS if k <= len(outcomes)}
    return scores


def _stripped(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with its prompt as it is asked: without blanks around it, and with a line's end."""
    return {**doc, "prompt": doc["prompt"].strip() + "\n"}


def humaneval(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, lambda doc: humaneval_problem(_stripped(doc)))


def humaneval_alone(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, lambda doc: alone(humaneval_problem(doc)))


def humaneval_sanitized(resps: Answers, docs: Docs) -> Outcomes:
    return _run(_sanitized(resps, docs, humaneval_problem), docs, lambda doc: alone(humaneval_problem(doc)))


def humaneval_body(resps: Answers, docs: Docs) -> Outcomes:
    bodies = [
        [function_body(answer, doc["entry_point"]) for answer in answers]
        for answers, doc in zip(resps, docs, strict=True)
    ]
    return _run(bodies, docs, humaneval_problem)


def mbpp(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, lambda doc: alone(_mbpp(doc)))


def mbpp_sanitized(resps: Answers, docs: Docs) -> Outcomes:
    return _run(_sanitized(resps, docs, _mbpp), docs, lambda doc: alone(_mbpp(doc)))


def _mbpp(doc: dict[str, Any]) -> CodeProblem:
    if "base_input" in doc:  # EvalPlus' own file
        return evalplus_problem({**doc, "base_input": json.loads(doc["base_input"])}, base_only=True)
    return mbpp_problem(doc)


def _sanitized(resps: Answers, docs: Docs, problem: Callable[[dict[str, Any]], CodeProblem]) -> Answers:
    names = [problem(doc).entry_point for doc in docs]
    return [[needed_code(answer, name) for answer in answers] for answers, name in zip(resps, names, strict=True)]


def mbpp_examples() -> list[dict[str, Any]]:
    """The prompt's three examples, tasks 2 to 4 of MBPP, which lm-eval carries."""
    source = (Path(lm_eval.tasks.__file__).parent / "mbpp" / "utils.py").read_text(encoding="utf-8")
    for node in ast.parse(
        source
    ).body:  # its module cannot be imported: that loads a metric which runs code unprotected
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            returned = next(step for step in node.body if isinstance(step, ast.Return))
            assert returned.value is not None
            return ast.literal_eval(returned.value)
    raise ValueError("this version of lm-eval has no examples for MBPP; use --num-fewshot 0")


def multipl_e(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, multipl_e_problem)


def multipl_e_alone(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, lambda doc: alone(multipl_e_problem(doc)))


def evalplus_question(doc: dict[str, Any]) -> str:
    """The prompt as EvalPlus asks it. Raises ValueError for the hub's form of the tests, which needs numpy."""
    if "base_input" not in doc and "import numpy" in doc.get("test", ""):
        raise ValueError(
            f"{doc['task_id']}: the tests of the hub's copy need numpy, which the sandbox does not have; give "
            "EvalPlus' own file (HumanEvalPlus.jsonl or MbppPlus.jsonl, from its releases on GitHub) by --data-dir"
        )
    return _question(doc)


def _question(doc: dict[str, Any]) -> str:
    """A prompt with a line's end; MBPP's own files and the hub's copy of MBPP+ have text and tests apart."""
    prompt = str(doc["prompt"]).strip()
    if doc.get("test_list") and '"""' not in prompt:
        prompt = f'"""\n{prompt}\n{doc["test_list"][0]}\n"""'
    return prompt + "\n"


def evalplus_chat_question(doc: dict[str, Any]) -> str:
    return _chat_question(evalplus_question(doc))


def mbpp_chat_question(doc: dict[str, Any]) -> str:
    return _chat_question(_question(doc))


def humanevalpack_question(doc: dict[str, Any]) -> str:
    """The question as HumanEvalPack's instructions put it: signature, description, and the prompt itself."""
    prompt = doc["prompt"]
    head = re.search(rf"def\s+({re.escape(doc['entry_point'])}.*?):\s*\n", prompt)
    told = re.search(r"(\"\"\"|''')(.*?)(?:\"\"\"|''')", prompt, re.DOTALL)
    if head is None or told is None:
        raise ValueError(f"{doc['task_id']}: the prompt has no head of {doc['entry_point']}, or no docstring")
    description = "\n".join(line.strip() for line in told[2].split("\n"))
    return f"Write a Python function `{head[1]}` to solve the following problem:\n{description}\n{prompt}"


def _chat_question(question: str) -> str:
    return f"Can you complete the following Python function?\n```python\n{question.rstrip()}\n```\n"


def _evalplus(doc: dict[str, Any]) -> CodeProblem:
    doc = {**doc, "prompt": _question(doc)}
    if "base_input" in doc:  # EvalPlus' own files
        inputs = {name: json.loads(doc[name]) for name in ("base_input", "plus_input")}
        return evalplus_problem({**doc, **inputs})
    if "entry_point" in doc:
        return humaneval_problem(doc)
    return CodeProblem(f"Mbpp/{doc['task_id']}", doc["prompt"], f"\n{doc['test']}\n", "")


def evalplus(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, _evalplus)


def evalplus_alone(resps: Answers, docs: Docs) -> Outcomes:
    return _run(resps, docs, lambda doc: alone(_evalplus(doc)))


def evalplus_sanitized(resps: Answers, docs: Docs) -> Outcomes:
    return _run(_sanitized(resps, docs, _evalplus), docs, lambda doc: alone(_evalplus(doc)))
