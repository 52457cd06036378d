"""The tests of the Triton kernels once more, in Triton's interpreter.

It must be asked for before Triton is imported, so it gets a process of its own: one for all files, since starting takes
longer than most of them. The interpreter cuts bf16 and fp8 instead of rounding, and multiplies bf16 matrices wrongly:
those are tested on a GPU alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parent
FILES = {
    "ops/test_attention_triton.py": 24,
    "ops/test_cross_entropy.py": 9,
    "ops/test_elementwise_train.py": 5,
    "ops/test_elementwise_triton.py": 30,
    "ops/test_linear_op.py": 40,
    "ops/test_sampling_kernels.py": 30,
    "parallel/test_vocabulary.py": 4,
    "train/test_adamw.py": 3,
}
"""Each file, and how many of its tests run at least."""
CHOSEN = "one_launch or test_kernel_ or not (test_adamw or test_sampling_kernels)"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN]
    command += [f"--junit-xml={tmp_path / 'results.xml'}", *(str(TESTS / name) for name in FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    cases = ElementTree.parse(tmp_path / "results.xml").iter("testcase")
    passed = Counter(case.get("classname") for case in cases if case.find("skipped") is None)
    for name, least in FILES.items():
        assert passed["tests." + name.removesuffix(".py").replace("/", ".")] >= least, passed
