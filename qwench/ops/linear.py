"""A linear layer with what stands around it in a Qwen block: RMSNorm before, SwiGLU or a residual sum after.

    linear(x, qkv_weight, qkv_bias, norm=(norm_weight, eps))
    linear(x, o_weight, residual=x0)
    linear(x, gate_up_weight, norm=(norm_weight, eps), swiglu=True)

* "reference" composes `rms_norm`, `F.linear`, `swiglu` and an addition: differentiable, every dtype.
* "native" is one kernel of ours on a CPU for all of it, for the fewest tokens in bf16 (`ops.linear_cpu`); else "few".
* "few" composes on a CPU as well, with faster products where there are few tokens.
* "fused" is for inference in half precision on a GPU. One token: one Triton kernel for all of it. A few
  tokens: a norm kernel and Triton's tensor-core kernel. More: cuBLAS between Triton's row kernels. Whatever needs a
  gradient, fp32 or mixed dtypes goes to the composition. No host synchronisation: it can be captured.
* "invariant" (forced, as `dispatch.batch_invariant_kernels` does): one tile shape and one order of sums for any number
  of tokens, so that the bits of a row depend on the row alone. Slower; no gradient.

The fused kernels keep fp32 from the product to the one rounding of the result; the composition rounds at every step.

Shape suffixes: T tokens, D inputs, N outputs, F = N / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import linear_cpu, triton_launch
from qwench.ops.dispatch import Implementation, Operation
from qwench.ops.linear_configs import INVARIANT, INVARIANT_FP32, tile_config
from qwench.ops.norm import rms_norm
from qwench.ops.swiglu import swiglu as swiglu_op


def linear(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[T, N], or [T, F] with `swiglu`, in `out_dtype` (None: x's dtype).

    In this order: RMSNorm of x where `norm` = (weight [D], eps) is given; the product with weight.T and the bias;
    silu(first half) * second half where `swiglu` (the weight is gate rows above up rows); `residual` added, of the
    result's shape (without a gradient it may be overwritten: use what is returned). Weights of another dtype are cast
    to x's. Leading dimensions of x other than one T are allowed.
    Differentiable (not "invariant", which raises ValueError for inputs that need a gradient).
    """
    return LINEAR.choose(x_TD.device)(x_TD, weight_ND, bias_N, norm, swiglu, residual, out_dtype)


def _reference(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    if norm is not None:
        x_TD = rms_norm(x_TD, *norm)
    bias_N = None if bias_N is None else bias_N.to(x_TD.dtype)
    y_TN = product(x_TD, weight_ND.to(x_TD.dtype), bias_N)
    if swiglu:
        y_TN = swiglu_op(y_TN)
    if residual is not None:
        y_TN = residual + y_TN
    return y_TN if out_dtype is None else y_TN.to(out_dtype)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _fused(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    norm_weight = None if norm is None else norm[0]
    suits = (
        x_TD.dtype in (torch.float16, torch.bfloat16)
        and weight_ND.dtype == x_TD.dtype
        and x_TD.ndim == 2
        and x_TD.stride(1) == weight_ND.stride(1) == 1
        and not needs_grad(x_TD, weight_ND, bias_N, norm_weight, residual)
    )
    if not suits:
        return _reference(x_TD, weight_ND, bias_N, norm, swiglu, residual, out_dtype)
    num_tokens = x_TD.shape[0]
    outputs = weight_ND.shape[0] // (2 if swiglu else 1)
    config = tile_config(num_tokens, outputs, x_TD.shape[1], swiglu) if num_tokens > 1 else None
    if num_tokens == 1 or config is not None:
        from qwench.ops import linear_triton

        if config is None:
            return linear_triton.gemv(
                x_TD, weight_ND, bias_N, norm=norm, swiglu=swiglu, residual_1N=residual, out_dtype=out_dtype
            )
        x_TD = x_TD if norm is None else rms_norm(x_TD, *norm)
        return linear_triton.matmul(
            x_TD, weight_ND, bias_N, swiglu=swiglu, residual_TN=residual, out_dtype=out_dtype, config=config
        )
    x_TD = x_TD if norm is None else rms_norm(x_TD, *norm)
    plain = bias_N is None and not swiglu
    if plain and residual is not None and residual.dtype == x_TD.dtype:
        # The sum is part of cuBLAS's epilogue, in fp32. In place, or it would copy the residual first.
        y_TN = residual.addmm_(x_TD, weight_ND.t())
        return y_TN if out_dtype is None else y_TN.to(out_dtype)
    if plain and residual is None and out_dtype == torch.float32 and x_TD.is_cuda:
        return torch.mm(x_TD, weight_ND.t(), out_dtype=torch.float32)
    return _reference(x_TD, weight_ND, bias_N, None, swiglu, residual, out_dtype)


def _invariant(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    if needs_grad(x_TD, weight_ND, bias_N, None if norm is None else norm[0], residual):
        raise ValueError("ops.linear=invariant computes no gradient; use torch.no_grad() or ops.linear=reference")
    if x_TD.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"ops.linear=invariant got {x_TD.dtype}; give float16, bfloat16 or float32")
    from qwench.ops import elementwise_triton, linear_triton

    x_TD = x_TD if norm is None else elementwise_triton.rms_norm(x_TD, *norm)
    rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    residual_TN = None if residual is None else residual.reshape(rows_TD.shape[0], -1)
    fp32 = x_TD.dtype == torch.float32
    y_TN = linear_triton.matmul(
        rows_TD,
        weight_ND.to(x_TD.dtype).contiguous(),
        bias_N,
        residual_TN=None if swiglu else residual_TN,
        out_dtype=x_TD.dtype if swiglu else out_dtype,
        config=INVARIANT_FP32 if fp32 else INVARIANT,
    )
    if swiglu:
        y_TN = elementwise_triton.swiglu(y_TN)
        y_TN = y_TN if residual_TN is None else residual_TN + y_TN
        y_TN = y_TN if out_dtype is None else y_TN.to(out_dtype)
    return y_TN.reshape(*x_TD.shape[:-1], -1)


def _native(
    x_TD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    y_TN = linear_cpu.layer(x_TD, weight_ND, bias_N, norm, swiglu, residual, out_dtype)
    if y_TN is not None:
        return y_TN
    return _reference(x_TD, weight_ND, bias_N, norm, swiglu, residual, out_dtype, linear_cpu.product)


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


LINEAR = Operation(
    "linear",
    [
        Implementation("fused", _fused, triton_launch.runs_triton),
        Implementation("invariant", _invariant, triton_launch.runs_triton),
        Implementation("native", _native, linear_cpu.runs_native),
        Implementation("few", functools.partial(_reference, product=linear_cpu.product), _on_cpu),
        Implementation("reference", _reference),
    ],
)
