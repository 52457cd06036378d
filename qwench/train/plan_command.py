"""`qwench plan`: what a pretraining recipe needs and does, before anything is started.

    qwench plan pretrain-qwen2.5-7b gpus=8 --gpu-memory 80     # memory by part, tokens, operations, which remat fits
    qwench plan --table                                        # the layouts of all shipped recipes

Formulas over shapes (`memory.py`, `layouts.py`): no weights, no GPU, no shards are touched. Of a shape that leaves its
rows to the tokenizer, that is read where the recipe names one that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from qwench import config
from qwench.model.checkpoint import read_config
from qwench.model.config import ModelConfig
from qwench.model.flops import num_parameters, training_flops_per_token
from qwench.model.presets import preset
from qwench.parallel.layout import Layout, check_model, plan_layout
from qwench.parallel.schedule import bubble_share
from qwench.tokenizer import Tokenizer
from qwench.train.compile import Remat, repeated_flops_per_token
from qwench.train.config import PretrainConfig, StartConfig
from qwench.train.job import sizes_of
from qwench.train.layouts import choose_free, choose_layout, optimizer_kind, settle, smallest_gpu, workload_of
from qwench.train.memory import GIB, Workload, memory_plan, reserve_bytes, usable_bytes
from qwench.train.start import model_config

UNKNOWN = ["out=unknown", "tokenizer=not-known-yet", "train_shards=unknown"]
"""Stand-ins for what a recipe leaves to the user."""
GPUS = (1, 8, 64)
MEMORIES = {"80 GB": 81_559 / 1024, "141 GB": 143_771 / 1024}
"""GiB that an H100 and an H200 say they have."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="qwench plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="*", help="as for `qwench pretrain`; gpus=N counts the GPUs of all hosts")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of each GPU, for example 80; default: this machine's"
    )
    parser.add_argument("--table", action="store_true", help="layouts for the shipped recipes, as a Markdown table")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.table == bool(arguments.recipe):
        parser.error("give a recipe, or --table")
    if arguments.table:
        print("\n".join(layout_table()))
        return 0
    if arguments.gpu_memory is not None and not 0 < arguments.gpu_memory < math.inf:
        raise ValueError(f"--gpu-memory is {arguments.gpu_memory}; give the GiB of a GPU, for example 80")
    memory = round(arguments.gpu_memory * GIB) if arguments.gpu_memory else smallest_gpu()
    if memory is None:
        raise ValueError("this machine has no GPU; say which memory to plan for: --gpu-memory 80")
    recipe = config.load(PretrainConfig, [*UNKNOWN, *arguments.recipe])
    if recipe.gpus < 1:
        raise ValueError(f"gpus is {recipe.gpus}; give 1 or more")
    if recipe.tokenizer.exists():
        return show(recipe, model_config(recipe.model, Tokenizer.load(recipe.tokenizer)), memory)
    return show(recipe, planned_config(recipe.model), memory)


def planned_config(start: StartConfig) -> ModelConfig:
    """The model's shape, as far as it is known without the tokenizer."""
    if start.path is not None:
        return read_config(start.path)
    shape = preset(start.preset) if start.preset is not None else start.config
    assert shape is not None
    return dataclasses.replace(shape, vocab_size=start.vocab_size or shape.vocab_size)


def show(recipe: PretrainConfig, shape: ModelConfig, memory: int) -> int:
    """Print the plan; the exit code is 0 if it fits and 1 if not. Raises ValueError for a layout that is impossible."""
    recipe = settle(recipe, shape, recipe.gpus, memory)
    layout = plan_layout(recipe.gpus, **sizes_of(recipe.parallel))
    check_model(layout, shape, seq_len=recipe.seq_len, batch_rows=recipe.loop.batch_rows)
    work, usable = workload_of(recipe, shape, layout), usable_bytes(memory, recipe.gpus)
    work = choose_free(recipe, work, usable)
    plan = memory_plan(work)
    out = Console(markup=False)
    out.print(_table("the run", _facts(recipe, shape, work)))
    parts = {name.replace("_", " "): f"{size / GIB:.2f}" for name, size in plan.parts().items() if size}
    parts["sum"] = f"{plan.total / GIB:.2f} of {usable / GIB:.1f} usable"
    parts["usable"] = (
        f"{memory / GIB:.0f} less {reserve_bytes(memory, recipe.gpus) / GIB:.1f} for CUDA, NCCL and fragmentation"
    )
    out.print(_table(f"GiB on the fullest GPU, at its dearest moment ({plan.moment})", parts))
    out.print(_remat_table(work, recipe.seq_len, usable))
    fits = plan.total <= usable
    if not fits:
        out.print(
            "This does not fit. Set parallel.auto=true, more GPUs, fewer micro_batch_rows or a stronger loop.remat."
        )
    return 0 if fits else 1


def _facts(recipe: PretrainConfig, shape: ModelConfig, work: Workload) -> dict[str, str]:
    layout, loop = work.layout, recipe.loop
    tokens = loop.batch_rows * recipe.seq_len
    flops = training_flops_per_token(shape, recipe.seq_len)
    again = repeated_flops_per_token(shape, work.remat, recipe.seq_len) / flops
    facts = {
        "parameters": f"{num_parameters(shape) / 1e9:.3g} billion, with {shape.vocab_size:,} rows of the vocabulary",
        "layout": str(layout),
        "tokens a step": f"{tokens:,} ({loop.batch_rows} rows of {recipe.seq_len:,})",
        "at once on a GPU": f"{work.tokens // layout.context:,} tokens, {work.micro_batches} times a step",
        "operations a token": f"{flops / 1e9:.2f} GFLOP, and {again:.0%} of it again (remat {work.remat})",
    }
    if loop.steps is not None:
        facts["run"] = f"{loop.steps:,} steps, {loop.steps * tokens:.3g} tokens, {loop.steps * tokens * flops:.3g} FLOP"
    if layout.pipeline > 1:
        share = bubble_share(layout.pipeline, work.virtual_stages, work.micro_batches)
        facts["pipeline waits"] = f"{share / (1 + share):.1%} of the time"
    if layout.world > 1:
        kept = "gathered in every pass" if work.reshard_after_forward else "gathered once a step"
        facts["weights, gradients"] = f"{kept}; accumulated {work.accumulate}"
    return facts


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _remat_table(work: Workload, seq_len: int, usable: int) -> Table:
    table = Table(title="loop.remat", title_justify="left")
    for heading in ("kind", "GiB", "operations again", "fits"):
        table.add_column(heading, justify="left" if heading in ("kind", "fits") else "right")
    flops = training_flops_per_token(work.config, seq_len)
    for kind in get_args(Remat):
        total = memory_plan(dataclasses.replace(work, remat=kind)).total
        again = repeated_flops_per_token(work.config, kind, seq_len) / flops
        table.add_row(kind, f"{total / GIB:.1f}", f"{again:.0%}", "yes" if total <= usable else "no")
    return table


# ------------------------------------------------------------------------------------------------------- shipped ones
def shipped() -> dict[str, PretrainConfig]:
    """The shipped pretraining recipes of a published size by name, and their second stages; short rows first."""
    found: dict[str, PretrainConfig] = {}
    for path in sorted(config.RECIPES.glob("pretrain-*.toml")):
        table = config.read_recipe(path)
        if "preset" not in table.get("model", {}):
            continue
        found[path.stem] = config.load(PretrainConfig, [*UNKNOWN, path])
        second = path.with_stem(f"{path.stem.rpartition('-')[0]}-long")
        if second.exists():
            found[f"{path.stem}, long"] = config.load(PretrainConfig, [*UNKNOWN, path, second])
    return dict(
        sorted(found.items(), key=lambda item: (item[1].seq_len, num_parameters(planned_config(item[1].model))))
    )


def layout_table() -> list[str]:
    """Markdown: for each recipe, number of GPUs and memory the chosen layout, with GiB planned."""
    heads = [f"{count} x {name}" for count in GPUS for name in MEMORIES]
    lines = [f"| recipe | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, recipe in shipped().items():
        cells = [_cell(recipe, count, memory) for count in GPUS for memory in MEMORIES.values()]
        lines.append(f"| {name.removeprefix('pretrain-')} | {' | '.join(cells)} |")
    return lines


def _cell(recipe: PretrainConfig, count: int, memory: float) -> str:
    try:
        choice = choose_layout(
            planned_config(recipe.model), count, round(memory * GIB), seq_len=recipe.seq_len,
            batch_rows=recipe.loop.batch_rows, optimizer=optimizer_kind(recipe.optim),
        )  # fmt: skip
    except ValueError:
        return "-"
    rows = f"{choice.micro_batch_rows} row{'s' * (choice.micro_batch_rows > 1)}"
    return f"{short(choice.layout)}{rows}, {choice.remat}: {choice.plan.total / GIB:.0f}"


def short(layout: Layout) -> str:
    """ "S8 T2, " for shard 8 and tensor 2; R replicate, C context, P pipeline."""
    named: dict[str, Any] = {axis[0].upper(): getattr(layout, axis) for axis in ("pipeline", "replicate", "shard")}
    named |= {"C": layout.context, "T": layout.tensor}
    text = " ".join(f"{letter}{size}" for letter, size in named.items() if size > 1)
    return f"{text}, " if text else ""
