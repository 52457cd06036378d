"""Exact duplicates [Qwen TR 2.1, step 2]: equal after normalisation, found by 128-bit hashes in one streaming pass.

Kept in memory are a hash and an id for every distinct text, never the texts. What Qwen's normalisation was is
unpublished; ours is Unicode NFKC, case folding and one blank for any white space. Near duplicates (MinHash) are
another stage.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from qwench.types import Document

_PARAGRAPH_BREAK = re.compile(r"(\n(?:[ \t]*\n)+)")


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


def deduplicate_paragraphs(
    documents: Iterable[Document], duplicates: list[Duplicate] | None = None, *, min_chars: int = 200
) -> Iterator[Document]:
    """Documents without the paragraphs that stood before, in another document or the same.

    Paragraphs are separated by blank lines; shorter ones than `min_chars` always stay, because headings and closing
    braces repeat legitimately. A document of which nothing but white space is left is dropped. Every removed paragraph
    is appended to `duplicates`.
    """
    first: dict[bytes, str] = {}
    for document in documents:
        kept: list[str] = []
        removed = False
        # Odd parts are the breaks; a removed paragraph takes the break before it along.
        parts = _PARAGRAPH_BREAK.split(document.text)
        for place in range(0, len(parts), 2):
            paragraph = parts[place]
            if len(paragraph) >= min_chars:
                key = text_hash(paragraph)
                original = first.get(key)
                if original is not None:
                    removed = True
                    if duplicates is not None:
                        duplicates.append(Duplicate(id=document.id, duplicate_of=original, num_chars=len(paragraph)))
                    continue
                first[key] = document.id
            if kept and place:
                kept.append(parts[place - 1])
            kept.append(paragraph)
        text = "".join(kept)
        if not removed:
            yield document
        elif text.strip():
            yield dataclasses.replace(document, text=text)
