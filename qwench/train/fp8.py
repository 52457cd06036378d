"""FP8 products in the blocks of a model that trains: which layers take them, and a probe that says whether they pay.

    use_fp8(model)                                    # after the weights are there, before compilation and FSDP
    gain = block_gain(model.config, tokens, seq_len, torch.bfloat16, device, "elementwise")

The merged q/k/v, output, gate/up and down matrices of every block; embedding, output matrix and norms stay as they are,
and so do the fp32 master weights and the optimiser. FP8 halves the products' time at best, but every operand has to be
scaled, rounded and, for the gradients, transposed first: small layers lose more than they gain. The probe therefore
times a whole block of the model's shape, compiled as the run's are, forward and backward, both ways.

A model whose matrices tensor parallelism has cut keeps bf16.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time

import torch
from torch import Tensor, nn

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM, Linear, RMSNorm
from qwench.model.init import init_weights
from qwench.ops.attention import AttnMeta
from qwench.ops.attention_train import Stream
from qwench.ops.linear_fp8 import linear_fp8, runs_fp8
from qwench.ops.norm import rms_norm
from qwench.ops.rope import Rope, cached_inverse_frequencies
from qwench.ops.swiglu import swiglu as swiglu_op
from qwench.parallel.layout import Team
from qwench.run import console
from qwench.train.compile import Remat, compile_blocks

PAYS = 1.03
"""The least gain for which `loop.fp8 = "auto"` takes FP8: less is not worth its rounding."""


class LinearFP8(Linear):
    """`Linear` with FP8 products where a gradient is taken; validation sees the model that is exported."""

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """As `Linear.forward`, for one leading dimension."""
        if not torch.is_grad_enabled():
            return super().forward(input, norm=norm, swiglu=swiglu, residual=residual)
        x_TK = input if norm is None else rms_norm(input, norm.weight, norm.eps)
        bias_N = None if self.bias is None else self.bias.to(x_TK.dtype)
        y_TN = linear_fp8(x_TK, self.weight.to(x_TK.dtype), bias_N)
        if swiglu:
            y_TN = swiglu_op(y_TN)
        return y_TN if residual is None else residual + y_TN


def use_fp8(model: CausalLM) -> int:
    """Let the blocks' linear layers compute in FP8, in place; parameters and names stay. How many now do."""
    found = [module for module in model.model.layers.modules() if type(module) is Linear]
    for module in found:
        module.__class__ = LinearFP8
    return len(found)


def block_gain(
    config: ModelConfig,
    tokens: int,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    remat: Remat = "none",
    *,
    backend: str = "inductor",
) -> float:
    """How many times faster a compiled block's forward and backward pass is with FP8 products, casts included.

    Compiles two graphs (a minute at most) and gives its memory back.
    """
    tokens = max(seq_len, tokens // seq_len * seq_len)
    inputs = torch.randn(tokens, config.hidden_size, device=device).to(dtype).requires_grad_()
    positions = torch.arange(seq_len, device=device).repeat(tokens // seq_len)
    rope = Rope.at(positions, cached_inverse_frequencies(config.rope_theta, config.d_head, device), dtype)
    meta = Stream.of(AttnMeta.packed([seq_len] * (tokens // seq_len), device))
    # A model of one such layer, without a vocabulary worth mentioning.
    shape = dataclasses.replace(config, num_hidden_layers=1, vocab_size=16)
    blocks: list[nn.Module] = []
    for in_fp8 in (False, True):
        model = CausalLM(shape, device=device, dtype=dtype)
        init_weights(model, 0)
        if in_fp8:
            use_fp8(model)
        compile_blocks(model, remat, backend=backend)
        blocks.append(model.model.layers[0])
    seconds: list[list[float]] = [[], []]
    for repeat, which in itertools.product(range(8), range(2)):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            blocks[which](inputs, rope, meta, None).backward(inputs.detach())
        _synchronize(device)
        if repeat >= 3:
            seconds[which].append(time.perf_counter() - start)
        blocks[which].zero_grad(set_to_none=True)
        inputs.grad = None
    gain = statistics.median(seconds[0]) / statistics.median(seconds[1])
    if device.type == "cuda":
        del blocks, model, inputs, rope, meta, positions
        torch.cuda.empty_cache()
    return gain


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick_fp8(
    model: CausalLM,
    wanted: str,
    team: Team,
    dtype: torch.dtype,
    *,
    compiled: bool,
    remat: Remat,
    tokens: int,
    seq_len: int,
) -> bool:
    """Carry out `loop.fp8` on a model before its compilation, the same on all ranks; whether it is in FP8 now.

    `tokens` of a micro-batch on a rank, in sequences of about `seq_len`. "auto" measures and says what it found. Raises
    ValueError for "on" where FP8 cannot be.
    """
    if wanted == "off":
        return False
    device = team.device
    obstacle = None
    if team.layout.tensor > 1:
        obstacle = "parallel.tensor cuts the matrices, whose products stay in bf16"
    elif device.type == "cuda" and not runs_fp8(device):
        obstacle = "this GPU multiplies no FP8 (compute capability 8.9 and later do)"
    if wanted == "on":
        if obstacle is not None:
            raise ValueError(f"loop.fp8=on: {obstacle}; set loop.fp8=off")
        return use_fp8(model) > 0
    if obstacle is None and (device.type != "cuda" or not compiled):
        obstacle = "uncompiled blocks and CPUs only lose by it"
    gain = 0.0
    if obstacle is None and team.is_main:
        gain = block_gain(model.config, tokens, min(seq_len, tokens), dtype, device, remat)
    gain = team.agree(gain)
    pays = obstacle is None and gain >= PAYS
    said = obstacle or f"a block with FP8 products is {gain:.2f}x as fast as in bf16, casts included"
    console.print(f"loop.fp8: {'on' if pays else 'off'}; {said}")
    return pays and use_fp8(model) > 0
