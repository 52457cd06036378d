"""Text of an HTML page [Qwen TR 2.1, step 1].

With resiliparse installed (`pip install 'qwench[data]'`) the main content is found by `data.main_content`; without it a
small extractor on the standard library's parser keeps block structure but does not try to.
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
# What browsers take the labels for: pages that say latin-1 are written in Windows' code page.
_WHATWG = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}
_INVISIBLE = frozenset(("script", "style", "template", "noscript", "head", "svg", "nav"))


def html_to_text(html: str, *, main_content: bool = True) -> str:
    """Visible text with line breaks between blocks; `main_content` leaves out navigation, notices and comments.

    A page in which no main content is found gives all its visible text.
    """
    if not _HAS_RESILIPARSE:
        return plain_html_to_text(html)
    from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore[reportMissingImports]

    from qwench.data.main_content import main_text

    text = main_text(html) if main_content else ""
    return text if text.strip() else extract_plain_text(html, preserve_formatting=True, main_content=False)


_DECLARED = re.compile(rb"""charset\s*=\s*["']?\s*([\w-]+)""")


def decode_html(data: bytes, charset: str = "") -> str:
    """Bytes of a page as text: by byte order mark, UTF-8, `charset` (the server's), its head's, or a guess.

    Stray bytes become U+FFFD. Raises UnicodeError if no encoding fits and none can be guessed.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        declared = _DECLARED.search(data[:4096])
        for name in (charset, declared[1].decode("ascii", "replace") if declared else ""):
            name = _WHATWG.get(name.lower(), name)
            try:
                return data.decode(name)
            except (UnicodeDecodeError, LookupError):
                continue
        if not _HAS_RESILIPARSE:
            raise error
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding  # pyright: ignore[reportMissingImports]

        return bytes_to_str(data, detect_encoding(data) or "utf-8")


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
