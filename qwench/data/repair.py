"""Repair of texts that went through the wrong encoding, and Unicode NFC, before anything is measured on them.

Mojibake ("schÃ¶n") is found and undone by ftfy line by line, and only in lines that look like it, since ftfy reads
a few megabytes a second. Entities that were escaped twice ("&amp;quot;") become characters in prose. The rest is
`clean_text`: NFC, line ends, control characters. Quotes, ligatures and widths stay as the author wrote them.
"""

from __future__ import annotations

import re
from functools import cache
from html import unescape
from typing import Any

from qwench.data.text import clean_text

# What UTF-8 read as Latin-1, Windows-1252, -1251 or Mac Roman always has: a lead byte's character and a follower's.
_SUSPECT = re.compile(
    "[\u00c2-\u00f4\u0102\u0103\u0413\u0420\u0421\u0432\u221a\u00ac][\u0080-\u00bf\u0152-\u0153\u0160-\u0161\u0178"
    "\u017d-\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122\u00b1\u0402-\u040f\u0452-\u045f\u0490\u0491\u2030\u2116]"
)
_ENTITY = re.compile(r"&(?:amp;)?(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[0-9a-fA-F]{2,5});")
_INVISIBLE = (("\xa0", " "), ("\u202f", " "), ("\u2007", " "), ("\xad", ""), ("\u200b", ""), ("\u2060", ""))
"""Blanks that do not break become blanks; marks of possible breaks go."""


def repair_text(text: str, *, prose: bool = True) -> str:
    """The text as it was meant, in NFC; `prose` also resolves entities and turns no-break spaces into blanks.

    >>> repair_text("schÃ¶n &amp;amp; gut")
    'schön & gut'
    """
    if not text.isascii():
        if _SUSPECT.search(text):
            text = "\n".join(_fix(line) if _SUSPECT.search(line) else line for line in text.split("\n"))
        if prose:
            for char, instead in _INVISIBLE:
                if char in text:
                    text = text.replace(char, instead)
    if prose and "&" in text and "<" not in text and _ENTITY.search(text):
        text = _ENTITY.sub(lambda match: unescape(unescape(match[0])), text)
    return clean_text(text)


def _fix(line: str) -> str:
    # Line by line: a page often quotes broken text in the middle of good text.
    return _ftfy().fix_encoding(line)


@cache
def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise ValueError("repairing Unicode needs the ftfy package; pip install 'qwench[data]'") from None
    return ftfy
