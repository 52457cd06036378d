"""What every training recipe has, whatever it trains: the fields that the parts of a stage read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from qwench.run import Resume
from qwench.train.config import (
    CheckpointConfig,
    FollowConfig,
    GuardConfig,
    LoopConfig,
    MiniConfig,
    OpsConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    StartConfig,
)


class TrainingRecipe(Protocol):
    """`PretrainConfig`, `SftConfig` and those of later stages, which have fields of their own besides."""

    @property
    def out(self) -> Path: ...
    @property
    def resume(self) -> Resume: ...
    @property
    def model(self) -> StartConfig: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def gpus(self) -> int: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def guard(self) -> GuardConfig: ...
    @property
    def follow(self) -> FollowConfig: ...
    @property
    def mini(self) -> MiniConfig: ...
    @property
    def ops(self) -> OpsConfig: ...
