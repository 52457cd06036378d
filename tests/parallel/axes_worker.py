"""What a spawned process of test_axes.py does: the cases of its world size, on this rank's part of model and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops import cross_entropy
from qwench.ops.attention import AttnMeta
from qwench.ops.attention_train import Stream
from qwench.parallel.axes import apply_tensor, sum_gradients
from qwench.parallel.context import cut, restore
from qwench.parallel.vocabulary import token_losses

TIED = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, tie_word_embeddings=True,
)  # fmt: skip
UNTIED = replace(TIED, tie_word_embeddings=False)
WINDOWED = replace(UNTIED, use_sliding_window=True, sliding_window=5, max_window_layers=1, qkv_bias=False)


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """Lengths of the documents of every row of every micro-batch."""
    dtype: torch.dtype = torch.float32
    z_loss: float = 0.0
    compiled: bool = False
    """Every block is traced as one graph, exchanges and all."""


CASES = {
    "one document a row": Case(TIED, (((32,), (32,)),)),
    "documents across chunks": Case(TIED, (((5, 19, 1, 23),), ((16,), (9, 7), (1, 14, 1)))),
    "more documents than chunks": Case(UNTIED, (((2, 3, 1, 4, 2, 5, 1, 6), (3, 5, 2, 2, 2, 1, 1, 8)),)),
    "windows": Case(WINDOWED, (((5, 19, 1, 23),), ((32,),))),
    "z-loss": Case(UNTIED, (((5, 19, 1, 23),),), z_loss=0.01),
    "bf16": Case(UNTIED, (((5, 19, 1, 23),), ((32,),)), dtype=torch.bfloat16),
    "compiled": Case(TIED, (((5, 19, 1, 23),), ((16,), (9, 7), (1, 14, 1))), compiled=True),
}
MANY = "documents across chunks"
LAYOUTS = {2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4), (4, 1)]}
"""World size -> (context, tensor)."""
UNDER_FSDP = ("data", "context")
"""What two groups of two tensor-parallel ranks, which FSDP shards weights over, divide: micro-batches or tokens."""


def runs(name: str, sizes: tuple[int, int]) -> bool:
    """Tracing takes long: with two processes only."""
    return not CASES[name].compiled or sizes in LAYOUTS[2]


def build(case: Case) -> CausalLM:
    """The whole model, with weights large enough that all of them matter."""
    model = CausalLM(case.config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    model.set_compute_dtype(case.dtype)
    return model


def streams(case: Case) -> Iterator[tuple[list[int], list[int], dict[str, torch.Tensor]]]:
    """(document lengths, row lengths, tokens and so on) of every micro-batch."""
    generator = torch.Generator().manual_seed(6)
    for rows in case.micro_batches:
        seq_lens = [length for row in rows for length in row]
        num_tokens = sum(seq_lens)
        tokens, targets = torch.randint(case.config.vocab_size, (2, num_tokens), generator=generator)
        weights = torch.rand(num_tokens, generator=generator)
        weights[torch.arange(num_tokens) % 3 == 1] = 0.0
        positions = torch.cat([torch.arange(length) for length in seq_lens])
        stream = {"tokens": tokens, "positions": positions, "targets": targets, "weights": weights}
        yield seq_lens, [sum(row) for row in rows], stream


def one_process(case: Case) -> tuple[float, list[torch.Tensor], dict[str, torch.Tensor]]:
    """(loss, losses of the tokens of every micro-batch, gradients by name) of the whole model."""
    model, total, by_token = build(case), 0.0, []
    for seq_lens, _, stream in streams(case):
        hidden = model(stream["tokens"], stream["positions"], AttnMeta.packed(seq_lens))
        loss, losses = token_losses(model, hidden, stream["targets"], stream["weights"], case.z_loss)
        loss.backward()
        total += float(loss.detach())
        by_token.append(losses)
    return total, by_token, gradients(model)


def gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        out[name] = parameter.grad
    return out


def one_rank(case: Case, context: dist.ProcessGroup, tensor: dist.ProcessGroup) -> dict[str, Any]:
    """The same of this rank's part, with gradients and losses summed over the ranks as a training step does."""
    model = build(case)
    apply_tensor(model, tensor)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if case.compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    total, by_token = torch.zeros(()), []
    for seq_lens, row_lens, stream in streams(case):
        part = cut(seq_lens, context.rank(), context.size(), row_lens)
        index = torch.from_numpy(part.index)
        mine = {name: values[index] for name, values in stream.items()}
        meta = part.meta(context)
        hidden = model(mine["tokens"], mine["positions"], Stream.of(meta) if case.compiled else meta)
        assert hidden.shape == (len(index) // tensor.size(), case.config.hidden_size)
        loss, losses = token_losses(model, hidden, mine["targets"], mine["weights"], case.z_loss)
        loss.backward()
        total += loss.detach()
        by_token.append(restore(losses, seq_lens, context, row_lens))
    sum_gradients(model, tensor, context)
    dist.all_reduce(total, group=context)
    return {"loss": float(total), "by_token": by_token, "gradients": gradients(model), "parameters": parameters}


def under_fsdp(case: Case, axis: str, others: dist.ProcessGroup, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """This rank's part, by the plan, of every gradient, when FSDP shards the parameters over `others` besides."""
    tensor, model = mesh.get_group("tensor"), build(case)
    apply_tensor(model, tensor)
    for module in [*model.model.layers, model]:
        unit = fully_shard(module, mesh=mesh["shard"], reshard_after_forward=module is not model)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    for number, (seq_lens, row_lens, stream) in enumerate(streams(case)):
        mine, meta = dict(stream), AttnMeta.packed(seq_lens)
        if axis == "context":
            part = cut(seq_lens, others.rank(), others.size(), row_lens)
            mine, meta = {name: values[part.index] for name, values in stream.items()}, part.meta(others)
        elif number % 2 != others.rank():
            mine["weights"] = torch.zeros_like(mine["weights"])
        hidden = model(mine["tokens"], mine["positions"], meta)
        token_losses(model, hidden, mine["targets"], mine["weights"])[0].backward()
    sum_gradients(model, tensor)
    out: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        out[name] = parameter.grad.full_tensor()
    return out


def refusals(tensor: dist.ProcessGroup) -> list[str]:
    """What is said to tokens, models and calls that do not fit. No rank waits for another one here."""
    model, odd = build(CASES["z-loss"]), Case(replace(TIED, vocab_size=95), ())
    tokens = torch.zeros(15, dtype=torch.int64)
    said: list[str] = []
    for call in (
        lambda: apply_tensor(build(odd), tensor),
        lambda: apply_tensor(model, tensor),
        lambda: apply_tensor(model, tensor),
        lambda: model(tokens, tokens, AttnMeta.packed([15])),
        lambda: model.head(torch.zeros(4, 32)),
    ):
        try:
            call()
            said.append("done")
        except ValueError as error:
            said.append(str(error))
    return said


def work(rank: int, world: int, directory: Path) -> None:
    """Entry of a process: writes {(context, tensor): {case: results}} and refusals to directory/rank.pt."""
    torch.set_num_threads(1)
    cross_entropy.CHUNK_LOGITS = 700  # so that the loss takes several chunks
    store = dist.FileStore(str(directory / "store"), world)
    # Those who wait for a rank that has failed fail as well, soon.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    results: dict[Any, Any] = {}
    for sizes in LAYOUTS[world]:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("context", "tensor"))
        groups = mesh.get_group("context"), mesh.get_group("tensor")
        names = [name for name in CASES if runs(name, sizes)]
        results[sizes] = {name: one_rank(CASES[name], *groups) for name in names}
        if sizes == (2, 2):
            mesh, case = init_device_mesh("cpu", sizes, mesh_dim_names=("shard", "tensor")), CASES[MANY]
            results["fsdp"] = {axis: under_fsdp(case, axis, mesh.get_group("shard"), mesh) for axis in UNDER_FSDP}
        if sizes == (1, 2):
            results["refusals"] = refusals(groups[1])
    torch.save(results, directory / f"{rank}.pt")
    # A rank that leaves closes its connections; until then others may be at work still.
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world)])
    dist.destroy_process_group()
