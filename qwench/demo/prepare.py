"""The demo's data stages: collect text, clean it, learn a tokenizer, write token shards and conversations."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwench.data.dedup import Duplicate, deduplicate, deduplicate_paragraphs
from qwench.data.documents import Skipped, read_documents, write_documents
from qwench.data.encode import encode_documents
from qwench.data.text import Dropped, clean_documents
from qwench.demo.conversations import Conversation, sums, training_conversations
from qwench.demo.corpus import Found, read_corpus
from qwench.demo.pipeline import Context, Results
from qwench.run import write_atomically
from qwench.tokenizer import Tokenizer, train
from qwench.types import Document

CHAT_FORMAT = "qwen2.5-base"
"""Qwen2.5's template with the short default system prompt."""


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
    """Clean, drop exact duplicates, and keep some documents away from training."""
    dropped: list[Dropped] = []
    duplicates: list[Duplicate] = []
    paragraphs: list[Duplicate] = []
    documents = read_documents([context.path("corpus", "raw.jsonl")])
    kept = deduplicate(clean_documents(documents, dropped=dropped), duplicates)
    # Documents on the same subject (a module's source and its reference page) stay on the same side.
    pool = sorted(kept, key=lambda d: (hashlib.sha256(subject(d).encode()).digest(), d.id))
    held_out, training = split_held_out(pool, context.cfg.held_out_bytes)
    # Held-out text comes first, so that a paragraph it shares with training text (a licence, say) is learnt nowhere.
    distinct = list(deduplicate_paragraphs([*held_out, *training], paragraphs))
    held_out_ids = {document.id for document in held_out}
    sides: dict[str, list[Document]] = {"held_out": [], "train": []}
    for document in distinct:
        sides["held_out" if document.id in held_out_ids else "train"].append(document)
    sizes = {}
    for side, members in sides.items():
        write_documents(context.path("corpus", f"{side}.jsonl"), members)
        sizes[side] = sum(len(document.text.encode()) for document in members)
    kinds = Counter[str]()
    for document in sides["train"]:
        kinds[document.kind or "text"] += len(document.text.encode())
    reasons = Counter(entry.verdict.reason for entry in dropped)
    return {
        "summary": f"{len(sides['train']):,} documents to learn ({sizes['train'] / 1e6:.1f} MB), "
        f"{len(sides['held_out'])} held out ({sizes['held_out'] / 1e3:.0f} kB); dropped {len(dropped)} by rules, "
        f"{len(duplicates)} duplicates, {len(paragraphs)} repeated paragraphs",
        "train_documents": len(sides["train"]),
        "train_bytes": sizes["train"],
        "held_out_documents": len(sides["held_out"]),
        "held_out_bytes": sizes["held_out"],
        "kinds": dict(kinds),
        "reasons": dict(reasons) | {"duplicate document": len(duplicates), "repeated paragraph": len(paragraphs)},
    }


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
    tokenizer = Tokenizer.load(context.path("tokenizer"))
    counts = {}
    for side in ("train", "held_out"):
        documents = read_documents([context.path("corpus", f"{side}.jsonl")])
        counts[side] = encode_documents(documents, tokenizer, context.path("shards", side)).num_tokens
    held_out_bytes = context.results["clean"]["held_out_bytes"]
    return {
        "summary": f"{counts['train']:,} tokens to learn, {held_out_bytes / counts['held_out']:.2f} bytes a token",
        "train_tokens": counts["train"],
        "held_out_tokens": counts["held_out"],
        "bytes_per_token": held_out_bytes / counts["held_out"],
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
