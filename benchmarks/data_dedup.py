"""Near-duplicate search: speed per core, precision and recall, peers on the same files, memory as the input grows.

    python benchmarks/data_dedup.py DATA [--mb 16] [--peers PYTHON] [--only ours]

DATA is the unpacked part `pretrain` of the shared data. Truth is made from its real texts (English, Chinese, code):
base documents of which no two are alike (exact Jaccard of all pairs below 0.3, from sets of shingles), light edits of
some (exact Jaccard to the base at least 0.8: a duplicate) and heavy edits of others (at most 0.5: none). What a tool
drops is right if it belongs to a family of duplicates of which at least one stays. Edits between the two are in the
input and may stand for their family, but are not judged.

Figures are bytes of text over seconds of processor time of all processes (MB/s/core), so that what else runs on the
machine matters little, and over wall clock. Ours begins with the same JSONL files and ends with files of the documents
that stay; every peer runs in its own process (`data_dedup_peers.py`) and is measured after its imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

from qwench.data.dedup import DedupSettings
from qwench.data.minhash import MinHasher, MinHashSettings, describe_s_curve, exact_jaccard, shingle_hashes
from qwench.data.pipeline.dedup import run_dedup
from qwench.data.pipeline.dedup_hashes import HashWriter
from qwench.data.pipeline.parts import DOCS, PartWriter, read_columns
from qwench.data.pipeline.work import Item, Room, run_stage
from qwench.types import Document

SOURCES = {
    "en": ("en_misc", "en_docs", "en_novels"),
    "zh": ("zh_docs", "zh_modern"),
    "code": ("code_sympy", "code_go_std", "code_thealgorithms"),
}
SHARE = {"en": 0.5, "zh": 0.25, "code": 0.25}
NUM_FILES = 4


# ------------------------------------------------------------------------------------------------------------- truth
def base_texts(data: Path, kind: str, num_bytes: float, draw: random.Random) -> list[str]:
    """Real texts of 400 to 8,000 characters, cut at paragraphs, none of which resembles another."""
    texts: list[str] = []
    for name in SOURCES[kind]:
        pieces = []
        with (data / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                pieces += _cut(json.loads(line)["text"], draw)
        draw.shuffle(pieces)
        size = 0
        for piece in pieces:
            if size > num_bytes / len(SOURCES[kind]):
                break
            texts.append(piece)
            size += len(piece.encode())
    return [texts[place] for place in _unlike(texts)]


def _cut(text: str, draw: random.Random) -> Iterator[str]:
    wanted, piece = draw.randint(400, 8000), ""
    for paragraph in text.split("\n\n"):
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= wanted:
            yield piece[:8000]
            wanted, piece = draw.randint(400, 8000), ""
    if len(piece) >= 400:
        yield piece[:8000]


def _unlike(texts: list[str]) -> list[int]:
    """Places of texts such that no two have an exact Jaccard similarity of 0.3 or more (all pairs are counted)."""
    hasher = MinHasher()
    sets = [np.unique(shingle_hashes(text, hasher.settings)) for text in hasher.normalise(texts)]
    holders: dict[int, list[int]] = defaultdict(list)
    kept: list[int] = []
    for place, shingles in enumerate(sets):
        common: Counter[int] = Counter()
        for shingle in shingles.tolist():
            common.update(holders.get(shingle, ()))
        if all(n / (len(shingles) + len(sets[other]) - n) < 0.3 for other, n in common.items()) and len(shingles) > 20:
            kept.append(place)
            for shingle in shingles.tolist():
                holders[shingle].append(place)
    return kept


def edited(text: str, share: float, vocabulary: list[str], draw: random.Random, kind: str) -> str:
    """The text with that share of its words (letters in Chinese) replaced, some in bursts, and a header or a footer."""
    if kind == "zh":
        words, joint = list(text), ""
    else:
        words, joint = text.split(" "), " "
    place = 0
    while place < len(words):
        if draw.random() < share:
            burst = min(draw.choice((1, 1, 1, 4)), len(words) - place)
            words[place : place + burst] = [draw.choice(vocabulary) for _ in range(burst)]
            place += burst
        place += 1
    text = joint.join(words)
    if draw.random() < 0.3:
        text = f"{' '.join(draw.choices(vocabulary, k=6))}\n\n{text}"
    return text.upper() if draw.random() < 0.1 else text


def make_truth(data: Path, num_bytes: float) -> tuple[list[Document], dict[str, tuple[str, str]]]:
    """Documents in random order, and for each its family and "base", "duplicate", "between" or "different"."""
    draw = random.Random(1)
    documents: list[Document] = []
    truth: dict[str, tuple[str, str]] = {}
    for kind, share in SHARE.items():
        bases = base_texts(data, kind, num_bytes * share * 0.55, draw)
        vocabulary = sorted(
            {w for text in bases[:200] for w in (text if kind == "zh" else text.split(" ")) if w.strip()}
        )
        for number, base in enumerate(bases):
            name = f"{kind}-{number}"
            documents.append(Document(id=name, text=base, source=kind))
            truth[name] = (name, "base")
            for copy in range(draw.choice((0, 1, 1, 2))):
                text = edited(base, draw.choice((0.0, 0.003, 0.008, 0.015, 0.03, 0.1, 0.2)), vocabulary, draw, kind)
                jaccard = exact_jaccard(base, text)
                documents.append(Document(id=f"{name}.{copy}", text=text, source=kind))
                if jaccard >= 0.8:
                    truth[f"{name}.{copy}"] = (name, "duplicate")
                else:
                    truth[f"{name}.{copy}"] = (name, "different" if jaccard <= 0.5 else "between")
    draw.shuffle(documents)
    return documents, truth


def judge(kept: set[str], truth: dict[str, tuple[str, str]], kind: str) -> dict[str, float]:
    """Precision and recall of the drops among the judged documents of a kind ("" is all)."""
    families: dict[str, list[str]] = defaultdict(list)
    between: set[str] = set()  # families that one of these stands for
    right = wrong = missed = 0
    for id, (family, label) in truth.items():
        if not id.startswith(kind):
            continue
        if label == "different":
            wrong += id not in kept
        elif label == "between":
            between.update({family} if id in kept else ())
        else:
            families[family].append(id)
    for family, members in families.items():
        num_kept = sum(id in kept for id in members)
        right += min(len(members) - num_kept, len(members) - 1)
        wrong += num_kept == 0 and family not in between
        missed += max(0, num_kept - 1)
    return {
        "precision": round(right / max(1, right + wrong), 4),
        "recall": round(right / max(1, right + missed), 4),
        "duplicates": right + missed,
    }


# -------------------------------------------------------------------------------------------------------------- ours
def _settings(verify: float) -> DedupSettings:
    return DedupSettings(paragraph_chars=0, minhash=MinHashSettings(verify=verify))


def hash_job(item: Item, directory: Path) -> dict[str, Any]:
    """What the prepare stage does for dedup, from a JSONL file."""
    writer = HashWriter(_settings(item["verify"]), directory)
    with PartWriter(directory / DOCS) as part, open(item["file"], encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            document = Document(id=row["id"], text=row["text"])
            part.add(document)
            writer.add([document])
    return writer.close()


def ours(
    inputs: Path, out: Path, workers: int, verify: float = 0.0, memory_mb: int = 0
) -> tuple[set[str], dict[str, Any]]:
    from data_dedup import hash_job as job  # by the name under which worker processes find it

    room = Room(path=out, workers=workers)
    items: list[Item] = [{"file": str(path), "verify": verify} for path in sorted(inputs.glob("*.jsonl"))]
    wall, before = time.perf_counter(), os.times()
    prepared = run_stage(room, "prepare", job, items)
    hashed = time.perf_counter()
    settings = _settings(verify)
    if memory_mb:
        settings = dataclasses.replace(settings, paragraph_chars=200, memory_mb=memory_mb)
    result = run_dedup(room, prepared, settings)
    after = os.times()
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": sum(after[:4]) - sum(before[:4])}
    figures["hash_s"], figures["clusters_s"] = hashed - wall, time.perf_counter() - hashed
    figures["documents"] = result.counts["documents"]
    return {
        id for part in result.parts for batch in read_columns(part.docs, ["id"]) for id in batch[0].to_pylist()
    }, figures


# ------------------------------------------------------------------------------------------------- memory and scaling
def write_large(documents: list[Document], inputs: Path, num_files: int) -> float:
    """Files of other documents of the same kinds: the lines of real ones in another order, three in ten of every
    second file repeated as they are. Returns megabytes of text."""
    inputs.mkdir()
    size = 0
    for turn in range(num_files):
        draw = random.Random(turn)
        with (inputs / f"{turn:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                lines = document.text.split("\n")
                if turn % 2 == 0 or draw.random() < 0.7:
                    draw.shuffle(lines)
                    lines = [f"{line} {draw.randrange(1000)}" for line in lines]
                text = "\n".join(lines)
                size += len(text.encode())
                file.write(json.dumps({"id": f"{turn}/{document.id}", "text": text}, ensure_ascii=False) + "\n")
    return size / 1e6


def measure_apart(inputs: Path, out: Path, workers: int, memory_mb: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--apart", str(inputs), str(out), str(workers), str(memory_mb)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def apart(inputs: Path, out: Path, workers: int, memory_mb: int) -> None:
    """One run of ours in a process of its own, with everything switched on."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1000

    begin = peak()
    _, times = ours(inputs, out, workers, 0.6, memory_mb)
    table = {"begin_mb": begin, "peak_mb": peak(), **{name: round(value, 2) for name, value in times.items()}}
    print(json.dumps(table | {"stages": len(list(out.iterdir()))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--mb", type=float, default=16)
    parser.add_argument("--peers", help="Python of an environment with datatrove, text-dedup, datasketch, rensa, spacy")
    parser.add_argument("--only", default="datatrove,text-dedup,datasketch,rensa")
    parser.add_argument("--small", action="store_true", help="leave memory and scaling out")
    parser.add_argument("--apart", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apart:
        return apart(*map(Path, arguments.apart[:2]), *map(int, arguments.apart[2:]))
    MinHasher().hash_texts(["compile now"])
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        documents, truth = make_truth(arguments.data, arguments.mb * 1e6)
        inputs = out / "input"
        inputs.mkdir()
        for number in range(NUM_FILES):
            with (inputs / f"{number:05d}.jsonl").open("w", encoding="utf-8") as file:
                for document in documents[number::NUM_FILES]:
                    row = {"id": document.id, "text": document.text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        size = sum(len(document.text.encode()) for document in documents) / 1e6
        labels = Counter(label for _, label in truth.values())
        print(f"{len(documents)} documents, {size:.1f} MB; judged: {dict(labels)}")
        print(describe_s_curve(MinHashSettings()))
        megabytes = 0.0
        figures: dict[str, Any] = {"megabytes": size, "documents": len(documents), "judged": dict(labels), "tools": {}}

        def note(name: str, kept: set[str], times: dict[str, Any]) -> None:
            table = {f"{k}": round(v, 2) for k, v in times.items()}
            table |= {"mb_s_core": round(size / times["cpu_s"], 2), "mb_s": round(size / times["wall_s"], 2)}
            table["quality"] = {kind or "all": judge(kept, truth, kind) for kind in ("", *SHARE)}
            figures["tools"][name] = table
            quality = "  ".join(f"{k} {v['precision']:.3f}/{v['recall']:.3f}" for k, v in table["quality"].items())
            print(
                f"{name:24} {table['mb_s_core']:7.2f} MB/s/core  {table['mb_s']:7.2f} MB/s  P/R {quality}", flush=True
            )

        note("qwench", *ours(inputs, out / "verified", 1, 0.7))
        note("qwench, not verified", *ours(inputs, out / "one", 1, 0.0))
        for name in arguments.only.split(",") if arguments.peers else []:
            place = out / name
            place.mkdir()
            script = Path(__file__).with_name("data_dedup_peers.py")
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [arguments.peers, script, name, inputs, place],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            if done.returncode:
                print(f"{name} failed: {done.stderr[-600:]}")
                continue
            table = json.loads((place / "peer.json").read_text())
            note(name, set(table.pop("kept")), table)
            shutil.rmtree(place)
        if not arguments.small:
            figures["growth"] = {}
            for name, files, workers in (
                ("x1", 2, 1),
                ("x4", 8, 1),
                ("x4, all memory", 8, 1),
                ("x4, all memory, 2 workers", 8, 2),
            ):
                large = out / f"large{files}"
                megabytes = write_large(documents, large, files) if not large.exists() else megabytes
                table = measure_apart(large, out / name, workers, 256 if "all" in name else 2) | {
                    "megabytes": round(megabytes, 1)
                }
                figures["growth"][name] = table
                print(name, json.dumps(table), flush=True)
    write_result("data_dedup", figures)


if __name__ == "__main__":
    main()
