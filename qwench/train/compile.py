"""Blocks compiled one by one for training, and what a block keeps from the forward pass for the backward pass.

    compile_blocks(model, remat="none")        # after the parallel plan, before fully_shard

Every block becomes one graph without breaks, and as all blocks run the same code, it is compiled once for all of them.
Norm, residual sums and the casts of fp32 master weights are traced from their references and fused, on a CPU SwiGLU and
rotation too; on a GPU these two are opaque operations (`ops.elementwise_train`). Products go to the vendor's library
and attention is one opaque operation (`ops.attention_train`), so that neither the number nor the lengths of a batch's
sequences matter to the graph. The number of tokens does: with `dynamic=False` each one is compiled. The output layer
and its loss stay outside.

Blocks with a cache (generation) run uncompiled. The exchanges of tensor and context parallelism are traced like the
rest.

What a block keeps ("remat"), per token and layer, for D hidden size, H query heads, K key/value heads of size d, F
feed-forward width, activations of s bytes; what it computes a second time in the backward pass:

| remat       | kept, bytes                       | computed again                                                    |
|-------------|-----------------------------------|-------------------------------------------------------------------|
| none        | s (4 D + 2 (H + K) d + 3 F) + 4 H | hardly anything                                                   |
| elementwise | s (2 D + 2 (H + K) d + 2 F) + 4 H | norms, rotation, SwiGLU: no product                               |
| mlp         | s (2 D + 2 (H + K) d) + 4 H       | also the gate and up product: 4 D F operations                    |
| attention   | s (D + H d) + 4 H                 | also q, k, v, o: 2 D (2 (H + K) d + 2 F) operations with the above |
| full        | s D                               | also attention                                                    |

"none" leaves the choice to the compiler, which keeps what products read (normed inputs, SwiGLU's result) and 8 bytes
for the norms; "elementwise" writes these again in kernels of the backward pass that read their inputs in any case:
a third of the memory for 0 to 5 % of the time. Uncompiled blocks keep more with "none" than the table says.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qwench.model.config import ModelConfig
from qwench.model.decoder import Block, CausalLM
from qwench.ops import attention_train, dispatch, elementwise_train  # noqa: F401  (what compiled blocks take)
from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.rope import Rope
from qwench.ops.triton_launch import runs_triton

Remat = Literal["none", "elementwise", "mlp", "attention", "full"]
IN_BLOCKS = ("attention", "linear", "rms_norm", "rope", "rope_and_store", "swiglu")
"""Operations of a block; compiled code takes their `when_compiled` or traces their references."""

Forward = Callable[[Tensor, Rope, AttnMeta, KVCache | None], Tensor]


def compile_blocks(
    model: CausalLM, remat: Remat = "none", *, dynamic: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each block's forward pass, in place; parameters, their names and hooks on the blocks stay as they are.

    Call it inside `dispatch.forced` if implementations are forced. `dynamic=True` makes one graph for all numbers of
    tokens (fine-tuning), somewhat slower. Raises ValueError for forced implementations that cannot be compiled.
    """
    if wrong := refused_choices():
        named = ", ".join(f"ops.{name}={choice}" for name, choice in wrong.items())
        raise ValueError(f"compiled blocks cannot take {named}; leave it out, or set loop.compile=off")
    rematerialise(model, remat)
    for layer in model.model.layers:
        eager = layer.forward
        compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic, backend=backend)
        layer.forward = partial(_either, compiled, eager)  # pyright: ignore[reportAttributeAccessIssue]
    model.model.register_forward_pre_hook(_as_stream, with_kwargs=True)


def uncompiled() -> AbstractContextManager[None]:
    """Within the block, compiled blocks run uncompiled: for the few passes of a shape that is not worth a graph."""
    return torch.compiler.set_stance("force_eager")


def can_compile(device: torch.device) -> bool:
    """Triton runs on a GPU; for a CPU there is the C++ compiler that torch would call."""
    if device.type == "cuda":
        return runs_triton(device)
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def _either(
    compiled: Forward, eager: Forward, x_TD: Tensor, rope: Rope, meta: AttnMeta, cache: KVCache | None = None
) -> Tensor:
    run = compiled if isinstance(meta, attention_train.Stream) and cache is None else eager
    return run(x_TD, rope, meta, cache)


def refused_choices() -> dict[str, str]:
    """The forced implementations that compiled blocks cannot take: some operations are their own, of others they trace
    the reference."""
    forced = dispatch.forced_choices()
    own = {name for name in IN_BLOCKS if dispatch.OPERATIONS[name].when_compiled is not None}
    return {name: forced[name] for name in IN_BLOCKS if name in forced and (name in own or forced[name] != "reference")}


def _as_stream(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The decoder's `meta` as compiled blocks take it, once for all of them."""
    if "meta" in kwargs:
        return args, kwargs | {"meta": attention_train.Stream.of(kwargs["meta"])}
    tokens_T, positions_T, meta, *rest = args
    return (tokens_T, positions_T, attention_train.Stream.of(meta), *rest), kwargs


# ---------------------------------------------------------------------------------------------------- rematerialisation
def rematerialise(model: CausalLM, remat: Remat) -> None:
    """Let every block keep only what the table at the top says, compiled or not. In place; "none" changes nothing.

    Blocks without a gradient or with a cache run as before.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat is {remat!r}; choose one of: {', '.join(get_args(Remat))}")
    if remat == "none":
        return
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_says_something_new)
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        keep = partial(_contexts, _kept_products(layer, remat)) if remat != "full" else None
        layer.forward = partial(_checkpointed, layer.forward, keep)


def _says_something_new(record: logging.LogRecord) -> bool:
    """torch asks to see to it that nothing in the block is changed in place; nothing is, so users need not read it."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def _checkpointed(
    forward: Forward,
    keep: Callable[[], Any] | None,
    x_TD: Tensor,
    rope: Rope,
    meta: AttnMeta,
    cache: KVCache | None = None,
) -> Tensor:
    if cache is not None or not torch.is_grad_enabled():
        return forward(x_TD, rope, meta, cache)
    if not torch.compiler.is_compiling():
        forward = dispatch.bound(forward)
    further: dict[str, Any] = {} if keep is None else {"context_fn": keep}
    # Nothing in a block draws random numbers.
    out = checkpoint(forward, x_TD, rope, meta, None, use_reentrant=False, preserve_rng_state=False, **further)
    assert isinstance(out, Tensor)
    return out


def _kept_products(layer: Block, remat: Remat) -> frozenset[tuple[int, int]]:
    """(inputs, outputs) of the products whose results are kept. Nothing reads the last one's result a second time."""
    attention, weights = layer.self_attn, []
    if remat in ("elementwise", "mlp"):
        weights += [attention.qkv_proj.weight, attention.o_proj.weight]
    if remat == "elementwise":
        weights.append(layer.mlp.gate_up_proj.weight)
    return frozenset((weight.shape[1], weight.shape[0]) for weight in weights)


def _contexts(products: frozenset[tuple[int, int]]) -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, products))


_ATTENTION = torch.ops.qwench.packed_attention.default
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten._scaled_mm.default: 0}
"""Products and the position of their left factor."""


def _policy(products: frozenset[tuple[int, int]], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op == _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in _PRODUCTS:
        left, right = args[_PRODUCTS[op] : _PRODUCTS[op] + 2]
        if (left.shape[1], right.shape[1]) in products:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def kept_bytes_per_token(config: ModelConfig, remat: Remat, itemsize: int = 2) -> int:
    """Bytes that all compiled blocks keep for the backward pass per token, by the table at the top."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention_out = heads * config.d_head
    both = 2 * (heads + config.num_key_value_heads) * config.d_head
    wide = {
        "none": 4 * hidden + both + 3 * config.intermediate_size,
        "elementwise": 2 * hidden + both + 2 * config.intermediate_size,
        "mlp": 2 * hidden + both,
        "attention": hidden + attention_out,
        "full": hidden,
    }[remat]
    return config.num_hidden_layers * (itemsize * wide + (0 if remat == "full" else 4 * heads))


def repeated_flops_per_token(config: ModelConfig, remat: Remat, seq_len: int) -> int:
    """Operations that all blocks do a second time per token; attention over sequences of `seq_len` on average."""
    hidden, heads, wide = config.hidden_size, config.num_attention_heads, config.intermediate_size
    mlp = 4 * hidden * wide
    products = mlp + 4 * hidden * (heads + config.num_key_value_heads) * config.d_head
    attention = 2 * heads * config.d_head * seq_len  # two products over half of the keys
    by_kind = {"none": 0, "elementwise": 0, "mlp": mlp, "attention": products, "full": products + attention}
    return config.num_hidden_layers * by_kind[remat]
