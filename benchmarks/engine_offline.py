"""The engine on Qwen2.5 shapes with random weights, on one GPU: the loads on which peers were measured.

    python benchmarks/engine_offline.py 0.5b [throughput] [single] [ttft] [batch] [--vocabulary qwen.tiktoken]

* throughput: 256 prompts of 100..1024 tokens, 100..1024 new ones (random.seed(0)), temperature 0.6; output tokens/s
* single: one stream, 128 tokens in, 512 out; tokens/s after the first
* ttft: seconds to the first token of one prompt of 32,768 and of 131,072 tokens
* batch: 1024 sequences, 512 in, 256 out, temperature 0.6; total tokens/s

Beside each stands its floor: products at the card's sustained rate, and weights and live keys read once a step at the
rate of a copy. Random weights do not change the arithmetic; that the tokens are right is tested elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from results import write_result

from qwench.engine import Engine, EngineConfig
from qwench.model.decoder import CausalLM
from qwench.model.presets import preset
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

SUSTAINED_FLOPS, COPY_BYTES = 684e12, 4.27e12
"""Of one H200, measured: 1,500 bf16 products of 8192^3, and a copy of 4 GiB, bytes read and written."""
CASES = ("single", "throughput", "batch", "ttft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["0.5b", "1.5b", "3b", "7b"])
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--vocabulary", type=Path, required=True, help="qwen.tiktoken or a model directory")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="engine setting, key=value")
    parser.add_argument("--name", help="of the result file")
    args = parser.parse_args()
    config = dataclasses.replace(preset(f"qwen2.5-{args.shape}"), max_position_embeddings=132096)
    started = time.perf_counter()
    model = random_model(config)
    settings: dict[str, Any] = {"prefix_caching": False}
    for item in args.set:
        key, _, value = item.partition("=")
        settings[key] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    engine = Engine(model, tokenizer=Tokenizer.load(args.vocabulary), config=EngineConfig(**settings))
    figures: dict[str, Any] = {
        "shape": args.shape, "gpu": torch.cuda.get_device_name(), "settings": settings,
        "start_s": round(time.perf_counter() - started, 2), "cache_tokens": engine.cache_tokens,
    }  # fmt: skip
    weights = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name or config.tie_word_embeddings
    )
    with engine:
        for case in args.cases:
            figures[case] = {"single": single, "throughput": throughput, "batch": batch, "ttft": ttft}[case](
                engine, 2 * weights, args.repeat
            )
            print(case, figures[case], flush=True)
    write_result(args.name or f"engine_offline_{args.shape}", figures)


def random_model(config: Any) -> CausalLM:
    model = CausalLM(config, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    return model.eval()


def tokens(count: int) -> list[int]:
    return [random.randint(0, 10000) for _ in range(count)]


def run(engine: Engine, prompts: list[list[int]], lengths: list[int], temperature: float) -> float:
    params = [SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True) for n in lengths]
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = engine.generate(prompts, params)
    elapsed = time.perf_counter() - started
    assert [len(answer.token_ids) for answer in out] == lengths
    return elapsed


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def key_bytes(engine: Engine) -> int:
    """Bytes of one token's keys and values."""
    config = engine.model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.d_head * 2


def flops(engine: Engine, prompts: list[int]) -> float:
    config = engine.model.config
    layers = sum(p.numel() for p in engine.model.model.layers.parameters())
    square = 2 * config.num_hidden_layers * config.num_attention_heads * config.d_head
    return sum(2 * layers * n + square * n * n for n in prompts)


def floor(engine: Engine, weight_bytes: int, prompts: list[int], outputs: list[int]) -> float:
    """Seconds: all prompts read, then each step the larger of reading and multiplying the weights, plus live keys."""
    seconds = flops(engine, prompts) / SUSTAINED_FLOPS
    for step in range(1, max(outputs)):
        live = [prompt + step for prompt, output in zip(prompts, outputs, strict=True) if output > step]
        reading, arithmetic = weight_bytes / COPY_BYTES, weight_bytes * len(live) / SUSTAINED_FLOPS
        seconds += max(reading, arithmetic) + sum(live) * key_bytes(engine) / COPY_BYTES
    return seconds


def single(engine: Engine, weight_bytes: int, repeat: int) -> dict[str, Any]:
    run(engine, [tokens(128)], [64], 0.0)
    rates, firsts = [], []
    for _ in range(max(repeat, 3)):
        first = run(engine, [tokens(128)], [1], 0.0)
        firsts.append(1e3 * first)
        rates.append(511 / (run(engine, [tokens(128)], [512], 0.0) - first))
    return {
        "unit": "tokens/s", **spread(rates), "floor": round(COPY_BYTES / weight_bytes),
        "time_to_first_token_ms": spread(firsts),
    }  # fmt: skip


def throughput(engine: Engine, weight_bytes: int, repeat: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeat + 1):
        random.seed(0)
        prompts = [tokens(random.randint(100, 1024)) for _ in range(256)]
        lengths = [random.randint(100, 1024) for _ in range(256)]
        rates.append(sum(lengths) / run(engine, prompts, lengths, 0.6))
    best = floor(engine, weight_bytes, [len(prompt) for prompt in prompts], lengths)
    return {
        "unit": "output tokens/s", **spread(rates[1:]), "first": round(rates[0]), "floor": round(sum(lengths) / best),
        "prompt_tokens": sum(map(len, prompts)), "output_tokens": sum(lengths),
    }  # fmt: skip


def batch(engine: Engine, weight_bytes: int, repeat: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeat + 1):
        prompts = [tokens(512) for _ in range(1024)]
        rates.append(1024 * 768 / run(engine, prompts, [256] * 1024, 0.6))
    best = floor(engine, weight_bytes, [512] * 1024, [256] * 1024)
    return {"unit": "total tokens/s", **spread(rates[1:]), "first": round(rates[0]), "floor": round(1024 * 768 / best)}


def ttft(engine: Engine, weight_bytes: int, repeat: int) -> dict[str, Any]:
    figures = {}
    for length in (32768, 131072):
        run(engine, [tokens(length)], [1], 0.0)
        times = [run(engine, [tokens(length)], [1], 0.0) for _ in range(repeat)]
        figures[str(length)] = {
            "unit": "s", **spread(times), "floor": round(flops(engine, [length]) / SUSTAINED_FLOPS, 4),
            "tflops": round(flops(engine, [length]) / statistics.median(times) / 1e12),
        }  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
