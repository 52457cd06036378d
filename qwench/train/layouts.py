"""The layout of a training job from the memory plan: the cheapest that fits, for `parallel.auto` and `qwench plan`.

    choice = choose_layout(preset("qwen2.5-7b"), 8, 80 * GIB, seq_len=4096, batch_rows=1024)
    choice.layout, choice.micro_batch_rows, choice.remat
    recipe = settle(recipe, config, world, smallest_gpu())     # the same written into a recipe

Every layout that the model, the rows and the hosts allow gets an estimate of its time; the first in that order whose
memory plan fits is taken. The estimate is a preference, not a forecast of speed: operations at a fixed rate, exchanges
at the links' rates, gradients and weights of FSDP beside the operations as far as those last, everything else after
them. So data parallelism within a host wins while it fits, then shards over hosts, then rematerialisation or another
axis, whichever costs less; tensor parallelism never leaves a host.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch

from qwench.model.config import ModelConfig
from qwench.model.flops import num_parameters, training_flops_per_token
from qwench.ops.cross_entropy import adds_to_fp32
from qwench.parallel.layout import AXES, Layout, check_model
from qwench.parallel.schedule import bubble_share
from qwench.train.compile import Remat, repeated_flops_per_token
from qwench.train.config import LoopConfig, OptimConfig
from qwench.train.memory import (
    COMPILED_KINDS,
    GIB,
    OTHER_KINDS,
    MemoryPlan,
    OptimizerKind,
    Workload,
    choose_remat,
    device_memory,
    memory_plan,
    usable_bytes,
)
from qwench.train.recipe import TrainingRecipe

HOST = 8
"""GPUs of a host."""
RATE = 600e12
"""Operations a second of one GPU that its kernels reach (bf16, H100 and H200)."""
HOST_LINK = 300e9
"""Bytes a second that a GPU exchanges with others of its host (NVLink)."""
NETWORK = 40e9
"""Bytes a second that a GPU exchanges with other hosts (400 Gbit/s each)."""
MOST_TOKENS = 65_536
"""Tokens of a micro-batch on a rank beyond which products gain nothing."""
ELEMENTWISE_AGAIN = 0.03
"""Share of a step that computing norms, rotation and SwiGLU again adds: 2.4 % at 0.5B in micro-batches of 32,768
tokens, 5 % of 65,536, nothing at 1.5B of 16,384 (one H200)."""
FEW_TOKENS = 256
"""Tokens on a rank for which products take twice as long a token as they should: weights are read for few rows."""

Accumulate = Literal["whole", "shards"]
ACCUMULATE: tuple[Accumulate, ...] = ("whole", "shards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A layout with what goes with it."""

    layout: Layout
    micro_batch_rows: int
    remat: Remat
    reshard_after_forward: bool
    accumulate: Accumulate
    cost: float
    """Estimated time of a step over that of the model's operations alone."""
    plan: MemoryPlan


def choose_layout(
    config: ModelConfig,
    world: int,
    memory: int,
    *,
    seq_len: int,
    batch_rows: int,
    micro_batch_rows: int | None = None,
    remat: Remat | None = None,
    optimizer: OptimizerKind = "adamw",
    itemsize: int = 2,
    compiled: bool = True,
    host: int = HOST,
) -> Choice:
    """The layout of `world` GPUs with `memory` bytes each. What is given stays as it is; None is chosen.

    `itemsize` and `compiled` as in `Workload`. A given `micro_batch_rows` need not divide a rank's rows: the last
    micro-batch is filled up. Raises ValueError when nothing fits, with what the smallest layout needs.
    """
    usable, kinds = usable_bytes(memory, world), COMPILED_KINDS if compiled else OTHER_KINDS
    if remat is not None:
        kinds = (remat,)
    found: list[tuple[float, int, Workload, int]] = []
    least = 0
    for layout in _layouts(config, world, seq_len, batch_rows, host):
        if optimizer == "muon" and layout.tensor > 1:
            continue
        rows = batch_rows // layout.data
        sizes = [n for n in _divisors(rows) if n == 1 or n * seq_len // layout.context <= MOST_TOKENS]
        sizes = [min(micro_batch_rows, rows)] if micro_batch_rows else sizes
        smallest = Workload(
            config=config, tokens=min(sizes) * seq_len, layout=layout, micro_batches=-(-rows // min(sizes)),
            remat=kinds[-1], accumulate="shards", optimizer=optimizer, itemsize=itemsize, compiled=compiled,
        )  # fmt: skip
        needs = memory_plan(smallest).total
        least = min(least or needs, needs)
        if needs > usable:
            continue
        for size, kind, reshard, accumulate in itertools.product(sizes, kinds, (False, True), ACCUMULATE):
            if layout.world == 1 and (not reshard or accumulate == "shards"):
                continue
            work = dataclasses.replace(
                smallest, tokens=size * seq_len, micro_batches=-(-rows // size), remat=kind,
                reshard_after_forward=reshard, accumulate=accumulate,
            )  # fmt: skip
            found.append((step_cost(work, seq_len, host), len(found), work, size))
    for cost, _, work, size in sorted(found):
        plan = memory_plan(work)
        if plan.total <= usable:
            return Choice(
                layout=work.layout, micro_batch_rows=size, remat=work.remat, cost=cost, plan=plan,
                reshard_after_forward=work.reshard_after_forward, accumulate=work.accumulate,
            )  # fmt: skip
    if not least:
        raise ValueError(
            f"no layout of {world} GPUs divides {batch_rows} rows of {seq_len} tokens and this model; choose "
            "loop.batch_rows divisible by the number of GPUs"
        )
    raise ValueError(
        f"the model does not fit on {world} GPU{'s' * (world > 1)} of {memory / GIB:.0f} GiB: the smallest layout "
        f"needs {least / GIB:.0f} GiB on each, of {usable / GIB:.0f} usable; take more GPUs, a smaller seq_len or "
        "optim.state_dtype=bf16"
    )


def _layouts(config: ModelConfig, world: int, seq_len: int, batch_rows: int, host: int) -> Iterator[Layout]:
    """All that divide: tensor within a host; context and pipeline as powers of 2; shards of a host or of everything."""
    powers = [1 << n for n in range(world.bit_length()) if world % (1 << n) == 0]
    for tensor, context, pipeline in itertools.product(powers, powers, powers):
        inner = tensor * context
        if tensor > host or inner * pipeline > world or world % (inner * pipeline):
            continue
        data = world // (inner * pipeline)
        local = max(1, host // inner)
        for shard in {data, local if data % local == 0 else data}:
            layout = Layout(pipeline=pipeline, replicate=data // shard, shard=shard, context=context, tensor=tensor)
            try:
                check_model(layout, config, seq_len=seq_len, batch_rows=batch_rows)
            except ValueError:
                continue
            yield layout


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def step_cost(work: Workload, seq_len: int, host: int = HOST) -> float:
    """Estimated time of a step over the time of the model's operations alone; see the head of this file."""
    config, layout, s = work.config, work.layout, work.itemsize
    tokens, layers = work.tokens / layout.context, config.num_hidden_layers / layout.pipeline
    parts = layout.tensor * layout.pipeline
    flops = training_flops_per_token(config, seq_len)
    ideal = tokens * flops / parts / RATE  # of one micro-batch on one rank
    compute = ideal * (1 + repeated_flops_per_token(config, work.remat, seq_len) / flops)
    compute *= 1 + ELEMENTWISE_AGAIN * (work.remat != "none")
    # A cut layer's products have as many rows, but less to do with each.
    compute *= 1 + FEW_TOKENS / tokens + 0.01 * (layout.tensor.bit_length() - 1)

    link = HOST_LINK if layout.tensor * layout.context * layout.shard <= host else NETWORK
    replica_link = HOST_LINK if layout.world <= host else NETWORK
    parameters = num_parameters(config) / parts
    ranks = layout.shard * layout.context
    gathers = (2 if work.reshard_after_forward else 1) * s * parameters * (ranks - 1) / ranks / link
    scatter = 4 * parameters * (ranks - 1) / ranks / link
    scatter /= 1 if work.accumulate == "shards" else work.micro_batches
    copies = 8 * parameters / ranks * (layout.replicate > 1) / replica_link / work.micro_batches
    hidden = max(0.0, gathers + scatter + copies - compute)

    between = 10 * layers * s * tokens * config.hidden_size * (layout.tensor - 1) / layout.tensor / HOST_LINK
    keys = 2 * config.num_key_value_heads * config.d_head * s * work.tokens
    context_link = HOST_LINK if layout.tensor * layout.context <= host else NETWORK
    between += 3 * layers * keys * (layout.context - 1) / layout.context / layout.tensor / context_link
    if layout.pipeline > 1:
        between += 4 * s * tokens * config.hidden_size / layout.tensor / NETWORK
    bubble = bubble_share(layout.pipeline, work.virtual_stages, work.micro_batches)
    # A cheaper-looking layout with more axes in use should be clearly cheaper: each has costs that are not counted.
    axes = sum(size > 1 for size in (layout.pipeline, layout.context, layout.tensor))
    return (compute + hidden + between) * (1 + bubble) * (1 + 0.02 * axes) / ideal


# ------------------------------------------------------------------------------------------------------- from a recipe
R = TypeVar("R", bound=TrainingRecipe)


def optimizer_kind(optim: OptimConfig) -> OptimizerKind:
    if optim.kind == "muon":
        return "muon"
    kinds: dict[str, OptimizerKind] = {"fp32": "adamw", "bf16": "adamw-bf16", "8bit": "adamw-8bit"}
    return kinds[optim.state_dtype]


def _itemsize(loop: LoopConfig) -> int:
    """Bytes of an activation on a GPU."""
    return 4 if loop.precision == "fp32" else 2


def workload_of(recipe: TrainingRecipe, config: ModelConfig, layout: Layout) -> Workload:
    """What a recipe's step holds on a rank of a GPU job. `loop.remat = "auto"` counts as "elementwise"."""
    loop, parallel, reshard = recipe.loop, recipe.parallel, recipe.parallel.reshard_after_forward
    compiled = loop.compile != "off"
    rows = max(1, loop.batch_rows // layout.data)
    # A micro-batch is no larger than a rank's share of the first step.
    first = loop.batch_rows if loop.batch_warmup is None else loop.batch_warmup.start_rows
    size = min(max(1, first // layout.data), loop.micro_batch_rows or rows)
    return Workload(
        config=config,
        tokens=size * recipe.seq_len,
        layout=layout,
        micro_batches=-(-rows // size),
        itemsize=_itemsize(loop),
        optimizer=optimizer_kind(recipe.optim),
        remat=loop.remat if loop.remat != "auto" else ("elementwise" if compiled else "none"),
        compiled=compiled,
        reshard_after_forward=layout.pipeline == 1 if reshard is None else reshard,
        accumulate=parallel.accumulate,
        virtual_stages=parallel.virtual_stages,
    )


def settle(recipe: R, config: ModelConfig, world: int, memory: int | None) -> R:
    """The recipe with the layout of `parallel.auto` written out, for `world` GPUs with `memory` bytes each.

    A recipe without it is returned as it is. None (a CPU): all processes take rows and shards, nothing is chosen.
    Raises ValueError as `choose_layout` does.
    """
    if not recipe.parallel.auto:
        return recipe
    if memory is None:
        return _replaced(recipe, parallel=dataclasses.replace(recipe.parallel, auto=False))
    loop = recipe.loop
    # Every step's rows are a multiple of the first one's.
    rows = loop.batch_rows if loop.batch_warmup is None else loop.batch_warmup.start_rows
    choice = choose_layout(
        config, world, memory, seq_len=recipe.seq_len, batch_rows=rows,
        micro_batch_rows=loop.micro_batch_rows, remat=None if loop.remat == "auto" else loop.remat,
        optimizer=optimizer_kind(recipe.optim), itemsize=_itemsize(loop), compiled=loop.compile != "off",
    )  # fmt: skip
    sizes = {axis: getattr(choice.layout, axis) for axis in AXES}
    parallel = dataclasses.replace(
        recipe.parallel, auto=False, reshard_after_forward=choice.reshard_after_forward, accumulate=choice.accumulate,
        **sizes,
    )  # fmt: skip
    loop = dataclasses.replace(loop, micro_batch_rows=choice.micro_batch_rows, remat=choice.remat)
    return _replaced(recipe, parallel=parallel, loop=loop)


def _replaced(recipe: R, **changes: Any) -> R:
    return cast("R", dataclasses.replace(cast("Any", recipe), **changes))


def smallest_gpu() -> int | None:
    """Bytes of the smallest GPU of this machine, asked without touching one; None without GPUs.

    Raises ValueError where they cannot be asked.
    """
    if not torch.cuda.device_count():  # asks the driver's library alone
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        return min(int(line) for line in lines) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        raise ValueError(
            "parallel.auto needs the memory of the GPUs, and nvidia-smi does not tell it; set parallel.auto=false and "
            "the sizes of the axes"
        ) from None


def choose_free(recipe: TrainingRecipe, work: Workload, usable: int) -> Workload:
    """`work` with what the recipe leaves to the plan: what is computed again, then whether weights stay gathered.

    Recomputation comes first: it costs the device's time, gathering again mostly a link's that is idle otherwise.
    """
    if recipe.loop.remat == "auto":
        work = dataclasses.replace(work, remat=choose_remat(work, usable))
    if recipe.parallel.reshard_after_forward is None and work.layout.world > 1:
        kept = dataclasses.replace(work, reshard_after_forward=False)
        work = kept if memory_plan(kept).total <= usable else work
    return work


def pick_free(
    recipe: TrainingRecipe, config: ModelConfig, layout: Layout, device: torch.device, compiled: bool
) -> tuple[Remat, bool]:
    """`loop.remat` and `parallel.reshard_after_forward` on `device`: of a GPU what the memory plan says, of a CPU the
    usual."""
    work = dataclasses.replace(workload_of(recipe, config, layout), compiled=compiled)
    memory = device_memory(device)
    if memory is not None:
        work = dataclasses.replace(work, sums_in_place=adds_to_fp32(device, torch.bfloat16))
        work = choose_free(recipe, work, usable_bytes(memory, layout.world))
    elif recipe.loop.remat == "auto":
        work = dataclasses.replace(work, remat="elementwise" if compiled else "none")
    return work.remat, work.reshard_after_forward
