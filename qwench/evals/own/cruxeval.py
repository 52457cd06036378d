"""CRUXEval: which output a function gives for an input, or which input gives an output; checked by running it.

Prompts are the benchmark's, as lm-eval brings them, and answers are read by its rules, so that scores can stand beside
published ones. The assertion runs in the sandbox.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qwench.evals import context
from qwench.evals.code_tests import CodeProblem, score_programs


@cache
def _published(kind: str) -> tuple[str, str]:
    """(what stands before the question, worked examples included; the question's Jinja template) of lm-eval's files.

    Its task itself runs model-written code unprotected; only its prompts are used.
    """
    import lm_eval.tasks
    import yaml
    from lm_eval.utils import apply_template

    class Loader(yaml.SafeLoader):
        """Leaves functions out."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    folder = Path(lm_eval.tasks.__file__).parent / "cruxeval"
    setting = yaml.load((folder / f"cruxeval_{kind}.yaml").read_text(encoding="utf-8"), Loader)
    shots: list[dict[str, Any]] = []
    if "fewshot_config" in setting:
        examples = importlib.import_module("lm_eval.tasks.cruxeval.utils")
        shots = getattr(examples, setting["fewshot_config"]["samples"].rpartition(".")[2])()
    asked, target = setting["doc_to_text"], setting.get("doc_to_target", "")
    shots = [{**shot, "is_fewshot": True} | {key: _literal(shot[key]) for key in ("input", "output")} for shot in shots]
    parts = [apply_template(asked, shot) + apply_template(target, shot) for shot in shots]
    end = "" if kind.endswith("_cot") else "\n[ANSWER]\n"
    return "".join(f"{part}\n\n" for part in (setting["description"].rstrip("\n"), *parts)), asked + end


def _literal(value: Any) -> str:
    """As Python writes it: some strings of lm-eval's examples have lost the quotes that the benchmark has."""
    try:
        ast.literal_eval(str(value))
    except (ValueError, SyntaxError):
        return json.dumps(value)
    return str(value)


def _ask(kind: str, doc: Mapping[str, Any]) -> str:
    from lm_eval.utils import apply_template

    before, question = _published(kind)
    return before + apply_template(question, dict(doc))


def ask_output(doc: Mapping[str, Any]) -> str:
    return _ask("output", doc)


def ask_output_cot(doc: Mapping[str, Any]) -> str:
    return _ask("output_cot", doc)


def ask_input(doc: Mapping[str, Any]) -> str:
    return _ask("input", doc)


def ask_input_cot(doc: Mapping[str, Any]) -> str:
    return _ask("input_cot", doc)


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
