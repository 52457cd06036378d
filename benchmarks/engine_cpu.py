"""Serving on the CPU: the engine beside transformers and llama.cpp, in turns, in one run.

    python benchmarks/engine_cpu.py MODEL_DIRECTORY --dtype bfloat16 \\
        [--node-modules DIR --gguf FILE.gguf [--gguf FILE2.gguf]] [--rounds 5]

MODEL_DIRECTORY is in Hugging Face's format (`qwench convert` writes it from a GGUF file). llama.cpp is measured through
node-llama-cpp on each GGUF file given. Workloads: 1, 4 and 8 prompts of 64 tokens, and 8 of 960, answered at the same
time, greedily; and one prompt of 512 tokens read. The contestants take turns. A decoding step's time is the 20th
percentile over the gaps between tokens of all rounds, a prompt's time the least of the rounds: a disturbance by other
processes only ever adds time. The median stands beside it, and how many cores others used meanwhile. Prints the
roofline of one stream: the rate of reading memory over the bytes of a token.
"""

from __future__ import annotations

import os

# Before torch is imported: threads that wait do not spin for long, and torch puts large tensors on large pages.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate_cpu import memory_rate
from results import write_result
from transformers import AutoModelForCausalLM

from qwench import Engine, SamplingParams
from qwench.engine.config import EngineConfig
from qwench.ops.hardware import cpu_features

Answers = list[list[int]]
Arrivals = list[float]
"""Seconds from the start at which each token of the first prompt's answer arrived."""
Contestant = Callable[[Answers, int], tuple[Answers, Arrivals]]


@dataclass(frozen=True)
class Workload:
    name: str
    num_prompts: int
    prompt_tokens: int
    new_tokens: int


LLAMA_PROMPT_TOKENS = 1024
"""Most prompt tokens of a workload for llama.cpp; more take it minutes here where anything else runs, as it spins."""
WORKLOADS = (
    Workload("1 stream", 1, 64, 48),
    Workload("4 streams", 4, 64, 32),
    Workload("8 streams", 8, 64, 32),
    Workload("8 streams, 960-token prompts", 8, 960, 24),
    Workload("prompt of 512", 1, 512, 1),
)


@dataclass(frozen=True)
class Run:
    arrivals: Arrivals
    others: float
    """Cores that other processes used meanwhile, on average."""


def _busy_s(pids: list[int]) -> tuple[float, float]:
    """Processor seconds of the machine, and of the given processes, since they started."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(fields[:8]) - fields[3] - fields[4]
    own = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own += int(stat[11]) + int(stat[12])
    return busy / tick, own / tick


def _wait_for_quiet(pids: list[int], patience: float) -> None:
    """Return when other processes have left the processor alone for half a second, or after `patience` seconds."""
    give_up = time.perf_counter() + patience
    while time.perf_counter() < give_up:
        before, own_before = _busy_s(pids)
        time.sleep(0.5)
        after, own_after = _busy_s(pids)
        if (after - before) - (own_after - own_before) < 0.05:
            return


class LlamaCpp:
    """One process of `llama_cpp.mjs`."""

    def __init__(self, packages: Path, gguf: Path) -> None:
        script = Path(__file__).with_name("llama_cpp.mjs")
        command = ["node", script, packages, gguf, torch.get_num_threads(), 8, 1024]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.system = str(self._line()["system"])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp ended early; see its message above")
        return json.loads(line)

    def __call__(self, prompts: Answers, new_tokens: int) -> tuple[Answers, Arrivals]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        done = self._line()
        return done["tokens"], done["arrivals"]


def _engine(path: Path, dtype: str) -> tuple[Contestant, Engine]:
    # One step at a time, so that every token's arrival is seen; by default several may be launched in a row.
    settings = EngineConfig(prefix_caching=False, cache_tokens=16384, max_len=2048, max_seqs=8, decode_steps=1)
    engine = Engine(path, device="cpu", dtype=dtype, config=settings)

    async def answer(prompt: list[int], params: SamplingParams, arrivals: Arrivals, started: float) -> list[int]:
        tokens: list[int] = []
        async for chunk in engine.astream(prompt, params):
            arrivals.extend([time.perf_counter() - started] * len(chunk.token_ids))
            tokens.extend(chunk.token_ids)
        return tokens

    async def answers(prompts: Answers, new_tokens: int) -> tuple[Answers, Arrivals]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        arrivals: list[Arrivals] = [[] for _ in prompts]
        started = time.perf_counter()
        each = [answer(prompt, params, at, started) for prompt, at in zip(prompts, arrivals, strict=True)]
        return await asyncio.gather(*each), arrivals[0]

    return lambda prompts, new_tokens: asyncio.run(answers(prompts, new_tokens)), engine


class _Clock:
    """A streamer of transformers that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _transformers(path: Path, dtype: str) -> Contestant:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    def generate(prompts: Answers, new_tokens: int) -> tuple[Answers, Arrivals]:
        clock = _Clock()
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, streamer=clock,
        )  # fmt: skip
        first, *times = clock.times  # the prompt itself comes first, at once
        return out[:, ids.shape[1] :].tolist(), [at - first for at in times]

    return generate


def _figure(runs: list[Run], workload: Workload) -> dict[str, float]:
    if workload.new_tokens == 1:
        counted, times = workload.num_prompts * workload.prompt_tokens, sorted(run.arrivals[0] for run in runs)
        undisturbed = times[0]
    else:
        gaps = (b - a for run in runs for a, b in itertools.pairwise(run.arrivals))
        counted, times = workload.num_prompts, sorted(gaps)
        undisturbed = times[len(times) // 5]
    return {
        "tokens_per_s": counted / undisturbed,
        "median_tokens_per_s": counted / statistics.median(times),
        "others_cores": statistics.median(run.others for run in runs),
        "rounds": len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--node-modules", type=Path, help="folder that holds node-llama-cpp")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="file for llama.cpp, any number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=2, help="seconds to wait for a quiet machine before a run")
    parser.add_argument("--only", help="measure the workload of this name alone, and write no result")
    options = parser.parse_args()
    workloads = [workload for workload in WORKLOADS if options.only in (None, workload.name)]
    if not workloads:
        parser.error(f"no workload {options.only!r}; there are: {', '.join(workload.name for workload in WORKLOADS)}")
    if options.gguf and options.node_modules is None:
        parser.error("--gguf needs --node-modules, the folder that holds node-llama-cpp")

    features = cpu_features()
    print(f"{torch.get_num_threads()} threads, {', '.join(features)}")
    rate = memory_rate()
    ours, engine = _engine(options.model, options.dtype)
    contestants: dict[str, Contestant] = {"qwench": ours, "transformers": _transformers(options.model, options.dtype)}
    pids = [os.getpid()]
    for gguf in options.gguf:
        llama = LlamaCpp(options.node_modules, gguf)
        pids.append(llama.process.pid)
        contestants[f"llama.cpp {gguf.stem}"] = llama

    # Any real text will do; the same ids for everybody.
    text = (Path(__file__).parents[1] / "docs" / "decisions.md").read_text(encoding="utf-8")
    ids = engine.tokenizer.encode(text)
    figures: dict[str, Any] = {}
    for workload in workloads:
        size = workload.prompt_tokens
        stream = ids * (1 + workload.num_prompts * size // len(ids))
        prompts = [stream[i * size : (i + 1) * size] for i in range(workload.num_prompts)]
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        answers: dict[str, Answers] = {}
        those = {
            name: generate
            for name, generate in contestants.items()
            if not isinstance(generate, LlamaCpp) or workload.num_prompts * size <= LLAMA_PROMPT_TOKENS
        }
        for warm in range(-1, options.rounds):
            for name, generate in those.items():
                new_tokens = workload.new_tokens if warm >= 0 else min(2, workload.new_tokens)
                _wait_for_quiet(pids, options.patience)
                busy, own = _busy_s(pids)
                started = time.perf_counter()
                answers[name], arrivals = generate(prompts, new_tokens)
                seconds = time.perf_counter() - started
                busy_after, own_after = _busy_s(pids)
                if warm >= 0:
                    others = max(0.0, (busy_after - busy) - (own_after - own)) / seconds
                    runs[name].append(Run(arrivals, others))
                    print(f"    {name}: {seconds:.2f} s, others {others:.2f} cores", file=sys.stderr, flush=True)
        print(workload.name)
        figures[workload.name] = {}
        for name in those:
            figure = figures[workload.name][name] = _figure(runs[name], workload)
            same = sum(a == b for a, b in zip(answers[name], answers["qwench"], strict=True))
            figure["answers_equal_to_qwench"] = same
            print(
                f"  {name:40} {figure['tokens_per_s']:8.2f} tokens/s  median {figure['median_tokens_per_s']:8.2f}"
                f"  others {figure['others_cores']:.2f} cores  {same}/{len(prompts)} answers equal",
                flush=True,
            )
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    embedding = engine.model.model.embed_tokens.weight
    tied = engine.model.config.tie_word_embeddings
    read = weights if tied else weights - embedding.numel() * embedding.element_size()
    print(f"roofline of one stream {rate / read:.2f} tokens/s ({read / 1e9:.2f} GB a token at {rate / 1e9:.1f} GB/s)")
    engine.close()
    if options.only is not None:
        return
    write_result(
        f"engine_cpu_{options.dtype}",
        {
            "workloads": figures,
            "roofline_1_stream": rate / read,
            "memory_gb_per_s": rate / 1e9,
            "cpu_features": features,
            "threads": torch.get_num_threads(),
            "environment": {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")},
            "load_average": os.getloadavg()[1],
        },
    )


if __name__ == "__main__":
    main()
