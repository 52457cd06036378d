"""Causal attention of packed sequences with its gradient, as one operation that a compiled graph holds as it is.

    out_THD = packed_attention(q_THD, k_SKD, v_SKD, cu_q, cu_k, extent, window)

It knows four kernels and takes the fastest that the inputs allow: FlashAttention-4 (extra `fa4`, compute capability 9
and later), cuDNN for sequences of equal length, torch's variable-length FlashAttention, and plain products in fp32 for
the CPU and for fp32. Measured on an H200, forward and backward, TFLOP/s at head size 64 / 128 and 4,096 tokens:
FlashAttention-4 483 / 554, cuDNN 392 / 516, torch's 239 / 277.

To a compiled graph everything here is opaque: no graph break, and no new compilation when the lengths of the sequences
change, since the numbers that the host needs come in `extent`, a tensor, and not as Python integers. `Stream` is the
`AttnMeta` for that. Caches and decoding are not here: see `ops.attention_paged`.

Shape suffixes: T queries, S keys of all sequences, H query heads, K key/value heads, D head size, G = H / K,
B sequences, Q and N queries and keys of one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwench.ops.attention import ATTENTION, AttnMeta, KVCache

HALF = (torch.float16, torch.bfloat16)
aten: Any = torch.ops.aten


def extent_of(max_q: int, max_k: int, num_seqs: int) -> Tensor:
    """What kernels want to know on the host: int64 [3] on the CPU, longest queries, longest keys, sequences."""
    return torch.tensor([max_q, max_k, num_seqs], dtype=torch.int64, device="cpu")


@dataclass(frozen=True, slots=True)
class Stream(AttnMeta):
    """The `AttnMeta` of a packed stream as compiled blocks take it: nothing that they read from it is a Python number.

    `Stream.of(meta)` once a forward pass, outside of compiled code.
    """

    extent: Tensor | None = None

    @staticmethod
    def of(meta: AttnMeta) -> AttnMeta:
        """The same stream; `meta` itself where it has a cache, which compiled blocks do not take.

        Numbers of sequences and of gathered keys change from batch to batch: their tensors (of `meta.gather`, the
        fields of a dataclass) are marked so that no graph depends on them.
        """
        if isinstance(meta, Stream) or meta.lens_k is not None:
            return meta
        cu_k, max_k = meta.packed_keys
        # Views, so that the graph does not depend on whether the bounds are one tensor or two.
        cu_q, cu_k = meta.cu_q.view_as(meta.cu_q), cu_k.view_as(cu_k)
        gather: Any = meta.gather
        fields = dataclasses.fields(gather) if dataclasses.is_dataclass(gather) else ()
        gathering = [getattr(gather, field.name) for field in fields]
        for tensor in (cu_q, cu_k, *gathering):
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        extent = extent_of(meta.max_q, max_k, meta.cu_q.numel() - 1)
        return Stream(cu_q=cu_q, max_q=meta.max_q, max_k=max_k, cu_k=cu_k, gather=meta.gather, extent=extent)


def packed_attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_q: Tensor, cu_k: Tensor, extent: Tensor, window: int | None = None
) -> Tensor:
    """[T, H, D]: sequence b's queries cu_q[b]:cu_q[b+1] are the last of its keys cu_k[b]:cu_k[b+1]; causal.

    q, k, v share a dtype, H is a multiple of K, `extent` is `extent_of(...)`, `window` as in `ops.attention`. Sequences
    may be empty at the end (cu_q, cu_k padded with their last entry). Differentiable in q, k and v.
    """
    return _forward(q_THD, k_SKD, v_SKD, cu_q, cu_k, extent, window or 0)[0]


def attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, meta: AttnMeta, cache: KVCache | None, window: int | None
) -> Tensor:
    """The implementation of `ops.attention` that compiled code takes."""
    assert cache is None, "compiled blocks have no cache"
    assert isinstance(meta, Stream), "give compiled blocks Stream.of(meta)"
    assert meta.extent is not None
    cu_k = meta.cu_q if meta.cu_k is None else meta.cu_k
    # Kept for the backward pass, where as a view it would keep the merged projection's whole result.
    return packed_attention(q_THD, k_TKD, v_TKD.contiguous(), meta.cu_q, cu_k, meta.extent, window)


ATTENTION.when_compiled = attention


# ---------------------------------------------------------------------------------------------------- the opaque pair
@torch.library.custom_op("qwench::packed_attention", mutates_args=())
def _forward(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_q: Tensor, cu_k: Tensor, extent: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], log sum exp [H, T] fp32), both contiguous; window 0 is none."""
    lengths = _lengths(cu_q, cu_k, extent, window)
    out, logsumexp = choose(q_THD, k_SKD, lengths).forward(q_THD, k_SKD, v_SKD, lengths)
    return out.contiguous(), logsumexp.contiguous()


@_forward.register_fake
def _(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_q: Tensor, cu_k: Tensor, extent: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qwench::packed_attention_backward", mutates_args=())
def _backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_THD: Tensor,
    logsumexp_HT: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    extent: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(cu_q, cu_k, extent, window)
    kernel = choose(q_THD, k_SKD, lengths)
    d_q, d_k, d_v = kernel.backward(d_out_THD.contiguous(), q_THD, k_SKD, v_SKD, out_THD, logsumexp_HT, lengths)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@_backward.register_fake
def _(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_THD: Tensor,
    logsumexp_HT: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    extent: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), k_SKD.new_empty(k_SKD.shape), v_SKD.new_empty(v_SKD.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.window = window
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, d_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, extent, out, logsumexp = ctx.saved_tensors
    assert d_logsumexp is None, "the log sum exp has no gradient"
    if d_out is None:
        return (None,) * 7
    d_q, d_k, d_v = _backward(d_out, q, k, v, out, logsumexp, cu_q, cu_k, extent, ctx.window)
    return d_q, d_k, d_v, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


# --------------------------------------------------------------------------------------------------------- the kernels
@dataclass(frozen=True, slots=True)
class Lengths:
    """The sequences of a call: bounds on the device, the rest on the host."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    num_seqs: int
    window: int

    def rectangular(self, num_q: int, num_k: int) -> bool:
        """All sequences have max_q queries and as many keys."""
        return self.max_q == self.max_k and self.num_seqs * self.max_q == num_q == num_k

    @property
    def flash_window(self) -> dict[str, Any]:
        """torch's FlashAttention says causal, or a window that ends at the query."""
        if self.window:
            return {"is_causal": False, "window_size_left": self.window - 1, "window_size_right": 0}
        return {"is_causal": True, "window_size_left": -1, "window_size_right": 0}


def _lengths(cu_q: Tensor, cu_k: Tensor, extent: Tensor, window: int) -> Lengths:
    max_q, max_k, num_seqs = extent.tolist()
    return Lengths(cu_q, cu_k, max_q, max_k, num_seqs, window)


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Lengths], tuple[Tensor, Tensor]]
    """(q, k, v, lengths) -> (out, log sum exp [H, T])."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths], tuple[Tensor, Tensor, Tensor]]
    """(d_out, q, k, v, out, log sum exp, lengths) -> (d_q, d_k, d_v)."""


def choose(q_THD: Tensor, k_SKD: Tensor, lengths: Lengths) -> Kernel:
    """The same for the backward pass as for the forward pass: it depends on nothing else."""
    if not q_THD.is_cuda or q_THD.dtype not in HALF:
        return PLAIN
    if flash_attention_4() is not None:
        return FLASH_4
    if not lengths.window and lengths.rectangular(q_THD.shape[0], k_SKD.shape[0]) and _cudnn(q_THD.device):
        return CUDNN
    return VARLEN


@functools.cache
def flash_attention_4() -> ModuleType | None:
    """FlashAttention-4 where it is installed, runs here and has the two functions that are called below."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return None
    try:
        from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    wanted = {
        "_flash_attn_fwd": ("cu_seqlens_q", "max_seqlen_k", "window_size_left", "return_lse"),
        "_flash_attn_bwd": ("out", "dout", "lse", "cu_seqlens_k", "max_seqlen_q", "window_size_right"),
    }
    for name, arguments in wanted.items():
        function = getattr(interface, name, None)
        if function is None or not set(arguments) <= set(inspect.signature(function).parameters):
            return None
    return interface


def _flash_4_arguments(lengths: Lengths) -> dict[str, Any]:
    return {
        "cu_seqlens_q": lengths.cu_q,
        "cu_seqlens_k": lengths.cu_k,
        "max_seqlen_q": lengths.max_q,
        "max_seqlen_k": lengths.max_k,
        "causal": True,
        "window_size_left": lengths.window - 1 if lengths.window else None,
        "window_size_right": 0 if lengths.window else None,
    }


def _batched(lengths: Lengths, num_q: int, num_k: int) -> bool:
    """FlashAttention-4 takes the sequences as a batch, which is faster than by their bounds."""
    return not lengths.window and lengths.rectangular(num_q, num_k)


def _flash_4_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    library: Any = flash_attention_4()
    if _batched(lengths, q.shape[0], k.shape[0]):
        by_seq = (x.unflatten(0, (lengths.num_seqs, -1)) for x in (q, k, v))
        out, logsumexp, *_ = library._flash_attn_fwd(*by_seq, causal=True, return_lse=True)
        return out.flatten(0, 1), logsumexp.transpose(0, 1).flatten(1)
    out, logsumexp, *_ = library._flash_attn_fwd(q, k, v, return_lse=True, **_flash_4_arguments(lengths))
    return out, logsumexp


def _flash_4_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    library: Any = flash_attention_4()
    if _batched(lengths, q.shape[0], k.shape[0]):
        by_seq = (x.unflatten(0, (lengths.num_seqs, -1)) for x in (q, k, v, out, d_out))
        logsumexp = logsumexp.unflatten(1, (lengths.num_seqs, -1)).transpose(0, 1).contiguous()
        grads = library._flash_attn_bwd(*by_seq, logsumexp, causal=True)
        d_q, d_k, d_v = (x.flatten(0, 1) for x in grads[:3])
        return d_q, d_k, d_v
    d_q, d_k, d_v, *_ = library._flash_attn_bwd(q, k, v, out, d_out, logsumexp, **_flash_4_arguments(lengths))
    return d_q, d_k, d_v


@functools.cache
def _cudnn(device: torch.device) -> bool:
    """cuDNN's attention is there and gives a backward pass for fewer key heads than query heads (Hopper and later)."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def _grid(x_THD: Tensor, num_seqs: int) -> Tensor:
    return x_THD.unflatten(0, (num_seqs, -1)).transpose(1, 2)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    q, k, v = (_grid(x, lengths.num_seqs) for x in (q, k, v))
    out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    heads_first = logsumexp.reshape(lengths.num_seqs, q.shape[1], -1).transpose(0, 1)
    return out.transpose(1, 2).flatten(0, 1), heads_first.flatten(1)


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v, out = (_grid(x, lengths.num_seqs) for x in (d_out, q, k, v, out))
    by_seq = logsumexp.unflatten(1, (lengths.num_seqs, -1)).transpose(0, 1).contiguous()[..., None]
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout's random numbers
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, by_seq, unused, unused, None, None, None, lengths.max_q, lengths.max_k, 0.0, True
    )
    d_q, d_k, d_v = (x.transpose(1, 2).flatten(0, 1) for x in grads)
    return d_q, d_k, d_v


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    window = lengths.flash_window
    out, logsumexp, *_ = aten._flash_attention_forward(
        q, k, v, lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k, 0.0, window.pop("is_causal"), False, **window
    )
    return out, logsumexp


def _varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    window = lengths.flash_window
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return aten._flash_attention_backward(
        d_out, q, k, v, out, logsumexp, lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k, 0.0,
        window.pop("is_causal"), no_dropout, torch.empty(0, device=q.device), **window,
    )  # fmt: skip


def _sequences(lengths: Lengths) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys of every sequence that is not empty."""
    bounds = zip(itertools.pairwise(lengths.cu_q.tolist()), itertools.pairwise(lengths.cu_k.tolist()), strict=True)
    for (start_q, end_q), (start_k, end_k) in bounds:
        if end_q > start_q:
            yield slice(start_q, end_q), slice(start_k, end_k)


def _by_key_head(x_QHD: Tensor, kv_heads: int) -> Tensor:
    """[K, G * Q, D] fp32: the queries of the heads that share a key head below each other."""
    return x_QHD.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x_KND: Tensor, num_q: int) -> Tensor:
    """Inverse of `_by_key_head`: [Q, H, D]."""
    return x_KND.unflatten(1, (-1, num_q)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q_KND: Tensor, k_KND: Tensor, num_q: int, window: int) -> Tensor:
    """[K, G * Q, N] scaled, with -inf where a query does not look."""
    num_k = k_KND.shape[1]
    scores = torch.bmm(q_KND, k_KND.transpose(1, 2)).mul_(q_KND.shape[-1] ** -0.5)
    back = torch.arange(num_k - num_q, num_k, device=q_KND.device)[:, None] - torch.arange(num_k, device=q_KND.device)
    hidden = (back < 0) | (back >= window) if window else back < 0
    scores.unflatten(1, (-1, num_q)).masked_fill_(hidden, float("-inf"))
    return scores


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    out, logsumexp = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    kv_heads = k.shape[1]
    for rows, keys in _sequences(lengths):
        num_q = rows.stop - rows.start
        k_KND, v_KND = k[keys].float().transpose(0, 1), v[keys].float().transpose(0, 1)
        scores = _scores(_by_key_head(q[rows], kv_heads), k_KND, num_q, lengths.window)
        total = scores.logsumexp(-1)
        logsumexp[:, rows] = total.unflatten(1, (-1, num_q)).flatten(0, 1)
        out[rows] = _by_token(torch.bmm(scores.sub_(total[..., None]).exp_(), v_KND), num_q).to(q.dtype)
    return out, logsumexp


def _plain_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    for rows, keys in _sequences(lengths):
        num_q = rows.stop - rows.start
        q_KND, out_KND, d_KND = (_by_key_head(x[rows], kv_heads) for x in (q, out, d_out))
        k_KND, v_KND = k[keys].float().transpose(0, 1), v[keys].float().transpose(0, 1)
        total = logsumexp[:, rows].unflatten(0, (kv_heads, -1)).flatten(1)[..., None]
        probs = _scores(q_KND, k_KND, num_q, lengths.window).sub_(total).exp_()
        d_v[keys] = torch.bmm(probs.transpose(1, 2), d_KND).transpose(0, 1).to(v.dtype)
        # d scores = probs * (d probs - sum of d probs * probs), and that sum is the dot product of d_out and out.
        d_probs = torch.bmm(d_KND, v_KND.transpose(1, 2)).sub_((d_KND * out_KND).sum(-1, keepdim=True))
        d_scores = d_probs.mul_(probs).mul_(scale)
        d_q[rows] = _by_token(torch.bmm(d_scores, k_KND), num_q).to(q.dtype)
        d_k[keys] = torch.bmm(d_scores.transpose(1, 2), q_KND).transpose(0, 1).to(k.dtype)
    return d_q, d_k, d_v


PLAIN = Kernel("plain", _plain_forward, _plain_backward)
VARLEN = Kernel("varlen", _varlen_forward, _varlen_backward)
CUDNN = Kernel("cudnn", _cudnn_forward, _cudnn_backward)
FLASH_4 = Kernel("flash_4", _flash_4_forward, _flash_4_backward)
