"""The decontamination stage: an index of the evaluation sets, and every part without what stands in them.

docs.parquet          documents that share nothing with a test sample
dropped.parquet       the others; meta["contamination"] names the sample
contamination.jsonl   document, sample, length and share of what they have in common, and the words
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwench.config import from_dict
from qwench.data.decontaminate import (
    ContaminationFinder,
    ContaminationIndex,
    DecontaminateSettings,
    build_index,
    evaluation_files,
    read_samples,
)
from qwench.data.pipeline.parts import DOCS, DROPPED, DROPPED_SCHEMA, PartWriter, read_part
from qwench.data.pipeline.work import Item
from qwench.types import Document

CONTAMINATION = "contamination.jsonl"
VERSION = 1
_BATCH_CHARS = 1 << 20
_EXCERPT_CHARS = 400


def index_item(settings: DecontaminateSettings, folder: Path | None) -> dict[str, Any]:
    """The item of the index stage: evaluation files below `folder`, told apart by their contents."""
    paths = [str(folder / path if folder is not None else Path(path)) for path in settings.against]
    files = evaluation_files(paths)
    return {
        "files": [[name, str(path.absolute()), _digest(path)] for name, path in files],
        "settings": asdict(dataclasses.replace(settings, against=())),
        "bytes": sum(path.stat().st_size for _, path in files),
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def index_samples(item: Item, directory: Path) -> dict[str, Any]:
    """Counts: files, samples, tokens and n-grams of the evaluation sets."""
    files = [(name, Path(path)) for name, path, _ in item["files"]]
    index = build_index(read_samples(files), from_dict(DecontaminateSettings, item["settings"]))
    index.save(directory)
    return {
        "files": len(files),
        "samples": len(index.ids),
        "tokens": len(index.tokens),
        "ngrams": len(index.grams),
    }


def decontaminate_part(item: Item, directory: Path) -> dict[str, Any]:
    """Counts: documents and bytes kept and dropped, drops by evaluation file."""
    finder = ContaminationFinder(
        ContaminationIndex.load(Path(item["index"])), from_dict(DecontaminateSettings, item["settings"])
    )
    sets: Counter[str] = Counter()
    samples: list[list[Any]] = []
    with (
        PartWriter(directory / DOCS) as kept,
        PartWriter(directory / DROPPED, DROPPED_SCHEMA) as dropped,
        open(directory / CONTAMINATION, "w", encoding="utf-8") as told,
    ):

        def judge(documents: list[Document]) -> None:
            overlaps = finder.find([document.text for document in documents])
            for document, overlap in zip(documents, overlaps, strict=True):
                if overlap is None:
                    kept.add(document)
                    continue
                table = asdict(overlap) | {
                    "share": round(overlap.share, 4),
                    "excerpt": overlap.excerpt[:_EXCERPT_CHARS],
                }
                told.write(json.dumps({"document": document.id, **table}, ensure_ascii=False) + "\n")
                marked = dataclasses.replace(document, meta={**document.meta, "contamination": table})
                dropped.add(marked, "decontaminate", "contaminated", overlap.share)
                sets[overlap.sample.partition(":")[0]] += 1
                samples.append([document.id, overlap.sample, round(overlap.share, 4)])

        waiting: list[Document] = []
        size = 0
        for document in read_part(Path(item["docs"])):
            waiting.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARS:
                judge(waiting)
                waiting, size = [], 0
        judge(waiting)
    return {
        "documents": kept.num_documents,
        "text_bytes": kept.num_bytes,
        "dropped": dropped.num_documents,
        "dropped_bytes": dropped.num_bytes,
        "reasons": {"decontaminate: contaminated": dropped.num_documents} if dropped.num_documents else {},
        "sets": dict(sorted(sets.items())),
        "samples": samples[:20],
    }
