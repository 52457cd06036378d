"""Pipelines of 4 processes, alone and with every other axis: loss and every gradient are one process's."""

from __future__ import annotations

import math
import multiprocessing
from typing import Any

import pytest
import torch
from pipeline_worker import CASES, WORLD, Case, one_process, work

pytestmark = [pytest.mark.multi, pytest.mark.usefixtures("warm_processes")]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-2}
"""Relative, in the 2-norm of a parameter's gradient; bf16 rounds the sums over ranks in another order, five times."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    directory = tmp_path_factory.mktemp("pipeline")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, directory)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORLD
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, results: list[dict[str, Any]]) -> None:
    case, by_rank = CASES[name], [rank[name] for rank in results]
    tolerance = TOLERANCE[case.dtype]
    loss, wanted = one_process(case)
    assert sum(sum(rank["losses"]) for rank in by_rank if rank["counts"]) == pytest.approx(loss, rel=tolerance)
    for key, found in assembled(case, by_rank, wanted).items():
        error = float((found - wanted[key].double()).norm() / wanted[key].double().norm())
        assert error < tolerance, f"{key}: {error:.2g}"
    norm = math.sqrt(sum(rank["squares"] for rank in by_rank))
    squares = sum(float(value.double().square().sum()) for value in wanted.values())
    assert norm == pytest.approx(math.sqrt(squares), rel=tolerance)


def assembled(case: Case, by_rank: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole gradients, fp64, of which every element is written by one rank."""
    whole = {name: torch.full(value.shape, math.nan, dtype=torch.float64) for name, value in wanted.items()}
    for rank in by_rank:
        for name, start, values in rank["blocks"]:
            place = whole[name][tuple(slice(at, at + n) for at, n in zip(start, values.shape, strict=True))]
            assert torch.isnan(place).all(), f"{name} is written twice"
            place.copy_(values)
    return whole


@pytest.mark.parametrize("name", CASES)
def test_stages_and_validation(name: str, results: list[dict[str, Any]]) -> None:
    case, by_rank = CASES[name], [rank[name] for rank in results]
    assert {layer for rank in by_rank for layer in rank["layers"]} == {str(n) for n in range(5)}
    for rank in by_rank:
        assert bool(rank["losses"]) == (rank["layers"][-1] == "4"), "the last stage alone computes losses"
        assert rank["validated"] == pytest.approx(rank["losses"][:3], rel=TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.config.tie_word_embeddings])
def test_both_copies_of_tied_embeddings_get_one_gradient(name: str, results: list[dict[str, Any]]) -> None:
    """The same bits, or they would drift apart."""
    copies = [copy for rank in results for copy in rank[name]["tied"]]
    cut = CASES[name].layout.tensor
    assert len(copies) == WORLD // CASES[name].layout.pipeline * 2
    for first in range(cut):
        assert all(torch.equal(copy, copies[first]) for copy in copies[first::cut])
