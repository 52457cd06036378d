"""Layouts: which sizes fit together, where a rank stands, and what is refused before any GPU work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwench.model.config import ModelConfig
from qwench.parallel.launch import Place, job_size, place_in_environment
from qwench.parallel.layout import Layout, Team, check_model, plan_layout

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("world", "sizes", "want"),
    [
        (1, {}, Layout()),
        (8, {}, Layout(shard=8)),
        (8, {"replicate": 2, "tensor": 2}, Layout(replicate=2, shard=2, tensor=2)),
        (4, {"replicate": 4, "shard": 1}, Layout(replicate=4)),
        (64, {"pipeline": 2, "context": 2, "shard": 16}, Layout(pipeline=2, shard=16, context=2)),
    ],
)
def test_what_fits(world: int, sizes: dict[str, int], want: Layout) -> None:
    assert plan_layout(world, **sizes) == want
    assert want.world == world


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (4, {"replicate": 3}, r"replicate 3 makes groups of 3 processes, and 4 processes do not divide"),
        (4, {"shard": 2}, r"shard 2 needs 2 processes, but there are 4; start gpus=2"),
        (1, {"tensor": 2, "shard": 1}, r"tensor 2, shard 1 needs 2 processes, but there is 1; start gpus=2"),
        (4, {"tensor": 0}, r"parallel\.tensor is 0; give a positive number$"),
        (4, {"shard": -2}, r"parallel\.shard is -2; give a positive number, or -1"),
        (4, {"replicate": -1}, r"parallel\.replicate is -1; give a positive number$"),
    ],
)
def test_what_does_not_fit(world: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layout(world, **sizes)


def test_the_last_axis_runs_fastest() -> None:
    layout = Layout(replicate=2, shard=3, tensor=2)
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert [place["tensor"] for place in places] == [0, 1] * 6
    assert [place["shard"] for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place["replicate"] for place in places] == [0] * 6 + [1] * 6
    teams = [Team(layout=layout, rank=rank, device=torch.device("cpu")) for rank in range(layout.world)]
    assert [team.data_rank for team in teams] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert sum(team.leads_data for team in teams) == layout.data


CONFIG = ModelConfig(
    vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "rows", "seq_len", "message"),
    [
        (Layout(shard=4), 6, 64, r"batch_rows is 6, which does not divide over 4 data-parallel ranks .*example 8"),
        (Layout(replicate=2, shard=4), 3, 64, r"over 8 data-parallel ranks \(replicate 2 x shard 4\).* example 8"),
        (Layout(tensor=4), 4, 64, r"parallel\.tensor is 4: .*num_key_value_heads 2.* these work: 1, 2"),
        (Layout(context=2), 4, 66, r"seq_len is 66, .* 4 pieces .* multiple of 4"),
        (Layout(pipeline=3), 4, 64, r"parallel\.pipeline is 3, but the model has only 2 layers"),
    ],
)
def test_what_the_model_does_not_bear(layout: Layout, rows: int, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(layout, CONFIG, seq_len=seq_len, batch_rows=rows)
    fine = dataclasses.replace(layout, tensor=min(layout.tensor, 2), pipeline=min(layout.pipeline, 2))
    check_model(fine, CONFIG, seq_len=64, batch_rows=8)


def test_the_vocabulary_is_cut_too() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor is 2: .*vocab_size 511 .* these work: 1$"):
        check_model(Layout(tensor=2), dataclasses.replace(CONFIG, vocab_size=511), seq_len=64, batch_rows=8)


def test_more_gpus_than_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert job_size(2, on_gpu=True) == 2
    assert job_size(4, on_gpu=False) == 4
    with pytest.raises(ValueError, match=r"4 processes want a GPU each, but this machine has 2; .* loop\.device=cpu"):
        job_size(4, on_gpu=True)
    with pytest.raises(ValueError, match="gpus is 0"):
        job_size(0, on_gpu=True)


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert place_in_environment() == Place()
    values = ("5", "8", "1", "4", "host", "29500")
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    assert place_in_environment() == Place(5, 8, 1, 4)
    assert job_size(1, on_gpu=False) == 8
    assert job_size(4, on_gpu=False) == 8
    with pytest.raises(ValueError, match="gpus=2, but torchrun started 4 processes on this host"):
        job_size(2, on_gpu=False)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match="impossible; start the job with torchrun"):
        place_in_environment()
    monkeypatch.setenv("RANK", "zero")
    with pytest.raises(ValueError, match="is no number"):
        place_in_environment()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="but not MASTER_ADDR"):
        place_in_environment()
