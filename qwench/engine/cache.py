"""The key/value cache's tensors, and how many blocks fit into the memory that is really free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwench.engine.config import EngineConfig
from qwench.model.config import ModelConfig
from qwench.ops.attention import KVCache

CPU_LIMIT_BYTES = 4 * 2**30
"""On a CPU the cache shares the memory with everything else: no more than this unless `cache_tokens` says so."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Of one block, keys and values of all layers."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_size * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> list[KVCache]:
        """Keys and values of each layer, all zero. On a CPU, memory is taken only as blocks are written."""
        shape = (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        if device.type == "cpu":  # numpy gets zeroed pages from the system, where torch would write zeros
            whole = torch.from_numpy(np.zeros(self.block_bytes * num_blocks, np.uint8)).view(self.dtype).view(shape)
        else:
            raw = torch.uint8 if self.dtype.itemsize == 1 else self.dtype
            whole = torch.zeros(shape, dtype=raw, device=device).view(self.dtype)
        return [(layer[0], layer[1]) for layer in whole]


def cache_shape(
    model: ModelConfig, config: EngineConfig, dtype: torch.dtype, kv_heads: int | None = None
) -> CacheShape:
    kept = torch.float8_e4m3fn if config.cache_dtype == "fp8" else dtype
    return CacheShape(
        model.num_hidden_layers, config.block_size, kv_heads or model.num_key_value_heads, model.d_head, kept
    )


def num_blocks_that_fit(
    shapes: list[CacheShape], config: EngineConfig, max_tokens: int, device: torch.device, rehearse: Callable[[], None]
) -> int:
    """Blocks, block 0 included, for `max_tokens` at most. `shapes` share one numbering (model and draft model).

    `rehearse` runs the largest step that the engine will ever run, so that its memory is measured and not guessed.
    Raises ValueError when not even one block fits.
    """
    block_bytes = sum(shape.block_bytes for shape in shapes)
    size = shapes[0].block_size
    if config.cache_tokens is not None:
        return 1 + -(-config.cache_tokens // size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        rehearse()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        foreign = total - free - torch.cuda.memory_reserved(device)
        room = int(total * config.memory_fraction) - foreign - peak
    else:
        room = min(int(config.memory_fraction * available_bytes() / 2), CPU_LIMIT_BYTES) // config.tensor_parallel
    fitting = room // block_bytes
    if fitting < 2:
        raise ValueError(
            f"{max(room, 0) / 2**30:.2f} GiB are left for the key/value cache, which is not enough; free memory on "
            "the device, or raise memory_fraction, or lower max_step_tokens or max_seqs"
        )
    return min(fitting, 1 + -(-max_tokens // size))


def long_pass_tokens(model: ModelConfig, device: torch.device) -> int:
    """Tokens of a forward pass that takes 6 % of a GPU's memory, a power of two up to 65,536. An estimate, by which a
    pass is chosen; what the cache may have is measured with that pass."""
    bytes_per_token = 2 * (3 * model.intermediate_size + 6 * model.hidden_size)
    tokens = int(0.06 * torch.cuda.get_device_properties(device).total_memory) // bytes_per_token
    return min(1 << max(tokens.bit_length() - 1, 0), 65536)


def available_bytes() -> int:
    """Main memory that new work can have without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cache_bytes(layers: list[KVCache]) -> int:
    return sum(_bytes(keys) + _bytes(values) for keys, values in layers)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
