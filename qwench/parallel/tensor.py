"""Tensor parallelism for inference, applied from outside to a built decoder: shards by the plan, and sums over ranks.

    group = connect(rank, world, store, timeout_s, device)
    model = load_shard(path, device, dtype, rank, world)
    join_group(model, group)

After that, `model(...)` on all ranks at the same time, with the same inputs, gives the same hidden states on all of
them. There is no gradient through the sums. A group is a communicator of its own: nothing here touches the process-wide
groups of `torch.distributed`, so several engines can live in one process beside a training run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwench.model.checkpoint import Checkpoint, open_checkpoint
from qwench.model.decoder import Attention, CausalLM, Linear, RMSNorm
from qwench.model.weights import parse_dtype
from qwench.ops.linear import linear
from qwench.parallel.plan import local_config, shard, spans, split_of

log = logging.getLogger("qwench.parallel")

READ_BYTES = 32 << 20
"""Rows that are read before their columns are picked, at a time."""


class Group:
    """Ranks that sum tensors. All of them must call `sum_` in the same order with the same shapes."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        self._backend, self._on_gpu = backend, device.type == "cuda"
        self._options = dist.AllreduceOptions()
        self._options.asyncOp = False  # NCCL: on the caller's stream, where a recorded step can hold it

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, bit for bit the same on each. `tensor` is contiguous.

        Raises RuntimeError on a CPU when a rank has gone or does not come; on a GPU see `abort`.
        """
        work = self._backend.allreduce([tensor], self._options)
        if work is not None:  # NCCL has nothing to wait for: the sum is in the stream's order
            work.wait()
        return tensor

    def abort(self, wait_s: float = 10.0) -> None:
        """Let go of the other ranks. Sums that wait on the GPU for one that has gone return, with undefined content."""
        if self._on_gpu:
            # Recorded steps keep a communicator alive, and the call may wait for them: not for longer than this.
            ending = threading.Thread(target=_quietly, args=(self._backend.abort,), name="qwench-abort", daemon=True)
            ending.start()
            ending.join(wait_s)


def _quietly(call: Any) -> None:
    try:
        call()
    except Exception:
        log.debug("aborting the communicator", exc_info=True)


def connect(rank: int, world: int, store: Path, timeout_s: float, device: torch.device) -> Group:
    """Meet the other ranks of this host: NCCL for a CUDA device, gloo for the CPU.

    `store` is a path in a directory that all ranks share, not yet there. Raises RuntimeError when somebody does not
    come in time.
    """
    meeting, patience = dist.FileStore(str(store), world), timedelta(seconds=timeout_s)
    meeting.set_timeout(patience)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        with _no_suicide():
            group = Group(dist.ProcessGroupNCCL(meeting, rank, world, options), device)
            group.sum_(torch.ones(1, device=device))  # the communicator is made by its first use, not while recording
            torch.cuda.synchronize(device)
    else:
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = patience
        group = Group(gloo(meeting, rank, world, options), device)
        group.sum_(torch.ones(1))
    return group


@contextlib.contextmanager
def _no_suicide() -> Iterator[None]:
    """By default torch ends the whole process, here the caller's, when a rank is late: who owns the group decides."""
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------------- the model
class SummedLinear(Linear):
    """A linear layer whose inputs are split over the ranks: the ranks' products are summed, then the residual added."""

    def __init__(self, local: Linear, group: Group) -> None:
        super().__init__(local.in_features, local.out_features, bias=False, device="meta")
        assert local.bias is None, "a bias would be added once a rank"
        self.weight = local.weight
        self._group = group

    def forward(
        self, input: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K / world] -> [T, N], the same on all ranks."""
        assert norm is None, "a norm needs all inputs"
        assert not swiglu
        y_TN = self._group.sum_(linear(input, self.weight).contiguous())
        # The residual is added after the sum: added by one rank before it, it would be rounded twice.
        return y_TN if residual is None else y_TN.add_(residual)


def load_shard(
    path: str | Path | Checkpoint, device: str | torch.device, dtype: str | torch.dtype, rank: int, world: int
) -> CausalLM:
    """What `rank` computes of a stored model, in evaluation mode; `join_group` adds the sums over the ranks.

    Only this rank's rows are read; of matrices that split by columns some megabytes at a time pass through the host.
    `model.config` is the whole model's. Raises ValueError for what cannot be loaded or does not split.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    checkpoint.checked_table()
    config = checkpoint.config
    model = CausalLM(local_config(config, world), device=device, dtype=parse_dtype(dtype))
    model.config = model.model.config = config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _read(checkpoint, name, parameter.detach(), rank, world)
    return model.eval()


def _read(checkpoint: Checkpoint, name: str, out: Tensor, rank: int, world: int) -> None:
    read, config, axis = checkpoint.reader(), checkpoint.config, split_of(name).axis
    if axis is None or world == 1:
        read(name, 0, out)
        return
    runs = spans(name, config, rank, world)
    if axis == 0:
        top = 0
        for start, stop in runs:
            read(name, start, out[top : top + stop - start])
            top += stop - start
        return
    width = checkpoint.table[name][0].shape[1]
    num_rows = max(1, READ_BYTES // (width * out.element_size()))
    for top in range(0, len(out), num_rows):
        part = out[top : top + num_rows]
        rows = torch.empty((len(part), width), dtype=out.dtype)
        read(name, top, rows)
        part.copy_(shard(name, rows, config, rank, world))


def join_group(model: CausalLM, group: Group) -> None:
    """Let the model of `load_shard` sum over the group where the plan splits by inputs."""
    for layer in model.model.layers:
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        for module, name in ((attention, "o_proj"), (mlp, "down_proj")):
            local = module.get_submodule(name)
            assert isinstance(local, Linear)
            setattr(module, name, SummedLinear(local, group))


def num_local_kv_heads(model: CausalLM) -> int:
    """Key/value heads that this rank's cache holds."""
    attention = model.model.layers[0].get_submodule("self_attn")
    assert isinstance(attention, Attention)
    return attention.heads[1]
