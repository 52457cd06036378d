"""Peak memory of a training step on one rank, predicted from shapes alone, before anything is allocated.

    plan = memory_plan(Workload(config=preset("qwen2.5-7b"), tokens=8192, layout=Layout(shard=8), remat="mlp"))
    plan.total, plan.moment                          # bytes, and the moment of the step at which they are needed
    choose_remat(workload, usable_bytes(80 * GIB))   # the cheapest that fits

A step has five moments that can be the dearest; the plan is the dearest one:

* loss: all blocks' activations and the output layer's buffers;
* first backward: all activations, and what the last block needs beside them to form its gradients;
* last backward: hardly any activation is left, but all gradients are there, and the embedding's are formed;
* exchange: the same at a step's last micro-batch, whose gradients go to the ranks that keep them (several ranks only);
* update: weights, gradients, states and what the optimiser needs for its largest matrix.

The figure is what torch has allocated (`max_memory_allocated`). What it cannot use is `reserve_bytes`. Nothing here
reads a device, but `device_memory`. `benchmarks/memory_plan.py` compares with real steps.

Sizes are in bytes. Symbols: D hidden size, F feed-forward width, H query and K key/value heads of size d, V vocabulary
rows, s bytes of an activation, R ranks of the tensor axis, G ranks over which FSDP shards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from qwench.model.config import ModelConfig
from qwench.model.names import pieces
from qwench.ops.cross_entropy import chunk_rows, triton_chunk_tokens
from qwench.parallel import plan
from qwench.parallel.layout import Layout
from qwench.parallel.schedule import rank_actions
from qwench.parallel.stages import deal_layers, stages_of_rank
from qwench.train.compile import Remat, kept_bytes_per_token

GIB = 1 << 30
CONTEXT_BYTES = 3 * GIB // 2
"""CUDA's context and the code of loaded kernels, which torch does not count."""
NCCL_BYTES = 2 * GIB
"""Buffers of NCCL's communicators, with several ranks."""
FRAGMENTATION = 0.04
"""Share of a device's memory that lies idle between allocated blocks."""
LIBRARY_BYTES = 96 << 20
"""Workspaces of cuBLAS on a GPU, which torch does count."""
ONE_PROCESS = Layout()
OptimizerKind = Literal["adamw", "adamw-bf16", "adamw-8bit", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All that the memory of a rank depends on."""

    config: ModelConfig
    tokens: int
    """Of one micro-batch, before the context and tensor axes divide them."""
    layout: Layout = ONE_PROCESS
    micro_batches: int = 1
    """Of a rank in a step."""
    itemsize: int = 2
    """Bytes of an activation: 2 bf16, 4 fp32. Weights and gradients are fp32."""
    optimizer: OptimizerKind = "adamw"
    """adamw-bf16 and adamw-8bit keep their states in these; muon takes adamw for what is not a block's matrix."""
    remat: Remat = "none"
    compiled: bool = True
    copies: bool = True
    """One process: matrices of the blocks are kept in the activations' dtype too (`train.copies`)."""
    reshard_after_forward: bool = True
    accumulate: Literal["whole", "shards"] = "whole"
    virtual_stages: int = 1
    """Of each pipeline rank."""
    on_gpu: bool = True
    sums_in_place: bool = True
    """The device adds products to fp32 sums in place (`ops.cross_entropy.add_product_`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes at the dearest moment of a step, on the rank that needs most."""

    moment: str
    weights: int
    """fp32 master weights."""
    copies: int
    """Of the blocks' matrices, in the activations' dtype."""
    optimizer: int
    gradients: int
    """Those that are there at this moment."""
    gathered: int
    """FSDP's whole units in the activations' dtype."""
    exchange: int
    """Gradients on their way into `gradients`: fresh from a backward pass, or being scattered."""
    activations: int
    """Kept by all blocks for the backward pass."""
    block: int
    """One block's backward pass: what it computes again, gradients of activations, attention."""
    loss: int
    """Output layer: a chunk's logits, the cast matrix, hidden states and their gradients."""
    other: int
    """The batch, tables of positions, the optimiser's temporary tensors, workspaces of libraries."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "moment"}


def memory_plan(work: Workload) -> MemoryPlan:
    """The dearest moment of a step on the dearest rank. Raises ValueError for a model that the axes do not divide."""
    ranks = range(work.layout.pipeline)
    return max((moment for rank in ranks for moment in moments(work, rank)), key=lambda plan: plan.total)


# ------------------------------------------------------------------------------------------------------------ fitting
def reserve_bytes(memory: int, world: int) -> int:
    """What of a device's memory no plan can count on: context, NCCL, fragmentation."""
    return CONTEXT_BYTES + (NCCL_BYTES if world > 1 else 0) + round(FRAGMENTATION * memory)


def usable_bytes(memory: int, world: int = 1) -> int:
    return memory - reserve_bytes(memory, world)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU, whose memory is shared with others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


COMPILED_KINDS: tuple[Remat, ...] = ("none", "elementwise", "mlp", "attention", "full")
"""What to try in turn: from what computes hardly anything again to everything."""
OTHER_KINDS: tuple[Remat, ...] = ("none", "elementwise", "mlp", "full")


def choose_remat(work: Workload, usable: int) -> Remat:
    """The kind that computes least again among those that fit into `usable` bytes; "full" if none does.

    `work.remat` is ignored.
    """
    for kind in COMPILED_KINDS if work.compiled else OTHER_KINDS:
        if memory_plan(dataclasses.replace(work, remat=kind)).total <= usable:
            return kind
    return "full"


# ------------------------------------------------------------------------------------------------------------- shapes
@dataclass(frozen=True, slots=True)
class _Parameters:
    """Numbers of parameters on one rank."""

    whole: int
    shard: int
    """What FSDP leaves of them."""
    matrices: int = 0
    """Those of `whole` in matrices."""
    largest: int = 0
    """The largest tensor's, as the optimiser sees it."""

    def __add__(self, other: _Parameters) -> _Parameters:
        return _Parameters(
            self.whole + other.whole,
            self.shard + other.shard,
            self.matrices + other.matrices,
            max(self.largest, other.largest),
        )

    def times(self, number: int) -> _Parameters:
        return _Parameters(self.whole * number, self.shard * number, self.matrices * number, self.largest)


NOTHING = _Parameters(0, 0)


@functools.lru_cache(maxsize=256)
def _parameters(config: ModelConfig, tensor: int, ranks: int) -> dict[str, _Parameters]:
    """ "block": one block's; and every tensor outside of the blocks by its name. FSDP shards over `ranks`."""
    found = {"block": NOTHING}
    if tensor > 1:
        plan.check(config, tensor, plan.TRAINING_PLAN)
    for name, (piece, *_) in pieces(config, "qwench").items():
        if ".layers." in name and ".layers.0." not in name:
            continue
        shape = list(piece.shape)
        axis = plan.split_of(name, plan.TRAINING_PLAN).axis
        if axis is not None:
            shape[axis] //= tensor
        whole, shard = math.prod(shape), math.prod([-(-shape[0] // ranks), *shape[1:]])
        one = _Parameters(whole, shard, whole if len(shape) > 1 else 0, shard)
        if ".layers.0." in name:
            found["block"] += one
        else:
            found[name] = one
    return found


def _kept_per_layer(work: Workload) -> int:
    """Of one micro-batch on this rank."""
    config, layout, s = work.config, work.layout, work.itemsize
    tokens = work.tokens // layout.context
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.d_head
    if work.compiled:
        wide = kept_bytes_per_token(config, work.remat, s) // config.num_hidden_layers
    else:
        hidden, width = config.hidden_size, config.intermediate_size
        qkv = (heads + 2 * kv_heads) * d
        # Attention is computed again in every kind but "none": it is not the operation that compiled blocks keep.
        wide = s * {
            "none": 4 * hidden + qkv + (2 * heads + kv_heads) * d + 3 * width,
            "elementwise": 2 * hidden + qkv + 2 * width,
            "mlp": 2 * hidden + qkv,
            "attention": hidden,
            "full": hidden,
        }[work.remat] + (4 * heads + 8 if work.remat == "none" else 0)
    kept = tokens * wide // layout.tensor
    if layout.context > 1 and work.remat == "none":  # keys and values of all ranks instead of its own
        kept += s * 2 * kv_heads * d * (work.tokens + work.tokens // (2 * layout.context) - tokens) // layout.tensor
    return kept


def _block_bytes(work: Workload) -> int:
    """Beside what it has kept, while a block's backward pass runs."""
    config, layout, s = work.config, work.layout, work.itemsize
    tokens = work.tokens // layout.context
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.d_head
    hidden, width = config.hidden_size, config.intermediate_size
    again = {
        "none": 0,
        "elementwise": width + hidden,
        "mlp": 3 * width + hidden,
        "attention": 3 * width + 2 * hidden + (2 * heads + 3 * kv_heads) * d,
        "full": 3 * width + 3 * hidden + (3 * heads + 3 * kv_heads) * d,
    }[work.remat]
    # Gradients of SwiGLU's result and of gate and up; then those of q, k, v and attention's sums in fp32.
    mlp = s * (3 * width + 2 * hidden)
    attention = s * (2 * heads + 2 * kv_heads) * d + 4 * (heads + 2 * kv_heads) * d + s * 2 * hidden
    block = tokens * (s * again + max(mlp, attention)) // layout.tensor
    if layout.context > 1:  # all ranks' keys and values, as they came and as attention reads them, and gradients
        block += s * 8 * kv_heads * d * work.tokens // layout.tensor
    if layout.tensor > 1:  # all ranks' tokens, and gradients of them
        block += 3 * s * tokens * hidden
    return block


def _loss_bytes(work: Workload, rows: int) -> tuple[int, int]:
    """(while the loss is computed, of it still there when the last block's backward pass runs); without the fp32
    gradient of the output matrix. `rows` of the vocabulary are this rank's."""
    layout, s = work.layout, work.itemsize
    tokens, hidden = work.tokens // layout.context, work.config.hidden_size
    matrix = rows * hidden
    own = 3 * s * tokens * hidden // layout.tensor  # the norm's input as it keeps it, its result, and the gradient
    everyone = 2 * s * tokens * hidden if layout.tensor > 1 else 0
    cast = s * matrix if layout.world == 1 and s < 4 else 0
    if work.on_gpu:
        step = min(tokens, triton_chunk_tokens(tokens, rows, s))
        logits = step * rows * s
        product = 4 * matrix if step < tokens and not work.sums_in_place else 0
    else:
        step = min(tokens, chunk_rows(rows))
        logits = step * rows * (s + 4 if s == 4 else s + 8)  # torch's softmax on a CPU casts first
        product = s * matrix
    return own + everyone + cast + logits + product + 8 * tokens, own


def _layers(work: Workload, rank: int) -> tuple[int, int]:
    """(layers of a rank of the pipeline, layers times micro-batches whose activations it keeps at one time)."""
    ranks, virtual = work.layout.pipeline, work.virtual_stages
    if ranks == 1:
        return work.config.num_hidden_layers, work.config.num_hidden_layers
    stages = stages_of_rank(deal_layers(work.config, ranks * virtual), rank, ranks)
    # More micro-batches change nothing once the pipeline is full.
    number = min(work.micro_batches, ranks * (virtual + 1))
    kept = most = 0
    for action in rank_actions(ranks, virtual, number, rank):
        kept += len(stages[action.chunk].layers) * (1 if action.kind == "forward" else -1)
        most = max(most, kept)
    return sum(len(stage.layers) for stage in stages), most


# ------------------------------------------------------------------------------------------------------------ moments
def moments(work: Workload, rank: int = 0) -> Iterator[MemoryPlan]:
    """The moments of a step on a rank of the pipeline, from what it holds at each."""
    config, layout, s = work.config, work.layout, work.itemsize
    found = _parameters(config, layout.tensor, layout.shard * layout.context)
    first, last = rank == 0, rank == layout.pipeline - 1
    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    embedding = found["model.embed_tokens.weight"] if first else NOTHING
    head = found[head_name] if last and not (first and config.tie_word_embeddings) else NOTHING
    outer = embedding + head + (found["model.norm.weight"] if last else NOTHING)
    layers, kept_layers = _layers(work, rank)
    block, blocks = found["block"], found["block"].times(layers)
    everything = outer + blocks
    alone = layout.world == 1
    copied = work.copies and alone and s < 4

    held = blocks.shard + outer.shard
    weights = 4 * held
    copies = s * blocks.matrices if copied else 0
    per_parameter = {"adamw": 8, "adamw-bf16": 4, "adamw-8bit": 2, "muon": 8}[work.optimizer]
    optimizer = per_parameter * held
    if work.optimizer == "adamw-8bit":  # a power of two for every 128 values of both states
        optimizer += held // 64
    if work.optimizer == "muon":  # one momentum in fp32 for matrices
        optimizer -= 4 * round(blocks.shard * blocks.matrices / blocks.whole)
    kept = _kept_per_layer(work)
    activations = kept * kept_layers
    casts = 0
    if not work.compiled and alone and s < 4 and not copied:  # every product keeps its cast weight
        casts = s * (blocks.matrices if work.remat == "none" else block.matrices)
    tokens = work.tokens // layout.context
    other = 28 * work.tokens + tokens * config.d_head * s + (LIBRARY_BYTES if work.on_gpu else 0)
    other += 2 * s * tokens * config.hidden_size if layout.pipeline > 1 else 0  # what comes from and goes to neighbours
    again = work.micro_batches > 1  # gradients of earlier micro-batches are there
    whole = again and work.accumulate == "whole"
    rows = head.whole or embedding.whole
    loss, after_loss = _loss_bytes(work, rows // config.hidden_size) if last else (0, 0)
    d_head = 4 * rows if last else 0  # fp32, formed in the forward pass

    if alone:
        before = 4 * everything.whole if again else 0
        gathered = exchange = scattered = 0
        fresh = (s if copied else 4) * block.matrices if work.compiled else (s + 4) * block.matrices // 2
    else:
        before = 4 * (everything.whole if whole else held) if again else 0
        # The unit at work, the next one as it arrives, and as it is laid out.
        units = 3 * block.whole if work.reshard_after_forward else blocks.whole + block.whole
        gathered = s * (outer.whole + units)
        fresh = s * block.whole
        scattered = 4 * block.whole
        exchange = s * outer.whole
    base = {"weights": weights, "copies": copies, "optimizer": optimizer}

    if last:
        yield MemoryPlan(
            moment="loss", **base, gradients=before, gathered=gathered, exchange=d_head,
            activations=activations + casts, block=0, loss=loss, other=other,
        )  # fmt: skip
    yield MemoryPlan(
        moment="first backward", **base, gradients=before, gathered=gathered,
        exchange=(d_head if alone else s * rows * last) + fresh + scattered * (not whole),
        activations=activations + casts, block=_block_bytes(work), loss=after_loss, other=other,
    )  # fmt: skip

    d_tokens = tokens * config.hidden_size // layout.tensor * (4 + s) if first else 0
    if alone:
        # Tied: the output layer's gradient waits for the embedding's, then there is their sum; of these three one is
        # counted below unless gradients of earlier micro-batches are. Else the embedding's, until it is added.
        extra = 4 * embedding.whole * (2 + again if config.tie_word_embeddings else again)
        yield MemoryPlan(
            moment="last backward", **base, gradients=4 * everything.whole, gathered=0, exchange=extra,
            activations=0, block=d_tokens, loss=0, other=other,
        )  # fmt: skip
    else:
        tied = s * outer.whole if first and last and config.tie_word_embeddings else 0
        end = {"gathered": s * outer.whole, "activations": 0, "block": d_tokens, "loss": 0}
        if whole:
            yield MemoryPlan(
                moment="last backward", **base, gradients=4 * everything.whole, exchange=exchange + tied,
                other=other, **end,
            )  # fmt: skip
        yield MemoryPlan(
            moment="exchange", **base, gradients=4 * held + (4 * outer.whole if whole else 0),
            exchange=exchange + tied + 4 * outer.whole, other=other, **end,
        )  # fmt: skip
    temporary = 12 * block.largest if work.optimizer == "muon" else 0
    yield MemoryPlan(
        moment="update", **base, gradients=4 * held, gathered=0, exchange=0, activations=0, block=0, loss=0,
        other=other + temporary,
    )  # fmt: skip
