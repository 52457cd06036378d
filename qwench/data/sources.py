"""Token shards of several directories as one stream, in which every token knows its directory.

    sources = JoinedShards.open(["shards/web", "shards/code"], tokenizer.fingerprint)
    sources.names                                 # ("web", "code")

Documents and tokens are numbered through all directories, so that a dataset shuffles them as those of one, and each
source has its share of the rows by its size. Other shares (a mixture with weights) are not made here.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qwench.data.shards import TokenShards


class JoinedShards:
    """The face of `TokenShards` over several of them, by name. Raises ValueError for shards of several tokenizers."""

    def __init__(self, shards: Mapping[str, TokenShards]) -> None:
        if not shards:
            raise ValueError("there are no token shards; give one directory at least")
        self.names = tuple(shards)
        self.members = tuple(shards.values())
        first = self.members[0]
        for member in self.members:
            if member.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(
                    f"the token shards in {first.directory} and {member.directory} were made with different "
                    "tokenizers; encode the documents of one of them again"
                )
        self._token_starts = np.cumsum([0, *(member.num_tokens for member in self.members)]).tolist()
        self._document_starts = np.cumsum([0, *(member.num_documents for member in self.members)])

    @staticmethod
    def open(directories: Sequence[Path], tokenizer_fingerprint: str | None = None) -> JoinedShards:
        """Map the shards of all directories, named as `names_of` does. Raises ValueError as `TokenShards.open` does."""
        opened = [TokenShards.open(directory, tokenizer_fingerprint) for directory in directories]
        return JoinedShards(dict(zip(names_of(directories), opened, strict=True)))

    @property
    def directory(self) -> str:
        """All directories, for messages."""
        return ", ".join(str(member.directory) for member in self.members)

    @property
    def num_tokens(self) -> int:
        return self._token_starts[-1]

    @property
    def num_documents(self) -> int:
        return int(self._document_starts[-1])

    @property
    def fingerprint(self) -> str:
        """That of the shards; of several directories it depends on their order, not on their names."""
        if len(self.members) == 1:
            return self.members[0].fingerprint
        return hashlib.sha256(" ".join(member.fingerprint for member in self.members).encode()).hexdigest()

    def source_of(self, token: int) -> int:
        """Which of `names` the token of this number belongs to."""
        return bisect_right(self._token_starts, token) - 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids [stop - start] of the joined stream, all of one document."""
        source = self.source_of(start)
        base = self._token_starts[source]
        return self.members[source].tokens(start - base, stop - base)

    def document_spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token (numbered through all directories) and length of documents: int64 [N] -> two int64 [N]."""
        starts, lengths = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        sources = np.searchsorted(self._document_starts, indices, side="right") - 1
        for source in set(sources.tolist()):
            here = sources == source
            begin, lengths[here] = self.members[source].document_spans(indices[here] - self._document_starts[source])
            starts[here] = begin + self._token_starts[source]
        return starts, lengths

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """`TokenShards.verify` of all."""
        for member in self.members:
            member.verify(share, shares)


def names_of(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart: a/train, b/train; web, code. Raises ValueError for a
    directory that is given twice."""
    resolved = [directory.resolve() for directory in directories]
    for number, directory in enumerate(resolved):
        if directory in resolved[:number]:
            raise ValueError(f"the token shards {directories[number]} are given twice; give every directory once")
    depth = 1
    while True:
        names = ["/".join(directory.parts[-depth:]) for directory in resolved]
        if len(set(names)) == len(names):
            return names
        depth += 1
