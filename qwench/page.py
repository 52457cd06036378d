"""One offline HTML page: sections, tables, cards, and figures as inline SVG. Every value is escaped where it enters.

What a page says is its author's business (`demo/report.py`, `train/report.py`).
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a9d63; --bad: #c8553d; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .93em; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; background: var(--soft); border-radius: 4px; }
code { padding: .1em .3em; overflow-wrap: anywhere; } pre { padding: .8rem; overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5em; } .right { color: var(--good); } .wrong { color: var(--bad); }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } .wrap { overflow-x: auto; }
"""


def document(title: str, lead: str, body: Iterable[str], head: str = "") -> str:
    """A whole page; `lead`, the parts of `body` and what is added to the `head` are HTML already."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title><style>{STYLE}</style>{head}</head><body>
<h1>{text(title)}</h1><p>{lead}</p>
{"".join(body)}
</body></html>
"""


def text(value: Any) -> str:
    return html.escape(str(value))


def section(title: str, content: str) -> str:
    return f"<h2>{text(title)}</h2>\n{content}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in `numeric` are aligned right."""

    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{' class=n' if place in numeric else ''}>{cell}</{tag}>" for place, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    return f'<div class="wrap"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """Name, value and note of each."""
    inner = "".join(
        f'<div class="card">{text(name)}<b>{text(value)}</b>{text(note)}</div>' for name, value, note in entries
    )
    return f'<div class="cards">{inner}</div>'


def svg(figure: Figure) -> str:
    """The figure, closed. No date in it: the same run gives the same page."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]
