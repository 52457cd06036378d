"""Speculative decoding on a real model, one stream: tokens/s and acceptance with and without.

    python benchmarks/speculative.py MODEL [--draft MODEL] [--device auto] [--dtype auto] [--tokens 256] [--repeat 3]

Two loads: `copy` (repeat a file of code with one change, where an n-gram index can look up most of the answer) and
`free` (a question, where it can look up little); each greedy and with the sampling that Qwen2.5 recommends. Tokens/s
are those after the first token, the median of the runs; the modes take turns, so that a busy moment hits all of them.
Says how many of the first tokens are those of the answer without speculation (on a GPU in bf16 rounding differs, and
may part them).
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from results import write_result

from qwench.engine import Engine, EngineConfig
from qwench.model.checkpoint import locate
from qwench.model.load import load_model
from qwench.ops.hardware import pick_device
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

SOURCE = Path(__file__).resolve().parents[1] / "qwench" / "engine" / "blocks.py"
QUESTIONS = {
    "copy": f"Repeat this file, but rename `num_free` to `free_count`. Only the code.\n```python\n"
    f"{SOURCE.read_text(encoding='utf-8')}```",
    "free": "Explain in some paragraphs how a B-tree keeps its balance when keys are inserted and deleted.",
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "recommended": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "seed": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="a small model of the same family")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of an answer")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", default="speculative", help="of the result file")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    tokenizer = Tokenizer.load(locate(args.model))
    model = load_model(locate(args.model), device=device, dtype=dtype)
    modes: dict[str, dict[str, Any]] = {"off": {}, "ngram": {"speculate": "ngram"}}
    if args.draft is not None:
        modes["draft"] = {"speculate": "draft", "draft_model": str(args.draft)}
    shared = {"max_len": 4096, "cache_tokens": 8192, "max_seqs": 4, "draft_tokens": args.draft_tokens}
    engines = {
        mode: Engine(model, tokenizer=tokenizer, config=EngineConfig(**shared, **settings))
        for mode, settings in modes.items()
    }
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "dtype": str(dtype), "new_tokens": args.tokens, "draft_tokens": args.draft_tokens,
    }  # fmt: skip
    for load, question in QUESTIONS.items():
        prompt = tokenizer.render([{"role": "user", "content": question}])
        for name, sampling in SAMPLINGS.items():
            params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, **sampling)
            figures[f"{load}, {name}"] = compare(engines, prompt, params, args.repeat)
    for engine in engines.values():
        engine.close()
    write_result(args.name, figures)


def compare(engines: dict[str, Engine], prompt: list[int], params: SamplingParams, repeat: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {mode: [] for mode in engines}
    tokens: dict[str, list[int]] = {}
    shares: dict[str, float] = {}
    for round_ in range(repeat + 1):  # the first one warms up, and on a GPU records the steps
        for mode, engine in engines.items():
            before = engine.stats()
            rate, tokens[mode] = timed(engine, prompt, params)
            after = engine.stats()
            drafted = after.draft_tokens - before.draft_tokens
            shares[mode] = (after.accepted_draft_tokens - before.accepted_draft_tokens) / max(drafted, 1)
            if round_:
                rates[mode].append(rate)
    found: dict[str, Any] = {}
    for mode in engines:
        pairs = zip(tokens[mode], tokens["off"], strict=True)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        found[mode] = {
            "tokens_per_s": round(statistics.median(rates[mode]), 2), "runs": [round(rate, 2) for rate in rates[mode]],
            "times_off": round(statistics.median(rates[mode]) / statistics.median(rates["off"]), 2),
            "accepted": round(shares[mode], 3), "equal_tokens": same,
        }  # fmt: skip
        print(f"{len(prompt)} tokens in, {params.max_tokens} out, {mode:6}", found[mode], flush=True)
    return found


def timed(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[float, list[int]]:
    """Tokens per second after the first chunk, and the answer."""
    tokens: list[int] = []
    started, first = 0.0, 0
    for chunk in engine.stream(prompt, params):
        tokens += chunk.token_ids
        if not started:
            started, first = time.perf_counter(), len(tokens)
    return (len(tokens) - first) / (time.perf_counter() - started), tokens


if __name__ == "__main__":
    main()
