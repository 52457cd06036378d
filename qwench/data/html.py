"""Text of an HTML page [Qwen TR 2.1, step 1].

With resiliparse installed (`pip install 'qwench[data]'`) its extractor is used, otherwise a small one on the standard
library's parser, which keeps block structure but does not try to find a page's main content.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.util import find_spec

_HAS_RESILIPARSE = find_spec("resiliparse") is not None

_BLOCK_TAGS = (
    "address article aside blockquote body br dd details dialog div dl dt fieldset figcaption figure footer form h1 h2 "
    "h3 h4 h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead tr ul"
)
_PARAGRAPH_TAGS = "p h1 h2 h3 h4 h5 h6 pre ul ol dl table blockquote section article"
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_PARAGRAPHS = frozenset(_PARAGRAPH_TAGS.split())
_INVISIBLE = frozenset(("script", "style", "template", "noscript", "head", "svg", "nav"))


def html_to_text(html: str, *, main_content: bool = True) -> str:
    """Visible text with line breaks between blocks; `main_content` leaves out navigation where resiliparse finds it."""
    if not _HAS_RESILIPARSE:
        return plain_html_to_text(html)
    from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore[reportMissingImports]

    text = extract_plain_text(html, preserve_formatting=True, main_content=main_content)
    # The heuristics for main content can reject a whole page that has no article in it.
    if main_content and not text.strip():
        text = extract_plain_text(html, preserve_formatting=True, main_content=False)
    return text


def plain_html_to_text(html: str) -> str:
    """The extraction that needs the standard library only."""
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    return parser.text()


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden: list[str] = []  # open tags of the invisible element we are in, of its own kind only
        self._preformatted = 0
        self._bullet = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":  # a head without end tag ends here
            self._hidden.clear()
        if self._hidden:
            if tag == self._hidden[-1]:
                self._hidden.append(tag)
        elif tag in _INVISIBLE or ("role", "navigation") in attrs or ("class", "headerlink") in attrs:
            self._hidden.append(tag)
        else:
            self._break(tag)
            self._bullet |= tag == "li"
            self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag == self._hidden[-1]:
                self._hidden.pop()
            return
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if tag == "li":
            self._bullet = False
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._bullet and data.strip():
            self._parts.append("\n- ")
            self._bullet = False
        if self._preformatted:
            self._parts.append(data)
        else:
            data = re.sub(r"\s+", " ", data)
            at_line_start = not self._parts or self._parts[-1].endswith("\n")
            self._parts.append(data.lstrip() if at_line_start else data)

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._parts.append("\n\n" if tag in _PARAGRAPHS else "\n")

    def text(self) -> str:
        text = re.sub(r"[ \t]+\n", "\n", "".join(self._parts))
        return re.sub(r"\n{3,}", "\n\n", text).strip()
