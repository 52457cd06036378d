"""RULER's thirteen tasks, made here: what hides in the text, how it is asked, how it is scored [RULER].

Numbers of needles, hops and words are the benchmark's. Other than there, prompts are in our own words, the haystack of
essays is made by `filler` unless a directory with essays is given, the words of the two counting tasks are made up
rather than English, and questions and paragraphs come from local files in SQuAD's form: scores are RULER's in kind, and
cannot stand beside its published ones. Scores are the mean over references of "the answer
contains it"; for questions any reference counts.
"""

from __future__ import annotations

import itertools
import math
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from qwench.evals import context
from qwench.evals.own.filler import ADJECTIVES, NOISE, NOUNS, haystack, pseudo_word
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
from qwench.evals.own.ruler_qa import qa_puzzle, qa_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """One question: `build(n)` is its prompt with n pieces of filler."""

    build: Callable[[int], str]
    answers: list[str]
    prefix: str
    """How the answer begins."""
    least: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Niah:
    """A needle task: what the haystack is made of, and how many keys and values there are."""

    hay: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_type: str = "words"
    value_type: str = "numbers"


NIAH = {
    "niah_single_1": Niah(hay="noise"),
    "niah_single_2": Niah(hay="essay"),
    "niah_single_3": Niah(hay="essay", value_type="uuids"),
    "niah_multikey_1": Niah(hay="essay", keys=4),
    "niah_multikey_2": Niah(hay="needles"),
    "niah_multikey_3": Niah(hay="needles", key_type="uuids", value_type="uuids"),
    "niah_multivalue": Niah(hay="essay", values=4),
    "niah_multiquery": Niah(hay="essay", keys=4, queries=4),
}
ANSWER_TOKENS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""The thirteen, with the tokens that an answer may have."""
_NEEDLE = "A secret of the {kind} kept for {key} reads: {value}."


def _thing(kind: str, rng: Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _things(kind: str, count: int, rng: Random) -> list[str]:
    """Different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_thing(kind, rng)] = None
    return list(found)


def niah(setting: Niah, rng: Random) -> Puzzle:
    keys = _things(setting.key_type, max(setting.keys, setting.queries), rng)
    values = {key: _things(setting.value_type, setting.values, rng) for key in keys}
    needles = [_NEEDLE.format(kind=setting.value_type, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(keys, setting.queries)
    answers = [value for key in asked for value in values[key]]
    one = setting.queries * setting.values == 1
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
    kind = setting.value_type[:-1] if one else setting.value_type
    depths = sorted(rng.sample(range(40), len(needles)))
    inner = rng.getrandbits(32)

    def build(pieces: int) -> str:
        if setting.hay == "essay":
            hay = haystack("en").sentences(pieces)
            for depth, needle in reversed(list(zip(depths, needles, strict=True))):
                hay.insert(round(len(hay) * depth / 39), needle)
            return _ask_niah(" ".join(hay), kind, query, one=one)
        again = seeded("hay", inner)
        hay = [NOISE] * pieces
        if setting.hay == "needles":
            others = (_thing(setting.key_type, again) for _ in iter(int, 1))
            hay = [
                _NEEDLE.format(
                    kind=setting.value_type,
                    key=next(other for other in others if other not in values),
                    value=_thing(setting.value_type, again),
                )
                for _ in range(pieces)
            ]
        for needle in needles:
            hay.insert(again.randint(0, len(hay)), needle)
        return _ask_niah("\n".join(hay), kind, query, one=one)

    verb = "is" if one else "are"
    prefix = f"The secret {kind} that the text gives for {query} {verb}"
    return Puzzle(build=build, answers=answers, prefix=prefix)


def _ask_niah(text: str, kind: str, query: str, *, one: bool) -> str:
    hidden, asked = (
        (f"a secret {kind}", f"Which secret {kind} does")
        if one
        else (f"some secret {kind}", f"Which secret {kind}, all of them, does")
    )
    head = f"Somewhere in this text stands {hidden}. Keep it in mind: a question about it comes at the end."
    return f"{head}\n{text}\n{asked} the text give for {query}?"


# -------------------------------------------------------------------------------------------------- variable tracking
def _chain(rng: Random, hops: int, noise: int) -> tuple[str, str, list[str]]:
    """Text with one chain of assignments in it, the value at its head, and the variables."""
    names: dict[str, None] = {}
    while len(names) <= hops:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    variables, value = list(names), str(rng.randint(10000, 99999))
    steps = [f"VAR {variables[0]} = {value}"]
    steps += [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(variables)]
    lines = [NOISE] * noise
    places = sorted(rng.sample(range(noise + 1), len(steps))) if noise >= len(steps) else list(range(len(steps)))
    for place, step in reversed(list(zip(places, steps, strict=True))):
        lines.insert(place, step)
    return "\n".join(lines), value, variables


def _ask_chain(text: str, value: str) -> str:
    return (
        "Variables are set and passed on in this text. Follow which value each of them has.\n\n"
        f"{text}\nQuestion: Which variables have the value {value} in the end?"
    )


def _chain_answer(value: str, hops: int) -> str:
    return f"Answer: Following the text, {hops + 1} variables have the value {value}:"


def variable_tracking(rng: Random, hops: int = 4) -> Puzzle:
    """One chain with four hops, after a solved example."""
    text, value, names = _chain(rng, hops, 5)
    example = f"{_ask_chain(text, value)} {_chain_answer(value, hops)} {' '.join(names)}\n\n"
    inner = rng.getrandbits(32)
    _, value, names = _chain(seeded("chain", inner), hops, 1)

    def build(pieces: int) -> str:
        text, head, _ = _chain(seeded("chain", inner), hops, pieces)
        assert head == value
        return example + _ask_chain(text, value)

    return Puzzle(build=build, answers=names, prefix=_chain_answer(value, hops))


# ------------------------------------------------------------------------------------------------- common words
def _word_list(rng: Random, common: Sequence[str], often: int, others: Sequence[str], seldom: int) -> str:
    words = [*list(common) * often, *list(others) * seldom]
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _ask_common(text: str) -> str:
    return (
        "Here is a numbered list in which some words come back more often than the rest. Notice which.\n"
        f"{text}\nQuestion: Which 10 words stand in the list most often?"
    )


def common_words(rng: Random, length: int) -> Puzzle:
    """Ten words stand 30 times each, all others 3 times, after a solved example; below 4096 tokens 6 times and once."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    prefix = "Answer: The 10 words that stand in the list most often are:"
    first, second, inner = rng.getrandbits(32), rng.getrandbits(32), rng.getrandbits(32)

    def words(seed: int, count: int) -> list[str]:
        made, found = seeded("words", seed), dict[str, None]()
        while len(found) < count:
            found[pseudo_word(made)] = None
        return list(found)

    shown = words(first, 20 if length >= 4096 else 12)
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(shown[:10], 1))
    example = f"{_ask_common(_word_list(seeded('example', inner), shown[:10], 3, shown[10:], 1))} {prefix} {listed}\n\n"

    def build(pieces: int) -> str:
        known = words(second, 10 + pieces)
        return example + _ask_common(_word_list(seeded("list", inner), known[:10], often, known[10:], seldom))

    return Puzzle(build=build, answers=words(second, 10), prefix=prefix)


def frequent_words(rng: Random, length: int, alpha: float = 2.0) -> Puzzle:
    """Coded words whose numbers fall with the square of their rank; the first is noise, the next three are asked."""
    inner = rng.getrandbits(32)
    made, found = seeded("coded", inner), dict[str, None]()
    while len(found) < max(50, length // 50):
        found["".join(made.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = list(found)
    vocabulary[0] = "..."

    def build(pieces: int) -> str:
        counts = [int(pieces * rank**-alpha / (math.pi**2 / 6)) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        seeded("order", inner).shuffle(words)
        return (
            "This text is in code. Count how often each of its words occurs. "
            f"{' '.join(words)}\nQuestion: Which three words occur most often? Leave the dots '...' out, and give no "
            "explanation."
        )

    prefix = "Answer: The three words that occur most often in the text are:"
    return Puzzle(build=build, answers=vocabulary[1:4], prefix=prefix, least=80)


# ------------------------------------------------------------------------------------------------- lm-eval's side
def puzzle(task: str, seed: int, length: int, index: int) -> Puzzle:
    rng = seeded("ruler", task, seed, length, index)
    if task in NIAH:
        return niah(NIAH[task], rng)
    if task == "vt":
        return variable_tracking(rng)
    return common_words(rng, length) if task == "cwe" else frequent_words(rng, length)


def docs(ruler_task: str, **options: Any) -> Any:
    """Documents of one of the thirteen; options: lengths, samples (100 a length; 500 in the original)."""
    refuse_unknown(options)
    running = context.current()
    samples = read_count("samples", options.get("samples", 100))
    rows: list[dict[str, Any]] = []
    for length in read_lengths(options.get("lengths"), running.max_len):
        if ruler_task.startswith("qa"):
            found = qa_rows(ruler_task, samples, running.seed)
        else:
            made = (puzzle(ruler_task, running.seed, length, index) for index in range(samples))
            found = [{"outputs": one.answers, "gen_prefix": one.prefix} for one in made]
        rows += [
            {"ruler": ruler_task, "length": length, "index": index, "seed": running.seed, **row}
            for index, row in enumerate(found)
        ]
    return dataset(rows)


def question(doc: Mapping[str, Any]) -> str:
    """The prompt of a document, as long as its length allows."""
    task, length = doc["ruler"], doc["length"]
    budget = length - ANSWER_TOKENS[task] - RESERVE - count_tokens(doc["gen_prefix"])
    if task.startswith("qa"):
        build, least = qa_puzzle(doc)
        return fitted((f"ruler_{task}", length), build, budget, least)
    one = puzzle(task, doc["seed"], length, doc["index"])
    return fitted((f"ruler_{task}", length), one.build, budget, one.least)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of the references that the answer contains; for questions, whether it contains any."""
    text = "".join(" " if ord(char) < 32 else char for char in results[0]).lower()
    hits = [reference.lower() in text for reference in doc["outputs"]]
    value = float(any(hits)) if doc["ruler"].startswith("qa") else sum(hits) / len(hits)
    return by_length("score", value, doc["length"])
