"""Documents to token shards on all cores: `qwench tokenizer encode` [Qwen TR 2.1, step 8].

Text goes to worker processes in batches and comes back in order, so the shards are the same bytes for any number of
workers. What is in flight is bounded, four megabytes a worker. An interrupted run (kill -9, power failure) goes on
after the last finished shard when the same command runs again: the documents before it are read again but not encoded,
and a running digest tells whether they are still the same.

The tokenizer is `qwench.tokenizer.Tokenizer`; text that looks like a control token is encoded as plain text.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwench.data.dedup import Duplicate, deduplicate
from qwench.data.documents import InputPosition, Skipped, read_documents
from qwench.data.shards import ShardWriter
from qwench.data.text import Dropped, clean_documents
from qwench.tokenizer import Tokenizer
from qwench.types import Document

_BATCH_CHARS = 1 << 20
_ALONE_S = 5.0
"""Seconds of encoding after which an input counts as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What came out: directories of shards and their counts. `val` is None without validation documents."""

    train: Path
    val: Path | None
    num_documents: int
    num_tokens: int
    num_val_documents: int
    num_val_tokens: int


@dataclass(slots=True)
class _Batch:
    """Consecutive documents on their way through a worker."""

    texts: list[str]
    writers: list[ShardWriter]
    digests: list[str]
    num_chars: int = 0


def encode_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    workers: int | None = None,
    val_fraction: float = 0.0,
    shard_tokens: int = 1 << 26,
    config: Mapping[str, Any] | None = None,
    position: InputPosition | None = None,
) -> Encoded:
    """Encode every document, <|endoftext|> appended, into shards below `out`.

    Without `val_fraction` the shards lie in `out` itself; with it (0 < f <= 0.5) in `out/train` and `out/val`, where
    every (1/f)-th document goes to val, starting halfway to the first. `workers` is the number of processes, all cores
    by default; this one does everything if it is 1 or the input short. `config` is written to the manifest.
    `position`, that of the reader, turns on a progress bar on stderr.

    Raises ValueError if there is no document, if `out` holds shards of other settings or of other documents.
    """
    if not 0 <= val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}; give a number between 0 and 0.5")
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    out = Path(out)
    settings = {**(config or {}), "val_fraction": val_fraction}
    splits = [
        _Split(
            ShardWriter(
                out / name if val_fraction else out,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                shard_tokens=shard_tokens,
                config={**settings, "split": name},
                resume=True,
            )
        )
        for name in (("train", "val") if val_fraction else ("train",))
    ]
    try:
        batches = _batches(documents, splits, val_fraction)
        with _progress_bar(position) as advance:
            for batch, tokens, lengths in _encode_batches(batches, tokenizer, workers):
                end = 0
                for writer, digest, length in zip(batch.writers, batch.digests, lengths.tolist(), strict=True):
                    writer.add(tokens[end : end + length], digest)
                    end += length
                advance()
        if not any(split.count for split in splits):
            raise ValueError("there are no documents to encode; give files or folders with text")
        for split in splits:
            split.check_complete()
    except BaseException:
        for split in splits:
            split.writer.abandon()
        raise
    # A validation part without documents leaves an empty directory with a manifest: the run is complete all the same.
    for split in splits:
        split.writer.close()
    train, val = splits[0].writer, splits[-1].writer if val_fraction else None
    return Encoded(
        train=train.directory,
        val=val.directory if val and val.num_documents else None,
        num_documents=train.num_documents,
        num_tokens=train.num_tokens,
        num_val_documents=val.num_documents if val else 0,
        num_val_tokens=val.num_tokens if val else 0,
    )


class _Split:
    """The documents of one writer in order, the first of which may be in finished shards already."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self.done = writer.num_documents
        self.count = 0
        self._digest = hashlib.sha256()

    def take(self, document: Document) -> str | None:
        """The running digest if the document is to be encoded, None if it is safe on disk."""
        self.count += 1
        text = document.text.encode("utf-8", "surrogatepass")
        self._digest.update(len(text).to_bytes(8, "little") + text)
        if self.count > self.done and not self.writer.finished:
            return self._digest.hexdigest()
        if self.count > self.done or (
            self.count == self.done and self._digest.hexdigest() != self.writer.source_digest
        ):
            raise self._changed()
        return None

    def check_complete(self) -> None:
        if self.count < self.done:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.writer.directory} holds shards of other documents than these; give another directory, or delete it "
            f"to encode again"
        )


def _batches(documents: Iterable[Document], splits: list[_Split], val_fraction: float) -> Iterator[_Batch]:
    batch = _Batch([], [], [])
    for number, document in enumerate(documents):
        to_val = math.floor((number + 1) * val_fraction + 0.5) > math.floor(number * val_fraction + 0.5)
        split = splits[1 if to_val else 0]
        digest = split.take(document)
        if digest is None:
            continue
        batch.texts.append(document.text)
        batch.writers.append(split.writer)
        batch.digests.append(digest)
        batch.num_chars += len(document.text)
        if batch.num_chars >= _BATCH_CHARS or len(batch.texts) >= 4096:
            yield batch
            batch = _Batch([], [], [])
    if batch.texts:
        yield batch


# ---------------------------------------------------------------------------------------------------------- processes
@dataclass(slots=True)
class _Job:
    batch: _Batch
    result: tuple[np.ndarray, np.ndarray] | None = None


def _encode_batches(
    batches: Iterator[_Batch], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """(batch, tokens of all its documents end to end, length of each), in order.

    This process is one of the workers: a batch goes to another that is idle, or else is encoded here. The others need
    seconds to make their encoders and are started only when the input turns out to be long, so that asking for many
    workers makes no input slower.
    """
    begin = time.monotonic()
    crew: list[_Worker] = []
    pending: deque[_Job] = deque()
    try:
        for batch in batches:
            if workers > 1 and not crew and time.monotonic() - begin > _ALONE_S:
                crew = [_Worker(tokenizer) for _ in range(workers - 1)]
            for worker in crew:
                worker.collect()
            job = _Job(batch)
            idle = next((worker for worker in crew if worker.idle), None)
            if idle is not None:
                idle.start(job)
            else:
                job.result = _encode_texts(tokenizer, batch.texts)
            pending.append(job)
            yield from _finished(pending, crew, at_most=4 * workers)
        yield from _finished(pending, crew, at_most=0)
    finally:
        for worker in crew:
            worker.stop()


def _finished(
    pending: deque[_Job], crew: list[_Worker], at_most: int
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """Results from the front of the queue, waiting for them while more than `at_most` are in it."""
    while pending and (pending[0].result is not None or len(pending) > at_most):
        while pending[0].result is None:
            next(worker for worker in crew if worker.job is pending[0]).collect(wait=True)
        job = pending.popleft()
        assert job.result is not None
        yield job.batch, *job.result


class _Worker:
    """A process with a tokenizer at the other end of a pipe. It ends when the pipe does, whoever dies first.

    It has one job at a time: with two, both sides could wait for the other to empty the pipe.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # "spawn": a forked child would inherit locks held by other threads
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(tokenizer, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._loaded = False
        self.job: _Job | None = None

    @property
    def idle(self) -> bool:
        return self._loaded and self.job is None

    def start(self, job: _Job) -> None:
        try:
            self._pipe.send(job.batch.texts)
        except OSError:
            raise self._died() from None
        self.job = job

    def collect(self, wait: bool = False) -> None:
        """Take what the process has to say, if anything; with `wait`, until it says something."""
        try:
            if not wait and (self.idle or not self._pipe.poll()):
                return
            result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if self.job is not None:
            self.job.result, self.job = result, None
        self._loaded = True

    def _died(self) -> OSError:
        return OSError(
            "a worker process died, perhaps for lack of memory; run the same command again to go on, with fewer workers"
        )

    def stop(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _work(tokenizer: Tokenizer, pipe: Connection) -> None:
    """The life of a worker: make the encoder, say so with an empty result, then texts in and tokens out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is the starting process's to handle
    try:
        pipe.send(_encode_texts(tokenizer, ["ready"]))
        while True:
            pipe.send(_encode_texts(tokenizer, pipe.recv()))
    except (EOFError, OSError):
        return


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts end to end, each closed by <|endoftext|>, and the number of tokens of each."""
    end = np.array([tokenizer.eod_id], np.int32)
    parts: list[np.ndarray] = []
    # One thread: processes do the scaling
    for ids in tokenizer.encode_batch(texts, num_threads=1):
        parts += [ids, end]
    lengths = np.array([len(ids) + 1 for ids in parts[::2]], np.int64)
    return np.concatenate(parts), lengths


@contextmanager
def _progress_bar(position: InputPosition | None) -> Iterator[Callable[[], None]]:
    """A bar over the reader's position, as a function to call after each batch; nothing is shown without position."""
    columns = (BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("encoding"), *columns, console=Console(stderr=True), disable=position is None) as progress:
        task = progress.add_task("encoding", total=position.total_bytes if position else None)

        def advance() -> None:
            if position is not None:
                progress.update(task, completed=position.done_bytes)

        yield advance


# ------------------------------------------------------------------------------------------------------- command line
def main(argv: list[str]) -> int:
    """`qwench tokenizer encode`."""
    parser = argparse.ArgumentParser(
        prog="qwench tokenizer encode",
        description="Encode documents into memory-mapped token shards. Run the same command again to go on after an "
        "interruption.",
    )
    parser.add_argument(
        "input", nargs="+", help="files or folders: text, source code, HTML, .jsonl(.gz/.zst), .parquet"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer directory, tokenizer.json, qwen.tiktoken or GGUF")
    parser.add_argument("--out", required=True, type=Path, help="directory for the shards")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share of documents for OUT/val (default: 0)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="tokens in a shard (default: %(default)s)")
    parser.add_argument("--text-field", help="field of JSON lines and Parquet with the text (default: text or content)")
    parser.add_argument("--clean", action="store_true", help="clean the texts and drop what is no text")
    parser.add_argument("--deduplicate", action="store_true", help="drop documents equal to an earlier one")
    arguments = parser.parse_args(argv)

    skipped: list[Skipped] = []
    dropped: list[Dropped] = []
    duplicates: list[Duplicate] = []
    position = InputPosition()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    fields = (arguments.text_field,) if arguments.text_field else ("text", "content")
    documents = read_documents(arguments.input, text_field=fields, skipped=skipped, position=position)
    if arguments.clean:
        documents = clean_documents(documents, dropped=dropped)
    if arguments.deduplicate:
        documents = deduplicate(documents, duplicates)
    result = encode_documents(
        documents,
        tokenizer,
        arguments.out,
        workers=arguments.workers,
        val_fraction=arguments.val_fraction,
        shard_tokens=arguments.shard_tokens,
        config={"text_field": list(fields), "clean": arguments.clean, "deduplicate": arguments.deduplicate},
        position=position,
    )
    reasons = Counter(
        [s.reason for s in skipped] + [d.verdict.reason for d in dropped] + ["duplicate"] * len(duplicates)
    )
    for reason, count in reasons.most_common():
        print(f"left out {count:,}: {reason}", file=sys.stderr)
    print(f"{result.train}: {result.num_documents:,} documents, {result.num_tokens:,} tokens")
    if result.val is not None:
        print(f"{result.val}: {result.num_val_documents:,} documents, {result.num_val_tokens:,} tokens")
    elif arguments.val_fraction:
        print(f"too few documents for a validation part of {arguments.val_fraction}", file=sys.stderr)
    return 0
