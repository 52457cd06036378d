"""Write the README's benchmark table from benchmarks/results/*.json: no number stands there without its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def figures(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))["figures"]


def rows() -> list[str]:
    encode = figures("tokenizer_encode")["encoders"]
    ours, theirs, openai = (
        f"{encode[name]['mb_per_s']:.1f} (first pass {encode[name]['first_pass_mb_per_s']:.1f})" for name in encode
    )
    lines = [
        "| on 2 cores of a Xeon with AMX | qwench | peers | ceiling |",
        "|---|---|---|---|",
        f"| encoding Python sources, 1 thread, words seen before, MB/s | {ours} "
        f"| tokenizers {theirs}, tiktoken {openai} | |",
    ]
    for dtype in ("float32", "bfloat16"):
        result = figures(f"generate_cpu_{dtype}")
        speed = result["tokens_per_s"]
        same = "same tokens" if result["equal"] else "other tokens"
        lines.append(
            f"| Qwen2.5-Coder-0.5B, {dtype}, greedy, tokens/s | {speed['qwench']:.1f} "
            f"| transformers {speed['transformers']:.1f} ({same}) | {result['roofline']:.1f} (memory) |"
        )
    return lines


def main() -> None:
    text = README.read_text(encoding="utf-8")
    table = "\n".join(["<!-- benchmarks -->", *rows(), "<!-- /benchmarks -->"])
    found, count = re.subn(r"<!-- benchmarks -->.*?<!-- /benchmarks -->", lambda _: table, text, flags=re.DOTALL)
    assert count == 1, "README.md needs one pair of benchmark markers"
    README.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
