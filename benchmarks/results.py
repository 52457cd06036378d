"""Where a benchmark's figures go: benchmarks/results/NAME.json with the command, commit and machine beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qwench.run import provenance

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures and print where."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    arguments = [Path(argument).name for argument in sys.argv[1:]]  # not where they lie on this machine
    made = provenance() | {"command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])}
    path.write_text(json.dumps({"figures": figures, "provenance": made}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
