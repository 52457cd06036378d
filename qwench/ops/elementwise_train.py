"""SwiGLU and rotary positions as operations of a compiled graph, with gradients by our own kernels on GPUs.

A compiler does well by these forwards and badly by their gradients (see `elementwise_train_triton`), so that inside
compiled blocks both are opaque to it. On a CPU compiled blocks trace the references. Importing this file is what puts
them there.

Shape suffixes as in `elementwise_train_triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwench.ops import rope, swiglu
from qwench.ops.rope import ROPE_AND_STORE, Rope
from qwench.ops.swiglu import SWIGLU


@torch.library.custom_op("qwench::swiglu", mutates_args=())
def _swiglu(gate_up_TF: Tensor) -> Tensor:
    from qwench.ops import elementwise_triton

    return elementwise_triton.swiglu(gate_up_TF, pdl=False)


@_swiglu.register_fake
def _(gate_up_TF: Tensor) -> Tensor:
    return gate_up_TF.new_empty((*gate_up_TF.shape[:-1], gate_up_TF.shape[-1] // 2))


@torch.library.custom_op("qwench::swiglu_backward", mutates_args=())
def _swiglu_backward(gate_up_TF: Tensor, d_out_TF: Tensor) -> Tensor:
    from qwench.ops import elementwise_train_triton

    return elementwise_train_triton.swiglu_backward(gate_up_TF.contiguous(), d_out_TF.contiguous())


@_swiglu_backward.register_fake
def _(gate_up_TF: Tensor, d_out_TF: Tensor) -> Tensor:
    return gate_up_TF.new_empty(gate_up_TF.shape)


def _swiglu_keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, d_out_TF: Tensor) -> Tensor:
    return _swiglu_backward(*ctx.saved_tensors, d_out_TF)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_keep)


@torch.library.custom_op("qwench::rotate", mutates_args=())
def _rotate(q_THD: Tensor, k_TKD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    from qwench.ops import elementwise_train_triton

    q_THD, k_TKD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_TKD))
    return elementwise_train_triton.rotate(q_THD, k_TKD, cos_T1R.contiguous(), sin_T1R.contiguous(), backward)


@_rotate.register_fake
def _(q_THD: Tensor, k_TKD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(k_TKD.shape)


def _rotate_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    assert not inputs[4], "the gradient of a gradient is not needed"
    ctx.save_for_backward(inputs[2], inputs[3])


def _rotate_gradient(ctx: Any, d_q_THD: Tensor, d_k_TKD: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotate(d_q_THD, d_k_TKD, *ctx.saved_tensors, True), None, None, None


_rotate.register_autograd(_rotate_gradient, setup_context=_rotate_keep)


def _suits(*tensors: Tensor) -> bool:
    """Blocks are compiled for a GPU only where Triton runs on it."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return tensors[0].is_cuda and all(x.dtype == tensors[0].dtype in floats for x in tensors)


def compiled_swiglu(gate_up: Tensor) -> Tensor:
    """The implementation of `ops.swiglu` that compiled code takes."""
    return _swiglu(gate_up) if gate_up.ndim == 2 and _suits(gate_up) else swiglu.reference(gate_up)


def compiled_rope(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    tables: Rope,
    cache: tuple[Tensor, Tensor] | None,
    slots_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The implementation of `ops.rope_and_store` that compiled code takes."""
    if cache is not None or tables.tables is None or not _suits(q_THD, k_TKD, *tables.tables):
        return rope.reference(q_THD, k_TKD, v_TKD, tables, cache, slots_T)
    return _rotate(q_THD, k_TKD, *tables.tables, False)


SWIGLU.when_compiled = compiled_swiglu
ROPE_AND_STORE.when_compiled = compiled_rope
