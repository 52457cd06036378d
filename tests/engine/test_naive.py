"""The oracle generator against transformers' generate and against its own model, on real (tiny, random) weights."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2ForCausalLM

from qwench.engine import Engine
from qwench.engine.naive import NaiveGenerator, held_back
from qwench.model.weights import save_pretrained
from qwench.ops.attention import AttnMeta
from qwench.ops.cross_entropy import token_logprobs
from qwench.types import Chunk, Completion, Generator, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = "def bisect(a, x, lo=0):"


@pytest.fixture(scope="module")
def parrot_engine(parrot: Path) -> Engine:
    return Engine(parrot, device="cpu")


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
    chunks: list[Chunk] = list(generator.stream(prompt, params))
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert chunks[-1].completion is not None
    return [chunk.text for chunk in chunks], chunks[-1].completion


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_streamed_text_is_the_final_text(temperature: float, generator, prompt, tiny_tokenizer) -> None:
    """Random weights write broken UTF-8 most of the time; the pieces still join to what decoding at once gives."""
    for seed in range(8):
        params = given_params(temperature=temperature, seed=seed)
        texts, done = pieces(generator, prompt, params)
        assert "".join(texts) == done.text == tiny_tokenizer.decode(done.token_ids, skip_special=True)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_stop_strings(parrot_engine, dialogues, data) -> None:
    """Any piece of the answer as a stop string, inside tokens and across their borders, two of them at once."""
    question, answer = data.draw(st.sampled_from(dialogues))
    tokenizer = parrot_engine.tokenizer
    ids = tokenizer.render([{"role": "user", "content": question}])
    stops = []
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(answer) - 1))
        stops.append(answer[start : start + data.draw(st.integers(1, 9))])
    texts, done = pieces(parrot_engine.generator, ids, SamplingParams(temperature=0, stop=stops))
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


def test_unicode_comes_whole(parrot_engine: Engine, dialogues) -> None:
    """A character of several tokens appears in one piece."""
    engine = parrot_engine
    question, answer = dialogues[1]
    ids = engine.tokenizer.render([{"role": "user", "content": question}])
    chunks = list(engine.stream(ids, SamplingParams(temperature=0)))
    assert "".join(chunk.text for chunk in chunks) == answer
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.finish_reason == "stop"
    assert chunks[-1].completion.token_ids[-1] == engine.tokenizer.im_end_id
    assert all("\N{REPLACEMENT CHARACTER}" not in chunk.text for chunk in chunks)
    assert len(chunks[-1].completion.token_ids) > 2 * len(answer), "the answer must need several tokens a character"


def test_stop_after_characters_of_several_tokens(parrot_engine: Engine, dialogues) -> None:
    engine = parrot_engine
    ids = engine.tokenizer.render([{"role": "user", "content": dialogues[1][0]}])
    done = engine.generate([ids], SamplingParams(temperature=0, stop=["話し"]))[0]
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
    assert isinstance(engine.generator, Generator)
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
