"""Perplexity by position: what a token costs at each place of the context, over windows of local texts.

A model that reads long texts well pays less the more it has seen; one that was not trained on a length pays more from
there on. Each window is asked in bins, every bin given all text before it; loss is per token of the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwench.evals import context
from qwench.evals.local_files import Files
from qwench.evals.own.lengths import dataset, read_count, read_lengths, refuse_unknown
from qwench.evals.own.texts import documents
from qwench.tokenizer import Tokenizer

LOOK = 64
"""Tokens after a wanted edge among which a clean one is looked for."""


def docs(**options: Any) -> Any:
    """A document a window. Options: files (a pattern; default wikitext2_valid.txt), length (tokens; default 4096 or the
    context), bins (16), windows (at most; 32).

    Raises MissingDataError and ValueError: no file, or a text shorter than one window.
    """
    refuse_unknown(options)
    running = context.current()
    length = read_lengths(options.get("length"), running.max_len - 1)[0]
    bins = read_count("bins", options.get("bins", 16), length // 4)
    most = read_count("windows", options.get("windows", 32))
    pattern = str(options.get("files", "wikitext2_valid.txt"))
    path = Files(running.data_dirs).find(pattern)
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(whole_texts(path)):
        tokens = running.tokenizer.encode(text)
        for window, start in enumerate(range(0, len(tokens) - length + 1, length)):
            if len(rows) < most:
                edges = cut(running.tokenizer, tokens[start : start + length], bins)
                rows.append({"file": path.name, "text": number, "window": window, "start": start, "edges": edges})
    if not rows:
        raise ValueError(
            f"{path} has no text of {length} tokens; give metadata length smaller, or files with longer texts"
        )
    return dataset(rows)


def whole_texts(path: Path) -> list[str]:
    """A plain text file is one text; a JSONL file has one a line."""
    return documents(Files((path.parent,)), path.name, split=False)


def is_clean(tokenizer: Tokenizer, tokens: Sequence[int], at: int) -> bool:
    """Whether text cut before token `at` is encoded into the same tokens on both sides, as far as is seen nearby."""
    before, after = tokens[max(0, at - LOOK) : at], tokens[at : at + LOOK]
    left = tokenizer.decode(before).lstrip("\ufffd")  # the far ends may fall into a character
    right = tokenizer.decode(after).rstrip("\ufffd")
    if not left or not right or "\ufffd" in left[-1] + right[0] or left[-1].isspace():
        return False  # blanks at a context's end would move to the continuation
    return tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)


def cut(tokenizer: Tokenizer, tokens: Sequence[int], bins: int) -> list[int]:
    """Places that split a window into `bins` parts of about equal numbers of tokens, 0 and the end included; each is
    moved on to where words part, if there is such a place near."""
    edges = [0]
    for number in range(1, bins):
        wanted = number * len(tokens) // bins
        near = range(max(wanted, edges[-1] + 1), min(wanted + LOOK, len(tokens)))
        edges.append(next((at for at in near if is_clean(tokenizer, tokens, at)), max(wanted, edges[-1] + 1)))
    return [*edges, len(tokens)]


def parts(doc: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(text before, text of the bin, tokens of the bin) for each bin of a window."""
    running = context.current()
    path = Files(running.data_dirs).find(doc["file"])
    tokens = _encoded(path, doc["text"])[doc["start"] : doc["start"] + doc["edges"][-1]]
    found: list[tuple[str, str, int]] = []
    for first, last in zip(doc["edges"], doc["edges"][1:], strict=False):
        found.append(
            (running.tokenizer.decode(tokens[:first]), running.tokenizer.decode(tokens[first:last]), last - first)
        )
    return found


_last: dict[tuple[str, str, int, int], list[int]] = {}


def _encoded(path: Path, number: int) -> list[int]:
    tokenizer = context.current().tokenizer
    key = (tokenizer.fingerprint, str(path), path.stat().st_mtime_ns, number)
    if key not in _last:
        _last.clear()
        _last[key] = tokenizer.encode(whole_texts(path)[number])
    return _last[key]


def bin_name(edges: Sequence[int], number: int) -> str:
    """Bins are named by the positions that were wanted, so that windows with moved edges share them."""
    count, length = len(edges) - 1, edges[-1]
    return f"nll_{number * length // count}_{(number + 1) * length // count}"
