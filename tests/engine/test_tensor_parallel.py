"""One model over two processes on the CPU: the answers are the naive generator's, and failures end in errors, not in
waiting. On GPUs the same code runs over NCCL.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwench.engine import Engine, EngineConfig, replicas
from qwench.engine.grammar import GrammarCompiler, Matcher
from qwench.engine.naive import NaiveGenerator
from qwench.engine.shared_matcher import Outcome
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.model.weights import save_pretrained
from qwench.parallel.tensor import load_shard
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, Grammar, SamplingParams

CONTEXT = 128

pytestmark = [pytest.mark.multi, pytest.mark.usefixtures("warm_processes")]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 14, "ignore_eos": True, **changes})


@pytest.fixture(scope="module")
def checkpoint(
    make_model: Callable[..., CausalLM],
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    model = make_model(dataclasses.replace(tiny_config, max_position_embeddings=CONTEXT))
    save_pretrained(model, directory, tokenizer=tiny_tokenizer)
    return directory


@pytest.fixture(scope="module")
def naive(checkpoint: Path, tiny_tokenizer: Tokenizer) -> NaiveGenerator:
    model = load_model(checkpoint)
    return NaiveGenerator(model, tiny_tokenizer, GrammarCompiler(tiny_tokenizer, model.config.vocab_size))


def open_engine(checkpoint: Path, **settings: Any) -> Engine:
    return Engine(checkpoint, device="cpu", config=EngineConfig(tensor_parallel=2, **settings))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    """Cache for two long answers only, and steps of few tokens: chunked prompts, preemption, answers that wait."""
    with open_engine(checkpoint, cache_tokens=160, max_seqs=4, max_step_tokens=24, block_size=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Tokenizer) -> list[list[int]]:
    short = tiny_tokenizer.encode("def bisect(a, x, lo=0):")
    longer = [*short, *tiny_tokenizer.encode(" return insort(a, x, lo, hi, key=key)\n\nclass Heap: pass")]
    return [short, longer, tiny_tokenizer.encode("Beautiful is better than ugly."), [5]]


def processes(engine: Engine) -> list[int]:
    assert engine._replicas is not None
    pids = [process.pid for process in engine._replicas._processes]
    assert all(pids)
    return [pid for pid in pids if pid is not None]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_same(got: Completion, want: Completion) -> None:
    assert (got.token_ids, got.text, got.finish_reason) == (want.token_ids, want.text, want.finish_reason)
    torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------------------ the model
def test_shards_are_parts_of_the_model(checkpoint: Path) -> None:
    """Each process has about half of the matrices that split, under the whole model's config."""
    whole = load_model(checkpoint)
    parts = [load_shard(checkpoint, "cpu", "float32", rank, 2) for rank in range(2)]
    assert parts[0].config == whole.config
    down: list[torch.Tensor] = [part.get_parameter("model.layers.1.mlp.down_proj.weight") for part in parts]
    assert torch.equal(torch.cat(down, 1), whole.get_parameter("model.layers.1.mlp.down_proj.weight"))
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(parts[1].get_parameter(norm), whole.get_parameter(norm))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    q, k, v = whole.get_parameter(name).split([32, 16, 16])
    assert torch.equal(parts[1].get_parameter(name), torch.cat((q[16:], k[8:], v[8:])))
    assert parts[0].lm_head.weight is parts[0].model.embed_tokens.weight


# ---------------------------------------------------------------------------------------------------------- the answers
def test_answers_are_the_naive_generators(engine: Engine, naive: NaiveGenerator, prompts, tiny_tokenizer) -> None:
    """Greedy and sampled, penalties, biases, stop strings, several answers at once, in too small a cache."""
    short, longer, other, one = prompts
    stop = naive.generate(short, params()).text[8:11]
    requests = [
        (short, params(max_tokens=60)),
        (longer, params(max_tokens=50)),
        (other, params(temperature=1.0, seed=1, max_tokens=40)),
        (one, params(temperature=1.6, top_k=9, top_p=0.9, seed=2)),
        (other, params(repetition_penalty=1.3, presence_penalty=0.5)),
        (longer, params(temperature=1.5, frequency_penalty=0.8, seed=2**64 + 5)),
        (short, params(logit_bias={77: 4.0}, temperature=0.8, seed=6)),
        (short, params(stop=[stop])),
        (other, params(ignore_eos=False, logit_bias=dict.fromkeys(tiny_tokenizer.eos_token_ids, 1e6), min_tokens=6)),
        (longer, params(top_logprobs=3, prompt_logprobs=True)),
    ]
    before = engine.stats()
    answers = engine.generate([prompt for prompt, _ in requests], [wishes for _, wishes in requests])
    for answer, (prompt, wishes) in zip(answers, requests, strict=True):
        assert_same(answer, naive.generate(prompt, wishes))
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    after = engine.stats()
    assert after.num_preemptions > before.num_preemptions, "the cache was large enough"
    assert after.num_free_blocks == after.num_blocks
    again = engine.generate([longer], params(max_tokens=50))[0]
    assert again.num_cached_tokens > 0
    assert_same(again, answers[1])


def test_streams_and_giving_up(engine: Engine, naive: NaiveGenerator, prompts) -> None:
    """An answer that is given up is given up everywhere: those beside and after it are right."""
    endless = engine.stream(prompts[0], params(max_tokens=100))
    beside = engine.stream(prompts[2], params(temperature=1.0, seed=4, max_tokens=30))
    assert "".join(next(endless).text for _ in range(4)) is not None
    endless.close()
    last = [chunk.completion for chunk in beside][-1]
    assert last is not None
    assert_same(last, naive.generate(prompts[2], params(temperature=1.0, seed=4, max_tokens=30)))
    n = engine.generate([prompts[1]], params(n=3, temperature=1.0, seed=10))
    for i, answer in enumerate(n):
        assert_same(answer, naive.generate(prompts[1], params(temperature=1.0, seed=10 + i)))


SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["x", "yz"]}, "b": {"type": "boolean"}}, "required": ["a"]}'


def test_grammars(engine: Engine, naive: NaiveGenerator, prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 runs them; one that fails there alone ends its own answer everywhere, and no other one."""
    requests = [
        (prompts[2], params(grammar=Grammar(kind="json_schema", value=SCHEMA), max_tokens=60, temperature=1.0, seed=8)),
        (prompts[0], params(grammar=Grammar(kind="regex", value="[a-c]{2,5}(-[0-9]{3}){2}"), temperature=3.0, seed=9)),
        (prompts[0], params(grammar=Grammar(kind="regex", value="[ab]*"), min_tokens=9, ignore_eos=False)),
        (prompts[3], params(temperature=1.0, seed=3)),
    ]
    want = [naive.generate(*request) for request in requests]
    answers = engine.generate([prompt for prompt, _ in requests], [wishes for _, wishes in requests])
    for answer, expected in zip(answers, want, strict=True):
        assert_same(answer, expected)
    fill, fragile = Matcher.fill_mask, Grammar(kind="regex", value="[0-9]{30}")

    def failing(self: Matcher, row: Any) -> None:
        fill(self, row)
        if self._grammar == fragile and len(self._tokens) == 4:
            raise ValueError("too expensive on this processor")

    monkeypatch.setattr(Matcher, "fill_mask", failing)
    beside = [engine.stream(*request) for request in requests]
    with pytest.raises(ValueError, match="too expensive on this processor"):
        engine.generate([prompts[1]], params(grammar=fragile, max_tokens=20))
    for stream, expected in zip(beside, want, strict=True):
        last = [chunk.completion for chunk in stream][-1]
        assert last is not None
        assert_same(last, expected)
    assert_same(engine.generate([prompts[3]], params(temperature=1.0, seed=3))[0], want[3])


def test_what_is_refused(engine: Engine, naive: NaiveGenerator, prompts, checkpoint: Path, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="grammar"):
        engine.generate([prompts[0]], params(grammar=Grammar(kind="regex", value="(")))
    with pytest.raises(ValueError, match="does not split over 3 devices; these work: 1, 2"):
        Engine(checkpoint, device="cpu", config=EngineConfig(tensor_parallel=3))
    with pytest.raises(ValueError, match="tensor_parallel is 2, but the model is already loaded; give the path"):
        Engine(naive.model, tokenizer=tiny_tokenizer, config=EngineConfig(tensor_parallel=2))


def test_speculation(checkpoint: Path, naive: NaiveGenerator, prompts) -> None:
    """Drafts from repetitions are the same everywhere, also under a grammar; closing leaves no process behind."""
    with open_engine(checkpoint, speculate="ngram") as engine:
        pids = processes(engine)
        prompt = prompts[0] * 3
        assert_same(engine.generate([prompt], params(max_tokens=40))[0], naive.generate(prompt, params(max_tokens=40)))
        assert (drafted := engine.stats().draft_tokens) > 0
        digits = params(grammar=Grammar(kind="regex", value="(12)*[0-9]{12}"), max_tokens=30)
        assert_same(engine.generate([prompt], digits)[0], naive.generate(prompt, digits))
        assert engine.stats().draft_tokens > drafted
    assert not any(map(is_alive, pids))
    assert engine.failure is None


# ------------------------------------------------------------------------------------------------------------- failures
def test_a_process_that_dies(checkpoint: Path, prompts) -> None:
    """In the middle of an answer: everybody who waits gets an error that says so, and nothing is left."""
    engine = open_engine(checkpoint)
    pids = processes(engine)
    stream = engine.stream(prompts[0], params(max_tokens=100))
    next(stream)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the process of device 1 has ended \(exit code -9\)"):
        list(stream)
    with pytest.raises(RuntimeError, match=r"failed earlier|closed"):
        engine.generate([prompts[0]], params())
    assert "has ended" in str(engine.failure)
    engine.close()
    assert not is_alive(pids[0])


def test_a_process_that_hangs(checkpoint: Path, prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "STEP_LIMIT_S", 2.0)
    engine = open_engine(checkpoint)
    pids = processes(engine)
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"longer than 2 s|[Tt]imed out"):
        engine.generate([prompts[0]], params())
    engine.close()
    assert not is_alive(pids[0])


def test_a_process_that_draws_other_tokens(checkpoint: Path, prompts, tiny_tokenizer: Tokenizer) -> None:
    """A follower in this process: with rank 0's checksum it goes on, with another it stops before the step."""
    with Engine(checkpoint, device="cpu") as engine:
        follower = replicas.Follower(engine._core, tiny_tokenizer, Outcome)
        add = replicas.Add(1, prompts[0], params(), seed=3, ends=frozenset(), limit=14)
        follower.step(replicas.Orders([add], checksum=0))
        drawn = follower._sequences[1].outputs
        assert len(drawn) == 1
        follower.step(replicas.Orders([], checksum=hash((0, *drawn))))
        assert len(drawn) == 2
        with pytest.raises(RuntimeError, match="this device has drawn other tokens than the first one"):
            follower.step(replicas.Orders([], checksum=hash((0, *drawn))))
        assert len(drawn) == 2


def test_a_start_that_fails(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process than this one refuses comes out as it is, and ends all of them."""
    opened: list[tuple[replicas.Replicas, int | None]] = []

    def load(self: replicas.Replicas) -> CausalLM:
        opened.append((self, self._processes[0].pid))
        return load_shard(checkpoint, "cpu", "float32", 0, 2)

    shutil.copytree(checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    monkeypatch.setattr(replicas.Replicas, "load", load)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors"):
        open_engine(tmp_path / "broken")
    ((found, pid),) = opened
    assert pid is not None
    assert not is_alive(pid)
    assert not found._directory.exists()
