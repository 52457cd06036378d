import pytest

from qwench.data.html import html_to_text, plain_html_to_text

PAGE = """<html><head><title>T</title><style>b{}</style></head><body>
<nav><ul><li>Home</li></ul></nav><div role="navigation"><div>Next</div> Previous</div>
<h1>Title<a class="headerlink">¶</a></h1><p>One &amp; <b>two</b>
words.</p><ul><li><p>first</p></li><li></li><li>second</li></ul>
<pre>  keep
    this</pre><script>alert(1)</script><p>Last</body></html>"""


def test_the_standard_library_extraction():
    expected = "Title\n\nOne & two words.\n\n- first\n\n- second\n\n  keep\n    this\n\nLast"
    lines = [line for line in plain_html_to_text(PAGE).split("\n") if line]
    assert lines == [line for line in expected.split("\n") if line]


def test_the_other_extraction_agrees_on_the_words():
    text = html_to_text(PAGE, main_content=False)
    for word in ("Title", "One & two words.", "first", "second", "Last"):
        assert word in text
    assert "alert" not in text
    assert "b{}" not in text


@pytest.mark.parametrize("broken", ["", "<", "<p", "</div></ul>text", "<script>never closed", "<!-- open", "a\0b"])
def test_broken_pages_do_not_crash(broken):
    assert isinstance(html_to_text(broken), str)
    assert isinstance(plain_html_to_text(broken), str)


def test_main_content_leaves_navigation_out_but_never_everything():
    article = "<p>" + "A sentence of the article that goes on for some time. " * 8 + "</p>"
    text = html_to_text(f"<body><nav>Home Next</nav><article>{article}</article></body>")
    assert "sentence of the article" in text
    assert "Home" not in text
    assert "only" in html_to_text("<body><nav>only this</nav></body>")
