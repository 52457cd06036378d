"""Whether Triton kernels run on a device, and how they are launched there: the one place that asks.

Triton is optional. It runs on CUDA devices, and on the CPU in Triton's own interpreter when TRITON_INTERPRET=1 is set
before Triton is first imported (slow; for tests). Kernels lie in `*_triton.py` files, which only code behind
`runs_triton` imports.

Programmatic dependent launch (compute capability 9 and later): a kernel may start while the one before it in the
stream still runs, and waits (`gdc_wait`) before it touches what that one writes. Every kernel launched so keeps three
rules:

1. every program executes `gdc_wait` exactly once, also one with nothing to do, and `gdc_launch_dependents` after it;
2. before the wait it reads nothing that the kernel just before it in the stream writes. As that one had to pass its own
   wait before this one could start, everything older is complete: weights, caches, lengths may be read early;
3. before the wait it writes nothing (an earlier kernel may still read the buffer).

A kernel launched in the ordinary way before or after such a chain needs no care: it starts when the chain is done.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Kernels run in Triton's interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(device: torch.device) -> bool:
    """Triton is installed and runs kernels on tensors of `device`."""
    return _installed() and (interpreted() if device.type == "cpu" else device.type == "cuda" and _capable(device))


@functools.cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Kernels on `device` are launched with programmatic dependent launch: the kernels' USE_PDL."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def options(pdl: bool) -> dict[str, Any]:
    """Further launch options of a kernel whose USE_PDL is `pdl`; the interpreter does not know `launch_pdl`."""
    return {"launch_pdl": True} if pdl else {}


@functools.cache
def zeroed_counters(device: torch.device, size: int) -> torch.Tensor:
    """int32 zeros by which the programs of a launch find out which of them is the last; each launch leaves zeros.

    Launches of one stream follow each other, so they share them.
    """
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int32, device=device)
