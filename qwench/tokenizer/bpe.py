"""Byte-level BPE in its plainest form: the definition that the fast encoders are checked against.

A vocabulary is a list of byte strings; the id of an entry is its rank. Encoding is four steps [Qwen TR 2.2]:
normalise to NFC, cut the text into pieces with `PATTERN`, start each piece from single bytes, and join the adjacent
pair with the lowest rank until no pair is in the vocabulary. Written to be read, at some 0.2 MB/s; `tokenizer.py`
encodes in bulk. Control tokens do not exist at this level.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping, Sequence

import regex

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with at most one leading space or mark
    r"|\p{N}"  # every digit alone
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, with the line ends after it
    r"|\s*[\r\n]+"  # line ends, with the blanks before them
    r"|\s+(?!\S)"  # blanks, leaving one for the next word
    r"|\s+"
)
"""How text is cut before merging: cl100k's pattern with single digits [Qwen TR 2.2]."""

_SPLIT = regex.compile(PATTERN)

# Printable bytes stand for themselves; the 68 others are moved to U+0100 and up, in order. Both the order of the first
# 256 ids and the spelling of tokens in vocab.json, merges.txt, tokenizer.json and GGUF follow from this table.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_MOVED = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_ORDER: tuple[int, ...] = _PRINTABLE + _MOVED
"""The byte behind each of the ids 0-255."""

BYTE_TO_CHAR: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE}
BYTE_TO_CHAR.update((byte, chr(0x100 + rank)) for rank, byte in enumerate(_MOVED))
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_UNSPELL = {ord(char): byte for char, byte in CHAR_TO_BYTE.items()}


def spell(token: bytes) -> str:
    """The printable form of a token's bytes: `spell(b" the") == "Ġthe"`."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def unspell(text: str) -> bytes:
    """The inverse of `spell`. Raises ValueError for a character outside the table."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError as error:
        raise ValueError(
            f"token {text!r} has {error.args[0]!r}, which stands for no byte in a byte-level vocabulary"
        ) from None


def pieces(text: str) -> list[str]:
    """Cut NFC text into the stretches that merges never cross: `pieces("I'm 42") == ["I", "'m", " ", "4", "2"]`."""
    return _SPLIT.findall(text)


def merge(piece: bytes, ranks: Mapping[bytes, int], below: int | None = None) -> list[bytes]:
    """Merge one piece: the tokens it ends in. With `below`, only entries of smaller rank may be formed."""
    limit = len(ranks) if below is None else below
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= limit:
            break
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def encode(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of `text` by definition. `ranks` maps the bytes of every regular token to its id."""
    normal = unicodedata.normalize("NFC", text)
    return [ranks[token] for piece in pieces(normal) for token in merge(piece.encode("utf-8"), ranks)]


def recover_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge list of a rank file: entry i is the pair that makes token 256 + i.

    A token is spelled with lower ranks only; in a vocabulary that BPE made, two parts remain, and they are the merge.
    Raises ValueError for a vocabulary that has a token of another kind.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for rank in range(256, len(tokens)):
        token = tokens[rank]
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [(a, b) for a, b in splits if ranks.get(a, rank) < rank and ranks.get(b, rank) < rank]
        if len(found) == 1:  # Nine of ten tokens have one candidate; only the others need the merge run.
            merges.append(found[0])
            continue
        parts = merge(token, ranks, below=rank)
        if len(parts) != 2:
            raise ValueError(
                f"token {rank} ({token!r}) is no merge of two earlier tokens, so the ranks are not those of BPE"
            )
        merges.append((parts[0], parts[1]))
    return merges
