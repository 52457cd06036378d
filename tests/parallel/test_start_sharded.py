"""Building a rank's share of a model: how much of the whole it holds meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from qwench.model.config import ModelConfig
from qwench.parallel.layout import Layout, Team
from qwench.train import start
from qwench.train.config import StartConfig

LAYERS, UNIT = 5, 7
"""Parameters of a block are one unit of FSDP."""


def test_one_whole_unit_at_a_time(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer) -> None:
    """When a unit's parameters are filled, the whole ones of the units before have been freed."""
    whole: list[StorageWeakRef] = []
    most = 0
    init_parameter = start.init_parameter

    def watched(name: str, values: torch.Tensor, *further) -> None:
        nonlocal most
        whole.append(StorageWeakRef(values.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in whole))
        init_parameter(name, values, *further)

    monkeypatch.setattr(start, "init_parameter", watched)
    shape = ModelConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    cpu = torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        team = Team.join(Layout(), cpu)
        model = start.build_sharded(StartConfig(config=shape), tiny_tokenizer, team, 0, torch.float32)
    finally:
        dist.destroy_process_group()
    assert len(whole) == LAYERS * UNIT + 2 == len(list(model.parameters()))
    assert most == UNIT
