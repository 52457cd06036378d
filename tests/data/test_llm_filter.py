"""Judging by a language model: requests, constrained answers, and what is distilled from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from qwench.data.classifier import ClassifierSettings
from qwench.data.llm_filter import DIMENSIONS, Judgement, LLMJudge, distil, distil_domains
from qwench.engine.grammar import GrammarCompiler
from qwench.engine.naive import NaiveGenerator
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, SamplingParams

DOMAINS = ("science", "news")


class Reader:
    """A generator that gives what it is told and remembers what it was asked."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, []

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.asked.append(list(token_ids))
        return Completion(token_ids=[], text=self.answer, logprobs=[], finish_reason="stop")


def answer(**changes: object) -> str:
    return json.dumps({**dict.fromkeys(DIMENSIONS, 4), "domain": "news", **changes})


def test_any_model_answers_in_form(
    make_model: Callable[..., CausalLM], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
):
    # Random weights: only the grammar can make this an answer.
    dimensions = {"fluent": "Is it fluent?", "useful": "Is it useful?"}
    for seed in (0, 1):
        model = make_model(tiny_config, seed)
        generator = NaiveGenerator(model, tiny_tokenizer, GrammarCompiler(tiny_tokenizer, model.config.vocab_size))
        judgement = LLMJudge(generator, tiny_tokenizer, dimensions, DOMAINS).judge("The sun is a star.")
        assert set(judgement.scores) == {"fluent", "useful"}
        assert judgement.domain in DOMAINS
        assert all(1 <= score <= 5 for score in judgement.scores.values())


def test_the_request_holds_questions_and_the_text_but_no_control_tokens_of_it(tiny_tokenizer: Tokenizer):
    reader = Reader(answer())
    judge = LLMJudge(reader, tiny_tokenizer, domains=DOMAINS, max_chars=60)
    text = "Begin <|im_end|> " + "x" * 200 + " the end"
    assert judge.judge(text) == Judgement(scores=dict.fromkeys(DIMENSIONS, 4), domain="news")
    shown = tiny_tokenizer.decode(reader.asked[0])
    assert all(question in shown for question in DIMENSIONS.values())
    assert "science, news" in shown
    assert "Begin" in shown
    assert "the end" in shown
    assert "x" * 60 not in shown
    assert reader.asked[0].count(tiny_tokenizer.im_end_id) == 2  # system and user


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"language": 4, "info', "no JSON object"),
        (answer(language=6), "'language' is 6"),
        (answer(safety="5"), "'safety' is '5'"),
        (answer(domain="cooking"), "domain 'cooking'"),
    ],
)
def test_a_bad_answer_is_an_error(tiny_tokenizer: Tokenizer, given: str, message: str):
    with pytest.raises(ValueError, match=message):
        LLMJudge(Reader(given), tiny_tokenizer, domains=DOMAINS).judge("text")


def test_the_scorer_follows_the_judge():
    good = [f"the experiment number {n} measured a result that confirms theory" for n in range(40)]
    bad = [f"buy now cheap deal {n} click here best price" for n in range(40)]
    judgements = [Judgement(scores={"a": 4, "b": 3}, domain="science")] * 40
    judgements += [Judgement(scores={"a": 2, "b": 3}, domain="shop")] * 40
    settings = ClassifierSettings(bucket_bits=12)
    model = distil(good + bad, judgements, settings, min_score=3.0)
    scores = model.score(["a measured result of the experiment", "click here for a cheap price"])[:, 1]
    assert model.labels == ("bad", "good")
    assert scores[0] > 0.8
    assert scores[1] < 0.2
    assert distil_domains(good + bad, judgements, settings).labels == ("science", "shop")
