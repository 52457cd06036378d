"""Rules for source files, after StarCoder's and The Stack v2's: line lengths, alphanumeric share, generated and data.

Thresholds are ours where those differ by language; a file is judged whole, comments included.
"""

from __future__ import annotations

import re
import string

from qwench.config import config
from qwench.types import KEEP, Verdict

_GENERATED_BY = re.compile(
    r"auto-?\s?generated|automatically generated|generated automatically|@generated|this file (?:is|was) generated|"
    r"machine generated|(?:generated|created) by [^\n]{0,80}(?:do not|don't) (?:edit|modify)|do not edit",
    re.I,
)
_BLOB_CHARS = 160
_BLOB = re.compile(
    r"[A-Za-z0-9+/]{160,}={0,2}|(?:\\x[0-9A-Fa-f]{2}){40,}|(?:\\u[0-9A-Fa-f]{4}){40,}|(?:0x[0-9A-Fa-f]{2},\s*){40,}"
)
_ALNUM = (string.ascii_letters + string.digits).encode()
_DIGITS = string.digits.encode()
_MARKUP_DATA = frozenset(("json", "yaml", "toml", "ini", "xml", "csv", "svg"))


@config
class CodeRules:
    """Limits for source code; a file that breaks one is dropped for the reason named after it."""

    max_line_chars: int = 1000
    """A longer line: "code_line_too_long"."""
    max_mean_line_chars: float = 100.0
    """Longer lines on average: "code_mean_line_too_long"."""
    max_lines: int = 100_000
    """More lines: "code_too_many_lines"."""
    min_alnum_share: float = 0.25
    """Fewer letters and digits among all characters: "code_few_alnum"."""
    min_letter_share: float = 0.2
    """Fewer letters (of any script): "code_few_letters"."""
    max_digit_share: float = 0.4
    """More digits among the visible characters: "code_data" (tables of numbers)."""
    max_blob_share: float = 0.3
    """More of the file in base64, hexadecimal or escape runs of at least 160 characters: "code_blob"."""
    drop_generated: bool = True
    """A mark of a generator in the first lines: "code_generated"."""
    generated_mark_lines: int = 8
    max_data_chars: int = 20_000
    """Longer files of data and configuration (JSON, YAML, ...): "code_data_too_long"."""


def judge_code(text: str, lang: str, rules: CodeRules) -> Verdict:
    """KEEP, or the first rule the file breaks with the measured value."""
    size = max(1, len(text))
    lines = text.split("\n")
    if len(lines) > rules.max_lines:
        return _drop("code_too_many_lines", len(lines))
    longest = max(map(len, lines))
    if longest > rules.max_line_chars:
        return _drop("code_line_too_long", longest)
    mean = size / len(lines)
    if mean > rules.max_mean_line_chars:
        return _drop("code_mean_line_too_long", mean)
    if lang in _MARKUP_DATA and size > rules.max_data_chars:
        return _drop("code_data_too_long", size)
    if rules.drop_generated and _GENERATED_BY.search("\n".join(lines[: rules.generated_mark_lines])):
        return _drop("code_generated", 1)
    data = text.encode("utf-8", "replace")
    ascii_alnum = len(data) - len(data.translate(None, _ALNUM))
    wide = len(data) - len(text)  # bytes beyond one a character: letters of other scripts, mostly
    alnum = (ascii_alnum + wide / 2) / size
    if alnum < rules.min_alnum_share:
        return _drop("code_few_alnum", alnum)
    digits = len(data) - len(data.translate(None, _DIGITS))
    letters = (ascii_alnum - digits + wide / 2) / size
    if letters < rules.min_letter_share:
        return _drop("code_few_letters", letters)
    visible = max(1, len(data.translate(None, b" \t\n\r")))
    if digits / visible > rules.max_digit_share:
        return _drop("code_data", digits / visible)
    if longest >= _BLOB_CHARS:
        blob = sum(len(match) for line in lines if len(line) >= _BLOB_CHARS for match in _BLOB.findall(line)) / size
        if blob > rules.max_blob_share:
            return _drop("code_blob", blob)
    return KEEP


def _drop(reason: str, value: float) -> Verdict:
    return Verdict(keep=False, reason=reason, value=value)
