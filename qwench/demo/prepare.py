"""The demo's data stages: collect text, clean it, learn a tokenizer, write token shards and conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwench import config
from qwench.data.dedup import DedupSettings
from qwench.data.documents import Skipped, read_documents, write_documents
from qwench.data.encode import encode_documents
from qwench.data.mixture import MixtureConfig
from qwench.data.pipeline.parts import read_part
from qwench.data.pipeline.recipe import DataConfig, SourceConfig
from qwench.data.pipeline.report import write_report as write_data_report
from qwench.data.pipeline.stages import DataResult, run_pipeline
from qwench.data.prepare import LanguageRules, PrepareRules
from qwench.demo.conversations import Conversation, sums, training_conversations
from qwench.demo.corpus import Found, read_corpus
from qwench.demo.pipeline import Context, Results
from qwench.run import Run, write_atomically
from qwench.tokenizer import Tokenizer, train
from qwench.types import Document

CHAT_FORMAT = "qwen2.5-base"
"""Qwen2.5's template with the short default system prompt."""
HELD_OUT = "held_out"
RULES = PrepareRules(
    language=LanguageRules(min_score=0.0, min_scores={}),
    curated_kinds=(*PrepareRules().curated_kinds, "multilingual", "web", ""),
)
"""The texts were chosen by hand, so the rules for crawls leave them alone."""
START_PROCESSES_MB = 1e4
"""Never: the demo's few megabytes are cleaned in the time that starting processes for a dozen stages takes."""


# ------------------------------------------------------------------------------------------------------------- corpus
def collect(context: Context) -> Results:
    found: list[Found] = []
    skipped: list[Skipped] = []
    documents = read_corpus(context.cfg.corpus_bytes, data=context.cfg.data, found=found, skipped=skipped)
    count = write_documents(context.path("corpus", "raw.jsonl"), documents)
    size = sum(entry.num_bytes for entry in found)
    sources = [
        {"source": f.source, "kind": f.kind, "documents": f.num_documents, "bytes": f.num_bytes}
        for f in found
        if f.num_documents
    ]
    return {
        "summary": f"{count:,} documents, {size / 1e6:.1f} MB from {len(sources)} sources",
        "sources": sources,
        "documents": count,
        "bytes": size,
        "skipped": [{"path": s.id, "reason": s.reason} for s in skipped[:50]],
        "num_skipped": len(skipped),
    }


def clean(context: Context) -> Results:
    """Clean, drop duplicates, and keep some documents away from training; all by `qwench data`."""
    raw = read_documents([context.path("corpus", "raw.jsonl")])
    # Documents on the same subject (a module's source and its reference page) stay on the same side.
    pool = sorted(raw, key=lambda d: (hashlib.sha256(subject(d).encode()).digest(), d.id))
    held_out, training = split_held_out(pool, context.cfg.held_out_bytes)
    sources: dict[str, list[Document]] = {HELD_OUT: [_marked(document) for document in held_out]}
    for document in training:
        sources.setdefault(document.kind or "text", []).append(document)
    for name, documents in sources.items():
        write_documents(context.path("corpus", "raw", f"{name}.jsonl"), documents)
    result, seconds = run_data(context, data_recipe(context, sorted(sources)))
    sides: dict[str, list[Document]] = {HELD_OUT: [], "train": []}
    for part in result.parts:
        for document in read_part(part.docs):
            sides[HELD_OUT if document.source == HELD_OUT else "train"].append(document)
    sizes, kinds = {}, Counter[str]()
    for side, members in sides.items():
        if not members:
            raise ValueError(f"no document is left in {side}; see {result.out / 'report.html'}, and give more text")
        write_documents(context.path("corpus", f"{side}.jsonl"), members)
        sizes[side] = sum(len(document.text.encode()) for document in members)
    for document in sides["train"]:
        kinds[document.source] += len(document.text.encode())
    prepare, dedup = result.summary["prepare"], result.summary["dedup"]
    duplicates = {
        "duplicate document": dedup.get("exact_duplicate", 0),
        "near duplicate": dedup.get("near_duplicate", 0),
        "document with repeated paragraphs": dedup.get("cut_documents", 0),
    }
    counts = ", ".join(f"{count} {reason}{'' if count == 1 else 's'}" for reason, count in list(duplicates.items())[:2])
    return {
        "summary": f"{len(sides['train']):,} documents to learn ({sizes['train'] / 1e6:.1f} MB), "
        f"{len(sides[HELD_OUT])} held out ({sizes[HELD_OUT] / 1e3:.0f} kB); dropped {prepare['dropped']} by rules, "
        f"{counts}",
        "sources": sorted(sources),
        "train_documents": len(sides["train"]),
        "train_bytes": sizes["train"],
        "held_out_documents": len(sides[HELD_OUT]),
        "held_out_bytes": sizes[HELD_OUT],
        "kinds": dict(kinds),
        "reasons": prepare["reasons"] | {name: count for name, count in duplicates.items() if count},
        "mb_per_s": prepare["text_bytes"] / 1e6 / max(seconds, 1e-9),
    }


def _marked(document: Document) -> Document:
    """With a number by which it is preferred to its duplicates (`DedupSettings.prefer`)."""
    return dataclasses.replace(document, meta={**document.meta, HELD_OUT: 1})


def data_recipe(context: Context, sources: Sequence[str], tokenizer: Path | None = None) -> DataConfig:
    """What `qwench data` does for the demo.

    A held-out document stays whatever it duplicates, and a paragraph that it shares with training text (a licence, say)
    is cut there: so it is learnt nowhere.
    """
    return DataConfig(
        out=context.path("data").absolute(),
        sources={
            name: SourceConfig(paths=(str(context.path("corpus", "raw", f"{name}.jsonl").absolute()),))
            for name in sources
        },
        tokenizer=tokenizer.absolute() if tokenizer is not None else None,
        start_processes_mb=START_PROCESSES_MB,
        rules=RULES,
        dedup=DedupSettings(prefer=(HELD_OUT, "chars")),
        mixture=MixtureConfig(by=("source",), weights={HELD_OUT: 0.0}, max_epochs=1.0),
    )


def run_data(context: Context, recipe: DataConfig) -> tuple[DataResult, float]:
    """Run `qwench data` with its report, and how many seconds that took; what an earlier call finished is kept."""
    path = context.path("recipes", "data.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config.dump(recipe))
    started = time.perf_counter()
    with Run(recipe.out, recipe, "data", "force") as run:
        run.write_provenance()
        result = run_pipeline(recipe, record=run.record, quiet=True)
    seconds = time.perf_counter() - started
    write_data_report(recipe.out)
    return result, seconds


def subject(document: Document) -> str:
    """Id without the kind of source and without the number of a piece: "docstrings/os.py" and "python/os.py" agree."""
    return document.id.partition("/")[2].rpartition(":")[0] or document.id.partition("/")[2] or document.id


def split_held_out(documents: Sequence[Document], held_out_bytes: int) -> tuple[list[Document], list[Document]]:
    """Whole subjects from the front until `held_out_bytes` (at most a tenth of all), and the rest for training."""
    total = sum(len(document.text.encode()) for document in documents)
    budget = min(held_out_bytes, total // 10)
    taken, last = 0, None
    for place, document in enumerate(documents):
        if taken >= budget and subject(document) != last:
            return list(documents[:place]), list(documents[place:])
        taken += len(document.text.encode())
        last = subject(document)
    raise ValueError(
        f"the corpus has {len(documents)} documents ({total:,} bytes), too few to keep some away from training; "
        "give more text"
    )


def training_documents(context: Context) -> Iterator[Document]:
    return read_documents([context.path("corpus", "train.jsonl")])


def learn_tokenizer(context: Context) -> Results:
    texts = (document.text for document in training_documents(context))
    tokenizer = train(texts, context.cfg.vocab_size, chat_format=CHAT_FORMAT)
    tokenizer.save(context.path("tokenizer"))
    pieces = (tokenizer.token_bytes(i).decode("utf-8", "replace") for i in range(256, tokenizer.num_regular))
    longest = sorted((piece for piece in pieces if any(c.isalpha() for c in piece)), key=len)[-12:]
    return {
        "summary": f"{tokenizer.vocab_size} ids, {len(tokenizer.special_ids)} of them control tokens; "
        f"encoding by {tokenizer.backend}",
        "vocab_size": tokenizer.vocab_size,
        "backend": tokenizer.backend,
        "longest": longest,
    }


def write_shards(context: Context) -> Results:
    """The mixture of training shards by `qwench data`, which goes on where `clean` ended; the held-out shards."""
    tokenizer = Tokenizer.load(context.path("tokenizer"))
    recipe = data_recipe(context, context.results["clean"]["sources"], context.path("tokenizer"))
    result, _ = run_data(context, recipe)
    assert result.mixture is not None
    held_out = read_documents([context.path("corpus", f"{HELD_OUT}.jsonl")])
    tokens = {
        "train": sum(result.mixture.tokens.values()),
        HELD_OUT: encode_documents(held_out, tokenizer, context.path("shards", HELD_OUT)).num_tokens,
    }
    held_out_bytes = context.results["clean"]["held_out_bytes"]
    return {
        "summary": f"{tokens['train']:,} tokens to learn, {held_out_bytes / tokens[HELD_OUT]:.2f} bytes a token",
        "train_tokens": tokens["train"],
        "held_out_tokens": tokens[HELD_OUT],
        "bytes_per_token": held_out_bytes / tokens[HELD_OUT],
    }


def write_conversations(context: Context) -> Results:
    cfg, stage = context.cfg, context.cfg.sft
    documents = list(training_documents(context))
    training = training_conversations(
        documents,
        seed=cfg.seed,
        num_sums=stage.num_sums,
        num_docs=stage.num_docs,
        num_manners=stage.num_manners,
        max_digits=stage.max_digits,
        form=stage.sum_form,
    )
    held_out = list(sums(256, cfg.seed, max_digits=stage.max_digits, form=stage.sum_form, held_out=True))
    for name, conversations in (("train", training), ("val", held_out)):
        _write_jsonl(context.path("conversations", f"{name}.jsonl"), conversations)
    tasks = Counter(conversation.task for conversation in training)
    shown = {task: next(c for c in training if c.task == task) for task in tasks}
    return {
        "summary": f"{len(training):,} conversations: " + ", ".join(f"{n:,} {task}" for task, n in tasks.most_common()),
        "tasks": dict(tasks),
        "examples": [{"task": t, "question": c.prompt[-1].content, "answer": c.response} for t, c in shown.items()],
    }


def _write_jsonl(path: Path, conversations: Sequence[Conversation]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"messages": [{"role": m.role, "content": m.content} for m in c.messages]}, ensure_ascii=False)
        for c in conversations
    )
    write_atomically(path, "".join(line + "\n" for line in lines))
