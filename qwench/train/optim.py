"""The optimiser: AdamW with decoupled weight decay on matrices, or Muon for the hidden ones with AdamW for the rest.

Muon [Jordan 2024, Liu 2025] orthogonalises the momentum of each matrix. Its steps are scaled to the root mean square of
AdamW's, so that one learning rate could serve both; embedding, output matrix, norms and biases stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwench.train.config import OptimConfig

STATE_NAMES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What each optimiser keeps for a parameter."""


class Optimizers:
    """One or two torch optimisers that own disjoint parameters and step together.

    Every parameter group has its peak learning rate under "peak_lr"; `set_lr_ratio` applies the schedule.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = list(members)
        self._owners = {p: member for member in members for group in member.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def set_lr_ratio(self, ratio: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * ratio

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self._owners[parameter].state[parameter]

    def state_names(self, parameter: nn.Parameter) -> set[str]:
        return STATE_NAMES[type(self._owners[parameter])]

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        self._owners[parameter].state[parameter] = state


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizers:
    """Weight decay goes to matrices only: norms and biases (one-dimensional) get none."""
    named = list(model.named_parameters())
    vectors = [p for _, p in named if p.ndim < 2]
    matrices = [p for _, p in named if p.ndim >= 2]
    members: list[torch.optim.Optimizer] = []
    if optim.kind == "muon":
        hidden = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        matrices = [p for name, p in named if p.ndim >= 2 and ".layers." not in name]
        members.append(
            torch.optim.Muon(
                hidden,
                lr=optim.muon_lr or optim.lr,
                momentum=optim.muon_momentum,
                weight_decay=optim.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    members.append(torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True))
    return Optimizers(members)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: leave them) and return the norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return nn.utils.clip_grad_norm_(model.parameters(), limit)


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimiser's state by "<parameter name>/<state name>"."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizers.state(parameter).items())
    }


def load_optimizer_tensors(model: nn.Module, optimizers: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises ValueError when the state is of another model or optimiser."""
    if not tensors:  # saved before the first step that was not skipped
        return
    for name, parameter in model.named_parameters():
        found = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
        if not found:
            raise ValueError(f"the saved optimiser state has nothing for {name}; it belongs to another model")
        if found.keys() != optimizers.state_names(parameter):
            raise ValueError(
                f"the saved optimiser state of {name} is {', '.join(sorted(found))}, which is another optimiser's; "
                "resume with the optim.kind of the checkpoint"
            )
        # Copies, as safetensors may give views of the file. `fused` wants the step counter on the device too.
        state = {key: value.to(parameter.device, copy=True) for key, value in found.items()}
        optimizers.set_state(parameter, state)
