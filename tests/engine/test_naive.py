"""The oracle generator against transformers' generate and against its own model, on real (tiny, random) weights."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2ForCausalLM

from qwench.engine import Engine
from qwench.engine.grammar import GrammarCompiler
from qwench.engine.naive import NaiveGenerator, held_back
from qwench.engine.sampling import draw, filtered_probabilities, penalised
from qwench.model.checkpoint import locate
from qwench.model.load import load_model
from qwench.model.weights import save_pretrained
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import token_logprobs
from qwench.tokenizer import Tokenizer
from qwench.types import Chunk, Completion, Generator, Grammar, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = "def bisect(a, x, lo=0):"


@pytest.fixture(scope="module")
def parrot_generator(parrot: Path) -> NaiveGenerator:
    return NaiveGenerator(load_model(locate(parrot), device="cpu", dtype="float32"), Tokenizer.load(locate(parrot)))


def given_params(**changes: object) -> SamplingParams:
    return dataclasses.replace(GREEDY, **changes)


@pytest.fixture(scope="module")
def generator(tiny_model, tiny_tokenizer) -> NaiveGenerator:
    return NaiveGenerator(tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer) -> list[int]:
    return tiny_tokenizer.encode(PROMPT)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_is_that_of_transformers(penalty: float, generator, prompt, tmp_path: Path) -> None:
    save_pretrained(generator.model, tmp_path / "model")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for ids in (prompt, [5], prompt * 3):
        out = theirs.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=40, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        got = generator.generate(ids, given_params(repetition_penalty=penalty))
        assert got.token_ids == out[0, len(ids) :].tolist()
        assert got.finish_reason == "length"


def test_logprobs_are_those_of_a_full_pass(generator, prompt) -> None:
    """Of the model's own distribution over all its rows, whatever the sampling did; the trainer's op agrees."""
    params = SamplingParams(temperature=1.7, top_k=30, repetition_penalty=1.5, max_tokens=30, seed=3, ignore_eos=True)
    done = generator.generate(prompt, params)
    ids = torch.tensor([prompt + done.token_ids])
    logits = generator.model.logits(ids)[0, len(prompt) - 1 : -1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, rtol=0, atol=1e-4)
    with torch.no_grad():
        hidden = generator.model(ids[0, :-1], torch.arange(ids.shape[1] - 1), AttnMeta.packed([ids.shape[1] - 1]))
    trained = token_logprobs(hidden, generator.model.lm_head.weight, ids[0, 1:])[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(done.logprobs), trained, rtol=0, atol=1e-4)


def test_rows_without_a_token(make_model, tiny_config, tiny_tokenizer, prompt) -> None:
    """They are never drawn even when they are the most likely, but they take part in the log-probabilities."""
    model = make_model(dataclasses.replace(tiny_config, vocab_size=640, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[512:] *= 5
    generator = NaiveGenerator(model, tiny_tokenizer)
    for temperature in (0.0, 2.0):
        done = generator.generate(prompt, given_params(temperature=temperature, seed=1))
        assert max(done.token_ids) < 512
    ids = [*prompt, 600, *done.token_ids]
    logits = model.logits(torch.tensor([[*prompt, *done.token_ids]]))[0, len(prompt) - 1 : -1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, rtol=0, atol=2e-4)
    assert len(generator.generate(ids, given_params(repetition_penalty=1.2, max_tokens=3)).token_ids) == 3


def test_seeds(generator, prompt) -> None:
    def run(seed: int | None) -> list[int]:
        return generator.generate(prompt, given_params(temperature=1.0, seed=seed)).token_ids

    torch.manual_seed(7)
    first = run(3)
    state = torch.get_rng_state()
    assert run(3) == first, "the same seed must give the same answer"
    assert run(4) != first
    assert run(None) != run(None), "without a seed every answer is new"
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is not the sampler's business"


def test_greedy_needs_no_seed(generator, prompt) -> None:
    assert generator.generate(prompt, GREEDY) == generator.generate(prompt, GREEDY)


@pytest.mark.parametrize("max_tokens", [1, 2, 300])
def test_max_tokens_and_growth(max_tokens: int, generator, prompt) -> None:
    """300 is more than the cache holds at first: what is decoded after it grew is what a full pass gives."""
    done = generator.generate(prompt, given_params(max_tokens=max_tokens))
    assert len(done.token_ids) == len(done.logprobs) == max_tokens
    assert done.finish_reason == "length"
    logits = generator.model.logits(torch.tensor([prompt + done.token_ids]))[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == done.token_ids


def test_end_tokens(generator, prompt, tiny_tokenizer, make_model, tiny_config) -> None:
    free = generator.generate(prompt, GREEDY)
    place = next(i for i, token in enumerate(free.token_ids) if i > 3 and token not in free.token_ids[:i])
    stop = free.token_ids[place]
    done = generator.generate(prompt, given_params(stop_token_ids=[stop]))
    assert done.token_ids == free.token_ids[: place + 1]
    assert done.finish_reason == "stop"
    assert done.text == tiny_tokenizer.decode(free.token_ids[:place], skip_special=True)
    # The model's own end token counts unless ignore_eos; the tokenizer's count as well.
    config = dataclasses.replace(tiny_config, eos_token_id=(stop, 3))
    model = make_model(config)
    ended = NaiveGenerator(model, tiny_tokenizer).generate(prompt, given_params(ignore_eos=False))
    assert ended.token_ids == free.token_ids[: place + 1]
    assert NaiveGenerator(model, tiny_tokenizer).generate(prompt, GREEDY).token_ids == free.token_ids


def test_end_token_at_once(make_model, tiny_config, tiny_tokenizer, prompt) -> None:
    first = NaiveGenerator(make_model(tiny_config), tiny_tokenizer).generate(prompt, given_params(max_tokens=1))
    done = NaiveGenerator(make_model(tiny_config), tiny_tokenizer).generate(
        prompt, given_params(max_tokens=1, stop_token_ids=first.token_ids)
    )
    assert (done.text, done.token_ids, done.finish_reason) == ("", first.token_ids, "stop")


def pieces(generator: NaiveGenerator, prompt: list[int], params: SamplingParams) -> tuple[list[str], Completion]:
    """The pieces of text and the completion; whatever the answer, its chunks are one for each token and join to it."""
    chunks: list[Chunk] = list(generator.stream(prompt, params))
    assert all(chunk.completion is None for chunk in chunks[:-1])
    done = chunks[-1].completion
    assert done is not None
    assert [list(chunk.token_ids) for chunk in chunks] == [[token] for token in done.token_ids]
    assert [list(chunk.logprobs) for chunk in chunks] == [[logprob] for logprob in done.logprobs]
    joined = [top for chunk in chunks for top in chunk.top_logprobs]
    assert joined == (done.top_logprobs or [])
    return [chunk.text for chunk in chunks], done


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_streamed_text_is_the_final_text(temperature: float, generator, prompt, tiny_tokenizer) -> None:
    """Random weights write broken UTF-8 most of the time; the pieces still join to what decoding at once gives."""
    for seed in range(8):
        params = given_params(temperature=temperature, seed=seed)
        texts, done = pieces(generator, prompt, params)
        assert "".join(texts) == done.text == tiny_tokenizer.decode(done.token_ids, skip_special=True)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_stop_strings(parrot_generator, dialogues, data) -> None:
    """Any piece of the answer as a stop string, inside tokens and across their borders, two of them at once."""
    question, answer = data.draw(st.sampled_from(dialogues))
    tokenizer = parrot_generator.tokenizer
    ids = tokenizer.render([{"role": "user", "content": question}])
    stops = []
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(answer) - 1))
        stops.append(answer[start : start + data.draw(st.integers(1, 9))])
    texts, done = pieces(parrot_generator, ids, SamplingParams(temperature=0, stop=stops))
    assert "".join(texts) == done.text
    assert done.finish_reason == "stop"
    assert any(answer.startswith(done.text + stop) for stop in stops)
    assert not any(stop in done.text for stop in stops)
    before = tokenizer.decode(done.token_ids[:-1], skip_special=True)
    assert not any(stop in before for stop in stops), "it must end with the token that completes a stop string"


def test_stop_that_never_comes(generator, prompt) -> None:
    """What was held back is given out at the end."""
    free = generator.generate(prompt, GREEDY)
    texts, done = pieces(generator, prompt, given_params(stop=[free.text[-6:] + "never", "never"]))
    assert "".join(texts) == done.text == free.text
    assert done.finish_reason == "length"


def test_held_back() -> None:
    assert held_back("abcEN", ["END"]) == 2
    assert held_back("abcEN", ["ENTER", "Nx"]) == 2
    assert held_back("aab", ["aabaac"]) == 3
    assert held_back("END", ["END"]) == 0
    assert held_back("", ["x"]) == held_back("abc", []) == 0


def test_unicode_comes_whole(parrot_generator: NaiveGenerator, dialogues) -> None:
    """A character of several tokens appears in one piece."""
    engine = parrot_generator
    question, answer = dialogues[1]
    ids = engine.tokenizer.render([{"role": "user", "content": question}])
    chunks = list(engine.stream(ids, SamplingParams(temperature=0)))
    assert "".join(chunk.text for chunk in chunks) == answer
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.finish_reason == "stop"
    assert chunks[-1].completion.token_ids[-1] == engine.tokenizer.im_end_id
    assert all("\N{REPLACEMENT CHARACTER}" not in chunk.text for chunk in chunks)
    assert len(chunks[-1].completion.token_ids) > 2 * len(answer), "the answer must need several tokens a character"


def test_stop_after_characters_of_several_tokens(parrot_generator: NaiveGenerator, dialogues) -> None:
    engine = parrot_generator
    ids = engine.tokenizer.render([{"role": "user", "content": dialogues[1][0]}])
    done = engine.generate(ids, SamplingParams(temperature=0, stop=["話し"]))
    assert (done.text, done.finish_reason) == ("日本語で", "stop")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ("Hello", "the prompt is a string; give token ids"),
        ([1, 512], "token id 512 is outside the model's rows 0 to 511"),
        ([-1], "token id -1 is outside"),
    ],
)
def test_bad_prompts(ids, message: str, generator) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(ids, GREEDY)


def test_it_is_a_generator(generator) -> None:
    assert isinstance(generator, Generator)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.5, seed=7),
        SamplingParams(temperature=2, top_k=9, top_p=0.9, min_p=0.05, seed=-1),
        SamplingParams(temperature=1.5, repetition_penalty=1.2, presence_penalty=0.7, frequency_penalty=0.4, seed=3),
        SamplingParams(temperature=0, frequency_penalty=1.5, logit_bias={5: 4.0, 70: -np.inf}),
    ],
)
def test_each_token_is_the_draw_of_its_place(params: SamplingParams, generator, prompt) -> None:
    """Again from a full pass: the token at place i depends on the tokens before it, the seed and i."""
    params = dataclasses.replace(params, max_tokens=40, ignore_eos=True)
    done = generator.generate(prompt, params)
    logits = generator.model.logits(torch.tensor([prompt + done.token_ids]))[0, len(prompt) - 1 : -1]
    for i, token in enumerate(done.token_ids):
        changed = penalised(logits[i], prompt, done.token_ids[:i], params)
        assert draw(changed, params, params.seed or 0, i) == token
        assert params.temperature == 0 or filtered_probabilities(changed, params)[token] > 0
    assert len(set(done.token_ids)) > 5


def test_frequency_penalty_ends_repetition(generator, prompt) -> None:
    """Without it the tiny model repeats itself; with a large one no token comes three times."""

    def most(**changes: float) -> int:
        ids = generator.generate(prompt, given_params(max_tokens=100, **changes)).token_ids
        return max(ids.count(token) for token in ids)

    assert most() > 20
    assert most(frequency_penalty=1e4) == 1
    assert most(presence_penalty=1e4) == 1


def test_logit_bias(generator, prompt) -> None:
    assert set(generator.generate(prompt, given_params(logit_bias={77: 1e6})).token_ids) == {77}
    free = generator.generate(prompt, GREEDY).token_ids
    banned = generator.generate(prompt, given_params(logit_bias=dict.fromkeys(free, -np.inf))).token_ids
    assert not set(banned) & set(free)


def test_min_tokens_bans_end_tokens(generator, prompt, tiny_tokenizer) -> None:
    free = generator.generate(prompt, GREEDY).token_ids
    place = next(i for i, token in enumerate(free) if i > 3 and token not in free[:i])
    stop = [free[place]]
    assert len(generator.generate(prompt, given_params(stop_token_ids=stop)).token_ids) == place + 1
    same = generator.generate(prompt, given_params(stop_token_ids=stop, min_tokens=place))
    assert same.token_ids == free[: place + 1], "the ban ends with min_tokens tokens"
    later = generator.generate(prompt, given_params(stop_token_ids=stop, min_tokens=place + 1))
    assert later.token_ids[:place] == free[:place]
    assert len(later.token_ids) > place + 1
    assert stop[0] not in later.token_ids[: place + 1]
    ends = tiny_tokenizer.eos_token_ids
    likely_end = given_params(logit_bias=dict.fromkeys(ends, 1e6), ignore_eos=False)
    done = generator.generate(prompt, dataclasses.replace(likely_end, min_tokens=6))
    assert len(done.token_ids) == 7
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] in ends
    assert not set(done.token_ids[:-1]) & set(ends)
    ignored = generator.generate(prompt, dataclasses.replace(likely_end, min_tokens=6, ignore_eos=True))
    assert set(ignored.token_ids) <= set(ends), "where end tokens do not end the answer, they are not banned"


def test_min_tokens_and_stop_strings(parrot_generator, dialogues) -> None:
    """What was complete before min_tokens stays in the text; the same string ends the answer when it comes again."""
    generator = parrot_generator
    question, answer = dialogues[2]
    ids = generator.tokenizer.render([{"role": "user", "content": question}])
    assert answer.count("n") == 2
    full = generator.generate(ids, SamplingParams(temperature=0)).token_ids
    second = answer.index("n", answer.index("n") + 1)
    tokens_to = [len(generator.tokenizer.decode(full[:i])) for i in range(len(full) + 1)]
    first_done = next(i for i, length in enumerate(tokens_to) if length > answer.index("n"))
    for min_tokens, want in ((0, answer.index("n")), (first_done, answer.index("n")), (first_done + 1, second)):
        texts, done = pieces(generator, ids, SamplingParams(temperature=0, stop=["n"], min_tokens=min_tokens))
        assert done.text == "".join(texts) == answer[:want]
        assert done.finish_reason == "stop"
    _, done = pieces(generator, ids, SamplingParams(temperature=0, stop=["n"], min_tokens=len(full) - 1))
    assert done.text == answer


def test_top_logprobs(generator, prompt) -> None:
    params = given_params(temperature=2.0, seed=2, top_logprobs=5, logit_bias={9: 3.0}, max_tokens=20)
    _, done = pieces(generator, prompt, params)
    assert done.top_logprobs is not None
    logits = generator.model.logits(torch.tensor([prompt + done.token_ids]))[0, len(prompt) - 1 : -1]
    best = logits.log_softmax(-1).topk(5)
    for i, top in enumerate(done.top_logprobs):
        assert list(top) == best.indices[i].tolist()
        torch.testing.assert_close(torch.tensor(list(top.values())), best.values[i], rtol=0, atol=1e-4)
        if done.token_ids[i] in top:
            assert top[done.token_ids[i]] == done.logprobs[i]
    assert generator.generate(prompt, GREEDY).top_logprobs is None


def test_prompt_logprobs(generator, prompt) -> None:
    done = generator.generate(prompt, given_params(prompt_logprobs=True, max_tokens=2))
    assert done.prompt_logprobs is not None
    want = generator.model.logits(torch.tensor([prompt]))[0].log_softmax(-1)
    want = want[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert done.prompt_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(done.prompt_logprobs[1:]), want, rtol=0, atol=1e-4)
    assert generator.generate([5], given_params(prompt_logprobs=True, max_tokens=1)).prompt_logprobs == [None]
    assert generator.generate(prompt, GREEDY).prompt_logprobs is None


def test_the_end_of_the_context(make_model, tiny_config, tiny_tokenizer, prompt) -> None:
    length = len(prompt) + 5
    model = make_model(dataclasses.replace(tiny_config, max_position_embeddings=length))
    generator = NaiveGenerator(model, tiny_tokenizer)
    done = generator.generate(prompt, GREEDY)
    assert (len(done.token_ids), done.finish_reason) == (5, "length")
    assert len(generator.generate([1] * (length - 1), GREEDY).token_ids) == 1
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens; the context of {length} leaves no room"):
        generator.generate([1] * length, GREEDY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(n=2), r"n is 2; one call gives one answer"),
        (SamplingParams(grammar=Grammar(kind="json_object")), "no grammar compiler; make it with grammars="),
        (SamplingParams(logit_bias={512: 1.0}), "logit_bias names token 512; ids run from 0 to 511"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias names token -1"),
    ],
)
def test_requests_that_cannot_be_served(params: SamplingParams, message: str, generator, prompt) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(prompt, params)


@pytest.fixture(scope="module")
def constrained(tiny_model, tiny_tokenizer) -> NaiveGenerator:
    compiler = GrammarCompiler(tiny_tokenizer, tiny_model.config.vocab_size)
    return NaiveGenerator(tiny_model, tiny_tokenizer, compiler)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_grammar(temperature: float, ignore_eos: bool, constrained, prompt) -> None:
    """Random weights follow a regular expression, and the answer ends where it does."""
    grammar = Grammar(kind="regex", value="[a-c]{2,5}(-[0-9]{3}){2}")
    seen = set()
    for seed in range(6):
        params = SamplingParams(
            temperature=temperature, seed=seed, grammar=grammar, max_tokens=60, ignore_eos=ignore_eos
        )
        texts, done = pieces(constrained, prompt, params)
        assert "".join(texts) == done.text
        assert re.fullmatch(grammar.value, done.text)
        assert done.finish_reason == "stop"
        seen.add(done.text)
    assert len(seen) == 1 if temperature == 0 else len(seen) > 3


def test_grammar_and_other_ends(constrained, prompt) -> None:
    """Cut by max_tokens it ends there; min_tokens gives way where the grammar allows nothing but the end."""
    grammar = Grammar(kind="regex", value="[ab]{20}")
    cut = constrained.generate(prompt, SamplingParams(seed=1, grammar=grammar, max_tokens=3))
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
    done = constrained.generate(prompt, SamplingParams(seed=1, grammar=grammar, max_tokens=60, min_tokens=50))
    assert len(done.text) == 20
    assert done.finish_reason == "stop"
    free = Grammar(kind="regex", value="[ab]*")
    done = constrained.generate(
        prompt,
        SamplingParams(
            seed=1,
            grammar=free,
            max_tokens=60,
            min_tokens=25,
            logit_bias=dict.fromkeys(constrained.tokenizer.eos_token_ids, 1e6),
        ),
    )
    assert len(done.token_ids) == 26, "the bias asks for the end at once, min_tokens forbids it"
    with pytest.raises(ValueError, match="grammar"):
        constrained.generate(prompt, SamplingParams(grammar=Grammar(kind="regex", value="(")))


def test_prompts_of_other_types(generator, prompt) -> None:
    want = generator.generate(prompt, GREEDY)
    for other in (np.array(prompt, np.int32), torch.tensor(prompt), tuple(prompt)):
        assert generator.generate(other, GREEDY) == want


def test_tokenizer_too_large(make_model, tiny_config, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="the tokenizer has 512 ids but the model only 256 rows"):
        NaiveGenerator(make_model(dataclasses.replace(tiny_config, vocab_size=256)), tiny_tokenizer)


def test_engine(parrot: Path, dialogues, tiny_tokenizer_dir: Path) -> None:
    """A run, its model directory and a checkpoint all open; parameters are shared or one a prompt."""
    directories = [parrot, parrot / "model", next((parrot / "checkpoints").iterdir()) / "model"]
    for path, tokenizer in itertools.product(directories, [None, tiny_tokenizer_dir]):
        engine = Engine(path, device="cpu", tokenizer=tokenizer)
        assert engine.model.model.embed_tokens.weight.dtype == torch.float32
    prompts = [engine.tokenizer.render([{"role": "user", "content": q}]) for q, _ in dialogues]
    done = engine.generate(prompts, SamplingParams(temperature=0))
    assert [one.text for one in done] == [answer for _, answer in dialogues]
    each = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 3)]
    assert [len(one.token_ids) for one in engine.generate(prompts, each)] == [1, 2, 3]
    assert engine.generate([], SamplingParams()) == []
    with pytest.raises(ValueError, match="3 prompts but 1 sampling parameters"):
        engine.generate(prompts, each[:1])


def test_engine_dtype(parrot: Path) -> None:
    engine = Engine(parrot, device="cpu", dtype="bfloat16")
    assert engine.model.lm_head.weight.dtype == torch.bfloat16
    assert len(engine.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 40
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        Engine(parrot, device="gpu")
