import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.data.text import CODE_RULES, TextRules, clean_documents, clean_text, count_words, judge_text, letter_share
from qwench.types import Document

ENGLISH = "The sun rose over the hills and the village slowly woke up to another day of work in the fields. "
CHINESE = "太阳从山上升起，村庄慢慢醒来，人们又开始了一天的工作。"
THAI = "ดวงอาทิตย์ขึ้นเหนือเนินเขาและหมู่บ้านค่อยๆตื่นขึ้นมาเพื่อทำงานอีกวันหนึ่ง"
HINDI = "सूरज पहाड़ियों के ऊपर उगा और गाँव धीरे धीरे जाग गया और लोग काम पर चले गए।"


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\ufeffcafe\u0301", "café"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a  \n\tb\t\n", "a\n\tb"),
        ("a\n\n\n\n\n\nb\n\n\n\nc", "a\n\n\nb\n\n\nc"),
        ("\n\n  indented\n", "  indented"),
        ("a\x00\x07\x1b[0mb", "a[0mb"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("一\u3000\n二", "一\n二"),
    ],
)
def test_cleaning(dirty, clean):
    assert clean_text(dirty) == clean


@given(st.text(st.characters(codec=None), max_size=80))
def test_cleaning_twice_is_cleaning_once_and_gives_encodable_text(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in once)


@pytest.mark.parametrize(
    "text",
    [ENGLISH, CHINESE, THAI, HINDI, "こんにちは、世界はとても広いですね。", "안녕하세요 세계는 참 넓습니다 그렇지요"],
)
def test_prose_of_every_script_passes(text):
    assert judge_text(text, TextRules()).keep
    # as one long line without line breaks, varied so that it is no repetition
    many = "".join(text + chr(0x61 + i % 26) + str(i) + " " for i in range(15))
    assert judge_text(many, TextRules(min_compressed_share=0.01)).keep


def test_words_are_counted_in_every_script():
    assert count_words("It's a well-known fact, isn't it?") == 6
    assert count_words("你好世界") == 2
    assert 8 <= count_words(THAI) <= 18
    assert count_words("mixed 中文 text") == 3
    assert count_words("--- *** ___") == 0


def test_letters_include_the_marks_of_indic_scripts():
    assert letter_share("हिन्दी") == 1
    assert letter_share("12 ab") == 0.5
    assert letter_share(" \n") == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short.", "too_short"),
        ("", "too_short"),
        (ENGLISH + "\ufffd" * 5, "undecodable"),
        ("var a=function(b){return b.c};" * 100, "minified"),
        ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo" * 50 + " and five more words here", "minified"),
        ("one two three four five 1234567890 " + "3.14159 2.71828 -1.41421\n" * 20, "few_letters"),
        ((ENGLISH + "\n") * 5, "repeated_lines"),
        ("abc def ghi jkl mno pqr " * 200, "repetitive"),
    ],
)
def test_what_is_dropped_and_why(text, reason):
    verdict = judge_text(text, TextRules())
    assert (verdict.keep, verdict.reason) == (False, reason)
    assert verdict.value is not None


def test_code_has_rules_of_its_own_and_drops_are_recorded():
    code = "\n".join(f"    if (a[{i}] == {i}) {{ x[{i}] += {i}; }} else {{ }}" for i in range(30))
    assert not judge_text(code, TextRules()).keep
    assert judge_text(code, CODE_RULES).keep
    dropped = []
    documents = [
        Document(id="c", text=code, kind="code"),
        Document(id="t", text=code),
        Document(id="e", text="\ufeff" + ENGLISH, meta={"k": 1}),
    ]
    kept = list(clean_documents(documents, dropped=dropped))
    assert [(d.id, d.kind, dict(d.meta)) for d in kept] == [("c", "code", {}), ("e", "", {"k": 1})]
    assert kept[1].text == ENGLISH.rstrip()
    assert [(d.id, d.verdict.reason) for d in dropped] == [("t", "few_letters")]
