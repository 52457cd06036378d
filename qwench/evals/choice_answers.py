"""Reading the chosen letter out of an answer in words; filters for tasks of lm-eval.

MMLU-Pro's order of attempts is the benchmark's own; that of chat answers to MMLU and its Chinese relatives follows
Qwen's evaluation scripts, whose likeness of texts is another measure (thefuzz).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

MMLU_PRO = (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*\(?([A-J])\)?", r"\b([A-J])\b(?!.*\b[A-J]\b)")
_ISOLATED = r"(?<![A-Za-z])([A-D])(?![A-Za-z=])"
ENGLISH = (
    # "choose B", "the answer is (B)", "choice: B", but not "the answer is not B"
    r"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice)(?![^A-D]{0,20}?(?:n't|not))[^A-D]{0,10}?\b(?:is|be|:)??\b)"
    r"[^A-D]{0,20}?\b([A-D])\b",
    r"\b([A-D])\b(?![^A-D]{0,8}?(?:n't|not)[^A-D]{0,5}?(?:correct|right))[^A-D]{0,10}?\b(?:correct|right)\b",
    r"\A([A-D])(?:[.,:]|$)",
    _ISOLATED,
)
CHINESE = (
    r"(?:(?:选|选择|选定)[：:]?\s*|(?:答案|选项)(?![^A-D]{0,10}?[不非][^A-D]{0,10}?[是选为：:】])[^A-D]{0,10}?[是选为：:】][^A-D]{0,10}?)"
    r"([A-D])(?:选项)?(?=[)。.,，．、：:）A-D]|$)",
    r"([A-D])(?:选?项)?(?![^A-D]{0,4}?[不非][^A-D]{0,4}?(?:正确|对[的，。：]|符合))[^A-D]{0,4}?(?:正确|对[的，。：]|符合)",
    r"\A[(（]?([A-D])(?:[。)）.,，．：:]|$)",
    _ISOLATED,
)


def letter(text: str, patterns: Sequence[str]) -> str:
    """The first letter that a pattern finds, tried in order; empty, which counts as wrong, where none does."""
    for pattern in patterns:
        if found := re.search(pattern, text, re.DOTALL):
            return found[1]
    return ""


def letter_of_choices(text: str, choices: Sequence[str], patterns: Sequence[str]) -> str:
    """The same after texts of choices that the answer repeats have become their letters, the longest first; where no
    pattern finds one, the choice whose text is most like the answer."""
    read = text
    for place, choice in sorted(enumerate(choices), key=lambda item: -len(item[1])):
        if plain := choice.rstrip(".。"):
            read = re.sub(re.escape(plain), "ABCD"[place], read, flags=re.IGNORECASE)
    if found := letter(read, patterns):
        return found
    if not text.strip():
        return ""
    alike = [SequenceMatcher(None, text.lower(), choice.lower(), autojunk=False).ratio() for choice in choices]
    return "ABCD"[alike.index(max(alike))]


def without_stem(text: str, question: str) -> str:
    """Repetitions of the question's last sentence with its gap filled become "the answer is" what fills the gap."""
    parts = question.rstrip("。").split("。")[-1].split("_")
    before, after = parts[0], parts[-1]
    if len(before.strip()) > 4:
        text = text.replace(before, "答案是")
    return text.replace(after, "") if len(after.strip()) > 4 else text


def mmlu_pro_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    return [letter(answers[0], MMLU_PRO) for answers in resps]


def english_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    return [letter_of_choices(a[0], _choices(doc), ENGLISH) for a, doc in zip(resps, docs, strict=True)]


def chinese_letters(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    """[C-Eval]"""
    answers = [
        without_stem(answer[0], doc["question"] if "question" in doc else doc["Question"])
        for answer, doc in zip(resps, docs, strict=True)
    ]
    return [letter_of_choices(a, _choices(doc), CHINESE) for a, doc in zip(answers, docs, strict=True)]


def bbh_answers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    """What follows "the answer is", to the end of its line, without the last full stop. [BIG-Bench Hard]"""
    found = [re.findall(r"the answer is (.*)", answers[0]) for answers in resps]
    return [one[0].strip().removesuffix(".").strip("*") if one else "" for one in found]


def _choices(doc: Mapping[str, Any]) -> list[str]:
    return list(doc["choices"]) if "choices" in doc else [doc[name] for name in "ABCD"]
