"""A chunk of logits of a cut vocabulary on one rank: plain PyTorch and the Triton kernel against the definition.

The loss over a group is in test_axes.py. The kernel runs on a GPU or in Triton's interpreter
(tests/test_interpreted_kernels.py).
"""

from __future__ import annotations

import pytest
import torch

from qwench.ops.triton_launch import runs_triton
from qwench.parallel import vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = runs_triton(DEVICE)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU; tests/test_interpreted_kernels.py runs it")


@pytest.mark.parametrize("kind", ["_Chunk", pytest.param("_TritonChunk", marks=needs_kernels)])
@pytest.mark.parametrize("num_rows", [5, 100])
def test_chunk(kind: str, num_rows: int) -> None:
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
