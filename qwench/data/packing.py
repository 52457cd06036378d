"""Rows for training: documents or samples laid end to end, with targets, loss weights and boundaries. Numpy only.

Pretraining [Qwen TR 2.4]: the documents of an epoch are shuffled, concatenated and cut to the context length.
Fine-tuning: whole samples are packed into rows of at most `max_tokens`. Both give the same `PackedRow`, so the loop
knows one kind.

Which target has which weight, exactly. Row r of a pretraining epoch holds tokens s[r*L : r*L + L] of the shuffled
stream s, and the target of a position is the next token of the stream, s[t + 1], also at the end of the row. With
`attend_across=True` every weight is 1 and the row is one sequence. With `attend_across=False` the row is cut into one
sequence a document (attention stays inside, positions restart at 0), and the position of a document's last token has
weight 0: its target opens a document that has nothing to do with it. A document that a row boundary cuts goes on in the
next row, there at position 0; the last token of the first part keeps its target and weight 1. In rows of samples the
weight of a position is the weight of its target in the sample, and the last position of each sample has target 0 and
weight 0.

This file does not batch or iterate (`data.loader`) and does not know the model's padding or masks (`train.batch`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from qwench.data.permutation import permute
from qwench.data.shards import TokenShards
from qwench.data.sources import JoinedShards
from qwench.types import Sample

_BLOCK = 64  # documents between two remembered offsets of the shuffled stream
_CACHED_BLOCKS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Sequences laid end to end.

    >>> PackedRow(tokens=[5, 6, 0, 8], targets=[6, 0, 8, 9], loss_weights=[1, 1, 0, 1], seq_lens=[3, 1])

    `tokens`, `targets` int32 [T] and `loss_weights` float32 [T] go together by position; `seq_lens` int32 [S] are the
    lengths of the sequences that must not attend to each other, summing to T. `sources` int16 [T] says which of the row
    source's `source_names` each token is from; None: there is one source.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    seq_lens: np.ndarray
    sources: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class RowSource(Protocol):
    """Rows of an epoch by number; the same numbers give the same rows in every process, at any time."""

    @property
    def num_rows(self) -> int:
        """Rows of one epoch (the same in every epoch)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names content and settings; equal fingerprints mean equal rows."""
        ...

    @property
    def source_names(self) -> tuple[str, ...]:
        """What `PackedRow.sources` numbers; empty if rows have none."""
        ...

    def row(self, epoch: int, index: int) -> PackedRow: ...


# ------------------------------------------------------------------------------------------------------- pretraining
class PretrainDataset:
    """Rows of `seq_len` tokens from token shards, in a new document order every epoch.

    The last tokens of an epoch that fill no row (at most `seq_len` of them) are left out; the shuffle makes them others
    every epoch. Memory beyond the mapped shards: 8 bytes for every 64 documents and a small cache. Raises ValueError if
    the shards do not fill one row.
    """

    def __init__(
        self, shards: TokenShards | JoinedShards, seq_len: int, seed: int = 0, *, attend_across: bool = False
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; give a positive number of tokens")
        self.shards = shards
        self.seq_len = seq_len
        self.seed = seed
        self.attend_across = attend_across
        self.num_rows = max(shards.num_tokens - 1, 0) // seq_len
        if self.num_rows == 0:
            raise ValueError(
                f"{shards.directory} has {shards.num_tokens} tokens, too few for one row of {seq_len}; give more "
                f"documents or a sequence length below {max(shards.num_tokens, 2)}"
            )
        names = shards.names if isinstance(shards, JoinedShards) else ()
        self.source_names = names if len(names) > 1 else ()
        self._block_starts: tuple[int, np.ndarray] | None = None
        self._blocks: dict[tuple[int, int], tuple[list[int], list[int]]] = {}

    @property
    def fingerprint(self) -> str:
        settings = f"{self.shards.fingerprint} {self.seq_len} {self.seed} {self.attend_across}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def row(self, epoch: int, index: int) -> PackedRow:
        """Row `index` of `epoch`, 0 <= index < num_rows, of exactly `seq_len` tokens."""
        assert 0 <= index < self.num_rows, f"row {index} of {self.num_rows}"
        start = index * self.seq_len
        stream, ends, sources = self._window(epoch, start, start + self.seq_len + 1)
        weights = np.ones(self.seq_len, np.float32)
        if self.attend_across:
            seq_lens = np.array([self.seq_len], np.int32)
        else:
            inside = ends[ends <= self.seq_len]
            weights[inside - 1] = 0.0
            bounds = np.concatenate(([0], inside[inside < self.seq_len], [self.seq_len]))
            seq_lens = np.diff(bounds).astype(np.int32)
        return PackedRow(
            tokens=stream[:-1],
            targets=stream[1:],
            loss_weights=weights,
            seq_lens=seq_lens,
            sources=None if sources is None else sources[:-1],
        )

    def _window(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens start:stop of the shuffled stream, int32, where documents end in that window (int64, 1-based), and the
        tokens' sources if there are several."""
        block_starts = self._starts_of_blocks(epoch)
        block = int(np.searchsorted(block_starts, start, side="right")) - 1
        position = int(block_starts[block])
        window = np.empty(stop - start, np.int32)
        sources = np.empty(stop - start, np.int16) if self.source_names else None
        ends: list[int] = []
        while position < stop:
            for begin, length in zip(*self._block(epoch, block), strict=True):
                end = position + length
                if end > start:
                    low, high = max(position, start), min(end, stop)
                    window[low - start : high - start] = self.shards.tokens(
                        begin + low - position, begin + high - position
                    )
                    if sources is not None:
                        assert isinstance(self.shards, JoinedShards)
                        sources[low - start : high - start] = self.shards.source_of(begin)
                    if end <= stop:
                        ends.append(end - start)
                position = end
                if position >= stop:
                    break
            block += 1
        return window, np.array(ends, np.int64), sources

    def _block(self, epoch: int, block: int) -> tuple[list[int], list[int]]:
        """First tokens and lengths of 64 documents of the shuffled order, from the cache if they are there."""
        spans = self._blocks.get((epoch, block))
        if spans is None:
            starts, lengths = self._block_spans(epoch, block)
            spans = starts.tolist(), lengths.tolist()
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            self._blocks[epoch, block] = spans
        return spans

    def _block_spans(self, epoch: int, block: int, num_blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        num_documents = self.shards.num_documents
        places = np.arange(block * _BLOCK, min((block + num_blocks) * _BLOCK, num_documents))
        return self.shards.document_spans(permute(places, num_documents, self.seed, epoch))

    def _starts_of_blocks(self, epoch: int) -> np.ndarray:
        """Offset in the shuffled stream of every 64th document, int64 [ceil(num_documents / 64)]."""
        cached = self._block_starts
        if cached is not None and cached[0] == epoch:
            return cached[1]
        num_blocks = -(-self.shards.num_documents // _BLOCK)
        sums = np.zeros(num_blocks, np.int64)
        step = 1 << 14
        for first in range(0, num_blocks, step):
            lengths = self._block_spans(epoch, first, step)[1]
            totals = np.add.reduceat(lengths, np.arange(0, len(lengths), _BLOCK))
            sums[first : first + len(totals)] = totals
        starts = np.concatenate(([0], np.cumsum(sums)[:-1]))
        # One assignment, so that a prefetching thread and its owner always see a matching pair.
        self._block_starts = (epoch, starts)
        return starts


# ------------------------------------------------------------------------------------------------------- fine-tuning
class SampleDataset:
    """Rows of whole samples, at most `max_tokens` tokens each, packed by best-fit decreasing.

    Which samples share a row changes every epoch (samples of equal length trade places), the number of rows does not.
    A sample longer than `max_tokens` loses its end (`over_long="truncate"`) or is left out (`"drop"`);
    `num_over_long` counts those, `num_without_loss` samples that would teach nothing (all weights 0 after truncation)
    and are left out too. Raises ValueError if no sample is left.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        max_tokens: int,
        seed: int = 0,
        *,
        over_long: Literal["truncate", "drop"] = "truncate",
    ) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens is {max_tokens}; a row needs at least 2 tokens, one to read and one to learn")
        if over_long not in ("truncate", "drop"):
            raise ValueError(f"over_long is {over_long!r}; give 'truncate' or 'drop'")
        self.max_tokens = max_tokens
        self.seed = seed
        self.source_names: tuple[str, ...] = ()
        self.num_over_long = 0
        self.num_without_loss = 0
        self.samples: list[Sample] = []
        digest = hashlib.sha256(f"{max_tokens} {seed} {over_long}".encode())
        for number, sample in enumerate(samples):
            if len(sample.token_ids) != len(sample.loss_weights):
                raise ValueError(
                    f"sample {number} has {len(sample.token_ids)} tokens and {len(sample.loss_weights)} loss weights; "
                    f"give one weight a token"
                )
            if len(sample.token_ids) > max_tokens:
                self.num_over_long += 1
                if over_long == "drop":
                    continue
            ids = np.asarray(sample.token_ids[:max_tokens], np.int32)
            weights = np.asarray(sample.loss_weights[:max_tokens], np.float32)
            # The first token is never a target.
            if not weights[1:].any():
                self.num_without_loss += 1
                continue
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes() + weights.tobytes())
            self.samples.append(Sample(token_ids=ids, loss_weights=weights))
        if not self.samples:
            raise ValueError(
                f"no sample left of {len(samples)} ({self.num_over_long} longer than {max_tokens} tokens, "
                f"{self.num_without_loss} without any token to learn); give longer rows or other samples"
            )
        self.fingerprint = digest.hexdigest()
        self._lengths = np.array([len(s.token_ids) for s in self.samples])
        self._packed = (0, self._pack(0))
        self.num_rows = len(self._packed[1])

    @property
    def num_tokens(self) -> int:
        return int(self._lengths.sum())

    def _pack(self, epoch: int) -> list[list[int]]:
        order = permute(np.arange(len(self.samples)), len(self.samples), self.seed, epoch)
        rows = pack_lengths(self._lengths[order].tolist(), self.max_tokens)
        return [[int(order[i]) for i in row] for row in rows]

    def row(self, epoch: int, index: int) -> PackedRow:
        """Row `index` of `epoch`, 0 <= index < num_rows, of 2 to `max_tokens` tokens."""
        packed = self._packed
        if packed[0] != epoch:
            packed = self._packed = (epoch, self._pack(epoch))
        assert len(packed[1]) == self.num_rows  # best-fit decreasing sees the lengths only, and these are the same
        return row_of_samples([self.samples[i] for i in packed[1][index]])


def row_of_samples(samples: Sequence[Sample]) -> PackedRow:
    """Lay samples end to end; each stays a sequence of its own."""
    return PackedRow(
        tokens=np.concatenate([s.token_ids for s in samples]).astype(np.int32),
        targets=np.concatenate([_shifted(s.token_ids) for s in samples]).astype(np.int32),
        loss_weights=np.concatenate([_shifted(s.loss_weights) for s in samples]).astype(np.float32),
        seq_lens=np.array([len(s.token_ids) for s in samples], np.int32),
    )


def _shifted(values: np.ndarray) -> np.ndarray:
    return np.append(values[1:], np.zeros(1, values.dtype))


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in groups whose lengths sum to at most `capacity`.

    Longest first (equal lengths in the given order), each into the group with the least room that still holds it.
    Uses at most 11/9 of the best possible number of groups, plus one [Johnson 1974]. O(n log capacity) in practice.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows with that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 0 < length <= capacity, f"length {length} for rows of {capacity}"
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return rows
