"""Questions in MT-Bench's form, and answers to them: of an evaluation run, or in the files of MT-Bench's own code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.evals.local_files import Files, MissingDataError
from qwench.evals.run_files import EvalRun, is_eval_run, sample_file_name

TASK = "mt_bench"
QUESTIONS = ("mt_bench/mt_bench/question.jsonl", "mt_bench/question.jsonl", "question.jsonl")
REFERENCES = tuple(
    f"{pattern.removesuffix('question.jsonl')}reference_answer/{name}.jsonl"
    for pattern in QUESTIONS
    for name in ("gpt-4", "*")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`Question(id="81", category="writing", turns=("Write ...", "Rewrite ..."))`"""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    """Right answers to the turns, of questions that have some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one model answered: question id -> its answer to each turn."""

    model: str
    questions: Mapping[str, Question]
    answers: Mapping[str, tuple[str, ...]]

    def pairs(self) -> Iterator[tuple[Question, tuple[str, ...]]]:
        for name, said in self.answers.items():
            yield self.questions[name], said

    def first(self, number: int) -> Answers:
        """Those to the first `number` questions."""
        return Answers(model=self.model, questions=self.questions, answers=dict(list(self.answers.items())[:number]))


def mt_bench(files: Files, name: str | None) -> dict[str, list[dict[str, Any]]]:
    """The questions as rows for the harness: question_id, category, turns, reference ([] where there is none)."""
    rows = files.jsonl(*QUESTIONS, need=("question_id", "category", "turns"))
    try:
        references = files.jsonl(*REFERENCES, need=("question_id", "choices"))
    except MissingDataError:
        references = []
        files.notes.append("no reference answers beside the questions: maths, reasoning and code are judged without")
    known = {row["question_id"]: row["choices"][0]["turns"] for row in references}
    return {
        "test": [
            {
                "question_id": str(row["question_id"]),
                "category": str(row["category"]),
                "turns": _texts(row["turns"], f"question {row['question_id']}"),
                "reference": _texts(
                    known.get(row["question_id"], row.get("reference") or []), "a reference", may_be_empty=True
                ),
            }
            for row in rows
        ]
    }


def read_questions(path: Path) -> dict[str, Question]:
    """Of a question.jsonl, with references from the folder reference_answer beside it; or of a directory with both."""
    found = mt_bench(Files(roots=(path if path.is_dir() else path.parent,)), None)["test"]
    return {question.id: question for question in map(_question, found)}


def read_answers(path: Path, questions: Mapping[str, Question] | None = None, task: str = TASK) -> Answers:
    """An evaluation run that answered `task`, or a JSONL of MT-Bench's own code (question_id, choices), which needs
    `questions`.

    Raises ValueError for what is neither.
    """
    if path.is_dir():
        if not is_eval_run(path):
            raise ValueError(
                f"{path} is no evaluation; answers come from: qwench eval MODEL --tasks {task} --out {path}"
            )
        return _of_run(EvalRun.open(path), task, questions)
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the directory of qwench eval --tasks {task}, or a file of answers")
    if questions is None:
        raise ValueError(f"{path} holds answers without their questions; give those by --questions FILE")
    found: dict[str, tuple[str, ...]] = {}
    model = path.stem
    for row in Files(roots=(path.parent,)).jsonl(path.name, need=("question_id", "choices")):
        name = str(row["question_id"])
        if name not in questions:
            raise ValueError(f"{path} answers question {name}, which is not among the questions given")
        model = str(row.get("model_id") or model)
        try:
            found[name] = tuple(_texts(row["choices"][0]["turns"], f"{path} question {name}", may_be_empty=True))
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{path} question {name}: choices should be a list of objects with turns") from None
    return _checked(Answers(model=model, questions=questions, answers=found), path)


def _of_run(run: EvalRun, task: str, questions: Mapping[str, Question] | None) -> Answers:
    if not (run.path / "samples" / sample_file_name(task)).is_file():
        raise ValueError(f"{run.path} has no answers to {task}; make them with: qwench eval MODEL --tasks {task}")
    known: dict[str, Question] = dict(questions or {})
    found: dict[str, tuple[str, ...]] = {}
    for sample in run.samples(task):
        asked = _question(sample["doc"])
        known.setdefault(asked.id, asked)
        found[asked.id] = tuple(map(str, sample["response"]))
    return _checked(Answers(model=run.name, questions=known, answers=found), run.path)


def _checked(answers: Answers, path: Path) -> Answers:
    if not answers.answers:
        raise ValueError(f"{path} holds no answers")
    for question, said in answers.pairs():
        if len(said) != len(question.turns):
            raise ValueError(
                f"{path} has {len(said)} answers to question {question.id}, which has {len(question.turns)} turns; "
                "answer it again"
            )
    return answers


def _question(row: Mapping[str, Any]) -> Question:
    return Question(
        id=str(row["question_id"]),
        category=str(row.get("category", "")),
        turns=tuple(row["turns"]),
        reference=tuple(row.get("reference") or ()),
    )


def _texts(value: Any, where: str, *, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"{where}: turns should be a list of texts, not {json.dumps(value)[:80]}")
    if not value and not may_be_empty:
        raise ValueError(f"{where} has no turns")
    return list(value)
