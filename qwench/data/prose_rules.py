"""Rules for prose of any language: Gopher's quality and repetition rules, C4's and FineWeb's document rules.

Thresholds are the published ones where there are any [Gopher, Rae et al. 2021; C4, Raffel et al. 2020; FineWeb, Penedo
et al. 2024]. Two things differ: scripts without spaces between words have no word lengths and no function words, their
lengths count in characters; and mathematics may have symbols, few letters and braces. Every rule names its direction;
a text whose measure equals the threshold is kept.
"""

from __future__ import annotations

import re
from itertools import islice

from qwench.config import config
from qwench.data.repetition import broken_gram_rule, duplicate_shares, paragraphs_of
from qwench.data.stop_words import STOP_WORDS
from qwench.data.text import TextCounts, count_text
from qwench.types import KEEP, Verdict

UNSPACED_LANGUAGES = frozenset(("zh", "ja", "th", "lo", "km", "my", "bo", "wuu", "yue"))
_BULLETS = frozenset("-*•‣▪●○–—·➤►→※・*")
_ELLIPSES = ("...", "…", "。。。", "[...]", "[…]")
_ELLIPSIS_ENDS = frozenset(ellipsis[-1] for ellipsis in _ELLIPSES)
_LINE_ENDS = frozenset((
    ".", "!", "?", "…", '"', "'", "”", "’", "»", "。", "！", "？", "」", "』", "”", "）", ")", ":", "：", ";", "；",
    "।", "॥", "؟", "۔", "၊", "។", "།", "،", "~", "～",
))  # fmt: skip
_LOREM = re.compile(r"lorem ipsum", re.I)
_TEX = re.compile(r"\\[a-zA-Z]{2,}|\$(?=\S)[^$\n]{1,200}(?<=\S)\$(?!\d)|\\[\[\]()]")
_OPERATOR = re.compile("[∑∏∫√∞≤≥≠≈∈∉⊂⊆∪∩∀∃∂∇⇒⇔±×÷]")


@config
class GopherRules:
    """Quality rules. A text that breaks one is dropped for the reason named after it."""

    min_words: float = 50
    """Fewer words: "too_few_words" (a Chinese character counts 1/2, see `data.text.count_words`)."""
    max_words: float = 100_000
    """More: "too_many_words"."""
    min_mean_word_chars: float = 3.0
    """Shorter words: "words_too_short"; German, Finnish and Hungarian have longer ones than English."""
    max_mean_word_chars: float = 10.0
    """Longer words: "words_too_long"."""
    max_mean_word_chars_long: float = 13.0
    """The same for languages of long words (compounds, suffixes)."""
    max_symbol_word_share: float = 0.1
    """More hash signs, or more ellipses, than this times the words: "hash_signs", "ellipses"."""
    max_bullet_line_share: float = 0.9
    """More lines that begin with a bullet: "bullet_lines"."""
    max_ellipsis_line_share: float = 0.3
    """More lines that end in an ellipsis: "ellipsis_lines"."""
    min_letter_word_share: float = 0.8
    """Fewer words with a letter: "few_letter_words"."""
    min_stop_words: int = 2
    """Fewer different function words of its language: "few_stop_words"."""


@config
class RepetitionRules:
    """Repetition rules; 0.2 means a fifth of the lines or characters."""

    max_duplicate_line_share: float = 0.3
    max_duplicate_line_char_share: float = 0.2
    max_duplicate_paragraph_share: float = 0.3
    max_duplicate_paragraph_char_share: float = 0.2
    max_top_gram_shares: tuple[float, ...] = (0.20, 0.18, 0.16)
    """For the most frequent 2-, 3- and 4-gram: "top_2_gram" ..."""
    max_duplicate_gram_shares: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """For duplicated 5- to 10-grams: "duplicate_5_grams" ..."""


@config
class PageRules:
    """Rules for texts of web pages (kind "web")."""

    min_sentences: int = 3
    """C4: fewer sentences: "few_sentences"."""
    max_brace_share: float = 0.005
    """C4 drops pages with a brace; more braces among the characters: "braces"."""
    min_punctuated_line_share: float = 0.12
    """FineWeb: fewer lines that end in punctuation: "few_punctuated_lines"."""
    short_line_chars: int = 30
    """A line up to this long is short, half of it in scripts without spaces."""
    max_short_line_share: float = 0.67
    """FineWeb: more short lines: "short_lines"."""
    max_newline_word_share: float = 0.3
    """FineWeb: more line ends than this times the words: "list_like"."""
    drop_lorem_ipsum: bool = True
    """C4: "lorem_ipsum"."""


@config
class ProseRules:
    gopher: GopherRules = GopherRules()
    repetition: RepetitionRules = RepetitionRules()
    page: PageRules = PageRules()
    min_math_share: float = 0.02
    """Formulas, TeX commands and operators in more than this share of the words make a text mathematics."""


_LONG_WORDS = frozenset(
    ("de", "fi", "hu", "et", "tr", "nl", "sv", "da", "no", "is", "eu", "kk", "ta", "te", "ml", "kn")
)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?:\s|$)|[。！？]|[।॥؟۔။។]")


def is_mathematics(text: str, min_share: float) -> bool:
    """Whether formulas, TeX commands and operators are more than `min_share` of the words."""
    found = len(_TEX.findall(text)) if "\\" in text or text.count("$") > 1 else 0
    if not text.isascii():
        found += len(_OPERATOR.findall(text))
    if not found and min_share >= 0:
        return False
    return found > min_share * (text.count(" ") + text.count("\n") + 1)


def judge_prose(
    text: str,
    lang: str,
    rules: ProseRules,
    *,
    page: bool = False,
    mathematics: bool | None = None,
    counts: TextCounts | None = None,
) -> Verdict:
    """KEEP, or the first rule that a cleaned text breaks with the measured value. `page` adds the rules for web pages.

    `lang` is an ISO 639-1 code; without function words of it that rule does not apply. `mathematics` is what
    `is_mathematics` says and `counts` what `count_text` does, where the caller knows.
    """
    counts = counts or count_text(text)
    if mathematics is None:
        mathematics = is_mathematics(text, rules.min_math_share)
    unspaced = lang in UNSPACED_LANGUAGES
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    verdict = _judge_quality(text, counts, lines, lang, rules.gopher, unspaced, mathematics)
    if verdict.keep and page:
        verdict = _judge_page(text, counts, lines, rules.page, unspaced, mathematics)
    if verdict.keep:
        verdict = _judge_repetition(text, lines, rules.repetition, unspaced)
    return verdict


def _judge_quality(
    text: str, counts: TextCounts, lines: list[str], lang: str, rules: GopherRules, unspaced: bool, mathematics: bool
) -> Verdict:
    # Quicker than `count_words`, for texts that hardly have words between blanks
    count = counts.western + counts.wide / 2 + counts.thai_like / 5 if unspaced else float(counts.words)
    if count < rules.min_words:
        return _drop("too_few_words", count)
    if count > rules.max_words:
        return _drop("too_many_words", count)
    if not unspaced and not mathematics:
        mean = counts.chars / counts.words
        if mean < rules.min_mean_word_chars:
            return _drop("words_too_short", mean)
        if mean > (rules.max_mean_word_chars_long if lang in _LONG_WORDS else rules.max_mean_word_chars):
            return _drop("words_too_long", mean)
    if (hashes := text.count("#") / count) > rules.max_symbol_word_share:
        return _drop("hash_signs", hashes)
    if (ellipses := (text.count("...") + text.count("…")) / count) > rules.max_symbol_word_share:
        return _drop("ellipses", ellipses)
    if (share := sum([line[0] in _BULLETS for line in lines]) / len(lines)) > rules.max_bullet_line_share:
        return _drop("bullet_lines", share)
    ellipsis_lines = sum([line[-1] in _ELLIPSIS_ENDS and line.endswith(_ELLIPSES) for line in lines])
    if (share := ellipsis_lines / len(lines)) > rules.max_ellipsis_line_share:
        return _drop("ellipsis_lines", share)
    if unspaced or mathematics:
        return KEEP
    if (share := 1 - counts.without_letter / counts.words) < rules.min_letter_word_share:
        return _drop("few_letter_words", share)
    stop_words = STOP_WORDS.get(lang)
    if stop_words and (found := _count_stop_words(text, stop_words, rules.min_stop_words)) < rules.min_stop_words:
        return _drop("few_stop_words", found)
    return KEEP


def _count_stop_words(text: str, stop_words: frozenset[str], enough: int) -> int:
    # Nearly every text has them in its beginning.
    found = len(stop_words.intersection(text.split(None, 200)[:200]))
    if found >= enough:
        return found
    return len(stop_words.intersection(word.lower().strip(".,;:!?\"'()") for word in text.split()))


def _judge_page(
    text: str, counts: TextCounts, lines: list[str], rules: PageRules, unspaced: bool, mathematics: bool
) -> Verdict:
    ends = sum(1 for _ in islice(_SENTENCE_END.finditer(text), rules.min_sentences))
    if ends < rules.min_sentences:
        return _drop("few_sentences", ends)
    if not mathematics and (share := text.count("{") / len(text)) > rules.max_brace_share:
        return _drop("braces", share)
    if rules.drop_lorem_ipsum and _LOREM.search(text):
        return _drop("lorem_ipsum", 1)
    if (share := sum([line[-1] in _LINE_ENDS for line in lines]) / len(lines)) < rules.min_punctuated_line_share:
        return _drop("few_punctuated_lines", share)
    short = rules.short_line_chars / 2 if unspaced else rules.short_line_chars
    if (share := sum([len(line) <= short for line in lines]) / len(lines)) > rules.max_short_line_share:
        return _drop("short_lines", share)
    if not unspaced and (share := (len(lines) - 1) / counts.words) > rules.max_newline_word_share:
        return _drop("list_like", share)
    return KEEP


def _judge_repetition(text: str, lines: list[str], rules: RepetitionRules, unspaced: bool) -> Verdict:
    share, chars = duplicate_shares(lines)
    if share > rules.max_duplicate_line_share:
        return _drop("duplicate_lines", share)
    if chars > rules.max_duplicate_line_char_share:
        return _drop("duplicate_line_chars", chars)
    share, chars = duplicate_shares(paragraphs_of(text))
    if share > rules.max_duplicate_paragraph_share:
        return _drop("duplicate_paragraphs", share)
    if chars > rules.max_duplicate_paragraph_char_share:
        return _drop("duplicate_paragraph_chars", chars)
    broken = broken_gram_rule(text, unspaced, rules.max_top_gram_shares, rules.max_duplicate_gram_shares)
    return _drop(*broken) if broken else KEEP


def _drop(reason: str, value: float) -> Verdict:
    return Verdict(keep=False, reason=reason, value=value)
