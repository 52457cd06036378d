"""The order of the stages: raw files -> documents -> tokens -> shards, as `qwench data` and the demo run them.

    OUT/config.toml, provenance.json, metrics.jsonl, logs/    as every run directory (qwench.run)
    OUT/plan.json                what is read
    OUT/work/STAGE/NNNNN/        what each item gave (pipeline.work); dropped documents stay there
    OUT/skipped.jsonl            what could not be read
    OUT/contamination.jsonl      documents that were dropped for an evaluation sample, and which
    OUT/shards/train/            a mixture (data.mixture): mixture.json and a directory of shards for every group
    OUT/shards/val/              held-out documents
    OUT/summary.json             the funnel: documents and bytes after every stage, reasons, mixture, times

The functions here only say which job works on which files and add up counts; documents are never in this process unless
it works alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwench.config import to_dict
from qwench.data.inputs import Skipped
from qwench.data.mixture import MixturePlan, plan_mixture, write_mixture
from qwench.data.pipeline.decontaminate_job import CONTAMINATION, decontaminate_part, index_item, index_samples
from qwench.data.pipeline.decontaminate_job import VERSION as DECONTAMINATE_VERSION
from qwench.data.pipeline.dedup import run_dedup
from qwench.data.pipeline.models_job import VERSION as MODELS_VERSION
from qwench.data.pipeline.models_job import model_tables, score_part
from qwench.data.pipeline.parts import DOCS
from qwench.data.pipeline.plan import plan_items, plan_of
from qwench.data.pipeline.prepare_job import SKIPPED, prepare_part
from qwench.data.pipeline.progress import StageProgress
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.pipeline.tokens import (
    ALONE_BYTES,
    ALONE_SHARD_BYTES,
    VALIDATION,
    encode_part,
    folder_names,
    load_tokenizer,
    shard_ranges,
    write_piece,
)
from qwench.data.pipeline.work import Finished, Room, run_stage
from qwench.data.shards import ShardRecord, assemble
from qwench.run import write_atomically

PREPARE_VERSION = 1
TOKENS_VERSION = 1
Record = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Clean documents of one part.

    >>> Part(docs=Path("work/dedup/00003/docs.parquet"), num_documents=812, num_bytes=3_100_000)
    """

    docs: Path
    num_documents: int
    num_bytes: int


@dataclass(slots=True, kw_only=True)
class DataResult:
    """What a run has made."""

    out: Path
    parts: list[Part] = field(default_factory=list)
    """Clean documents, in order."""
    summary: dict[str, Any] = field(default_factory=dict)
    mixture: MixturePlan | None = None
    train: Path | None = None
    """The mixture's shards; None without a tokenizer."""
    val: Path | None = None


def run_pipeline(recipe: DataConfig, *, record: Record | None = None, quiet: bool = False) -> DataResult:
    """Everything the recipe says; `record` gets one record a stage. Raises ValueError if no document is left, and what
    `run_stage` raises."""
    begin = time.monotonic()
    watcher = StageProgress(quiet)
    result = DataResult(out=recipe.out)
    problems: list[Skipped] = []
    items = plan_items(recipe, problems)
    total = sum(item["bytes"] for item in items)
    room = Room(
        path=recipe.out / "work",
        workers=recipe.workers,
        runner=recipe.runner,
        ray_address=recipe.ray_address,
        in_process=None if total >= recipe.start_processes_mb * 1e6 > 0 else recipe.start_processes_mb > 0,
        watcher=watcher,
    )
    recipe.out.mkdir(parents=True, exist_ok=True)
    plan = {"sources": plan_of(items), "items": len(items), "bytes": total, "not_read": len(problems)}
    write_atomically(recipe.out / "plan.json", json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
    summary = result.summary
    summary["plan"] = plan

    def stage(name: str, counts: dict[str, Any]) -> None:
        """Note what a stage of the funnel gave."""
        summary[name] = counts
        mine = [entry for entry in watcher.records if not entry.pop("told", False)]
        watcher.records[:] = [{**entry, "told": True} for entry in watcher.records]
        if record is not None:
            record(stage=name, seconds=round(sum(e["seconds"] for e in mine), 3), steps=mine, **_small(counts))

    prepared = run_stage(room, "prepare", prepare_part, items, version=PREPARE_VERSION)
    counts = combined(finished.counts for finished in prepared)
    _join_skipped(recipe.out, prepared, problems)
    counts["skipped"] += len(problems)
    for problem in problems:
        counts["skip_reasons"][problem.reason] = counts["skip_reasons"].get(problem.reason, 0) + 1
    stage("prepare", counts)
    if not counts["kept"]:
        raise ValueError(
            f"no document is left after the first stage: {_why(counts)}; see {recipe.out / 'work/prepare'}"
        )

    result.parts = _deduplicate(room, prepared, recipe, stage)
    if not sum(part.num_documents for part in result.parts):
        raise ValueError("no document is left after the search for duplicates")
    result.parts = _score(room, result.parts, recipe, stage)
    result.parts = _decontaminate(room, result.parts, recipe, stage)
    if not sum(part.num_documents for part in result.parts):
        raise ValueError("no document is left after models and decontamination; see work/*/dropped.parquet for reasons")
    summary["documents"] = {
        "documents": sum(part.num_documents for part in result.parts),
        "bytes": sum(part.num_bytes for part in result.parts),
        "parts": [str(part.docs.relative_to(room.path.parent)) for part in result.parts],
    }
    if recipe.tokenizer is not None:
        write_shards(room, recipe, recipe.tokenizer, result, stage)
    summary["stages"] = [{k: v for k, v in entry.items() if k != "told"} for entry in watcher.records]
    summary["seconds"] = round(time.monotonic() - begin, 3)
    write_atomically(recipe.out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return result


def _deduplicate(
    room: Room, prepared: Sequence[Finished], recipe: DataConfig, stage: Callable[[str, dict[str, Any]], None]
) -> list[Part]:
    """Parts without duplicates."""
    found = run_dedup(room, prepared, recipe.dedup)
    parts = []
    for finished, part in zip(prepared, found.parts, strict=True):
        counts = part.counts or {"documents": finished.counts["kept"], "bytes": finished.counts["kept_bytes"]}
        parts.append(Part(docs=part.docs, num_documents=counts["documents"], num_bytes=counts["bytes"]))
    base = room.path.parent
    stage(
        "dedup",
        {
            **found.counts,
            "clusters": [path.relative_to(base).as_posix() for path in found.clusters],
            "pairs": found.pairs.relative_to(base).as_posix() if found.pairs is not None else None,
            "s_curve": found.s_curve,
            "minhash": to_dict(recipe.dedup.minhash),
        },
    )
    return parts


def _score(
    room: Room, parts: Sequence[Part], recipe: DataConfig, stage: Callable[[str, dict[str, Any]], None]
) -> list[Part]:
    """Parts with the scores of the recipe's models, without what these drop."""
    if not (tables := model_tables(recipe.models, before_dedup=False)):
        return list(parts)
    items = [{"docs": str(part.docs), "models": tables, "bytes": part.num_bytes} for part in parts]
    scored = run_stage(room, "models", score_part, items, version=MODELS_VERSION)
    stage("models", combined(finished.counts for finished in scored))
    return _parts_of(scored)


def _decontaminate(
    room: Room, parts: Sequence[Part], recipe: DataConfig, stage: Callable[[str, dict[str, Any]], None]
) -> list[Part]:
    """Parts without documents that hold samples of the evaluation sets."""
    told = recipe.out / CONTAMINATION
    told.unlink(missing_ok=True)
    if not recipe.decontaminate.against:
        return list(parts)
    sets = index_item(recipe.decontaminate, recipe.inputs)
    index = run_stage(room, "decontaminate-index", index_samples, [sets], version=DECONTAMINATE_VERSION)[0]
    common = {"index": str(index.directory), "settings": sets["settings"]}
    items = [{"docs": str(part.docs), "bytes": part.num_bytes, **common} for part in parts]
    cleaned = run_stage(room, "decontaminate", decontaminate_part, items, version=DECONTAMINATE_VERSION)
    partial = told.with_name(f".{CONTAMINATION}.partial")
    with open(partial, "wb") as file:
        for finished in cleaned:
            file.write((finished.directory / CONTAMINATION).read_bytes())
    partial.replace(told)
    stage("decontaminate", {"against": index.counts, **combined(finished.counts for finished in cleaned)})
    return _parts_of(cleaned)


def _parts_of(finished: Sequence[Finished]) -> list[Part]:
    return [
        Part(docs=f.directory / DOCS, num_documents=f.counts["documents"], num_bytes=f.counts["text_bytes"])
        for f in finished
    ]


# ------------------------------------------------------------------------------------------------------ tokens, shards
def write_shards(
    room: Room,
    recipe: DataConfig,
    tokenizer_path: Path,
    result: DataResult,
    stage: Callable[[str, dict[str, Any]], None],
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    settings = {"seed": recipe.seed, "by": list(recipe.mixture.by), "val_fraction": recipe.shards.val_fraction}
    items = [
        {
            "docs": [str(part.docs) for part in parts],
            "tokenizer": str(tokenizer_path.absolute()),
            "fingerprint": tokenizer.fingerprint,
            **settings,
            "bytes": sum(part.num_bytes for part in parts),
        }
        for parts in _together(result.parts, int(recipe.part_mb * 1e6))
    ]
    encoded = run_stage(room, "tokens", encode_part, items, version=TOKENS_VERSION, alone_bytes=ALONE_BYTES)
    runs, documents, available = _runs_of_groups(encoded)
    counts = combined({k: v for k, v in finished.counts.items() if k != "runs"} for finished in encoded)
    counts["groups"] = {group: {"documents": documents[group], "tokens": available[group]} for group in sorted(runs)}
    stage("tokens", counts)

    plan = plan_mixture({group: tokens for group, tokens in available.items() if group != VALIDATION}, recipe.mixture)
    wanted = [group for group in sorted(runs) if group == VALIDATION or plan.tokens.get(group, 0) > 0]
    pieces: list[tuple[str, dict[str, Any]]] = []
    for group in wanted:
        for low, high in shard_ranges(available[group], recipe.shards.shard_tokens):
            size = available[group] * (high - low) * 4 >> 64
            table = {"runs": runs[group], "low": str(low), "high": str(high), "vocab_size": tokenizer.vocab_size}
            pieces.append((group, {**table, "bytes": size}))
    written = run_stage(
        room, "shards", write_piece, [item for _, item in pieces], version=TOKENS_VERSION, alone_bytes=ALONE_SHARD_BYTES
    )

    made: dict[str, list[tuple[Path, ShardRecord]]] = {group: [] for group in wanted}
    for (group, _), finished in zip(pieces, written, strict=True):
        if finished.counts["record"] is not None:
            made[group].append((finished.directory, ShardRecord(**finished.counts["record"])))
    folders = folder_names([group for group in wanted if group != VALIDATION])
    train, val = recipe.out / "shards" / "train", recipe.out / "shards" / "val"
    train.mkdir(parents=True, exist_ok=True)
    _remove_others(train, set(folders.values()))
    for group, records in made.items():
        assemble(
            val if group == VALIDATION else train / folders[group],
            records,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            shard_tokens=recipe.shards.shard_tokens,
            config={**settings, "group": group or "validation"},
        )
    if VALIDATION not in made:
        shutil.rmtree(val, ignore_errors=True)
    write_mixture(train, plan, folders, settings)
    result.mixture, result.train, result.val = plan, train, val if VALIDATION in made else None
    stage(
        "mixture",
        {
            "available": plan.available,
            "tokens": plan.tokens,
            "epochs": plan.epochs,
            "phases": [{"name": p.name, "tokens": p.tokens, "targets": p.targets} for p in plan.phases],
            "shards": sum(len(records) for records in made.values()),
            "val_tokens": available.get(VALIDATION, 0),
        },
    )


def _together(parts: Sequence[Part], part_bytes: int) -> list[list[Part]]:
    """Neighbouring parts in lots of at most `part_bytes` of text; little is left of many."""
    lots: list[list[Part]] = []
    size = 0
    for part in parts:
        if not part.num_documents:
            continue
        if not lots or size + part.num_bytes > part_bytes:
            lots.append([])
            size = 0
        lots[-1].append(part)
        size += part.num_bytes
    return lots


def _runs_of_groups(
    encoded: Sequence[Finished],
) -> tuple[dict[str, list[list[Any]]], dict[str, int], dict[str, int]]:
    """Group -> where its documents lie, as [stem, first, documents]; its documents; its tokens."""
    runs: dict[str, list[list[Any]]] = {}
    documents: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for finished in encoded:
        for number, groups in enumerate(finished.counts["runs"]):
            first = 0
            for group, num_documents, num_tokens in groups:
                runs.setdefault(group, []).append([str(finished.directory / f"{number:03d}"), first, num_documents])
                documents[group] = documents.get(group, 0) + num_documents
                tokens[group] = tokens.get(group, 0) + num_tokens
                first += num_documents
    return runs, documents, tokens


def _remove_others(directory: Path, wanted: set[str]) -> None:
    """Shards of groups that an earlier recipe had."""
    for path in directory.iterdir():
        if path.is_dir() and path.name not in wanted:
            shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------------------- counts
def combined(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of items added up: numbers and tables of numbers; lists are put together up to 100 entries."""
    total: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            if isinstance(value, Mapping):
                total[key] = combined([total.get(key, {}), value])
            elif isinstance(value, list):
                total[key] = [*total.get(key, []), *value][:100]
            elif isinstance(value, (int, float)):
                total[key] = total.get(key, 0) + value
    return dict(sorted(total.items())) if all(isinstance(v, (int, float)) for v in total.values()) else total


def _small(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in counts.items() if not isinstance(value, list)}


def _why(counts: Mapping[str, Any]) -> str:
    reasons = {**counts.get("reasons", {}), **counts.get("skip_reasons", {})}
    shown = sorted(reasons.items(), key=lambda entry: -entry[1])[:5]
    return ", ".join(f"{count:,} {reason}" for reason, count in shown) or "there was none"


def _join_skipped(out: Path, prepared: Sequence[Finished], problems: Sequence[Skipped]) -> None:
    """One file with everything that was not read."""
    partial = out / f".{SKIPPED}.partial"
    with open(partial, "wb") as file:
        for problem in problems:
            file.write((json.dumps({"id": problem.id, "reason": problem.reason}) + "\n").encode())
        for finished in prepared:
            file.write((finished.directory / SKIPPED).read_bytes())
    partial.replace(out / SKIPPED)
