"""`qwench doctor`: what this machine can do, and what qwench would choose on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qwench import __version__
from qwench.ops import attention, cross_entropy, dispatch, linear, norm, paging, rope, sampling, swiglu
from qwench.ops.hardware import cpu_features, matmul_flops, pick_device, pick_dtype
from qwench.run import PACKAGES, git_commit, machine

OPTIONAL = {
    "resiliparse": "fast HTML extraction (extra [data])",
    "zstandard": "reading .zst files (extra [data])",
    "transformers": "checks against Hugging Face (extra [dev])",
}
OPERATION_FILES = (attention, cross_entropy, linear, norm, paging, rope, sampling, swiglu)
"""Imported so that every operation is registered."""


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="qwench doctor", description=__doc__).parse_args(argv)
    out = Console(markup=False)
    facts = machine()
    table = Table(title="machine", show_header=False, title_justify="left")
    table.add_row("system", facts["system"])
    table.add_row("processor", f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB memory")
    table.add_row("instruction set", ", ".join((torch.backends.cpu.get_cpu_capability(), *cpu_features())))
    table.add_row("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    out.print(table)

    device = pick_device()
    table = Table(title=f"choices on {device}", show_header=False, title_justify="left")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"matrix product {name}", f"{matmul_flops(str(device), dtype) / 1e12:.2f} TFLOP/s measured")
    table.add_row("training precision (auto)", str(pick_dtype("auto", device)).removeprefix("torch."))
    for name, implementation in dispatch.chosen(device).items():
        others = [impl.name for impl in dispatch.OPERATIONS[name].available(device) if impl.name != implementation]
        table.add_row(f"ops.{name}", implementation + (f"   (also: {', '.join(others)})" if others else ""))
    out.print(table)

    table = Table(title="software", show_header=False, title_justify="left")
    table.add_row("qwench", f"{__version__} {git_commit() or ''}".strip())
    for package in PACKAGES:
        table.add_row(package, _version(package) or "missing: pip install qwench again")
    for package, purpose in OPTIONAL.items():
        table.add_row(package, _version(package) or f"not installed; it is for {purpose}")
    out.print(table)
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
