"""Linear layers on few tokens on a GPU: our kernels beside cuBLAS, and the rate of reading the weights.

    python benchmarks/linear_decode.py [--models 0.5B,7B] [--tokens 1,2,4,8] [--tune] [--out DIRECTORY]

Every call lies in a CUDA graph over rotating copies of the weight that together are larger than the L2, so weights come
from memory as they do in a model. Times are of one call, the median of several replays. "cuBLAS" is `F.linear` with
what stands around it as separate PyTorch kernels (norm, SwiGLU, residual), "product" `F.linear` alone, and "ours"
the fused operation. Kernels of one graph follow each other with dependent launch, as in a model.

`--tune` tries a grid of configurations for each number of tokens, prints the lines of the tables in
`qwench/ops/linear_configs.py` and writes DIRECTORY/linear_configs.json; it stops after --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results import write_result
from torch import Tensor

from qwench.ops import linear as linear_module
from qwench.ops.dispatch import forced
from qwench.ops.linear import linear
from qwench.ops.linear_configs import GemvConfig, MatmulConfig, gemv_config
from qwench.ops.linear_triton import gemv, matmul
from qwench.ops.norm import rms_norm

MODELS = {
    "0.5B": (896, 14, 2, 64, 4864, 151936),
    "1.5B": (1536, 12, 2, 128, 8960, 151936),
    "7B": (3584, 28, 4, 128, 18944, 152064),
}
"""Hidden size, heads, key/value heads, head size, feed-forward width, vocabulary rows."""
WORKING_SET_BYTES = 200e6
"""Of rotating copies: several times the L2."""


@dataclass(frozen=True)
class Matrix:
    model: str
    name: str
    num_rows: int
    size: int
    norm: bool = False
    bias: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def outputs(self) -> int:
        return self.num_rows // 2 if self.swiglu else self.num_rows

    @property
    def weight_bytes(self) -> int:
        return self.num_rows * self.size * 2


def matrices(models: list[str]) -> Iterator[Matrix]:
    for model in models:
        hidden, heads, kv_heads, size, width, vocabulary = MODELS[model]
        yield Matrix(model, "qkv", (heads + 2 * kv_heads) * size, hidden, norm=True, bias=True)
        yield Matrix(model, "o", hidden, heads * size, residual=True)
        yield Matrix(model, "gate_up", 2 * width, hidden, norm=True, swiglu=True)
        yield Matrix(model, "down", hidden, width, residual=True)
        yield Matrix(model, "head", vocabulary, hidden)


class Inputs:
    """Rotating weights of a matrix, and the other arguments."""

    def __init__(self, matrix: Matrix, only_shapes: bool = False) -> None:
        self.matrix = matrix
        copies = max(2, min(160, int(WORKING_SET_BYTES // matrix.weight_bytes) + 1))
        self.calls = max(24, copies)
        shape = (matrix.num_rows, matrix.size)
        if only_shapes:
            self.weights = [torch.empty(shape, device="cuda", dtype=torch.bfloat16)]
        else:
            self.weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
        self.bias = torch.randn(matrix.num_rows, device="cuda").bfloat16() if matrix.bias else None
        self.norm = (torch.ones(matrix.size, device="cuda").bfloat16(), 1e-6) if matrix.norm else None

    def x(self, num_tokens: int) -> Tensor:
        return torch.randn(num_tokens, self.matrix.size, device="cuda").bfloat16()

    def residual(self, num_tokens: int) -> Tensor | None:
        if not self.matrix.residual:
            return None
        return torch.randn(num_tokens, self.matrix.outputs, device="cuda").bfloat16()


def time_us(call: Callable[[Tensor], object], inputs: Inputs, replays: int = 7) -> float:
    """Microseconds of one call with the next weight each time: a captured graph, the median of `replays`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(inputs.weights[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(inputs.calls):
            call(inputs.weights[index % len(inputs.weights)])
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / inputs.calls)
    return statistics.median(times)


def guarded(call: Callable[[Tensor], object], inputs: Inputs, replays: int = 7) -> float | None:
    """`time_us`, or None with the reason printed: one impossible configuration must not end the rest."""
    try:
        return time_us(call, inputs, replays)
    except Exception as error:
        print(f"    not measured: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        torch.cuda.synchronize()
        return None


def compare(chosen: list[Matrix], tokens: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"{'model':5} {'matrix':8} {'T':>4}  {'product':>15} {'cuBLAS':>15} {'ours':>15}   us, TB/s of weights")
    for matrix in chosen:
        inputs = Inputs(matrix)
        for num_tokens in tokens:
            x, residual = inputs.x(num_tokens), inputs.residual(num_tokens)

            def product(weight: Tensor, x: Tensor = x, bias: Tensor | None = inputs.bias) -> Tensor:
                return F.linear(x, weight, bias)

            def whole(
                weight: Tensor, x: Tensor = x, residual: Tensor | None = residual, inputs: Inputs = inputs
            ) -> Tensor:
                return linear(x, weight, inputs.bias, norm=inputs.norm, swiglu=inputs.matrix.swiglu, residual=residual)

            row: dict[str, Any] = {"model": matrix.model, "matrix": matrix.name, "tokens": num_tokens}
            with forced({"linear": "reference", "rms_norm": "fused", "swiglu": "fused"}):
                row["product_us"], row["cublas_us"] = guarded(product, inputs), guarded(whole, inputs)
            with forced({"linear": "fused"}):
                row["ours_us"] = guarded(whole, inputs)
            rows.append(row)
            cells = []
            for kind in ("product_us", "cublas_us", "ours_us"):
                value = row[kind]
                cells.append(f"{value:8.2f} {matrix.weight_bytes / value / 1e6:6.2f}" if value else f"{'-':>15}")
            print(f"{matrix.model:5} {matrix.name:8} {num_tokens:4}  " + " ".join(cells), flush=True)
        del inputs
        torch.cuda.empty_cache()
    return rows


def gemv_grid(matrix: Matrix) -> Iterator[GemvConfig]:
    """The rule of thumb first, then what could beat it; each thread holds at most 32 loads of 16 bytes a step."""
    yield gemv_config(matrix.outputs, matrix.size, matrix.swiglu)
    pair = 2 if matrix.swiglu else 1
    whole = 1 << (matrix.size - 1).bit_length()
    for block_k, block_n, warps in itertools.product((whole, 2048, 1024, 512), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if (block_k > matrix.size and block_k != whole) or matrix.outputs // block_n < 100:
            continue
        loads = pair * block_n * block_k / (warps * 32 * 8)
        if not 2 <= loads <= 16:
            continue
        yield GemvConfig(block_n, block_k, warps)
        blocks = -(-matrix.outputs // block_n)
        if block_k == whole:
            for programs in (132 * 4, 132 * 8, 132 * 16):
                if blocks > 2 * programs:
                    yield GemvConfig(block_n, block_k, warps, programs)


def tile_grid(matrix: Matrix, num_tokens: int) -> Iterator[MatmulConfig]:
    """Tiles for a number of tokens: enough programs, and enough loads in flight, for the whole GPU."""
    pair = 2 if matrix.swiglu else 1
    blocks_m = [16] if num_tokens <= 16 else [size for size in (16, 32, 64, 128) if size <= num_tokens]
    for block_m, block_n, block_k, warps, stages, split in itertools.product(
        blocks_m, (16, 32, 64, 128, 256), (64, 128, 256), (2, 4, 8), (3, 4, 6), (1, 2, 4, 8)
    ):
        shared = stages * block_k * (block_m + pair * block_n) * 2
        programs = -(-matrix.outputs // block_n) * -(-num_tokens // block_m) * split
        steps = matrix.size // (split * block_k)
        if split > 1 and (matrix.swiglu or programs > 600 or matrix.outputs > 10000):
            continue
        if programs < 50 or steps < 2 or not 24e3 < shared < 220e3 or block_m * block_n * pair > 128 * 256:
            continue
        sums = pair * block_m * block_n / (32 * warps)  # registers of a thread for them
        if not 2 <= sums <= 128 or (block_m < 64 and block_n // 8 < warps):
            continue
        if num_tokens > 16 and (programs > 132 * 6 or (stages == 6 and block_k == 256)):
            continue
        yield MatmulConfig(block_m, block_n, block_k, warps, stages, split)


def tuned_call(matrix: Matrix, inputs: Inputs, num_tokens: int) -> Callable[[Tensor, Any], Tensor]:
    """(weight, configuration) -> result of the kernel that the configuration is for."""
    x, residual = inputs.x(num_tokens), inputs.residual(num_tokens)

    def call(weight: Tensor, config: Any) -> Tensor:
        if isinstance(config, GemvConfig):
            return gemv(
                x, weight, inputs.bias, norm=inputs.norm, swiglu=matrix.swiglu, residual_1N=residual, config=config
            )
        if config is None:  # cuBLAS between Triton's row kernels
            with cublas_only():
                return linear(x, weight, inputs.bias, norm=inputs.norm, swiglu=matrix.swiglu, residual=residual)
        normed = x if inputs.norm is None else rms_norm(x, *inputs.norm)
        return matmul(normed, weight, inputs.bias, swiglu=matrix.swiglu, residual_TN=residual, config=config)

    return call


def bound(call: Callable[[Tensor, Any], Tensor], config: Any) -> Callable[[Tensor], Tensor]:
    return lambda weight: call(weight, config)


@contextlib.contextmanager
def cublas_only() -> Iterator[None]:
    before, linear_module.tile_config = linear_module.tile_config, lambda *shape: None
    try:
        yield
    finally:
        linear_module.tile_config = before


def build(matrix: Matrix, num_tokens: int, config: Any) -> None:
    """In a process of its own: run the kernel once, so that its machine code lies in Triton's cache."""
    inputs = Inputs(matrix, only_shapes=True)
    tuned_call(matrix, inputs, num_tokens)(inputs.weights[0], config)
    torch.cuda.synchronize()


Job = tuple[Matrix, int, list[Any]]


def build_all(jobs: list[Job], seconds: float) -> set[tuple[Matrix, int, Any]]:
    """Compile on all cores until the time is up, the first configurations of every job first; those that were built."""
    order = sorted(
        ((index, matrix, tokens, config) for matrix, tokens, configs in jobs for index, config in enumerate(configs)),
        key=lambda item: item[0],
    )
    stop = time.monotonic() + seconds
    workers = max((os.cpu_count() or 2) - 1, 1)
    built: set[tuple[Matrix, int, Any]] = set()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(build, *job): job for _, *job in order}
        wait(futures, timeout=max(stop - time.monotonic(), 0))
        for future, job in futures.items():
            if future.done() and future.exception() is None:
                built.add(tuple(job))
            else:
                future.cancel()
    return built


def tune(chosen: list[Matrix], tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    """The best configuration of each matrix and number of tokens: compile for half of the time, then measure."""
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    jobs: list[Job] = []
    shuffle = random.Random(0)
    for count, matrix in itertools.product(tokens, chosen):
        configs = list(dict.fromkeys(gemv_grid(matrix) if count == 1 else tile_grid(matrix, count)))
        rule, others = configs[:1], configs[1:]
        shuffle.shuffle(others)
        jobs.append((matrix, count, rule + others))
    built = build_all(jobs, 0.5 * seconds)
    print(f"{len(built)} of {sum(len(configs) for _, _, configs in jobs)} built, {time.monotonic() - began:.0f} s")
    jobs.sort(key=lambda job: (job[0].model, job[0].name))
    for number, (matrix, count, configs) in enumerate(jobs):
        stop = time.monotonic() + max(began + seconds - time.monotonic(), 0) / (len(jobs) - number)
        if number == 0 or jobs[number - 1][0] != matrix:
            inputs = Inputs(matrix)
        call = tuned_call(matrix, inputs, count)
        times: dict[Any, float] = {}
        for config in configs:
            if (matrix, count, config) not in built or time.monotonic() > stop:
                continue
            value = guarded(bound(call, config), inputs, replays=3)
            if value is not None:
                times[config] = value
        for config in sorted(times, key=lambda config: times[config])[:3]:  # the leaders once more, for longer
            times[config] = guarded(bound(call, config), inputs, replays=11) or times[config]
        cublas = None if count == 1 else guarded(bound(call, None), inputs, replays=7)
        if times:
            best = min(times, key=lambda config: times[config])
            rate = matrix.weight_bytes / times[best] / 1e6
            key = (matrix.outputs, matrix.size, matrix.swiglu)
            beside = f", cuBLAS {cublas:.2f}" if cublas else ""
            print(
                f"    T={count} {key}: {best},  # {matrix.model} {matrix.name}: {times[best]:.2f} us, {rate:.2f} TB/s"
                f"{beside} ({len(times)} tried)",
                flush=True,
            )
            row = {"tokens": count, "key": list(key), "us": times[best], "cublas_us": cublas, **asdict(best)}
            found.append({"model": matrix.model, "matrix": matrix.name, **row})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.5B,1.5B,7B")
    parser.add_argument("--matrices", default="qkv,o,gate_up,down,head")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=140.0, help="time limit of --tune")
    parser.add_argument("--out", type=Path, help="directory of linear_configs.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("linear_decode.py measures a CUDA device; there is none here")
    torch.manual_seed(0)
    chosen = [matrix for matrix in matrices(given.models.split(",")) if matrix.name in given.matrices.split(",")]
    with torch.no_grad():
        if given.tune:
            found = tune(chosen, [int(count) for count in given.tokens.split(",")], given.seconds)
            if given.out is not None:
                given.out.mkdir(parents=True, exist_ok=True)
                path = given.out / "linear_configs.json"
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(f"wrote {path}")
            return
        rows = compare(chosen, [int(tokens) for tokens in given.tokens.split(",")])
    write_result("linear_decode", {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
