"""Random answers that follow a grammar: at every step any token of the mask, with equal chance."""

from __future__ import annotations

import random

import numpy as np

from qwench.engine.grammar import GrammarCompiler, Matcher


def allowed(matcher: Matcher) -> list[int]:
    """The tokens of the mask."""
    row = np.full(matcher.compiler.num_words, -1, np.int32)
    matcher.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(compiler: GrammarCompiler, matcher: Matcher, rng: random.Random, patience: int = 40) -> str:
    """A whole answer. After `patience` tokens, closing characters are preferred, so that strings and lists end."""
    ids: list[int] = []
    for step in range(4000):
        choices = allowed(matcher)
        assert choices, "a mask without any token"
        if step > patience:
            ranks = compiler.tokenizer.vocabulary.ranks
            closing = [*compiler.eos_token_ids, ranks[b'"'], ranks[b"}"], ranks[b"]"]]
            choices = [token for token in closing if token in choices][:1] or choices
        token = rng.choice(choices)
        matcher.consume(token)
        if token in compiler.eos_token_ids:
            assert matcher.is_finished
            return compiler.tokenizer.decode_bytes(ids).decode("utf-8")  # strictly: every answer is whole characters
        ids.append(token)
    raise AssertionError(f"the answer does not end: {compiler.tokenizer.decode(ids)[:300]!r}")
