"""The memory plan beside real training steps: predicted and measured peak of each setting, on this machine's GPUs.

    python benchmarks/memory_plan.py [--only TEXT] [--gpus N] [--out NAME]

Each setting runs three optimiser steps of the usual training loop's own parts on random tokens (its weights are random
too; memory does not depend on them). Measured is torch's peak of allocated bytes in the second and third step, when the
optimiser has its states, on the rank where it is highest; "reserved" is what torch held of the device for it. The plan
counts what is allocated. Settings that run out of memory are reported as such.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_result

from qwench import config
from qwench.data.packing import PackedRow
from qwench.ops import dispatch
from qwench.ops.cross_entropy import adds_to_fp32
from qwench.parallel.layout import Layout, Team
from qwench.tokenizer import Tokenizer, train
from qwench.train.config import PretrainConfig
from qwench.train.job import open_run, run_stage, sizes_of
from qwench.train.layouts import workload_of
from qwench.train.loop import Trainer
from qwench.train.memory import GIB, memory_plan
from qwench.train.prepare import forced_operations, prepare_model
from qwench.train.start import model_config

ONE_GPU = (
    "qwen2.5-0.5b rows=16 remat=none",
    "qwen2.5-0.5b rows=16 remat=elementwise",
    "qwen2.5-0.5b rows=16 remat=mlp",
    "qwen2.5-0.5b rows=16 remat=attention",
    "qwen2.5-0.5b rows=16 remat=full",
    "qwen2.5-0.5b rows=8 micro=4 remat=elementwise",
    "qwen2.5-0.5b rows=1 remat=elementwise",
    "qwen2.5-0.5b rows=8 remat=elementwise compile=off",
    "qwen2.5-0.5b rows=8 remat=elementwise fp8=on",
    "qwen2.5-0.5b rows=8 remat=elementwise optim=muon",
    "qwen2.5-0.5b rows=8 remat=elementwise states=bf16",
    "qwen2.5-1.5b rows=8 remat=elementwise",
    "qwen2.5-1.5b rows=8 micro=2 remat=mlp",
    "qwen2.5-7b rows=1 remat=full",
)
SEVERAL_GPUS = (
    "qwen2.5-1.5b rows=8 remat=elementwise",
    "qwen2.5-1.5b rows=16 micro=2 remat=elementwise",
    "qwen2.5-1.5b rows=16 micro=2 remat=elementwise accumulate=shards",
    "qwen2.5-1.5b rows=8 remat=elementwise tensor=2",
    "qwen2.5-1.5b rows=8 remat=elementwise context=2",
    "qwen2.5-1.5b rows=16 micro=2 remat=elementwise pipeline=2",
    "qwen2.5-7b rows=8 micro=1 remat=elementwise accumulate=shards",
)
KEYS = {
    "rows": "loop.batch_rows", "micro": "loop.micro_batch_rows", "remat": "loop.remat", "compile": "loop.compile",
    "fp8": "loop.fp8", "optim": "optim.kind", "states": "optim.state_dtype", "accumulate": "parallel.accumulate",
    "tensor": "parallel.tensor", "context": "parallel.context", "pipeline": "parallel.pipeline",
    "replicate": "parallel.replicate",
}  # fmt: skip
SEQ_LEN = 4096
STEPS = 3


class RandomRows:
    """Rows of one random document each."""

    num_rows, fingerprint, source_names = 1 << 20, "random", ("all",)

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def row(self, epoch: int, index: int) -> PackedRow:
        tokens = np.random.default_rng((epoch, index)).integers(0, self._vocabulary, SEQ_LEN + 1, np.int32)
        weights, lengths = np.ones(SEQ_LEN, np.float32), np.array([SEQ_LEN], np.int32)
        return PackedRow(tokens=tokens[:-1], targets=tokens[1:], loss_weights=weights, seq_lens=lengths)


def recipe_of(setting: str, gpus: int, directory: Path) -> PretrainConfig:
    """`rows` are those of a step on all GPUs."""
    name, *options = setting.split()
    pairs = [option.split("=") for option in options]
    further = [f"{KEYS[key]}={value}" for key, value in pairs]
    given = [f"out={directory / 'run'}", f"tokenizer={directory / 'tokenizer'}", "train_shards=none"]
    given += [
        f"model.preset={name}",
        f"seq_len={SEQ_LEN}",
        f"loop.steps={STEPS}",
        f"gpus={gpus}",
        "loop.precision=bf16",
    ]
    return config.load(PretrainConfig, [*given, "guard.max_restarts=0", "checkpoint.background=off", *further])


def measure(recipe: PretrainConfig, team: Team) -> dict[str, float]:
    """Peaks in bytes over all ranks, and the loss after the last step."""
    tokenizer = Tokenizer.load(recipe.tokenizer)
    prepared = prepare_model(recipe, recipe.model, tokenizer, team, row_tokens=SEQ_LEN)
    source = RandomRows(prepared.model.config.vocab_size)
    with open_run(recipe, "pretrain", team) as run, dispatch.forced(forced_operations(recipe.ops)):
        trainer = Trainer(recipe, run, prepared, tokenizer, source, team=team)
        started, record = 0.0, {}
        for step in range(STEPS):
            record = trainer._step()
            if step == 0:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / (STEPS - 1)
        trainer.loader.close()
    mine = [0.0] * team.layout.world
    mine[team.rank] = torch.cuda.max_memory_allocated()
    allocated = max(team.total(mine))
    mine[team.rank] = torch.cuda.max_memory_reserved()
    return {"allocated": allocated, "reserved": max(team.total(mine)), "loss": record["loss"], "seconds": seconds}


def compare(setting: str, gpus: int, directory: Path) -> dict[str, Any]:
    recipe = recipe_of(setting, gpus, directory)
    tokenizer = Tokenizer.load(recipe.tokenizer)
    shape = model_config(recipe.model, tokenizer)
    sizes = sizes_of(recipe.parallel)
    others = sizes["pipeline"] * sizes["replicate"] * sizes["context"] * sizes["tensor"]
    layout = Layout(**(sizes | {"shard": gpus // others}))
    sums = adds_to_fp32(torch.device("cuda"), torch.bfloat16)
    plan = memory_plan(dataclasses.replace(workload_of(recipe, shape, layout), sums_in_place=sums))
    figures: dict[str, Any] = {"setting": setting, "gpus": gpus, "plan_gib": plan.total / GIB, "moment": plan.moment}
    figures["parts_gib"] = {name: size / GIB for name, size in plan.parts().items()}
    try:
        found = run_stage(measure, recipe, lambda given: model_config(given.model, tokenizer))
    except (torch.OutOfMemoryError, ChildProcessError) as error:
        figures["error"] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    else:
        figures |= {f"{name}_gib": found[name] / GIB for name in ("allocated", "reserved")}
        figures |= {"loss": found["loss"], "seconds_a_step": found["seconds"], "ratio": plan.total / found["allocated"]}
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="settings that contain this text")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", default="memory_plan", help="name of the results file")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.gpus:
        print(f"this machine has {torch.cuda.device_count()} GPUs, {arguments.gpus} are wanted", file=sys.stderr)
        return 2
    settings = [each for each in (ONE_GPU if arguments.gpus == 1 else SEVERAL_GPUS) if arguments.only in each]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train([Path(__file__).read_text(encoding="utf-8")], 512).save(directory / "tokenizer")
        print(f"{'setting':<72} {'plan':>7} {'peak':>7} {'ratio':>6} {'reserved':>9} {'loss':>7}  dearest moment")
        for number, setting in enumerate(settings):
            (place := directory / str(number)).mkdir()
            (place / "tokenizer").symlink_to(directory / "tokenizer")
            figures = compare(setting, arguments.gpus, place)
            rows.append(figures)
            measured = figures.get("error") or (
                f"{figures['allocated_gib']:7.2f} {figures['ratio']:6.3f} {figures['reserved_gib']:9.2f} "
                f"{figures['loss']:7.3f}  {figures['moment']}"
            )
            print(f"{setting:<72} {figures['plan_gib']:7.2f} {measured}", flush=True)
    write_result(arguments.out, {"seq_len": SEQ_LEN, "steps": STEPS, "settings": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
