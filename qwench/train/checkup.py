"""Scores of a small fixed sample while a run trains: a function that the recipe names is called every so many steps.

It gets the live model and must leave it and all random states as they are; what it computes goes to metrics.jsonl.
Which function that is, this floor does not know (`qwench.mini` joins training, engine and evaluation).
"""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from qwench.parallel.layout import Team
from qwench.tokenizer import Tokenizer
from qwench.train.config import MiniConfig

log = logging.getLogger("qwench.train")


class Checkup:
    """`Checkup(recipe.mini, team, tokenizer).scores(model)`.

    Raises ValueError for a function that cannot be found, and for a job of several processes, whose ranks hold parts of
    the model.
    """

    def __init__(self, settings: MiniConfig, team: Team, tokenizer: Tokenizer | None) -> None:
        if not team.is_alone:
            raise ValueError(
                f"mini.every={settings.every} is for training in one process, and there are {team.layout.world}; set "
                "mini.every=0 and evaluate checkpoints instead: qwench eval RUN/checkpoints/..."
            )
        if tokenizer is None:
            raise ValueError("mini.every needs the run's tokenizer")
        self.settings, self.tokenizer = settings, tokenizer
        module, colon, name = settings.call.partition(":")
        try:
            self.call: Callable[..., Mapping[str, float]] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            what = error if colon else "it has no colon"
            raise ValueError(f"mini.call is {settings.call!r}, not module:function ({what})") from None

    def is_due(self, step: int, last: int) -> bool:
        return step % self.settings.every == 0 or step == last

    def scores(self, model: nn.Module, *, is_first: bool) -> dict[str, float]:
        """By name; {} after an error, which stops the run only the first time: a mistake in the recipe then."""
        try:
            with _unchanged(model):
                return dict(self.call(model, self.tokenizer, self.settings.data_dirs, self.settings.seconds))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            if is_first:
                raise ValueError(f"the mini-suite cannot run ({error}); mend it, or set mini.every=0") from error
            log.warning("the mini-suite could not run: %s", error)
            return {}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training goes on as if nothing had happened: generators and the model's mode are put back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
