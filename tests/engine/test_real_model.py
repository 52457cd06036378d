"""The published Qwen2.5-Coder-0.5B-Instruct: it speaks, and its conversion means the same to transformers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwench import Engine, SamplingParams
from qwench.cli import main

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
GGUF = ASSETS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
QUESTION = "Write a Python function that returns the n-th Fibonacci number."

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF.exists(), reason=f"no {GGUF.name} in QWENCH_ASSETS ({ASSETS})"),
]


def test_conversion_gives_transformers_the_same_tokens(tmp_path: Path) -> None:
    """GGUF -> Hugging Face directory; 64 greedy tokens of transformers there equal ours from the GGUF file, in fp32."""
    assert main(["convert", str(GGUF), str(tmp_path / "hf")]) == 0
    engine = Engine(GGUF, device="cpu", dtype="float32")
    ids = engine.tokenizer.render([{"role": "user", "content": QUESTION}])
    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": QUESTION}]
    assert theirs_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids

    started = time.perf_counter()
    mine = engine.generate([ids], SamplingParams(temperature=0, max_tokens=64))[0]
    ours_s = time.perf_counter() - started
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    started = time.perf_counter()
    want = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=64,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
    )[0, len(ids) :].tolist()
    theirs_s = time.perf_counter() - started
    print(f"64 tokens in fp32: ours {64 / ours_s:.1f} tokens/s, transformers {64 / theirs_s:.1f} tokens/s")
    assert mine.token_ids == want
    assert "def fib" in mine.text


def test_it_answers_in_english_and_chinese() -> None:
    engine = Engine(GGUF, device="cpu", dtype="bfloat16")
    params = SamplingParams(temperature=0, max_tokens=96)
    code = engine.generate([engine.tokenizer.render([{"role": "user", "content": QUESTION}])], params)[0].text
    assert "def fib" in code
    chinese = engine.generate(
        [engine.tokenizer.render([{"role": "user", "content": "用一句话介绍什么是斐波那契数列。"}])], params
    )[0].text
    assert "斐波那契" in chinese
