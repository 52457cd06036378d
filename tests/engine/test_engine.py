"""The engine as its callers meet it: limits, errors, streams, giving up, closing, failing. Its answers are checked in
tests/invariants; asyncio in test_engine_async.py.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qwench.config import load
from qwench.engine import Engine, EngineConfig
from qwench.engine.chat import Chat
from qwench.engine.grammar import Matcher
from qwench.engine.naive import NaiveGenerator
from qwench.evals.ask import ask
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Grammar, Message, SamplingParams

CONTEXT = 96
ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
GGUF = ASSETS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
DIGITS = Grammar(kind="regex", value="[0-9]{12}")


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **changes})


ENDLESS = params(max_tokens=10_000)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., CausalLM], tiny_config: ModelConfig) -> CausalLM:
    return make_model(dataclasses.replace(tiny_config, max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def long_model(make_model: Callable[..., CausalLM], tiny_config: ModelConfig) -> CausalLM:
    return make_model(tiny_config)


@pytest.fixture(scope="module")
def open_engine(model: CausalLM, tiny_tokenizer: Tokenizer) -> Callable[..., Engine]:
    def make(*, model: CausalLM = model, **settings: Any) -> Engine:
        return Engine(model, tokenizer=tiny_tokenizer, config=EngineConfig(**settings))

    return make


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer: Tokenizer) -> list[int]:
    return tiny_tokenizer.encode("def bisect(a, x, lo=0):")


@pytest.fixture(scope="module")
def naive(model: CausalLM, tiny_tokenizer: Tokenizer) -> NaiveGenerator:
    return NaiveGenerator(model, tiny_tokenizer)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)


def assert_idle(engine: Engine) -> None:
    """In a moment nothing is in use any more: what is given up is freed after the step that is being computed."""
    wait_until(lambda: not engine._core.has_work and not engine._loop.num_arriving)
    stats, core = engine.stats(), engine._core
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert not any(core.pool._owners)
    assert sorted(core.scheduler.free_slots) == list(range(core.scheduler.max_seqs))


# ------------------------------------------------------------------------------------------------- limits and errors
@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ("Hello", {}, "the prompt is a string; give token ids"),
        (b"Hello", {}, "the prompt is a string; give token ids"),
        ([1, 2.5], {}, "the prompt has something that is no token id"),
        ([1, None], {}, "the prompt has something that is no token id"),
        ([2**80], {}, "the prompt has something that is no token id"),
        ([1, 512], {}, "token id 512 is outside the model's rows 0 to 511"),
        ([-1], {}, "token id -1 is outside"),
        ([1] * CONTEXT, {}, r"has 96 tokens, but the context \(max_len\) holds 95 and one of the answer; shorten"),
        ([1], {"logit_bias": {512: 1.0}}, "logit_bias names token 512; ids run from 0 to 511"),
        ([1], {"logit_bias": {1: math.nan}}, "logit_bias has the value nan; give a finite number"),
        ([1], {"logit_bias": {1: math.inf}}, "logit_bias has the value inf"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids has -1; ids run from 0 to 511"),
        ([1], {"grammar": Grammar(kind="regex", value="(")}, "grammar"),
    ],
)
def test_what_cannot_be_served(ids, changes: dict[str, Any], message: str, open_engine) -> None:
    """Refused before anything is computed, in every way to ask."""
    with open_engine() as engine:
        wishes = params(**changes)
        with pytest.raises(ValueError, match=message):
            engine.generate([[1, 2], ids], wishes)
        with pytest.raises(ValueError, match=message):
            engine.stream(ids, wishes)
        if "grammar" not in changes:
            with pytest.raises(ValueError, match=message):
                engine.validate(ids, wishes)
        assert engine.stats().prompt_tokens == 0


def test_a_stream_has_one_answer(open_engine, prompt) -> None:
    with open_engine() as engine, pytest.raises(ValueError, match="n is 2; a stream carries one answer"):
        engine.stream(prompt, params(n=2))


def test_numbers_of_params(open_engine, prompt) -> None:
    with open_engine() as engine:
        assert engine.generate([], params()) == []
        done = engine.generate([prompt] * 3, [params(max_tokens=n) for n in (1, 2, 3)])
        assert [len(one.token_ids) for one in done] == [1, 2, 3]
        with pytest.raises(ValueError, match="2 prompts but 1 sampling parameters; give one, or one a prompt"):
            engine.generate([prompt] * 2, [params()])


def test_the_answer_ends_with_the_room(open_engine, naive, prompt) -> None:
    """The context, max_len, or the cache cut max_tokens, whichever is smallest."""
    free = naive.generate(prompt, ENDLESS)
    for settings, room in (
        ({}, CONTEXT),
        ({"max_len": 40}, 40),
        ({"cache_tokens": 48, "block_size": 16}, 48),
        ({"block_size": 64}, 96),
    ):
        with open_engine(**settings) as engine:
            assert engine.max_len == settings.get("max_len", CONTEXT)
            done = engine.generate([prompt], ENDLESS)[0]
            assert done.token_ids == free.token_ids[: room - len(prompt)]
            assert done.finish_reason == "length"
            assert len(engine.generate([[1] * (room - 1)], ENDLESS)[0].token_ids) == 1
            name = "cache_tokens" if "cache_tokens" in settings else "max_len"
            with pytest.raises(ValueError, match=rf"has {room} tokens, but the c\w+ \({name}\) holds {room - 1} and"):
                engine.generate([[1] * room], params())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["memory_fraction=0"], r"memory_fraction is 0.0; give a number in \(0, 1\]"),
        (["block_size=0"], "block_size is 0; give at least 1"),
        (["max_seqs=0"], "max_seqs is 0; give at least 1"),
        (["cache_tokens=0"], "cache_tokens is 0; give at least 1"),
        (["decode_steps=65"], "decode_steps is 65; give at most 64"),
        (["max_seqs=8", "max_step_tokens=7"], r"max_step_tokens is 7, but 8 sequences \(max_seqs\) need a token each"),
        (["idle_step_tokens=0"], "idle_step_tokens is 0; give at least 1"),
        (["speculate=draft"], "speculate=draft needs draft_model"),
        (["draft_tokens=16"], "draft_tokens is 16; give 1 to 15"),
    ],
)
def test_bad_settings(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(EngineConfig, settings)


def test_settings_against_the_model(open_engine) -> None:
    with pytest.raises(ValueError, match="max_len is 97, but the model's context has 96 tokens"):
        open_engine(max_len=97)
    with pytest.raises(ValueError, match=r"idle_step_tokens is 6, less than max_step_tokens \(1024\)"):
        open_engine(idle_step_tokens=6)
    with pytest.raises(ValueError, match="deterministic=true needs the GPU"):
        open_engine(deterministic=True)


def test_decided_settings(open_engine) -> None:
    """What is left open becomes a number, and all numbers fit together."""
    for given, want in (
        ({}, (CONTEXT, 16, 1024)),
        ({"max_step_tokens": 5}, (CONTEXT, 5, 5)),
        ({"max_seqs": 2000, "max_len": 7}, (7, 2000, 2000)),
    ):
        config = open_engine(**given).config
        assert (config.max_len, config.max_seqs, config.max_step_tokens) == want
        assert config.decode_steps == 1
        assert config.idle_step_tokens == config.max_step_tokens


def test_tokenizer_and_model(model, make_model, tiny_config, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"needs its tokenizer: Engine\(model, tokenizer=...\)"):
        Engine(model)
    with pytest.raises(ValueError, match="the tokenizer has 512 ids but the model only 256 rows"):
        Engine(make_model(dataclasses.replace(tiny_config, vocab_size=256)), tokenizer=tiny_tokenizer)


def test_a_cpu_cache_takes_memory_only_as_it_fills(open_engine, long_model, prompt) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    with open_engine(model=long_model, cache_tokens=4_000_000, max_len=4096) as engine:
        keys, _ = engine._core.runner.caches[0]
        assert keys.untyped_storage().nbytes() > 900 * 2**20
        assert len(engine.generate([prompt], params())[0].token_ids) == 20
        assert resident_bytes() - before < 300 * 2**20


# ----------------------------------------------------------------------------------------------------------- streams
def test_a_stream_is_the_answer(open_engine, prompt) -> None:
    wishes = params(temperature=1.0, seed=3, top_logprobs=2, stop=["zzz"])
    for settings in ({}, {"decode_steps": 7}, {"max_step_tokens": 4}):
        with open_engine(**settings) as engine:
            want = engine.generate([prompt], wishes)[0]
            chunks = list(engine.stream(prompt, wishes))
            assert all(chunk.completion is None for chunk in chunks[:-1])
            done = chunks[-1].completion
            assert done is not None
            assert dataclasses.replace(done, num_cached_tokens=0) == dataclasses.replace(want, num_cached_tokens=0)
            assert "".join(chunk.text for chunk in chunks) == want.text
            assert [token for chunk in chunks for token in chunk.token_ids] == want.token_ids
            assert [value for chunk in chunks for value in chunk.logprobs] == want.logprobs
            assert [top for chunk in chunks for top in chunk.top_logprobs] == want.top_logprobs
            assert all(chunk.token_ids for chunk in chunks)
            assert_idle(engine)


def test_streams_run_together(open_engine, prompt, naive) -> None:
    """Streams that are read in turn are computed in one batch, each with its own answer."""
    with open_engine(max_seqs=3) as engine:
        streams = [engine.stream(prompt[:length], params()) for length in (3, 5, 7, 9)]
        for length, stream in zip((3, 5, 7, 9), streams, strict=True):
            done = list(stream)[-1].completion
            assert done is not None
            assert done.token_ids == naive.generate(prompt[:length], params()).token_ids
        assert_idle(engine)


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_closing_a_stream_early(num_read: int, open_engine, long_model, prompt) -> None:
    """Also one of which nothing was read, and one that is forgotten rather than closed."""
    with open_engine(model=long_model, max_seqs=2, cache_tokens=20_000) as engine:
        for way in ("close", "forget"):
            stream = engine.stream(prompt, ENDLESS)
            for _ in range(num_read):
                assert next(stream).completion is None
            if way == "close":
                stream.close()
            else:
                del stream
            assert_idle(engine)
        assert engine.stats().generated_tokens < 10_000


@pytest.mark.parametrize("num_steps", range(9))
@pytest.mark.parametrize("ahead", [False, True])
def test_giving_up_at_every_point(num_steps: int, ahead: bool, open_engine, naive, prompt) -> None:
    """While it waits, is read in chunks, or decodes: the others' answers stay right, and all blocks come back."""
    want = naive.generate(prompt, params())
    with open_engine(max_seqs=2, max_step_tokens=4, block_size=4, decode_steps=3) as engine:
        core = engine._core
        core.overlap = ahead
        sequences = [engine._sequence(prompt, params()) for _ in range(4)]
        for sequence in sequences:
            core.add(sequence)
        for _ in range(num_steps):
            core.step()
        for sequence in (sequences[0], sequences[2]):
            core.abort(sequence)
            core.abort(sequence)
        while core.has_work:
            core.step()
        reasons = [sequence.answer.finish for sequence in sequences]
        assert reasons == ["abort", "length", "abort", "length"]
        for sequence in sequences:
            assert sequence.answer.token_ids == want.token_ids[: len(sequence.answer.token_ids)]
        assert_idle(engine)
        assert engine.generate([prompt], params(max_tokens=1))[0].token_ids == want.token_ids[:1]
        assert int(core.runner.rows.live.sum()) <= 1, "rows of those that have left are not live"


def test_progress(open_engine, prompt) -> None:
    with open_engine() as engine:
        steps: list[int] = []
        engine.generate([prompt] * 5, params(n=2), steps.append)
        assert steps == [1] * 10

        def fail(number: int) -> None:
            raise LookupError("the bar is broken")

        with pytest.raises(LookupError, match="the bar is broken"):
            engine.generate([prompt] * 5, [params(max_tokens=n) for n in (1, 70, 70, 70, 70)], fail)
        assert_idle(engine)
        assert len(engine.generate([prompt], params())[0].token_ids) == 20


def test_ctrl_c_in_a_chat_frees_the_cache(parrot: Path, dialogues) -> None:
    class Interrupting(io.StringIO):
        num_writes = 0

        def write(self, text: str) -> int:
            self.num_writes += 1
            if self.num_writes == 3:
                raise KeyboardInterrupt
            return super().write(text)

    with Engine(parrot, device="cpu") as engine:
        chat = Chat(engine, SamplingParams(temperature=0, max_tokens=20_000, ignore_eos=True), None, Interrupting())
        part = chat.ask(dialogues[0][0])
        assert dialogues[0][1].startswith(part)
        assert_idle(engine)


def test_questions_of_the_evaluations(parrot: Path, dialogues) -> None:
    """`evals.ask` takes an engine as it is, and keeps the order."""
    with Engine(parrot, device="cpu", config=EngineConfig(max_seqs=2)) as engine:
        conversations = [[Message(role="user", content=question)] for question, _ in dialogues]
        answers = ask(engine, engine.tokenizer, conversations, SamplingParams(temperature=0))
        assert [(one.question, one.completion.text) for one in answers] == dialogues


# --------------------------------------------------------------------------------------------------- end and failure
def test_close(open_engine, long_model, prompt) -> None:
    """Who waits is told so; what comes later is refused; closing again does no harm."""
    engine = open_engine(model=long_model, cache_tokens=20_000)
    stream = engine.stream(prompt, ENDLESS)
    next(stream)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(engine.generate, [prompt] * 2, ENDLESS) for _ in range(3)]
        wait_until(lambda: engine.stats().num_running == 7)
        engine.close()
        for one in waiting:
            with pytest.raises(RuntimeError, match="the engine was closed before the answer was complete"):
                one.result(timeout=60)
    with pytest.raises(RuntimeError, match="the engine was closed"):
        list(stream)
    engine.close()
    assert engine.failure is None
    assert_idle(engine)
    assert engine._core.runner.caches == [], "the cache's memory is free again"
    for request in (lambda: engine.generate([prompt], params()), lambda: engine.stream(prompt, params())):
        with pytest.raises(RuntimeError, match="the engine is closed; start a new one"):
            request()


def test_close_while_requests_come_in(open_engine, long_model, prompt) -> None:
    """However a request and the end meet, the caller gets an answer or an error."""
    for _ in range(5):
        engine = open_engine(model=long_model, cache_tokens=20_000)
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(engine.generate, [prompt], ENDLESS) for _ in range(4)]
            engine.close()
            for one in asked:
                with pytest.raises(RuntimeError, match=r"the engine (was|is) closed"):
                    one.result(timeout=60)


def test_orders_taken_over_before_the_end_are_answered(open_engine, prompt) -> None:
    """A request and the end in the same moment: both lie in the inbox when the thread looks."""
    engine = open_engine()
    assert len(engine.generate([prompt], params())[0].token_ids) == 20
    failures: list[BaseException] = []
    sequence = engine._sequence(prompt, ENDLESS)
    sequence.on_failure = failures.append
    with engine._loop._wake:
        engine._loop.start([sequence])
        engine._loop._closed = True
    engine.close()
    assert [str(failure) for failure in failures] == ["the engine was closed before the answer was complete"]


@pytest.mark.parametrize("error", [ValueError("bad shape"), MemoryError("no memory"), SystemExit(3)])
def test_a_failing_step(error: BaseException, open_engine, long_model, prompt, monkeypatch, caplog) -> None:
    """Every caller gets a RuntimeError, whatever was raised; nobody waits for ever, and later requests are refused."""
    engine = open_engine(model=long_model, max_seqs=2, cache_tokens=20_000)
    assert engine.failure is None
    stream = engine.stream(prompt, ENDLESS)
    next(stream)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(engine.generate, [prompt], ENDLESS) for _ in range(3)]
        wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 4)

        def broken(*arguments: object) -> torch.Tensor:
            raise error

        monkeypatch.setattr(long_model, "forward", broken)
        for one in waiting:
            with pytest.raises(RuntimeError, match=rf"the engine has stopped: {type(error).__name__}: {error}") as told:
                one.result(timeout=60)
            assert told.value.__cause__ is error
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        list(stream)
    monkeypatch.undo()
    assert engine.failure is error
    assert "the engine's loop has failed" in caplog.text
    assert_idle(engine)
    with pytest.raises(RuntimeError, match="the engine has failed earlier; start a new one") as told:
        engine.generate([prompt], params())
    assert told.value.__cause__ is error
    engine.close()
    with open_engine(model=long_model, cache_tokens=100) as another:
        assert len(another.generate([prompt], params())[0].token_ids) == 20


@pytest.mark.parametrize("method", ["consume", "fill_mask"])
def test_a_grammar_that_fails_on_the_way(method: str, open_engine, prompt, naive, monkeypatch) -> None:
    """It ends its own answer with its error; the answers beside it go on."""
    with open_engine() as engine:
        engine.grammars.compile(DIGITS)
        calls: list[int] = []
        original = getattr(Matcher, method)

        def failing(self: Matcher, value: Any) -> None:
            calls.append(1)
            if len(calls) == 4:
                self._fail("it takes too long")
            original(self, value)

        monkeypatch.setattr(Matcher, method, failing)
        beside = engine.stream(prompt, params(max_tokens=40))
        with pytest.raises(ValueError, match="the regex grammar cannot be followed: it takes too long"):
            engine.generate([prompt], params(grammar=DIGITS))
        done = list(beside)[-1].completion
        assert done is not None
        assert done.token_ids == naive.generate(prompt, params(max_tokens=40)).token_ids
        assert len(calls) > 3
        assert engine.failure is None
        assert_idle(engine)


def test_an_engine_that_nobody_closes(open_engine, prompt) -> None:
    """Its thread and its cache go with its last reference; a stream is one."""
    engine = open_engine()
    stream = engine.stream(prompt, params())
    thread, caches = engine._loop._thread, weakref.ref(engine._core.runner)
    assert thread is not None
    gone = weakref.ref(engine)
    del engine
    assert len(list(stream)) == 20
    del stream
    gc.collect()
    assert gone() is None
    thread.join(timeout=60)
    assert not thread.is_alive()
    gc.collect()
    assert caches() is None


def test_many_threads(open_engine, prompt, naive) -> None:
    """Requests, grammars and figures from several threads at once."""
    with open_engine(max_seqs=3, block_size=4, cache_tokens=CONTEXT) as engine:
        barrier = threading.Barrier(8)

        def ask(number: int) -> list[Completion]:
            barrier.wait(timeout=60)
            assert engine.grammars is engine.grammars
            own = prompt[: 3 + number]
            done = engine.generate([own, own], [params(), params(grammar=DIGITS, temperature=1.0, seed=number)])
            assert engine.stats().num_blocks == CONTEXT // 4
            return done

        with ThreadPoolExecutor(8) as pool:
            for number, (free, digits) in enumerate(pool.map(ask, range(8), timeout=120)):
                assert free.token_ids == naive.generate(prompt[: 3 + number], params()).token_ids
                assert digits.text.isdigit()
                assert len(digits.text) == 12
        assert_idle(engine)
        stats = engine.stats()
        assert stats.prompt_tokens == 2 * sum(range(3, 11))
        assert (stats.draft_tokens, stats.accepted_draft_tokens) == (0, 0)


def test_grammars_are_built_once(open_engine) -> None:
    with open_engine() as engine, ThreadPoolExecutor(6) as pool:
        barrier = threading.Barrier(6)

        def get(number: int) -> int:
            barrier.wait(timeout=60)
            return id(engine.grammars)

        assert len(set(pool.map(get, range(6)))) == 1


def test_n_without_a_seed(open_engine, prompt) -> None:
    with open_engine() as engine:
        done = engine.generate([prompt, prompt], params(n=3, temperature=1.5))
        assert len({tuple(one.token_ids) for one in done}) == 6
        seeded = engine.generate([prompt], params(n=2, temperature=1.5, seed=5))
        assert [one.token_ids for one in seeded] == [
            engine.generate([prompt], params(temperature=1.5, seed=seed))[0].token_ids for seed in (5, 6)
        ]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason=f"no {GGUF.name} in QWENCH_ASSETS ({ASSETS})")
def test_the_real_model_is_the_naive_generator() -> None:
    questions = ["Write fib(n) in Python.", "What is 2 + 3?", "Name a colour."]
    with Engine(GGUF, device="cpu", dtype="float32") as engine:
        naive = NaiveGenerator(engine.model, engine.tokenizer)
        prompts = [engine.tokenizer.render([{"role": "user", "content": question}]) for question in questions]
        wishes = SamplingParams(temperature=0, max_tokens=8)
        want = [naive.generate(prompt, wishes) for prompt in prompts]
        assert engine.generate(prompts[:1], wishes)[0].token_ids == want[0].token_ids
        together = engine.generate(prompts, wishes)
        assert [one.token_ids for one in together] == [one.token_ids for one in want]
        assert [one.text for one in together] == [one.text for one in want]
        assert together[0].num_cached_tokens > 0
        assert_idle(engine)
