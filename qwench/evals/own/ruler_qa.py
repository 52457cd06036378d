"""RULER's two question tasks over local files in SQuAD's form: the paragraph with the answer among others.

qa_1 asks over the first collection that is found for English, qa_2 over the second: XQuAD and SQuAD, then HotpotQA or
CMRC; `files` of `--metadata` names others.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwench.evals import context
from qwench.evals.local_files import Files, MissingDataError
from qwench.evals.own.filler import Haystack
from qwench.evals.own.lengths import seeded

PATTERNS = {
    "qa_1": ("ruler/squad*.json", "squad*.json", "dev-v*.json", "xquad/en.json", "xquad.en.json"),
    "qa_2": ("ruler/hotpot*.json", "hotpot*.json", "cmrc2018*.json", "xquad/zh.json", "xquad.zh.json"),
}
"""File names that are looked for, in this order."""


def _broken(path: Path, where: str) -> ValueError:
    return ValueError(
        f"{path}: {where}; it should be SQuAD's form {{'data': [{{'paragraphs': [{{'context', 'qas': [{{'question', "
        "'answers': [{'text'}]}]}]}]}, or HotpotQA's list of {'question', 'answer', 'context'}"
    )


@functools.lru_cache(maxsize=4)
def _read(path: Path, stamp: int) -> tuple[list[str], list[tuple[str, list[str], list[int]]]]:
    """Paragraphs, and questions with their references and the paragraphs that are needed."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON ({error}); repair the file") from None
    paragraphs: dict[str, int] = {}
    asked: list[tuple[str, list[str], list[int]]] = []
    try:
        if isinstance(table, list):
            for item in table:
                texts = [f"{title}\n{''.join(lines)}" for title, lines in item["context"]]
                needed = [paragraphs.setdefault(text, len(paragraphs)) for text in texts]
                asked.append((item["question"], [item["answer"]], needed))
        else:
            for article in table["data"]:
                for paragraph in article["paragraphs"]:
                    place = paragraphs.setdefault(paragraph["context"], len(paragraphs))
                    for qa in paragraph["qas"]:
                        references = list(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                        if references and not qa.get("is_impossible"):
                            asked.append((qa["question"], references, [place]))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"{type(error).__name__} {error}") from None
    if not asked:
        raise _broken(path, "there are no questions with answers")
    return list(paragraphs), asked


def _file(task: str) -> Path:
    try:
        return Files(context.current().data_dirs).find(*PATTERNS[task])
    except MissingDataError as error:
        raise MissingDataError(f"task ruler_{task}: {error}") from None


def _load(path: Path) -> tuple[list[str], list[tuple[str, list[str], list[int]]]]:
    return _read(path, path.stat().st_mtime_ns)


def qa_rows(task: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """A row a question, drawn in a fixed order. Raises MissingDataError and ValueError."""
    path = _file(task)
    _, asked = _load(path)
    order = list(range(len(asked)))
    seeded("questions", task, seed).shuffle(order)
    return [
        {"outputs": asked[place][1], "gen_prefix": "Answer:", "file": path.name, "place": place}
        for place in order[:samples]
    ]


def qa_puzzle(doc: Mapping[str, Any]) -> tuple[Callable[[int], str], int]:
    """(build, least): the prompt with that many paragraphs, those that are needed among them. Where the file has too
    few for the length, paragraphs of made sentences join them."""
    paragraphs, asked = _load(_file(doc["ruler"]))
    text, _, needed = asked[doc["place"]]
    others = [place for place in range(len(paragraphs)) if place not in set(needed)]
    seeded("distractors", doc["seed"], doc["place"]).shuffle(others)

    filler = Haystack("zh" if any("\u4e00" <= char <= "\u9fff" for char in text) else "en", doc["seed"])

    def build(pieces: int) -> str:
        chosen = [paragraphs[place] for place in (*needed, *others[: max(0, pieces - len(needed))])]
        missing = max(0, pieces - len(chosen))
        sentences = filler.sentences(8 * missing)
        chosen += [filler.joint.join(sentences[8 * number : 8 * number + 8]) for number in range(missing)]
        seeded("order", doc["seed"], doc["place"], len(chosen)).shuffle(chosen)
        documents = "\n\n".join(f"Document {number}:\n{paragraph}" for number, paragraph in enumerate(chosen, 1))
        ask = "Find the answer to the question in these documents, and write the answer alone."
        return f"{ask}\n\n{documents}\n\n{ask}\n\nQuestion: {text}"

    return build, len(needed)
