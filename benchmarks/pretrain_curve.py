"""The same pretraining run by qwench and by transformers' Trainer: loss curves beside each other, and tokens/s.

    python benchmarks/pretrain_curve.py ours --room /tmp/curve --tokenizer T --train TRAIN --val VAL --steps 900
    python benchmarks/pretrain_curve.py transformers --room /tmp/curve --tokenizer T --train TRAIN --val VAL --steps 900
    python benchmarks/pretrain_curve.py compare --room /tmp/curve --tokenizer T --train TRAIN --val VAL --steps 900

T is a tokenizer, TRAIN and VAL are token shards. Both begin with the same weights and see the same rows in the same
order, with the same AdamW, schedule and clipping; qwench's run is `qwench pretrain`, transformers' its Trainer with
fp32 weights under autocast, Liger's kernels where they are installed (on a GPU), else torch.compile. --minutes ends a
part early, with a checkpoint that the same command goes on from. `compare` validates both results by qwench's model and
writes the result: curves as means of 20 steps, their difference, and the difference expected of noise (that of two
neighbouring means of one curve, its trend taken out).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_speed import shape_arguments
from results import write_result

from qwench import config
from qwench.data.loader import RowLoader
from qwench.data.packing import PretrainDataset
from qwench.data.sources import JoinedShards
from qwench.model.weights import save_pretrained
from qwench.run import read_metrics, usable_cores
from qwench.tokenizer import Tokenizer
from qwench.train.config import PretrainConfig
from qwench.train.schedule import lr_ratio
from qwench.train.start import build_model

DEMO = (
    "{hidden_size = 256, intermediate_size = 704, num_hidden_layers = 6, num_attention_heads = 4, "
    "num_key_value_heads = 2, tie_word_embeddings = true}"
)
MEAN_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ours", "transformers", "compare"))
    parser.add_argument("--room", type=Path, required=True, help="directory for both runs")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--shape", default="0.5b", help="as in pretrain_speed.py, or demo")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--minutes", type=float, help="of this call; unset: to the last step")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--micro-batch-rows", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--set", action="append", default=[], help="key=value of the recipe, for both")
    parser.add_argument("--ours-set", action="append", default=[], help="key=value for qwench's run alone")
    parser.add_argument("--name", default="pretrain_curve", help="of the result file")
    args = parser.parse_args()
    arguments = [
        f"out={args.room / 'ours'}", f"tokenizer={args.tokenizer}", f"train_shards={args.train}",
        f"val_shards={args.val}", "attend_across=true", f"seq_len={args.seq_len}", f"loop.steps={args.steps}",
        f"loop.batch_rows={args.batch_rows}", f"loop.micro_batch_rows={args.micro_batch_rows}",
        f"loop.device={args.device}", f"loop.precision={args.precision}", "loop.eval_every=0",
        f"schedule.warmup_steps={max(1, args.steps // 20)}", "optim.lr=6e-4", "checkpoint.every_steps=1000000",
        *([f"model.config={DEMO}"] if args.shape == "demo" else shape_arguments(args.shape)), *args.set,
    ]  # fmt: skip
    recipe = config.load(PretrainConfig, arguments)
    if args.part == "ours":
        run_ours([*arguments, *args.ours_set], args.minutes)
    elif args.part == "transformers":
        run_transformers(args, recipe)
    else:
        compare(args, recipe)


def run_ours(arguments: list[str], minutes: float | None) -> None:
    process = subprocess.Popen([sys.executable, "-m", "qwench.cli", "pretrain", *arguments])
    if minutes is not None:
        timer = threading.Timer(60 * minutes, process.send_signal, [signal.SIGTERM])  # saves, then ends
        timer.daemon = True
        timer.start()
    print("ended with", process.wait())


# ------------------------------------------------------------------------------------------------------- transformers
class Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The rows of qwench's loader from a step on, one at a time."""

    def __init__(self, recipe: PretrainConfig, fingerprint: str, first_step: int) -> None:
        self.source = open_rows(recipe, fingerprint, "train")
        self.recipe, self.first_step = recipe, first_step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        loop = self.recipe.loop
        loader = RowLoader(self.source, loop.batch_rows, loop.seed, prefetch=0)
        epoch, position = divmod(self.first_step * loop.batch_rows, self.source.num_rows)
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "position": position})
        for rows in loader:
            for row in rows:
                targets = torch.from_numpy(row.targets.astype(np.int64))
                yield {
                    "input_ids": torch.from_numpy(row.tokens.astype(np.int64)),
                    "labels": targets,  # without them no loss is computed
                    "shift_labels": targets,
                }


def open_rows(recipe: PretrainConfig, fingerprint: str, part: str) -> PretrainDataset:
    path = recipe.train_shards if part == "train" else recipe.val_shards
    assert isinstance(path, Path)
    shards = JoinedShards.open([path], fingerprint)
    return PretrainDataset(shards, recipe.seq_len, recipe.loop.seed if part == "train" else 0, attend_across=True)


def run_transformers(args: argparse.Namespace, recipe: PretrainConfig) -> None:
    import transformers

    room, tokenizer = args.room / "transformers", Tokenizer.load(args.tokenizer)
    room.mkdir(parents=True, exist_ok=True)
    start, on_gpu = room / "start", args.device == "cuda"
    if not start.exists():
        save_pretrained(build_model(recipe.model, tokenizer, torch.device("cpu"), recipe.loop.seed), start)
    saved = sorted(room.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    first = int(saved[-1].name.partition("-")[2]) if saved else 0
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    optim = recipe.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    device = torch.device(args.device)
    model.to(device)  # pyright: ignore[reportArgumentType]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: lr_ratio(step, args.steps, recipe.schedule))
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    settings = transformers.TrainingArguments(
        output_dir=str(room), max_steps=args.steps, per_device_train_batch_size=args.micro_batch_rows,
        gradient_accumulation_steps=args.batch_rows // args.micro_batch_rows, max_grad_norm=optim.grad_clip,
        bf16=args.precision == "bf16", logging_steps=1, logging_nan_inf_filter=False, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, use_liger_kernel=liger,
        torch_compile=on_gpu and not liger, ignore_data_skip=True, dataloader_num_workers=0,
        remove_unused_columns=False,
    )  # fmt: skip
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else None

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.last = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            now = time.perf_counter()
            line = {"step": state.global_step, "loss": logs["loss"], "grad_norm": float(logs["grad_norm"])}
            line |= {"lr": logs["learning_rate"], "seconds": now - self.last}
            self.last = now
            with (room / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if deadline is not None and time.monotonic() > deadline:
                control.should_save = control.should_training_stop = True

    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=Rows(recipe, tokenizer.fingerprint, first),
        optimizers=(adamw, schedule), callbacks=[Watch()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    facts = {
        "transformers": transformers.__version__, "liger": liger, "torch_compile": settings.torch_compile,
        "attention": "sdpa", "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }  # fmt: skip
    (room / "facts.json").write_text(json.dumps(facts))
    if trainer.state.global_step == args.steps:
        trainer.save_model(str(room / "model"))


# ---------------------------------------------------------------------------------------------------------- comparison
def compare(args: argparse.Namespace, recipe: PretrainConfig) -> None:
    """Steps that both have taken; the first of each call compile and are left out of the speed."""
    ours = {line["step"]: line for line in read_metrics(args.room / "ours") if "loss" in line}
    lines = (args.room / "transformers" / "metrics.jsonl").read_text().splitlines()
    theirs = {line["step"]: line for line in map(json.loads, lines)}
    steps = sorted(ours.keys() & theirs.keys())
    if len(steps) < 4 * MEAN_STEPS:
        raise SystemExit(f"both have taken {len(steps)} steps; a comparison needs {4 * MEAN_STEPS}")
    tokens = args.batch_rows * args.seq_len
    curves = {
        "qwench": means([ours[step]["loss"] for step in steps]),
        "transformers": means([theirs[step]["loss"] for step in steps]),
    }
    differences = [a - b for a, b in zip(curves["qwench"], curves["transformers"], strict=True)]
    later = differences[len(differences) // 4 :]  # after the steep beginning
    speed = {
        "qwench": statistics.median(ours[step]["tokens_per_s"] for step in steps),
        "transformers": tokens / statistics.median(theirs[step]["seconds"] for step in steps),
    }
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {usable_cores()} cores",
        "torch": torch.__version__, "shape": args.shape, "seq_len": args.seq_len, "batch_rows": args.batch_rows,
        "precision": args.precision, "steps": len(steps), "tokens": len(steps) * tokens,
        "minutes": {
            "qwench": sum(tokens / line["tokens_per_s"] for line in ours.values()) / 60,
            "transformers": sum(line["seconds"] for line in theirs.values()) / 60,
        },
        "tokens_per_s": speed, "ratio": speed["qwench"] / speed["transformers"],
        "peer": json.loads((args.room / "transformers" / "facts.json").read_text()),
        "mean_of_steps": MEAN_STEPS, "curves": curves,
        "first_losses": {"qwench": ours[steps[0]]["loss"], "transformers": theirs[steps[0]]["loss"]},
        # transformers logs the rate of the step to come.
        "largest_lr_difference": max(abs(ours[b]["lr"] - theirs[a]["lr"]) for a, b in itertools.pairwise(steps)),
        "difference": {
            "mean": statistics.fmean(later), "largest": max(map(abs, later)), "noise": noise(curves["qwench"]),
        },
        "validation": {
            name: validation_loss(args, recipe, args.room / name / "model")
            for name in ("ours", "transformers")
            if (args.room / name / "model").exists()
        },
    }  # fmt: skip
    shown = {key: value for key, value in figures.items() if key != "curves"}
    print(json.dumps(shown, indent=1))
    write_result(args.name, figures)


def means(losses: list[float]) -> list[float]:
    whole = [losses[start : start + MEAN_STEPS] for start in range(0, len(losses) - MEAN_STEPS + 1, MEAN_STEPS)]
    return [round(statistics.fmean(part), 5) for part in whole]


def noise(curve: list[float]) -> float | None:
    """Standard deviation of a mean of the later curve about its neighbours' mean, times sqrt(2/3) for theirs.

    None for a curve that is too short.
    """
    later = curve[len(curve) // 4 :]
    off = [b - (a + c) / 2 for a, b, c in zip(later, later[1:], later[2:], strict=False)]
    return statistics.pstdev(off) * (2 / 3) ** 0.5 if len(off) > 1 else None


def validation_loss(args: argparse.Namespace, recipe: PretrainConfig, model: Path) -> float:
    """Nats a token on up to 64 rows, by qwench's model."""
    from qwench.model.load import load_model
    from qwench.train.batch import make_batch
    from qwench.train.loss import next_token_losses

    device = torch.device(args.device)
    net = load_model(model, device=device, dtype="float32")
    rows = open_rows(recipe, Tokenizer.load(args.tokenizer).fingerprint, "val")
    number = min(64, rows.num_rows)
    with torch.no_grad():
        sums = [
            float(next_token_losses(net, make_batch([rows.row(0, index)], device))[0]) for index in range(number)
        ]  # weights of a validation batch are its own
    return sum(sums) / (number * args.seq_len)


if __name__ == "__main__":
    main()
