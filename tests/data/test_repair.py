import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.data.repair import repair_text


@pytest.mark.parametrize(
    "text",
    [
        "schön und Größe",
        "naïve café",
        "l’été où ça",
        "Привет, мир",
        "日本語",
        "Καλημέρα",
        "“quoted” – text…",
        "žluťoučký kůň",
        "20 €",
    ],
)
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_mojibake_is_undone_and_good_text_left_alone(text, wrong):
    assert repair_text(text) == text
    try:
        broken = text.encode().decode(wrong)
    except UnicodeDecodeError:
        pytest.skip("this text has bytes that the code page has not")
    assert repair_text(f"fine line\n{broken}\n良い行") == f"fine line\n{text}\n良い行"


@pytest.mark.parametrize(
    ("text", "prose", "code"),
    [
        ("a &amp;amp; b &quot;c&quot;", 'a & b "c"', "a &amp;amp; b &quot;c&quot;"),
        ("a\xa0b\u200bc\xadd", "a bcd", "a\xa0b\u200bc\xadd"),
        ("<b>&amp;</b>", "<b>&amp;</b>", "<b>&amp;</b>"),
        ("AT&T; R&D", "AT&T; R&D", "AT&T; R&D"),
        ("ﬁx “it”", "ﬁx “it”", "ﬁx “it”"),
        ("e\u0301\r\nx\0", "é\nx", "é\nx"),
    ],
)
def test_what_prose_and_code_get(text, prose, code):
    assert repair_text(text) == prose
    assert repair_text(text, prose=False) == code


@given(st.text(max_size=60))
def test_the_result_is_encodable_and_normal(text):
    repaired = repair_text(text)
    repaired.encode()
    assert unicodedata.is_normalized("NFC", repaired)
