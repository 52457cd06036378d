"""Runs `data_text_peers.py` with another Python, which has the peers, and gives back what it measured."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def run_peers(python: str | None, task: str, items: list[Any]) -> dict[str, Any]:
    """Peer -> {"seconds": CPU seconds, "results": one for each item}; empty without a Python that has them."""
    if python is None:
        print("no --peers given: the peers are left out")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(items), encoding="utf-8")
        subprocess.run(
            [python, str(Path(__file__).parent / "data_text_peers.py"), task, str(given), str(got)], check=True
        )
        return json.loads(got.read_text(encoding="utf-8"))
