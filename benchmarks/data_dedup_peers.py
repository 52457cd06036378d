"""The peers of `data_dedup.py`, run with the Python of an environment that has them.

    python benchmarks/data_dedup_peers.py PEER INPUT_DIR OUT_DIR

PEER is datatrove, text-dedup, datasketch or rensa; INPUT_DIR holds JSONL files with id and text. Word 5-grams, 112
permutations as 14 bands of 8 rows, one worker; the rest as each comes. Written to OUT_DIR/peer.json: the ids that stay,
and seconds of wall clock and of processor time from after the imports to the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def rows(inputs: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(inputs.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield row["id"], row["text"]


def datatrove() -> Callable[[Path, Path], list[str]]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    def run(inputs: Path, out: Path) -> list[str]:
        config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
        reader = JsonlReader(str(inputs), glob_pattern="*.jsonl")
        tasks = len(list(inputs.glob("*.jsonl")))
        stages = [
            (tasks, [reader, MinhashDedupSignature(f"{out}/signatures", config=config, language="eng")]),
            (14, [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)]),
            (1, [MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=config)]),
            (
                tasks,
                [
                    JsonlReader(str(inputs), glob_pattern="*.jsonl"),
                    MinhashDedupFilter(f"{out}/remove"),
                    JsonlWriter(f"{out}/kept", compression=None),
                ],
            ),
        ]
        for number, (tasks, steps) in enumerate(stages):
            LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=1, logging_dir=f"{out}/logs/{number}").run()
        return [id for id, _ in rows(out / "kept")]

    return run


def text_dedup() -> Callable[[Path, Path], list[str]]:
    import text_dedup.minhash as tool
    from datasets import load_from_disk

    def run(inputs: Path, out: Path) -> list[str]:
        arguments = ["--path", "json", "--data_dir", str(inputs), "--split", "train", "--column", "text"]
        arguments += [
            "--cache_dir",
            str(out / "cache"),
            "--output",
            str(out / "kept"),
            "--ngram",
            "5",
            "--num_perm",
            "112",
        ]
        arguments += ["--b", "14", "--r", "8", "--num_proc", "1", "--batch_size", "1000", "--min_length", "1"]
        tool.main(arguments, standalone_mode=False)
        return list(load_from_disk(str(out / "kept"))["id"])

    return run


def _shingles(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def _survivors(ids: list[str], parent: list[int]) -> list[str]:
    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    return [id for place, id in enumerate(ids) if root(place) == place]


def _join(parent: list[int], a: int, b: int) -> None:
    while parent[a] != a:
        a = parent[a]
    while parent[b] != b:
        b = parent[b]
    parent[max(a, b)] = min(a, b)


def datasketch() -> Callable[[Path, Path], list[str]]:
    from datasketch import MinHash, MinHashLSH

    def run(inputs: Path, out: Path) -> list[str]:
        index, ids, parent = MinHashLSH(num_perm=112, params=(14, 8)), [], []
        for place, (id, text) in enumerate(rows(inputs)):
            signature = MinHash(num_perm=112)
            signature.update_batch([shingle.encode() for shingle in _shingles(text)])
            ids.append(id)
            parent.append(place)
            for other in index.query(signature):
                _join(parent, place, other)
            index.insert(place, signature)
        return _survivors(ids, parent)

    return run


def rensa() -> Callable[[Path, Path], list[str]]:
    from rensa import RMinHash, RMinHashLSH

    def run(inputs: Path, out: Path) -> list[str]:
        index, ids, parent = RMinHashLSH(threshold=0.7, num_perm=112, num_bands=14), [], []
        for place, (id, text) in enumerate(rows(inputs)):
            signature = RMinHash(num_perm=112, seed=1)
            signature.update(list(_shingles(text)))
            ids.append(id)
            parent.append(place)
            for other in index.query(signature):
                _join(parent, place, other)
            index.insert(place, signature)
        return _survivors(ids, parent)

    return run


PEERS = {"datatrove": datatrove, "text-dedup": text_dedup, "datasketch": datasketch, "rensa": rensa}


def main() -> None:
    name, inputs, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    run = PEERS[name]()
    wall, before = time.perf_counter(), os.times()
    kept = run(inputs, out)
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    figures = {"kept": kept, "wall_s": time.perf_counter() - wall, "cpu_s": cpu}
    (out / "peer.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
