"""What this machine can do: device, native bf16, and the rate of its matrix products, which MFU refers to."""

from __future__ import annotations

import functools
import time

import torch

DATASHEET_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 rate by a part of the device's name, the first that it has, from the vendor's datasheets."""


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def upload(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor on a device, without waiting for it: from pinned memory, or the copy would wait for the stream."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Download:
    """A device tensor on its way to the host: what is launched after this is not waited for.

    numbers = Download(sums); ...launch more...; values = numbers.tensor()     # waits for `sums` alone
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tensor(self) -> torch.Tensor:
        """On the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of activations for fp32, bf16 or auto (bf16 where it is native)."""
    if precision == "auto":
        return torch.bfloat16 if bf16_is_native(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def bf16_is_native(device: torch.device) -> bool:
    """The processor multiplies bf16 matrices well faster than fp32 ones (measured on a CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return matmul_flops("cpu", torch.bfloat16) > 1.5 * matmul_flops("cpu", torch.float32)


FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
"""Instructions of x86 processors that decide how fast matrix products are."""


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Those of `FEATURES` that this processor and torch's detection of it have; empty on other architectures."""
    detect = getattr(torch.cpu, "get_capabilities", None)
    found = detect() if detect is not None else {}
    return tuple(name for name in FEATURES if found.get(name))


@functools.cache
def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Measured rate of a square matrix product in FLOP/s: the best of several, as it is a ceiling."""
    size = 8192 if device.startswith("cuda") else 768
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(24):
        start = time.perf_counter()
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def sustained_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """What matrix products reach in FLOP/s when they go on for a while, below the datasheet and below a burst: the
    ceiling of everything that a training step does. On a CPU, which keeps its rate, `matmul_flops`."""
    if device.type != "cuda":
        return matmul_flops(str(device), dtype)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    begun, products = time.perf_counter(), 0
    start = time.perf_counter()
    while (now := time.perf_counter()) - begun < 1.5 * seconds:
        if now - begun < 0.5 * seconds:  # until clocks and power have settled
            start, products = now, 0
        for _ in range(20):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize(device)
        products += 20
    rate = 2.0 * size**3 * products / (time.perf_counter() - start)
    del a, b, out
    torch.cuda.empty_cache()
    return rate


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The rate that MFU is a share of, in FLOP/s, and where it comes from: datasheet for known GPUs, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, rate in DATASHEET_BF16_FLOPS.items():
            if part in name:
                return rate, f"{part} datasheet"
    return matmul_flops(str(device), dtype), "measured matrix product"
