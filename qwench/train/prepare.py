"""A run's model made ready: its dtype, its axes, copies of its weights, compiled blocks, shards - in this order.

    prepared = prepare_model(recipe, recipe.model, tokenizer, team, row_tokens=recipe.seq_len)

What "auto" means on this machine is decided here and recorded by the loop. The parts themselves lie in `start.py`
(weights), `copies.py`, `compile.py` and `parallel/`.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qwench.model.decoder import CausalLM
from qwench.ops import dispatch
from qwench.ops.hardware import pick_dtype
from qwench.parallel.layout import Team
from qwench.tokenizer import Tokenizer
from qwench.train.checkpoint import Checkpoints
from qwench.train.compile import Remat, can_compile, compile_blocks, refused_choices, rematerialise
from qwench.train.config import LoopConfig, OpsConfig, StartConfig
from qwench.train.copies import ComputeCopies
from qwench.train.fp8 import pick_fp8
from qwench.train.layouts import pick_free
from qwench.train.recipe import TrainingRecipe
from qwench.train.start import build_sharded, model_config

log = logging.getLogger("qwench.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """This rank's share of a model, ready to train."""

    model: CausalLM
    dtype: torch.dtype
    """Of the activations."""
    copies: ComputeCopies | None = None
    """To be refreshed whenever the weights have changed."""
    compiled: bool = False
    remat: Remat = "none"
    fp8: bool = False
    """The blocks' products are in FP8."""
    reshard_after_forward: bool = True
    """With several ranks: FSDP gathers weights in every pass, not once a step."""
    row_tokens: int | None = None
    """What each row has, if all have the same; compiled blocks then want micro-batches of one size."""

    def refresh(self) -> None:
        if self.copies is not None:
            self.copies.refresh()


def prepare_model(
    recipe: TrainingRecipe, start: StartConfig, tokenizer: Tokenizer, team: Team, *, row_tokens: int | None = None
) -> Prepared:
    """Raises ValueError for a recipe whose blocks cannot be compiled, and where `build_sharded` does."""
    dtype = run_precision(recipe.loop, team, recipe.out)
    with dispatch.forced(forced_operations(recipe.ops)):
        compiled = picks_compilation(recipe.loop, team.device)
        shape = model_config(start, tokenizer)
        remat, reshard = pick_free(recipe, shape, team.layout, team.device, compiled)
        in_fp8 = False
        copies: list[ComputeCopies] = []

        def speed_up(model: CausalLM) -> None:
            nonlocal in_fp8
            rows = min(
                recipe.loop.batch_rows // team.layout.data, recipe.loop.micro_batch_rows or recipe.loop.batch_rows
            )
            in_fp8 = pick_fp8(
                model, recipe.loop.fp8, team, dtype, compiled=compiled, remat=remat, seq_len=recipe.seq_len,
                tokens=max(1, rows) * recipe.seq_len // team.layout.context,
            )  # fmt: skip
            if team.is_alone and dtype != torch.float32:  # FSDP casts for itself
                copies.append(ComputeCopies(model, dtype))
            if compiled:
                compile_blocks(model, remat, dynamic=row_tokens is None)
            else:
                rematerialise(model, remat)

        model = build_sharded(
            start,
            tokenizer,
            team,
            recipe.loop.seed,
            dtype,
            reshard_after_forward=reshard,
            virtual_stages=recipe.parallel.virtual_stages,
            before_sharding=speed_up,
        )
    model.set_compute_dtype(dtype)
    return Prepared(
        model=model,
        dtype=dtype,
        copies=copies[0] if copies else None,
        compiled=compiled,
        remat=remat,
        fp8=in_fp8,
        reshard_after_forward=reshard,
        row_tokens=row_tokens,
    )


def forced_operations(ops: OpsConfig) -> dict[str, str]:
    """What a recipe forces, for `dispatch.forced`."""
    return {field.name: choice for field in dataclasses.fields(ops) if (choice := getattr(ops, field.name))}


def picks_compilation(cfg: LoopConfig, device: torch.device) -> bool:
    """Whether blocks are compiled on `device`, inside `dispatch.forced`. Raises ValueError for "on" where it fails."""
    if cfg.compile == "auto":
        if device.type != "cuda" or not can_compile(device):
            return False
        if wrong := refused_choices():
            log.info("blocks are not compiled: ops.%s is forced", ", ops.".join(wrong))
        return not wrong
    if cfg.compile == "on" and not can_compile(device):
        missing = "a C++ compiler (g++, or what CXX names)" if device.type == "cpu" else "Triton and a GPU it knows"
        raise ValueError(f"loop.compile=on needs {missing}; install it, or set loop.compile=off")
    return cfg.compile == "on"


def run_precision(cfg: LoopConfig, team: Team, run: Path) -> torch.dtype:
    """Dtype of the activations: what the recipe says, or what a run on "auto" has begun with, or what is best here."""
    dtype = pick_dtype(cfg.precision, team.device) if team.is_main else None
    checkpoints = Checkpoints(run / "checkpoints", 1, False)
    if team.is_main and cfg.precision == "auto":
        for step in reversed(checkpoints.steps()):
            # Whatever damage raises here: loading goes back to the checkpoint before and says so.
            with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
                dtype = getattr(torch, checkpoints.read_state(step).precision)
                break
    dtype = team.agree(dtype)
    assert dtype is not None
    return dtype
