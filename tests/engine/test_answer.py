"""One answer as it grows: the same tokens give the same answer one by one, in groups, streamed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine.answer import Answer
from qwench.tokenizer import Tokenizer
from qwench.types import Chunk, Completion, SamplingParams

END = 7


class Fed:
    """An answer fed in groups of tokens until it ends, and the pieces that were taken after each group."""

    def __init__(self, answer: Answer, tokens: Sequence[int], groups: Sequence[int] | None) -> None:
        """`groups` are the sizes given to `extend`; None pushes one by one."""
        self.answer, self.chunks = answer, list[Chunk]()
        at, sizes = 0, iter(groups or [])
        while at < len(tokens) and answer.finish is None:
            size = next(sizes, 1)
            part = list(tokens[at : at + size])
            at += size
            logprobs = [-float(token) for token in part]
            ended = answer.push(part[0], logprobs[0]) if groups is None else answer.extend(part, logprobs)
            assert ended == (answer.finish is not None)
            self.chunks.append(answer.take())
        if answer.finish is None:
            answer.abort()
            self.chunks.append(answer.take())

    @property
    def completion(self) -> Completion:
        return self.answer.completion()

    def check_pieces(self) -> None:
        done = self.completion
        assert "".join(chunk.text for chunk in self.chunks) == done.text
        assert [token for chunk in self.chunks for token in chunk.token_ids] == done.token_ids
        assert [logprob for chunk in self.chunks for logprob in chunk.logprobs] == done.logprobs
        assert self.chunks[-1].completion == done
        assert all(chunk.completion is None for chunk in self.chunks[:-1])


def fed(
    tokenizer: Tokenizer, tokens: Sequence[int], groups: Sequence[int] | None, *, streaming: bool, limit: int,
    ends: frozenset[int] = frozenset([END]), **params: Any,
) -> Fed:  # fmt: skip
    return Fed(Answer(tokenizer, SamplingParams(**params), ends, limit, streaming=streaming), tokens, groups)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_ways_are_one(data: st.DataObject, tiny_tokenizer: Tokenizer) -> None:
    """Tokens are bytes, parts of characters, words and control tokens."""
    smile, accent = tiny_tokenizer.encode("🙂"), tiny_tokenizer.encode("é中")
    special = sorted(tiny_tokenizer.special_ids.values())[:3]
    words = tiny_tokenizer.encode("abba def return")
    alphabet = st.sampled_from([END, *smile, *accent, *special, *words, *range(64, 70)])
    runs = st.one_of(alphabet.map(lambda token: [token]), st.sampled_from([smile, accent, words]))
    tokens = [token for run in data.draw(st.lists(runs, min_size=1, max_size=14)) for token in run]
    text = tiny_tokenizer.decode([token for token in tokens if token != END], skip_special=True)
    stops = data.draw(st.lists(st.sampled_from(["ab", "a", "🙂", "中", "never", "", text[2:5], text[1:2]]), max_size=3))
    common: dict[str, Any] = {
        "stop": stops,
        "min_tokens": data.draw(st.integers(0, 6)),
        "limit": data.draw(st.integers(1, 30)),
    }
    groups = data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=10))
    one = fed(tiny_tokenizer, tokens, None, streaming=False, **common)
    for grouped, streaming in ((None, True), (groups, True), (groups, False)):
        other = fed(tiny_tokenizer, tokens, grouped, streaming=streaming, **common)
        assert other.completion == one.completion
        if streaming:
            other.check_pieces()
    done = one.completion
    assert done.token_ids == tokens[: len(done.token_ids)]
    kept = done.token_ids[:-1] if done.token_ids[-1] == END else done.token_ids
    everything = tiny_tokenizer.decode(kept, skip_special=True)
    assert everything.startswith(done.text.removesuffix("\N{REPLACEMENT CHARACTER}"))
    if not any(stops):
        assert done.text == everything
    if done.finish_reason == "length":
        assert len(done.token_ids) == common["limit"]


def test_half_a_character_waits(tiny_tokenizer: Tokenizer) -> None:
    smile = tiny_tokenizer.encode("🙂")
    assert len(smile) == 4
    whole = fed(tiny_tokenizer, [*smile, END], None, streaming=True, limit=9)
    assert [chunk.text for chunk in whole.chunks] == ["", "", "", "🙂", ""]
    half = fed(tiny_tokenizer, [*smile[:2], END], None, streaming=True, limit=9)
    assert [chunk.text for chunk in half.chunks] == ["", "", "\N{REPLACEMENT CHARACTER}"]
    assert half.completion.text == fed(tiny_tokenizer, [*smile[:2], END], [3], streaming=False, limit=9).completion.text


def test_stop_strings_before_min_tokens(tiny_tokenizer: Tokenizer) -> None:
    """What is complete too early stays; the same string ends the answer when it comes again."""
    a, b = tiny_tokenizer.encode("x")[0], tiny_tokenizer.encode("!")[0]
    for groups in (None, [5], [1, 2, 2]):
        one = fed(tiny_tokenizer, [a, b, a, b, a], groups, streaming=True, limit=9, stop=["x!"], min_tokens=3)
        assert (one.completion.text, one.completion.finish_reason, len(one.completion.token_ids)) == ("x!", "stop", 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_grammar_goes_before_the_limit(streaming: bool, tiny_tokenizer: Tokenizer) -> None:
    one = fed(tiny_tokenizer, tiny_tokenizer.encode("x!"), None, streaming=streaming, limit=2)
    assert one.completion.finish_reason == "length"
    assert one.answer.stop()
    assert (one.completion.text, one.completion.finish_reason) == ("x!", "stop")
    aborted = fed(tiny_tokenizer, tiny_tokenizer.encode("x!"), None, streaming=streaming, limit=3)
    assert aborted.answer.stop()
    assert aborted.completion.finish_reason == "abort"


def test_top_logprobs_and_prompt(tiny_tokenizer: Tokenizer) -> None:
    params = SamplingParams(top_logprobs=1, prompt_logprobs=True)
    answer = Answer(tiny_tokenizer, params, frozenset([END]), 9, streaming=True)
    answer.push(70, -1.0, {70: -1.0})
    assert answer.take().top_logprobs == [{70: -1.0}]
    answer.push(END, -2.0, {71: -0.5})
    assert answer.take().top_logprobs == [{71: -0.5}]
    assert answer.completion().top_logprobs == [{70: -1.0}, {71: -0.5}]
    assert answer.completion().prompt_logprobs == [None]
    plain = fed(tiny_tokenizer, [END], None, streaming=False, limit=1).completion
    assert plain.top_logprobs is plain.prompt_logprobs is None
