"""Sums and gathers over the tokens of a group of ranks, with gradient: what tensor and context parallelism are made of.

Between blocks each of the R ranks of a group has T / R tokens, rank r the r-th run of them [Korthikanti et al. 2022].

* `gather_tokens` [T/R, ...] -> [T, ...]: all tokens on every rank. Its gradient sums over ranks and scatters.
* `scatter_tokens` [T, ...] -> [T/R, ...]: sums over ranks, each keeps its run. Its gradient gathers.
* `gather_linear` and `linear_scatter` are a product after the one and before the other. `gather_linear` keeps only
  the rank's own tokens for the backward pass and gathers the others again; both exchanges there run beside a product.

All ranks of the group call the same functions in the same order with the same shapes. The exchanges are torch's
functional collectives, so a compiler can trace through all of this. This file knows neither the model nor the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_collectives = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A process group as this rank sees it."""

    name: str
    """The name under which torch's functional collectives find the group."""
    rank: int
    size: int

    @staticmethod
    def of(group: dist.ProcessGroup) -> TokenGroup:
        return TokenGroup(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def start_gather(x: Tensor, name: str, size: int) -> Tensor:
    """All ranks' x along the first dimension; not to be read before `wait`."""
    return _collectives.all_gather_into_tensor(x.contiguous(), size, name)


def start_scatter(x: Tensor, name: str, size: int) -> Tensor:
    """This rank's run of the first dimension of the sum of x over the ranks; not to be read before `wait`."""
    return _collectives.reduce_scatter_tensor(x.contiguous(), "sum", size, name)


def wait(x: Tensor) -> Tensor:
    """On a GPU only the current stream waits, not the host."""
    return _collectives.wait_tensor(x)


def check_divides(num_tokens: int, size: int) -> None:
    """Raise ValueError unless `num_tokens` can be cut into `size` equal runs."""
    if num_tokens % size:
        raise ValueError(
            f"{num_tokens} tokens a rank do not divide over a tensor-parallel group of {size}; "
            f"choose rows or micro-batches so that they do, such as {-(-num_tokens // size) * size}"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return wait(start_gather(x, name, size))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return wait(start_scatter(d_out, ctx.name, ctx.size)), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.name, ctx.size = name, size
        return wait(start_scatter(x, name, size))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return wait(start_gather(d_out, ctx.name, ctx.size)), None, None


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, name: str, size: int) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.name, ctx.size = name, size
        return F.linear(wait(start_gather(x, name, size)), weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, d_y_TN: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_NK = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        x_TK = start_gather(x, ctx.name, ctx.size) if want_weight else None
        d_x = d_weight_NK = None
        if want_x:
            d_x = start_scatter(d_y_TN @ weight_NK, ctx.name, ctx.size)
        if x_TK is not None:
            d_weight_NK = d_y_TN.t() @ wait(x_TK)
        d_bias_N = d_y_TN.sum(0) if want_bias else None
        return None if d_x is None else wait(d_x), d_weight_NK, d_bias_N, None, None


def gather_tokens(x: Tensor, ranks: TokenGroup) -> Tensor:
    """[T/R, ...] -> [T, ...]; the gradient is the ranks' sum."""
    out = _Gather.apply(x, ranks.name, ranks.size)
    assert isinstance(out, Tensor)
    return out


def scatter_tokens(x: Tensor, ranks: TokenGroup) -> Tensor:
    """[T, ...] -> [T/R, ...] of the ranks' sum; T must divide (ValueError)."""
    check_divides(x.shape[0], ranks.size)
    out = _Scatter.apply(x, ranks.name, ranks.size)
    assert isinstance(out, Tensor)
    return out


def gather_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, ranks: TokenGroup) -> Tensor:
    """[T/R, K] -> [T, N]: `linear(gather_tokens(x))`, weight and bias cast to x's dtype."""
    bias_N = None if bias_N is None else bias_N.to(x.dtype)
    out = _GatherLinear.apply(x, weight_NK.to(x.dtype), bias_N, ranks.name, ranks.size)
    assert isinstance(out, Tensor)
    return out


def linear_scatter(x_TK: Tensor, weight_NK: Tensor, ranks: TokenGroup) -> Tensor:
    """[T, K] -> [T/R, N]: `scatter_tokens(linear(x))`, the weight cast to x's dtype."""
    return scatter_tokens(F.linear(x_TK, weight_NK.to(x_TK.dtype)), ranks)
