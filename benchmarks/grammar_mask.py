"""Constrained decoding on the real vocabulary: building it, compiling grammars, the masks of answers that follow them.

    python benchmarks/grammar_mask.py QWEN_TIKTOKEN

Each grammar writes random answers (any allowed token with equal chance, which visits rarer states than a model does).
Milliseconds: a new grammar's compilation with its first mask, a known one's, the median and 99th percentile and the
worst of single masks, and the time of a batch of 64 masks of 64 answers at different places, over 64.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from results import write_result

from qwench.engine.grammar import GrammarCompiler, fill_masks, tool_grammar
from qwench.tokenizer import Tokenizer
from qwench.types import Grammar

ROWS, BATCH, ANSWERS, TOKENS = 151_936, 64, 12, 80
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tools(count: int) -> list[dict[str, object]]:
    return [{"type": "function", "function": {"name": f"tool_{i}", "parameters": PERSON}} for i in range(count)]


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def main(path: Path) -> None:
    tok = Tokenizer.load(path)
    tok.encode("warm")
    started = time.perf_counter()
    compiler = GrammarCompiler(tok, ROWS)
    _ = compiler.lltokenizer, compiler.legal_mask, compiler.end_mask
    build_s = time.perf_counter() - started
    compiler.compile(Grammar(kind="regex", value="a"))  # starts the compiling threads
    print(f"vocabulary of {tok.vocab_size} tokens: {build_s:.2f} s, once a process")

    grammars: dict[str, Grammar | None] = {
        "json_object": Grammar(kind="json_object"),
        "json_schema (person)": Grammar(kind="json_schema", value=json.dumps(PERSON)),
        "regex (dates)": Grammar(kind="regex", value=r"(\d{4}-\d{2}-\d{2}, ){10,}"),
        "choice (10,000)": Grammar(kind="choice", value=json.dumps([f"answer number {i}" for i in range(10_000)])),
        "tools, auto (10)": tool_grammar(tok, tools(10), "auto", True),
        "tools, required (100)": tool_grammar(tok, tools(100), "required", True),
    }
    figures: dict[str, dict[str, float]] = {}
    rng = random.Random(0)
    for name, grammar in grammars.items():
        assert grammar is not None
        started = time.perf_counter()
        first = compiler.compile(grammar)
        new_s = time.perf_counter() - started
        del first
        started = time.perf_counter()
        compiler.compile(grammar)
        known_s = time.perf_counter() - started
        row, seconds, places = np.empty(compiler.num_words, np.int32), [], []
        for _ in range(ANSWERS):
            matcher = compiler.compile(grammar)
            for _ in range(TOKENS):
                started = time.perf_counter()
                matcher.fill_mask(row)
                seconds.append(time.perf_counter() - started)
                ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
                ids = [token for token in ids.tolist() if token not in compiler.eos_token_ids]
                if not ids:
                    break
                matcher.consume(rng.choice(ids))
                if len(places) < BATCH and not matcher.is_finished and rng.random() < 0.2:
                    places.append(matcher.copy())
        while len(places) < BATCH:
            places.append(rng.choice(places).copy())
        rows = np.empty((BATCH, compiler.num_words), np.int32)
        batches = []
        for _ in range(20):
            fresh = [place.copy() for place in places]  # a mask is remembered until the next token
            started = time.perf_counter()
            fill_masks(fresh, rows)
            batches.append((time.perf_counter() - started) / BATCH)
        figures[name] = {
            "compile_new_ms": ms(new_s),
            "compile_known_ms": ms(known_s),
            "mask_median_ms": ms(statistics.median(seconds)),
            "mask_p99_ms": ms(float(np.quantile(seconds, 0.99))),
            "mask_worst_ms": ms(max(seconds)),
            "batch_mask_ms": ms(statistics.median(batches)),
            "masks": len(seconds),
        }
        line = "   ".join(f"{key.removesuffix('_ms')} {value:8.3f}" for key, value in figures[name].items())
        print(f"{name:22} {line}")
    write_result("grammar_mask", {"build_s": build_s, "cores": os.cpu_count(), "batch": BATCH, "grammars": figures})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
