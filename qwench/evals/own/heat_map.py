"""A picture of needle-in-a-haystack results: depth by length, coloured by the share of right answers.

Pure text in, SVG out; it is meant to stand inside an HTML page and needs nothing else.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

_CELL_W, _CELL_H, _LEFT, _TOP, _FONT = 64, 26, 76, 46, "font-family='system-ui,sans-serif' font-size='12'"
_SCALE = ((165, 54, 38), (245, 197, 110), (38, 122, 140))
"""Colours of 0, one half and 1; they differ in lightness too."""


def needle_grid(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[float, int], tuple[float, int]]:
    """(depth in percent, length in tokens) -> share of right answers and their number.

    `samples`: records of a needle or passkey task as they stand in `samples/TASK.jsonl`; those of other tasks, which
    lack doc.depth, doc.length or metrics.acc, are passed over.
    """
    found: defaultdict[tuple[float, int], list[float]] = defaultdict(list)
    for sample in samples:
        try:
            place = float(sample["doc"]["depth"]), int(sample["doc"]["length"])
            found[place].append(float(sample["metrics"]["acc"]))
        except (KeyError, TypeError, ValueError):
            continue
    return {place: (sum(scores) / len(scores), len(scores)) for place, scores in found.items()}


def needle_heat_map(samples: Iterable[Mapping[str, Any]], title: str = "Needle in a haystack") -> str:
    """An SVG element, or "" where no sample is of a needle task. Cells that were not measured stay empty."""
    grid = needle_grid(samples)
    if not grid:
        return ""
    depths, lengths = sorted({depth for depth, _ in grid}), sorted({length for _, length in grid})
    width, height = _LEFT + _CELL_W * len(lengths) + 12, _TOP + _CELL_H * len(depths) + 44
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' aria-label='{html.escape(title, quote=True)}' {_FONT} fill='currentColor'>",
        f"<text x='{_LEFT}' y='18' font-weight='600'>{html.escape(title)}</text>",
        f"<text x='{_LEFT - 8}' y='{_TOP - 8}' text-anchor='end'>depth</text>",
    ]
    for row, depth in enumerate(depths):
        y = _TOP + row * _CELL_H
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 17}' text-anchor='end'>{depth:g} %</text>")
        for column, length in enumerate(lengths):
            if (depth, length) not in grid:
                continue
            share, count = grid[depth, length]
            x, says = _LEFT + column * _CELL_W, f"{length} tokens, depth {depth:g} %: {share:.0%} of {count}"
            parts.append(
                f"<g><title>{says}</title><rect x='{x}' y='{y}' width='{_CELL_W - 2}' height='{_CELL_H - 2}' rx='3' "
                f"fill='{_colour(share)}'/><text x='{x + _CELL_W / 2 - 1:g}' y='{y + 16}' text-anchor='middle' "
                f"fill='{'#fff' if share < 0.3 or share > 0.8 else '#222'}'>{100 * share:.0f}</text></g>"
            )
    for column, length in enumerate(lengths):
        x, y = _LEFT + column * _CELL_W + _CELL_W / 2 - 1, _TOP + len(depths) * _CELL_H + 14
        parts.append(f"<text x='{x:g}' y='{y}' text-anchor='middle'>{_short(length)}</text>")
    parts.append(f"<text x='{_LEFT}' y='{height - 8}'>length in tokens; numbers: right answers in %</text></svg>")
    return "".join(parts)


def _colour(share: float) -> str:
    low, high = (_SCALE[0], _SCALE[1]) if share < 0.5 else (_SCALE[1], _SCALE[2])
    part = 2 * share if share < 0.5 else 2 * share - 1
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def _short(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)
