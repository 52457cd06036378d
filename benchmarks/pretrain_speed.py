"""Training steps of a published shape on one GPU (or a tiny one on a CPU), by the training loop itself.

    python benchmarks/pretrain_speed.py 0.5b --batch-rows 16 --variants default,reference
    python benchmarks/pretrain_speed.py 1.5b --batch-rows 8 --variants default,x:optim.state_dtype=bf16,loop.remat=none

Run directory, token shards, loader, batches, guard, records: everything is what `qwench pretrain` runs, but for the
last step's checkpoint and export. A variant is NAME or NAME:key=value,key=value of the recipe; those below are known by
name. Each runs in the same process after the memory of the one before was freed, and prints a line.

Tokens are random. Every row is one sequence. Speed is over the steps after --warmup, by the clock, records and all;
"step" is the loop's own time of a step. MFU counts 6 operations a weight (without the embedding, with the output
matrix) and token and 12 * layers * heads * head size * (seq_len / 2) for causal attention, forward and backward,
nothing that is computed twice. After the timed steps three are profiled, and in three more "syncs" are counted:
operations that wait for the GPU, as torch reports them.

The losses of all steps stand in the result, and their largest difference from those of the variant "reference" (plain
operations, nothing compiled, one row at a time, nothing kept), if that ran. It is slow: --reference-steps 5 compares
the first steps alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_result

from qwench import config
from qwench.data.packing import PretrainDataset
from qwench.data.shards import ShardWriter
from qwench.data.sources import JoinedShards
from qwench.model.flops import num_parameters, training_flops_per_token
from qwench.model.presets import preset
from qwench.ops.attention_train import flash_attention_4
from qwench.ops.hardware import peak_flops, pick_device
from qwench.parallel.layout import Team
from qwench.run import Run
from qwench.tokenizer import Tokenizer, train
from qwench.train.config import PretrainConfig
from qwench.train.loop import Trainer
from qwench.train.prepare import prepare_model
from qwench.train.profile import NUM_STEPS

SUSTAINED_FLOPS = 684e12
"""Of one H200, measured: 1,500 bf16 products of 8192^3."""
TINY = (
    "{hidden_size = 64, intermediate_size = 160, num_hidden_layers = 2, num_attention_heads = 4, "
    "num_key_value_heads = 2, tie_word_embeddings = true}"
)
REFERENCE = [
    f"ops.{name}=reference"
    for name in ("attention", "cross_entropy", "linear", "rms_norm", "rope", "rope_and_store", "swiglu")
]
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "reference": ["loop.compile=off", "loop.remat=full", "loop.micro_batch_rows=1", *REFERENCE],
    "uncompiled": ["loop.compile=off"],
    "fp32": ["loop.precision=fp32"],
    "bf16_states": ["optim.state_dtype=bf16"],
    "z_loss": ["loop.z_loss=1e-4"],
    **{f"remat_{kind}": [f"loop.remat={kind}"] for kind in ("none", "elementwise", "mlp", "attention", "full")},
}
WATCHED_STEPS = 3
"""Steps in which operations that wait for the GPU are counted."""


class Done(Exception):
    """The steps of a benchmark are over."""


class TimedRun(Run):
    """A run directory that notes when each record comes, and ends the training with the last step.

    In the `watched` steps, the last ones, operations that wait for the GPU give warnings.
    """

    def __init__(self, path: Path, recipe: PretrainConfig, watched: range) -> None:
        super().__init__(path, recipe, "pretrain")
        self.watched = watched
        self.records: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.facts: dict[str, Any] = {}

    def write_provenance(self, **extra: Any) -> None:
        super().write_provenance(**extra)
        self.facts = extra

    def record(self, **values: Any) -> None:
        super().record(**values)
        self.times.append(time.perf_counter())
        self.records.append(values)
        if len(self.records) == self.watched.start and torch.cuda.is_available():
            warnings.simplefilter("always")
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
        if len(self.records) == self.watched.stop:
            raise Done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="0.5b, 1.5b, 3b, 7b, ... of Qwen2.5, another preset's name, or tiny")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20, help="timed ones")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, the first of which compile")
    parser.add_argument(
        "--variants", default="default,reference", help="separated by commas; a key=value belongs before"
    )
    parser.add_argument("--reference-steps", type=int, help="timed ones of the variant reference; unset: as many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], help="key=value for all variants")
    parser.add_argument("--name", help="of the result file")
    args = parser.parse_args()
    device = pick_device(args.device)
    figures: dict[str, Any] = {
        "shape": args.shape, "batch_rows": args.batch_rows, "seq_len": args.seq_len, "timed_steps": args.steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "settings": args.set, "variants": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as room:
        tokenizer = train(["a few words of text to train on"], 278)
        tokenizer.save(Path(room) / "tokenizer")
        make_shards(args, Path(room) / "shards", tokenizer)
        for name, overrides in parse_variants(args.variants):
            out = Path(room) / name
            try:
                figures["variants"][name] = measure(args, device, Path(room), out, tokenizer, overrides)
            except torch.OutOfMemoryError:
                figures["variants"][name] = {"overrides": overrides, "failed": "out of memory"}
            except (ValueError, RuntimeError) as error:  # of one variant: the others are still wanted
                figures["variants"][name] = {"overrides": overrides, "failed": f"{type(error).__name__}: {error}"[:500]}
            release()
            compare(figures["variants"])
            print(name, summary(figures["variants"][name]), flush=True)
    write_result(args.name or f"pretrain_{args.shape}", figures)


def parse_variants(text: str) -> list[tuple[str, list[str]]]:
    """ "default,mine:loop.remat=mlp,optim.state_dtype=bf16" as names and overrides."""
    found: list[tuple[str, list[str]]] = []
    for part in text.split(","):
        name, colon, first = part.partition(":")
        if colon:
            found.append((name, [first]))
        elif "=" in part and found:
            found[-1][1].append(part)
        elif part in VARIANTS:
            found.append((part, list(VARIANTS[part])))
        else:
            raise SystemExit(f"unknown variant {part!r}; write name:key=value, or take one of {', '.join(VARIANTS)}")
    return sorted(found, key=lambda variant: variant[0] != "reference")  # first, so that every line can compare


def shape_arguments(shape: str) -> list[str]:
    if shape == "tiny":
        return [f"model.config={TINY}", "model.vocab_size=512"]
    return [f"model.preset={shape if shape.startswith('qwen') else f'qwen2.5-{shape}'}"]


def make_shards(args: argparse.Namespace, directory: Path, tokenizer: Tokenizer) -> None:
    """Random tokens of the model's vocabulary in documents of one row, enough that no row comes twice."""
    vocabulary = 512 if args.shape == "tiny" else preset(shape_arguments(args.shape)[0].partition("=")[2]).vocab_size
    rng = np.random.default_rng(0)
    rows = args.batch_rows * (args.warmup + args.steps + NUM_STEPS + WATCHED_STEPS + 4)
    fingerprint = tokenizer.fingerprint
    with ShardWriter(directory, tokenizer_fingerprint=fingerprint, vocab_size=vocabulary) as writer:
        for _ in range(rows):
            writer.add(rng.integers(0, vocabulary, args.seq_len, np.int64))


def measure(
    args: argparse.Namespace, device: torch.device, room: Path, out: Path, tokenizer: Tokenizer, overrides: list[str]
) -> dict[str, Any]:
    planned = args.warmup + args.steps + NUM_STEPS + WATCHED_STEPS + 1  # the schedule is the same for all
    num_steps = args.reference_steps if out.name == "reference" and args.reference_steps else args.steps
    total = args.warmup + num_steps + NUM_STEPS + WATCHED_STEPS
    recipe = config.load(
        PretrainConfig,
        [
            f"out={out}", f"tokenizer={room / 'tokenizer'}", f"train_shards={room / 'shards'}", "attend_across=true",
            f"seq_len={args.seq_len}", f"loop.batch_rows={args.batch_rows}", f"loop.steps={planned}",
            f"loop.device={args.device}", "schedule.warmup_steps=5", "checkpoint.every_steps=1000000000",
            f"loop.profile_step={args.warmup + num_steps + 1}",
            *shape_arguments(args.shape), *args.set, *overrides,
        ],
    )  # fmt: skip
    team = Team.alone(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    source = PretrainDataset(JoinedShards.open([room / "shards"]), args.seq_len, 0, attend_across=True)
    prepared = prepare_model(recipe, recipe.model, tokenizer, team, row_tokens=args.seq_len)
    run = TimedRun(out, recipe, range(total - WATCHED_STEPS, total))
    with run, warnings.catch_warnings(record=True) as caught:
        try:
            Trainer(recipe, run, prepared, tokenizer, source, team=team).train()
        except Done:
            pass
        finally:
            torch.set_warn_always(False)
    timed = run.times[args.warmup - 1 : args.warmup + num_steps]
    tokens_per_s = args.batch_rows * args.seq_len * num_steps / (timed[-1] - timed[0])
    model = prepared.model.config
    flops = training_flops_per_token(model, args.seq_len)
    peak, peak_source = peak_flops(device, prepared.dtype)
    steps = [record["tokens"] / record["tokens_per_s"] for record in run.records[args.warmup : args.warmup + num_steps]]
    figures: dict[str, Any] = {
        "overrides": overrides,
        "tokens_per_s": round(tokens_per_s, 1),
        "step_s": {
            "median": round(statistics.median(steps), 5),
            "low": round(min(steps), 5),
            "high": round(max(steps), 5),
        },
        "tflops": round(tokens_per_s * flops / 1e12, 2),
        "mfu": round(tokens_per_s * flops / peak, 4),
        "peak_flops": {"value": peak, "source": peak_source},
        "parameters": num_parameters(model),
        "flops_per_token": flops,
        "first_step_s": round(run.times[0] - started, 2),
        "compiled": prepared.compiled,
        "remat": prepared.remat,
        "precision": str(prepared.dtype).removeprefix("torch."),
        "ops": run.facts["ops"],
        "flash_attention_4": flash_attention_4() is not None,
        "losses": [record["loss"] for record in run.records],
        "grad_norms": [record["grad_norm"] for record in run.records],
        "profile": json.loads((out / "profile.json").read_text(encoding="utf-8")),
    }
    if device.type == "cuda":
        figures["share_of_sustained"] = round(tokens_per_s * flops / SUSTAINED_FLOPS, 4)
        # Of the records: each begins torch's own peak anew.
        figures["peak_gib"] = round(max(record["peak_memory_gib"] for record in run.records), 2)
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
        # Not torch's warning that the mode is a prototype, which also speaks of synchronizing operations.
        waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        figures["syncs"] = round(len(waits) / WATCHED_STEPS, 2)
        figures["sync_places"] = sorted({f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits})
    return figures


def release() -> None:
    """Give back what the last variant held: its model is gone with `measure`, graphs and their inputs here."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


def compare(variants: dict[str, dict[str, Any]]) -> None:
    """Largest difference of a step's loss from the reference's, as a share of it."""
    wanted = variants.get("reference", {}).get("losses")
    for figures in variants.values():
        if wanted and "losses" in figures:
            pairs = zip(figures["losses"], wanted, strict=False)
            figures["loss_differs"] = max(abs(loss - want) / want for loss, want in pairs)


def summary(figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"FAILED: {figures['failed']}"
    parts = [
        f"{figures['tokens_per_s']:,.0f} tokens/s", f"MFU {figures['mfu']:.1%}", f"{figures['tflops']} TFLOP/s",
        f"step {figures['step_s']['median']} s", f"first step after {figures['first_step_s']} s",
        f"remat {figures['remat']}", f"loss {figures['losses'][0]:.5f} to {figures['losses'][-1]:.5f}",
    ]  # fmt: skip
    if "peak_gib" in figures:
        parts += [
            f"peak {figures['peak_gib']} GiB ({figures['reserved_gib']} reserved)",
            f"{figures['syncs']} syncs a step",
        ]
    if "loss_differs" in figures:
        parts.append(f"differs {figures['loss_differs']:.1e} from the reference")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
