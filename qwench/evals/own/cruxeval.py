"""CRUXEval: which output a function gives for an input, or which input gives an output; checked by running it.

Prompts and the reading of answers are the benchmark's [CRUXEval, MIT licence], so that scores can stand beside
published ones. The assertion runs in the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.evals import context
from qwench.evals.code_tests import CodeProblem, score_programs

_OUTPUT = """You are given a Python function and an assertion containing an input to the function. Complete the \
assertion with a literal (no unsimplified expressions, no function calls) containing the output when executing the \
provided code on the given input, even if the function is incorrect or incomplete. Do NOT output any extra \
information. Provide the full assertion with the correct output in [ANSWER] and [/ANSWER] tags, following the examples.

[PYTHON]
def f(n):
    return n
assert f(17) == ??
[/PYTHON]
[ANSWER]
assert f(17) == 17
[/ANSWER]

[PYTHON]
def f(s):
    return s + "a"
assert f("x9j") == ??
[/PYTHON]
[ANSWER]
assert f("x9j") == "x9ja"
[/ANSWER]

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]
[ANSWER]
"""
_OUTPUT_COT = """You are given a Python function and an assertion containing an input to the function. Complete the \
assertion with a literal (no unsimplified expressions, no function calls) containing the output when executing the \
provided code on the given input, even if the function is incorrect or incomplete. Do NOT output any extra \
information. Execute the program step by step before arriving at an answer, and provide the full assertion with the \
correct output in [ANSWER] and [/ANSWER] tags, following the examples.

[PYTHON]
def f(s):
    s = s + s
    return "b" + s + "a"
assert f("hi") == ??
[/PYTHON]
[THOUGHT]
Let's execute the code step by step:

1. The function f is defined, which takes a single argument s.
2. The function is called with the argument "hi", so within the function, s is initially "hi".
3. Inside the function, s is concatenated with itself, so s becomes "hihi".
4. The function then returns a new string that starts with "b", followed by the value of s (which is now "hihi"), and \
ends with "a".
5. The return value of the function is therefore "bhihia".
[/THOUGHT]
[ANSWER]
assert f("hi") == "bhihia"
[/ANSWER]

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]
[THOUGHT]
"""
_INPUT = """You will be given a function f and an output in the form f(??) == output. Find any input such that \
executing f on the input leads to the given output. There may be multiple answers, but you should only output one. In \
[ANSWER] and [/ANSWER] tags, complete the assertion with one such input that will produce the output when executing \
the function.

[PYTHON]
def f(my_list):
    count = 0
    for i in my_list:
        if len(i) % 2 == 0:
            count += 1
    return count
assert f(??) == 3
[/PYTHON]
[ANSWER]
assert f(["mq", "px", "zy"]) == 3
[/ANSWER]

[PYTHON]
def f(s1, s2):
    return s1 + s2
assert f(??) == "banana"
[/PYTHON]
[ANSWER]
assert f("ba", "nana") == "banana"
[/ANSWER]

[PYTHON]
{code}
assert f(??) == {output}
[/PYTHON]
[ANSWER]
"""
_INPUT_COT = """You will be given a function f and an output in the form f(??) == output. Your task is to find any \
input such that executing f on the input leads to the given output. There may be multiple answers, but only output \
one. First, think step by step. You MUST surround the answer with [ANSWER] and [/ANSWER] tags. Express your answer as \
a passing assertion containing the input and the given output.

[PYTHON]
def f(x):
    return x + 1
assert f(??) == 17
[/PYTHON]
[THOUGHT]
To find an input such that executing f on the input leads to the given output, we can work backwards from the given \
assertion. We know that f(??) == 17.\x20

Since the function f(x) returns x + 1, for f(??) to be equal to 17, the value of ?? should be 16.\x20
[/THOUGHT]
[ANSWER]
assert f(16) == 17
[/ANSWER]

[PYTHON]
{code}
assert f(??) == {output}
[/PYTHON]
[THOUGHT]
"""


def _fill(template: str, doc: Mapping[str, Any]) -> str:
    # Code holds braces, so this is no str.format.
    parts = {"{code}": doc["code"], "{input}": doc["input"], "{output}": doc["output"]}
    return re.sub(r"\{(?:code|input|output)\}", lambda match: parts[match[0]], template)


def ask_output(doc: Mapping[str, Any]) -> str:
    return _fill(_OUTPUT, doc)


def ask_output_cot(doc: Mapping[str, Any]) -> str:
    return _fill(_OUTPUT_COT, doc)


def ask_input(doc: Mapping[str, Any]) -> str:
    return _fill(_INPUT, doc)


def ask_input_cot(doc: Mapping[str, Any]) -> str:
    return _fill(_INPUT_COT, doc)


def read_output(text: str) -> str:
    """The expression to the right of the answer's equation."""
    answer = _answer(text)
    return answer.split("==")[1].strip() if "==" in answer else answer.strip()


def read_input(text: str) -> str:
    """The call to the left of the answer's equation."""
    answer = _answer(text)
    if "==" in answer:
        answer = answer.split("==")[0].strip()
    if "assert" in answer:
        answer = answer.split("assert")[1].strip()
    return answer.strip()


def _answer(text: str) -> str:
    """What stands behind [ANSWER], up to its end; the whole text where there is no mark, without a code fence."""
    if "[ANSWER]" in text:
        text = text.split("[ANSWER]")[1]
    text = text.split("[/ANSWER]")[0].strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].partition("```")[0]
    return text


def _run(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]], *, outputs: bool) -> list[list[dict]]:
    problems: list[CodeProblem] = []
    slots: list[tuple[int, int]] = []
    graded: list[list[dict[str, Any]]] = []
    for row, (answers, doc) in enumerate(zip(responses, docs, strict=True)):
        graded.append([])
        for place, text in enumerate(answers):
            found = read_output(text) if outputs else read_input(text)
            entry = {"passed": False, "answer": found, "detail": ""}
            graded[row].append(entry)
            # As in the benchmark: an output must be told and not called for, an input must be a call of f.
            if not found:
                entry["detail"] = "there is no answer"
            elif outputs and f"f({doc['input']})" in found:
                entry["detail"] = "the answer calls the function"
            elif not outputs and "f(" not in found:
                entry["detail"] = "the answer does not call f"
            else:
                test = f"assert {doc['output']} == {found}"
                problems.append(CodeProblem(str(doc["id"]), "", test, ""))
                slots.append((row, place))
    if problems:
        codes = [[docs[row]["code"] + "\n"] for row, _ in slots]
        results = score_programs(problems, codes, workers=context.current().workers)
        for (row, place), (result,) in zip(slots, results, strict=True):
            graded[row][place] |= {"passed": result.passed, "detail": result.detail}
    return graded


def run_outputs(responses: Sequence[Sequence[str]], docs: Any) -> list[list[dict]]:
    """An lm-eval filter: every answer with `passed`, what was read from it, and why it failed."""
    return _run(responses, list(docs), outputs=True)


def run_inputs(responses: Sequence[Sequence[str]], docs: Any) -> list[list[dict]]:
    return _run(responses, list(docs), outputs=False)


def score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """pass@1: the mean over the answers of a document."""
    answers = results[0] if isinstance(results[0], list) else [results[0]]
    return {"pass@1": sum(answer["passed"] for answer in answers) / len(answers)}
