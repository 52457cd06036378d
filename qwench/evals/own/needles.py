"""Needle in a haystack and passkey retrieval, over a grid of lengths and depths, in English and Chinese.

Needle: a made-up fact stands at each tenth of a text of made-up sentences, two facts a place [Qwen2 TR]. Passkey: a
number in repeated noise [Qwen2.5 TR, to a million tokens]. Right is an answer that contains the fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from qwench.evals import context
from qwench.evals.own.filler import NOISE, Haystack, haystack, words
from qwench.evals.own.lengths import (
    RESERVE,
    by_length,
    count_tokens,
    dataset,
    fitted,
    read_count,
    read_lengths,
    refuse_unknown,
    seeded,
)

_SPICES = words(
    "saffron cinnamon ginger nutmeg cardamom rosemary thyme juniper fennel tarragon turmeric vanilla lavender "
    "paprika mustard basil coriander marjoram sumac anise"
)
_SPICES_ZH = words(
    "藏红花 肉桂 生姜 豆蔻 茴香 迷迭香 百里香 薄荷 花椒 桂花 陈皮 丁香 罗勒 芝麻 紫苏 八角 山楂 枸杞 莲子 香茅"
)
_NOISE_ZH = "草是绿的。天空是蓝的。太阳是黄的。我们出发吧。去了又回来。"
_TEXTS = {
    ("needle", "en"): {
        "head": "Read the following text carefully. A question about it stands at its end.\n\n",
        "needle": "In {place}, the secret ingredient of the famous soup is {answer}.",
        "question": "\n\nWhat is the secret ingredient of the famous soup in {place}? Answer with the ingredient only.",
        "prefix": "Answer: The secret ingredient is",
    },
    ("needle", "zh"): {
        "head": "请仔细阅读下面的文字，文字结束后有一个问题。\n\n",
        "needle": "在{place}，那道有名的汤里放的秘密配料是{answer}。",
        "question": "\n\n在{place}，那道有名的汤里放的秘密配料是什么？只回答配料的名称。",
        "prefix": "答案：秘密配料是",
    },
    ("passkey", "en"): {
        "head": "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n\n",
        "needle": "The pass key is {answer}. Remember it. {answer} is the pass key.",
        "question": "\n\nWhat is the pass key?",
        "prefix": "The pass key is",
    },
    ("passkey", "zh"): {
        "head": "下面有很多无关的文字，其中藏着一条重要信息。请找到它并记住，之后我会提问。\n\n",
        "needle": "通行密码是{answer}。请记住它。{answer}就是通行密码。",
        "question": "\n\n通行密码是多少？",
        "prefix": "通行密码是",
    },
}
_ANSWER_TOKENS = 32


def _fact(kind: str, language: str, rng: Random) -> tuple[str, str]:
    """A made-up place and the answer."""
    if kind == "passkey":
        return "", str(rng.randint(10000, 99999))
    if language == "zh":
        return "".join(rng.sample("云石青松金沙白鹤长柳明月", 2)) + "镇", rng.choice(_SPICES_ZH)
    name = rng.choice(("Vel", "Mar", "Tor", "Hal", "Bren", "Cas")) + rng.choice(
        ("mora", "wick", "dale", "ton", "ford", "haven")
    )
    return name, rng.choice(_SPICES)


def _docs(kind: str, language: str, options: Mapping[str, Any]) -> Any:
    refuse_unknown(options)
    running = context.current()
    depths = read_count("depths", options.get("depths", 11), 101)
    instances = read_count("instances", options.get("instances", 2), 1000)
    texts = _TEXTS[kind, language]
    rows: list[dict[str, Any]] = []
    for length in read_lengths(options.get("lengths"), running.max_len):
        for step in range(depths):
            for number in range(instances):
                rng = seeded(kind, language, running.seed, length, step, number)
                place, answer = _fact(kind, language, rng)
                rows.append(
                    {
                        "kind": kind,
                        "language": language,
                        "length": length,
                        "depth": round(100 * step / max(1, depths - 1), 2),
                        "instance": number,
                        "place": place,
                        "answer": answer,
                        "gen_prefix": texts["prefix"],
                    }
                )
    # The grid is walked in a fixed random order, so that the first few documents are spread over it.
    seeded("order", kind, running.seed).shuffle(rows)
    return dataset(rows)


def needle_en(**options: Any) -> Any:
    """Documents of the English needle task; options: lengths, depths (11), instances (2)."""
    return _docs("needle", "en", options)


def needle_zh(**options: Any) -> Any:
    return _docs("needle", "zh", options)


def passkey_en(**options: Any) -> Any:
    return _docs("passkey", "en", options)


def passkey_zh(**options: Any) -> Any:
    return _docs("passkey", "zh", options)


def _noise(doc: Mapping[str, Any]) -> Haystack:
    if doc["kind"] == "needle":
        return haystack(doc["language"])
    return Haystack(doc["language"], 0, (_NOISE_ZH if doc["language"] == "zh" else NOISE,))


def question(doc: Mapping[str, Any]) -> str:
    """The prompt of a document. The needle stands between two sentences, at `depth` percent of the filler."""
    texts = _TEXTS[doc["kind"], doc["language"]]
    facts = {"place": doc["place"], "answer": doc["answer"]}
    source = _noise(doc)
    needle, end = texts["needle"].format(**facts), texts["question"].format(**facts)

    def build(pieces: int) -> str:
        sentences = source.sentences(pieces)
        at = round(len(sentences) * doc["depth"] / 100)
        return texts["head"] + source.joint.join([*sentences[:at], needle, *sentences[at:]]) + end

    spent = _ANSWER_TOKENS + RESERVE + count_tokens(doc["gen_prefix"])
    return fitted((f"{doc['kind']}_{doc['language']}", doc["length"]), build, doc["length"] - spent)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer contains the fact, whatever the case."""
    return by_length("acc", float(doc["answer"].lower() in results[0].lower()), doc["length"])
