"""Prompts of a wanted length: how many pieces of filler fit a number of the model's tokens.

Used by needle in a haystack and the RULER tasks. A document of theirs holds no text, only what its text is made from,
so that a million tokens are written when they are asked for and not before.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

from qwench.evals import context

RESERVE = 64
"""Tokens of a length that are left to the chat template."""
METRIC_LENGTHS = (*(1024 << power for power in range(11)), 1_000_000)
"""Lengths that have a metric of their own: 1024 to 1048576, and the million of Qwen2.5-1M."""
OPTIONS = ("lengths", "samples", "depths", "instances", "windows", "bins", "files", "length", "rows")
"""Options of all tasks of ours together; one `--metadata` may serve several tasks."""
FIXED = ("version", "chat", "primary", "config_source", "num_fewshot")
"""What YAML files, and lm-eval, say beside options."""


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that no task of ours has."""
    for name in options:
        if name not in OPTIONS and name not in FIXED:
            raise ValueError(f"metadata {name!r} is no option of these tasks; there are {', '.join(OPTIONS)}")


def read_count(name: str, value: Any, most: int = 1_000_000) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"metadata {name} is {value!r}; give a whole number from 1 to {most}")
    return value


def read_lengths(value: Any, max_len: int) -> list[int]:
    """Lengths in tokens from 8192, "128k", "1M" or a list of such; None: 4096, or the context if that is shorter.

    Raises ValueError for what is no length, and for one that the model cannot be given.
    """
    if value is None:
        return [min(4096, max_len)]
    found: list[int] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        match = re.fullmatch(r"(\d+)\s*([kKmM]?)", str(item).strip())
        if not match or isinstance(item, bool) or int(match[1]) < 1:
            raise ValueError(f'metadata lengths: {item!r} is no length; give tokens such as 4096, "128k" or "1M"')
        length = int(match[1]) * {"": 1, "k": 1024, "m": 1 << 20}[match[2].lower()]
        if length > max_len:
            raise ValueError(
                f"a length of {length} tokens was asked for, but the model holds {max_len}; give metadata lengths that "
                "are not longer, or a larger max_len"
            )
        found.append(length)
    if not found:
        raise ValueError("metadata lengths is empty; give at least one length")
    return list(dict.fromkeys(found))


def seeded(*parts: Any) -> Random:
    """Random numbers that depend on the parts alone, on every machine."""
    return Random(zlib.crc32(repr(parts).encode()) | (len(parts) << 32))


def count_tokens(text: str) -> int:
    return len(context.current().tokenizer.encode(text))


def largest(build: Callable[[int], str], budget: int, least: int = 1, what: str = "") -> int:
    """The largest number of pieces, up to some in a thousand, whose text has at most `budget` tokens.

    Raises ValueError where not even `least` pieces fit.
    """
    low, low_tokens = least, count_tokens(build(least))
    if low_tokens > budget:
        raise ValueError(
            f"{what or 'a prompt'} needs at least {low_tokens} tokens, but {budget} are left of the length after the "
            "answer and the chat template; give a larger length"
        )
    high, high_tokens, slope = None, 0, 1.0
    probe = low + 16
    while high is None or high - low > 1 + low // 1000:
        tokens = count_tokens(build(probe))
        if tokens > budget:
            high, high_tokens = probe, tokens
        else:
            slope = (tokens - low_tokens) / (probe - low)
            low, low_tokens = probe, tokens
        if (budget - low_tokens) * 500 < budget:
            break
        if high is None:
            probe = low + max(1, min(int((budget - low_tokens) / max(slope, 0.25)), 100 * low))
            continue
        # Nearly a straight line, so the answer is near the chord; the middle where that would not narrow things down.
        guess = low + int((high - low) * (budget - low_tokens) / max(1, high_tokens - low_tokens))
        near = (high - low) // 8
        probe = max(low + 1, min(guess if low + near <= guess <= high - near else (low + high) // 2, high - 1))
    return low


_fitted: dict[tuple[Any, ...], int] = {}


def fitted(
    key: Sequence[Any], build: Callable[[int], str], budget: int, least: int = 1, most: int | None = None
) -> str:
    """The longest text that `build` gives within `budget` tokens. `key`: task and length; documents of the same key
    have about as many pieces, so the number is looked for once."""
    name = (context.current().tokenizer.fingerprint, *key)
    pieces = _fitted.get(name)
    if pieces is None:
        pieces = _fitted[name] = largest(build, budget, least, str(key[0]))
    pieces = max(pieces, least)
    text = build(pieces)
    if (tokens := count_tokens(text)) < 0.97 * budget:  # this document's words are shorter
        pieces = max(pieces, int(pieces * budget / tokens * 0.99))
        text = build(pieces)
    while count_tokens(text) > budget:  # or longer
        if pieces == least:
            raise ValueError(f"{key[0]}: a prompt does not fit {budget} tokens; give a larger length")
        pieces = max(least, min(pieces - 1, int(pieces * 0.98)))
        text = build(pieces)
    return text


def by_length(name: str, value: float, length: int) -> dict[str, float]:
    """A metric, and the same for its length where that has one."""
    return {name: value, **({f"{name}_{length}": value} if length in METRIC_LENGTHS else {})}


def dataset(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows as lm-eval takes them from `custom_dataset`."""
    import datasets

    return datasets.DatasetDict({"test": datasets.Dataset.from_list([dict(row) for row in rows])})
