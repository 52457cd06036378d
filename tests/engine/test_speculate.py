"""Speculative decoding changes no answer: everything here is compared with the oracle, token for token."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine import Engine, EngineConfig
from qwench.engine.blocks import prefix_hashes
from qwench.engine.grammar import GrammarCompiler
from qwench.engine.naive import NaiveGenerator, SequenceCache
from qwench.engine.proposers import LONGEST_MATCH, NgramIndex
from qwench.engine.sampling import filtered_probabilities, penalised
from qwench.engine.speculate import LONGEST_PAUSE, Drafting
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer, train
from qwench.types import Completion, Grammar, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
WISHES = {
    "greedy": GREEDY,
    "greedy with Qwen's penalty": dataclasses.replace(GREEDY, repetition_penalty=1.05),
    "temperature": SamplingParams(temperature=0.7, seed=3, max_tokens=60, ignore_eos=True),
    "top-k and top-p": SamplingParams(temperature=0.5, top_k=8, top_p=0.7, seed=4, max_tokens=60),
    "min-p and all penalties": SamplingParams(
        temperature=0.4, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, seed=5,
        max_tokens=60, ignore_eos=True,
    ),
    "a negative penalty, which asks for repetition": SamplingParams(
        temperature=0.8, frequency_penalty=-0.3, seed=6, max_tokens=60, ignore_eos=True
    ),
    "bias, early end forbidden, likeliest tokens": SamplingParams(
        temperature=0.3, seed=7, max_tokens=60, min_tokens=30, logit_bias={5: 2.0, 9: float("-inf")}, top_logprobs=3
    ),
    "likeliest tokens, greedy": dataclasses.replace(GREEDY, top_logprobs=2),
    "one token": dataclasses.replace(GREEDY, max_tokens=1),
    "two tokens": dataclasses.replace(GREEDY, max_tokens=2),
}  # fmt: skip
TEXTS = ("def bisect(a, x, lo=0):", "abc abc abc abc abc abc abc", "import heapq\nimport heapq\nimport", "x")
PROPOSERS = ("ngram", "same", "near", "other")


@pytest.fixture(scope="module")
def model(make_model, tiny_config, tiny_tokenizer) -> CausalLM:
    """With some rows that have no token."""
    return make_model(dataclasses.replace(tiny_config, vocab_size=tiny_tokenizer.vocab_size + 8))


@pytest.fixture(scope="module")
def drafts(make_model, model, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Draft models: `same` has the weights of `model`, `near` similar ones, `other` is smaller, with fewer rows."""
    smaller = dataclasses.replace(model.config, num_hidden_layers=1, vocab_size=tiny_tokenizer.vocab_size + 2)
    near, generator = make_model(model.config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    found: dict[str, Path] = {}
    for name, draft in (("same", model), ("near", near), ("other", make_model(smaller, seed=1))):
        found[name] = tmp_path_factory.mktemp("drafts") / name
        save_pretrained(draft, found[name])
        tiny_tokenizer.save(found[name])
    return found


@pytest.fixture(scope="module")
def open_engine(model, tiny_tokenizer, drafts) -> Callable[..., Engine]:
    def opened(proposer: str, **settings: object) -> Engine:
        kind: dict[str, object] = {"speculate": "ngram"}
        if proposer != "ngram":
            kind = {"speculate": "draft", "draft_model": str(drafts[proposer])}
        chosen = {"block_size": 4, "speculate_max_seqs": 16, **kind, **settings}
        return Engine(model, tokenizer=tiny_tokenizer, config=EngineConfig(**chosen))  # pyright: ignore[reportArgumentType]

    return opened


@pytest.fixture(scope="module", params=["ngram", "near", "other"])
def engine(request: pytest.FixtureRequest, open_engine) -> Iterator[Engine]:
    with open_engine(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(model, tiny_tokenizer) -> NaiveGenerator:
    return NaiveGenerator(model, tiny_tokenizer, GrammarCompiler(tiny_tokenizer, model.config.vocab_size))


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    return [tiny_tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def wanted(oracle, prompts) -> dict[str, list[Completion]]:
    return {name: [oracle.generate(prompt, params) for prompt in prompts] for name, params in WISHES.items()}


def check(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    assert got.text == want.text
    assert got.finish_reason == want.finish_reason
    torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), rtol=0, atol=1e-4)
    assert [list(best) for best in got.top_logprobs or []] == [list(best) for best in want.top_logprobs or []]


def accepted_share(engine: Engine) -> float:
    stats = engine.stats()
    assert stats.draft_tokens > 0
    return stats.accepted_draft_tokens / stats.draft_tokens


# ----------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("name", WISHES)
def test_one_answer_at_a_time(name: str, engine, prompts, wanted) -> None:
    before = engine.stats()
    for prompt, want in zip(prompts, wanted[name], strict=True):
        check(engine.generate([prompt], WISHES[name])[0], want)
    after = engine.stats()
    too_short = name in ("one token", "two tokens")  # the last token of an answer is never worth a draft
    assert (after.draft_tokens > before.draft_tokens) != too_short
    assert after.num_free_blocks == before.num_free_blocks == after.num_blocks


def test_all_kinds_of_wishes_at_once(engine, prompts, wanted) -> None:
    """Rows with and without penalties, biases and filters in the same steps; rows move as answers end."""
    before = engine.stats()
    pairs = [(i, name) for name in WISHES for i in range(len(prompts))]
    got = engine.generate([prompts[i] for i, _ in pairs], [WISHES[name] for _, name in pairs])
    for (i, name), one in zip(pairs, got, strict=True):
        check(one, wanted[name][i])
    after = engine.stats()
    assert after.draft_tokens > before.draft_tokens
    assert after.num_free_blocks == after.num_blocks


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_tiny_cache_with_preemption(proposer: str, open_engine, prompts, wanted) -> None:
    names = ["greedy", "temperature", "min-p and all penalties"]
    with open_engine(proposer, cache_tokens=160, max_seqs=6) as engine:
        pairs = [(i, name) for name in names for i in range(len(prompts))]
        got = engine.generate([prompts[i] for i, _ in pairs], [WISHES[name] for _, name in pairs])
        for (i, name), one in zip(pairs, got, strict=True):
            check(one, wanted[name][i])
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.draft_tokens > 0
        assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("draft_tokens", [1, 3, 15])
def test_prompts_read_in_chunks_beside_drafts(proposer: str, draft_tokens: int, open_engine, oracle, prompts) -> None:
    """A long prompt arrives in pieces while another answer is being written, with blocks smaller than a draft."""
    params = dataclasses.replace(GREEDY, repetition_penalty=1.05, max_tokens=40)
    long_prompts = [prompts[0] * 5, prompts[2] * 4]
    with open_engine(
        proposer, max_step_tokens=7, max_seqs=3, draft_tokens=draft_tokens, block_size=2, prefix_caching=False
    ) as engine:
        stream = engine.stream(prompts[1], params)
        first = [next(stream), next(stream)]
        for got, prompt in zip(engine.generate(long_prompts, params), long_prompts, strict=True):
            check(got, oracle.generate(prompt, params))
        pieces = first + list(stream)
        check(pieces[-1].completion, oracle.generate(prompts[1], params))
        assert "".join(piece.text for piece in pieces) == pieces[-1].completion.text
        assert engine.stats().draft_tokens > 0


def test_answers_up_to_the_end_of_the_context(open_engine, oracle, prompts) -> None:
    for proposer in PROPOSERS:
        with open_engine(proposer, max_len=33, draft_tokens=15, block_size=16) as engine:
            for prompt in prompts:
                want = oracle.generate(prompt, dataclasses.replace(GREEDY, max_tokens=33 - len(prompt)))
                check(engine.generate([prompt], GREEDY)[0], want)


def test_stop_strings_inside_an_accepted_run(engine, oracle, prompts, wanted) -> None:
    """What was accepted behind the stop string is dropped, also from the stream."""
    for prompt, plain in zip(prompts, wanted["greedy"], strict=True):
        for at in range(10, 30, 3):
            stop = plain.text[at : at + 2]
            params = dataclasses.replace(GREEDY, stop=[stop])
            want = oracle.generate(prompt, params)
            check(engine.generate([prompt], params)[0], want)
            pieces = list(engine.stream(prompt, params))
            assert "".join(piece.text for piece in pieces) == want.text
            assert [token for piece in pieces for token in piece.token_ids] == want.token_ids
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_an_end_token_inside_an_accepted_run(engine, oracle, prompts, wanted) -> None:
    for prompt, plain in zip(prompts, wanted["greedy"], strict=True):
        for place in (11, 12, 13, 14):
            params = dataclasses.replace(GREEDY, stop_token_ids=[plain.token_ids[place]])
            check(engine.generate([prompt], params)[0], oracle.generate(prompt, params))


def test_prompt_logprobs_and_unknown_ids(engine, oracle, model, prompts) -> None:
    """Rows of the model without a token may stand in a prompt, even those that a draft model does not have."""
    without = model.config.vocab_size - 1
    prompt = [*prompts[1], without, 7, without, 7, without]
    params = dataclasses.replace(GREEDY, prompt_logprobs=True, repetition_penalty=1.05)
    got, want = engine.generate([prompt], params)[0], oracle.generate(prompt, params)
    check(got, want)
    torch.testing.assert_close(
        torch.tensor(got.prompt_logprobs[1:]), torch.tensor(want.prompt_logprobs[1:]), rtol=0, atol=1e-4
    )


def test_giving_up_in_the_middle(engine, prompts, wanted) -> None:
    for wish in ("greedy", "min-p and all penalties"):
        stream = engine.stream(prompts[1], WISHES[wish])
        next(stream)
        stream.close()
        check(engine.generate([prompts[1]], WISHES[wish])[0], wanted[wish][1])
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_held_to_a_grammar(temperature: float, engine, oracle, prompts) -> None:
    """An n-gram index proposes what the grammar allows; a draft model proposes nothing for such answers."""
    schema = {"type": "array", "items": {"enum": ["alpha", "beta"]}, "minItems": 4, "maxItems": 8}
    params = SamplingParams(
        temperature=temperature, seed=2, max_tokens=70, min_tokens=20, top_logprobs=1,
        grammar=Grammar(kind="json_schema", value=json.dumps(schema)),
    )  # fmt: skip
    before = engine.stats()
    for prompt in prompts:
        got = engine.generate([prompt], params)[0]
        check(got, oracle.generate(prompt, params))
        assert got.finish_reason == "length" or 4 <= len(json.loads(got.text)) <= 8
    after = engine.stats()
    if engine.config.speculate == "ngram":
        assert after.accepted_draft_tokens > before.accepted_draft_tokens
    else:
        assert after.draft_tokens == before.draft_tokens
    others = [dataclasses.replace(GREEDY, max_tokens=30), params]
    for got, one in zip(engine.generate([prompts[1]] * 2, others), others, strict=True):
        check(got, oracle.generate(prompts[1], one))


# --------------------------------------------------------------------------------------------------------- the caches
@pytest.mark.parametrize("name", ["greedy", "greedy with Qwen's penalty", "temperature", "min-p and all penalties"])
def test_a_draft_model_with_the_same_weights_is_always_right(name: str, open_engine, prompts, wanted) -> None:
    """Its draws use the same noise, its counts follow its own drafts, and its cache misses nothing."""
    with open_engine("same") as engine:
        for prompt, want in zip(prompts, wanted[name], strict=True):
            check(engine.generate([prompt], WISHES[name])[0], want)
        assert accepted_share(engine) == 1
        # All but the first token of each answer come from steps of one draw and up to 4 drafts: 59 = 11 * 5 + 4.
        assert engine.stats().draft_tokens == len(prompts) * (11 * 4 + 3)


def test_the_draft_models_cache_follows_everything(open_engine, oracle, prompts) -> None:
    """Same weights: one wrong key in the draft model's cache would show as a rejected draft.

    Prompts in chunks; answers written while too many run to speculate; then a second turn whose beginning, the
    answers included, comes from the prefix cache.
    """
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=24, ignore_eos=True)
    with open_engine("same", speculate_max_seqs=1, max_step_tokens=9, max_seqs=4) as engine:
        both = [prompts[0] * 3, prompts[2] * 2]
        unequal = [params, dataclasses.replace(params, max_tokens=50)]  # the second one goes on alone
        first = engine.generate(both, unequal)
        assert engine.stats().draft_tokens > 0
        turns = [[*prompt, *answer.token_ids, 7, 8] for prompt, answer in zip(both, first, strict=True)]
        for turn in turns:
            got = engine.generate([turn], params)[0]
            check(got, oracle.generate(turn, params))
            assert got.num_cached_tokens > 0
        assert engine.generate([turns[1]], params)[0].num_cached_tokens > len(both[1])
        assert accepted_share(engine) == 1


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_named_blocks_hold_what_their_name_says(proposer: str, open_engine, prompts) -> None:
    """Keys in both caches under the names of answers' blocks are those of a plain pass: no rejected draft is left."""
    with open_engine(proposer, draft_tokens=6) as engine:
        answers = engine.generate(prompts, WISHES["temperature"])
        assert (accepted_share(engine) < 1) == (proposer != "same")
        core, size = engine._core, engine.config.block_size
        caches = [(engine.model, core.runner.caches)]
        if core.runner.draft is not None:
            caches.append((core.runner.draft.model, core.runner.draft.caches))
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = [*prompt, *answer.token_ids]
            blocks = core.pool.match(prefix_hashes(tokens, size))
            # While drafts pause, the draft model's cache stays behind.
            known = len(tokens) - 3 if proposer in ("ngram", "same") else len(prompt)
            assert len(blocks) >= known // size
            for model, layers in caches:
                plain = SequenceCache(model, len(tokens))
                with torch.inference_mode():
                    plain.append(model, tokens)
                for (keys, _), (want, _) in zip(layers, plain.layers, strict=True):
                    got = keys[blocks].flatten(0, 1)
                    torch.testing.assert_close(got, want[0, : len(got)], rtol=1e-4, atol=1e-4)
            core.pool.release(blocks)


# -------------------------------------------------------------------------------------------------------- acceptance
def test_a_repetitive_answer_is_mostly_guessed(open_engine, prompts, oracle) -> None:
    """A negative penalty makes what was said once likelier and likelier; the n-gram index must find it."""
    params = dataclasses.replace(GREEDY, max_tokens=100, frequency_penalty=-1.0)
    with open_engine("ngram") as engine:
        check(engine.generate([prompts[0]], params)[0], oracle.generate(prompts[0], params))
        assert accepted_share(engine) > 0.8


def test_bad_drafts_become_few(open_engine, prompts) -> None:
    with open_engine("other") as engine:
        engine.generate([prompts[0]], dataclasses.replace(GREEDY, max_tokens=200))
        assert accepted_share(engine) < 0.5
        assert engine.stats().draft_tokens < 100  # of some 800 without adapting


def test_no_drafts_while_many_run(open_engine, prompts) -> None:
    with open_engine("same", speculate_max_seqs=2) as engine:
        engine.generate(prompts[:3], GREEDY)  # of equal length, so they end together
        assert engine.stats().draft_tokens == 0
        engine.generate(prompts[:2], GREEDY)
        assert engine.stats().draft_tokens == 2 * 47


def test_length_and_pauses_follow_success() -> None:
    drafting = Drafting(8, None)
    drafting.learn(8, 2, 10, 8)
    assert drafting.length == 3
    drafting.learn(3, 3, 14, 8)
    assert drafting.length == 6
    drafting.learn(6, 6, 21, 8)
    assert (drafting.length, drafting.resume_at) == (8, 0)
    for _ in range(2):
        drafting.learn(drafting.length, 0, 30, 8)
    assert drafting.length == 1
    assert drafting.resume_at == 34
    for _ in range(9):
        drafting.learn(1, 0, 100, 8)
    assert drafting.resume_at == 100 + LONGEST_PAUSE
    drafting.learn(1, 1, 200, 8)
    assert (drafting.length, drafting.num_misses) == (2, 0)


def test_the_distribution_is_unchanged(open_engine, model, prompts) -> None:
    """Third and fourth token over 1,500 seeds against their exact probabilities, chi-square (seeds are fixed)."""
    params = SamplingParams(temperature=1.0, top_k=3, repetition_penalty=1.2, max_tokens=4, ignore_eos=True)
    prompt, num = prompts[1], 1500
    with open_engine("near", draft_tokens=3) as engine:
        each = [dataclasses.replace(params, seed=seed) for seed in range(num)]
        answers = engine.generate([prompt] * num, each)
        assert engine.stats().draft_tokens > 1000
        assert 0.1 < accepted_share(engine) < 0.9
    exact: Counter[tuple[int, ...]] = Counter({(): 1.0})  # pyright: ignore[reportAssignmentType]
    for _ in range(4):
        longer: Counter[tuple[int, ...]] = Counter()
        for path, share in exact.items():
            logits_V = model.logits(torch.tensor([[*prompt, *path]]))[0, -1, : engine.tokenizer.vocab_size]
            probs_V = filtered_probabilities(penalised(logits_V, prompt, path, params), params)
            for token in probs_V.nonzero()[:, 0].tolist():
                longer[(*path, token)] = share * float(probs_V[token])
        exact = longer
    for place in (2, 3):
        expected: Counter[int] = Counter()
        for path, share in exact.items():
            expected[path[place]] += share * num  # pyright: ignore[reportArgumentType]
        seen = Counter(answer.token_ids[place] for answer in answers)
        assert set(seen) <= set(expected)
        common = [token for token, count in expected.items() if count >= 5]
        rare_expected, rare_seen = num - sum(expected[t] for t in common), num - sum(seen[t] for t in common)
        statistic = sum((seen[t] - expected[t]) ** 2 / expected[t] for t in common)
        statistic += (rare_seen - rare_expected) ** 2 / max(rare_expected, 1.0)
        freedom = len(common)
        assert freedom >= 3
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


# --------------------------------------------------------------------------------------------------------- the index
SMALL = st.lists(st.integers(0, 3), max_size=30)


@settings(max_examples=300, deadline=None)
@given(SMALL.filter(bool), SMALL, st.integers(1, 6), st.integers(1, 3))
def test_the_index_finds_the_latest_earlier_occurrence(
    prompt: list[int], answer: list[int], count: int, shortest: int
) -> None:
    """Against the definition, after each token; small numbers and the largest ids alike."""
    for scale in (1, 2**19 + 1):
        index = NgramIndex([scale * token for token in prompt])
        for length in range(len(answer) + 1):
            index.extend([scale * token for token in answer[:length]])
            text = prompt + answer[:length]
            assert index.propose(count, shortest) == [scale * token for token in continuation(text, count, shortest)]


def continuation(text: list[int], count: int, shortest: int) -> list[int]:
    for size in range(min(LONGEST_MATCH, len(text) - 1), shortest - 1, -1):
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[-size:]:
                extended = list(text)
                for place in range(count):
                    extended.append(extended[at + place])
                return extended[len(text) :]
    return []


# ------------------------------------------------------------------------------------------------------------ errors
def test_settings_that_cannot_be(model, tiny_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs draft_model"):
        EngineConfig(speculate="draft")
    with pytest.raises(ValueError, match="set speculate=draft"):
        EngineConfig(speculate="ngram", draft_model="x")
    with pytest.raises(ValueError, match="deterministic"):
        EngineConfig(speculate="ngram", deterministic=True)
    with pytest.raises(ValueError, match="speculate_max_seqs is 0"):
        EngineConfig(speculate="ngram", speculate_max_seqs=0)

    def opened(path: Path) -> None:
        Engine(model, tokenizer=tiny_tokenizer, config=EngineConfig(speculate="draft", draft_model=str(path)))

    with pytest.raises(ValueError, match="nothing-there"):
        opened(tmp_path / "nothing-there")
    small = train([(Path(os.__file__).parent / "bisect.py").read_text(encoding="utf-8")], 300)
    same_size = train([(Path(os.__file__).parent / "pdb.py").read_text(encoding="utf-8")], 512)
    for number, (tokenizer, message) in enumerate(((small, "ids, the model's"), (same_size, "encodes"))):
        save_pretrained(model, tmp_path / str(number))
        tokenizer.save(tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / str(number))


# --------------------------------------------------------------------------------------------------- the real machine
@pytest.mark.gpu
@pytest.mark.parametrize("proposer", ["ngram", "same"])
def test_recorded_steps_are_those_that_were_not_recorded(
    proposer: str, make_model, tiny_config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """bf16 on a GPU, one answer at a time and several: recorded or not, answers are the same until two tokens are
    nearly as likely (recorded steps are padded, and other sizes have other kernels); equal weights nearly always agree.
    """
    config: ModelConfig = dataclasses.replace(tiny_config, hidden_size=256, intermediate_size=384)
    model: CausalLM = make_model(config, std=0.08)
    save_pretrained(model, tmp_path)
    tiny_tokenizer.save(tmp_path)
    kind = {"speculate": "ngram"} if proposer == "ngram" else {"speculate": "draft", "draft_model": str(tmp_path)}
    params = SamplingParams(temperature=0.6, repetition_penalty=1.05, seed=1, max_tokens=100, ignore_eos=True)
    prompts = [tiny_tokenizer.encode(text) * 3 for text in TEXTS]
    answers: list[list[list[int]]] = []
    for graphs in (False, True):
        settings = EngineConfig(cuda_graphs=graphs, cache_tokens=4096, max_seqs=8, **kind)  # pyright: ignore[reportArgumentType]
        with Engine(tmp_path, device="cuda", config=settings) as engine:
            got = [engine.generate([prompt], params)[0] for prompt in prompts] + engine.generate(prompts, params)
            answers.append([one.token_ids for one in got])
            if proposer == "same":
                assert accepted_share(engine) > 0.8
    shares = []
    for one, other in zip(*answers, strict=True):
        same = [a == b for a, b in zip(one, other, strict=True)]
        shares.append(same.index(False) / len(same) if False in same else 1.0)
    assert sum(shares) / len(shares) > 0.6, shares


ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
GGUF = ASSETS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason=f"no {GGUF.name} in QWENCH_ASSETS ({ASSETS})")
def test_the_real_model_repeats_code_with_one_change() -> None:
    with Engine(GGUF, device="cpu", dtype="float32", config=EngineConfig(speculate="ngram", max_len=512)) as engine:
        question = f"Repeat this code, but call the function `average`. Only the code.\n```python\n{CODE}```"
        prompt = engine.tokenizer.render([{"role": "user", "content": question}])
        params = SamplingParams(temperature=0, max_tokens=40)
        got = engine.generate([prompt], params)[0]
        want = NaiveGenerator(engine.model, engine.tokenizer).generate(prompt, params)
        assert got.token_ids == want.token_ids
        assert "def average" in got.text
        assert accepted_share(engine) > 0.3
