"""Functions of the tasks for mathematics: questions from the fields of each set, gold answers, and the comparison."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from qwench.evals.math_answers import boxed, equal, extract, last_number, normalise, number


def examples() -> list[dict[str, str]]:
    """The eight worked examples of chain-of-thought prompting [Wei et al. 2022], which lm-eval carries."""
    path = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    samples = load_yaml(path, resolve_func=False)["fewshot_config"]["samples"]
    return [{"question": sample["question"], "solution": sample["target"]} for sample in samples]


def question(doc: dict[str, Any]) -> str:
    """The question's text, whatever the set calls its parts."""
    if "Body" in doc:  # SVAMP
        return f"{doc['Body'].strip().rstrip('.')}. {doc['Question'].strip()}"
    if "body" in doc:  # ASDiv
        return f"{doc['body'].strip()} {doc['question'].strip()}"
    return str(doc.get("problem") or doc.get("input") or doc["question"]).strip()


def boxed_question(doc: dict[str, Any]) -> str:
    return f"{question(doc)}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def few_shot_question(doc: dict[str, Any]) -> str:
    return f"Question: {question(doc)}\nLet's think step by step\n"


def few_shot_solution(doc: dict[str, Any]) -> str:
    return doc["solution"] if "solution" in doc and "problem" not in doc else gold(doc)


def gold(doc: dict[str, Any]) -> str:
    """The right answer, normalised."""
    if "Answer" in doc:  # SVAMP
        return normalise(str(doc["Answer"]))
    if "target" in doc and "input" in doc:  # MAWPS
        return normalise(str(doc["target"]))
    if "problem" in doc:  # MATH
        found = boxed(doc["solution"])
        return normalise(doc.get("answer") or "" if found is None else found)
    answer = str(doc["answer"])
    if "####" in answer:  # GSM8K
        return normalise(answer.rpartition("####")[2])
    if "body" in doc:  # ASDiv: "9 (apples)"
        return normalise(re.sub(r"\s*\(.*\)\s*$", "", answer))
    return normalise(answer)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Qwen2.5-Math's extraction and comparison."""
    return {"accuracy": float(equal(extract(results[0]), gold(doc)))}


def score_last_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The last number of the answer against the right one, to 1e-4 [Qwen's evaluation scripts]."""
    found, right = normalise(last_number(results[0])), gold(doc)
    mine, theirs = number(found), number(right)
    if mine is not None and theirs is not None:
        return {"accuracy": float(abs(mine - theirs) <= 1e-4)}
    return {"accuracy": float(equal(found, right, symbolic=False))}
