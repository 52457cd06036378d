import json

import pytest

from qwench.data.main_content import main_text

SENTENCE = "The committee met on Monday, and after three hours of debate it agreed on the plan. "
PROSE = "".join(f"<p>{SENTENCE * 3}Number {n}.</p>" for n in range(5))


def page(body: str, head: str = "") -> str:
    return f"<html><head><title>T</title>{head}</head><body>{body}</body></html>"


@pytest.mark.parametrize(
    "furniture",
    [
        "<nav><ul><li><a href=/>Home FURNITURE</a></li></ul></nav>",
        "<footer>Imprint FURNITURE</footer>",
        "<div class='sidebar'><p>A teaser FURNITURE that is long enough, and even a sentence of its own.</p></div>",
        "<div id=comments><p>FURNITURE wrote: I agree with every word of this, thank you very much indeed.</p></div>",
        "<div class='cookieBanner'>We use cookies FURNITURE</div>",
        "<div class='post-share-buttons'>Share FURNITURE</div>",
        "<div hidden><p>FURNITURE is hidden, although it is a complete sentence of some length.</p></div>",
        "<div style='display: none'>FURNITURE</div>",
        "<ul class=related-posts><li><a href=/1>FURNITURE one</a></li></ul>",
        "<script>var FURNITURE = 1</script><style>.FURNITURE{}</style><!-- FURNITURE -->",
        "<h2>Related articles FURNITURE</h2>",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_furniture_goes_and_prose_stays(furniture, inside):
    article = f"<article><h1>Title</h1>{PROSE}{furniture if inside else ''}</article>"
    text = main_text(page(article + ("" if inside else furniture)))
    assert "FURNITURE" not in text
    assert all(f"Number {n}." in text for n in range(5))


@pytest.mark.parametrize(
    "container",
    [
        "<div class='entry-content'>%s</div>",
        "<main>%s</main>",
        "<div><div>%s</div></div>",
        "<section itemprop=articleBody>%s</section>",
        "<div class='post category-sidebar tag-comments has-sidebar'>%s</div>",
        "<div class=theiaStickySidebar><article>%s</article></div>",
    ],
)
def test_the_content_is_found_in_any_container(container):
    links = "".join(f"<li><a href=/{n}>A link to another page number {n}</a></li>" for n in range(30))
    text = main_text(page(f"<ul>{links}</ul>" + container % PROSE + f"<ul>{links}</ul>"))
    assert text.count("The committee met") == 15
    assert "another page" not in text


def test_a_lead_between_the_title_and_the_body_belongs_to_it():
    lead = "Neighbours had asked for years, and the town has now answered their question."
    text = main_text(
        page(f"<div><h1>Title</h1><div class=lead><p>{lead}</p></div><div class=entry-content>{PROSE}</div></div>")
    )
    assert text.startswith(lead)


def test_structure_of_lists_tables_and_code():
    parts = "<ul><li>one</li><li>two</li></ul><table><tr><th>A<th>B<tr><td>1<td>2</table><pre>x = 1\n    y</pre>"
    body = f"<article>{PROSE}{parts}{PROSE}</article>"
    text = main_text(page(body))
    assert "- one\n- two" in text
    assert "A | B\n1 | 2" in text
    assert "x = 1\n    y" in text
    assert "\n\nThe committee" in text


def test_line_breaks_entities_and_white_space():
    text = main_text(
        page(f"<article>{PROSE}<p>first<br>second&nbsp;&amp;\n  <b>third</b>\n<i>fourth</i></p></article>")
    )
    assert "first\nsecond & third fourth" in text


def test_headings_need_text_below():
    text = main_text(page(f"<article><h2>Kept</h2>{PROSE}<h2>Alone</h2></article>"))
    assert "Kept" in text
    assert "Alone" not in text


@pytest.mark.parametrize(
    "phrase",
    [
        "Lesen Sie auch: Anderes",
        "Read more about it",
        "Te puede interesar",
        "Читайте также: другое",
        "相关阅读：其他",
        "Foto: dpa",
    ],
)
def test_phrases_of_many_languages(phrase):
    assert phrase not in main_text(page(f"<article>{PROSE}<p>{phrase}</p>{PROSE}</article>"))


def test_chinese_articles():
    paragraph = "<p>委员会星期一开会，经过三个小时的讨论，终于通过了这个计划。居民们对此表示欢迎，并希望尽快开始。</p>"
    text = main_text(
        page(
            f"<ul><li><a href=/>首页</a></li></ul><div>{paragraph}<p>{'这是另一个很长的段落，' * 8}</p></div>"
            "<div>版权所有 京ICP备</div>"
        )
    )
    assert "委员会星期一开会" in text
    assert "首页" not in text


def test_text_for_search_engines_where_a_script_fills_the_page():
    data = json.dumps({"@graph": [{"@type": "NewsArticle", "articleBody": SENTENCE * 4}]})
    head = f'<script type="application/ld+json">{data}</script>'
    assert main_text(page("<div id=root></div>", head)) == SENTENCE * 4
    assert main_text(page("<div id=root></div>", head.replace('"@graph"', '{"@graph"'))) == ""


@pytest.mark.parametrize(
    "html", ["", "<", "<p", "text", "<body>", "<div>" * 3000 + "deep", "</p>" * 50, "a\0b", "<p>" * 5000]
)
def test_odd_pages_do_not_crash(html):
    assert isinstance(main_text(html), str)
