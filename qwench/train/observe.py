"""What looks on while a run trains: the watchdog, the trackers, the profile, peak memory, and the rates MFU refers to.

    with Observers(recipe, run, team, device, dtype, config) as look:
        look.mark(step, "validation")                 # every rank: I am still here
        look.begin_step(step); ...; look.end_step(tokens, flops)
        run.record(**look.measures(...))

None of it changes what is computed, and none of it runs on the critical path but the one probe at the start.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import torch

from qwench.model.config import ModelConfig
from qwench.model.flops import weight_flops_per_token
from qwench.ops.hardware import peak_flops, sustained_flops
from qwench.parallel.layout import Team
from qwench.parallel.watchdog import Watchdog
from qwench.run import Run
from qwench.train.job import Follower
from qwench.train.profile import NUM_STEPS, Rates, StepProfile
from qwench.train.recipe import TrainingRecipe
from qwench.train.trackers import Trackers

log = logging.getLogger("qwench.train")


class Observers:
    """All of them; of a rank other than 0 the watchdog alone."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        run: Run | Follower,
        team: Team,
        device: torch.device,
        dtype: torch.dtype,
        config: ModelConfig,
        total_steps: int,
    ) -> None:
        self.recipe, self.run, self.team, self.device, self.config = recipe, run, team, device, config
        self.total_steps = total_steps
        self.rates = _rates(run, device, dtype) if isinstance(run, Run) else _NO_RATES
        self.watchdog: Watchdog | None = None
        self.profile: StepProfile | None = None
        self._trackers: Trackers | None = None
        self._slow_steps = 1

    def __enter__(self) -> Observers:
        guard, run = self.recipe.guard, self.run
        self.watchdog = Watchdog(
            run.path / "logs", patience_s=guard.hang_seconds, long_patience_s=guard.hang_seconds_long
        )
        if isinstance(run, Run):
            self._trackers = Trackers(run.path, self.recipe.follow).__enter__()
            run.listeners.append(self._trackers.put)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.profile is not None:
            self.profile.close()
        if self._trackers is not None:
            assert isinstance(self.run, Run)
            self.run.listeners.remove(self._trackers.put)
            self._trackers.close()
        if self.watchdog is not None:
            self.watchdog.close()

    # ----------------------------------------------------------------------------------------------------- every rank
    def mark(self, step: int, doing: str, *, is_long: bool = False) -> None:
        """Progress, for the watchdog: an assignment. `is_long` for what makes no further marks for a while."""
        if self.watchdog is not None:
            self.watchdog.mark(step, doing, is_long=is_long)

    def alive(self) -> None:
        """Progress in what was marked last; from any thread."""
        if self.watchdog is not None:
            self.watchdog.alive()

    def begin_step(self, step: int) -> None:
        """The first step of a process compiles, so it may take long."""
        self.mark(step, "training step", is_long=self._slow_steps > 0)
        self._slow_steps -= 1
        if isinstance(self.run, Run) and self.recipe.loop.profile_step:
            if self.profile is None:
                self.profile = self._new_profile(step)
            self.profile.begin(step)

    def end_step(self, step: int, tokens: int, flops_per_token: float) -> None:
        if self.profile is not None:
            mine = tokens / self.team.layout.world
            weights = weight_flops_per_token(self.config)
            self.profile.end(step, mine * weights, mine * (flops_per_token - weights))

    # --------------------------------------------------------------------------------------------------------- rank 0
    def measures(self, flops_per_s: float) -> dict[str, float]:
        """For a record: both utilisations of `flops_per_s` on all devices together, and this device's peak memory since
        the record before."""
        world = self.team.layout.world
        values = {
            "mfu": round(flops_per_s / self.peak_flops, 4),
            "mfu_of_gemm": round(flops_per_s / world / self.rates.products, 4),
        }
        if self.device.type == "cuda":
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
            torch.cuda.reset_peak_memory_stats(self.device)
        return values

    @property
    def peak_flops(self) -> float:
        """Of all devices together."""
        return self.rates.datasheet * self.team.layout.world

    def provenance(self) -> dict[str, Any]:
        return {
            "peak_flops": {"value": self.peak_flops, "source": self.rates.datasheet_source},
            "gemm_flops": {
                "value": self.rates.products,
                "device": _device_name(self.device),
                "torch": torch.__version__,
            },
        }

    def _new_profile(self, step: int) -> StepProfile:
        first = max(step, self.recipe.loop.profile_step)
        last = min(first + NUM_STEPS - 1, self.total_steps)
        return StepProfile(first_step=first, last_step=last, run=self.run.path, device=self.device, rates=self.rates)


_NO_RATES = Rates(datasheet=math.inf, datasheet_source="", products=math.inf)
"""Of ranks that record nothing."""


def _rates(run: Run, device: torch.device, dtype: torch.dtype) -> Rates:
    datasheet, source = peak_flops(device, dtype)
    return Rates(datasheet=datasheet, datasheet_source=source, products=_known_products(run, device, dtype))


def _known_products(run: Run, device: torch.device, dtype: torch.dtype) -> float:
    """The rate that the run has measured before on such a device, or a measurement."""
    try:
        facts = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
        known = facts["gemm_flops"]
        same = (known["device"], known["torch"]) == (_device_name(device), torch.__version__)
        if same and device.type == "cuda" and facts["precision"] == str(dtype).removeprefix("torch."):
            return float(known["value"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return sustained_flops(device, dtype)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
