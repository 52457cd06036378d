"""Rotary position embedding, half-split form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) [Qwen TR 2.3].

Frequencies and angles are computed in fp32 ("FP32 precision for the inverse frequency matrix"), the cosines and
sines are then cast to the dtype of the activations. Shape suffixes: T tokens, H query heads, K key/value heads, D head
size, R = D / 2, N cache blocks, P positions in a block.

A forward pass makes one `Rope` and hands it to every layer's `rope_and_store`. Without a gradient on a GPU that is one
Triton kernel a layer and nothing besides: the kernel computes the angles of its token itself (R of them, once for all
heads), so no table is built, kept or gathered. Otherwise the tables of the pass are computed once, in `Rope.at`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.ops import triton_launch
from qwench.ops.dispatch import Implementation, Operation


def inverse_frequencies(theta: float, head_size: int, device: torch.device | str = "cpu") -> Tensor:
    """[R] fp32: theta ** (-2j / D) for j = 0 .. R-1."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    return (1.0 / (theta**exponents)).to(device)


@functools.cache
def cached_inverse_frequencies(theta: float, head_size: int, device: torch.device) -> Tensor:
    """`inverse_frequencies`, built once for a device. Do not write to it."""
    with torch.inference_mode(False), torch.device("cpu"):  # usable in training and inference, whoever asks first
        return inverse_frequencies(theta, head_size, device)


def rope_tables(positions_T: Tensor, inv_freq_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, R] of each token's angles, ready to broadcast over heads."""
    angles_TR = positions_T.float()[:, None] * inv_freq_R[None, :]
    return angles_TR.cos().to(dtype)[:, None, :], angles_TR.sin().to(dtype)[:, None, :]


def apply_rope(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotate every head of x. Differentiable in x."""
    return ROPE.choose(x_THD.device)(x_THD, cos_T1R, sin_T1R)


def _reference(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, -1)
    return torch.cat((first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R), -1)


ROPE = Operation("rope", [Implementation("reference", _reference)])


@dataclass(frozen=True, slots=True)
class Rope:
    """The positions of one forward pass. `Rope.at(positions_T, inv_freq_R, torch.bfloat16)`."""

    positions_T: Tensor
    """[T] int64."""
    inv_freq_R: Tensor
    """[R] fp32, constant."""
    tables: tuple[Tensor, Tensor] | None
    """Cosines and sines [T, 1, R], or None where the kernel computes them itself."""

    @staticmethod
    def at(positions_T: Tensor, inv_freq_R: Tensor, dtype: torch.dtype) -> Rope:
        """What every layer needs; computes the tables where the chosen implementation reads them."""
        in_kernel = not torch.is_grad_enabled() and ROPE_AND_STORE.choose(positions_T.device) is _triton
        return Rope(positions_T, inv_freq_R, None if in_kernel else rope_tables(positions_T, inv_freq_R, dtype))


def rope_and_store(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    rope: Rope,
    cache: tuple[Tensor, Tensor] | None = None,
    slots_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotated (q, k); with a cache, rotated k and v are also written to it.

    q, k and v share a dtype and may be views of one merged projection. `cache` is (keys, values), each [N, P, K, D]
    contiguous, of any dtype (a plain cast; fp8 saturates at its largest value); row t goes to the flat position
    slots_T[t] = block * P + offset (int64, in range, distinct but for padding rows, whose position nobody reads).
    Differentiable in q and k. Without a gradient q and k may be overwritten: use what is returned.
    """
    assert (cache is None) == (slots_T is None)
    return ROPE_AND_STORE.choose(q_THD.device)(q_THD, k_TKD, v_TKD, rope, cache, slots_T)


def _store(pages_NPKD: Tensor, new_TKD: Tensor, slots_T: Tensor) -> None:
    flat = pages_NPKD.view(-1, *pages_NPKD.shape[2:])
    if pages_NPKD.dtype.is_floating_point and pages_NPKD.dtype.itemsize == 1:
        largest = torch.finfo(pages_NPKD.dtype).max
        new_TKD = new_TKD.clamp(-largest, largest).to(pages_NPKD.dtype).view(torch.uint8)
        flat = flat.view(torch.uint8)  # torch copies rows of bytes, not of fp8
    flat.index_copy_(0, slots_T, new_TKD.to(flat.dtype))


def reference(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    rope: Rope,
    cache: tuple[Tensor, Tensor] | None,
    slots_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tables = rope.tables or rope_tables(rope.positions_T, rope.inv_freq_R, q_THD.dtype)
    q_THD, k_TKD = apply_rope(q_THD, *tables), apply_rope(k_TKD, *tables)
    if cache is not None:
        assert slots_T is not None
        _store(cache[0], k_TKD, slots_T)
        _store(cache[1], v_TKD, slots_T)
    return q_THD, k_TKD


def _triton(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    rope: Rope,
    cache: tuple[Tensor, Tensor] | None,
    slots_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """In place in q and k, one kernel; under autograd or with unusual strides or dtypes the reference."""
    tensors = (q_THD, k_TKD, v_TKD)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    suits = all(
        tensor.stride(2) == 1
        and tensor.dtype == q_THD.dtype
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        for tensor in tensors
    )
    if recorded or not suits:
        return reference(q_THD, k_TKD, v_TKD, rope, cache, slots_T)
    from qwench.ops import elementwise_triton

    elementwise_triton.rope_and_store(q_THD, k_TKD, v_TKD, rope.positions_T, rope.inv_freq_R, cache, slots_T)
    return q_THD, k_TKD


ROPE_AND_STORE = Operation(
    "rope_and_store",
    [
        Implementation("triton", _triton, triton_launch.runs_triton),
        Implementation("reference", reference),
    ],
)
