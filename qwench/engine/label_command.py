"""`qwench classifier label`: documents judged by a language model, as labels for `qwench classifier train`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qwench.data.documents import read_documents, write_documents
from qwench.data.llm_filter import HIGHEST, LOWEST, LLMJudge
from qwench.data.scoring import in_batches
from qwench.engine.config import EngineConfig
from qwench.engine.engine import Engine
from qwench.ops.hardware import pick_device, pick_dtype
from qwench.run import progress
from qwench.types import Document


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="qwench classifier label", description=__doc__)
    parser.add_argument("model", help="instruction-tuned: Hugging Face directory, GGUF file, or qwench run")
    parser.add_argument("inputs", type=Path, nargs="+", help="documents")
    parser.add_argument("--out", type=Path, required=True, help='JSON lines with fields "text", "label" and "domain"')
    parser.add_argument("--most", type=int, default=10_000, help="documents that are judged at most (10000)")
    parser.add_argument("--min-score", type=float, default=3.0, help="mean score from which on the label is good (3)")
    parser.add_argument("--max-chars", type=int, default=3000, help="of a document that the model reads (3000)")
    parser.add_argument("--batch", type=int, default=64, help="documents that are computed together")
    args = parser.parse_args(argv)
    if not LOWEST <= args.min_score <= HIGHEST:
        raise ValueError(f"--min-score is {args.min_score}; give a number from {LOWEST} to {HIGHEST}")
    if min(args.most, args.batch, args.max_chars) < 1:
        raise ValueError("--most, --batch and --max-chars are positive")
    documents = itertools.islice(read_documents(args.inputs), args.most)
    dtype = str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    with Engine(args.model, "auto", dtype, None, EngineConfig()) as engine, progress() as bar:
        judge = LLMJudge(None, engine.tokenizer, max_chars=args.max_chars)
        task = bar.add_task("judging", total=None)
        counts: Counter[str] = Counter()

        def judged() -> Iterator[Document]:
            for batch in in_batches(documents, args.batch):
                prompts = [judge.request(document.text) for document in batch]
                answers = engine.generate(prompts, judge.params, lambda number: bar.advance(task, number))
                for document, answer in zip(batch, answers, strict=True):
                    try:
                        judgement = judge.parse(answer)
                    except ValueError:
                        counts["without an answer"] += 1
                        continue
                    label = "good" if judgement.mean >= args.min_score else "bad"
                    counts[label] += 1
                    told = {"label": label, "domain": judgement.domain, "scores": dict(judgement.scores)}
                    yield dataclasses.replace(document, meta={**document.meta, **told})

        written = write_documents(args.out, judged())
    shown = ", ".join(f"{count:,} {label}" for label, count in counts.most_common())
    print(f"judged {written:,} documents ({shown}) in {args.out}", file=sys.stderr)
    return 0
