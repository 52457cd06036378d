"""Cleaning a text and judging it by rules: pure functions on strings, aware of scripts that write no spaces.

Rules stand for the "rule-based filters" of [Qwen TR 2.1, step 4], whose thresholds are unpublished; the defaults here
are ours, loose enough for any text that a person would call text. Model-based filters, language identification and
fuzzy duplicates are not in this file.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qwench.config import config
from qwench.data import prose_native
from qwench.data.characters import HAN_KANA_HANGUL, LETTER, SOUTH_EAST_ASIAN, THAI_LIKE, WIDE, classes_of
from qwench.types import KEEP, Document, Verdict

_UNSPACED = re.compile(f"[{HAN_KANA_HANGUL}{SOUTH_EAST_ASIAN}\u3000-\u3004\uff00-\uff65]")
_IDEOGRAPH = re.compile(f"[{HAN_KANA_HANGUL}]")
_THAI_LIKE = re.compile(f"[{SOUTH_EAST_ASIAN}]")
_SPACED_WORD = re.compile(rf"[^\W_{HAN_KANA_HANGUL}{SOUTH_EAST_ASIAN}]+(?:['’\-][^\W_]+)*")

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb]")
_ASCII_CONTROLS = bytes((*range(9), *range(14, 28), 31, 127))
_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANKS = " \t\u3000\xa0"
_TRAILING_BLANKS = tuple(f"{blank}\n" for blank in _BLANKS)
_ASCII_LINE_ENDS = ("\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")
_OTHER_LINE_END = re.compile("[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_BLANK_LINES = re.compile("\n{4,}")
_LETTER = re.compile(r"[^\W\d_]")
_WESTERN_WORD = re.compile("[A-Za-z0-9]+")
_SHORT_BYTES, _LONG_BYTES = 1500, 4096
_CODE_TABLE_BYTES = 320
"""Deflate's tables of one block take no more."""


def clean_text(text: str) -> str:
    """The text in Unicode NFC with `\\n` line ends, without control characters, trailing blanks and outer blank lines.

    Byte order marks go, lone surrogates become U+FFFD, more than two blank lines become two; indentation and everything
    else inside lines stays. Cleaning a clean text changes nothing.

    >>> clean_text("\\ufeffcafe\\u0301 \\r\\n\\r\\n\\x00done\\n")
    'café\\n\\ndone'
    """
    if text.isascii():
        text = text.encode().translate(None, _ASCII_CONTROLS).decode()
        other_line_ends = any([end in text for end in _ASCII_LINE_ENDS])
    else:
        text = unicodedata.normalize("NFC", _CONTROLS.sub("", _without_surrogates(text)))
        other_line_ends = _OTHER_LINE_END.search(text)
    # splitlines knows every line end of Unicode
    if other_line_ends:
        text = "\n".join(text.splitlines())
    if any([blank in text for blank in _TRAILING_BLANKS]):
        text = "\n".join([line.rstrip(_BLANKS) for line in text.split("\n")])
    if "\n\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n\n", text)
    text = text.strip("\n")
    while text and text[-1] in _BLANKS:
        text = text.rstrip(_BLANKS).rstrip("\n")
    return text


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


# ------------------------------------------------------------------------------------------------------- measurements
def count_words(text: str) -> float:
    """Words of any script: a Chinese, Japanese or Korean character counts 1/2, one of Thai, Khmer or Burmese 1/5."""
    spaced = sum(1 for _ in _SPACED_WORD.finditer(text))
    return spaced + len(_IDEOGRAPH.findall(text)) / 2 + len(_THAI_LIKE.findall(text)) / 5


@dataclass(frozen=True, slots=True)
class TextCounts:
    """Of "Straße 123":

    >>> TextCounts(words=2, chars=9, without_letter=1, letters=6, wide=0, thai_like=0, western=3, longest_line=10)
    """

    words: int
    """What white space separates."""
    chars: int
    """In them: all that are no white space."""
    without_letter: int
    """Words of digits and symbols."""
    letters: int
    """Letters and combining marks."""
    wide: int
    """Characters of Chinese, Japanese or Korean."""
    thai_like: int
    western: int
    """Runs of ASCII letters and digits."""
    longest_line: int
    """Its characters; lines end in `\\n`."""


def count_text(text: str, *, compiled: bool = True) -> TextCounts:
    """What the rules count, by C or by Python."""
    if compiled and (kernel := prose_native.load()) is not None:
        return TextCounts(*kernel.count(text))
    words = text.split()
    classes = np.bincount(classes_of(text), minlength=5)
    return TextCounts(
        words=len(words),
        chars=sum(map(len, words)),
        without_letter=sum([not _LETTER.search(word) for word in words]),
        letters=int(classes[LETTER] + classes[WIDE] + classes[THAI_LIKE]),
        wide=int(classes[WIDE]),
        thai_like=int(classes[THAI_LIKE]),
        western=len(_WESTERN_WORD.findall(text)),
        longest_line=max(map(len, text.split("\n"))),
    )


def letter_share(text: str) -> float:
    """Share of letters and combining marks among the characters that are no white space."""
    counts = count_text(text)
    return counts.letters / max(1, counts.chars)


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
    lines = list(map(str.strip, text.split("\n")))
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    total = sum(map(len, lines))
    return (total - sum(map(len, distinct))) / max(1, total)


def compressed_share(text: str) -> float:
    """Size after zlib divided by size before; prose has 0.3 to 0.6, endless repetition less than 0.1."""
    data = text.encode("utf-8", "replace")
    return len(zlib.compress(data, 1)) / max(1, len(data))


def _compresses_below(text: str, share: float) -> float | None:
    """`compressed_share` if it is below `share`, else None."""
    data = text.encode("utf-8", "replace")
    # The whole does not become smaller than its beginning does, but for the tables of codes.
    if len(data) > _SHORT_BYTES:
        beginning = data[: len(data) * (2 if len(data) > _LONG_BYTES else 3) // 5]
        if len(zlib.compress(beginning, 1)) - _CODE_TABLE_BYTES > share * len(data):
            return None
    compressed = len(zlib.compress(data, 1)) / max(1, len(data))
    return compressed if compressed < share else None


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


def judge_text(text: str, rules: TextRules, counts: TextCounts | None = None) -> Verdict:
    """KEEP, or the first rule the (cleaned) text breaks, with the measured value. Cheap rules come first.

    `counts` is what `count_text` says, where the caller knows.
    """
    replacement = text.count("\ufffd") / max(1, len(text))
    if replacement > rules.max_replacement_share:
        return Verdict(keep=False, reason="undecodable", value=replacement)
    counts = counts or count_text(text)
    if not _has_words(text, counts, rules.min_words) and (words := count_words(text)) < rules.min_words:
        return Verdict(keep=False, reason="too_short", value=words)
    long = counts.longest_line > rules.long_line_chars
    if long and (unbroken := unbroken_share(text, rules.long_line_chars)) > rules.max_unbroken_share:
        return Verdict(keep=False, reason="minified", value=unbroken)
    letters = counts.letters / max(1, counts.chars)
    if letters < rules.min_letter_share:
        return Verdict(keep=False, reason="few_letters", value=letters)
    duplicate = duplicate_line_share(text)
    if duplicate > rules.max_duplicate_line_share:
        return Verdict(keep=False, reason="repeated_lines", value=duplicate)
    if len(text) >= 1000:
        compressed = _compresses_below(text, rules.min_compressed_share)
        if compressed is not None:
            return Verdict(keep=False, reason="repetitive", value=compressed)
    return KEEP


def _has_words(text: str, counts: TextCounts, num: float) -> bool:
    """Whether it is seen at once that `count_words` is at least `num`, which it is nearly always."""
    if counts.wide / 2 + counts.thai_like / 5 >= num:
        return True
    words = text[:256].split()
    if not text.isascii():
        words = filter(str.isascii, words)
    return sum(map(str.isalnum, words)) >= num


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A document that a rule took out.

    >>> Dropped(id="a.js", verdict=Verdict(keep=False, reason="minified", value=0.98))
    """

    id: str
    verdict: Verdict
    stage: str = "rules"
    """Which part took it out: "repair", "language", "lines", "rules"."""
    document: Document | None = None
    """The document as it was judged, where the caller keeps it aside."""


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
