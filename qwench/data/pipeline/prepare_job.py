"""The first pass over the raw bytes, one item: read, repair, identify, judge, scrub, and hash what is kept.

docs.parquet       documents that no rule dropped, clean
dropped.parquet    the others as they were judged, with stage, reason and the measured value
skipped.jsonl      what could not be read, and why
rows.arrow, ...    what finding duplicates needs (`pipeline.dedup_hashes`), so that no later stage reads texts for it
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwench.config import from_dict
from qwench.data.dedup import DedupSettings
from qwench.data.documents import read_item
from qwench.data.inputs import Skipped
from qwench.data.opening import ReadLimits
from qwench.data.pipeline.conversations import read_conversations
from qwench.data.pipeline.dedup_hashes import HashWriter
from qwench.data.pipeline.models_job import Models
from qwench.data.pipeline.parts import DOCS, DROPPED, DROPPED_SCHEMA, PartWriter
from qwench.data.pipeline.work import Item
from qwench.data.prepare import Preparer, PrepareRules
from qwench.data.text import Dropped
from qwench.types import Document

SKIPPED = "skipped.jsonl"
_SHOWN = 20


def prepare_part(item: Item, directory: Path) -> dict[str, Any]:
    """Counts: "read", "kept" and "dropped" in documents and UTF-8 bytes, drops by "stage: reason", kept bytes by kind,
    language and source, what was scrubbed and cut inside documents, and what was skipped by reason."""
    skipped: list[Skipped] = []
    hashes = HashWriter(from_dict(DedupSettings, item["dedup"]), directory)
    preparer = Preparer(from_dict(PrepareRules, item["rules"]))
    reasons: Counter[str] = Counter()
    read_documents = read_bytes = 0
    tables: dict[str, Counter[str]] = {name: Counter() for name in ("kind", "lang", "source")}
    models = Models(item.get("models", ()))

    def prepared() -> Iterator[Document | Dropped]:
        nonlocal read_documents, read_bytes
        for document in _documents(item, skipped):
            read_documents += 1
            read_bytes += _size(document)
            result = document if item["conversations"] != "no" else preparer.prepare(document)
            if isinstance(result, Dropped) and result.document is None:
                result = dataclasses.replace(result, document=document)
            yield result

    with PartWriter(directory / DOCS) as kept, PartWriter(directory / DROPPED, DROPPED_SCHEMA) as dropped:
        for result in models.stream(prepared()) if models else prepared():
            if isinstance(result, Dropped):
                assert result.document is not None
                verdict = result.verdict
                reasons[f"{result.stage}: {verdict.reason}"] += 1
                dropped.add(result.document, result.stage, verdict.reason, verdict.value)
                continue
            kept.add(result)
            hashes.add([result])
            for name, table in tables.items():
                table[getattr(result, name)] += _size(result)
    with open(directory / SKIPPED, "w", encoding="utf-8") as file:
        for problem in skipped:
            file.write(json.dumps({"id": problem.id, "reason": problem.reason}) + "\n")
    return {
        "bytes": item.get("bytes", 0),
        "documents": read_documents,
        "text_bytes": read_bytes,
        "kept": kept.num_documents,
        "kept_bytes": kept.num_bytes,
        "dropped": dropped.num_documents,
        "dropped_bytes": dropped.num_bytes,
        "reasons": _sorted(reasons),
        "inside": _sorted(preparer.counts),
        **{f"{name}_bytes": _sorted(table) for name, table in tables.items()},
        "skipped": len(skipped),
        "skip_reasons": _sorted(Counter(_general(problem.reason) for problem in skipped)),
        "skip_samples": [[problem.id, problem.reason] for problem in skipped[:_SHOWN]],
        "hashes": hashes.close(),
        **(models.counts() if models else {}),
    }


def _documents(item: Item, skipped: list[Skipped]) -> Iterator[Document]:
    limits = from_dict(ReadLimits, item["read"])
    if item["conversations"] == "no":
        return read_item(item, skipped, limits)
    return read_conversations(item, item["conversations"], skipped, limits)


def _size(document: Document) -> int:
    return len(document.text) if document.text.isascii() else len(document.text.encode("utf-8", "surrogatepass"))


def _general(reason: str) -> str:
    """A reason without its particulars in parentheses."""
    return reason.partition(" (")[0]


def _sorted(table: Counter[str]) -> dict[str, int]:
    return dict(sorted(table.items()))
