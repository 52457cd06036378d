"""What the engine's features cost or save on one GPU, on Qwen2.5 shapes with random weights.

    python benchmarks/engine_features.py 0.5b --vocabulary qwen.tiktoken

* json: 64 sequences under a JSON schema, tokens/s beside the same load without (every token is drawn from a mask)
* prefix: time to the first token of a prompt of 16,384 tokens, new and with all but its end in the cache
* deterministic: single stream and 64 sequences with batch-invariant kernels, and whether the tokens of one request are
  the same alone and among others, with and without them
* fp8: 256 sequences with an 8-bit cache beside the 16-bit one
* filters: 128 sequences with Qwen's own sampling settings (top-k, top-p, repetition penalty) beside plain temperature
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from engine_offline import random_model, tokens
from results import write_result

from qwench.engine import Engine, EngineConfig
from qwench.model.presets import preset
from qwench.tokenizer import Tokenizer
from qwench.types import Grammar, SamplingParams

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}


def rate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Output tokens/s, the median of three after one warm-up."""
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        answers = engine.generate(prompts, params)
        rates.append(sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def constrained(engine: Engine) -> dict[str, Any]:
    prompts = [tokens(128) for _ in range(64)]
    plain = SamplingParams(temperature=0.8, max_tokens=256, ignore_eos=True)
    free = rate(engine, prompts, plain)
    grammar = Grammar(kind="json_schema", value=json.dumps(SCHEMA))
    bound = rate(engine, prompts, dataclasses.replace(plain, grammar=grammar))
    return {"free": round(free), "constrained": round(bound), "cost": round(1 - bound / free, 3)}


def prefix(engine: Engine) -> dict[str, Any]:
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    new, hit, cached = [], [], 0
    for _ in range(4):
        prompt = tokens(16384)
        for times in (new, hit):
            started = time.perf_counter()
            cached = engine.generate([prompt], one)[0].num_cached_tokens
            times.append(time.perf_counter() - started)
    fresh, again = statistics.median(new[1:]), statistics.median(hit[1:])
    return {
        "new_s": round(fresh, 4), "cached_s": round(again, 4), "saved": round(1 - again / fresh, 3),
        "cached_tokens": cached,
    }  # fmt: skip


def one_among_many(engine: Engine) -> float:
    """Share of equal leading tokens of a greedy request, alone and beside 40 others of many lengths."""
    greedy = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    prompt = tokens(300)
    alone = engine.generate([prompt], greedy)[0].token_ids
    others = [tokens(50 + 37 * i) for i in range(40)]
    among = engine.generate([*others[:20], prompt, *others[20:]], greedy)[20].token_ids
    same = [a == b for a, b in zip(alone, among, strict=True)]
    return same.index(False) / len(same) if False in same else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["0.5b", "1.5b", "3b", "7b"])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--only", default="default,deterministic,fp8", help="engines to measure")
    args = parser.parse_args()
    model = random_model(preset(f"qwen2.5-{args.shape}"))
    tokenizer = Tokenizer.load(args.vocabulary)
    figures: dict[str, Any] = {"shape": args.shape, "gpu": torch.cuda.get_device_name()}
    plain = SamplingParams(temperature=0.8, max_tokens=256, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
    qwen = dataclasses.replace(plain, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    for name, config in {
        "default": EngineConfig(),
        "deterministic": EngineConfig(deterministic=True),
        "fp8": EngineConfig(cache_dtype="fp8"),
    }.items():
        if name not in args.only.split(","):
            continue
        try:
            with Engine(model, tokenizer=tokenizer, config=config) as engine:
                found: dict[str, Any] = {
                    "single": round(rate(engine, [tokens(128)], greedy)),
                    "batch_64": round(rate(engine, [tokens(128) for _ in range(64)], plain)),
                    "one_among_many": one_among_many(engine),
                }
                if name == "default":
                    found["json"] = constrained(engine)
                    found["prefix"] = prefix(engine)
                    found["batch_128_qwen_sampling"] = round(rate(engine, [tokens(128) for _ in range(128)], qwen))
                    found["batch_128_temperature"] = round(rate(engine, [tokens(128) for _ in range(128)], plain))
                if name != "deterministic":
                    long = [tokens(1024) for _ in range(256)]
                    found["batch_256_long"] = round(rate(engine, long, plain))
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        figures[name] = found
        print(name, found, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    write_result(f"engine_features_{args.shape}", figures)


if __name__ == "__main__":
    main()
