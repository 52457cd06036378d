"""Articles of Wikipedia-style XML dumps (`<mediawiki>`), their wikitext turned into plain text.

Read as a stream of `<page>` elements, so one damaged or huge page costs that page only. Templates are left out except
the few whose argument is running text; tables, references, files and galleries are left out; formulas stay as `$...$`.
No template is expanded and no module run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20
_TITLE = re.compile(rb"<title>(.*?)</title>", re.S)
_NAMESPACE = re.compile(rb"<ns>(-?\d+)</ns>")
_ID = re.compile(rb"<id>(\d+)</id>")
_TEXT = re.compile(rb"<text[^>]*>(.*)</text>", re.S)
_REDIRECT = re.compile(r"\s*#\S+\s*:?\s*\[\[", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """An article: `Page(id="12", title="Anarchism", wikitext="'''Anarchism''' is ...")`."""

    id: str
    title: str
    wikitext: str


def read_pages(file: BinaryIO, max_page_bytes: int) -> Iterator[Page | str]:
    """Articles (namespace 0, no redirects) in order; a string says why a page was left out: "page too large ...".

    Raises ValueError if the file does not begin like a MediaWiki dump, EOFError if it ends inside a page.
    """
    data = file.read(_CHUNK_BYTES)
    if b"<mediawiki" not in data and b"<page>" not in data:
        raise ValueError("no MediaWiki dump")
    while True:
        begin = data.find(b"<page>")
        if begin < 0:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                return
            data = data[-5:] + chunk
            continue
        data = data[begin:]
        parts, size, tail = [data], len(data), data
        while (end := tail.find(b"</page>")) < 0:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                raise EOFError("dump ends inside a page")
            tail = tail[-6:] + chunk
            size += len(chunk)
            if size <= max_page_bytes + _CHUNK_BYTES:
                parts.append(chunk)
        if size > max_page_bytes + _CHUNK_BYTES:
            data = tail[end + 7 :]
            yield "page too large"
            continue
        whole = b"".join(parts)
        stop = whole.find(b"</page>")
        page = _page(whole[:stop])
        data = whole[stop + 7 :]
        if page is not None:
            yield page


def _page(data: bytes) -> Page | None:
    namespace = _NAMESPACE.search(data)
    text = _TEXT.search(data)
    if (namespace and namespace[1] != b"0") or text is None or b"<redirect" in data[:4096]:
        return None
    wikitext = unescape(text[1].decode("utf-8", "replace"))
    if _REDIRECT.match(wikitext):
        return None
    title, number = _TITLE.search(data), _ID.search(data)
    return Page(
        id=number[1].decode() if number else "",
        title=unescape(title[1].decode("utf-8", "replace")) if title else "",
        wikitext=wikitext,
    )


# ----------------------------------------------------------------------------------------------------------- wikitext
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_MATH = re.compile(r"<(?:math|chem|ce)\b[^>/]*>(.*?)</(?:math|chem|ce)\s*>", re.S | re.I)
_CODE = re.compile(r"<(syntaxhighlight|source|pre)\b[^>]*>(.*?)</\1\s*>", re.S | re.I)
_NOWIKI = re.compile(r"<nowiki\s*/?>|</nowiki\s*>", re.I)
_DROPPED = re.compile(
    r"<(ref|gallery|timeline|imagemap|score|mapframe|templatestyles|graph|indicator|section|references)\b"
    r"(?:[^>]*/>|[^>]*>.*?</\1\s*>)",
    re.S | re.I,
)
_UNCLOSED = re.compile(r"<ref\b[^>]*>|</ref\s*>|<references[^>]*>", re.I)
_BREAK = re.compile(r"<(?:br|hr)\s*/?\s*>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INNER_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_INNER_TABLE = re.compile(r"^[ \t:*]*\{\|(?:(?!^[ \t:*]*\{\|).)*?^[ \t]*\|\}", re.S | re.M)
_INNER_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//?[^\s\]]+(?:\s+([^\]\n]*))?\]")
_VARIANT = re.compile(r"-\{(.*?)\}-", re.S)
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(=+)[ \t]*(.*?)[ \t]*=+[ \t]*$", re.M)
_LIST = re.compile(r"^([*#:;]+)[ \t]*", re.M)
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_EMPTY_BRACKETS = re.compile(r"[ \t]*[(（][ \t,;:，；、]*[)）]")
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")
_HAS_PREFIX = re.compile(r":?\s*([^\s:|\[\]]{2,20})\s*:", re.S)
_TEXT_TEMPLATES = {
    "lang": 1,
    "nowrap": 0,
    "nobr": 0,
    "transl": -1,
    "langx": 1,
    "small": 0,
    "big": 0,
    "le": 0,
    "math": 0,
}
_FILE_NAMES = (
    "file image datei bild fichier archivo ficheiro immagine plik файл изображение 文件 檔案 档案 "
    "图像 圖像 ファイル 画像 파일 그림 "
    "bestand tập_tin fil category kategorie catégorie categoría categoria kategoria категория 分类 分類 カテゴリ 분류"
)
_FILE_WORDS = frozenset(_FILE_NAMES.split())


def wikitext_to_text(wikitext: str) -> str:
    """Plain text: headings and paragraphs on their own lines, list items after "- ".

    >>> wikitext_to_text("'''Rust''' is a [[language (computing)|language]]{{cite}}.\\n== Use ==\\n* fast")
    'Rust is a language.\\n\\nUse\\n\\n- fast'
    """
    kept: list[str] = []

    def keep(text: str) -> str:
        kept.append(text)
        return f"\x02{len(kept) - 1}\x03"

    text = _COMMENT.sub("", wikitext)
    text = _MATH.sub(lambda m: keep(f"${m[1].strip()}$"), text)
    text = _CODE.sub(lambda m: keep(f"\n{m[2].strip(chr(10))}\n"), text)
    text = _NOWIKI.sub("", text)
    text = _UNCLOSED.sub("", _DROPPED.sub("", text))
    for _ in range(12):  # from the innermost outwards
        text, count = _INNER_TEMPLATE.subn(_template, text)
        if not count:
            break
    for _ in range(6):
        text, count = _INNER_TABLE.subn("", text)
        if not count:
            break
    for _ in range(6):
        text, count = _INNER_LINK.subn(_link, text)
        if not count:
            break
    text = _EXTERNAL.sub(lambda m: m[1] or "", text)
    text = _VARIANT.sub(_variant, text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _MAGIC.sub("", _QUOTES.sub("", text))
    text = _HEADING.sub(r"\n\2\n", text)
    text = _LIST.sub(lambda m: "- " if m[1][0] in "*#" else "", text)
    text = _EMPTY_BRACKETS.sub("", unescape(text).replace("\xa0", " "))
    text = re.sub("\x02(\\d+)\x03", lambda m: kept[int(m[1])], text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _template(match: re.Match[str]) -> str:
    parts = match[1].split("|")
    name = parts[0].strip().lower()
    if name.startswith("lang-"):
        return parts[1].strip() if len(parts) > 1 else ""
    if name in ("convert", "cvt") and len(parts) > 2:
        return f"{parts[1].strip()} {parts[2].strip()}"
    place = _TEXT_TEMPLATES.get(name)
    arguments = [part for part in parts[1:] if "=" not in part]
    if place is None or len(arguments) <= place:
        return ""
    return arguments[place].strip()


def _link(match: re.Match[str]) -> str:
    target, bar, shown = match[1].partition("|")
    if (prefix := _HAS_PREFIX.match(target)) and not target.startswith(":") and prefix[1].lower() in _FILE_WORDS:
        return ""
    if bar:
        return shown.rpartition("|")[2] if "|" in shown else shown
    return target.lstrip(":")


def _variant(match: re.Match[str]) -> str:
    """Chinese `-{zh-hans:A; zh-hant:B}-`: the simplified form if there is one, else the first."""
    body = match[1].rpartition("|")[2]
    forms = dict(part.strip().split(":", 1) for part in body.split(";") if ":" in part)
    for key in ("zh-hans", "zh-cn", "zh"):
        if key in forms:
            return forms[key].strip()
    return next(iter(forms.values())).strip() if forms else body
