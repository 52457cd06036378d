"""The same training run under several layouts: losses against one process's, tokens/s and what each loses by sharing.

    python benchmarks/pretrain_parallel.py 0.5b --gpus 2 --layouts shard=2,replicate=2,tensor=2,context=2,pipeline=2
    python benchmarks/pretrain_parallel.py 1.5b --gpus 4 --side-by-side --layouts tensor=2,context=2,pipeline=2,shard=4
    python benchmarks/pretrain_parallel.py tiny --gpus 2 --device cpu --seq-len 256 --steps 3

Each layout is a run of `qwench pretrain` as a user starts it, with its launcher, loader, records and checkpoint, on
random tokens; "one" is one process with the same rows a step. A layout is AXIS=N, several axes joined by "+", further
keys of the recipe too ("tensor=2+loop.remat=none"), and takes as many GPUs as its axes multiply to. Efficiency is
tokens/s of a GPU over that of "one". --side-by-side runs layouts at the same time where they fit on different GPUs:
less time on a rented host, at the price of sharing its processors. The three steps after the timed ones are profiled:
the shares of rank 0's time by category.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pretrain_speed import make_shards, shape_arguments
from results import write_result

from qwench.parallel.launch import job_size
from qwench.tokenizer import train
from qwench.train.profile import NUM_STEPS

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


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
    parser.add_argument("--side-by-side", action="store_true", help="layouts at once that fit on different GPUs")
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
        for wave in waves(["one", *args.layouts.split(",")], args.gpus if args.side_by_side else 0):
            with ThreadPoolExecutor(len(wave)) as pool:
                measured = pool.map(lambda placed: measure(args, Path(room), *placed), wave)
            for (layout, _), found in zip(wave, measured, strict=True):
                one = figures["layouts"].get("one", {})
                if "losses" in found and "losses" in one:
                    pairs = list(zip(found["losses"], one["losses"], strict=True))
                    found["loss_differs"] = max(abs(loss - want) / want for loss, want in pairs)
                    found["efficiency"] = round(found["tokens_per_s"] / one["tokens_per_s"] / num_gpus(layout), 3)
                figures["layouts"][layout] = found
                print(layout, summary(found), flush=True)
    write_result(args.name or f"pretrain_parallel_{args.shape}", figures)


def num_gpus(layout: str) -> int:
    """The product of a layout's axes."""
    parts = [part.split("=") for part in layout.split("+") if "." not in part and "=" in part]
    if unknown := [name for name, _ in parts if name not in AXES]:
        raise SystemExit(f"unknown axis {unknown[0]!r} in {layout!r}; there are {', '.join(AXES)}")
    return math.prod(int(size) for _, size in parts)


def waves(layouts: list[str], gpus: int) -> list[list[tuple[str, int]]]:
    """Layouts that run at once, each with its first GPU; with `gpus` 0 one after the other."""
    found: list[list[tuple[str, int]]] = []
    taken = gpus
    for layout in layouts:
        if taken + num_gpus(layout) > gpus:
            found.append([])
            taken = 0
        found[-1].append((layout, taken))
        taken += num_gpus(layout)
    return found


def measure(args: argparse.Namespace, room: Path, layout: str, first_gpu: int) -> dict[str, Any]:
    out = room / layout.replace("=", "_").replace("+", "_")
    settings = [
        f"out={out}", f"tokenizer={room / 'tokenizer'}", f"train_shards={room / 'shards'}", "attend_across=true",
        f"seq_len={args.seq_len}", f"loop.profile_step={args.warmup + args.steps + 1}",
        f"loop.steps={args.warmup + args.steps + NUM_STEPS}", f"loop.batch_rows={args.batch_rows}",
        f"loop.micro_batch_rows={args.micro_batch_rows}", f"loop.device={args.device}", "schedule.warmup_steps=50",
        "checkpoint.every_steps=1000000", *shape_arguments(args.shape), *args.set,
    ]  # fmt: skip
    if layout != "one":
        parts = [part if "." in part else f"parallel.{part}" for part in layout.split("+")]
        settings += [f"gpus={num_gpus(layout)}", *parts]
    command = [sys.executable, "-m", "qwench.cli", "pretrain", *settings]
    started = time.perf_counter()
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(number) for number in range(args.gpus)]
    visible = gpus[first_gpu : first_gpu + num_gpus(layout)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        return {"failed": (done.stderr or done.stdout)[-1500:]}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    timed = steps[args.warmup : args.warmup + args.steps]
    profile = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)  # 12 GiB of states and more for every billion parameters
    return {
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in timed), 1),
        "mfu": statistics.median(record["mfu"] for record in timed),
        "peak_gib": max((record.get("peak_memory_gib") or 0.0) for record in steps),
        "whole_run_s": round(seconds, 1),
        "profile": profile,
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
