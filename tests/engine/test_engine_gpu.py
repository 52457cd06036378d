"""What only a GPU shows of the engine: batch-invariant answers, fp32 with long passes, tensor parallelism over NCCL."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwench.engine import Engine, EngineConfig
from qwench.engine.naive import NaiveGenerator
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(
    make_model: Callable[..., CausalLM],
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model whose head size and widths are those that the kernels are made for."""
    config = dataclasses.replace(
        tiny_config, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    save_pretrained(make_model(config, std=0.06), path)
    tiny_tokenizer.save(path)
    return path


def prompts(tokenizer: Tokenizer, count: int, most: int = 300) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(tokenizer.vocab_size - 8) for _ in range(draw.randint(1, most))] for _ in range(count)]


def test_a_batch_invariant_answer_does_not_depend_on_its_company(directory: Path) -> None:
    settings = EngineConfig(deterministic=True, max_seqs=48, max_step_tokens=512)
    with Engine(directory, device="cuda", dtype="bfloat16", config=settings) as engine:
        asked = prompts(engine.tokenizer, 40)
        together = engine.generate(asked, GREEDY)
        for place in (0, 17, 39):
            assert engine.generate([asked[place]], GREEDY)[0].token_ids == together[place].token_ids


def test_fp32_reads_a_long_prompt_and_answers_as_the_naive_generator(directory: Path) -> None:
    with Engine(directory, device="cuda", dtype="float32", config=EngineConfig(max_seqs=8)) as engine:
        [long] = prompts(engine.tokenizer, 1, 4000)
        naive = NaiveGenerator(engine.model, engine.tokenizer)
        for prompt in (long, long[:5]):
            assert engine.generate([prompt], GREEDY)[0].token_ids == naive.generate(prompt, GREEDY).token_ids


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does(directory: Path) -> None:
    """fp32, where only the order of sums differs."""
    scored = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=True)
    found = []
    for size in (1, 2):
        settings = EngineConfig(tensor_parallel=size, max_seqs=16)
        with Engine(directory, device="cuda", dtype="float32", config=settings) as engine:
            asked = prompts(engine.tokenizer, 12)
            answers = [answer.token_ids for answer in engine.generate(asked, GREEDY)]
            scores = [torch.tensor(answer.prompt_logprobs[1:]) for answer in engine.generate(asked, scored)]  # pyright: ignore[reportOptionalSubscript]
            found.append((answers, torch.cat(scores)))
    (one, one_scores), (two, two_scores) = found
    torch.testing.assert_close(one_scores, two_scores, rtol=0, atol=2e-3)
    assert sum(a == b for a, b in zip(one, two, strict=True)) >= 11
