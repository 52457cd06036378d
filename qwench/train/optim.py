"""The optimiser: AdamW with decoupled weight decay on matrices, or Muon for the hidden ones with AdamW for the rest.

Muon [Jordan 2024, Liu 2025] orthogonalises the momentum of each matrix. Its steps are scaled to the root mean square of
AdamW's, so that one learning rate could serve both; embedding, output matrix, norms and biases stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwench.parallel.blocks import is_cut, is_second_copy, local_part
from qwench.parallel.layout import Team
from qwench.train.adamw import AdamWHalfStates, AdamWSmallStates
from qwench.train.adamw_8bit import AdamW8bit
from qwench.train.config import OptimConfig
from qwench.train.guard import StepDecision

STATE_NAMES = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    AdamWHalfStates: {"step", "exp_avg", "exp_avg_sq"},
    AdamW8bit: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}
"""What each optimiser keeps for a parameter, as a checkpoint has it."""


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

    @property
    def decides_on_device(self) -> bool:
        """Whether `step` can be called before the host knows if the step is to be skipped."""
        return all(isinstance(member, torch.optim.AdamW | AdamWSmallStates) for member in self.members)

    def step(self, decision: StepDecision | None = None) -> None:
        """Take the step, or what `decision` says of it: optimisers that cannot skip one must not be called for one."""
        for member in self.members:
            if isinstance(member, torch.optim.AdamW | AdamWSmallStates):
                # The attributes by which torch.amp.GradScaler speaks to them.
                member.found_inf = decision.skip if decision is not None else None  # pyright: ignore[reportAttributeAccessIssue]
                member.grad_scale = decision.divisor if decision is not None else None  # pyright: ignore[reportAttributeAccessIssue]
            elif decision is not None:
                own = (p.grad for group in member.param_groups for p in group["params"] if p.grad is not None)
                torch._foreach_div_([local_part(grad) for grad in own], decision.divisor)
            member.step()

    def uncount(self) -> None:
        """The step just taken has turned out to be skipped: take back what was counted on the host."""
        for member in self.members:
            if isinstance(member, AdamWSmallStates):
                member.uncount()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """As a checkpoint has it; states in 8 bits come as new tensors, others as they are."""
        owner = self._owners[parameter]
        return owner.readable(parameter) if isinstance(owner, AdamWSmallStates) else owner.state[parameter]

    def state_names(self, parameter: nn.Parameter) -> set[str]:
        return STATE_NAMES[type(self._owners[parameter])]

    def state_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Of the states that are laid out as the parameter is."""
        owner = self._owners[parameter]
        if isinstance(owner, AdamW8bit):
            return torch.bfloat16
        return owner.state_dtype if isinstance(owner, AdamWHalfStates) else parameter.dtype

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
    if optim.state_dtype == "8bit":
        members.append(AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps))
    elif optim.state_dtype == "bf16":
        members.append(AdamWHalfStates(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps))
    else:
        members.append(torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True))
    return Optimizers(members)


def squared_gradient_norm(model: nn.Module, team: Team) -> Tensor:
    """This rank's share of the squared global gradient norm, fp64 on the device: the sum over all ranks is the whole.

    What several ranks hold alike is counted by one of them.
    """
    counted = [
        local_part(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
        and team.place("replicate") == 0
        and not is_second_copy(name, team)
        and (team.place("tensor") == 0 or is_cut(name, team))
    ]
    counted = [grad for grad in counted if grad.numel()]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=team.device)
    norms = torch.stack(list(torch._foreach_norm(counted)))
    return norms.to(torch.float64).square().sum()


def optimizer_states(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
    """(parameter's name, state's name, parameter, state); a state is a number or laid out as its parameter is."""
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizers.state(parameter).items()):
            yield name, key, parameter, value


def allocate_states(model: nn.Module, optimizers: Optimizers, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Give the optimiser the states that `stored` ("<parameter>/<state>" -> shape of the whole) lists, still empty.

    They have the dtype that this optimiser keeps, whatever was stored: reading casts. Raises ValueError when they are
    of another model or optimiser.
    """
    if not stored:  # saved before the first step that was not skipped
        return
    for name, parameter in model.named_parameters():
        found = {key.rpartition("/")[2]: shape for key, shape in stored.items() if key.rpartition("/")[0] == name}
        if not found:
            raise ValueError(f"the saved optimiser state has nothing for {name}; it belongs to another model")
        if found.keys() != optimizers.state_names(parameter):
            raise ValueError(
                f"the saved optimiser state of {name} is {', '.join(sorted(found))}, which is another optimiser's; "
                "resume with the optim.kind of the checkpoint"
            )
        # `fused` wants the step counter on the device too.
        state = {
            key: torch.zeros_like(parameter, dtype=optimizers.state_dtype(parameter), requires_grad=False)
            if shape
            else torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key, shape in found.items()
        }
        optimizers.set_state(parameter, state)
