"""Compiles and calls `linear_cpu_kernel.c`: a linear layer of a few bf16 tokens on a CPU, with what stands around it.

The C file is compiled when it is first needed (`qwench.native`). Where that cannot be, `load` says why in the log and
returns None, and the caller uses torch.

Shape suffixes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qwench import native
from qwench.ops.hardware import cpu_features

log = logging.getLogger("qwench.ops")

SOURCE = Path(__file__).with_name("linear_cpu_kernel.c")
TARGETS = {
    "avx512": ("-DLANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "avx2": ("-DLANES=8", "-mavx2", "-mfma"),
}
"""Instruction sets by name, the best first: not -march=native, as machines may share a cache directory."""
FLAGS = ("-ffp-contract=fast", "-fno-math-errno")
MOST_TOKENS = 8
"""As `TOKENS` in the source: their sums fill the registers."""

Kernel = Callable[..., int]


def target() -> str | None:
    """The name in `TARGETS` that suits this processor, or None."""
    features = cpu_features()
    if "avx512_f" in features:
        return "avx512"
    return "avx2" if "avx2" in features else None


@functools.cache
def load() -> Kernel | None:
    """The kernel for this processor, compiled if it is not in the cache; None where there is none."""
    name = target()
    if name is None or sys.byteorder != "little":
        log.info("linear layers of few tokens use torch: no kernel for this processor")
        return None
    try:
        return open_library(build(name))
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("linear layers of few tokens use torch, up to twice as slow: %s", error)
        return None


def build(name: str, directory: Path | None = None) -> Path:
    """The library of `TARGETS[name]`, as `qwench.native.build` makes it."""
    return native.build(SOURCE, f"linear_cpu_{name}", (*FLAGS, *TARGETS[name]), directory)


def open_library(library: Path) -> Kernel:
    """The function of a compiled library. Raises OSError or AttributeError where it cannot be used."""
    kernel = ctypes.CDLL(str(library)).qwench_linear
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    # Of the OpenMP library that torch loaded, whichever that is: GCC's, LLVM's and Intel's all have this entry.
    parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, pointer)
    kernel.argtypes = [
        pointer, pointer, pointer, pointer, ctypes.c_float, pointer, pointer,
        size, size, size, ctypes.c_int, ctypes.c_int, pointer,
    ]  # fmt: skip
    kernel.restype = ctypes.c_int

    def call(*arguments: int | float | None) -> int:
        return kernel(*arguments, torch.get_num_threads(), parallel)

    return call


def suits(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, norm_K: Tensor | None, swiglu: bool, residual: Tensor | None
) -> bool:
    """The arguments are contiguous bf16 tensors on the CPU whose shapes belong together."""
    num_tokens, num_inputs = x_TK.shape
    num_rows = weight_NK.shape[0]
    return (
        _is(x_TK, (num_tokens, num_inputs))
        and _is(weight_NK, (num_rows, num_inputs))
        and not (swiglu and num_rows % 2)
        and (bias_N is None or _is(bias_N, (num_rows,)))
        and (norm_K is None or _is(norm_K, (num_inputs,)))
        and (residual is None or _is(residual, (num_tokens, num_rows // 2 if swiglu else num_rows)))
    )


def _is(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu


def linear(
    kernel: Kernel,
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
) -> Tensor:
    """`ops.linear` without a gradient, of tensors that `suits`; [T, N] or, with SwiGLU, [T, N / 2] in bf16.

    fp32 from the product to the one rounding of the result; the norm rounds as `ops.norm` does. A row's bits depend
    neither on the other rows nor on the number of threads.
    """
    num_tokens, num_inputs = x_TK.shape
    num_rows = weight_NK.shape[0]
    y_TN = x_TK.new_empty(num_tokens, num_rows // 2 if swiglu else num_rows)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    failed = kernel(
        x_TK.data_ptr(),
        weight_NK.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(),
        eps,
        None if residual is None else residual.data_ptr(),
        y_TN.data_ptr(),
        num_tokens,
        num_inputs,
        num_rows,
        swiglu,
    )
    if failed:
        raise MemoryError(f"no memory for {num_tokens} x {num_inputs} inputs")
    return y_TN
