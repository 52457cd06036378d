"""The pool of cache blocks: owners, remembered prefixes and the order of their loss, against a model with content."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwench.engine.blocks import BlockPool, prefix_hashes

SIZE, BLOCKS = 2, 9


class Blocks(RuleBasedStateMachine):
    """Sequences of tokens from a small alphabet take blocks, fill and name them, and give them back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """What was written to a block: the tokens up to its end."""
        self.idle: list[int] = []
        """Blocks without an owner that keep a prefix, the longest unused first."""

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), named=st.integers(0, 4))
    def admit(self, tokens: list[int], named: int) -> None:
        names = prefix_hashes(tokens, SIZE)
        matched = self.pool.match(names)
        for index, block in enumerate(matched):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE]), "it must hold what was asked for"
        self.idle = [block for block in self.idle if block not in matched]
        if len(matched) < len(names):
            wanted = tuple(tokens[: (len(matched) + 1) * SIZE])
            assert wanted not in self.remembered(), "the longest known prefix must be found"
        needed = -(-len(tokens) // SIZE) - len(matched)
        num_free, keeping = self.pool.num_free, list(self.idle)
        blocks = self.pool.allocate(needed)
        if blocks is None:
            assert num_free < needed
            self.give(matched)
            return
        lost = max(0, needed - (num_free - len(keeping)))
        assert [b for b in blocks if b in keeping] == keeping[:lost], (
            "the longest unused prefixes go first, none too many"
        )
        self.idle = keeping[lost:]
        assert not set(blocks) & set(self.owners()), "what is given out must be nobody's"
        for offset, block in enumerate(blocks):
            self.content[block] = tuple(tokens[: (len(matched) + offset + 1) * SIZE])
        mine = matched + blocks
        self.held.append(mine)
        for index in range(len(matched), min(len(names), len(matched) + named)):
            self.pool.name(mine[index], names[index])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.idle.clear()
        assert not self.remembered()

    def give(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        owned = self.owners()
        self.idle += [block for block in reversed(blocks) if block not in owned and block in self.pool._hash_of]

    def owners(self) -> Counter[int]:
        return Counter(block for blocks in self.held for block in blocks)

    def remembered(self) -> set[tuple[int, ...]]:
        return {self.content[block] for block in self.pool._hash_of}

    @invariant()
    def counts(self) -> None:
        owners = self.owners()
        assert self.pool._owners == [owners[block] for block in range(BLOCKS)]
        assert owners[0] == 0, "block 0 is nobody's"
        assert self.pool.num_free == BLOCKS - 1 - len(owners)
        assert set(self.pool._free) == set(range(1, BLOCKS)) - set(owners)
        assert {name: block for block, name in self.pool._hash_of.items()} == self.pool._block_of

    @invariant()
    def names_are_true(self) -> None:
        for block, name in self.pool._hash_of.items():
            assert prefix_hashes(self.content[block], SIZE)[-1] == name


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_use = Blocks.TestCase


def test_the_longest_unused_prefix_is_lost_first() -> None:
    pool = BlockPool(5, 1)
    names = prefix_hashes([1, 2, 3], 1)
    blocks = pool.allocate(3) or []
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, name)
    pool.release(blocks)
    assert pool.num_free == 4
    first = pool.allocate(1)
    assert first == [4], "a block without memory goes first"
    assert pool.allocate(1) == [blocks[2]], "then the end of the prefix: its beginning serves more prompts"
    assert pool.match(names) == blocks[:2]
    assert pool.allocate(1) is None


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(4, 1, caching=False)
    names = prefix_hashes([1], 1)
    blocks = pool.allocate(1) or []
    pool.name(blocks[0], names[0])
    assert pool.match(names) == []


def test_a_block_given_back_twice_is_our_bug() -> None:
    pool = BlockPool(3, 1)
    blocks = pool.allocate(1) or []
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5), st.integers(0, 30))
def test_hashes(tokens: list[int], size: int, cut: int) -> None:
    """One for each full block; they depend on all tokens before, and can be computed piece by piece."""
    names = prefix_hashes(tokens, size)
    assert len(names) == len(tokens) // size
    assert prefix_hashes(tokens, size, prefix_hashes(tokens[:cut], size)) == names
    assert prefix_hashes(tokens[:cut], size, names) == prefix_hashes(tokens[:cut], size)
    assert len(set(names)) == len(names)
    if tokens:
        changed = [tokens[0] + 1, *tokens[1:]]
        assert not set(prefix_hashes(changed, size)) & set(names)


def test_real_ids_fit() -> None:
    assert prefix_hashes([151_935, 0], 2) != prefix_hashes([0, 151_935], 2)
