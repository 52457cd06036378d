"""Write the tables of README and docs from benchmarks/results/*.json: no number stands there without its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def figures(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))["figures"]


def rows() -> list[str]:
    encode = figures("tokenizer_encode")["encoders"]
    ours, theirs, openai = (
        f"{encode[name]['mb_per_s']:.1f} (first pass {encode[name]['first_pass_mb_per_s']:.1f})" for name in encode
    )
    lines = [
        "| on 2 cores of a Xeon with AMX | qwench | peers | ceiling |",
        "|---|---|---|---|",
        f"| encoding Python sources, 1 thread, words seen before, MB/s | {ours} "
        f"| tokenizers {theirs}, tiktoken {openai} | |",
    ]
    for dtype in ("float32", "bfloat16"):
        result = figures(f"generate_cpu_{dtype}")
        speed = result["tokens_per_s"]
        same = "same tokens" if result["equal"] else "other tokens"
        lines.append(
            f"| Qwen2.5-Coder-0.5B, {dtype}, greedy, tokens/s | {speed['qwench']:.1f} "
            f"| transformers {speed['transformers']:.1f} ({same}) | {result['roofline']:.1f} (memory) |"
        )
    loads = figures("engine_cpu_bfloat16")["workloads"]
    for load in ("1 stream", "4 streams", "8 streams"):
        rates = {name: run["tokens_per_s"] for name, run in loads[load].items()}
        named = {"llama.cpp bf16": "bf16", "llama.cpp q4_k_m": "q4_k_m"}
        peers = [f"transformers {rates['transformers']:.1f}"]
        peers += [f"{label} {rates[name]:.1f}" for label, end in named.items() for name in rates if name.endswith(end)]
        lines.append(
            f"| the same model served, bf16, {load}, tokens/s | {rates['qwench']:.1f} | {', '.join(peers)} | |"
        )
    return lines


SHAPES = ("0.5b", "1.5b", "7b")


def engine_rows() -> list[str]:
    """The engine on one GPU beside vLLM: medians, the floor of the load in brackets."""
    vllm = figures("vllm_h200")
    ours = {shape: figures(f"engine_offline_{shape}") for shape in SHAPES}
    lines = [
        "",
        "| one H200, bf16, Qwen2.5 shapes: qwench / vLLM 0.25.1 (floor) | 0.5B | 1.5B | 7B |",
        "|---|---|---|---|",
    ]
    for case, label in (
        ("throughput", "256 sequences, 100-1024 in, 100-1024 out, output tokens/s"),
        ("single", "one stream, 128 in, 512 out, tokens/s"),
        ("batch", "1024 sequences, 512 in, 256 out, total tokens/s"),
    ):
        peer = {shape: vllm[shape].get(f"{case}_graphs_1024", vllm[shape][case]) for shape in SHAPES}
        cells = [
            f"{ours[shape][case]['median']:,.0f} / {peer[shape]:,.0f} ({ours[shape][case]['floor']:,.0f})"
            for shape in SHAPES
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for length in ("32768", "131072"):
        cells = []
        for shape in SHAPES:
            mine = ours[shape]["ttft"][length]
            cells.append(f"{mine['median']:.3f} / {vllm[shape]['ttft'][length]:.3f} ({mine['floor']:.3f})")
        lines.append(f"| first token of a prompt of {int(length):,} tokens, s | {' | '.join(cells)} |")
    return lines


def training_rows() -> list[str]:
    """Pretraining steps on one GPU beside peers: tokens/s, share of the datasheet's rate, memory taken."""
    peers = figures("pretrain_peers_h200")
    runs = {shape: figures(f"pretrain_{shape}")["variants"] for shape in SHAPES}
    rows = {shape: figures(f"pretrain_{shape}")["batch_rows"] for shape in SHAPES}
    heads = " | ".join(f"{shape.upper()}, {rows[shape]} rows" for shape in SHAPES)
    lines = ["", f"| one H200, rows of 4,096 tokens: tokens/s, MFU, GiB | {heads} |", "|---|---|---|---|"]
    for label, wanted in (("qwench, bf16", False), ("qwench, FP8 products", True)):
        cells = []
        for shape in SHAPES:
            found = [run for name, run in runs[shape].items() if ("fp8" in name) == wanted and "tokens_per_s" in run]
            best = max(found, key=lambda run: run["tokens_per_s"], default=None)
            cells.append(f"{best['tokens_per_s']:,.0f}, {best['mfu']:.1%}, {best['reserved_gib']:.0f}" if best else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for name in ("torchtitan", "transformers + liger"):
        cells = ["{:,.0f}, {:.0f} GiB".format(*peers[shape][name]) if shape in peers else "-" for shape in SHAPES]
        lines.append(f"| {name}, bf16 | {' | '.join(cells)} |")
    return lines


def whole_run_rows() -> list[str]:
    """The same training run on real text by qwench and by transformers, records and all."""
    lines = [
        "",
        "| the same pretraining run on real text | qwench, tokens/s | transformers | ratio | losses |",
        "|" + "---|" * 5,
    ]
    for name, label in (
        ("pretrain_curve", "0.5B shape, one H200, bf16, 88 million tokens; transformers with Liger"),
        ("pretrain_curve_cpu", "the demo's shape, 2 CPU cores, fp32, rows of 512"),
    ):
        run = figures(name)
        speed, apart = run["tokens_per_s"], run["difference"]
        curves = f"means of {run['mean_of_steps']} steps differ by {apart['largest']:.1g} at most"
        if apart["noise"]:
            curves += f", noise {apart['noise']:.1g}"
        lines.append(
            f"| {label} | {speed['qwench']:,.0f} | {speed['transformers']:,.0f} | {run['ratio']:.2f} | {curves} |"
        )
    return lines


TASKS = {
    "humaneval": "HumanEval", "gsm8k": "GSM8K, half", "ifeval": "IFEval, half", "mmlu": "MMLU, 29 subjects",
    "cmmlu": "CMMLU, 34 subjects", "cruxeval_i": "CRUXEval inputs, reasoning", "fim": "filling in the middle",
}  # fmt: skip


def evaluation_rows() -> list[str]:
    """Scores and seconds of the same tasks through qwench and through lm-eval's backend for transformers."""
    lines = ["| task | questions | qwench | transformers | qwench, s | transformers, s | ratio |", "|" + "---|" * 7]
    for name, label in TASKS.items():
        task = figures("eval_peer")["tasks"][name]
        seconds, error = task["seconds"], 100 * task["standard_error_of_difference_if_independent"]
        scores = f"{100 * task['qwench']:.1f} | {100 * task['transformers']:.1f} (± {error:.1f})"
        times = f"{seconds['qwench']:.1f} | {seconds['transformers']:.1f} | {task['times_as_fast']:.1f}"
        lines.append(f"| {label} | {task['n']:,} | {scores} | {times} |")
    return lines


def fill(path: Path, marker: str, lines: list[str]) -> None:
    """Put lines between `<!-- marker -->` and `<!-- /marker -->`."""
    table = "\n".join([f"<!-- {marker} -->", *lines, f"<!-- /{marker} -->"])
    pattern = rf"<!-- {marker} -->.*?<!-- /{marker} -->"
    text, count = re.subn(pattern, lambda _: table, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert count == 1, f"{path.name} needs one pair of markers {marker}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    fill(README, "benchmarks", [*rows(), *engine_rows(), *training_rows(), *whole_run_rows()])
    fill(README, "eval_peer", evaluation_rows())
    fill(README.parent / "docs" / "evaluation.md", "eval_peer", evaluation_rows())


if __name__ == "__main__":
    main()
