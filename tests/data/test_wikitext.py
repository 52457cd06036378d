import bz2
import io

import pytest

from qwench.data.documents import read_documents
from qwench.data.wikitext import read_pages, wikitext_to_text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[target|shown]] and [[plain]]s", "shown and plains"),
        ("a{{cite|x={{nested|y}}}}b", "ab"),
        ("one<ref name=x>no [[link]]</ref> two<ref name=x/>.", "one two."),
        ("[[File:a.png|thumb|caption with [[link]] inside]]text", "text"),
        ("[[文件:a.png|缩略图]]正文[[分类:甲]]", "正文"),
        ("{| class=x\n| cell\n{|\n| inner\n|}\n|}\nafter", "after"),
        ("== Head ==\ntext", "Head\n\ntext"),
        ("* one\n** two\n# three\n: four", "- one\n- two\n- three\nfour"),
        ("<math>a^2 + {b}</math>", "$a^2 + {b}$"),
        ("[https://x.org shown] [https://y.org]", "shown"),
        ("<!-- no -->yes<br/>line", "yes\nline"),
        ("-{zh-hans:计算机; zh-hant:電腦}-", "计算机"),
        ("{{lang|de|Haus}} ({{IPA|x}}, ) end", "Haus end"),
        ("a &nbsp; b <nowiki>[x]</nowiki>", "a   b [x]"),
        ("<syntaxhighlight lang=c>\nif (a[0]) {{x}}\n</syntaxhighlight>", "if (a[0]) {{x}}"),
    ],
)
def test_cleaning_wikitext(wikitext, text):
    assert wikitext_to_text(wikitext) == text


def test_unbalanced_marks_end():
    assert "text" in wikitext_to_text("{{" * 500 + "text" + "[[" * 500)
    assert wikitext_to_text("") == ""


def dump(*pages: tuple[str, int, str]) -> bytes:
    body = "".join(
        f"<page><title>{title}</title><ns>{space}</ns><id>{n}</id>"
        f"<revision><text xml:space='preserve'>{text}</text></revision></page>\n"
        for n, (title, space, text) in enumerate(pages, 1)
    )
    return f"<mediawiki>\n<siteinfo/>{body}</mediawiki>".encode()


def test_articles_of_a_dump():
    data = dump(
        ("One", 0, "first &lt;ref&gt;x&lt;/ref&gt;"),
        ("Talk:One", 1, "chat"),
        ("R", 0, "#REDIRECT [[One]]"),
        ("Two", 0, "second"),
    )
    assert [(p.id, p.title) for p in read_pages(io.BytesIO(data), 1 << 20) if not isinstance(p, str)] == [
        ("1", "One"),
        ("4", "Two"),
    ]


def test_pages_across_chunks_and_too_large_ones():
    data = dump(
        *((f"T{n}", 0, "word " * (n * 50_000 + 1)) for n in range(8)), ("huge", 0, "x" * 5_000_000), ("last", 0, "end")
    )
    found = list(read_pages(io.BytesIO(data), 2_000_000))
    assert found[8] == "page too large"
    assert [p.title for p in found if not isinstance(p, str)] == [*(f"T{n}" for n in range(8)), "last"]
    with pytest.raises(EOFError):
        list(read_pages(io.BytesIO(data[:-40]), 1 << 20))
    with pytest.raises(ValueError, match="no MediaWiki dump"):
        list(read_pages(io.BytesIO(b"<rss/>"), 1 << 20))


def test_documents_of_a_dump(tmp_path):
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(bz2.compress(dump(("Ada", 0, "'''Ada''' is a [[language]]."))))
    (document,) = read_documents([path])
    assert document.text == "Ada\n\nAda is a language."
    assert (document.id, document.kind, dict(document.meta)) == ("wiki.xml.bz2:1", "encyclopedia", {"title": "Ada"})
    other = tmp_path / "feed.xml"
    other.write_text("<rss/>")
    skipped = []
    assert len(list(read_documents([path, other], skipped=skipped))) == 1
    assert [(s.id, s.reason) for s in skipped] == [("feed.xml", "no MediaWiki dump")]
