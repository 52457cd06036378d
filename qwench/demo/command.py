"""`qwench demo`: the whole recipe at small size on this machine, and its report."""

from __future__ import annotations

import argparse
import sys

from qwench import config
from qwench.demo.config import DemoConfig
from qwench.demo.pipeline import run_stages
from qwench.demo.stages import STAGES
from qwench.run import Run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench demo",
        description=__doc__,
        epilog="All keys and defaults: qwench config show demo. Running again resumes at the first unfinished stage.",
    )
    parser.add_argument("--data", help="folder or file with text to learn from, instead of what Python ships")
    parser.add_argument("--out", help="folder of the run (default: demo-run)")
    parser.add_argument("recipe", nargs="*", help="TOML files and key=value overrides")
    args = parser.parse_args(argv)
    given = [f"{name}={value}" for name in ("data", "out") if (value := getattr(args, name)) is not None]
    cfg = config.load(DemoConfig, [*args.recipe, *given])
    with Run(cfg.out, cfg, "demo", "force") as run:
        run.write_provenance()
        context = run_stages(STAGES, cfg)
    model, report = cfg.out / "model", cfg.out / "report.html"
    print(f"model:  {model}\nreport: {report}\ntalk to it: {sys.argv[0].rpartition('/')[2] or 'qwench'} chat {model}")
    scores = context.results["evaluate"]["scores"]
    print(f"sums: {scores['before']['sums']:.0%} before fine-tuning, {scores['after']['sums']:.0%} after")
    return 0
