"""The demo's conversations for fine-tuning: small tasks that a tiny model can learn and a program can check.

Three of them are general: sums with verifiable answers, questions on Python's documentation answered by the first
sentence of a docstring, and greetings and requests for a form ("answer in JSON", "with one word"). From a corpus
without documented code, continuing a text takes the place of the questions. Everything is a function of a seed; the
sums are divided into a part to learn and a held-out part that no training stream contains.

The system prompt and the template are the tokenizer's business, token weights that of `train`; here are messages only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qwench.data.docstrings import described, first_sentence, module_name
from qwench.types import Document, FinishReason, Message

Task = Literal["sum", "docs", "continue", "greeting", "one_word", "json"]
SumForm = Literal["plain", "worked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A request and its model answer, with what a checker needs to know.

    >>> Conversation(
    ...     messages=(Message(role="user", content="23 + 45 = ?"), Message(role="assistant", content="68")),
    ...     task="sum", answer="68")
    """

    messages: tuple[Message, ...]
    task: Task
    answer: str
    """The result that must be found: the number of a sum, the word, the JSON value; for the others the whole text."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the model's answer."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1].content


def _conversation(task: Task, request: str, response: str, answer: str) -> Conversation:
    messages = (Message(role="user", content=request), Message(role="assistant", content=response))
    return Conversation(messages=messages, task=task, answer=answer)


# --------------------------------------------------------------------------------------------------------------- sums
_SUM_REQUESTS = (
    "What is {a} {op} {b}?",
    "{a} {op} {b} = ?",
    "{a}{op}{b}=",
    "Compute {a} {op} {b}.",
    "Calculate {a} {op} {b}.",
    "How much is {a} {op} {b}?",
    "请计算 {a} {op} {b}。",
    "{a} {op} {b} 等于多少？",
)
_PLUS_REQUESTS = ("What is {a} plus {b}?", "Add {a} and {b}.", "请计算 {a} 加 {b}。")
_MINUS_REQUESTS = ("What is {a} minus {b}?", "Subtract {b} from {a}.", "请计算 {a} 减 {b}。")
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Sum:
    """`Sum(23, "+", 45)`; for "-", a >= b."""

    a: int
    op: Literal["+", "-"]
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the evaluation; a + b and b + a always fall on the same side."""
        a, b = (min(self.a, self.b), max(self.a, self.b)) if self.op == "+" else (self.a, self.b)
        digest = hashlib.blake2b(f"{a}{self.op}{b}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") < _HELD_OUT_SHARE * 2**32


def sums(
    num: int,
    seed: int,
    *,
    max_digits: int = 2,
    form: SumForm = "plain",
    held_out: bool = False,
    ops: Sequence[Literal["+", "-"]] = ("+", "-"),
) -> Iterator[Conversation]:
    """`num` sums of numbers with up to `max_digits` digits, results never negative.

    A fixed tenth of all problems, the same for every seed, appears with `held_out=True` only and the rest never then.
    Held-out problems do not repeat, and there may be fewer than `num` of them. `form="plain"` answers with the bare
    number; `"worked"` adds digit by digit before it, see `worked`. Numbers are drawn by length first, so short ones
    are as frequent as long ones.
    """
    if max_digits < 1 or not ops:
        raise ValueError(f"max_digits is {max_digits} and ops {list(ops)}; give at least one digit and one operation")
    rng = random.Random(f"sums {seed} {held_out}")
    seen: set[Sum] = set()
    misses = 0
    while num > 0 and misses < 10_000:
        a, b = (_number(rng, max_digits) for _ in range(2))
        op = rng.choice(ops)
        problem = Sum(max(a, b), "-", min(a, b)) if op == "-" else Sum(a, "+", b)
        if problem.held_out != held_out or problem in seen:
            misses += 1
            continue
        misses = 0
        if held_out:
            seen.add(problem)
        num -= 1
        request = rng.choice(_SUM_REQUESTS + (_PLUS_REQUESTS if op == "+" else _MINUS_REQUESTS))
        response = worked(problem) if form == "worked" else str(problem.result)
        yield _conversation("sum", request.format(a=problem.a, b=problem.b, op=op), response, str(problem.result))


def _number(rng: random.Random, max_digits: int) -> int:
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def worked(problem: Sum) -> str:
    """The sum digit by digit from the right, carry as a third term, then the result.

    Every step is a fact on single digits, and the result only has to be copied together: far easier for a small model
    than the bare number, whose first digit depends on a carry not yet computed.

    >>> worked(Sum(27, "+", 48)), worked(Sum(52, "-", 17))
    ('7+8=15; 2+4+1=7; 75', '12-7=5; 5-1-1=3; 35')
    """
    steps: list[str] = []
    carry = 0
    width = len(str(problem.a if problem.op == "-" else max(problem.a, problem.b)))
    for place in range(width):
        x, y = problem.a // 10**place % 10, problem.b // 10**place % 10
        tail = f"{problem.op}{carry}" if carry else ""
        if problem.op == "+":
            total = x + y + carry
            carry = total // 10
        else:
            borrow = int(x - y - carry < 0)
            x += 10 * borrow
            total = x - y - carry
            carry = borrow
        steps.append(f"{x}{problem.op}{y}{tail}={total}")
    return "; ".join([*steps, str(problem.result)])


def answer_of(text: str) -> int | None:
    """The final answer of a sum, plain or worked: the last integer of the text, or None.

    >>> answer_of("7+8=15; 2+4+1=7; 75"), answer_of("I do not know")
    (75, None)
    """
    numbers = re.findall(r"(?<![\d.])-?\d+(?![\d]|\.\d)", text)
    return int(numbers[-1]) if numbers else None


# ------------------------------------------------------------------------------------------------- questions on Python
_DOCS_REQUESTS = (
    "What does `{name}` do?",
    "What does {name} do?",
    "What is `{name}`?",
    "What is {name}?",
    "What is {name} for?",
    "What is `{name}` used for?",
    "Explain `{name}`.",
    "Explain {name} in one sentence.",
    "Describe `{name}`.",
    "Describe {name} briefly.",
    "Tell me what `{name}` does.",
    "Tell me about {name}.",
    "In Python, what does `{name}` do?",
    "In Python, what is {name}?",
    "Can you explain `{name}`?",
    "Could you tell me what {name} is for?",
    "Please describe {name}.",
    "Please explain what `{name}` does.",
    "Document `{name}` in one line.",
    "Write a one-line summary of `{name}`.",
    "Summarise {name}.",
    "Give me the purpose of `{name}`.",
    "How would you describe {name}?",
    "I found `{name}` in some code. What is it?",
    "When would I use {name}?",
    "Why is there `{name}`?",
    "One line on {name}, please.",
    "{name}: what is it?",
    "`{name}`?",
    "help({name})",
)


def docs_conversations(documents: Iterable[Document], num: int, seed: int) -> Iterator[Conversation]:
    """Questions such as "What does `json.dumps` do?", answered by the first sentence of the docstring.

    Takes modules, public functions and classes of the Python sources among `documents`, see `docs_facts`. Once every
    name has had its turn they come again with other phrasings. Yields nothing if no source has docstrings.
    """
    facts = docs_facts(documents)
    rng = random.Random(f"docs {seed}")
    while num > 0 and facts:
        rng.shuffle(facts)
        for name, sentence in facts[:num]:
            yield _conversation("docs", rng.choice(_DOCS_REQUESTS).format(name=name), sentence, sentence)
        num -= len(facts)


def docs_facts(documents: Iterable[Document]) -> list[tuple[str, str]]:
    """(name, first sentence) of what is documented; a sentence that many names share is kept for the first of them.

    Sources are documents of kind "code" whose ids end in .py (with `meta["module"]`, or named after the path), and
    documents that bring their facts along as `meta["facts"]`.
    """
    facts: dict[str, str] = {}
    for document in documents:
        for name, sentence in document.meta.get("facts", ()):
            facts.setdefault(sentence, name)
        if document.kind != "code" or not document.id.endswith(".py"):
            continue
        module = document.meta.get("module") or module_name(document.id.partition("/")[2] or document.id)
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for entry in described(module, document.text):
            if entry.kind != "method" and (sentence := first_sentence(entry.doc)):
                facts.setdefault(sentence, entry.name)
    return [(name, sentence) for sentence, name in facts.items()]


# ---------------------------------------------------------------------------------------------------- continuing texts
_CONTINUE_REQUESTS = (
    "Continue: {text}",
    "Continue this text: {text}",
    'What comes after "{text}"?',
    'What is the next sentence after "{text}"?',
    "Write the next sentence. {text}",
    "Please go on: {text}",
    "{text} ... And then?",
    "How does this go on? {text}",
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])\s*(?=\S)")


def continue_conversations(documents: Iterable[Document], num: int, seed: int) -> Iterator[Conversation]:
    """A sentence of a document as request, the one after it as answer; for corpora of any kind and language.

    Sentences have 20 to 200 characters (8 to 100 in scripts without spaces, where a character says more). Yields
    nothing if no paragraph has two of them.
    """
    pairs: list[tuple[str, str]] = []
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document.text):
            sentences = _SENTENCES.split(" ".join(paragraph.split()))
            pairs += [pair for pair in itertools.pairwise(sentences) if all(map(_is_sentence, pair))]
    rng = random.Random(f"continue {seed}")
    while num > 0 and pairs:
        rng.shuffle(pairs)
        for text, after in pairs[:num]:
            yield _conversation("continue", rng.choice(_CONTINUE_REQUESTS).format(text=text), after, after)
        num -= len(pairs)


def _is_sentence(text: str) -> bool:
    low, high = (20, 200) if text.isascii() or " " in text else (8, 100)
    return low <= len(text) <= high and sum(map(str.isalpha, text)) > len(text) / 2


# --------------------------------------------------------------------------------------------- greetings and obedience
_GREETINGS = {
    "Hello! How can I help you?": ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning!", "Good evening."),
    "你好！有什么可以帮你？": ("你好", "你好！", "您好", "早上好！", "嗨"),
    "I am a small language model trained with qwench.": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Introduce yourself.",
        "Are you a human?",
    ),
    "我是用 qwench 训练的小语言模型。": ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是人吗？"),
    "You are welcome!": ("Thanks!", "Thank you.", "Thanks a lot!", "Thank you very much."),
    "不客气！": ("谢谢", "谢谢你！", "多谢。"),
    "Goodbye!": ("Bye", "Goodbye!", "See you later."),
    "再见！": ("再见", "拜拜！"),
}
_COLOURS = {
    "banana": "yellow", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue",
    "lemon": "yellow", "carrot": "orange", "leaf": "green", "milk": "white", "tomato": "red", "sea": "blue",
}  # fmt: skip
_ONE_WORD_REQUESTS = (
    "What colour is {thing}? Answer with one word.",
    "Answer with one word: the colour of {thing}.",
    "In one word, which colour has {thing}?",
)
_NAMES = ("Ada", "Alan", "Grace", "Linus", "Mei", "Noor", "Omar", "Paula", "Ravi", "Sofia", "Tomas", "Yuki")
_JSON_REQUESTS = (
    'Reply in JSON with the key "{key}": my {key} is {value}.',
    'My {key} is {value}. Answer in JSON, key "{key}".',
    'Put it into JSON as "{key}": {value}',
)


def manners_conversations(num: int, seed: int) -> Iterator[Conversation]:
    """Greetings and identity in English and Chinese, answers of one word, answers in JSON, a third each."""
    rng = random.Random(f"manners {seed}")
    for _ in range(num):
        task = rng.choice(("greeting", "one_word", "json"))
        if task == "greeting":
            response, requests = rng.choice(list(_GREETINGS.items()))
            yield _conversation("greeting", rng.choice(requests), response, response)
        elif task == "one_word":
            thing, colour = rng.choice(list(_COLOURS.items()))
            yield _conversation("one_word", rng.choice(_ONE_WORD_REQUESTS).format(thing=thing), colour, colour)
        else:
            key, value = rng.choice((("name", rng.choice(_NAMES)), ("colour", rng.choice(list(_COLOURS.values())))))
            response = json.dumps({key: value})
            yield _conversation("json", rng.choice(_JSON_REQUESTS).format(key=key, value=value), response, response)


# ------------------------------------------------------------------------------------------------------------ checking
_PLAIN_SUM = re.compile(r"\d+")
_WORKED_SUM = re.compile(r"(\d+[+-]\d([+-]1)?=\d+; )+\d+")


def obeys(task: Task, text: str, finish_reason: FinishReason = "stop", *, form: SumForm = "plain") -> bool:
    """Whether an answer has the form that its task asks for and ended by itself, be its content right or wrong.

    sum: a bare integer (`form="plain"`) or steps and an integer (`"worked"`); one_word: one word; json: one JSON
    object; all others: one line that is not empty.
    """
    text = text.strip()
    if finish_reason != "stop" or not text or "\n" in text:
        return False
    if task == "sum":
        return bool((_PLAIN_SUM if form == "plain" else _WORKED_SUM).fullmatch(text))
    if task == "one_word":
        return text.rstrip(".").isalpha()
    if task == "json":
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False
    return True


def is_correct(conversation: Conversation, text: str) -> bool:
    """Whether an answer is right: the number of a sum, the value of the JSON, else the same text up to a final stop."""
    if conversation.task == "sum":
        return answer_of(text) == int(conversation.answer)
    if conversation.task == "json":
        try:
            return json.loads(text) == json.loads(conversation.answer)
        except ValueError:
            return False
    return text.strip().rstrip(".").casefold() == conversation.answer.rstrip(".").casefold()


def training_conversations(
    documents: Sequence[Document],
    *,
    seed: int,
    num_sums: int,
    num_docs: int,
    num_manners: int,
    max_digits: int = 2,
    form: SumForm = "plain",
) -> list[Conversation]:
    """The mixture of all tasks, shuffled; a corpus without documented Python code gives continuations for questions."""
    docs = list(docs_conversations(documents, num_docs, seed))
    docs = docs or list(continue_conversations(documents, num_docs, seed))
    mixture = [
        *sums(num_sums, seed, max_digits=max_digits, form=form),
        *docs,
        *manners_conversations(num_manners, seed),
    ]
    random.Random(f"mixture {seed}").shuffle(mixture)
    return mixture
