"""Every threshold on both sides: a text at the limit is kept, one just beyond it is dropped for the named reason."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.data import prose_native
from qwench.data.code_rules import CodeRules, judge_code
from qwench.data.line_rules import LineRules, remove_lines
from qwench.data.prose_rules import (
    GopherRules,
    PageRules,
    ProseRules,
    RepetitionRules,
    is_mathematics,
    judge_prose,
)
from qwench.data.repetition import Tokens, broken_gram_rule, duplicate_shares
from qwench.data.text import TextRules, compressed_share, count_text, judge_text

OPEN = GopherRules(
    min_words=0, max_words=1e9, min_mean_word_chars=0, max_mean_word_chars=1e9, max_mean_word_chars_long=1e9,
    max_symbol_word_share=9, max_bullet_line_share=1, max_ellipsis_line_share=1, min_letter_word_share=0,
    min_stop_words=0,
)  # fmt: skip
OPEN_PAGE = PageRules(
    min_sentences=0, max_brace_share=1, min_punctuated_line_share=0, max_short_line_share=1, max_newline_word_share=9,
    drop_lorem_ipsum=False,
)  # fmt: skip
OPEN_REPETITION = RepetitionRules(
    max_duplicate_line_share=1, max_duplicate_line_char_share=1, max_duplicate_paragraph_share=1,
    max_duplicate_paragraph_char_share=1, max_top_gram_shares=(), max_duplicate_gram_shares=(),
)  # fmt: skip


def words(count: int, chars: int = 5, first: int = 0) -> str:
    """Words that are all different, of `chars` letters each."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    made = []
    for number in range(first, first + count):
        word = ""
        for _ in range(chars):
            number, place = divmod(number * 7 + 3, 26)
            word += alphabet[place]
        made.append(word)
    return " ".join(made)


def only(section: str, **limits) -> ProseRules:
    """Rules of which just `limits` can drop a text."""
    rules = ProseRules(gopher=OPEN, page=OPEN_PAGE, repetition=OPEN_REPETITION)
    return dataclasses.replace(rules, **{section: dataclasses.replace(getattr(rules, section), **limits)})


def lines(*texts: str) -> str:
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("section", "limits", "kept", "dropped", "reason", "value"),
    [
        ("gopher", {"min_words": 50}, words(50), words(49), "too_few_words", 49),
        ("gopher", {"max_words": 50}, words(50), words(51), "too_many_words", 51),
        ("gopher", {"min_mean_word_chars": 3}, words(20, 3), words(19, 3) + " ab", "words_too_short", 59 / 20),
        (
            "gopher",
            {"max_mean_word_chars": 10},
            words(20, 10),
            words(19, 10) + " " + "b" * 11,
            "words_too_long",
            201 / 20,
        ),
        ("gopher", {"max_symbol_word_share": 0.1}, words(9) + " #", words(8) + " # #", "hash_signs", 0.2),
        ("gopher", {"max_symbol_word_share": 0.1}, words(10) + "...", words(10) + "... and…", "ellipses", 2 / 11),
        ("gopher", {"max_bullet_line_share": 0.5}, lines("- a", "b"), lines("- a", "• b", "c"), "bullet_lines", 2 / 3),
        (
            "gopher",
            {"max_ellipsis_line_share": 0.5},
            lines("a...", "b"),
            lines("a...", "b…", "c"),
            "ellipsis_lines",
            2 / 3,
        ),
        ("gopher", {"min_letter_word_share": 0.8}, "a b c d 1", "a b c 1 2", "few_letter_words", 0.6),
        ("gopher", {"min_stop_words": 2}, "The cat and dog", "the cat the dog", "few_stop_words", 1),
        ("page", {"min_sentences": 3}, "One. Two! Three?", "One. Two 3.14", "few_sentences", 1),
        ("page", {"max_brace_share": 0.1}, "{234567890", "{{34567890", "braces", 0.2),
        ("page", {"drop_lorem_ipsum": True}, "lorem dolor", "Lorem ipsum dolor", "lorem_ipsum", 1),
        (
            "page",
            {"min_punctuated_line_share": 0.5},
            lines("a.", "b"),
            lines("a.", "b", "c"),
            "few_punctuated_lines",
            1 / 3,
        ),
        (
            "page",
            {"max_short_line_share": 0.5},
            lines("x" * 30, "x" * 31),
            lines("x" * 30, "short", "x" * 31),
            "short_lines",
            2 / 3,
        ),
        ("page", {"max_newline_word_share": 0.5}, lines("a b", "c d"), lines("a", "b", "c d"), "list_like", 0.5 + 0.0),
        (
            "repetition",
            {"max_duplicate_line_share": 0.5},
            lines("a", "a"),
            lines("a", "a", "a"),
            "duplicate_lines",
            2 / 3,
        ),
        (
            "repetition",
            {"max_duplicate_line_char_share": 0.5},
            lines("aa", "aa"),
            lines("aa", "aa", "aa", "b"),
            "duplicate_line_chars",
            4 / 7,
        ),
        ("repetition", {"max_duplicate_paragraph_share": 0.5}, "a\n\na", "a\n\na\n\na", "duplicate_paragraphs", 2 / 3),
        (
            "repetition",
            {"max_duplicate_paragraph_char_share": 0.5},
            "aa\n\naa",
            "aa\n\naa\n\naa\n\nb",
            "duplicate_paragraph_chars",
            4 / 7,
        ),
        (
            "repetition",
            {"max_top_gram_shares": (0.5,)},
            "aa bb aa bb " + words(4, 2, 50),
            "aa bb aa bb " + words(3, 2, 50),
            "top_2_gram",
            8 / 14,
        ),
        (
            "repetition",
            {"max_duplicate_gram_shares": (0.25,)},
            f"{words(5)} {words(5)} {words(10, 5, 50)}",
            f"{words(5)} {words(5)} {words(9, 5, 50)}",
            "duplicate_5_grams",
            5 / 19,
        ),
    ],
)
def test_prose(section, limits, kept, dropped, reason, value):
    rules = only(section, **limits)
    assert judge_prose(kept, "en", rules, page=True).keep
    if reason == "list_like":  # 1 of 4 words, against 2 of 4, which is the limit, against 3 of 4
        assert judge_prose(dropped, "en", rules, page=True).keep
        dropped, value = lines("a", "b", "c", "d"), 0.75
    verdict = judge_prose(dropped, "en", rules, page=True)
    assert (verdict.keep, verdict.reason) == (False, reason)
    assert verdict.value == pytest.approx(value)


def test_rules_for_pages_are_for_pages():
    assert judge_prose("{" * 50, "en", only("page", max_brace_share=0.1)).keep


def test_languages_without_spaces_have_lengths_in_characters_and_no_word_rules():
    rules = only("gopher", min_words=50, max_mean_word_chars=10, min_letter_word_share=0.8, min_stop_words=2)
    assert judge_prose("汉" * 100, "zh", rules).keep
    assert judge_prose("汉" * 99, "zh", rules).reason == "too_few_words"
    assert judge_prose("ก" * 250, "th", rules).keep
    assert judge_prose("汉" * 200, "en", rules).reason == "too_few_words"


def test_long_words_of_german_and_unknown_languages():
    rules = only("gopher", max_mean_word_chars=10, max_mean_word_chars_long=13, min_stop_words=2)
    assert judge_prose("und die " + words(8, 14), "de", rules).keep
    assert judge_prose("the and " + words(8, 14), "en", rules).reason == "words_too_long"
    assert judge_prose(words(8, 5), "xx", rules).keep  # no function words are known of it


def test_mathematics_may_have_symbols():
    formula = r"Let $a^2 + b^2 = c^2$ be \frac{1}{2} of \sum x_i and $\alpha$. " * 3
    assert is_mathematics(formula, 0.02)
    assert is_mathematics("∑ x ≤ ∫ y for all z", 0.02)
    assert not is_mathematics("It costs $5 today and $6 tomorrow, \\n or so.", 0.05)
    rules = only("gopher", min_letter_word_share=0.95, min_mean_word_chars=5)
    assert judge_prose(formula, "en", rules).keep
    assert not judge_prose("1 + 2 = 3 and so on", "en", rules).keep


# --------------------------------------------------------------------------------------------------------- repetition
def slow_duplicate_share(tokens: list[str], n: int) -> float:
    seen, covered = set(), set()
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return sum(len(tokens[place]) for place in covered) / sum(map(len, tokens))


def slow_top_share(tokens: list[str], n: int) -> float:
    counts: dict[tuple[str, ...], int] = {}
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        counts[gram] = counts.get(gram, 0) + 1
    most = max(counts.values())
    longest = max(len("".join(gram)) for gram, count in counts.items() if count == most)
    return most * longest / sum(map(len, tokens)) if most > 1 else 0.0


@pytest.mark.parametrize("size", [6, 50, 700, 5000])
@pytest.mark.parametrize("vocabulary", [3, 12, 400])
def test_n_gram_shares_are_those_of_the_definition(size, vocabulary):
    rng = np.random.default_rng(size * vocabulary)
    text = [f"{'ab'[number % 2] * (1 + number % 5)}{number}" for number in rng.integers(0, vocabulary, size)]
    tokens = Tokens(text, 1)
    for n in (2, 3, 5, 8):
        if size > n:
            assert tokens.duplicate_share(n) == pytest.approx(slow_duplicate_share(text, n))
    assert tokens.top_share(2) == pytest.approx(slow_top_share(text, 2))


ALPHABETS = ("ab \n", "abcdefgh   ", "甲乙丙 ", "aÉ1٣Ⅵ_-中ไ한x́ \u2003\u3000\n.", "\U00020123😀 a")
LIMITS = st.lists(st.sampled_from((0.0, 0.02, 0.1, 0.2, 0.3, 0.5, 0.9, 1.5)), max_size=7)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALPHABETS).flatmap(lambda a: st.text(a, max_size=300)), st.booleans(), LIMITS, LIMITS)
def test_compiled_n_gram_rules_break_where_those_of_numpy_do(text, unspaced, top, duplicate):
    assert prose_native.load() is not None, "these tests need a C compiler"
    assert broken_gram_rule(text, unspaced, top, duplicate) == broken_gram_rule(
        text, unspaced, top, duplicate, compiled=False
    )


@pytest.mark.parametrize("unspaced", [False, True])
@pytest.mark.parametrize("vocabulary", [30, 500, 20_000])
def test_compiled_n_gram_rules_break_where_those_of_numpy_do_in_long_texts(vocabulary, unspaced):
    rng = np.random.default_rng(vocabulary)
    text = " ".join(f"w{number}" for number in rng.zipf(1.3, 30_000) % vocabulary)
    for share in (0.001, 0.01, 0.03, 0.1, 0.3, 2.0):
        for limits in (((share,) * 3, ()), ((), (share,) * 6), ((2.0,) * 3, (3.0, 3.0, share))):
            broken = broken_gram_rule(text, unspaced, *limits)
            assert broken == broken_gram_rule(text, unspaced, *limits, compiled=False)
    assert broken is None
    assert broken_gram_rule(text, unspaced, (0.001,), ()) is not None


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.sampled_from(ALPHABETS).flatmap(lambda a: st.text(a, max_size=200)))
def test_compiled_counts_are_those_of_python(text):
    assert count_text(text) == count_text(text, compiled=False)


def test_compiled_counts_of_every_code_point_are_those_of_python():
    for first in (*range(0, 0x34000, 64), 0xE0000, 0xE0100, 0x10FFC0):
        text = " ".join(f"{chr(code)} a{chr(code)}b" for code in range(first, first + 64))
        assert count_text(text) == count_text(text, compiled=False), hex(first)


def test_without_a_compiler_python_counts_and_says_so(tmp_path, monkeypatch, caplog):
    text = "one two " * 40 + words(60)
    compiled = [judge_prose(text, lang, ProseRules()) for lang in ("en", "zh")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    prose_native.load.cache_clear()
    try:
        assert prose_native.load() is None
        assert [judge_prose(text, lang, ProseRules()) for lang in ("en", "zh")] == compiled
    finally:
        prose_native.load.cache_clear()
    assert [verdict.keep for verdict in compiled] == [False, False]
    assert "install gcc or clang" in caplog.text


@pytest.mark.parametrize("size", [1000, 5000, 200_000])
@pytest.mark.parametrize("words_of", [1, 2, 8, 64, 5000])
def test_a_text_compresses_below_a_share_or_not_as_its_whole_does(size, words_of):
    rng = np.random.default_rng(words_of)
    begin = " ".join(f"w{n}" for n in rng.integers(0, words_of, size))[:size]
    for text in (begin, begin[: size // 10] + "ab" * (size // 2), "a" * (size // 3) + begin):
        share = compressed_share(text)
        rules = TextRules(min_words=0, min_letter_share=0, max_unbroken_share=1, max_duplicate_line_share=1)
        for limit in (share * 0.99, share, share * 1.01, 0.1):
            verdict = judge_text(text, dataclasses.replace(rules, min_compressed_share=limit))
            assert (verdict.keep, verdict.value) == ((True, None) if share >= limit else (False, share))


def test_characters_are_the_tokens_of_scripts_without_spaces():
    tokens = Tokens(["甲乙丙丁", "甲乙丙丁", "戊"], 2)
    assert tokens.count == 9
    assert tokens.top_share(2) == pytest.approx(8 / 9)
    assert tokens.duplicate_share(2) == pytest.approx(4 / 9)
    assert Tokens([], 1).top_share(2) == Tokens([], 2).duplicate_share(5) == 0.0


def test_duplicate_parts():
    assert duplicate_shares(["a", "b"]) == (0.0, 0.0)
    assert duplicate_shares(["aaa", "aaa", "b"]) == (1 / 3, 3 / 7)
    assert duplicate_shares([]) == (0.0, 0.0)


# --------------------------------------------------------------------------------------------------------------- code
OPEN_CODE = CodeRules(
    max_line_chars=10**9, max_mean_line_chars=1e9, min_alnum_share=0, min_letter_share=0, max_digit_share=1,
    max_blob_share=1, drop_generated=False, max_data_chars=10**9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "kept", "dropped", "reason", "value"),
    [
        ({"max_line_chars": 10}, "x" * 10, "x" * 11, "code_line_too_long", 11),
        ({"max_mean_line_chars": 4}, "xxx\nxxxx", "xxxx\nxxxx", "code_mean_line_too_long", 4.5),
        ({"max_lines": 2}, "a\nb", "a\nb\nc", "code_too_many_lines", 3),
        ({"min_alnum_share": 0.5}, "ab()", "a(){}", "code_few_alnum", 0.2),
        ({"min_letter_share": 0.5}, "ab12", "a123", "code_few_letters", 0.25),
        ({"max_digit_share": 0.5}, "ab 12", "a 123", "code_data", 0.75),
        (
            {"max_blob_share": 0.5},
            "x = '" + "A1b2" * 50 + "'" + " # no" * 50,
            "x = '" + "A1b2" * 50 + "'",
            "code_blob",
            200 / 206,
        ),
        (
            {"drop_generated": True},
            "# made by hand\n" * 9 + "# @generated",
            "/* Code generated by protoc. DO NOT EDIT. */",
            "code_generated",
            1,
        ),
    ],
)
def test_code(limits, kept, dropped, reason, value):
    rules = dataclasses.replace(OPEN_CODE, **limits)
    assert judge_code(kept, "c", rules).keep
    verdict = judge_code(dropped, "c", rules)
    assert (verdict.keep, verdict.reason) == (False, reason)
    assert verdict.value == pytest.approx(value)


def test_data_files_and_comments_in_other_scripts():
    rules = dataclasses.replace(OPEN_CODE, max_data_chars=10)
    assert judge_code("a: 1\nb: 22", "yaml", rules).keep
    assert judge_code("a: 1\nb: 222", "yaml", rules).reason == "code_data_too_long"
    assert judge_code("a: 1\nb: 222", "python", rules).keep
    assert judge_code("# 这是一个注释，说明下面的函数\nx()", "python", CodeRules()).keep


def test_ordinary_code_is_kept():
    with open(dataclasses.__file__, encoding="utf-8") as file:
        assert judge_code(file.read(), "python", CodeRules()).keep


# -------------------------------------------------------------------------------------------------------------- lines
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Please enable JavaScript to view this page.", "javascript"),
        ("Wir verwenden Cookies, um Inhalte zu personalisieren.", "cookies"),
        ("© 2020 Firma. Alle Rechte vorbehalten.", "policy"),
        ("版权所有 © 2020 某某公司", "policy"),
        ("Share on Facebook", "call"),
        ("Weiterlesen »", "call"),
        ("分享到微博", "call"),
        ("12 comments", "counter"),
        ("1 / 20", "counter"),
    ],
)
def test_boilerplate_lines(line, reason):
    text = f"A first sentence of the article.\n\n{line}\n\nA second sentence of the article."
    cleaned, removed, share = remove_lines(text, LineRules())
    assert removed == {reason: 1}
    assert cleaned == "A first sentence of the article.\n\nA second sentence of the article."
    assert share == pytest.approx(len(line) / len(text))


@pytest.mark.parametrize(
    "line",
    [
        "The bakery sells cookies, bread and cakes, and people come from far away to buy them. " * 2,
        "Shared values keep a community together.",
        "3.14 | 2.71",
        "1945",
        "更多的人开始关注这个问题，并且提出了自己的看法。",
        "- item",
        "",
        "Home is where the heart is.",
    ],
)
def test_lines_that_stay(line):
    text = f"A first sentence.\n{line}\nA second sentence."
    kept = {"1945"} if line == "1945" else set()
    cleaned, removed, _ = remove_lines(text, LineRules(drop_counters=line not in kept))
    assert (cleaned, removed) == (text, {})


def test_line_limits_on_both_sides():
    line = "cookies " + "x" * 12
    rules = LineRules(max_notice_chars=20)
    assert remove_lines(f"text\n{line}\ntext", rules)[1] == {"cookies": 1}
    assert remove_lines(f"text\n{line}x\ntext", rules)[1] == {}
