"""Token shards: the encoded corpus on disk, memory-mapped, tied to the tokenizer that made it.

A directory of shards holds

    shard_00000.bin   token ids, little endian, uint16 if the vocabulary has fewer than 65,536 entries, else uint32
    shard_00000.idx   int64, little endian: the end of each document, counted in tokens from the start of the shard
    manifest.json     what made them, counts and SHA-256 of every file; written last, so its presence means "complete"
    progress.json     only while unfinished: the shards that are safe on disk, from which an interrupted writer goes on

A document's tokens include its closing <|endoftext|> [Qwen TR 2.1]; no document lies in two shards. This file knows
nothing of text (`data.encode` fills shards) and nothing of rows and batches (`data.packing` reads them).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from qwench.run import usable_cores

FORMAT = "qwench-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
INDEX_DTYPE = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of a token id."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One shard as the manifest lists it: `shard_00000`, its counts and the SHA-256 of its two files."""

    name: str
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes documents, already encoded, into shards of about `shard_tokens` tokens.

    >>> with ShardWriter(out, tokenizer_fingerprint=tok.fingerprint, vocab_size=tok.vocab_size) as writer:
    ...     writer.add(np.array([17, 4, tok.eod_id]))

    Leaving the `with` block normally writes the manifest; leaving it by an exception does not. With `resume=True` a
    directory that an interrupted writer left is continued: `num_documents` then says how many documents are safe and
    need not be added again, `source_digest` what the caller last said of its input, and `finished` that nothing is left
    to do. Raises ValueError if the directory holds shards of other settings, or any shards without `resume`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        tokenizer_fingerprint: str,
        vocab_size: int,
        shard_tokens: int = 1 << 26,
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}; give a positive number of tokens")
        self.directory = Path(directory)
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens
        self._header = _header(tokenizer_fingerprint, vocab_size, shard_tokens, config)
        self.records: list[ShardRecord] = []
        self.source_digest = ""
        self.finished = False
        self._bin: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._ends: list[int] = []
        self._shard_end = 0
        self._last_digest = ""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._adopt(resume)

    def _adopt(self, resume: bool) -> None:
        """Take over what lies in the directory, or refuse it."""
        name = next((n for n in (MANIFEST, PROGRESS) if (self.directory / n).exists()), None)
        if name is not None and not resume:
            raise ValueError(f"{self.directory} already holds token shards; give another directory or delete it first")
        if name is not None:
            saved = _read_json(self.directory / name)
            for key, value in self._header.items():
                if saved.get(key) != value:
                    raise ValueError(
                        f"{self.directory} holds shards made with another {key} ({_short(saved.get(key))}, now "
                        f"{_short(value)}); continue with the old setting, give another directory, or delete it"
                    )
            self.records = [ShardRecord(**record) for record in saved["shards"]]
            self.source_digest = self._last_digest = saved["source_digest"]
            self.finished = name == MANIFEST
            for record in self.records:
                _check_sizes(self.directory, record, self.dtype)
        # Whatever no record vouches for is the rest of a shard that was being written.
        if not self.finished:
            known = {record.name for record in self.records}
            for path in self.directory.glob("shard_*"):
                if path.name.partition(".")[0] not in known or path.suffix == ".tmp":
                    path.unlink()

    @property
    def num_documents(self) -> int:
        """Documents in finished shards and in the open one."""
        return sum(record.num_documents for record in self.records) + len(self._ends)

    @property
    def num_tokens(self) -> int:
        return sum(record.num_tokens for record in self.records) + self._shard_end

    def add(self, tokens: np.ndarray, source_digest: str = "") -> None:
        """Append one document: `tokens` integer [T], T >= 1, its closing <|endoftext|> included.

        `source_digest` describes the input up to and with this document; it is stored with the shard that the
        document closes, for the caller to check on resumption.
        """
        assert not self.finished, "add() on finished shards"
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(f"a document's tokens have shape {tokens.shape}; give a non-empty vector of ids")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}")
        if self._bin is None:
            self._bin = open(self._path(".bin.tmp"), "wb")  # noqa: SIM115 (lives as long as the shard)
            self._sha = hashlib.sha256()
        data = tokens.astype(self.dtype).tobytes()
        self._bin.write(data)
        self._sha.update(data)
        self._shard_end += tokens.size
        self._ends.append(self._shard_end)
        self._last_digest = source_digest
        if self._shard_end >= self.shard_tokens:
            self._finish_shard()

    def _path(self, suffix: str) -> Path:
        return self.directory / f"shard_{len(self.records):05d}{suffix}"

    def _finish_shard(self) -> None:
        if self._bin is None:
            return
        _sync_and_close(self._bin)
        self._bin = None
        index = np.array(self._ends, INDEX_DTYPE).tobytes()
        with open(self._path(".idx.tmp"), "wb") as file:
            file.write(index)
            _sync(file)
        for suffix in (".bin", ".idx"):
            os.replace(self._path(suffix + ".tmp"), self._path(suffix))
        record = ShardRecord(
            name=self._path("").name,
            num_tokens=self._shard_end,
            num_documents=len(self._ends),
            bin_sha256=self._sha.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        self.records.append(record)
        self.source_digest = self._last_digest
        self._ends, self._shard_end = [], 0
        self._write_json(PROGRESS)

    def _write_json(self, name: str) -> None:
        table = {
            **self._header,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "source_digest": self.source_digest,
            "shards": [asdict(record) for record in self.records],
        }
        temporary = self.directory / f"{name}.tmp"
        with open(temporary, "wb") as file:
            file.write((json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
            _sync(file)
        os.replace(temporary, self.directory / name)
        _sync_directory(self.directory)

    def close(self) -> None:
        """Finish the last shard and write the manifest. Calling it again changes nothing."""
        if self.finished:
            return
        self._finish_shard()
        self._write_json(MANIFEST)
        (self.directory / PROGRESS).unlink(missing_ok=True)
        self.finished = True

    def abandon(self) -> None:
        """Stop without a manifest; finished shards stay for a later `resume=True`."""
        if self._bin is not None:
            self._bin.close()
            self._bin = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _header(
    tokenizer_fingerprint: str, vocab_size: int, shard_tokens: int, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a manifest says of all its shards."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "shard_tokens": shard_tokens,
        "config": json.loads(json.dumps(dict(config or {}))),
    }


def write_shard(stem: Path, tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> ShardRecord:
    """Write one shard, `stem`.bin and .idx, from the tokens of its documents end to end and the length of each.

    For writers that make shards side by side; `assemble` makes them one directory. The record's name is the stem's.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    assert int(lengths.sum()) == tokens.size
    assert lengths.size
    assert lengths.min() > 0
    sums = []
    for suffix, array in (
        (".bin", tokens.astype(token_dtype(vocab_size), copy=False)),
        (".idx", np.cumsum(lengths, dtype=INDEX_DTYPE)),
    ):
        data = np.ascontiguousarray(array).data.cast("B")
        with open(stem.with_name(stem.name + suffix), "wb") as file:
            file.write(data)
            _sync(file)
        sums.append(hashlib.sha256(data).hexdigest())
    return ShardRecord(
        name=stem.name,
        num_tokens=int(tokens.size),
        num_documents=int(lengths.size),
        bin_sha256=sums[0],
        idx_sha256=sums[1],
    )


def assemble(
    directory: Path,
    pieces: Sequence[tuple[Path, ShardRecord]],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    shard_tokens: int,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Make shards that `write_shard` wrote (folder, record) one directory, in this order; it appears complete or not.

    Files are linked where the file system lets them, else copied. A directory that holds exactly this already is left
    alone; any other shards there are replaced.
    """
    records = [dataclasses.replace(record, name=f"shard_{number:05d}") for number, (_, record) in enumerate(pieces)]
    digest = hashlib.sha256("".join(r.bin_sha256 + r.idx_sha256 for r in records).encode()).hexdigest()
    manifest = {
        **_header(tokenizer_fingerprint, vocab_size, shard_tokens, config),
        "num_tokens": sum(record.num_tokens for record in records),
        "num_documents": sum(record.num_documents for record in records),
        "source_digest": digest,
        "shards": [asdict(record) for record in records],
    }
    if (directory / MANIFEST).is_file() and _read_json(directory / MANIFEST) == manifest:
        try:
            for record in records:
                _check_sizes(directory, record, token_dtype(vocab_size))
            return
        except ValueError:
            pass
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for (folder, old), new in zip(pieces, records, strict=True):
            for suffix in (".bin", ".idx"):
                _link_or_copy(folder / f"{old.name}{suffix}", partial / f"{new.name}{suffix}")
        with open(partial / MANIFEST, "wb") as file:
            file.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
            _sync(file)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
        _sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)


class TokenShards:
    """Finished shards, memory-mapped. Open them with `TokenShards.open`.

    Tokens are numbered through all shards, 0 <= t < `num_tokens`, documents likewise. What is returned has the stored
    dtype (uint16 or uint32) and may be a read-only view of the file.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.records = [ShardRecord(**record) for record in manifest["shards"]]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        for record in self.records:
            _check_sizes(directory, record, self.dtype)
        # np.asarray: plain views of the mapped pages, an order of magnitude cheaper to slice than np.memmap objects
        self._tokens = [np.asarray(np.memmap(directory / f"{r.name}.bin", self.dtype, "r")) for r in self.records]
        self._ends = [np.asarray(np.memmap(directory / f"{r.name}.idx", INDEX_DTYPE, "r")) for r in self.records]
        self._token_starts = np.cumsum([0, *(r.num_tokens for r in self.records)])
        self._document_starts = np.cumsum([0, *(r.num_documents for r in self.records)])
        for record, ends in zip(self.records, self._ends, strict=True):
            if ends[-1] != record.num_tokens:
                raise ValueError(f"{directory / record.name}.idx does not fit its shard; encode the documents again")

    @staticmethod
    def open(directory: str | Path, tokenizer_fingerprint: str | None = None) -> TokenShards:
        """Map the shards of `directory`; with a fingerprint, only if that tokenizer made them.

        Raises ValueError for a missing manifest, missing or truncated files, and another tokenizer.
        """
        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            unfinished = (directory / PROGRESS).exists()
            found = "unfinished token shards" if unfinished else "no token shards (no manifest.json)"
            todo = (
                "run the same command again to finish them" if unfinished else "make them with qwench tokenizer encode"
            )
            raise ValueError(f"{directory} holds {found}; {todo}")
        manifest = _read_json(directory / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise ValueError(
                f"{directory / MANIFEST} is {manifest.get('format')!r} version {manifest.get('version')!r}, this "
                f"program reads {FORMAT!r} version {VERSION}; encode the documents again"
            )
        made_by = manifest["tokenizer_fingerprint"]
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != made_by:
            raise ValueError(
                f"the token shards in {directory} were made with tokenizer {made_by[:12]}, but this tokenizer is "
                f"{tokenizer_fingerprint[:12]}; use the tokenizer they were made with, or encode the documents again "
                f"with this one (qwench tokenizer encode)"
            )
        return TokenShards(directory, manifest)

    @property
    def num_tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._document_starts[-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all files: equal for equal token streams."""
        sums = "".join(r.bin_sha256 + r.idx_sha256 for r in self.records)
        return hashlib.sha256(f"{self.dtype.name}{sums}".encode()).hexdigest()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids [stop - start] of the stream of all shards in order."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}:{stop} asked for, there are {self.num_tokens} in {self.directory}")
        if start == stop:
            return np.empty(0, self.dtype)
        first = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._token_starts, stop, side="left")) - 1
        pieces = []
        for shard in range(first, last + 1):
            base = int(self._token_starts[shard])
            pieces.append(self._tokens[shard][max(start - base, 0) : stop - base])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, the closing <|endoftext|> included."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document {index} asked for, there are {self.num_documents} in {self.directory}")
        start, length = self.document_spans(np.array([index]))
        return self.tokens(int(start[0]), int(start[0] + length[0]))

    def document_spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token (numbered through all shards) and length in tokens of documents: int64 [N] -> two int64 [N]."""
        starts = np.empty(len(indices), np.int64)
        lengths = np.empty(len(indices), np.int64)
        shards = np.searchsorted(self._document_starts, indices, side="right") - 1
        for shard in set(shards.tolist()):
            here = shards == shard
            local = indices[here] - self._document_starts[shard]
            ends = self._ends[shard]
            begin = np.where(local > 0, ends[np.maximum(local - 1, 0)], 0)
            starts[here] = begin + self._token_starts[shard]
            lengths[here] = ends[local] - begin
        return starts, lengths

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every file and compare its SHA-256 with the manifest, on all cores; of several processes each its share.

        Raises ValueError for the first that differs.
        """
        sums = [
            (self.directory / f"{record.name}{suffix}", expected)
            for record in self.records
            for suffix, expected in ((".bin", record.bin_sha256), (".idx", record.idx_sha256))
        ][share::shares]
        with ThreadPoolExecutor(usable_cores()) as pool:  # hashing gives the interpreter's lock away
            for (path, expected), actual in zip(sums, pool.map(_sha256, (path for path, _ in sums)), strict=True):
                if actual != expected:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(f"{path} is damaged (its checksum differs); encode the documents again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sizes(directory: Path, record: ShardRecord, dtype: np.dtype[Any]) -> None:
    sizes = {".bin": record.num_tokens * dtype.itemsize, ".idx": record.num_documents * INDEX_DTYPE.itemsize}
    for suffix, expected in sizes.items():
        path = directory / f"{record.name}{suffix}"
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it again or encode the documents again")
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes instead of {expected}; it is truncated or damaged: copy it "
                f"again or encode the documents again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); encode the documents again") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no table of shards; encode the documents again")
    return table


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_and_close(file: BinaryIO) -> None:
    _sync(file)
    file.close()


def _sync_directory(directory: Path) -> None:
    """Make renames durable where the system lets a directory be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
