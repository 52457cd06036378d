"""Greedy generation on the CPU, one sequence: qwench beside transformers on the same Hugging Face directory.

    python benchmarks/generate_cpu.py MODEL_DIRECTORY [dtype]

Prints tokens/s (the median of three runs of 64 tokens, prompt included) and the roofline: the rate of
reading memory over the weight bytes of a token. Says whether the tokens of both are equal.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import statistics
import sys
import time

import torch
from results import write_result
from transformers import AutoModelForCausalLM

from qwench import Engine, SamplingParams

QUESTION = "Write a Python function that returns the n-th Fibonacci number."
NEW_TOKENS = 64


def memory_rate() -> float:
    """Bytes per second of reading memory: the sum of a large tensor, the best of five."""
    big = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - started)
    return big.numel() * 4 / best


def main(path: str, dtype: str) -> None:
    rate = memory_rate()
    engine = Engine(path, device="cpu", dtype=dtype)
    ids = engine.tokenizer.render([{"role": "user", "content": QUESTION}])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    prompt = torch.tensor([ids])

    def ours() -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        return engine.generate([ids], params)[0].token_ids

    def transformers() -> list[int]:
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        )  # fmt: skip
        return out[0, len(ids) :].tolist()

    figures: dict[str, float] = {}
    tokens = []
    for name, generate in (("qwench", ours), ("transformers", transformers)):
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            answer = generate()
            seconds.append(time.perf_counter() - started)
        tokens.append(answer)
        figures[name] = NEW_TOKENS / statistics.median(seconds)
        print(f"{name:14} {figures[name]:6.2f} tokens/s")
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    embedding = engine.model.model.embed_tokens.weight
    read = (
        weights if engine.model.config.tie_word_embeddings else weights - embedding.numel() * embedding.element_size()
    )
    roofline = rate / read
    print(f"roofline       {roofline:6.2f} tokens/s ({read / 1e9:.2f} GB a token at {rate / 1e9:.1f} GB/s)")
    write_result(
        f"generate_cpu_{dtype}", {"tokens_per_s": figures, "roofline": roofline, "equal": tokens[0] == tokens[1]}
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "float32")
