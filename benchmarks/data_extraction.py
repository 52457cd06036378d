"""Main text of web pages: how well it is found, and how fast, beside trafilatura and resiliparse's own defaults.

    python benchmarks/data_extraction.py web_html_truth.jsonl [--peers PYTHON]

The truth names for each page passages that its main text has and passages of navigation, teasers and comments that it
has not. Precision, recall and F1 count passages over all pages; MB/s are of raw HTML on one core, in CPU time,
decoding included. `--peers` is a Python with the packages that data_text_peers.py names.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from results import write_result
from text_peers import run_peers

from qwench.data.html import decode_html, html_to_text


def score(truth: Sequence[dict[str, Any]], texts: Sequence[str | None]) -> dict[str, float]:
    hits = misses = wrong = right = 0
    for page, found in zip(truth, texts, strict=True):
        text = found or ""
        wanted, unwanted = page["with"] or [], page["without"] or []
        held = sum(passage in text for passage in wanted)
        bad = sum(passage in text for passage in unwanted)
        hits, misses, wrong, right = hits + held, misses + len(wanted) - held, wrong + bad, right + len(unwanted) - bad
    precision, recall = hits / max(1, hits + wrong), hits / max(1, hits + misses)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "accuracy": (hits + right) / (hits + misses + wrong + right),
    }


def extract_all(extract: Callable[[str], str], pages: Sequence[bytes]) -> tuple[list[str], float]:
    extract(decode_html(pages[0]))
    started = time.process_time()
    texts = [extract(decode_html(page)) for page in pages]
    return texts, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--peers", help="Python with trafilatura")
    arguments = parser.parse_args()
    truth = [json.loads(line) for line in arguments.truth.read_text(encoding="utf-8").split("\n") if line]
    paths = [arguments.truth.parent / "web_html" / page["file"] for page in truth]
    pages = [path.read_bytes() for path in paths]
    num_bytes = sum(map(len, pages))
    ours: dict[str, Callable[[str], str]] = {
        "qwench": html_to_text,
        "qwench, everything visible": lambda page: html_to_text(page, main_content=False),
        "resiliparse, main content": lambda page: extract_plain_text(page, preserve_formatting=True, main_content=True),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, extract in ours.items():
        texts, seconds = extract_all(extract, pages)
        figures[name] = score(truth, texts) | {"mb_per_s": num_bytes / seconds / 1e6}
    for name, run in run_peers(arguments.peers, "extraction", [str(path) for path in paths]).items():
        figures[name] = score(truth, run["results"]) | {"mb_per_s": num_bytes / run["seconds"] / 1e6}
    for name, row in figures.items():
        print(
            f"{name:28} F1 {row['f1']:.3f}  precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
            f"{row['mb_per_s']:6.1f} MB/s"
        )
    passages = sum(len(page["with"] or []) + len(page["without"] or []) for page in truth)
    write_result(
        "data_extraction",
        {"pages": len(pages), "passages": passages, "html_mb": num_bytes / 1e6, "extractors": figures},
    )


if __name__ == "__main__":
    main()
