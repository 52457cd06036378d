"""The demo's evaluation: bits per byte beside compressors, answers before and after fine-tuning, the saved model.

Everything is asked of the models as they lie on disk, through the generator that `qwench chat` uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qwench.data.documents import read_documents
from qwench.data.mixture import MixedShards
from qwench.data.shards import TokenShards
from qwench.demo.config import DemoConfig
from qwench.demo.conversations import Conversation, docs_conversations, is_correct, manners_conversations, obeys, sums
from qwench.demo.pipeline import Context, Results
from qwench.engine import Engine
from qwench.evals.ask import Answer, ask, share
from qwench.evals.compression import compressor_bits, model_bits, unigram_bits
from qwench.model.load import load_model
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer
from qwench.types import SamplingParams

ANSWER_TOKENS = 48
"""Longest answer in the evaluation; the worked form of a sum takes about 25."""


def evaluate(context: Context) -> Results:
    compression = compare_compression(context)
    questions = evaluation_conversations(context)
    before, after = (answer_all(context, questions, run) for run in ("pretrain", "sft"))
    scores = {name: score(context.cfg, questions, answers) for name, answers in (("before", before), ("after", after))}
    own, best = compression["model"], compression["xz -9e"]
    return {
        "summary": f"{own:.3f} bits a byte on held-out text (xz {best:.3f}); held-out sums right "
        f"{scores['before']['sums']:.0%} before, {scores['after']['sums']:.0%} after fine-tuning",
        "bits_per_byte": compression,
        "scores": scores,
        "samples": samples(questions, before, after),
    }


def compare_compression(context: Context) -> dict[str, float]:
    """Bits a byte of the same held-out documents for every predictor."""
    tokenizer = Tokenizer.load(context.path("tokenizer"))
    held_out = TokenShards.open(context.path("shards", "held_out"), tokenizer.fingerprint)
    stream = held_out.tokens(0, held_out.num_tokens)
    model = load_model(context.path("pretrain"))
    texts = [document.text for document in read_documents([context.path("corpus", "held_out.jsonl")])]
    training = MixedShards.open(context.path("data", "shards", "train"), tokenizer.fingerprint)
    counts = unigram_counts(training, tokenizer.vocab_size)
    bits = {
        "model": model_bits(model, stream, context.cfg.pretrain.seq_len),
        **compressor_bits(texts),
        "token unigram": unigram_bits(counts, stream),
    }
    num_bytes = sum(len(text.encode()) for text in texts)
    return {name: value / num_bytes for name, value in bits.items()}


def unigram_counts(mixture: MixedShards, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for shards in mixture.shards.values():
        for start in range(0, shards.num_tokens, 1 << 22):
            counts += np.bincount(shards.tokens(start, min(start + (1 << 22), shards.num_tokens)), minlength=vocab_size)
    return counts


def evaluation_conversations(context: Context) -> list[Conversation]:
    """Questions that no training conversation contains, except that manners come from a small fixed set."""
    cfg = context.cfg
    seen = context.path("conversations", "train.jsonl").read_text(encoding="utf-8")
    held_out = read_documents([context.path("corpus", "held_out.jsonl")])
    docs = [c for c in docs_conversations(held_out, 12, cfg.seed + 1) if c.response not in seen]
    return [
        *sums(cfg.eval_sums, cfg.seed + 1, max_digits=cfg.sft.max_digits, form=cfg.sft.sum_form, held_out=True),
        *docs[:6],
        *manners_conversations(30, cfg.seed + 1),
    ]


def answer_all(context: Context, questions: Sequence[Conversation], run: str) -> list[Answer]:
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    title = {"pretrain": "asking the base model", "sft": "asking the chat model"}[run]
    with Engine(context.path(run)) as engine:
        return ask(engine, engine.tokenizer, [question.prompt for question in questions], params, title)


def score(cfg: DemoConfig, questions: Sequence[Conversation], answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right sums, of obeyed forms over all tasks, and of right short answers."""

    def part(wanted: set[str], check: Any) -> float:
        chosen = [(q, a) for q, a in zip(questions, answers, strict=True) if q.task in wanted]
        return share([a for _, a in chosen], lambda i, completion: check(chosen[i][0], completion))

    everything = {question.task for question in questions}
    return {
        "sums": part({"sum"}, lambda q, c: is_correct(q, c.text)),
        "form": part(everything, lambda q, c: obeys(q.task, c.text, c.finish_reason, form=cfg.sft.sum_form)),
        "short answers": part({"one_word", "json", "greeting"}, lambda q, c: is_correct(q, c.text)),
    }


def samples(questions: Sequence[Conversation], before: Sequence[Answer], after: Sequence[Answer]) -> list[Results]:
    """A few questions of every task with both answers."""
    shown: dict[str, int] = {}
    table = []
    for question, old, new in zip(questions, before, after, strict=True):
        shown[question.task] = shown.get(question.task, 0) + 1
        if shown[question.task] <= 4:
            table.append(
                {
                    "task": question.task,
                    "question": old.question,
                    "before": old.completion.text,
                    "after": new.completion.text,
                    "wanted": question.response,
                    "right": is_correct(question, new.completion.text),
                }
            )
    return table


def export(context: Context) -> Results:
    """Save the chat model as a Hugging Face directory, load it again, and compare the logits bit by bit."""
    directory = context.path("model")
    model, tokenizer = load_model(context.path("sft"), dtype="auto"), Tokenizer.load(context.path("sft", "model"))
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 256}
    save_pretrained(model, directory, tokenizer=tokenizer, generation_config=generation)
    ids = torch.tensor([tokenizer.render([{"role": "user", "content": "What is 12 + 34?"}])])
    again = load_model(directory, dtype="auto")
    difference = float((again.logits(ids) - model.logits(ids)).abs().max())
    if difference != 0:
        raise AssertionError(f"the saved model's logits differ by {difference} after loading")
    files = sorted(path.name for path in directory.iterdir())
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {
        "summary": f"{directory} ({size / 1e6:.1f} MB), reloaded with equal logits",
        "files": files,
        "bytes": size,
        "config": json.loads((directory / "config.json").read_text(encoding="utf-8")),
    }
