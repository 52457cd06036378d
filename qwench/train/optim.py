"""The optimiser: AdamW with decoupled weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwench.train.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; norms and biases (one-dimensional) get no weight decay."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: leave them) and return the norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return nn.utils.clip_grad_norm_(model.parameters(), limit)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "<parameter name>/<state name>"."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises ValueError when the state is of another model."""
    for name, parameter in model.named_parameters():
        found = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
        if not found:
            raise ValueError(f"the saved optimiser state has nothing for {name}; it belongs to another model")
        optimizer.state[parameter] = {
            key: value.clone() if value.ndim == 0 else value.to(parameter.device) for key, value in found.items()
        }
