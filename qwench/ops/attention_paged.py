"""Attention on a GPU: which kernel serves which part of a flat token stream. Contract and letters as in `attention.py`.

* Single queries over a paged cache (decoding) and short runs of queries (drafts to verify): our Triton kernel.
* Everything else is a packed stream of fresh keys, or keys gathered from the pages: FlashAttention-4 where it is
  installed (extra `fa4`), cuDNN for one sequence, torch's variable-length FlashAttention for the rest. With a gradient:
  `ops.attention_train`.

Measured on an H200, forward, TFLOP/s at head size 64 / 128, 32,768 tokens: FlashAttention-4 611 / 664, cuDNN 465 / 591,
torch's FlashAttention 302 / 346.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwench.ops.attention import AttnMeta, KVCache
from qwench.ops.dispatch import batch_invariant
from qwench.ops.rope import Rope
from qwench.ops.triton_launch import runs_triton

HALF = (torch.float16, torch.bfloat16)
MAX_SHORT_QUERIES = 32
"""Sequences with at most this many new tokens each go through the paged kernel instead of a gathered copy."""


def attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor | None:
    """The attention, or None for what these kernels do not support (fp32)."""
    if q_THD.dtype not in HALF:
        return None
    if cache is None:
        cu_k, max_k = meta.packed_keys
        return _packed(q_THD, k_TKD, v_TKD, meta.cu_q, cu_k, meta.max_q, max_k, window)
    num_seqs, num_decodes = meta.cu_q.numel() - 1, meta.num_decodes
    # Batch-invariant: a prompt is read by one kernel, whatever stands beside it.
    if num_decodes == num_seqs or (meta.max_q <= MAX_SHORT_QUERIES and not batch_invariant()):
        return _few(q_THD, meta, cache, window, 1 if num_decodes == num_seqs else meta.max_q)
    if num_decodes == 0:
        return _prefill(q_THD, k_TKD, v_TKD, meta, cache, window)
    assert meta.lens_k is not None
    assert meta.block_table is not None
    first = AttnMeta(
        cu_q=meta.cu_q[: num_decodes + 1],
        max_q=1,
        lens_k=meta.lens_k[:num_decodes],
        max_k=meta.max_k,
        block_table=meta.block_table[:num_decodes],
        num_decodes=num_decodes,
    )
    rest = AttnMeta(
        cu_q=meta.cu_q[num_decodes:] - num_decodes,
        max_q=meta.max_q,
        lens_k=meta.lens_k[num_decodes:],
        max_k=meta.max_k,
        block_table=meta.block_table[num_decodes:],
        history=meta.history,
        num_keys=meta.num_keys,
    )
    d = num_decodes
    return torch.cat(
        (
            _few(q_THD[:d], first, cache, window, 1),
            _prefill(q_THD[d:], k_TKD[d:], v_TKD[d:], rest, cache, window),
        )
    )


def decodes(q_THD: Tensor, meta: AttnMeta) -> bool:
    """Whether `decode` serves this step: one query a sequence, in half precision. Never when batch-invariant: beside
    prompts, other kernels do what it does."""
    only_decodes = meta.num_decodes == meta.cu_q.numel() - 1 and not batch_invariant()
    return only_decodes and q_THD.dtype in HALF and runs_triton(q_THD.device)


def decode(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, rope: Rope, meta: AttnMeta, cache: KVCache, window: int | None
) -> Tensor:
    """Rotation, cache write and attention of a decoding step in one kernel."""
    from qwench.ops.attention_triton import decode_attention

    return decode_attention(q_THD, k_TKD, v_TKD, rope, meta, cache, window)


def _few(q_THD: Tensor, meta: AttnMeta, cache: KVCache, window: int | None, max_q: int) -> Tensor:
    from qwench.ops.attention_triton import paged_attention

    return paged_attention(q_THD, meta, cache, window, max_q)


def _prefill(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache, window: int | None) -> Tensor:
    if not meta.history:
        return _packed(q_THD, k_TKD, v_TKD, meta.cu_q, meta.cu_q, meta.max_q, meta.max_q, window)
    assert meta.lens_k is not None
    assert meta.block_table is not None
    # All keys of every sequence, laid end to end. The copy costs two reads of what the kernel reads many times.
    block = cache[0].shape[1]
    lens_k = meta.lens_k.long()
    cu_k = F.pad(lens_k.cumsum(0), (1, 0))
    total = meta.num_keys or int(cu_k[-1])  # the latter waits for the device
    rows = torch.arange(total, device=q_THD.device)
    seq = torch.searchsorted(cu_k[1:], rows, right=True)
    at = rows - cu_k[seq]
    slots = meta.block_table[seq, at // block].long() * block + at % block
    keys, values = (pages.flatten(0, 1).index_select(0, slots).to(q_THD.dtype) for pages in cache)
    return _packed(q_THD, keys, values, meta.cu_q, cu_k.int(), meta.max_q, meta.max_k, window)


def _packed(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    window: int | None,
) -> Tensor:
    """Causal attention of packed sequences whose queries are the last of their keys."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_SKD, v_SKD)):
        from qwench.ops.attention_train import extent_of, packed_attention

        extent = extent_of(max_q, max_k, cu_q.numel() - 1)
        return packed_attention(q_THD, k_SKD, v_SKD, cu_q, cu_k, extent, window)
    one = cu_q.numel() == 2 and max_q == max_k and window is None and not batch_invariant()
    if (flash := flash_attention_4()) is not None:
        left = window - 1 if window is not None else None
        out = flash(
            q_THD,
            k_SKD,
            v_SKD,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            causal=True,
            window_size=(left, 0) if left is not None else (None, None),
        )
        return out[0] if isinstance(out, tuple) else out
    if one:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SKD, v_SKD))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    varlen, knows_gqa = _varlen()
    further: dict[str, Any] = {"enable_gqa": True} if knows_gqa else {}
    if not knows_gqa:
        group = q_THD.shape[1] // k_SKD.shape[1]
        k_SKD, v_SKD = k_SKD.repeat_interleave(group, 1), v_SKD.repeat_interleave(group, 1)
    left = window - 1 if window is not None else -1
    return varlen(q_THD, k_SKD, v_SKD, cu_q, cu_k, max_q, max_k, window_size=(left, 0), **further)


@functools.cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """torch's variable-length attention and whether it takes fewer key heads than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


@functools.cache
def flash_attention_4() -> Callable[..., Any] | None:
    """FlashAttention-4's variable-length function where it is installed and the GPU is a Hopper or newer."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return None
    try:
        from flash_attn.cute import (  # pyright: ignore[reportMissingImports]
            flash_attn_varlen_func,
        )
    except ImportError:
        return None
    return flash_attn_varlen_func
