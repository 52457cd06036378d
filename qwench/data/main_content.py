"""The main text of a web page: articles, posts and pages without navigation, teasers, forms, notices and comments.

resiliparse parses the page and serialises it again, now well formed; one pass over its tags gives blocks of text
(paragraphs, headings, list items, cells) with the number of their characters that are links, and the elements they lie
in. From that the smallest element that holds nearly all prose is chosen, and in it what looks like furniture is left
out: by names of classes, by link density, by phrases of many languages. Nothing is rendered, no style sheet is read.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from html import unescape
from itertools import accumulate, pairwise
from typing import Any


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


_UNSEEN = re.compile(
    r"<(script|style|noscript|template|svg|iframe|select|textarea|object|canvas|audio|video|map|"
    r"button)\b[^>]*>.*?</\1>"
    r"|<!--.*?-->",
    re.S,
)
_TOKEN = re.compile(r'<(/?)([a-zA-Z][^\s>/]*)([^>"]*(?:"[^"]*"[^>"]*)*)>([^<]*)')
_NAME = re.compile(r'\b(?:class|id|itemprop|role|data-testid|data-component)="([^"]*)"')
_HIDDEN = re.compile(
    r'\shidden(?:=""|\s|$)|aria-hidden="true"|style="[^"]*(?:display:\s*none|visibility:\s*hidden)'
    r'|role="(?:navigation|search|banner|contentinfo|dialog|menu|complementary|button|alert)"'
)
_VOID = _words("area base br col embed hr img input link meta param source track wbr keygen")
_BLOCKS = _words(
    "address article aside blockquote body center dd details dir div dl dt fieldset figcaption figure footer form h1 "
    "h2 h3 h4 h5 h6 header hgroup hr li main ol p pre section summary table tbody td tfoot th thead tr ul caption "
    "legend nav label"
)
_FURNITURE_TAGS = _words("nav footer menu dialog label legend")
_STRONG = _words(
    "nav navi navbar navigation menu submenu breadcrumb breadcrumbs brotkrumen crumb crumbs sidebar seitenleiste "
    "footer "
    "fusszeile share sharing shares sharebar sharedaddy shariff social socialmedia addtoany related relatedposts "
    "recommend recommended recommendation recommendations newsletter cookie cookies consent gdpr banner advert "
    "adverts "
    "advertisement advertising ad ads anzeige werbung sponsor sponsored widget widgets pagination pager paging "
    "comment "
    "comments commentlist kommentar kommentare respond reply replies disqus trackback trackbacks pingback pingbacks "
    "toolbar popup modal overlay tooltip login signup signin subscribe subscription abo paywall outbrain taboola "
    "trending "
    "mostread masthead topbar navbox editsection affiliate disclosure sticky cta jprelatedposts "
    "entryutility entryfooter entrymeta postmeta postmetadata postinfo postfooter entryinfo authorbox authorbio "
    "authorinfo authordescription authorcard authorwrapper aboutauthor aboutthe reflist references noprint "
    "headerlink appstores factbox"
)
_WEAK = _words(
    "meta metadata author autor byline teaser teasers caption tag tags taglist tagcloud tagged schlagworte date time "
    "dateline timestamp published archive search searchform print rating ratings vote votes copyright legal "
    "disclaimer "
    "credit credits categories category hidden skip contact kontakt impressum tools promo promotion popular toc "
    "copyrights source quelle imagedescription infobox box feedback appendix themes topics temas keywords "
    "more"
)
_COMMENTS = _words("comment comments commentlist kommentar kommentare respond reply replies disqus")
_UNSEEN_NAMES = _words("hidden d-none visually-hidden sr-only screen-reader-text")
_NEUTRAL = re.compile(
    r"(?:tag|category|cat|status|type|format|has|is|no|with|hide|js|col|l|u|d|wp-block)-|field--|post-\d|page-\d|"
    r"single-post|post-type|tagstyle",
    re.I,
)
"""Names that say what a post is about or how it is laid out, not what an element is for."""
_WORD_BREAK = re.compile(r"[-_]+|(?<=[a-z])(?=[A-Z])")
_BREAK = "\0"
"""Stands for <br> between parts of a text; no parsed page has a NUL."""
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_CONTENT = re.compile(
    r"(?:^|\s)(?:articlebody|article-?_?_?body|entry-?content|post-?content|post-?body|article-?content|articletext|"
    r"article-?text|story-?body|story-?content|post-?entry|content-?body|postcontent|blog-?content|blogpost|"
    r"news-?content|main-?content-?text|td-post-content|mw-parser-output|single-content|page-content|"
    r"the-?content|body-?text|bodytext|textcontent|text-content|csc-textpic-text)(?:$|\s)",
    re.I,
)
_HEADING = _words("h1 h2 h3 h4 h5 h6")
_CELLS = frozenset(("td", "th"))
_SHORT_CHARS = 500
_LINKED_DATA = re.compile(r"<script[^>]*application/ld\+json[^>]*>(.*?)</script>", re.S | re.I)
_SENTENCE = re.compile(r"[.!?…:;,。！？；，、।؟۔]")
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


_PHRASES = re.compile(
    r"\W*(?:"
    r"(?:kommentare? (?:geschlossen|schreiben|deaktiviert)|dieser (?:eintrag|beitrag|artikel) wurde|der beitrag "
    r"wurde|"
    r"auch interessant|lesen sie (?:auch|mehr|hier)|lies auch|mehr (?:zum thema|lesen|dazu|infos)|weiter(?:lesen|e "
    r"artikel|e "
    r"beitr|e themen|e informationen|führende)|das könnte (?:dich|sie|ihnen|dir)|ähnliche (?:beiträge|artikel|"
    r"themen)|"
    r"verwandte|zum thema|anzeige\b|werbung\b|(?:foto|bild|quelle|bildquelle|fotocredit|bildnachweis|fotos|"
    r"copyright)s?:|"
    r"markiert mit|schlagw[oö]rt|getaggt|kategorien?:|teilen\b|zurück zu|newsletter|jetzt (?:abonnieren|teilen|"
    r"lesen)|"
    r"hinterlasse? |schreibe? einen kommentar|drucken\b|empfehlungen|tags?:|nächster (?:artikel|beitrag)|"
    r"vorheriger )|"
    r"(?:this (?:entry|post|article) was|related (?:articles?|posts?|stories|content|topics)|read (?:more|also|"
    r"next)|see also:|"
    r"you (?:may|might) (?:also|like)|more (?:from|on|stories|articles)|recommended|subscribe|sign up|share "
    r"(?:this|on)|"
    r"follow us|leave a (?:reply|comment)|(?:no )?comments?\b.{0,12}$|comments (?:are )?(?:closed|off)|if you "
    r"enjoyed|"
    r"advertisement|sponsored|photo(?:s| credit)?:|image(?: credit)?:|credits?:|source:|filed under|tagged|posted "
    r"(?:in|by|on)|"
    r"categor(?:y|ies):|all rights reserved|click here|download (?:the|our) app|get the latest|©|copyright|"
    r"for the latest|previous (?:post|article)|next (?:post|article)|skip to|print\b|table of contents)|"
    r"(?:lire (?:aussi|la suite|plus)|à lire|voir aussi|crédits? photos?|sur le même (?:sujet|thème)|partager|"
    r"abonnez|"
    r"commentaires?|publié (?:le|par)|articles? (?:liés?|similaires?)|inscrivez)|"
    r"(?:leer (?:más|también)|lee también|te puede interesar|te recomendamos|compartir|suscr[ií]b|temas$|etiquetas|"
    r"comentarios?|noticias relacionadas|artículos relacionados|ver también|publicado (?:el|por)|síguenos)|"
    r"(?:leggi anche|potrebbe interessarti|condividi|iscriviti|commenti|articoli correlati|tag:)|"
    r"(?:czytaj (?:także|też|więcej|również)|zobacz (?:także|też|również)|zapraszamy|udostępnij|komentarze|tagi:|"
    r"więcej\b.{0,6}$|"
    r"źródło:|fot\.|podobne)|"
    r"(?:lees (?:ook|meer)|deel(?:en)?:|reacties|gerelateerd)|"
    r"(?:leia (?:mais|também)|veja também|compartilh|comentários|assine)|"
    r"(?:читайте также|поделиться|комментари|подпис|похожие|теги:|источник:|фото:)|"
    r"(?:相关(?:阅读|文章|新闻|推荐)|相關|责任编辑|責任編輯|分享到|上一篇|下一篇|延伸阅读|延伸閱讀|推荐阅读|评论|版权所有|来源[:：]|点击|"
    r"関連記事|シェア|コメント|あわせて読みたい|続きを読む|関連|관련 ?기사|공유|댓글|저작권|무단 ?전재))",
    re.I,
)


_ASIDE = re.compile(r"cookie|javascript|browser|©|newsletter|adblock", re.I)
_NOTICES = re.compile(
    r"\W*(?:dieser (?:eintrag|beitrag|artikel) wurde (?:am|unter|von|ver|gep)|der beitrag wurde|this (?:entry|"
    r"post) was posted|"
    r"if you enjoyed (?:reading )?this|for the latest (?:stories|news)|subscribe (?:now|to)|sign up (?:for|to)|all "
    r"rights reserved|"
    r"copyright\b|©|this (?:post|article) (?:may )?contains? (?:references|affiliate)|we use cookies|wir verwenden "
    r"cookies)",
    re.I,
)
_NEITHER, _WEAKLY, _STRONGLY, _COMMENTING, _GONE, _CONTENTS = range(6)


@lru_cache(1 << 14)
def _role(attrs: str) -> int:
    """What an element is by its attributes: one of the constants above."""
    if _HIDDEN.search(attrs):
        return _GONE
    names = " ".join(_NAME.findall(attrs))
    if not names:
        return _NEITHER
    if _CONTENT.search(_CAMEL.sub("-", names)) or _CONTENT.search(names):
        return _CONTENTS
    role = _NEITHER
    for name in names.split():
        if name.lower() in _UNSEEN_NAMES:
            return _GONE
        if _NEUTRAL.match(name):
            continue
        words = [word.lower() for word in _WORD_BREAK.split(name)]
        words.append("".join(words))
        words += [first + second for first, second in pairwise(words[:-1])]
        for word in words:
            if word in _STRONG:
                role = max(role, _COMMENTING if word in _COMMENTS else _STRONGLY)
            elif word in _WEAK:
                role = max(role, _WEAKLY)
    return role


class _Page:
    """Blocks of text and the elements around them, as parallel lists.

    Blocks: `texts`, `sizes` (characters, wide ones count twice), `linked` (of them in links), `tags` (innermost block
    element), `owners` (element). Elements: `names`, `roles`, `parents`, `begins` and `ends` (range of blocks).
    """

    def __init__(self, markup: str) -> None:
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self.linked: list[int] = []
        self.tags: list[str] = []
        self.owners: list[int] = []
        self.names: list[str] = ["body"]
        self.roles: list[int] = [0]
        self.parents: list[int] = [-1]
        self.begins: list[int] = [0]
        self.ends: list[int] = [0]
        self._read(markup)

    def _read(self, markup: str) -> None:
        parts: list[str] = []
        link_chars = 0
        links = pre = 0
        owner = 0
        stack: list[tuple[str, int]] = []  # tag, element before it (-1: no element was opened)
        names, roles, parents, begins, ends = self.names, self.roles, self.parents, self.begins, self.ends
        texts = self.texts
        for close, tag, attrs, text in _TOKEN.findall(markup):
            if close:
                if not stack:
                    continue
                opened, before = stack.pop()
                if before >= 0:
                    if parts:
                        self._close(parts, link_chars, owner, pre)
                        parts, link_chars = [], 0
                    ends[owner] = len(texts)
                    owner = before
                if opened == "a":
                    links -= 1
                elif opened == "pre":
                    pre -= 1
            elif tag in _VOID:
                if tag == "br" or tag == "hr":
                    parts.append(_BREAK)
            else:
                role = _role(attrs) if attrs else 0
                if tag in _BLOCKS or 0 < role < 5:
                    if parts:
                        self._close(parts, link_chars, owner, pre)
                        parts, link_chars = [], 0
                    if tag in _FURNITURE_TAGS:
                        role = _STRONGLY
                    elif not role and (tag == "aside" or tag == "figcaption"):
                        role = _WEAKLY
                    names.append(tag)
                    roles.append(role)
                    parents.append(owner)
                    begins.append(len(texts))
                    ends.append(0)
                    stack.append((tag, owner))
                    owner = len(names) - 1
                else:
                    stack.append((tag, -1))
                if tag == "a":
                    links += 1
                elif tag == "pre":
                    pre += 1
            if text:
                parts.append(text)
                if links:
                    link_chars += len(text)
        if parts:
            self._close(parts, link_chars, owner, pre)
        ends[0] = len(texts)

    def _close(self, parts: list[str], link_chars: int, owner: int, pre: int) -> None:
        text = "".join(parts)
        if "&" in text:
            text = unescape(text)
        if pre:
            text = text.replace(_BREAK, "\n")
            text = text.strip("\n").rstrip()
        elif _BREAK in parts:
            lines = [" ".join(line.split()) for line in _lines(parts)]
            text = "\n".join(lines).strip()
        else:
            text = " ".join(text.split())
        if not text:
            return
        self.texts.append(text)
        size = len(text)
        if not text.isascii():
            size += len(_WIDE.findall(text))
        self.sizes.append(size)
        self.linked.append(min(link_chars, size))
        self.owners.append(owner)
        self.tags.append(self.names[owner])


def _lines(parts: list[str]) -> list[str]:
    """The text between line breaks; white space of the source is none."""
    lines, line = [], []
    for part in parts:
        if part == _BREAK:
            lines.append("".join(line))
            line = []
        else:
            line.append(part)
    lines.append("".join(line))
    return [unescape(one) if "&" in one else one for one in lines]


def main_text(html: str) -> str:
    """The text of the main content, paragraphs separated by blank lines; "" if the page has none."""
    from resiliparse.parse.html import HTMLTree  # pyright: ignore[reportMissingImports]

    body = HTMLTree.parse(html).body
    text = _choose(_Page(_UNSEEN.sub("", body.html))) if body is not None else ""
    if len(text) < _SHORT_CHARS and '"articleBody"' in html:
        text = max(text, _declared_text(html), key=len)
    return text


def _declared_text(html: str) -> str:
    """The article's text that a page gives search engines beside markup that a script fills."""
    found = ""
    for match in _LINKED_DATA.finditer(html):
        try:
            found = max(found, _article_body(json.loads(match[1])), key=len)
        except (ValueError, RecursionError):
            continue
    return plain_text_of(found) if "<" in found else found


def _article_body(value: Any) -> str:
    if isinstance(value, list):
        return max(map(_article_body, value), key=len, default="")
    if not isinstance(value, dict):
        return ""
    body = value.get("articleBody")
    return body if isinstance(body, str) else _article_body(value.get("@graph"))


def plain_text_of(markup: str) -> str:
    return "\n\n".join(_Page(_UNSEEN.sub("", markup)).texts)


def _choose(page: _Page) -> str:
    count = len(page.texts)
    if not count:
        return ""
    prose = [
        size if size >= 60 and linked < 0.35 * size and _SENTENCE.search(text) else 0
        for text, size, linked in zip(page.texts, page.sizes, page.linked, strict=True)
    ]
    dropped = _furniture(page, prose)
    value = [0 if gone else size for gone, size in zip(dropped, prose, strict=True)]
    chosen = _container(page, value)
    begin, end = page.begins[chosen], page.ends[chosen]
    kept = [
        block
        for block in range(_lead(page, dropped, chosen), begin)
        if value[block] and not _ASIDE.search(page.texts[block])
    ]
    kept += [block for block in range(begin, end) if not dropped[block] and _is_text(page, block)]
    return _join(page, kept)


def _furniture(page: _Page, prose: list[int]) -> bytearray:
    """1 for blocks that lie in furniture, unless it holds what must be the content."""
    total = sum(prose)
    sums = [0, *accumulate(prose)]
    chars = [0, *accumulate(page.sizes)]
    links = [0, *accumulate(page.linked)]
    dropped = bytearray(len(prose))
    main = [
        number
        for number, name in enumerate(page.names)
        if (name in ("article", "main") or page.roles[number] == _CONTENTS)
        and sums[page.ends[number]] - sums[page.begins[number]] > 0.35 * total
    ]
    for number in range(1, len(page.names)):
        role = page.roles[number]
        if not 0 < role < _CONTENTS or page.names[number] in ("article", "main"):
            continue
        begin, end = page.begins[number], page.ends[number]
        held = sums[end] - sums[begin]
        if held > 0.35 * total and any(number < n and page.ends[n] <= end for n in main):
            continue
        if role == _WEAKLY:
            size = chars[end] - chars[begin]
            out = held <= 150 or (links[end] - links[begin]) > 0.4 * size
        elif role == _STRONGLY:
            out = held <= 0.35 * total
        elif role == _COMMENTING:
            out = held <= 0.35 * total or total - held > 400
        else:
            out = held <= 0.5 * total
        if out:
            dropped[begin:end] = b"\1" * (end - begin)
    return dropped


def _container(page: _Page, value: list[int]) -> int:
    """The element that holds the content: by its name, else the smallest that holds nearly all prose."""
    total = sum(value)
    if not total:
        return 0
    sums = [0, *accumulate(value)]
    held = [sums[end] - sums[begin] for begin, end in zip(page.begins, page.ends, strict=True)]
    smallest = max(number for number in range(len(held)) if held[number] >= 0.8 * total)
    named = [n for n, role in enumerate(page.roles) if role == _CONTENTS and held[n] > 0]
    articles = [n for n, name in enumerate(page.names) if name == "article" and held[n] > 0]
    for group in (named, articles):
        if group:
            most = max(held[n] for n in group)
            if (most >= 0.35 * total and most > 150) or (most >= 0.15 * total and most > 1200):
                best = max(n for n in group if held[n] >= 0.95 * most)
                # several of one kind (a list of posts, sections of an article) stay together
                if most < 0.6 * total and held[smallest] and page.begins[smallest] <= page.begins[best]:
                    together = sum(held[n] for n in group if not _inside(page, n, frozenset(group)))
                    if together > 1.5 * most:
                        return smallest
                return best
    return smallest


def _inside(page: _Page, number: int, group: frozenset[int]) -> bool:
    parent = page.parents[number]
    while parent > 0:
        if parent in group:
            return True
        parent = page.parents[parent]
    return False


def _lead(page: _Page, dropped: bytearray, chosen: int) -> int:
    """Where the lead begins: after the last title before the content if it is near, else a little before."""
    begin = page.begins[chosen]
    for block in range(begin - 1, max(-1, begin - 40), -1):
        if page.tags[block] == "h1" and not dropped[block]:
            return block + 1
    around = chosen
    for _ in range(3):
        around = max(0, page.parents[around])
    return max(page.begins[around], begin - 12)


def _is_text(page: _Page, block: int) -> bool:
    text, size, linked, tag = page.texts[block], page.sizes[block], page.linked[block], page.tags[block]
    if (linked > 0.5 * size and tag not in ("p", "td")) or linked > 0.8 * size:
        return False
    return not (size < 120 and _PHRASES.match(text)) and not (size < 500 and _NOTICES.match(text))


def _join(page: _Page, kept: list[int]) -> str:
    """Kept blocks as text, without headings that have nothing below them."""
    out: list[str] = []
    headings: list[str] = []
    before, row, last = "", -1, ""
    for block in kept:
        text, tag = page.texts[block], page.tags[block]
        if text == last and tag not in _CELLS:  # for the eyes of small screens
            continue
        last = text
        if tag in _HEADING and not (page.sizes[block] >= 60 and text[-1] in ".!?…。！？"):
            headings = [*headings[-1:], text]
            continue
        out += [part for heading in headings for part in (heading, "\n\n")]
        same_row = tag in _CELLS and row == page.parents[page.owners[block]] and not headings
        if same_row:
            out[-1] = " | "
        elif not headings and (tag == before == "li" or (tag in _CELLS and before in _CELLS)):
            out[-1] = "\n"
        out += ("- " + text if tag == "li" else text, "\n\n")
        before, row, headings = tag, page.parents[page.owners[block]], []
    return "".join(out[:-1])
