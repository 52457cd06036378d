"""What ranks do in the tests of runs that survive. Started processes import it by name, so it holds no tests."""

from __future__ import annotations

import os
import signal
from typing import Any

from qwench.parallel.launch import attempt
from qwench.parallel.layout import Team
from qwench.tokenizer import Tokenizer
from qwench.train.config import PretrainConfig
from qwench.train.job import run_stage
from qwench.train.loop import Trainer, TrainResult
from qwench.train.pretrain import _train
from qwench.train.start import model_config

RANK, STEP = 1, 7


def dies_once(recipe: PretrainConfig, team: Team) -> TrainResult:
    """A stage in which rank 1 is shot in step 7 of the first attempt."""
    real = Trainer._step

    def shot(self: Trainer) -> dict[str, Any]:
        if attempt() == 0 and self.team.rank == RANK and self.state.step + 1 == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self)

    Trainer._step = shot
    return _train(recipe, team)


def run(recipe: PretrainConfig) -> TrainResult:
    return run_stage(dies_once, recipe, lambda recipe: model_config(recipe.model, Tokenizer.load(recipe.tokenizer)))
