"""The memory plan against tensors: weights, gradients and states of a rank to the byte, a step's peak within a margin.

Compiled blocks allocate where a CPU's Python does not see it; what they keep is compared in test_compile.py, and a
GPU's peak in benchmarks/memory_plan.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from live_memory import LiveMemory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.init import init_weights
from qwench.model.presets import preset
from qwench.ops.attention import AttnMeta
from qwench.parallel.data import Exchanges, apply_data_parallel, prepare_exchanges
from qwench.parallel.layout import AXES, Layout, Team
from qwench.train.batch import Batch
from qwench.train.compile import Remat, kept_bytes_per_token, rematerialise
from qwench.train.config import OptimConfig
from qwench.train.copies import ComputeCopies
from qwench.train.loss import next_token_loss
from qwench.train.memory import GIB, MemoryPlan, Workload, choose_remat, memory_plan, moments, usable_bytes
from qwench.train.optim import build_optimizer
from qwench.train.start import hand_to_axes

SHAPE = ModelConfig(
    vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=16, qkv_bias=True,
)  # fmt: skip
SHORT = 16
"""Tokens of a sequence: attention on a CPU keeps all probabilities, which the plan knows nothing of."""


def batch(tokens: int) -> Batch:
    ids = torch.randint(1024, (tokens,), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens_T=ids,
        targets_T=ids,
        positions_T=torch.arange(SHORT).repeat(tokens // SHORT),
        loss_weights_T=torch.ones(tokens) / tokens,
        meta=AttnMeta.packed([SHORT] * (tokens // SHORT)),
    )


def step_peak(model: CausalLM, work: Workload, optim: OptimConfig, copies: ComputeCopies | None = None) -> int:
    """Highest memory of a second step, whose optimiser has its states."""
    optimizer = build_optimizer(model, optim)
    exchanges = Exchanges(keep_whole=work.accumulate == "whole", reshard_after_forward=work.reshard_after_forward)
    with LiveMemory() as memory:
        for parameter in [*model.parameters(), *(copies._copies if copies else [])]:
            memory.add(parameter)
        for _ in range(2):
            memory.peak = 0
            optimizer.zero_grad()
            for number in range(work.micro_batches):
                last = number == work.micro_batches - 1
                prepare_exchanges(model, last, exchanges)
                next_token_loss(model, batch(work.tokens)).backward()
            optimizer.step()
    held = sum(_local(p).nbytes for p in model.parameters())
    states = sum(_local(s).nbytes for p in model.parameters() for s in optimizer.state(p).values() if s.ndim)
    grads = sum(_local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
    update = next(moment for moment in moments(work) if moment.moment == "update")
    assert (update.weights, update.optimizer, update.gradients) == (held, states, grads)
    return memory.peak


def _local(x: torch.Tensor) -> torch.Tensor:
    return getattr(x, "_local_tensor", x)


@pytest.mark.parametrize(
    ("tied", "bf16", "micro_batches", "remat", "tokens", "kind"),
    [
        (True, True, 2, "elementwise", 2048, "adamw"),
        (False, True, 1, "none", 2048, "adamw"),
        (False, False, 2, "full", 1024, "adamw"),
        (True, False, 1, "mlp", 64, "muon"),
    ],
)
def test_peak_of_one_process(tied: bool, bf16: bool, micro_batches: int, remat: Remat, tokens: int, kind: str) -> None:
    config = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    work = Workload(
        config=config, tokens=tokens, micro_batches=micro_batches, itemsize=2 if bf16 else 4, remat=remat,
        compiled=False, on_gpu=False, optimizer=kind,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    model = CausalLM(config, dtype=torch.float32)
    init_weights(model, 0)
    model.set_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    copies = ComputeCopies(model, torch.bfloat16) if bf16 else None
    rematerialise(model, remat)
    peak = step_peak(model, work, OptimConfig(kind=kind), copies)  # pyright: ignore[reportArgumentType]
    assert memory_plan(work).total == pytest.approx(peak, rel=0.06)


@contextmanager
def team_of(layout: Layout) -> Iterator[Team]:
    """Rank 0 of ranks that exist in name only: their exchanges take memory and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    try:
        mesh = init_device_mesh("cpu", layout.sizes, mesh_dim_names=AXES)
        sharding = mesh["replicate", "shard"]
        yield Team(layout=layout, rank=0, device=torch.device("cpu"), mesh=mesh, data_mesh=sharding)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "micro_batches", "accumulate", "tied"),
    [
        (Layout(shard=4), 1, "whole", False),
        (Layout(shard=4), 2, "whole", False),
        (Layout(shard=4), 2, "shards", True),
        (Layout(replicate=2, shard=2), 2, "shards", True),
        (Layout(tensor=2), 1, "whole", False),
        (Layout(shard=2, tensor=2), 2, "shards", True),
    ],
)
def test_share_and_peak_of_a_rank(layout: Layout, micro_batches: int, accumulate: str, tied: bool) -> None:
    """What a rank holds is exact; its peak may be planned too high, since FSDP's exchanges need not all overlap."""
    config = dataclasses.replace(SHAPE, tie_word_embeddings=tied, vocab_size=1024)
    work = Workload(
        config=config, tokens=512, layout=layout, micro_batches=micro_batches, remat="full", compiled=False,
        on_gpu=False, accumulate=accumulate,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    with team_of(layout) as team:
        model = hand_to_axes(CausalLM(config, device="meta", dtype=torch.float32), team)
        rematerialise(model, "full")
        apply_data_parallel(model, team, torch.bfloat16, before_unit=_fill)
        model.set_compute_dtype(torch.bfloat16)
        peak = step_peak(model, work, OptimConfig())
    assert peak * 0.95 < memory_plan(work).total < peak * 1.45


def _fill(unit: nn.Module, prefix: str) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in unit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made.setdefault(parameter, nn.Parameter(torch.full(parameter.shape, 0.01)))
                setattr(module, name, made[parameter])


# ------------------------------------------------------------------------------------------------------- by formulas
def plan(name: str = "qwen2.5-7b", **given) -> MemoryPlan:
    return memory_plan(Workload(config=preset(name), **{"tokens": 8192, "remat": "mlp", **given}))


def test_every_axis_saves_what_it_divides() -> None:
    whole = plan(micro_batches=2)
    for axis in ("shard", "tensor", "pipeline"):
        cut = plan(layout=Layout(**{axis: 4}), micro_batches=2, accumulate="shards")
        assert cut.weights < 0.3 * whole.weights or axis == "pipeline"
        assert cut.total < whole.total
    assert plan(layout=Layout(context=4)).activations < 0.3 * whole.activations
    assert plan(layout=Layout(shard=8)).weights == -(-whole.weights // 8)
    replicated = plan(layout=Layout(replicate=8))
    assert replicated.weights == whole.weights
    assert replicated.copies == 0, "FSDP casts for itself"
    states = [plan(optimizer=kind).optimizer for kind in ("adamw", "adamw-bf16", "adamw-8bit", "muon")]
    assert states[0] == 2 * states[1]
    assert states[1] == pytest.approx(2 * states[2], rel=0.01)
    assert states[1] < states[3] < states[0]


def test_pipeline_keeps_as_many_micro_batches_as_are_in_flight() -> None:
    work = Workload(config=preset("qwen2.5-7b"), tokens=4096, layout=Layout(pipeline=4), micro_batches=16, remat="full")
    kept = [next(iter(moments(work, rank))).activations for rank in range(4)]
    assert kept == sorted(kept, reverse=True)
    per_layer = kept_bytes_per_token(work.config, "full") // work.config.num_hidden_layers * 4096
    # Layers are dealt so that the last stage, with the output matrix, has fewer.
    assert kept[0] % (4 * per_layer) == 0
    assert kept[3] < kept[0] / 4


def test_remat_by_what_fits() -> None:
    work = Workload(config=preset("qwen2.5-1.5b"), tokens=32_768)
    chosen = [choose_remat(work, usable_bytes(size * GIB)) for size in (141, 60, 30, 8)]
    assert chosen == ["none", "mlp", "full", "full"]
    totals = [plan(remat=kind).activations for kind in ("none", "elementwise", "mlp", "attention", "full")]
    assert totals == sorted(totals, reverse=True)
    assert usable_bytes(80 * GIB, 8) < usable_bytes(80 * GIB, 1) < 80 * GIB
    with pytest.raises(ValueError, match="does not split over 3 devices"):
        plan(layout=Layout(tensor=3))
