"""Documents to shuffled token shards, in two passes that every core shares [Qwen TR 2.1, steps 6 to 8].

`encode_part` turns a part's documents into tokens, each document closed by <|endoftext|>, and lays them out by group
and by a key that seed, id and tokens give. `write_piece` gathers the documents whose keys lie in one range, from all
parts, in the order of their keys: one shard. Since keys are evenly spread hashes this is a global shuffle; all ranges
together read every part once, and neither the order of the files nor the number of workers has a say.

What is in memory: about `RUN_BYTES` of text while encoding, one shard while writing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwench.data.pipeline.parts import COLUMNS, read_columns
from qwench.data.pipeline.work import Item, job_threads
from qwench.data.shards import token_dtype, write_shard
from qwench.tokenizer import Tokenizer

RUN_BYTES = 96 << 20
ALONE_BYTES = 96 << 20
"""Less text is encoded by one process with threads: each further one needs a second or two to start and load."""
ALONE_SHARD_BYTES = 384 << 20
"""Fewer bytes of tokens are gathered and written by one process, for the same reason."""
VALIDATION = ""
"""The group of held-out documents, whatever they are about."""
ENTRY = np.dtype([("key", "<u8"), ("start", "<i8"), ("length", "<i8")])


def encode_part(item: Item, directory: Path) -> dict[str, Any]:
    """Tokens of {"docs": [Parquet files], "tokenizer", "fingerprint", "seed", "by", "val_fraction"}.

    Writes runs: NNN.bin (tokens of documents end to end) and NNN.npy (ENTRY for each, sorted by group, then key).
    Counts: "runs": for each its groups in order, as [group, documents, tokens]; sums.
    """
    tokenizer = _tokenizer(item["tokenizer"], item["fingerprint"])
    dtype = token_dtype(tokenizer.vocab_size)
    counts: dict[str, Any] = {"documents": 0, "tokens": 0, "text_bytes": 0, "plain_chats": 0, "runs": []}
    groups: list[str] = []
    keys: list[bytes] = []
    tokens: list[np.ndarray] = []
    pending = 0

    def flush() -> None:
        nonlocal pending
        if not keys:
            return
        stem = f"{len(counts['runs']):03d}"
        counts["runs"].append(_write_run(directory / stem, groups, keys, tokens, dtype))
        pending = 0
        groups.clear(), keys.clear(), tokens.clear()  # pyright: ignore[reportUnusedExpression]

    prefix = f"{item['seed']}\0".encode()
    held_out = int(item["val_fraction"] * (1 << 64))
    for batch in _batches(item["docs"]):
        columns = [batch.column(name).to_pylist() for name in ("id", *item["by"])]
        starts = _starts(batch)
        encoded = _encode(tokenizer, batch, starts, counts)
        for name, ids, size, *labels in zip(columns[0], encoded, np.diff(starts).tolist(), *columns[1:], strict=True):
            ids = ids.astype(dtype, copy=False)
            digest = blake2b(prefix + name.encode("utf-8", "replace") + b"\0", digest_size=16)
            digest.update(ids.data)
            hashed = digest.digest()
            to_val = int.from_bytes(hashed[8:], "little") < held_out
            groups.append(VALIDATION if to_val else group_of(labels))
            keys.append(hashed[:8])
            tokens.append(ids)
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["text_bytes"] += size
            pending += size
        if pending >= RUN_BYTES:
            flush()
    flush()
    return counts


def group_of(labels: Sequence[str]) -> str:
    """The mixture's group of a document: "web", or "web-en" for several labels; "other" for what has none."""
    return "-".join(label or "other" for label in labels)


_loaded: dict[str, Tokenizer] = {}
"""The last tokenizer of this process by its fingerprint: making an encoder takes seconds."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer as it is there now, ready for `encode_part` in this process."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint not in _loaded:
        _loaded.clear()
        _loaded[tokenizer.fingerprint] = tokenizer
    return tokenizer


def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    if fingerprint not in _loaded and load_tokenizer(path).fingerprint != fingerprint:
        raise ValueError(f"{path} holds another tokenizer than when the run began; run the same command again")
    return _loaded[fingerprint]


def _batches(paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        yield from read_columns(Path(path), COLUMNS)


def _starts(batch: pa.RecordBatch) -> np.ndarray:
    """Where each text begins in the bytes of the column, and where the last ends: int64 [n + 1]."""
    column = batch.column("text")
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1].astype(np.int64)


def _encode(
    tokenizer: Tokenizer, batch: pa.RecordBatch, starts: np.ndarray, counts: dict[str, Any]
) -> list[np.ndarray]:
    """Tokens of each document with their end."""
    texts = batch.column("text")
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    encoded = tokenizer.encode_utf8(data, starts, closing=tokenizer.eod_id, num_threads=job_threads())
    marked = pc.match_substring(batch.column("meta"), '"messages"')  # pyright: ignore[reportAttributeAccessIssue]
    for place in np.flatnonzero(marked.to_numpy(zero_copy_only=False)).tolist():
        meta = json.loads(batch.column("meta")[place].as_py())
        if "messages" not in meta:
            continue
        # Messages stand for the text, but not if a stage has cut the text since.
        if meta.get("text_chars") != len(texts[place].as_py()):
            counts["plain_chats"] += 1
            continue
        ids = tokenizer.render(meta["messages"], meta.get("tools"), add_generation_prompt=False)
        encoded[place] = np.array([*ids, tokenizer.eod_id], np.uint32)
    return encoded


def _write_run(
    stem: Path, groups: Sequence[str], keys: Sequence[bytes], tokens: Sequence[np.ndarray], dtype: np.dtype[Any]
) -> list[tuple[str, int, int]]:
    """Write one run and return (group, documents, tokens) in order."""
    names = sorted(set(groups))
    numbers = np.array([names.index(group) for group in groups] if len(names) > 1 else [0] * len(groups))
    entries = np.empty(len(keys), ENTRY)
    entries["key"] = np.frombuffer(b"".join(keys), "<u8")
    entries["length"] = [len(ids) for ids in tokens]
    order = np.lexsort((entries["key"], numbers))
    entries, numbers = entries[order], numbers[order]
    entries["start"] = np.cumsum(entries["length"]) - entries["length"]
    with open(stem.with_suffix(".bin"), "wb") as file:
        for place in order.tolist():
            file.write(tokens[place].astype(dtype, copy=False).data)
    np.save(stem.with_suffix(".npy"), entries)
    return [
        (name, int((numbers == number).sum()), int(entries["length"][numbers == number].sum()))
        for number, name in enumerate(names)
    ]


# ------------------------------------------------------------------------------------------------------------- shards
def shard_ranges(num_tokens: int, shard_tokens: int) -> list[tuple[int, int]]:
    """Ranges of keys (first, after the last) of as many shards as hold about `shard_tokens` tokens each."""
    num = max(1, round(num_tokens / shard_tokens))
    bounds = [(number << 64) // num for number in range(num + 1)]
    return list(itertools.pairwise(bounds))


def write_piece(item: Item, directory: Path) -> dict[str, Any]:
    """The shard of {"runs": [[stem, first document, documents], ...], "low", "high", "vocab_size"} (keys as decimal
    strings, exact in JSON). Counts: its record, or none if no document has such a key."""
    dtype = token_dtype(item["vocab_size"])
    low, high = int(item["low"]), int(item["high"])
    chosen: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    data: list[np.ndarray] = []
    for number, (stem, first, count) in enumerate(item["runs"]):
        entries = np.load(f"{stem}.npy", mmap_mode="r")[first : first + count]
        begin = int(np.searchsorted(entries["key"], np.uint64(low)))
        end = count if high > 0xFFFFFFFFFFFFFFFF else int(np.searchsorted(entries["key"], np.uint64(high)))
        chosen.append(np.array(entries[begin:end]))
        sources.append(np.full(end - begin, number))
        data.append(np.asarray(np.memmap(f"{stem}.bin", dtype, "r")))
    entries, source = np.concatenate(chosen), np.concatenate(sources)
    if not len(entries):
        return {"record": None}
    order = np.argsort(entries["key"], kind="stable")  # equal keys: equal documents, in the order of the parts
    lengths = entries["length"][order]
    tokens = np.empty(int(lengths.sum()), dtype)
    at = 0
    starts, members = entries["start"][order].tolist(), source[order].tolist()
    for member, start, length in zip(members, starts, lengths.tolist(), strict=True):
        tokens[at : at + length] = data[member][start : start + length]
        at += length
    record = write_shard(directory / "shard", tokens, lengths, item["vocab_size"])
    return {"record": json.loads(json.dumps({key: getattr(record, key) for key in record.__dataclass_fields__}))}


def folder_names(groups: Sequence[str]) -> Mapping[str, str]:
    """Group -> name of its folder: its own letters where a file system takes them."""
    names: dict[str, str] = {}
    for group in sorted(groups):
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in group).lstrip(".") or "other"
        while name.casefold() in {taken.casefold() for taken in names.values()}:
            name += "_"
        names[group] = name
    return names
