"""The same evaluation through qwench and through lm-eval's own backend for transformers: scores and times.

    python benchmarks/eval_peer.py MODEL.gguf --data-dir DATA --preset qwen2.5-coder-instruct --tasks humaneval,mmlu
    python benchmarks/eval_peer.py MODEL.gguf ... --part peer     # one alone, for two GPUs at once; then --part join

Both get the same task objects: documents, prompts, stop strings, extraction, tests in the sandbox. The peer loads
the checkpoint that `qwench convert` writes of the same file, in the same dtype, and batches by sorted
lengths. A task's time is from building its requests to its score. Results are kept in the room, so that the command
may be given several times, with other tasks, limits or lengths of answers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from results import write_result

from qwench.evals import presets
from qwench.evals.context import TaskContext, using
from qwench.evals.harness import Item, Plan, _prepare, _run, quiet
from qwench.evals.local_files import data_roots
from qwench.evals.task_loading import Catalogue
from qwench.tokenizer import Tokenizer

SETTINGS = ("n", "limit", "max_gen_toks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, action="append", default=[])
    parser.add_argument("--preset", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="answers at a time of the peer")
    parser.add_argument("--score-batch", type=int, default=16, help="log-likelihoods at a time of the peer")
    parser.add_argument("--max-gen-toks", type=int, help="for both; unset: the tasks' own")
    parser.add_argument("--name", default="eval_peer", help="of the file of results")
    parser.add_argument("--note", default="", help="what a reader of the figures should know")
    parser.add_argument("--room", type=Path, default=Path("/tmp/eval-peer"))
    parser.add_argument("--part", choices=("all", "qwench", "peer", "join"), default="all")
    args = parser.parse_args()
    args.room.mkdir(parents=True, exist_ok=True)
    if args.part in ("all", "qwench"):
        run_qwench(args)
    if args.part in ("all", "peer"):
        run_peer(args)
    if args.part in ("all", "join"):
        join(args)


def run_qwench(args: argparse.Namespace) -> None:
    """By its command, as a user runs it."""
    out = args.room / "qwench"
    line = [sys.executable, "-m", "qwench.cli", "eval", str(args.model), "--preset", args.preset, "--tasks", args.tasks]
    line += ["--out", str(out), "--dtype", args.dtype, "--device", args.device]
    line += [part for folder in args.data_dir for part in ("--data-dir", str(folder))]
    line += ["--limit", str(args.limit)] if args.limit else []
    line += ["--gen", f"max_gen_toks={args.max_gen_toks}"] if args.max_gen_toks else []
    subprocess.run(line, check=True)
    results = json.loads((out / "results.json").read_text())
    found = {name: _short(results["tasks"][name], args) for name in args.tasks.split(",")}
    _write(args.room / "qwench.json", {"tasks": finished(args.room / "qwench.json") | found})
    shutil.rmtree(out)


def run_peer(args: argparse.Namespace) -> None:
    quiet()
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM

    checkpoint = args.room / "checkpoint"
    if not checkpoint.exists():
        line = [sys.executable, "-m", "qwench.cli", "convert", str(args.model), str(checkpoint), "--dtype", args.dtype]
        subprocess.run(line, check=True)
    peer: Any = HFLM(str(checkpoint), device=args.device, dtype=args.dtype, batch_size=args.batch)
    peer.usage, peer.generation = _Nothing(), {}
    plan = Plan(items=items(args), limit=args.limit, data_dirs=tuple(args.data_dir))
    context = TaskContext(
        tokenizer=Tokenizer.load(checkpoint), max_len=peer.max_length, data_dirs=data_roots(plan.data_dirs),
        seed=plan.seed, workers=0,
    )  # fmt: skip
    found = finished(args.room / "peer.json")
    versions = {"transformers": transformers.__version__, "lm_eval": lm_eval.__version__, "batch": args.batch}
    versions["score_batch"] = args.score_batch
    with using(context), contextlib.redirect_stdout(sys.stderr):
        catalogue = Catalogue(())
        for item in plan.items:
            if item.label in found:
                continue
            loaded = _prepare(catalogue, item, context.data_dirs)
            for task in loaded.tasks.values():
                if task.config.generation_kwargs is not None and args.max_gen_toks:
                    task.config.generation_kwargs["max_gen_toks"] = args.max_gen_toks
            scores = any(task.OUTPUT_TYPE != "generate_until" for task in loaded.tasks.values())
            peer.batch_size_per_gpu = args.score_batch if scores else args.batch
            entries, _ = _run(peer, item, loaded, plan)
            found[item.label] = _short(entries[item.label], args)
            print(item.label, found[item.label], flush=True)
            _write(args.room / "peer.json", {"tasks": found, **versions})


def finished(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["tasks"] if path.is_file() else {}


def items(args: argparse.Namespace) -> list[Item]:
    preset = presets.load(args.preset)
    return [dataclasses.replace(preset.item(name), label=name) for name in args.tasks.split(",")]


class _Nothing(dict[str, Any]):
    """The tokens of a task, which the peer does not count."""

    def __missing__(self, key: str) -> Any:
        from qwench.evals.lm import Usage

        return Usage()


def _short(entry: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    metric = entry["metrics"][entry["primary"]]
    setting = {"limit": args.limit, "max_gen_toks": args.max_gen_toks}
    score = {k: metric[k] for k in ("value", "stderr", "n")}
    return {"metric": entry["primary"], "seconds": entry["seconds"], **score, **setting}


def join(args: argparse.Namespace) -> None:
    ours, theirs = (json.loads((args.room / f"{name}.json").read_text()) for name in ("qwench", "peer"))
    tasks: dict[str, Any] = {}
    for name, mine in ours["tasks"].items():
        other = theirs["tasks"].get(name)
        if other is None or any(mine[key] != other[key] for key in SETTINGS):
            continue
        noise = math.hypot(mine["stderr"] or 0.0, other["stderr"] or 0.0)
        apart = mine["value"] - other["value"]
        tasks[name] = {
            "metric": mine["metric"], **{key: mine[key] for key in SETTINGS},
            "qwench": mine["value"], "transformers": other["value"],
            "difference": apart, "standard_error_of_difference_if_independent": noise,
            "seconds": {"qwench": mine["seconds"], "transformers": other["seconds"]},
            "times_as_fast": other["seconds"] / mine["seconds"],
        }  # fmt: skip
        print(
            f"{name}: {mine['value']:.4f} / {other['value']:.4f} (+- {noise:.4f}), "
            f"{mine['seconds']:.1f} s / {other['seconds']:.1f} s"
        )
    on_gpu = args.device.startswith("cuda")
    figures = {
        "model": args.model.name, "dtype": args.dtype, "preset": args.preset,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__, "peer": {k: v for k, v in theirs.items() if k != "tasks"},
        "tasks": tasks, **({"note": args.note} if args.note else {}),
    }  # fmt: skip
    write_result(args.name, figures)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
