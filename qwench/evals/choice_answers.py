"""Reading the chosen letter out of an answer in words; filters for tasks of lm-eval.

MMLU-Pro's order of attempts is the benchmark's own; that of chat answers to MMLU and its Chinese relatives follows
Qwen's evaluation scripts (there also a fuzzy match with the choices' texts, which is not done here).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MMLU_PRO = (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*\(?([A-J])\)?", r"\b([A-J])\b(?!.*\b[A-J]\b)")
ENGLISH = (
    r"(?i:choose|answer|answers|choice|option)(?:\s+(?i:is|are|would be|:))*[\s:*(\"']*\(?([A-D])\b"
    r"(?!\s+(?i:is|are)\s+(?i:not|incorrect|wrong))",
    r"\b([A-D])\b[)\s\"'*]*(?:is|are|was)?\s*(?:the\s+)?(?:correct|right)",
    r"^\s*\(?([A-D])(?:[).,:\s]|$)",
    r"(?<![A-Za-z])([A-D])(?![A-Za-z'])",
)
CHINESE = (
    r"(?:选|选择|选定)(?:项|择|答案|为|是|[:：\s])*\(?([A-D])",
    r"(?:答案|选项)(?:应该|应当)?(?:是|为|选|[:：\s])*\(?([A-D])",
    r"([A-D])(?:选项)?(?:是)?(?:正确|对的|符合)",
    r"^\s*\(?([A-D])",
    r"([A-D])",
)


def letter(text: str, patterns: Sequence[str]) -> str:
    """The first letter that a pattern finds, tried in order; empty, which counts as wrong, where none does."""
    for pattern in patterns:
        if found := re.search(pattern, text, re.DOTALL | re.MULTILINE if pattern.startswith("^") else re.DOTALL):
            return found[1]
    return ""


def letter_of_choices(text: str, choices: Sequence[str], patterns: Sequence[str]) -> str:
    """The same after texts of choices that the answer repeats have become their letters, the longest first."""
    order = sorted(enumerate(choices), key=lambda item: -len(item[1]))
    for place, choice in order:
        if len(choice) > 3 and choice in text:
            text = text.replace(choice, "ABCDEFGHIJ"[place])
    return letter(text, patterns)


def mmlu_pro_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    return [letter(answers[0], MMLU_PRO) for answers in resps]


def english_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    return [letter_of_choices(a[0], _choices(doc), ENGLISH) for a, doc in zip(resps, docs, strict=True)]


def chinese_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    return [letter_of_choices(a[0], _choices(doc), CHINESE) for a, doc in zip(resps, docs, strict=True)]


def bbh_answers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    """What follows "the answer is", to the end of its line, without the last full stop. [BIG-Bench Hard]"""
    found = [re.findall(r"the answer is (.*)", answers[0]) for answers in resps]
    return [one[0].strip().removesuffix(".").strip("*") if one else "" for one in found]


def _choices(doc: Mapping[str, Any]) -> list[str]:
    return list(doc["choices"]) if "choices" in doc else [doc[name] for name in "ABCD"]
