"""`qwench data` on real files: speed of the whole way, of making tokens and shards, and memory as the input grows.

    python benchmarks/data_pipeline.py DATA TOKENIZER [--workers 2]

DATA is a folder with pipeline/web_html (pages) and pretrain/*.jsonl (texts); TOKENIZER whatever `Tokenizer.load` takes.

whole    raw pages -> token shards: the pages are written into WARC files, each page under a few hundred addresses with
         numbers of its own in every paragraph, so that size is reached without making everything a duplicate. MB/s of
         uncompressed raw bytes, from the first read to the last shard.
shards   clean documents -> shuffled shards: all of pretrain/ (English, Chinese, maths, code) as Parquet parts, from
         the first byte read to the last written, the start of workers included; beside Hugging Face's `tokenizers`
         (encode_batch on all cores, ids written as uint32, nothing shuffled, loading not counted) on a share of every
         file, since it is slow. Documents are also compared id by id with what it gives.
memory   the largest resident set of any process of a run, for inputs of 1, 2 and 4 times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

from qwench import config
from qwench.data.documents import read_documents
from qwench.data.pipeline.parts import write_part
from qwench.data.pipeline.recipe import DataConfig
from qwench.data.pipeline.stages import DataResult, Part, write_shards
from qwench.data.pipeline.work import Room
from qwench.tokenizer import Tokenizer
from qwench.types import Document

_PARAGRAPH = re.compile(r"(<p[ >][^<]{40})")


# ------------------------------------------------------------------------------------------------------------ whole way
def write_crawl(pages: list[bytes], folder: Path, megabytes: float) -> int:
    """WARC files of about 16 MB with at least so many megabytes of pages; the bytes written."""
    folder.mkdir(parents=True)
    total = written = 0
    number = copy = 0
    file = None
    while total < megabytes * 1e6:
        for place, page in enumerate(pages):
            if file is None or written > 16e6:
                if file is not None:
                    file.close()
                file = open(folder / f"crawl-{number:04d}.warc", "wb")  # noqa: SIM115
                number, written = number + 1, 0
            record = _record(_numbered(page, copy, place), f"http://site{place}.example/{copy}")
            file.write(record)
            written += len(record)
            total += len(record)
            if total >= megabytes * 1e6:
                break
        copy += 1
    assert file is not None
    file.close()
    return total


def _numbered(page: bytes, copy: int, place: int) -> bytes:
    """The page with other words in every paragraph, as pages of one site differ."""
    draw = np.random.default_rng([copy, place])

    def other(match: re.Match[str]) -> str:
        words = " ".join(str(number) for number in draw.integers(0, 10**6, 6))
        return f"{match[1]} {words} "

    return _PARAGRAPH.sub(other, page.decode("utf-8", "replace")).encode()


def _record(page: bytes, url: str) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:x:{url}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"WARC-Target-URI: {url}\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http)}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


def run_in_a_process(arguments: list[str]) -> dict[str, Any]:
    """`qwench data` with these arguments: seconds, largest resident set of a process, and its summary."""
    before = time.perf_counter()
    code = "import sys; from qwench import cli; sys.exit(cli.main(['data', *sys.argv[1:]]))"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - before
    out = next(Path(a.partition("=")[2]) for a in arguments if a.startswith("out="))
    return {"seconds": seconds, "summary": json.loads((out / "summary.json").read_text())}


def whole(folder: Path, pages: list[bytes], tokenizer: Path, workers: int, megabytes: float) -> dict[str, Any]:
    num_bytes = write_crawl(pages, folder / "crawl", megabytes)
    figures: dict[str, Any] = {"raw_mb": num_bytes / 1e6, "workers": {}}
    for count in sorted({1, workers}):
        out = folder / f"whole-{count}"
        run = run_in_a_process(
            [f"out={out}", f"tokenizer={tokenizer}", f'sources.web.paths=["{folder}/crawl"]', f"workers={count}"]
        )
        stages = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        figures["workers"][count] = {
            "seconds": run["seconds"],
            "mb_per_s": num_bytes / 1e6 / run["seconds"],
            "stages_s": {step["stage"]: step["seconds"] for stage in stages for step in stage["steps"]},
            "documents": run["summary"]["prepare"]["documents"],
            "kept": run["summary"]["documents"]["documents"],
            "text_mb": run["summary"]["documents"]["bytes"] / 1e6,
        }
        print(f"whole, {count} workers: {num_bytes / 1e6 / run['seconds']:.1f} MB/s of raw pages")
        shutil.rmtree(out)
    return figures


# --------------------------------------------------------------------------------------------------------------- shards
def shards(folder: Path, texts: list[Path], tokenizer_path: Path, workers: int, peer_share: float) -> dict[str, Any]:
    parts: list[Part] = []
    num_bytes = 0
    for path in texts:
        for lot in _lots(read_documents([path]), 16e6):
            part = folder / f"part-{len(parts)}.parquet"
            write_part(part, lot)
            size = sum(len(document.text.encode()) for document in lot)
            parts.append(Part(docs=part, num_documents=len(lot), num_bytes=size))
            num_bytes += size
    out = folder / "shards"
    given = [f"out={out}", f"tokenizer={tokenizer_path}", 'sources.x.paths=["x"]', "part_mb=16"]
    recipe = config.load(DataConfig, given)
    seconds = []
    result = DataResult(out=out, parts=parts)
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        room = Room(path=out / "work", workers=workers)
        write_shards(room, recipe, tokenizer_path, result, lambda name, counts: None)
        seconds.append(time.perf_counter() - begin)
    assert result.mixture is not None
    tokens = sum(result.mixture.tokens.values())

    tokenizer = Tokenizer.load(tokenizer_path)
    saved = folder / "tokenizer"
    tokenizer.save(saved)
    lot = [text for path in texts for text in _share(path, peer_share)]
    theirs, their_ids, their_bytes = hugging_face(saved, lot, folder / "theirs.bin", workers)
    data = b"".join(map(str.encode, lot))
    starts = np.cumsum([0, *(len(text.encode()) for text in lot)])
    our_ids = tokenizer.encode_utf8(np.frombuffer(data, np.uint8), starts)
    same = sum(np.array_equal(a, b) for a, b in zip(our_ids, their_ids, strict=True))
    ours = num_bytes / 1e6 / min(seconds)
    print(f"shards: {num_bytes / 1e6:.0f} MB, {ours:.1f} MB/s {[round(s, 1) for s in seconds]} s")
    print(f"tokenizers: {their_bytes / 1e6:.0f} MB, {their_bytes / 1e6 / theirs:.2f} MB/s; {same} of {len(lot)} equal")
    return {
        "text_mb": num_bytes / 1e6,
        "tokens": tokens,
        "workers": workers,
        "qwench": {"seconds": min(seconds), "all_seconds": seconds, "mb_per_s": ours},
        "tokenizers": {"text_mb": their_bytes / 1e6, "seconds": theirs, "mb_per_s": their_bytes / 1e6 / theirs},
        "tokenizers_on": f"the first {peer_share:.3f} of every file's bytes, whole documents; the same files",
        "same_ids": {"documents": len(lot), "equal": same},
        "times_faster": ours / (their_bytes / 1e6 / theirs),
    }


def _lots(documents: Iterable[Document], num_bytes: float) -> Iterator[list[Document]]:
    lot: list[Document] = []
    size = 0
    for document in documents:
        lot.append(document)
        size += len(document.text.encode())
        if size >= num_bytes:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


def _share(path: Path, share: float) -> Iterator[str]:
    """The texts that a file begins with, up to a share of its bytes."""
    left = path.stat().st_size * share
    for document in read_documents([path]):
        yield document.text
        left -= len(document.text.encode())
        if left <= 0:
            break


def hugging_face(directory: Path, texts: list[str], out: Path, workers: int) -> tuple[float, list[np.ndarray], int]:
    """Seconds, ids and bytes of the peer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    from tokenizers import Tokenizer as Peer

    peer = Peer.from_file(str(directory / "tokenizer.json"))
    peer.encode_batch(["warm"], add_special_tokens=False)
    begin = time.perf_counter()
    found = []
    with open(out, "wb") as file:
        for first in range(0, len(texts), 1000):
            for encoding in peer.encode_batch(texts[first : first + 1000], add_special_tokens=False):
                ids = np.array(encoding.ids, np.uint32)
                file.write(ids.data)
                found.append(ids)
    return time.perf_counter() - begin, found, sum(len(text.encode()) for text in texts)


# --------------------------------------------------------------------------------------------------------------- memory
def memory(folder: Path, pages: list[bytes], tokenizer: Path, megabytes: float) -> dict[str, Any]:
    """Largest resident set of any process, in a fresh process for each size."""
    figures = {}
    for times in (1, 2, 4):
        crawl = folder / f"crawl-x{times}"
        num_bytes = write_crawl(pages, crawl, megabytes * times)
        code = (
            "import sys, resource; from qwench import cli\n"
            "cli.main(['data', *sys.argv[1:]])\n"
            "who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
            "print(max(resource.getrusage(one).ru_maxrss for one in who))\n"
        )
        arguments = [f"out={folder}/m{times}", f"tokenizer={tokenizer}", f'sources.web.paths=["{crawl}"]', "part_mb=16"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        figures[f"{num_bytes / 1e6:.0f} MB"] = int(done.stdout.split()[-1]) / 1024
        print(f"memory: {num_bytes / 1e6:.0f} MB of pages, {figures[f'{num_bytes / 1e6:.0f} MB']:.0f} MiB")
        shutil.rmtree(folder / f"m{times}")
        shutil.rmtree(crawl)
    return {"largest_process_mib": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--crawl-mb", type=float, default=150)
    parser.add_argument("--peer-share", type=float, default=0.06, help="of the texts that tokenizers gets")
    parser.add_argument("--memory-mb", type=float, default=40)
    parser.add_argument("--only", choices=("whole", "shards", "memory"))
    arguments = parser.parse_args()
    pages = [path.read_bytes() for path in sorted((arguments.data / "pipeline" / "web_html").glob("*.html"))]
    texts = sorted((arguments.data / "pretrain").glob("*.jsonl"))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # First, while this process is small: what a child reports begins with its parent's size.
        if arguments.only in (None, "memory"):
            figures["memory"] = memory(folder, pages, arguments.tokenizer, arguments.memory_mb)
        if arguments.only in (None, "whole"):
            figures["whole"] = whole(folder, pages, arguments.tokenizer, arguments.workers, arguments.crawl_mb)
        if arguments.only in (None, "shards"):
            figures["shards"] = shards(folder, texts, arguments.tokenizer, arguments.workers, arguments.peer_share)
    if arguments.only is None:
        write_result("data_pipeline", figures)


if __name__ == "__main__":
    main()
