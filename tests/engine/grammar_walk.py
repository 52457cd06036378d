"""What tests of grammars share: schemas, and random answers, at every step any token of the mask with equal chance."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from qwench.engine.grammar import GrammarCompiler, Matcher
from qwench.types import Grammar

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": ["x", "é", 3, None, True]}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 1000},
    {"type": "integer", "multipleOf": 7, "minimum": 14, "maximum": 700},
    {"const": {"k": [1, "two"]}},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 3}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}}, {"required": ["a"]}]},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    },
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "string", "format": "date"},
]


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", value=json.dumps(value))


def feed(compiler: GrammarCompiler, matcher: Matcher, text: str) -> bool:
    """Whether the matcher takes the text."""
    for token in compiler.tokenizer.encode(text):
        try:
            matcher.consume(token)
        except ValueError:
            return False
    return True


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
