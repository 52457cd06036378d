"""A chunk of logits of a cut vocabulary on one rank: plain PyTorch and the Triton kernel against the definition.

The loss over a group is in test_axes.py. As in tests/ops, the kernel runs on a GPU or in Triton's interpreter in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwench.ops.triton_launch import runs_triton
from qwench.parallel import vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; the interpreter's run of this file covers it")


def test_kernels_in_the_interpreter() -> None:
    if KERNELS or importlib.util.find_spec("triton") is None:
        pytest.skip("the kernels run in this process, or Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["_Chunk", pytest.param("_TritonChunk", marks=needs_kernels)])
@pytest.mark.parametrize("num_rows", [5, 100])
def test_chunk(kind: str, num_rows: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # noqa: F401
    torch.manual_seed(0)
    logits = torch.randn(7, num_rows, device=DEVICE) * 5
    rows = torch.randint(num_rows, (7,), device=DEVICE)
    scale, target = torch.rand(2, 7, device=DEVICE)
    target[2] = 0.0  # another rank has this target
    probs, picked = logits.double().softmax(-1), logits.gather(1, rows[:, None])[:, 0]
    chunk = getattr(vocabulary, kind)(logits.clone(), rows)
    torch.testing.assert_close(chunk.logsumexp_C, logits.logsumexp(-1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(chunk.target_logits_C, picked, rtol=2e-6, atol=4e-6)
    want = probs * scale[:, None]
    want[torch.arange(7, device=DEVICE), rows] -= target
    torch.testing.assert_close(chunk.gradient_(scale, target).double(), want, rtol=2e-6, atol=2e-6)
