import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.demo.conversations import (
    Sum,
    answer_of,
    continue_conversations,
    docs_conversations,
    docs_facts,
    is_correct,
    manners_conversations,
    obeys,
    sums,
    training_conversations,
    worked,
)
from qwench.demo.corpus import read_corpus
from qwench.types import Document

CODE = '''"""Tools for cooking rice and other grains."""
def boil(rice):
    """Return the rice, boiled until it is soft."""
def _hidden():
    """Return something that nobody should see."""
class Pot:
    """A pot that holds up to five litres."""
'''


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6), op=st.sampled_from("+-"))
def test_worked_sums_are_true_step_by_step(a, b, op):
    problem = Sum(max(a, b), op, min(a, b))
    *steps, last = worked(problem).split("; ")
    for step in steps:
        left, _, right = step.partition("=")
        assert eval(left) == int(right)
    assert answer_of(worked(problem)) == int(last) == problem.result >= 0
    digits = "".join(step.partition("=")[2][-1] for step in reversed(steps))
    carry = steps[-1].partition("=")[2][:-1]
    assert int(carry + digits) == problem.result
    assert obeys("sum", worked(problem), form="worked")


def test_examples_of_worked_sums():
    assert worked(Sum(27, "+", 48)) == "7+8=15; 2+4+1=7; 75"
    assert worked(Sum(95, "+", 7)) == "5+7=12; 9+0+1=10; 102"
    assert worked(Sum(52, "-", 17)) == "12-7=5; 5-1-1=3; 35"
    assert worked(Sum(100, "-", 1)) == "10-1=9; 10-0-1=9; 1-0-1=0; 99"


@pytest.mark.parametrize("max_digits", [1, 2])
def test_training_and_held_out_problems_are_disjoint_for_every_seed(max_digits):
    def triples(seed, held_out, num):
        result = set()
        for conversation in sums(num, seed, max_digits=max_digits, form="worked", held_out=held_out):
            steps = conversation.response.split("; ")[:-1]
            request = [int(n) for n in _numbers(conversation.messages[0].content)]
            op = "+" if "+" in steps[0] else "-"
            # "Subtract b from a" names b first
            result.add((*sorted(request), op))
        return result

    train = triples(0, False, 5000) | triples(1, False, 5000)
    held_out = triples(0, True, 10**6) | triples(5, True, 10**6)
    assert train
    assert held_out
    assert not train & held_out


def test_a_tenth_is_held_out_and_addition_commutes():
    pairs = [(a, b) for a in range(100) for b in range(100)]
    assert sum(Sum(a, "+", b).held_out for a, b in pairs) / len(pairs) == pytest.approx(0.1, abs=0.015)
    assert sum(Sum(a, "-", b).held_out for a, b in pairs) / len(pairs) == pytest.approx(0.1, abs=0.015)
    assert all(Sum(a, "+", b).held_out == Sum(b, "+", a).held_out for a, b in pairs)


def _numbers(text):
    return "".join(c if c.isdigit() else " " for c in text).split()


def test_sums_are_correct_reproducible_and_limited():
    first = list(sums(500, 3, max_digits=3))
    assert first == list(sums(500, 3, max_digits=3))
    assert first != list(sums(500, 4, max_digits=3))
    for conversation in first:
        assert conversation.response == conversation.answer
        assert max(map(len, _numbers(conversation.messages[0].content))) <= 3
        assert obeys("sum", conversation.response)
        assert is_correct(conversation, conversation.response)
        assert not is_correct(conversation, str(int(conversation.answer) + 1))
    held_out = list(sums(300, 3, held_out=True))
    assert len({(c.answer, tuple(sorted(_numbers(c.messages[0].content)))) for c in held_out}) > 250
    assert len(list(sums(10**6, 0, max_digits=1, held_out=True))) < 40
    assert {c.messages[0].role for c in first} == {"user"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("68", 68),
        ("3+5=8; 2+4=6; 68", 68),
        ("The answer is 68.", 68),
        ("-4", -4),
        ("答案是 68。", 68),
        ("1.5", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_answers_are_found(text, answer):
    assert answer_of(text) == answer


def test_questions_on_documentation():
    documents = [
        Document(id="root/kitchen/rice.py", text=CODE, kind="code"),
        Document(id="root/kitchen/copy.py", text=CODE, kind="code"),
        Document(id="help", text="", kind="docs", meta={"facts": [("len", "Return the number of items.")]}),
        Document(id="notes.txt", text=CODE, kind="text"),
    ]
    facts = dict(docs_facts(documents))
    assert facts == {
        "kitchen.rice": "Tools for cooking rice and other grains.",
        "kitchen.rice.boil": "Return the rice, boiled until it is soft.",
        "kitchen.rice.Pot": "A pot that holds up to five litres.",
        "len": "Return the number of items.",
    }
    conversations = list(docs_conversations(documents, 40, 0))
    assert len(conversations) == 40
    assert len({c.messages[0].content for c in conversations}) > 25
    for conversation in conversations:
        name = next(n for n in sorted(facts, key=len, reverse=True) if n in conversation.messages[0].content)
        assert conversation.response == facts[name]
        assert obeys("docs", conversation.response)
    assert list(docs_conversations(documents[3:], 5, 0)) == []


def test_python_itself_is_documented():
    facts = dict(docs_facts(read_corpus(3_000_000)))
    assert len(facts) > 200
    assert facts["len"] == "Return the number of items in a container."
    assert all("\n" not in sentence and 15 <= len(sentence) <= 161 for sentence in facts.values())


def test_continuations_of_any_text():
    text = "The cat sat on the warm mat. It looked at the small bird. Then it fell asleep again.\n\nOnly one sentence."
    chinese = "今天天气非常好，我们去公园。孩子们在草地上玩耍。"
    documents = [Document(id="a", text=text), Document(id="b", text=chinese)]
    conversations = list(continue_conversations(documents, 30, 0))
    assert len(conversations) == 30
    pairs = {
        "The cat sat on the warm mat.": "It looked at the small bird.",
        "It looked at the small bird.": "Then it fell asleep again.",
        "今天天气非常好，我们去公园。": "孩子们在草地上玩耍。",
    }
    assert {c.response for c in conversations} == set(pairs.values())
    for conversation in conversations:
        assert any(a in conversation.messages[0].content and b == conversation.response for a, b in pairs.items())
    assert list(continue_conversations([Document(id="c", text="nothing")], 3, 0)) == []


def test_manners_obey_their_own_requests():
    conversations = list(manners_conversations(300, 0))
    assert {c.task for c in conversations} == {"greeting", "one_word", "json"}
    for conversation in conversations:
        assert obeys(conversation.task, conversation.response)
        assert is_correct(conversation, conversation.response)
        if conversation.task == "json":
            key, value = next(iter(json.loads(conversation.response).items()))
            assert key in conversation.messages[0].content
            assert value in conversation.messages[0].content


@pytest.mark.parametrize(
    ("task", "text", "form", "obedient"),
    [
        ("sum", "68", "plain", True),
        ("sum", "The answer is 68", "plain", False),
        ("sum", "3+5=8; 2+4=6; 68", "plain", False),
        ("sum", "3+5=8; 2+4=6; 68", "worked", True),
        ("sum", "68", "worked", False),
        ("docs", "One line.", "plain", True),
        ("docs", "Two\nlines.", "plain", False),
        ("docs", "  ", "plain", False),
        ("one_word", "red.", "plain", True),
        ("one_word", "dark red", "plain", False),
        ("json", '{"a": 1}', "plain", True),
        ("json", "[1]", "plain", False),
        ("json", '{"a": ', "plain", False),
    ],
)
def test_obedience(task, text, form, obedient):
    assert obeys(task, text, form=form) is obedient
    assert not obeys(task, text, "length", form=form)


def test_the_mixture_has_what_was_ordered_and_falls_back_to_continuing():
    code = [Document(id="root/rice.py", text=CODE, kind="code")]
    mixture = training_conversations(code, seed=0, num_sums=50, num_docs=30, num_manners=20)
    assert sum(c.task == "sum" for c in mixture) == 50
    assert sum(c.task == "docs" for c in mixture) == 30
    assert len(mixture) == 100
    assert max(len(list(run)) for _, run in itertools.groupby(c.task == "sum" for c in mixture)) < 20
    prose = [Document(id="a", text="The cat sat on the warm mat. It looked at the small bird.")]
    mixture = training_conversations(prose, seed=0, num_sums=5, num_docs=5, num_manners=5)
    assert sum(c.task == "continue" for c in mixture) == 5
