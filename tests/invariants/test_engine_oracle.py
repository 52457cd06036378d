"""The engine's answers are the naive generator's: same tokens, text, end and log-probabilities, whatever the cache, the
blocks, the chunks and the company. And afterwards nothing is left in use.

One mixed batch that uses every sampling option runs through engines of many shapes, on real (tiny, random) weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwench.engine import Engine, EngineConfig
from qwench.engine.grammar import GrammarCompiler
from qwench.engine.naive import NaiveGenerator
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Grammar, SamplingParams

CONTEXT = 160
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["x", "yz"]}, "b": {"type": "boolean"}}, "required": ["a"]}'
Request = tuple[list[int], SamplingParams]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 22, "ignore_eos": True, **changes})


def requests(tokenizer: Tokenizer, free: Callable[[list[int]], Completion]) -> list[Request]:
    """`free` gives the greedy answer, from which stop tokens and stop strings that really come are taken."""
    short = tokenizer.encode("def bisect(a, x, lo=0):")
    longer = [*short, *tokenizer.encode(" return insort(a, x, lo, hi, key=key)\n\nclass Heap: pass")]
    other = tokenizer.encode("Beautiful is better than ugly.\nExplicit is better than implicit.")
    greedy = free(short)
    stop_token = greedy.token_ids[9]
    stop_text = greedy.text[12:15]
    ends = dict.fromkeys(tokenizer.eos_token_ids, 1e6)
    return [
        (short, params()),
        (longer, params(max_tokens=40)),
        ([5], params(max_tokens=1)),
        (short, params(temperature=1.0, seed=1)),
        (longer, params(temperature=1.6, top_k=9, top_p=0.9, seed=2)),
        (other, params(temperature=2.0, min_p=0.05, seed=-3, max_tokens=30)),
        (short, params(temperature=1.4, top_p=0.7, seed=4, top_logprobs=4)),
        (other, params(repetition_penalty=1.3, presence_penalty=0.5)),
        (longer, params(temperature=1.5, repetition_penalty=0.9, frequency_penalty=0.8, seed=2**64 + 5)),
        (other, params(frequency_penalty=1e4, prompt_logprobs=True)),
        (short, params(logit_bias={77: 4.0, 5: -math.inf}, temperature=0.8, seed=6)),
        (short, params(stop_token_ids=[stop_token])),
        (short, params(stop_token_ids=[stop_token], min_tokens=14)),
        (short, params(stop=[stop_text, "never"])),
        (short, params(stop=[stop_text], min_tokens=16)),
        (other, params(ignore_eos=False, logit_bias=ends, min_tokens=6)),
        (other, params(ignore_eos=False, logit_bias=ends)),
        (longer, params(prompt_logprobs=True, top_logprobs=2, temperature=1.0, seed=7)),
        ([5], params(prompt_logprobs=True, max_tokens=2)),
        (other, params(grammar=Grammar(kind="json_schema", value=SCHEMA), max_tokens=60, temperature=1.0, seed=8)),
        (short, params(grammar=Grammar(kind="regex", value="[a-c]{2,5}(-[0-9]{3}){2}"), temperature=3.0, seed=9)),
        (short, params(grammar=Grammar(kind="regex", value="[ab]*"), min_tokens=9, ignore_eos=False)),
        (other, params(grammar=Grammar(kind="choice", value='["yes, certainly", "no"]'), ignore_eos=False)),
        (other, params(grammar=Grammar(kind="regex", value="[0-9]{30}"), max_tokens=3)),
        (short, params(n=3, temperature=1.0, seed=10)),
        (longer, params(max_tokens=1000)),
        (other, params(grammar=Grammar(kind="regex", value="[0-9]{3}"), max_tokens=3)),
        (longer, params(prompt_logprobs=True, prompt_logprobs_from=len(longer) - 5, first_logprobs=[7, 8, 7])),
        (longer, params(prompt_logprobs=True, prompt_logprobs_from=len(longer), first_logprobs=[3])),
        (other, params(first_logprobs=[1, 2, 300], temperature=1.5, seed=12, repetition_penalty=1.2)),
    ]  # fmt: skip


class Oracle:
    """A model, a mixed batch for it, and what the naive generator answers."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        naive = NaiveGenerator(model, tokenizer, GrammarCompiler(tokenizer, model.config.vocab_size))
        self.naive = naive
        self.requests = requests(tokenizer, lambda prompt: naive.generate(prompt, params()))
        self.expected = [
            naive.generate(prompt, dataclasses.replace(wishes, n=1, seed=(wishes.seed or 0) + i))
            for prompt, wishes in self.requests
            for i in range(wishes.n)
        ]

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.model, tokenizer=self.tokenizer, config=EngineConfig(**settings))

    def answers(self, engine: Engine) -> list[Completion]:
        return engine.generate([prompt for prompt, _ in self.requests], [wishes for _, wishes in self.requests])


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def oracle(make_model: Callable[..., CausalLM], config: ModelConfig, tiny_tokenizer: Tokenizer) -> Oracle:
    return Oracle(make_model(config), tiny_tokenizer)


def close(got: Sequence[float], want: Sequence[float]) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=2e-4)


def assert_same(got: Iterable[Completion], want: Iterable[Completion]) -> None:
    for number, (mine, naive) in enumerate(zip(got, want, strict=True)):
        found = (number, mine.token_ids, mine.text, mine.finish_reason)
        assert found == (number, naive.token_ids, naive.text, naive.finish_reason)
        close(mine.logprobs, naive.logprobs)
        assert (mine.top_logprobs is None) == (naive.top_logprobs is None)
        for best, wanted in zip(mine.top_logprobs or [], naive.top_logprobs or [], strict=True):
            assert list(best) == list(wanted)
            close(list(best.values()), list(wanted.values()))
        assert (mine.prompt_logprobs is None) == (naive.prompt_logprobs is None)
        if mine.prompt_logprobs is not None and naive.prompt_logprobs is not None:
            assert mine.prompt_logprobs[0] is naive.prompt_logprobs[0] is None
            assert [x is None for x in mine.prompt_logprobs] == [x is None for x in naive.prompt_logprobs]
            close(
                [x for x in mine.prompt_logprobs if x is not None], [x for x in naive.prompt_logprobs if x is not None]
            )
        assert mine.prompt_greedy == naive.prompt_greedy
        assert list(mine.first_logprobs or ()) == list(naive.first_logprobs or ())
        close([*(mine.first_logprobs or {}).values()], [*(naive.first_logprobs or {}).values()])


def assert_idle(engine: Engine) -> None:
    """Nothing is in use when all answers are complete."""
    stats, core = engine.stats(), engine._core
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert not any(core.pool._owners)
    assert sorted(core.scheduler.free_slots) == list(range(core.scheduler.max_seqs))


def test_the_batch_uses_what_it_should(oracle: Oracle) -> None:
    """The expected answers are not trivial: they end in every way, and options change them."""
    reasons = [completion.finish_reason for completion in oracle.expected]
    assert {"stop", "length"} == set(reasons)
    by_request = {number: completion for number, completion in enumerate(oracle.expected)}
    assert [by_request[i].finish_reason for i in (11, 13, 16)] == ["stop"] * 3, "stop token, stop string, end token"
    assert len(by_request[12].token_ids) > 14
    assert len(by_request[14].token_ids) > 16 or by_request[14].finish_reason == "length"
    assert len(by_request[15].token_ids) == 7
    assert len({tuple(completion.token_ids) for completion in oracle.expected[24:27]}) == 3
    assert len(by_request[27].token_ids) + len(oracle.requests[25][0]) == CONTEXT
    assert (len(by_request[28].token_ids), by_request[28].finish_reason) == (3, "stop"), "a grammar's end at the limit"
    assert max(len(set(completion.token_ids)) for completion in oracle.expected) > 10


SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "one row": {"max_seqs": 1},
    "one row, blocks of 1": {"max_seqs": 1, "block_size": 1, "decode_steps": 4},
    "blocks of 1": {"block_size": 1, "prefix_caching": False},
    "blocks of 3, several steps": {"block_size": 3, "decode_steps": 8, "max_seqs": 5},
    "blocks of 64": {"block_size": 64, "decode_steps": 3},
    "chunks of prompts": {"max_step_tokens": 7, "max_seqs": 7, "block_size": 4},
    "a token at a time": {"max_step_tokens": 1, "block_size": 4},
}
CROWDED: dict[str, dict[str, Any]] = {
    "blocks of 4": {"block_size": 4, "cache_tokens": CONTEXT},
    "blocks of 1": {"block_size": 1, "cache_tokens": CONTEXT, "decode_steps": 8},
    "no prefixes": {"block_size": 3, "cache_tokens": CONTEXT, "prefix_caching": False, "decode_steps": 2},
    "chunks": {"block_size": 4, "cache_tokens": CONTEXT, "max_step_tokens": 20},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_is_the_naive_generator(shape: str, oracle: Oracle) -> None:
    with oracle.engine(**SHAPES[shape]) as engine:
        assert_same(oracle.answers(engine), oracle.expected)
        stats = engine.stats()
        assert stats.num_preemptions == 0
        assert stats.generated_tokens == sum(len(one.token_ids) for one in oracle.expected)
        assert stats.prompt_tokens == sum(len(prompt) * wishes.n for prompt, wishes in oracle.requests)
        assert_idle(engine)


@pytest.mark.parametrize("shape", CROWDED)
@pytest.mark.parametrize("ahead", [False, True])
def test_when_the_cache_is_too_small_for_all(shape: str, ahead: bool, oracle: Oracle) -> None:
    """Sequences give their blocks back and are read again. `ahead`: as on a GPU, a step is launched before the tokens
    of the last one are read."""
    with oracle.engine(max_seqs=16, **CROWDED[shape]) as engine:
        engine._core.overlap = ahead
        assert_same(oracle.answers(engine), oracle.expected)
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prompt_tokens == sum(len(prompt) * wishes.n for prompt, wishes in oracle.requests)
        assert_idle(engine)


@pytest.mark.parametrize("decode_steps", [1, 5])
def test_running_ahead(decode_steps: int, oracle: Oracle) -> None:
    with oracle.engine(decode_steps=decode_steps, max_seqs=6, block_size=4) as engine:
        engine._core.overlap = True
        assert_same(oracle.answers(engine), oracle.expected)
        assert_idle(engine)


def test_known_beginnings_change_nothing(oracle: Oracle) -> None:
    """The second time the prompts' blocks are found; so are those of an answer that the next prompt contains."""
    with oracle.engine(block_size=4) as engine:
        first = oracle.answers(engine)
        shared = engine.stats().cached_prompt_tokens
        assert shared > 0, "the prompts of the batch begin alike"
        again = oracle.answers(engine)
        assert_same(again, oracle.expected)
        for completion, (prompt, wishes) in zip(
            again, [r for r in oracle.requests for _ in range(r[1].n)], strict=True
        ):
            last = wishes.prompt_logprobs_from if wishes.prompt_logprobs else len(prompt)
            usable = max(0, last - 1) // 4 * 4
            assert completion.num_cached_tokens == usable
        assert engine.stats().cached_prompt_tokens == shared + sum(one.num_cached_tokens for one in again)
        turn = [*oracle.requests[1][0], *first[1].token_ids, *oracle.tokenizer.encode("\nfor x in a:")]
        followed = engine.generate([turn], params())
        assert_same(followed, [oracle.naive.generate(turn, params())])
        known = len(oracle.requests[1][0]) + len(first[1].token_ids) - 1
        assert followed[0].num_cached_tokens >= known // 4 * 4, "the answer's own blocks are found as well"
        assert_idle(engine)
    with oracle.engine(block_size=4, prefix_caching=False) as engine:
        oracle.answers(engine)
        assert engine.stats().cached_prompt_tokens == 0


def test_company_does_not_matter(oracle: Oracle) -> None:
    """Alone, in the batch, and in the batch reversed: the same answers."""
    with oracle.engine(max_seqs=8) as engine:
        flat = [(p, dataclasses.replace(w, n=1)) for p, w in oracle.requests]
        expected = [completion for i, completion in enumerate(oracle.expected) if i not in (25, 26)]
        prompts, each = zip(*reversed(flat), strict=True)
        assert_same(engine.generate(prompts, each), reversed(expected))
        alone = [engine.generate([prompt], wishes)[0] for prompt, wishes in flat[:9]]
        assert_same(alone, expected[:9])


MODELS: dict[str, dict[str, Any]] = {
    "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "window everywhere": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "head_dim": {"head_dim": 10},
    "rows without tokens": {"vocab_size": 640, "tie_word_embeddings": False},
    "as many key heads": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1, "rope_theta": 10_000.0, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("kind", MODELS)
def test_other_models(kind: str, make_model, config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    oracle = Oracle(make_model(dataclasses.replace(config, **MODELS[kind]), seed=3), tiny_tokenizer)
    with oracle.engine(block_size=4, cache_tokens=CONTEXT, max_step_tokens=24, decode_steps=3) as engine:
        assert_same(oracle.answers(engine), oracle.expected)
        assert engine.stats().num_preemptions > 0
        assert_idle(engine)


@pytest.mark.parametrize("further", [{}, {"cache_dtype": "fp8"}, {"cache_dtype": "fp8", "block_size": 3}])
def test_small_numbers(further: dict[str, Any], make_model, config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    """Half precision and 8-bit caches: the same requests have the same answers, and they are near the exact ones."""
    model = make_model(config)
    exact = NaiveGenerator(model, tiny_tokenizer)
    prompt = tiny_tokenizer.encode("def bisect(a, x, lo=0):")
    model = model.to(torch.bfloat16) if not further else model
    runs: list[list[Completion]] = []
    for _ in range(2):
        with Engine(model, tokenizer=tiny_tokenizer, config=EngineConfig(**further)) as engine:
            keys = engine._core.runner.caches[0][0]
            assert keys.dtype == (torch.float8_e4m3fn if further else torch.bfloat16)
            runs.append(engine.generate([prompt, prompt[:4]], params(prompt_logprobs=True)))
            assert_idle(engine)
    assert runs[0] == runs[1]
    if further:
        wanted = exact.generate(prompt, params(max_tokens=1))
        got = runs[0][0]
        assert got.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=0.5)
        assert got.logprobs[0] != wanted.logprobs[0]


def test_a_loaded_checkpoint(parrot: Path, dialogues: list[tuple[str, str]]) -> None:
    """Answers that end by themselves, with characters of several tokens."""
    with Engine(parrot, device="cpu", config=EngineConfig(block_size=4, decode_steps=8)) as engine:
        naive = NaiveGenerator(engine.model, engine.tokenizer)
        prompts = [engine.tokenizer.render([{"role": "user", "content": question}]) for question, _ in dialogues]
        wishes = SamplingParams(temperature=0, stop=["話し"])
        assert_same(engine.generate(prompts, wishes), [naive.generate(prompt, wishes) for prompt in prompts])
        done = engine.generate(prompts, SamplingParams(temperature=0))
        assert [one.text for one in done] == [answer for _, answer in dialogues]
        assert {one.finish_reason for one in done} == {"stop"}
