"""Causal attention over a flat packed token stream, with or without a paged key/value cache.

Shape suffixes: T tokens of all sequences, H query heads, K key/value heads, D head size, B sequences,
S keys of one sequence, N cache blocks, P positions in a block.

Contract of `attention(q_THD, k_TKD, v_TKD, meta, cache=None, window=None, rope=None) -> out_THD`
* The T tokens are B sequences laid end to end; sequence b owns rows cu_q[b]:cu_q[b+1].
* Without a cache, a query sees the keys of its own sequence up to and including itself.
* Without a cache but with `meta.cu_k`, sequence b has the keys cu_k[b]:cu_k[b+1] of k and v, and its queries are the
  last of them: a piece of a sequence whose earlier keys were computed elsewhere. `meta.gather` brings them: it makes
  these keys and values of the k and v given, after the rotation.
* With `rope`, q and k are rotated first, and with a cache the rotated k and v are written to it at `meta.slots`.
  Without, both has been done already (see `ops.rope.rope_and_store`).
* With a cache, sequence b has `lens_k[b]` keys (old and new), found through `block_table[b]`, and its queries are the
  last of them.
* H is a multiple of K; query head h reads key/value head h // (H/K) (grouped-query attention [Qwen2 TR 2.2.1]).
* `window` w: a query sees at most the last w keys, itself included.
* Softmax is evaluated in fp32 and scaled by D ** -0.5; the result has q's dtype. Differentiable without a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops.dispatch import Implementation, Operation
from qwench.ops.hardware import upload
from qwench.ops.rope import Rope, rope_and_store

KVCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [N, P, K, D]."""


@dataclass(frozen=True, slots=True)
class AttnMeta:
    """How a flat token stream splits into sequences, and where their cached keys are.

    Two packed documents of 3 and 5 tokens: `AttnMeta.packed([3, 5])`. One decoding step of a sequence with 9 cached
    tokens and one new: cu_q=[0, 1], lens_k=[10], block_table=[[0]], slots=[9].
    """

    cu_q: Tensor
    """[B + 1] int32: start row of each sequence, then T."""
    max_q: int
    lens_k: Tensor | None = None
    """[B] int32: keys of each sequence including the new ones; None without a cache."""
    max_k: int = 0
    block_table: Tensor | None = None
    """[B, blocks] int32: cache blocks of each sequence, in order."""
    slots: Tensor | None = None
    """[T] int64: flat cache position (block * P + offset) that each new key is written to."""
    num_decodes: int = 0
    """How many of the first sequences certainly have a single query; fast paths treat them apart. 0 is always right."""
    history: bool = True
    """With a cache: whether any sequence after the first `num_decodes` has keys from before. True is always right."""
    num_keys: int = 0
    """Sum of lens_k after the first `num_decodes`; 0 where the host does not know it."""
    cu_k: Tensor | None = None
    """[B + 1] int32, without a cache: start row of each sequence's keys, then their sum; None: the same as cu_q."""
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """With cu_k: (k, v) of the T tokens -> keys and values of all sequences, differentiable; None: k, v are those."""

    @staticmethod
    def packed(
        seq_lens: Sequence[int],
        device: torch.device | str = "cpu",
        key_lens: Sequence[int] | None = None,
        gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> AttnMeta:
        """Sequences laid end to end, no cache. `key_lens`: how many keys each has, where not one a query.

        Does not wait for the device.
        """
        if key_lens is None:
            return AttnMeta(cu_q=upload(_starts(seq_lens), device), max_q=max(seq_lens))
        assert all(q <= k for q, k in zip(seq_lens, key_lens, strict=True)), "queries are the last of their keys"
        return AttnMeta(
            cu_q=upload(_starts(seq_lens), device),
            max_q=max(seq_lens),
            max_k=max(key_lens),
            cu_k=upload(_starts(key_lens), device),
            gather=gather,
        )

    @property
    def packed_keys(self) -> tuple[Tensor, int]:
        """(cu_k, longest sequence of keys) of a packed stream without a cache."""
        return (self.cu_q, self.max_q) if self.cu_k is None else (self.cu_k, self.max_k)


def _starts(lens: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    meta: AttnMeta,
    cache: KVCache | None = None,
    window: int | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """See the contract at the top of this file."""
    run = ATTENTION.choose(q_THD.device)
    if rope is not None:
        if run is _paged and cache is not None and not torch.is_grad_enabled():
            from qwench.ops import attention_paged

            if attention_paged.decodes(q_THD, meta):
                return attention_paged.decode(q_THD, k_TKD, v_TKD, rope, meta, cache, window)
        q_THD, k_TKD = rope_and_store(q_THD, k_TKD, v_TKD, rope, cache, meta.slots if cache is not None else None)
    if meta.gather is not None:
        assert cache is None, "gathered keys are not cached"
        k_TKD, v_TKD = meta.gather(k_TKD, v_TKD)
    return run(q_THD, k_TKD, v_TKD, meta, cache, window)


def _sequences(k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None):
    """Yield (first row, end row, keys [S, K, D], values [S, K, D]) of each sequence."""
    starts = meta.cu_q.tolist()
    lens_k = meta.lens_k.tolist() if cache is not None and meta.lens_k is not None else None
    key_starts = starts if meta.cu_k is None else meta.cu_k.tolist()
    for b, (start, stop) in enumerate(itertools.pairwise(starts)):
        if cache is None or lens_k is None:
            keys_of_b = slice(key_starts[b], key_starts[b + 1])
            yield start, stop, k_TKD[keys_of_b], v_TKD[keys_of_b]
            continue
        assert meta.block_table is not None
        keys, values = cache
        blocks = meta.block_table[b, : -(-lens_k[b] // keys.shape[1])]
        if blocks.numel() == 1:  # a view instead of a gathered copy
            yield start, stop, keys[int(blocks)][: lens_k[b]], values[int(blocks)][: lens_k[b]]
        else:
            yield start, stop, keys[blocks].flatten(0, 1)[: lens_k[b]], values[blocks].flatten(0, 1)[: lens_k[b]]


def _visible(num_q: int, num_k: int, window: int | None, device: torch.device) -> Tensor:
    """[num_q, num_k] bool: which keys each query sees, the queries being the last num_q of num_k positions."""
    q_pos = torch.arange(num_k - num_q, num_k, device=device)[:, None]
    k_pos = torch.arange(num_k, device=device)[None, :]
    seen = k_pos <= q_pos
    return seen & (k_pos > q_pos - window) if window is not None else seen


def _reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor:
    """The definition, sequence by sequence: scores, mask, fp32 softmax, weighted sum."""
    group = q_THD.shape[1] // k_TKD.shape[1]
    scale = q_THD.shape[-1] ** -0.5
    outs: list[Tensor] = []
    for start, stop, k_SKD, v_SKD in _sequences(k_TKD, v_TKD, meta, cache):
        q_HTD = q_THD[start:stop].transpose(0, 1)
        k_HSD = k_SKD.transpose(0, 1).repeat_interleave(group, 0).to(q_HTD.dtype)
        v_HSD = v_SKD.transpose(0, 1).repeat_interleave(group, 0).to(q_HTD.dtype)
        scores_HTS = (q_HTD @ k_HSD.transpose(1, 2)).float() * scale
        scores_HTS = scores_HTS.masked_fill(
            ~_visible(stop - start, k_SKD.shape[0], window, q_THD.device), float("-inf")
        )
        outs.append((scores_HTS.softmax(-1).to(q_HTD.dtype) @ v_HSD).transpose(0, 1))
    return torch.cat(outs)


def _sdpa(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor:
    """torch's fused attention: one call for sequences of equal length, else one call a sequence."""
    num_tokens, num_seqs = q_THD.shape[0], meta.cu_q.numel() - 1
    if cache is None and meta.cu_k is None and num_tokens == num_seqs * meta.max_q:
        q, k, v = (x.unflatten(0, (num_seqs, meta.max_q)).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
        return _sdpa_call(q, k, v, window).transpose(1, 2).flatten(0, 1)
    outs = [
        _sdpa_call(_heads_first(q_THD[start:stop]), _heads_first(keys), _heads_first(values), window)[0].transpose(0, 1)
        for start, stop, keys, values in _sequences(k_TKD, v_TKD, meta, cache)
    ]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _heads_first(x_SHD: Tensor) -> Tensor:
    return x_SHD.transpose(0, 1)[None]


def _sdpa_call(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, window: int | None) -> Tensor:
    num_q, num_k = q_BHTD.shape[2], k_BKSD.shape[2]
    if not num_k:  # a row of the batch that no sequence has
        return torch.zeros_like(q_BHTD)
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    k_BKSD, v_BKSD = k_BKSD.to(q_BHTD.dtype), v_BKSD.to(q_BHTD.dtype)
    if gqa and q_BHTD.is_cuda and q_BHTD.dtype == torch.float32:
        # The only kernel for fp32 that does not write out all scores wants as many key heads as query heads.
        group = q_BHTD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD, gqa = k_BKSD.repeat_interleave(group, 1), v_BKSD.repeat_interleave(group, 1), False
    windowed = window is not None and window < num_k
    if num_q == 1 and not windowed:  # a single query sees every key
        return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, enable_gqa=gqa)
    if num_q == num_k and not windowed:
        return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=gqa)
    mask = _visible(num_q, num_k, window, q_BHTD.device)
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, enable_gqa=gqa)


def _longest_short(dtype: torch.dtype, equal_lens: bool) -> int:
    """Longest sequences for which plain products beat torch's kernel on a CPU, forwards and backwards, as measured.

    Beyond, their S x S probabilities outgrow the caches. In fp32 torch's kernel wins at every length where it takes
    all sequences in one call; for uneven ones it is called once for each.
    """
    if dtype == torch.float32:
        return 0 if equal_lens else 192
    return 384


def _short(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor:
    """The CPU's path: plain matrix products on a grid for training with short sequences, `ops.attention_cpu` for
    decoding steps; everything else goes to SDPA.

    In bf16 the backward pass of torch's CPU kernel takes several times longer than these products, and a call for
    each of many short samples costs more than padding them to the longest.
    """
    num_tokens, num_seqs = q_THD.shape[0], meta.cu_q.numel() - 1
    if cache is not None and (decodes := num_seqs if meta.max_q == 1 else meta.num_decodes):
        return _decode_first(decodes, q_THD, k_TKD, v_TKD, meta, cache, window)
    more_keys = cache is not None or meta.cu_k is not None
    if more_keys or window is not None or not torch.is_grad_enabled():
        return _sdpa(q_THD, k_TKD, v_TKD, meta, cache, window)
    equal_lens = num_tokens == num_seqs * meta.max_q
    wasteful = num_seqs * meta.max_q > 4 * num_tokens
    if wasteful or meta.max_q > _longest_short(q_THD.dtype, equal_lens):
        return _sdpa(q_THD, k_TKD, v_TKD, meta, cache, window)
    if equal_lens:
        return _short_grid(q_THD, k_TKD, v_TKD, num_seqs)
    # Rows past the end of a sequence repeat its last token. They come after every real query, so causality hides them.
    starts, ends = meta.cu_q[:-1].long(), meta.cu_q[1:].long()
    grid = torch.minimum(starts[:, None] + torch.arange(meta.max_q), ends[:, None] - 1).flatten()
    padding_before = torch.arange(num_seqs) * meta.max_q - starts
    places = torch.arange(num_tokens) + padding_before.repeat_interleave(ends - starts)
    q, k, v = (_ToGrid.apply(x, grid, places) for x in (q_THD, k_TKD, v_TKD))
    out = _FromGrid.apply(_short_grid(q, k, v, num_seqs), places)
    assert isinstance(out, Tensor)
    return out


def _decode_first(
    decodes: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache, window: int | None
) -> Tensor:
    """The first `decodes` sequences, of one query each, through `ops.attention_cpu`; the others through SDPA."""
    from qwench.ops import attention_cpu

    assert meta.lens_k is not None
    assert meta.block_table is not None
    out_BHD = attention_cpu.decode(q_THD[:decodes], *cache, meta.lens_k[:decodes], meta.block_table[:decodes], window)
    if decodes == q_THD.shape[0]:
        return out_BHD
    others = AttnMeta(
        cu_q=meta.cu_q[decodes:] - decodes,
        max_q=meta.max_q,
        lens_k=meta.lens_k[decodes:],
        max_k=meta.max_k,
        block_table=meta.block_table[decodes:],
    )
    rest = _sdpa(q_THD[decodes:], k_TKD[decodes:], v_TKD[decodes:], others, cache, window)
    return torch.cat((out_BHD, rest))


def _short_grid(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, num_seqs: int) -> Tensor:
    """Causal attention of `num_seqs` sequences of equal length."""
    num_tokens, heads, kv_heads = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    seq_len, group = num_tokens // num_seqs, heads // kv_heads
    # Query heads that share a key head lie below each other, so that one product serves the group.
    q = q_THD.view(num_seqs, seq_len, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1, 2)
    k, v = (x.unflatten(0, (num_seqs, seq_len)).transpose(1, 2).flatten(0, 1) for x in (k_TKD, v_TKD))
    out = _ShortAttention.apply(q, k, v)
    assert isinstance(out, Tensor)
    out = out.view(num_seqs, kv_heads, group, seq_len, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(num_tokens, heads, -1)


class _ToGrid(torch.autograd.Function):
    """Rows x[grid]. Repeated rows get no gradient, so the backward pass gathers at `places` instead of adding up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, grid)

    @staticmethod
    def backward(ctx: Any, d_grid: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return d_grid.index_select(0, places), None, None


class _FromGrid(torch.autograd.Function):
    """Rows x[places] of a grid; the others do not count and get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        d_x = d_out.new_zeros(ctx.num_rows, *d_out.shape[1:])
        return d_x.index_copy_(0, places, d_out), None


class _ShortAttention(torch.autograd.Function):
    """q [N, G * S, D], k and v [N, S, D] of N key/value heads and G query heads each -> [N, G * S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq_len = k.shape[1]
        hidden = ~_visible(seq_len, seq_len, None, q.device)
        scores = torch.bmm(q.float() * q.shape[-1] ** -0.5, k.float().transpose(1, 2))
        scores.unflatten(1, (-1, seq_len)).masked_fill_(hidden, float("-inf"))
        probs = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probs)
        return torch.bmm(probs, v)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, probs = ctx.saved_tensors
        d_v = torch.bmm(probs.transpose(1, 2), d_out)
        d_probs = torch.bmm(d_out, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype).mul_(q.shape[-1] ** -0.5)
        return torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q), d_v


def _paged(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor:
    """The GPU's path, see `ops.attention_paged`."""
    from qwench.ops import attention_paged

    out_THD = attention_paged.attention(q_THD, k_TKD, v_TKD, meta, cache, window)
    return _sdpa(q_THD, k_TKD, v_TKD, meta, cache, window) if out_THD is None else out_THD


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


ATTENTION = Operation(
    "attention",
    [
        Implementation("paged", _paged, _on_cuda),
        Implementation("short", _short, _on_cpu),
        Implementation("sdpa", _sdpa),
        Implementation("reference", _reference),
    ],
)
