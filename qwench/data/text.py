"""Cleaning a text and judging it by rules: pure functions on strings, aware of scripts that write no spaces.

Rules stand for the "rule-based filters" of [Qwen TR 2.1, step 4], whose thresholds are unpublished; the defaults here
are ours, loose enough for any text that a person would call text. Model-based filters, language identification and
fuzzy duplicates are not in this file.
"""

from __future__ import annotations

import dataclasses
import re
import string
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwench.config import config
from qwench.types import KEEP, Document, Verdict

# Scripts without spaces between words, as ranges for a character class.
_HAN_KANA_HANGUL = "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff"
_HAN_KANA_HANGUL += "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = re.compile(f"[{_HAN_KANA_HANGUL}{_SOUTH_EAST_ASIAN}\u3000-\u3004\uff00-\uff65]")
_IDEOGRAPH = re.compile(f"[{_HAN_KANA_HANGUL}]")
_THAI_LIKE = re.compile(f"[{_SOUTH_EAST_ASIAN}]")
_SPACED_WORD = re.compile(rf"[^\W_{_HAN_KANA_HANGUL}{_SOUTH_EAST_ASIAN}]+(?:['’\-][^\W_]+)*")

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb]")
_ASCII = re.compile("[\x00-\x7f]+")
_ASCII_LETTERS = string.ascii_letters.encode()
_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANKS = " \t\u3000\xa0"
_BLANK_LINES = re.compile("\n{4,}")


def clean_text(text: str) -> str:
    """The text in Unicode NFC with `\\n` line ends, without control characters, trailing blanks and outer blank lines.

    Byte order marks go, lone surrogates become U+FFFD, more than two blank lines become two; indentation and everything
    else inside lines stays. Cleaning a clean text changes nothing.

    >>> clean_text("\\ufeffcafe\\u0301 \\r\\n\\r\\n\\x00done\\n")
    'café\\n\\ndone'
    """
    text = _CONTROLS.sub("", _SURROGATES.sub("\ufffd", text))
    text = unicodedata.normalize("NFC", text)
    # splitlines knows every line end of Unicode
    text = "\n".join([line.rstrip(_BLANKS) for line in text.splitlines()])
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


# ------------------------------------------------------------------------------------------------------- measurements
def count_words(text: str) -> float:
    """Words of any script: a Chinese, Japanese or Korean character counts 1/2, one of Thai, Khmer or Burmese 1/5."""
    spaced = sum(1 for _ in _SPACED_WORD.finditer(text))
    return spaced + len(_IDEOGRAPH.findall(text)) / 2 + len(_THAI_LIKE.findall(text)) / 5


def letter_share(text: str) -> float:
    """Share of letters and combining marks among the characters that are no white space."""
    visible = "".join(text.split())
    if not visible:
        return 0.0
    data = visible.encode("utf-8", "replace")
    letters = len(data) - len(data.translate(None, _ASCII_LETTERS))
    letters += sum(c.isalpha() or unicodedata.category(c)[0] == "M" for c in _ASCII.sub("", visible))
    return letters / len(visible)


def unbroken_share(text: str, line_chars: int) -> float:
    """Share of characters in lines longer than `line_chars` that hardly break into words: minified code, base64.

    Hardly: less than 8 % blanks among the characters of scripts that use blanks (English prose has about 16 %).
    """
    unbroken = 0
    for line in text.split("\n"):
        if len(line) > line_chars:
            with_blanks = len(line) - len(_UNSPACED.findall(line))
            if line.count(" ") + line.count("\t") < 0.08 * with_blanks:
                unbroken += len(line)
    return unbroken / max(1, len(text))


def duplicate_line_share(text: str) -> float:
    """Share of characters in lines that stood in the text before (Gopher's duplicate-line rule)."""
    seen: set[str] = set()
    duplicate = total = 0
    for line in text.split("\n"):
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            duplicate += len(stripped)
        seen.add(stripped)
    return duplicate / max(1, total)


def compressed_share(text: str) -> float:
    """Size after zlib divided by size before; prose has 0.3 to 0.6, endless repetition less than 0.1."""
    data = text.encode("utf-8", "replace")
    return len(zlib.compress(data, 1)) / max(1, len(data))


# -------------------------------------------------------------------------------------------------------------- rules
@config
class TextRules:
    """Limits of the rules; a text that breaks one is dropped for the reason named after it."""

    min_words: float = 5
    """Fewer words: "too_short"."""
    max_replacement_share: float = 0.002
    """More U+FFFD among the characters: "undecodable"."""
    long_line_chars: int = 1000
    """A line longer than this that hardly breaks into words is suspect."""
    max_unbroken_share: float = 0.3
    """More of the text in such lines: "minified"."""
    min_letter_share: float = 0.4
    """Fewer letters among the visible characters: "few_letters"."""
    max_duplicate_line_share: float = 0.4
    """More of the text in lines that stood there before: "repeated_lines"."""
    min_compressed_share: float = 0.1
    """Compresses to less: "repetitive" (texts of at least 1,000 characters)."""


CODE_RULES = TextRules(min_letter_share=0.25, max_duplicate_line_share=0.6)
"""For source code, where braces and short statements repeat."""


def rules_for(document: Document) -> TextRules:
    return CODE_RULES if document.kind == "code" else TextRules()


def judge_text(text: str, rules: TextRules) -> Verdict:
    """KEEP, or the first rule the (cleaned) text breaks, with the measured value. Cheap rules come first."""
    replacement = text.count("\ufffd") / max(1, len(text))
    if replacement > rules.max_replacement_share:
        return Verdict(keep=False, reason="undecodable", value=replacement)
    # The beginning nearly always has words enough, and counting is the slowest rule.
    words = count_words(text[:4096])
    if words < rules.min_words and (words := count_words(text)) < rules.min_words:
        return Verdict(keep=False, reason="too_short", value=words)
    unbroken = unbroken_share(text, rules.long_line_chars)
    if unbroken > rules.max_unbroken_share:
        return Verdict(keep=False, reason="minified", value=unbroken)
    letters = letter_share(text)
    if letters < rules.min_letter_share:
        return Verdict(keep=False, reason="few_letters", value=letters)
    duplicate = duplicate_line_share(text)
    if duplicate > rules.max_duplicate_line_share:
        return Verdict(keep=False, reason="repeated_lines", value=duplicate)
    if len(text) >= 1000:
        compressed = compressed_share(text)
        if compressed < rules.min_compressed_share:
            return Verdict(keep=False, reason="repetitive", value=compressed)
    return KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A document that a rule took out.

    >>> Dropped(id="a.js", verdict=Verdict(keep=False, reason="minified", value=0.98))
    """

    id: str
    verdict: Verdict


def clean_documents(
    documents: Iterable[Document], rules: TextRules | None = None, dropped: list[Dropped] | None = None
) -> Iterator[Document]:
    """Clean every text and keep the documents that break no rule; the others are appended to `dropped`.

    Without `rules` source code (kind "code") is judged by CODE_RULES and everything else by the defaults.
    """
    for document in documents:
        text = clean_text(document.text)
        verdict = judge_text(text, rules or rules_for(document))
        if verdict.keep:
            yield dataclasses.replace(document, text=text)
        elif dropped is not None:
            dropped.append(Dropped(id=document.id, verdict=verdict))
