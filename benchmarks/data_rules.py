"""Speed of the prepare stage with every rule on, by kind of text, beside datatrove's filters on the same texts.

    python benchmarks/data_rules.py FOLDER_OF_JSONL web_html_truth.jsonl [--peers PYTHON] [--megabytes 3]

MB/s of UTF-8 text on one core, in CPU time: repair, language, rules, PII. Every text is judged as if it came from a
crawl. "rules only" are those of `judge_prose` for pages, which is what datatrove's Gopher, C4 and FineWeb filters do;
how often both say the same is given too. The last line is raw HTML through extraction and all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import write_result
from text_peers import run_peers

from qwench.data.documents import read_documents
from qwench.data.html import decode_html, html_to_text
from qwench.data.prepare import Preparer
from qwench.data.prose_rules import ProseRules, judge_prose
from qwench.data.text import Dropped
from qwench.types import Document

_SETS = {
    "English books and speeches": ("en_misc.jsonl", "news"),
    "English documentation": ("en_docs.jsonl", "news"),
    "Chinese prose": ("zh_modern.jsonl", "news"),
    "Chinese documentation": ("zh_docs.jsonl", "news"),
    "Python": ("code_python_stdlib.jsonl", "code"),
    "Go": ("code_go_std.jsonl", "code"),
}


def some(path: Path, kind: str, num_bytes: float) -> list[Document]:
    taken, size = [], 0
    for document in read_documents([path]):
        taken.append(dataclasses.replace(document, kind=kind, lang=document.lang if kind == "code" else ""))
        size += len(document.text.encode())
        if size >= num_bytes:
            break
    return taken


def kept_shares(texts: Sequence[tuple[str, str]], kept: Sequence[bool]) -> dict[str, float]:
    """Share of the texts of each language that is kept."""
    languages = sorted({lang for lang, _ in texts})
    chosen = {lang: [keep for (other, _), keep in zip(texts, kept, strict=True) if other == lang] for lang in languages}
    return {f"kept_{lang}": sum(each) / len(each) for lang, each in chosen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", type=Path)
    parser.add_argument("--peers", help="Python with datatrove")
    parser.add_argument("--megabytes", type=float, default=3.0, help="of each kind of text")
    arguments = parser.parse_args()
    sets = {
        name: some(arguments.folder / file, kind, arguments.megabytes * 1e6) for name, (file, kind) in _SETS.items()
    }
    for documents in sets.values():  # models, tables and ftfy are loaded once a process
        for document in documents[:20]:
            Preparer().prepare(document)
    Preparer().prepare(Document(id="", text="schÃ¶n ist es, wenn alles geladen ist"))
    figures: dict[str, Any] = {}
    for name, documents in sets.items():
        size = sum(len(document.text.encode()) for document in documents)
        preparer = Preparer()
        started = time.process_time()
        results = [preparer.prepare(document) for document in documents]
        seconds = time.process_time() - started
        reasons = Counter(result.verdict.reason for result in results if isinstance(result, Dropped))
        kept = sum(isinstance(result, Document) for result in results)
        figures[name] = {
            "documents": len(documents),
            "text_mb": size / 1e6,
            "mb_per_s": size / seconds / 1e6,
            "kept": kept / len(documents),
        }
        shown = dict(reasons.most_common(3))
        print(f"{name:28} {size / seconds / 1e6:6.1f} MB/s  kept {kept / len(documents):.2f}  {shown}")
    compared = [
        ("zh" if "Chinese" in name else "en", d.text)
        for name in sets
        if sets[name][0].kind != "code"
        for d in sets[name]
    ]
    size = sum(len(text.encode()) for _, text in compared)
    rules = ProseRules()
    started = time.process_time()
    verdicts = [judge_prose(text, lang, rules, page=True) for lang, text in compared]
    seconds = time.process_time() - started
    kept = [verdict.keep for verdict in verdicts]
    figures["rules only"] = {"qwench": {"mb_per_s": size / seconds / 1e6} | kept_shares(compared, kept)}
    for name, run in run_peers(arguments.peers, "rules", [list(pair) for pair in compared]).items():
        theirs = [result == "" for result in run["results"]]
        same = sum(ours == other for ours, other in zip(kept, theirs, strict=True))
        figures["rules only"][name] = {
            "mb_per_s": size / run["seconds"] / 1e6,
            "same_verdict": same / len(compared),
        } | (kept_shares(compared, theirs))
    for name, row in figures["rules only"].items():
        print(f"rules only, {name:34}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    truth = [json.loads(line)["file"] for line in arguments.pages.read_text(encoding="utf-8").split("\n") if line]
    pages = [(arguments.pages.parent / "web_html" / file).read_bytes() for file in truth]
    preparer = Preparer()
    started = time.process_time()
    for number, page in enumerate(pages):
        preparer.prepare(Document(id=str(number), text=html_to_text(decode_html(page)), kind="web"))
    seconds = time.process_time() - started
    figures["HTML to clean text"] = {
        "html_mb": sum(map(len, pages)) / 1e6,
        "mb_per_s": sum(map(len, pages)) / seconds / 1e6,
    }
    print(f"{'HTML to clean text':28} {figures['HTML to clean text']['mb_per_s']:6.1f} MB/s of raw HTML")
    write_result("data_rules", figures)


if __name__ == "__main__":
    main()
