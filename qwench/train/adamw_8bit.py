"""AdamW whose two states are kept in 8 bits: 8 bytes a parameter beside its fp32 master weight's 4 become 2.

A state is cut into runs of 128 values of this rank's flat part, each with one power of two (int8). A value is a sign,
four bits of exponent and three of mantissa, as FP8's e4m3 without its special values; the second state is kept as its
square root, whose range is half as wide in powers of two. Rounding is stochastic, by a hash of step and place: to
nearest, a state that changes by less than 6 % a step would stand still. The root is never rounded to zero, since the
step is divided by it. The step itself uses what was computed, before it is rounded.

    codes, exponents = encode(values, seed)        # fp32 [n] -> uint8 [n], int8 [ceil(n / 128)]
    values = decode(codes, exponents)

What a checkpoint gets are the values in bf16, the second state squared: both fit exactly (down to 2^-133), encode to
the same codes again, and any other optimiser can go on from them. On a GPU one kernel does all parameters
(`adamw_triton.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwench.ops.triton_launch import runs_triton
from qwench.parallel.blocks import local_part
from qwench.train.adamw import AdamWSmallStates, Found, next_states

RUN = 128
"""Values that share a power of two."""
LARGEST = 119
"""Code of 240, the largest value: a run's largest magnitude is scaled to 128 or more and less than 256, and must stay
there when rounded."""
_MASK = 0xFFFFFFFF


class AdamW8bit(AdamWSmallStates):
    """States: "step" (fp32, on the CPU), "exp_avg" and "exp_avg_sq" (uint8, laid out as the parameter), and their
    exponents (int8 [runs] of this rank's part). See `AdamWSmallStates` for the rest."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def readable(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states as a checkpoint has them: "step", "exp_avg" and "exp_avg_sq" in bf16. Empty before a step."""
        state = self.state[parameter]
        if not state or state["exp_avg"].dtype != torch.uint8:
            return state
        found = {"step": state["step"]}
        for name, root in (("exp_avg", False), ("exp_avg_sq", True)):
            values = decode(local_part(state[name]).view(-1), state[f"{name}_exponents"])
            whole = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
            local_part(whole).view(-1).copy_(values.square() if root else values)
            found[name] = whole
        return found

    def fill(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """States that a checkpoint has been read into are encoded; new ones are zero."""
        if not state:
            state["step"] = torch.zeros(())
            read = dict.fromkeys(("exp_avg", "exp_avg_sq"))
        elif state["exp_avg"].dtype == torch.uint8:
            return
        else:
            state["step"] = state["step"].cpu()
            read = {name: local_part(state.pop(name)).view(-1).float() for name in ("exp_avg", "exp_avg_sq")}
        num_values = local_part(parameter).numel()
        for name, values in read.items():
            codes = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
            exponents = torch.zeros(-(-num_values // RUN), dtype=torch.int8, device=local_part(parameter).device)
            if values is not None and num_values:
                root = name == "exp_avg_sq"
                new_codes, new_exponents = encode(values.sqrt() if root else values, None, never_zero=root)
                local_part(codes).view(-1).copy_(new_codes)
                exponents.copy_(new_exponents)
            state[name], state[f"{name}_exponents"] = codes, exponents

    def apply(self, group: dict[str, Any], found: list[Found], factor: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        tensors = [
            (
                one.p, one.grad, *(local_part(one.state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq")),
                one.state["exp_avg_exponents"], one.state["exp_avg_sq_exponents"],
            )
            for one in found
        ]  # fmt: skip
        seeds = [seed_of(int(one.state["step"]), number) for number, one in enumerate(found)]
        numbers = [one.numbers for one in found]
        if runs_triton(tensors[0][0].device):
            from qwench.train.adamw_triton import adamw_8bit_

            adamw_8bit_(
                tensors, numbers, seeds, beta1, beta2, group["eps"], skip=self.found_inf, factor=factor
            )  # fmt: skip
        elif self.found_inf is None or not self.found_inf:
            for (p, grad, means, roots, mean_exponents, root_exponents), its_numbers, seed in zip(
                tensors, numbers, seeds, strict=True
            ):
                if not p.numel():
                    continue
                mean, square = decode(means, mean_exponents), decode(roots, root_exponents).square_()
                grad = grad if factor is None else grad * factor
                mean, square = next_states(p, grad, mean, square, *its_numbers, beta1, beta2, group["eps"])
                for values, codes, exponents, its_seed, root in (
                    (mean, means, mean_exponents, seed, False),
                    (square.sqrt_(), roots, root_exponents, seed ^ 0x5BD1E995, True),
                ):
                    new_codes, new_exponents = encode(values, its_seed, never_zero=root)
                    codes.copy_(new_codes)
                    exponents.copy_(new_exponents)


def seed_of(step: int, number: int) -> int:
    """32 bits for the `number`-th parameter of a group in a step."""
    return (step * 0x9E3779B1 + number * 0x85EBCA77 + 1) & _MASK


def encode(values: Tensor, seed: int | None, *, never_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and exponents int8 [ceil(n / 128)] of fp32 [n]. Without a seed it rounds to nearest.

    A value becomes code * 2^exponent; `never_zero` keeps values above zero there.
    """
    num_values = values.numel()
    scaled = F.pad(values, (0, -num_values % RUN)).view(-1, RUN)
    exponents = (_bits(scaled.abs().amax(1)) >> 23).sub(127 + 7).clamp(-126, 127)
    scaled = (scaled * _power(-exponents)[:, None]).view(-1)[:num_values]
    if seed is None:
        noise = torch.full((num_values,), 1 << 19, dtype=torch.int32, device=values.device)
    else:
        noise = (_hash(num_values, seed, values.device) >> 12).int()
    magnitude = scaled.abs()
    normal = ((_bits(magnitude) + noise) >> 20) - (120 << 3)
    small = (magnitude * 512.0 + noise * 2.0**-20).floor().int()
    code = torch.where(magnitude < 2.0**-6, small, normal).clamp(max=LARGEST)
    if never_zero:
        code = torch.where(magnitude > 0, code.clamp(min=1), code)
    return (code | ((scaled < 0).int() << 7)).to(torch.uint8), exponents.to(torch.int8)


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """fp32 [n]."""
    wide = codes.int()
    code = wide & 127
    normal = ((code << 20) + (120 << 23)).view(torch.float32)
    magnitude = torch.where(code < 8, code.float() * 2.0**-9, normal)
    signed = torch.where(wide > 127, -magnitude, magnitude)
    return signed * _power(exponents.int()).repeat_interleave(RUN)[: codes.numel()]


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def _power(exponents: Tensor) -> Tensor:
    """2^e as fp32, for int32 e of -126 to 127."""
    return ((exponents + 127) << 23).view(torch.float32)


def _hash(number: int, seed: int, device: torch.device) -> Tensor:
    """int64 [number] of 32 random-looking bits: a mixing function of place and seed, the same in the kernel."""
    x = torch.arange(number, dtype=torch.int64, device=device) * 0x9E3779B1 & _MASK
    x ^= seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor & _MASK
    return x ^ (x >> 16)
