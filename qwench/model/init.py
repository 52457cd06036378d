"""Initial weights: N(0, initializer_range) for matrices, 0 for biases, 1 for norms [Qwen code].

Every parameter draws from its own generator, seeded by the run's seed and the parameter's name, so the values depend
neither on the order of construction nor on how a model is laid out over devices.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
"""The two projections that write to the residual stream (both are called c_proj in Qwen-1)."""


def parameter_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, scale_residual: bool = True) -> None:
    """Fill all parameters in place. `scale_residual` draws the residual outputs from N(0, std / sqrt(2 layers)), as
    Qwen-1's code does; the released Qwen2 code does not say what training used, so it is an option.
    """
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, model.config, seed, scale_residual)


@torch.no_grad()
def init_parameter(name: str, out: Tensor, config: ModelConfig, seed: int, scale_residual: bool = True) -> None:
    """Fill one whole parameter, given by its full name, in place."""
    std = config.initializer_range
    if scale_residual and name.endswith(RESIDUAL_OUTPUTS):
        std /= (2 * config.num_hidden_layers) ** 0.5
    if name.endswith("norm.weight"):
        out.fill_(1.0)
    elif name.endswith("bias"):
        out.zero_()
    else:
        generator = torch.Generator(out.device).manual_seed(parameter_seed(seed, name))
        out.normal_(0.0, std, generator=generator)
