"""`qwench data`: documents -> clean, deduplicated, mixed token shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from qwench import config
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.pipeline.report import write_report
from qwench.data.pipeline.stages import DataResult, run_pipeline
from qwench.run import Run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench data",
        description="From raw documents (WARC, HTML, JSON lines, Parquet, text, source code, XML dumps) to a clean, "
        "deduplicated, balanced mixture of token shards. Running again continues after an interruption, and redoes "
        "only what a change of the recipe touches.",
        epilog="All keys with their defaults: qwench config show data. Example: qwench data data_web.toml out=run "
        "tokenizer=DIR sources.web.paths='[\"crawl/*.warc.gz\"]'",
    )
    parser.add_argument(
        "recipe", nargs="+", help="TOML files, merged left to right, and key=value overrides in TOML grammar"
    )
    recipe = config.load(DataConfig, parser.parse_args(argv).recipe)
    # Which results can be kept is decided item by item, so a changed recipe may go on in the same directory.
    with Run(recipe.out, recipe, "data", "force") as run:
        run.write_provenance()
        result = run_pipeline(recipe, record=run.record)
    print(report(result))
    print(f"report: {write_report(recipe.out)}")
    if result.train is None:
        print("no tokenizer was given, so no shards were written", file=sys.stderr)
    return 0


def report(result: DataResult) -> str:
    """The funnel and the mixture for a terminal."""
    summary = result.summary
    prepare = summary["prepare"]
    lines = [
        _line("read", prepare["documents"], prepare["text_bytes"]),
        _line("kept by rules", prepare["kept"], prepare["kept_bytes"]),
        *_reasons(prepare["reasons"]),
    ]
    if prepare["skipped"]:
        lines.append(f"not read: {prepare['skipped']:,} (see {result.out / 'skipped.jsonl'})")
        lines += _reasons(prepare["skip_reasons"])
    if "dedup" in summary:
        lines += _reasons(summary["dedup"].get("reasons", {}))
    for name in ("models", "decontaminate"):
        lines += _reasons(summary.get(name, {}).get("reasons", {}))
    if "decontaminate" in summary:
        lines += _reasons({f"from {name}": count for name, count in summary["decontaminate"]["sets"].items()})
    else:
        lines.append("not decontaminated: name the evaluation sets in decontaminate.against")
    lines.append(_line("left", summary["documents"]["documents"], summary["documents"]["bytes"]))
    if result.mixture is not None:
        lines += ["", result.mixture.describe(), ""]
        lines.append(f"shards: {result.train}" + (f", {result.val}" if result.val else ""))
    rate = summary["plan"]["bytes"] / 1e6 / max(summary["seconds"], 1e-9)
    lines.append(f"{summary['plan']['bytes'] / 1e6:,.1f} MB of input in {summary['seconds']:.1f} s ({rate:.1f} MB/s)")
    return "\n".join(lines)


def _line(name: str, documents: int, num_bytes: int) -> str:
    return f"{name:<14} {documents:>12,} documents {num_bytes / 1e6:>12,.1f} MB of text"


def _reasons(table: Mapping[str, Any]) -> list[str]:
    shown = sorted(table.items(), key=lambda entry: (-entry[1], entry[0]))[:12]
    return [f"  {count:>12,} {reason}" for reason, count in shown]
