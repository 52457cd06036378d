"""What the commands of all training stages share: their arguments and their closing lines."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from qwench.parallel.launch import place_in_environment
from qwench.train.loop import TrainResult


def parse_recipe(stage: str, description: str | None, argv: list[str]) -> list[str]:
    """Recipe files and overrides of a training command."""
    parser = argparse.ArgumentParser(
        prog=f"qwench {stage}",
        description=(description or "").strip(),
        epilog=f"All keys with their defaults: qwench config show {stage}",
    )
    parser.add_argument(
        "recipe", nargs="+", help="TOML files, merged left to right, and key=value overrides in TOML grammar"
    )
    return parser.parse_args(argv).recipe


def report(result: TrainResult, out: Path) -> None:
    """The closing lines; under torchrun rank 0 alone says them."""
    if place_in_environment().rank:
        return
    losses = [f"training loss {result.train_loss:.4f} nats per token"] if math.isfinite(result.train_loss) else []
    if result.val_loss is not None:
        losses.append(f"validation loss {result.val_loss:.4f} nats per token")
    if not result.tokens_per_s:
        losses.append("nothing was left to train")
    print(", ".join([f"{result.steps} steps", f"{result.tokens:,} tokens", *losses]))
    if result.tokens_per_s:
        print(f"{result.tokens_per_s:,.0f} tokens/s, MFU {result.mfu:.1%}; {result.skipped_steps} steps skipped")
    print(f"model: {out / 'model'}")
