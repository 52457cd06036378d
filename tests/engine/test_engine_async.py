"""The engine on asyncio: many streams on one loop and on several, leaving early, cancellation, closing and failure."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
import torch

from qwench.engine import Engine, EngineConfig
from qwench.engine.mailbox import Mailbox
from qwench.engine.naive import NaiveGenerator
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.tokenizer import Tokenizer
from qwench.types import Chunk, Completion, SamplingParams

ENDLESS = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., CausalLM], tiny_config: ModelConfig) -> CausalLM:
    return make_model(tiny_config)


@pytest.fixture
def open_engine(model: CausalLM, tiny_tokenizer: Tokenizer) -> Callable[..., Engine]:
    def make(**settings: Any) -> Engine:
        return Engine(model, tokenizer=tiny_tokenizer, config=EngineConfig(**{"cache_tokens": 20_000, **settings}))

    return make


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer: Tokenizer) -> list[int]:
    return tiny_tokenizer.encode("def bisect(a, x, lo=0):")


def wishes(number: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=number, max_tokens=5 + number % 7, ignore_eos=True, top_logprobs=1)


async def collected(engine: Engine, prompt: list[int], params: SamplingParams) -> Completion:
    """The completion of a stream whose pieces are checked to join to it."""
    chunks: list[Chunk] = [chunk async for chunk in engine.astream(prompt, params)]
    done = chunks[-1].completion
    assert done is not None
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == done.text
    assert [token for chunk in chunks for token in chunk.token_ids] == done.token_ids
    assert [value for chunk in chunks for value in chunk.logprobs] == done.logprobs
    assert [top for chunk in chunks for top in chunk.top_logprobs] == (done.top_logprobs or [])
    return done


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.002)


async def idle(engine: Engine) -> None:
    """Wait until nothing is in use."""
    await until(lambda: not engine._core.has_work and not engine._loop.num_arriving)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert not any(engine._core.pool._owners)


def test_many_streams_on_one_loop(open_engine, model, tiny_tokenizer, prompt) -> None:
    naive = NaiveGenerator(model, tiny_tokenizer)

    async def main(engine: Engine) -> list[Completion]:
        done = await asyncio.gather(*(collected(engine, prompt, wishes(number)) for number in range(20)))
        await idle(engine)
        return done

    with open_engine(max_seqs=6, block_size=4) as engine:
        for number, one in enumerate(asyncio.run(main(engine))):
            want = naive.generate(prompt, wishes(number))
            assert (one.token_ids, one.text) == (want.token_ids, want.text)
        assert engine.stats().num_running == 0


def test_loops_in_several_threads(open_engine, prompt) -> None:
    """Beside each other, and one after another in the same engine; a thread without a loop takes part."""

    async def main(engine: Engine, first: int) -> list[list[int]]:
        done = await asyncio.gather(*(collected(engine, prompt, wishes(first + i)) for i in range(5)))
        return [one.token_ids for one in done]

    with open_engine() as engine, ThreadPoolExecutor(4) as pool:
        want = [one.token_ids for one in engine.generate([prompt] * 20, [wishes(number) for number in range(20)])]
        runs = [pool.submit(asyncio.run, main(engine, 5 * i)) for i in range(3)]
        direct = pool.submit(engine.generate, [prompt] * 5, [wishes(number) for number in range(15, 20)])
        got = [ids for run in runs for ids in run.result(timeout=120)]
        assert got + [one.token_ids for one in direct.result(timeout=120)] == want
        assert asyncio.run(main(engine, 0)) == want[:5]
        assert len(engine._mailboxes) <= 4
        asyncio.run(idle(engine))


@pytest.mark.parametrize("num_read", [1, 4])
def test_leaving_early(num_read: int, open_engine, prompt) -> None:
    async def main(engine: Engine) -> None:
        async with aclosing(engine.astream(prompt, ENDLESS)) as chunks:
            async for number, chunk in _enumerated(chunks):
                assert chunk.completion is None
                if number + 1 == num_read:
                    break
        await idle(engine)

    with open_engine(max_seqs=1) as engine:
        asyncio.run(main(engine))
        assert engine.stats().generated_tokens < 10_000


async def _enumerated(chunks: AsyncGenerator[Chunk]) -> AsyncGenerator[tuple[int, Chunk]]:
    number = 0
    async for chunk in chunks:
        yield number, chunk
        number += 1


def test_cancelled_tasks(open_engine, prompt) -> None:
    """While they run and while they wait for a row; the one that stays gets its answer."""

    async def main(engine: Engine) -> None:
        tasks = [asyncio.create_task(collected(engine, prompt, ENDLESS)) for _ in range(5)]
        await until(lambda: engine.stats().num_running == 2 and engine.stats().num_waiting == 3)
        stays = asyncio.create_task(collected(engine, prompt, wishes(3)))
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert len((await stays).token_ids) == 8
        await idle(engine)

    with open_engine(max_seqs=2) as engine:
        asyncio.run(main(engine))


def test_a_loop_that_is_closed_with_open_streams(open_engine, prompt) -> None:
    """asyncio.run ends its generators; what still comes for the loop is dropped, and the engine goes on."""

    async def main(engine: Engine) -> None:
        stream = engine.astream(prompt, ENDLESS)
        await anext(stream)
        kept.append(stream)

    kept: list[Any] = []
    with open_engine(max_seqs=1) as engine:
        asyncio.run(main(engine))
        asyncio.run(idle(engine))
        assert len(engine.generate([prompt], wishes(1))[0].token_ids) == 6


def test_errors(open_engine, prompt) -> None:
    async def main(engine: Engine) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            await anext(engine.astream([], ENDLESS))
        with pytest.raises(ValueError, match="n is 2; a stream carries one answer"):
            await anext(engine.astream(prompt, dataclasses.replace(ENDLESS, n=2)))
        await idle(engine)
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed; start a new one"):
            await anext(engine.astream(prompt, ENDLESS))

    asyncio.run(main(open_engine()))


def test_close_with_open_streams(open_engine, prompt) -> None:
    async def main(engine: Engine) -> None:
        tasks = [asyncio.create_task(collected(engine, prompt, ENDLESS)) for _ in range(4)]
        await until(lambda: engine.stats().num_running == 2)
        await asyncio.to_thread(engine.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RuntimeError)
            assert "the engine was closed before the answer was complete" in str(result)

    asyncio.run(main(open_engine(max_seqs=2)))


def test_a_failing_step(open_engine, model, prompt, monkeypatch) -> None:
    async def main(engine: Engine) -> None:
        tasks = [asyncio.create_task(collected(engine, prompt, ENDLESS)) for _ in range(4)]
        await until(lambda: engine.stats().num_running == 2)

        def broken(*arguments: object) -> torch.Tensor:
            raise ValueError("bad shape")

        monkeypatch.setattr(model, "forward", broken)
        async with asyncio.timeout(60):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(result) for result in results] == ["the engine has stopped: ValueError: bad shape"] * 4
        assert all(isinstance(result, RuntimeError) for result in results)
        with pytest.raises(RuntimeError, match="the engine has failed earlier"):
            await anext(engine.astream(prompt, ENDLESS))

    asyncio.run(main(open_engine(max_seqs=2)))


def test_one_wake_up_for_many_pieces() -> None:
    """What is put before the loop looks is delivered together and in order; then the next piece wakes it again."""

    async def main() -> None:
        loop, wake_ups = asyncio.get_running_loop(), list[str]()
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *arguments: Any, **further: Any) -> asyncio.Handle:
            wake_ups.append(threading.current_thread().name)
            return wake(callback, *arguments, **further)

        loop.call_soon_threadsafe = counted  # pyright: ignore[reportAttributeAccessIssue]
        mailbox, queues = Mailbox(loop), [asyncio.Queue[int]() for _ in range(3)]
        for turn in range(2):
            writer = threading.Thread(target=lambda: [mailbox.put(q, n) for n in range(100) for q in queues])
            writer.start()
            writer.join()  # the loop cannot look meanwhile
            for queue in queues:
                assert [await queue.get() for _ in range(100)] == list(range(100))
            assert len(wake_ups) == turn + 1
        del loop.call_soon_threadsafe

    asyncio.run(main())


def test_nobody_listens_any_more() -> None:
    """A loop that was closed, or is gone, takes nothing and hurts nobody."""
    loop = asyncio.new_event_loop()
    mailbox, queue = Mailbox(loop), asyncio.Queue[int]()
    loop.close()
    for number in range(3):
        mailbox.put(queue, number)
    assert mailbox._items == []
    del loop
    mailbox.put(queue, 4)
    assert mailbox._items == []
    assert queue.empty()
