"""Infilling: the line that is missing between a prefix and a suffix, by the code models' own control tokens.

As in the Qwen2.5-Coder evaluation of HumanEval-FIM: at most 2048 tokens with the answer, of which the suffix may have
512; the first line of the answer that is not empty must equal the missing one, blanks around them aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwench.evals import context

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
ANSWER_TOKENS, SUFFIX_TOKENS, ALL_TOKENS = 64, 512, 2048


def question(doc: Mapping[str, Any]) -> str:
    """The prompt; the prefix keeps its end and the suffix its beginning. ValueError for a model that cannot infill."""
    tokenizer = context.current().tokenizer
    if missing := [name for name in (PREFIX, SUFFIX, MIDDLE) if name not in tokenizer.special_ids]:
        raise ValueError(
            f"task fim: this model's vocabulary lacks {missing[0]}; infilling needs a model such as Qwen2.5-Coder"
        )
    left, right = tokenizer.encode(doc["prompt"]), tokenizer.encode(doc["suffix"])
    room = ALL_TOKENS - ANSWER_TOKENS - SUFFIX_TOKENS
    before = doc["prompt"] if len(left) <= room else tokenizer.decode(left[-room:]).lstrip("\ufffd")
    after = doc["suffix"] if len(right) <= SUFFIX_TOKENS else tokenizer.decode(right[:SUFFIX_TOKENS]).rstrip("\ufffd")
    return f"{PREFIX}{before}{SUFFIX}{after}{MIDDLE}"


def first_line(text: str) -> str:
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def read_lines(responses: Sequence[Sequence[str]], docs: Any) -> list[list[str]]:
    """An lm-eval filter: the first line of each answer that is not empty."""
    return [[first_line(text) for text in answers] for answers in responses]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match, and the same for the document's language."""
    value = float(first_line(results[0]) == doc["canonical_solution"].strip())
    return {"exact_match": value, f"exact_match_{doc['language']}": value}
