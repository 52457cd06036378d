"""One launch for the AdamW step of all parameters of a group, with states in any float dtype.

A kernel a parameter would cost the host more time than the GPU: a 0.5B model has 290 parameters. Here a program takes a
run of CHUNK values of one parameter and finds the addresses in a table that goes to the GPU with the launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.ops.hardware import upload
from qwench.ops.triton_launch import interpreted


@triton.jit
def _update(
    p_ptr, grad_ptr, mean_ptr, square_ptr, here, factor, step_size, root, left, beta1, beta2, eps, STATE: tl.constexpr
):
    p = tl.load(p_ptr, mask=here)
    grad = tl.load(grad_ptr, mask=here) * factor
    mean = tl.load(mean_ptr, mask=here).to(tl.float32)
    square = tl.load(square_ptr, mask=here).to(tl.float32)
    mean += (grad - mean) * (1 - beta1)
    square = square * beta2 + grad * grad * (1 - beta2)
    p = p * left - step_size * mean / (tl.sqrt_rn(square) / root + eps)
    tl.store(p_ptr, p, mask=here)
    tl.store(mean_ptr, mean.to(STATE), mask=here)
    tl.store(square_ptr, square.to(STATE), mask=here)


@triton.jit
def _adamw_kernel(
    tensors_ptr,  # int64 [parameters, 5]: addresses of weights, gradients, means, squares; values
    numbers_ptr,  # fp32 [parameters, 3]: step size, root of the second bias correction, what weight decay leaves
    chunks_ptr,  # int64 [programs, 2]: parameter, first value
    skip_ptr,  # fp32 [1]: 1 to change nothing
    factor_ptr,  # fp32 [1]: of the gradients
    beta1,
    beta2,
    eps,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks_ptr + tl.program_id(0) * 2
    tensor, first = tl.load(chunk), tl.load(chunk + 1)
    row = tensors_ptr + tensor * 5
    p_ptr = tl.load(row).to(tl.pointer_type(tl.float32)) + first
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + first
    mean_ptr = tl.load(row + 2).to(tl.pointer_type(STATE)) + first  # pyright: ignore[reportArgumentType]
    square_ptr = tl.load(row + 3).to(tl.pointer_type(STATE)) + first  # pyright: ignore[reportArgumentType]
    here = tl.where(tl.load(skip_ptr) != 0, 0, tl.load(row + 4) - first)
    factor = tl.load(factor_ptr)
    if ALIGNED:  # chunks are multiples of 16 values
        p_ptr, grad_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, square_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(square_ptr, 16)
    step_size = tl.load(numbers_ptr + tensor * 3)
    root = tl.load(numbers_ptr + tensor * 3 + 1)
    left = tl.load(numbers_ptr + tensor * 3 + 2)
    # A mask that depends on a number from memory would make every load a narrow one.
    if here >= STEPS * BLOCK:
        for step in range(STEPS):
            at = step * BLOCK + tl.arange(0, BLOCK)
            _update(
                p_ptr + at, grad_ptr + at, mean_ptr + at, square_ptr + at, None, factor, step_size, root, left, beta1,
                beta2, eps, STATE,
            )  # fmt: skip
    else:
        for step in range(STEPS):
            at = step * BLOCK + tl.arange(0, BLOCK)
            _update(
                p_ptr + at, grad_ptr + at, mean_ptr + at, square_ptr + at, at < here, factor, step_size, root, left,
                beta1, beta2, eps, STATE,
            )  # fmt: skip


@triton.jit
def _decode(codes, exponents):
    code = codes & 127
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    power = ((exponents + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(codes > 127, -magnitude, magnitude) * power[:, None]


@triton.jit
def _noise(place, seed):
    """20 random-looking bits, `adamw_8bit._hash`."""
    x = (place.to(tl.uint32) * 0x9E3779B1) ^ seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) >> 12).to(tl.int32)


@triton.jit
def _encode(values, noise, NEVER_ZERO: tl.constexpr):
    """fp32 [runs, 128] -> codes [runs, 128] and exponents [runs], see `adamw_8bit.encode`."""
    magnitude = tl.abs(values)
    exponents = (tl.max(magnitude, axis=1).to(tl.int32, bitcast=True) >> 23) - 134
    exponents = tl.minimum(tl.maximum(exponents, -126), 127)
    scaled = magnitude * ((127 - exponents) << 23).to(tl.float32, bitcast=True)[:, None]
    normal = ((scaled.to(tl.int32, bitcast=True) + noise) >> 20) - 960
    small = tl.floor(scaled * 512.0 + noise.to(tl.float32) * 9.5367431640625e-07).to(tl.int32)
    code = tl.minimum(tl.where(scaled < 0.015625, small, normal), 119)
    if NEVER_ZERO:
        code = tl.where(scaled > 0, tl.maximum(code, 1), code)
    code = tl.where(values < 0, code + 128, code)
    return code.to(tl.uint8), exponents.to(tl.int8)


@triton.jit
def _update_8bit(
    p_ptr, grad_ptr, mean_ptr, root_ptr, mean_exponents_ptr, root_exponents_ptr, inside, begun, other, place, seed,
    factor, step_size, bias_root, left, beta1, beta2, eps,
):  # fmt: skip
    """Pointers [runs, 128] and [runs] of exponents; `inside`, `begun` their masks and `other` what stands elsewhere."""
    p = tl.load(p_ptr, mask=inside, other=other)
    grad = tl.load(grad_ptr, mask=inside, other=other) * factor
    mean_codes = tl.load(mean_ptr, mask=inside, other=other).to(tl.int32)
    root_codes = tl.load(root_ptr, mask=inside, other=other).to(tl.int32)
    mean = _decode(mean_codes, tl.load(mean_exponents_ptr, mask=begun, other=other).to(tl.int32))
    root = _decode(root_codes, tl.load(root_exponents_ptr, mask=begun, other=other).to(tl.int32))
    mean += (grad - mean) * (1 - beta1)
    root = tl.sqrt_rn(root * root * beta2 + grad * grad * (1 - beta2))
    p = p * left - step_size * mean / (root / bias_root + eps)
    tl.store(p_ptr, p, mask=inside)
    mean_codes_new, mean_exponents = _encode(mean, _noise(place, seed), False)
    tl.store(mean_ptr, mean_codes_new, mask=inside)
    tl.store(mean_exponents_ptr, mean_exponents, mask=begun)
    root_codes_new, root_exponents = _encode(root, _noise(place, seed ^ 0x5BD1E995), True)
    tl.store(root_ptr, root_codes_new, mask=inside)
    tl.store(root_exponents_ptr, root_exponents, mask=begun)


@triton.jit
def _adamw_8bit_kernel(
    tensors_ptr,  # int64 [parameters, 8]: addresses of weights, gradients, both states, both exponents; values, seed
    numbers_ptr,  # as above
    chunks_ptr,
    skip_ptr,
    factor_ptr,
    beta1,
    beta2,
    eps,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    RUNS: tl.constexpr,
):
    chunk = chunks_ptr + tl.program_id(0) * 2
    tensor, first = tl.load(chunk), tl.load(chunk + 1)
    row = tensors_ptr + tensor * 8
    p_ptr = tl.load(row).to(tl.pointer_type(tl.float32)) + first
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + first
    mean_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8)) + first
    root_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8)) + first
    mean_exponents_ptr = tl.load(row + 4).to(tl.pointer_type(tl.int8)) + first // 128
    root_exponents_ptr = tl.load(row + 5).to(tl.pointer_type(tl.int8)) + first // 128
    here = tl.where(tl.load(skip_ptr) != 0, 0, tl.load(row + 6) - first)
    seed = tl.load(row + 7).to(tl.uint32)
    factor = tl.load(factor_ptr)
    step_size = tl.load(numbers_ptr + tensor * 3)
    bias_root = tl.load(numbers_ptr + tensor * 3 + 1)
    left = tl.load(numbers_ptr + tensor * 3 + 2)
    if ALIGNED:  # chunks are multiples of 16 values
        p_ptr, grad_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, root_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(root_ptr, 16)
    # As above: without masks where all of a chunk is there.
    if here >= STEPS * RUNS * 128:
        for step in range(STEPS):
            runs = step * RUNS + tl.arange(0, RUNS)
            at = runs[:, None] * 128 + tl.arange(0, 128)[None, :]
            _update_8bit(
                p_ptr + at, grad_ptr + at, mean_ptr + at, root_ptr + at, mean_exponents_ptr + runs,
                root_exponents_ptr + runs, None, None, None, first.to(tl.int32) + at, seed, factor, step_size,
                bias_root, left, beta1, beta2, eps,
            )  # fmt: skip
    else:
        for step in range(STEPS):
            runs = step * RUNS + tl.arange(0, RUNS)
            at = runs[:, None] * 128 + tl.arange(0, 128)[None, :]
            _update_8bit(
                p_ptr + at, grad_ptr + at, mean_ptr + at, root_ptr + at, mean_exponents_ptr + runs,
                root_exponents_ptr + runs, at < here, runs * 128 < here, 0, first.to(tl.int32) + at, seed, factor,
                step_size, bias_root, left, beta1, beta2, eps,
            )  # fmt: skip


STEPS, BLOCK = (2, 512) if interpreted() else (8, 1024)
CHUNK = STEPS * BLOCK
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def adamw_(
    tensors: Sequence[tuple[Tensor, ...]],
    numbers: Sequence[tuple[float, float, float]],
    beta1: float,
    beta2: float,
    eps: float,
    *,
    skip: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """One step of many (weights, gradients, means, squares), in place; `numbers` as the kernel lists them.

    `skip` and `factor` are fp32 numbers on the device: 1 changes nothing at all; what gradients are multiplied by.

    Weights and gradients fp32, the states of all parameters one dtype; a parameter's four tensors have one size, are
    contiguous and lie on one device. Does not wait for it.
    """
    filled = [number for number, four in enumerate(tensors) if four[0].numel()]
    tensors, numbers = [tensors[number] for number in filled], [numbers[number] for number in filled]
    if not tensors:
        return
    device, state = tensors[0][0].device, tensors[0][2].dtype
    sizes = tuple(four[0].numel() for four in tensors)
    assert all(x.is_contiguous() and x.numel() == size for four, size in zip(tensors, sizes, strict=True) for x in four)
    assert all((p.dtype, g.dtype, m.dtype, s.dtype) == (*[torch.float32] * 2, state, state) for p, g, m, s in tensors)
    addresses = [[x.data_ptr() for x in four] for four in tensors]
    table = np.array([[*four, size] for four, size in zip(addresses, sizes, strict=True)], np.int64)
    chunks = _chunks(sizes, device)
    launch: Any = _adamw_kernel[(len(chunks),)]
    skip = skip if skip is not None else torch.zeros((), device=device)
    factor = factor if factor is not None else torch.ones((), device=device)
    launch(
        upload(torch.from_numpy(table), device), upload(torch.tensor(numbers, dtype=torch.float32), device), chunks,
        skip, factor, beta1, beta2, eps, STATE=DTYPES[state], ALIGNED=bool((table[:, :4] % 16 == 0).all()),
        STEPS=STEPS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [programs, 2]: parameter and first value of each."""
    pairs = [(number, first) for number, size in enumerate(sizes) for first in range(0, size, CHUNK)]
    return torch.tensor(pairs, dtype=torch.int64).to(device)


def adamw_8bit_(
    tensors: Sequence[tuple[Tensor, ...]],
    numbers: Sequence[tuple[float, float, float]],
    seeds: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    *,
    skip: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """`adamw_` for (weights, gradients, means, roots, exponents of the means, exponents of the roots), states as
    `adamw_8bit` encodes them; `seeds` are 32 bits of rounding noise for each parameter."""
    filled = [number for number, six in enumerate(tensors) if six[0].numel()]
    tensors, numbers = [tensors[number] for number in filled], [numbers[number] for number in filled]
    if not tensors:
        return
    device = tensors[0][0].device
    sizes = tuple(six[0].numel() for six in tensors)
    kinds = (torch.float32, torch.float32, torch.uint8, torch.uint8, torch.int8, torch.int8)
    assert all(tuple(x.dtype for x in six) == kinds and all(x.is_contiguous() for x in six) for six in tensors)
    rows = np.array(
        [
            [*(x.data_ptr() for x in six), size, seeds[number]]
            for six, size, number in zip(tensors, sizes, filled, strict=True)
        ],
        np.int64,
    )
    chunks = _chunks(sizes, device)
    launch: Any = _adamw_8bit_kernel[(len(chunks),)]
    skip = skip if skip is not None else torch.zeros((), device=device)
    factor = factor if factor is not None else torch.ones((), device=device)
    launch(
        upload(torch.from_numpy(rows), device), upload(torch.tensor(numbers, dtype=torch.float32), device), chunks,
        skip, factor, beta1, beta2, eps, ALIGNED=bool((rows[:, :4] % 16 == 0).all()), STEPS=STEPS, RUNS=BLOCK // 128,
        num_warps=4,
    )  # fmt: skip
