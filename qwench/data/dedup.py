"""Duplicates: what equal means, the settings of the dedup stages, and exact dedup of a stream in one process.

What Qwen's normalisation was is unpublished [Qwen TR 2.1, step 2]; ours is Unicode NFKC, case folding and one blank for
any white space. `deduplicate` keeps a hash and an id for every distinct text in memory, never the texts, which suits
what one process reads anyway. Corpora of any size, near duplicates and the choice of survivors by quality are the
pipeline's (`data.pipeline.dedup`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from qwench.config import config
from qwench.data.minhash import MinHashSettings
from qwench.types import Document


@config
class DedupSettings:
    """What counts as a duplicate and which of several stays."""

    exact: bool = True
    """Drop documents equal to a better one after normalisation."""
    near: bool = True
    """Drop documents in a cluster of near duplicates (MinHash) with a better one."""
    minhash: MinHashSettings = MinHashSettings()
    prefer: tuple[str, ...] = ("quality", "chars")
    """The survivor of a cluster has the most of the first, then of the second, ...: "chars" (length of the cleaned
    text) or a number in the document's meta; with "-" before the name, the least. Who has no such number comes last.
    What is left is decided by a hash of the id, never by order."""
    paragraph_chars: int = 200
    """Cut paragraphs of at least this length that a better document has as well; 0: none."""
    line_chars: int = 0
    """The same for lines; 0: none."""
    substring_tokens: int = 0
    """Cut passages of this many words (or letters of scripts without spaces) and more that stand, character for
    character, in a better document or earlier in the same; 0: none."""
    substring_slack: int = 16
    """A repeated passage is found if it is this many words longer, and up to as many words stay at its ends. Smaller
    needs more disk: about 64 bytes a word, divided by this."""
    min_left_chars: int = 1
    """A document of which less is left after the cuts is dropped."""
    index: Path | None = None
    """A directory that remembers the hashes of earlier runs: their documents count as duplicates too, and this run's
    are added to it. Paragraphs, lines and passages are compared within a run only."""
    keep_published: bool = True
    """What an earlier run with this index kept stays, whatever comes later; otherwise a better one displaces it."""
    sample_pairs: int = 100
    """Pairs of near duplicates written out for the report."""
    memory_mb: int = 256
    """About what a process holds in these stages besides one part file; decides how many pieces the work has."""

    def __post_init__(self) -> None:
        if not self.prefer or not all(name.lstrip("-") for name in self.prefer):
            raise ValueError('prefer names at least one field, for example ["chars"]')
        if self.memory_mb < 1 or self.substring_slack < 1 or self.sample_pairs < 0 or self.min_left_chars < 0:
            raise ValueError("memory_mb and substring_slack are at least 1, sample_pairs and min_left_chars at least 0")
        if min(self.paragraph_chars, self.line_chars, self.substring_tokens) < 0:
            raise ValueError("paragraph_chars, line_chars and substring_tokens are lengths, or 0 for none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """What was taken out of document `id` because document `duplicate_of` had it before.

    >>> Duplicate(id="b.txt", duplicate_of="a.txt", num_chars=1200)
    """

    id: str
    duplicate_of: str
    num_chars: int


def normalise(text: str) -> str:
    """The form in which texts are compared.

    >>> normalise(" Ｈello\\n  WORLD ")
    'hello world'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts equal after normalisation."""
    return blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def deduplicate(documents: Iterable[Document], duplicates: list[Duplicate] | None = None) -> Iterator[Document]:
    """The first document of every text, in order; what is left out is appended to `duplicates`."""
    first: dict[bytes, str] = {}
    for document in documents:
        key = text_hash(document.text)
        original = first.get(key)
        if original is None:
            first[key] = document.id
            yield document
        elif duplicates is not None:
            duplicates.append(Duplicate(id=document.id, duplicate_of=original, num_chars=len(document.text)))
