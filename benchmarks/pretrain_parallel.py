"""The same training run under several layouts: losses against one process's, tokens/s and what each loses by sharing.

    python benchmarks/pretrain_parallel.py 0.5b --gpus 2 --layouts shard=2,replicate=2,tensor=2,context=2,pipeline=2
    python benchmarks/pretrain_parallel.py tiny --gpus 2 --device cpu --seq-len 256 --steps 3

Each layout is a run of `qwench pretrain` as a user starts it, with its launcher, loader, records and checkpoint, on
random tokens; "one" is one process with the same rows a step. A layout is AXIS=N, several axes joined by "+", further
keys of the recipe too ("tensor=2+loop.remat=none"). Efficiency is tokens/s of a GPU over that of "one".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pretrain_speed import make_shards, shape_arguments
from results import write_result

from qwench.parallel.launch import job_size
from qwench.tokenizer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="as in pretrain_speed.py")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layouts", default="shard=2,replicate=2,tensor=2,context=2,pipeline=2")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--micro-batch-rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--set", action="append", default=[], help="key=value for all layouts")
    parser.add_argument("--name", help="of the result file")
    args = parser.parse_args()
    assert job_size(1, False) == 1, "start this without torchrun"
    figures: dict[str, Any] = {key: getattr(args, key) for key in ("shape", "gpus", "batch_rows", "seq_len", "steps")}
    figures["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    figures["layouts"] = {}
    with tempfile.TemporaryDirectory() as room:
        tokenizer = train(["a few words of text to train on"], 278)
        tokenizer.save(Path(room) / "tokenizer")
        make_shards(args, Path(room) / "shards", tokenizer)
        for layout in ["one", *args.layouts.split(",")]:
            found = measure(args, Path(room), layout)
            one = figures["layouts"].get("one", {})
            if "losses" in found and "losses" in one:
                pairs = list(zip(found["losses"], one["losses"], strict=True))
                found["loss_differs"] = max(abs(loss - want) / want for loss, want in pairs)
                found["efficiency"] = round(found["tokens_per_s"] / one["tokens_per_s"] / args.gpus, 3)
            figures["layouts"][layout] = found
            print(layout, summary(found), flush=True)
    write_result(args.name or f"pretrain_parallel_{args.shape}", figures)


def measure(args: argparse.Namespace, room: Path, layout: str) -> dict[str, Any]:
    out = room / layout.replace("=", "_").replace("+", "_")
    settings = [
        f"out={out}", f"tokenizer={room / 'tokenizer'}", f"train_shards={room / 'shards'}", "attend_across=true",
        f"seq_len={args.seq_len}", f"loop.steps={args.warmup + args.steps}", f"loop.batch_rows={args.batch_rows}",
        f"loop.micro_batch_rows={args.micro_batch_rows}", f"loop.device={args.device}", "schedule.warmup_steps=5",
        "checkpoint.every_steps=1000000", *shape_arguments(args.shape), *args.set,
    ]  # fmt: skip
    if layout != "one":
        parts = [part if "." in part else f"parallel.{part}" for part in layout.split("+")]
        settings += [f"gpus={args.gpus}", *parts]
    command = [sys.executable, "-m", "qwench.cli", "pretrain", *settings]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        return {"failed": (done.stderr or done.stdout)[-1500:]}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    timed = steps[args.warmup :]
    return {
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in timed), 1),
        "mfu": statistics.median(record["mfu"] for record in timed),
        "peak_gib": max((record.get("peak_memory_gib") or 0.0) for record in steps),
        "whole_run_s": round(seconds, 1),
        "losses": [record["loss"] for record in steps],
        "grad_norms": [record["grad_norm"] for record in steps],
    }


def summary(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"FAILED: {found['failed']}"
    text = (
        f"{found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%}, peak {found['peak_gib']:.1f} GiB, "
        f"whole run {found['whole_run_s']} s, loss {found['losses'][0]:.5f} to {found['losses'][-1]:.5f}"
    )
    if "efficiency" in found:
        text += f", efficiency {found['efficiency']:.0%}, losses differ by {found['loss_differs']:.1e}"
    return text


if __name__ == "__main__":
    main()
