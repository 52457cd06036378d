"""What a spawned process of test_pipeline.py does: steps of every layout, on this rank's stages and rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwench.data.packing import PackedRow
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.parallel.axes import apply_tensor, sum_gradients
from qwench.parallel.blocks import parameter_blocks
from qwench.parallel.data import Exchanges, apply_data_parallel, no_gradients
from qwench.parallel.layout import Layout, Team
from qwench.parallel.pipeline import Pipeline
from qwench.parallel.stages import StagedLM, deal_layers, stages_of_rank
from qwench.train.batch import Batch, make_batch
from qwench.train.loss import next_token_losses
from qwench.train.optim import squared_gradient_norm

WORLD = 4
TIED = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
UNTIED = replace(TIED, tie_word_embeddings=False)
NUM_ROWS = 16


@dataclass(frozen=True)
class Case:
    layout: Layout
    virtual_stages: int = 1
    config: ModelConfig = TIED
    rows: int = 2
    """Of a micro-batch."""
    dtype: torch.dtype = torch.float32
    further: dict[str, bool] = field(default_factory=dict)
    """Of `Exchanges`."""


CASES = {
    "pipeline 4": Case(Layout(pipeline=4)),
    "fewer micro-batches than stages": Case(Layout(pipeline=4), config=UNTIED, rows=6),
    "pipeline 2 x shard 2, interleaved": Case(Layout(pipeline=2, shard=2), 2),
    "gradients scattered, weights gathered twice": Case(
        Layout(pipeline=2, shard=2), 2, further={"keep_whole": False, "reshard_after_forward": True}
    ),
    "pipeline 2 x replicate 2": Case(Layout(pipeline=2, replicate=2), config=UNTIED, further={"keep_whole": False}),
    "pipeline 2 x tensor 2, interleaved": Case(Layout(pipeline=2, tensor=2), 2),
    "pipeline 2 x context 2": Case(Layout(pipeline=2, context=2)),
    "bf16": Case(Layout(pipeline=2, tensor=2), config=UNTIED, dtype=torch.bfloat16),
}


def build(case: Case) -> CausalLM:
    """The whole model, with weights large enough that all of them matter."""
    model = CausalLM(case.config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    model.set_compute_dtype(case.dtype)
    return model


def rows(vocab_size: int) -> list[PackedRow]:
    """Rows of one to three documents, of uneven lengths and weights."""
    random = np.random.default_rng(6)
    out: list[PackedRow] = []
    for _ in range(NUM_ROWS):
        seq_lens = random.integers(1, 60, random.integers(1, 4))
        tokens, targets = random.integers(0, vocab_size, (2, seq_lens.sum()))
        weights = random.random(seq_lens.sum()) * (random.random(seq_lens.sum()) < 0.7)
        row = PackedRow(
            tokens=tokens.astype(np.int32),
            targets=targets.astype(np.int32),
            loss_weights=weights.astype(np.float32),
            seq_lens=seq_lens.astype(np.int32),
        )
        out.append(row)
    return out


def one_process(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all rows."""
    model = build(case)
    batch = make_batch(rows(case.config.vocab_size), torch.device("cpu"))
    loss = loss_of(model, batch)
    loss.backward()
    return float(loss.detach()), {name: gradient(parameter) for name, parameter in model.named_parameters()}


def loss_of(model: CausalLM, batch: Batch) -> Tensor:
    return next_token_losses(model, batch)[0]


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def one_rank(case: Case) -> dict[str, Any]:
    """A step and a validation: this rank's blocks of the gradients, its share of the losses and of the squared norm."""
    team = Team.join(case.layout, torch.device("cpu"))
    model = build(case)
    if case.layout.tensor > 1:
        apply_tensor(model, team.group("tensor"))
    counts = deal_layers(case.config, case.layout.pipeline * case.virtual_stages)
    model = StagedLM(model, stages_of_rank(counts, team.place("pipeline"), case.layout.pipeline))
    reshard = case.further.get("reshard_after_forward", False)
    apply_data_parallel(model, team, case.dtype, reshard_after_forward=reshard)
    pipeline = Pipeline(model, team, Exchanges(**{"reshard_after_forward": False} | case.further))
    mine = rows(case.config.vocab_size)[team.data_rank :: case.layout.data]
    batches = padded([mine[start : start + case.rows] for start in range(0, len(mine), case.rows)], team)
    losses: list[Tensor] = []

    def keep(batch: Batch) -> Tensor:
        losses.append(loss_of(model, batch))
        return losses[-1]

    for _ in range(2):  # the second step begins where FSDP ended the first
        model.zero_grad()
        losses.clear()
        pipeline.train(len(batches), batches.__getitem__, keep)
        if case.layout.tensor > 1:
            sum_gradients(model, team.group("tensor"))
    trained = [float(loss.detach()) for loss in losses]
    losses.clear()
    with no_gradients(model):
        pipeline.validate(3, batches.__getitem__, keep)
    blocks = [
        (block.name, block.start, block.values.clone())
        for name, parameter in model.named_parameters()
        for block in parameter_blocks(name, parameter, gradient(parameter), case.config, team, once=True)
    ]
    embeddings = {name: gradient(p) for name, p in model.named_parameters() if "embed" in name}
    return {
        "losses": trained,
        "validated": [float(loss) for loss in losses],
        "counts": team.counts_tokens,
        "blocks": blocks,
        "tied": [value.full_tensor() for value in embeddings.values() if isinstance(value, DTensor)],
        "squares": float(squared_gradient_norm(model, team)),
        "layers": [name for name, _ in model.model.layers.named_children()],
    }


def padded(parts: Sequence[Sequence[PackedRow]], team: Team) -> list[Batch]:
    longest = max(sum(row.num_tokens for row in part) for part in parts)
    return [make_batch(part, team.device, team, num_tokens=longest) for part in parts]


def work(rank: int, directory: Path) -> None:
    """Entry of a process: writes {case: results} to directory/rank.pt."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD))
    store = dist.FileStore(str(directory / "store"), WORLD)
    # Those who wait for a rank that has failed fail as well, soon.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    torch.save({name: one_rank(case) for name, case in CASES.items()}, directory / f"{rank}.pt")
    # A rank that leaves closes its connections; until then others may be at work still.
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(WORLD)])
    dist.destroy_process_group()
