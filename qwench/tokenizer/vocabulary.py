"""The value that every tokenizer file is read into and written from: regular tokens, merges, control tokens.

Not an encoder (see `tokenizer.py`) and not a reader (see `files.py`).
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwench.tokenizer import bpe, bpe_native
from qwench.tokenizer.special import ENDOFTEXT, IM_END, IM_START, ControlToken, control_tokens


@dataclass(frozen=True)
class Vocabulary:
    """Regular tokens in id order (256 bytes first), the merges that make them, and the control tokens behind them.

    >>> Vocabulary.from_tokens([bytes([b]) for b in bpe.BYTE_ORDER] + [b"he"], "qwen2").merges
    [(b'h', b'e')]
    """

    tokens: Sequence[bytes]
    """The bytes of ids 0 ... num_regular - 1."""
    merges: Sequence[tuple[bytes, bytes]] = field(repr=False)
    """Entry i makes token 256 + i."""
    controls: tuple[ControlToken, ...]

    def __post_init__(self) -> None:
        """Raises ValueError, in one sentence, for what is not laid out as Qwen's vocabulary is."""
        if len(self.tokens) < 256 or any(self.tokens[i] != bytes([b]) for i, b in enumerate(bpe.BYTE_ORDER)):
            raise ValueError(
                "ids 0-255 are not the 256 single bytes in GPT-2's order, so this is no vocabulary of Qwen's kind"
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("the vocabulary has the same token twice; the file is damaged")
        if len(self.merges) != len(self.tokens) - 256:
            raise ValueError(
                f"{len(self.tokens)} tokens need {len(self.tokens) - 256} merges, but there are {len(self.merges)}; "
                "the files do not belong together or are truncated"
            )
        for number, (left, right) in enumerate(self.merges):
            if left + right != self.tokens[256 + number]:
                raise ValueError(
                    f"merge {number} makes {left + right!r} but token {256 + number} is {self.tokens[256 + number]!r}; "
                    "only vocabularies whose ids follow the merge order can be used"
                )
        for number, control in enumerate(self.controls):
            if control.id != len(self.tokens) + number:
                raise ValueError(
                    f"control token {control.content!r} has id {control.id} where {len(self.tokens) + number} is next"
                )
        names = {control.content for control in self.controls}
        if missing := [name for name in (ENDOFTEXT, IM_START, IM_END) if name not in names]:
            raise ValueError(f"the vocabulary lacks the control token {missing[0]}, which every Qwen tokenizer has")
        if len(names) != len(self.controls) or "" in names:
            raise ValueError("the control tokens are not distinct, non-empty strings")

    @classmethod
    def from_tokens(cls, tokens: Sequence[bytes], generation: str) -> Vocabulary:
        """From the bytes of the regular tokens in rank order; merges are recovered from the ranks."""
        merges = bpe_native.split_tokens(tokens) or bpe.recover_merges(tokens)
        return cls(tokens, merges, control_tokens(generation, len(tokens)))

    @functools.cached_property
    def ranks(self) -> Mapping[bytes, int]:
        """Bytes of a regular token -> its id."""
        return {token: rank for rank, token in enumerate(self.tokens)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides ids: regular tokens, control tokens and the splitting pattern."""
        digest = hashlib.sha256(b"qwench tokenizer 1\0")
        for entry in self._entries():
            digest.update(struct.pack("<I", len(entry)) + entry)
        return digest.hexdigest()

    def _entries(self) -> Iterator[bytes]:
        yield bpe.PATTERN.encode()
        yield from self.tokens
        yield b""  # no token is empty: this marks where the control tokens begin
        yield from (control.content.encode() for control in self.controls)

    def __len__(self) -> int:
        """Number of ids that can be produced: regular and control tokens."""
        return len(self.tokens) + len(self.controls)
