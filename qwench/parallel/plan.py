"""The table that says how each parameter splits over the ranks of a tensor-parallel group. No communication here.

    rank 1 of 2 holds shard("model.layers.0.mlp.down_proj.weight", whole, config, 1, 2)

A pair of matrices splits so that one sum at its end is all that the ranks exchange [Megatron-LM]: the first by its
outputs (rows of the weight; each of q, k, v, gate and up by itself, since they are one matrix in memory), the second by
its inputs (columns). Attention splits by whole heads: query heads stay with the key/value head that they read. Norms
are the same on all ranks. So are the embedding and the output matrix in `PLAN`, the engine's; `TRAINING_PLAN` cuts both
by rows of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.model.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Split:
    """How one parameter splits."""

    axis: int | None = None
    """The dimension that is cut; None: every rank has the whole parameter."""
    parts: tuple[str, ...] = ()
    """What lies along that dimension, in this order; each is cut into equal runs, one a rank."""


Plan = Mapping[str, Split]
REPLICATED = Split()
PLAN: Plan = {
    "model.embed_tokens.weight": REPLICATED,
    "input_layernorm.weight": REPLICATED,
    "self_attn.qkv_proj.weight": Split(0, ("q", "k", "v")),
    "self_attn.qkv_proj.bias": Split(0, ("q", "k", "v")),
    "self_attn.o_proj.weight": Split(1, ("q",)),
    "post_attention_layernorm.weight": REPLICATED,
    "mlp.gate_up_proj.weight": Split(0, ("gate", "up")),
    "mlp.down_proj.weight": Split(1, ("up",)),
    "model.norm.weight": REPLICATED,
    "lm_head.weight": REPLICATED,
}
"""By the parameter's name; inside a layer without the layer's prefix."""
_ROWS = Split(0, ("vocabulary",))
TRAINING_PLAN: Plan = {**PLAN, "model.embed_tokens.weight": _ROWS, "lm_head.weight": _ROWS}
"""The same with the vocabulary cut, so that the logits and the largest gradients are cut as well."""


def split_of(name: str, plan: Plan = PLAN) -> Split:
    """The table's entry for a full parameter name of the decoder. Raises ValueError for one that it lacks."""
    split = plan.get(_LAYER.sub("", name, count=1))
    if split is None:
        raise ValueError(f"the parallel plan has no entry for the parameter {name!r}; add one to parallel/plan.py")
    return split


def check(config: ModelConfig, world: int, plan: Plan = PLAN) -> None:
    """Raise ValueError, naming sizes that work, if the model does not split over `world` ranks."""
    if config.num_experts:
        raise ValueError(f"the model has {config.num_experts} experts; only dense models split over several devices")
    names = ["num_attention_heads", "num_key_value_heads", "intermediate_size"]
    if any("vocabulary" in split.parts for split in plan.values()):
        names.append("vocab_size")
    counts = {name: getattr(config, name) for name in names}
    shared = math.gcd(*counts.values())
    if world < 1 or shared % world:
        works = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"a model with {sizes} does not split over {world} devices; these work: {works}")


def local_config(config: ModelConfig, world: int) -> ModelConfig:
    """The shape of the network that one rank computes: its share of the heads and of the feed-forward width."""
    check(config, world)
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // world,
        num_key_value_heads=config.num_key_value_heads // world,
        intermediate_size=config.intermediate_size // world,
        head_dim=config.d_head,
    )


def spans(name: str, config: ModelConfig, rank: int, world: int, plan: Plan = PLAN) -> list[tuple[int, int]]:
    """[start, stop) of what `rank` has of the whole parameter along its split axis, to be laid end to end.

    Empty for a replicated parameter. Raises ValueError where `check` does.
    """
    check(config, world, plan)
    assert 0 <= rank < world
    sizes = [_size(part, config) for part in split_of(name, plan).parts]
    tops = itertools.accumulate(sizes, initial=0)
    return [
        (top + size * rank // world, top + size * (rank + 1) // world) for top, size in zip(tops, sizes, strict=False)
    ]


def shard(name: str, tensor: Tensor, config: ModelConfig, rank: int, world: int, plan: Plan = PLAN) -> Tensor:
    """What `rank` holds of a whole parameter: the tensor itself if it is replicated or world is 1, else a copy."""
    axis = split_of(name, plan).axis
    if axis is None or world == 1:
        return tensor
    pieces = [tensor.narrow(axis, start, stop - start) for start, stop in spans(name, config, rank, world, plan)]
    return torch.cat(pieces, axis)


def join(name: str, shards: Sequence[Tensor], config: ModelConfig, plan: Plan = PLAN) -> Tensor:
    """The whole parameter from all ranks' shards, in the order of the ranks; the inverse of `shard`."""
    split, world = split_of(name, plan), len(shards)
    if split.axis is None or world == 1:
        return shards[0]
    check(config, world, plan)
    sizes = [_size(part, config) // world for part in split.parts]
    by_rank = [piece.split(sizes, split.axis) for piece in shards]
    return torch.cat([pieces[part] for part in range(len(sizes)) for pieces in by_rank], split.axis)


def _size(part: str, config: ModelConfig) -> int:
    """Rows or columns of the whole model that belong to a part."""
    if part == "vocabulary":
        return config.vocab_size
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    return heads[part] * config.d_head if part in heads else config.intermediate_size
