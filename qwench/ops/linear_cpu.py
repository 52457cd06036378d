"""Linear layers of a few tokens on a CPU: a decoding step, which is bound by reading memory.

Not for many tokens, gradients or other processors: those go to `F.linear`, as does whatever gains nothing here.
`F.linear` gives oneDNN and MKL a very flat matrix times a large one, which they do not read at the memory's rate. What
does (docs/cpu.md has the figures):

* `layer`: our own kernel (`linear_cpu_native`) computes a whole layer of up to eight bf16 tokens, norm, SwiGLU and
  residual included.
* `product`: other calls of torch for more tokens, or where that kernel cannot be had: one bf16 token goes to the
  matrix-vector product, and a few tokens take the weight as the left operand. All of them accumulate in fp32 and round
  once, bias included.

Shape suffixes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops import linear_cpu_native
from qwench.ops.hardware import cpu_features

MOST_BF16 = 64
"""Most bf16 tokens for which the weight is the left operand."""
FEWEST_FP32, MOST_FP32 = 4, 32
"""The same in fp32. `F.linear` reads at the memory's rate below, and is bound by arithmetic above."""


def runs_native(device: torch.device) -> bool:
    """Our own kernel runs on `device`: a CPU, where it could be compiled. The first call may take a second or two."""
    return device.type == "cpu" and linear_cpu_native.load() is not None


def layer(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    swiglu: bool,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor | None:
    """`ops.linear` by our own kernel, or None for what it does not compute or would not compute faster."""
    if (
        x_TK.ndim != 2
        or not 1 <= x_TK.shape[0] <= linear_cpu_native.MOST_TOKENS
        or out_dtype not in (None, torch.bfloat16)
    ):
        return None
    norm_weight = None if norm is None else norm[0]
    kernel = linear_cpu_native.load()
    if kernel is None or _recorded(x_TK, weight_NK, bias_N, norm_weight, residual):
        return None
    if not linear_cpu_native.suits(x_TK, weight_NK, bias_N, norm_weight, swiglu, residual):
        return None
    return linear_cpu_native.linear(kernel, x_TK, weight_NK, bias_N, norm, swiglu, residual)


def product(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias as `F.linear` has it, [T, N] contiguous in the dtype that all arguments share.

    Other leading dimensions of x, and arguments that need a gradient, are allowed: `F.linear` computes those.
    """
    num_tokens, dtype = x_TK.shape[0], x_TK.dtype
    if not _gains(dtype, num_tokens) or x_TK.ndim != 2 or _recorded(x_TK, weight_NK, bias_N):
        return F.linear(x_TK, weight_NK, bias_N)
    if num_tokens == 1:
        x_K = x_TK[0]
        y_N = torch.mv(weight_NK, x_K) if bias_N is None else torch.addmv(bias_N, weight_NK, x_K)
        return y_N[None]
    x_KT = x_TK.t()
    y_NT = torch.mm(weight_NK, x_KT) if bias_N is None else torch.addmm(bias_N[:, None], weight_NK, x_KT)
    return y_NT.t().contiguous()


def _gains(dtype: torch.dtype, num_tokens: int) -> bool:
    if dtype == torch.bfloat16:
        return 1 <= num_tokens <= MOST_BF16 and _has_bf16_instructions()
    return dtype == torch.float32 and FEWEST_FP32 <= num_tokens <= MOST_FP32 and _has_bf16_instructions()


def _has_bf16_instructions() -> bool:
    """Where these calls were measured faster; with AVX2 alone the bf16 matrix-vector product is far slower."""
    return "avx512_bf16" in cpu_features()


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
