"""Who owns which block of the key/value cache, and which blocks hold a known beginning of a prompt.

Blocks are numbers; the tensors live with the runner. Block 0 is never given out: rows without a sequence write there.
A block is in use (it has owners), or free. A free block may still hold the keys and values of a known token prefix,
named by the hash of that prefix; it is found again by the hash until the block is given out for something else, the
longest unused one first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        """`num_blocks` counts block 0 as well."""
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be given out, those with a remembered prefix included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each and no content, or None when there are not as many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
            if (name := self._hash_of.pop(block, None)) is not None:
                del self._block_of[name]
        return blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix; each gains an owner."""
        found: list[int] = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
            self._owners[block] += 1
            self._free.pop(block, None)
        return found

    def name(self, block: int, prefix: bytes) -> None:
        """Say that `block` now holds the last block of a prefix. The first block of a name keeps it."""
        if self.caching and prefix not in self._block_of and block not in self._hash_of:
            self._hash_of[block], self._block_of[prefix] = prefix, block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block. Later blocks of a sequence are reused before earlier ones."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0
            if self._owners[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # nothing to lose: reuse it first

    def forget(self) -> None:
        """Drop all remembered prefixes."""
        self._hash_of.clear()
        self._block_of.clear()


def prefix_hashes(token_ids: Sequence[int] | np.ndarray, block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Names of the prefixes that end at each full block: 128-bit hashes, each over the one before and its tokens.

    `known` are the first of them, from an earlier call with fewer tokens.
    """
    names = list(known)
    num_full = len(token_ids) // block_size
    if num_full <= len(names):
        return names[:num_full]
    start = len(names) * block_size
    tokens = np.asarray(token_ids[start : num_full * block_size], np.int32).tobytes()
    width = 4 * block_size
    last = names[-1] if names else b""
    for at in range(0, len(tokens), width):
        last = hashlib.blake2b(last + tokens[at : at + width], digest_size=16).digest()
        names.append(last)
    return names
