"""One raw document -> a clean one or a named drop: repair, language, boilerplate lines, rules of its kind, PII.

    preparer = Preparer(PrepareRules())
    match preparer.prepare(document):
        case Document() as kept: ...
        case Dropped() as dropped: dropped.stage, dropped.verdict.reason, dropped.verdict.value

Nothing is shared between documents but counters, so any number of workers prepare the same texts. Reading is not done
here (`data.documents`), nor duplicates (`data.dedup`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import field

from qwench.config import config
from qwench.data.code_rules import CodeRules, judge_code
from qwench.data.language import Guess, identify
from qwench.data.line_rules import LineRules, remove_lines
from qwench.data.pii import PiiRules, scrub
from qwench.data.prose_rules import ProseRules, is_mathematics, judge_prose
from qwench.data.repair import repair_text
from qwench.data.text import CODE_RULES, Dropped, TextRules, count_text, judge_text
from qwench.types import Document, Verdict


@config
class LanguageRules:
    """Which languages are kept, and how sure the identification has to be."""

    identify: bool = True
    """False leaves `lang` as the reader set it and drops nothing."""
    keep: tuple[str, ...] = ()
    """Languages (ISO 639-1) to keep, all if empty; others: "language"."""
    min_score: float = 0.5
    """Less sure: "language_score"."""
    min_scores: dict[str, float] = field(default_factory=lambda: {"en": 0.65})
    """Other limits for single languages."""
    min_chars: int = 20
    """Shorter texts keep the language that their reader gave them, unless their letters tell it."""
    min_scored_chars: int = 150
    """Shorter texts are never dropped for the score: no model is sure of a line."""
    trust_label: bool = True
    """A language that the reader or recipe names is kept as it is and not identified."""


@config
class PrepareRules:
    """Every threshold of the prepare stage."""

    repair: bool = True
    language: LanguageRules = LanguageRules()
    lines: LineRules = LineRules()
    text: TextRules = TextRules()
    """For every text that is no source code, whatever its kind."""
    prose: ProseRules = ProseRules()
    code_text: TextRules = CODE_RULES
    code: CodeRules = CodeRules()
    pii: PiiRules = PiiRules()
    line_kinds: tuple[str, ...] = ("web",)
    """Kinds of documents in which boilerplate lines are removed; they also get the rules for pages."""
    curated_kinds: tuple[str, ...] = (
        "books", "book", "poetry", "dictionary", "docs", "reference", "encyclopedia", "math", "instructions",
    )  # fmt: skip
    """Kinds chosen by hand: judged by `text` only, not by the rules for prose, which are made for crawls."""


class Preparer:
    """Prepares documents one after the other."""

    def __init__(self, rules: PrepareRules | None = None) -> None:
        self.rules = rules or PrepareRules()
        self.counts: Counter[str] = Counter()
        """What happened inside the documents that were kept: "pii.email" (replacements), "lines.cookies" (lines)."""

    def prepare(self, document: Document) -> Document | Dropped:
        """The document with its clean text and `lang`, or the reason why not; `meta` gains what was measured.

        `meta` keys: "lang_score"; "script" for Chinese (Hans, Hant); "pii" (replacements by kind) and "removed_lines"
        when there are some; "math" for mathematics.
        """
        rules = self.rules
        code = document.kind == "code"
        text = repair_text(document.text, prose=not code) if rules.repair else document.text
        lang = document.lang
        meta: dict[str, object] = {}
        if not code and (guess := self._guess(text, lang)) is not None:
            lang = guess.lang
            if (verdict := self._judge_language(text, guess)) is not None:
                return _dropped(document, text, lang, "language", verdict)
            meta["lang_score"] = guess.score
            if guess.script in ("Hans", "Hant"):
                meta["script"] = guess.script
        removed: Counter[str] = Counter()
        if document.kind in rules.line_kinds:
            text, removed, share = remove_lines(text, rules.lines)
            if share > rules.lines.max_removed_share:
                verdict = Verdict(keep=False, reason="boilerplate_lines", value=share)
                return _dropped(document, text, lang, "lines", verdict)
        mathematics = not code and is_mathematics(text, rules.prose.min_math_share)
        verdict = self._judge(text, document.kind, lang, mathematics)
        if not verdict.keep:
            return _dropped(document, text, lang, "rules", verdict)
        text, replaced = scrub(text, rules.pii, numbers_are_data=code or mathematics)
        if removed:
            meta["removed_lines"] = removed.total()
            self.counts.update({f"lines.{reason}": count for reason, count in removed.items()})
        if replaced:
            meta["pii"] = dict(replaced)
            self.counts.update({f"pii.{kind}": count for kind, count in replaced.items()})
        if mathematics:
            meta["math"] = True
        return dataclasses.replace(document, text=text, lang=lang, meta={**document.meta, **meta})

    def _guess(self, text: str, label: str) -> Guess | None:
        """The identified language, None where it is not asked for or a few Latin letters cannot tell it."""
        rules = self.rules.language
        if not rules.identify or (rules.trust_label and label):
            return None
        return None if len(text) < rules.min_chars and text.isascii() else identify(text)

    def _judge_language(self, text: str, guess: Guess) -> Verdict | None:
        rules = self.rules.language
        if rules.keep and guess.lang not in rules.keep:
            return Verdict(keep=False, reason=f"language_{guess.lang or 'none'}", value=guess.score)
        if len(text) >= rules.min_scored_chars and guess.score < rules.min_scores.get(guess.lang, rules.min_score):
            return Verdict(keep=False, reason="language_score", value=guess.score)
        return None

    def _judge(self, text: str, kind: str, lang: str, mathematics: bool) -> Verdict:
        rules = self.rules
        if kind == "code":
            verdict = judge_text(text, rules.code_text)
            return judge_code(text, lang, rules.code) if verdict.keep else verdict
        # Formulas have few letters.
        limits = dataclasses.replace(rules.text, min_letter_share=0.0) if mathematics else rules.text
        counts = count_text(text)
        verdict = judge_text(text, limits, counts)
        if verdict.keep and kind not in rules.curated_kinds:
            page = kind in rules.line_kinds
            verdict = judge_prose(text, lang, rules.prose, page=page, mathematics=mathematics, counts=counts)
        return verdict


def _dropped(document: Document, text: str, lang: str, stage: str, verdict: Verdict) -> Dropped:
    judged = dataclasses.replace(document, text=text, lang=lang)
    return Dropped(id=document.id, verdict=verdict, stage=stage, document=judged)
