"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from qwench import __version__
from qwench.engine import Engine
from qwench.serve.limits import ServeConfig, Slots, Traffic
from qwench.serve.metrics import Metrics
from qwench.serve.params import SamplingDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    engine: Engine
    config: ServeConfig
    defaults: SamplingDefaults
    metrics: Metrics
    slots: Slots
    traffic: Traffic
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time at which the model was opened."""
    fingerprint: str = f"qwench_{__version__}"
    """For clients that compare seeded answers over time."""
