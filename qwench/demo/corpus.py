"""The demo's corpus: real text that lies on every machine with Python, so that the demo needs no download.

Its parts are the sources of the standard library, their docstrings, the language reference that `help()` shows, pages
and notes that come with Python, descriptions of the installed packages, and texts in other scripts (Chinese, Japanese
and Korean samples of the codec tests, message catalogues of the system). The parts are mixed by fixed weights up to a
byte budget, in an order that depends on nothing but the installation. `--data` replaces all of it by the user's files.
Cleaning and duplicates are left to the pipeline that every corpus goes through (`data.pipeline`).
"""

from __future__ import annotations

import builtins
import email
import functools
import gettext
import hashlib
import importlib
import importlib.metadata
import inspect
import itertools
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from qwench.data.docstrings import Described, as_reference, described, first_sentence, module_name
from qwench.data.documents import Skipped, read_documents
from qwench.types import Document

_TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))
_OTHERS = frozenset(("__pycache__", "site-packages", "dist-packages"))
_MESSAGES_CHARS = 8192  # of a message catalogue in one document
_C_MODULES: tuple[ModuleType, ...] = (builtins, math, itertools, functools, time, sys)
_NOTES = frozenset((".md", ".rst", ".txt"))
# The languages that Qwen2 names beside English [Qwen2 TR 3.1], as far as systems ship message catalogues for them.
_LANGUAGES = (
    "zh_CN",
    "ja",
    "ko",
    "fr",
    "de",
    "es",
    "ru",
    "ar",
    "pt_BR",
    "it",
    "vi",
    "th",
    "hi",
    "tr",
    "pl",
    "uk",
    "he",
)
_CATALOGUE_FOLDERS = (Path(sys.base_prefix, "share/locale"), Path("/usr/share/locale"))


@dataclass(slots=True, kw_only=True)
class Found:
    """How much a source gave to the corpus: `Found(source="standard library", kind="code", num_documents=120, ...)`."""

    source: str
    kind: str
    num_documents: int = 0
    num_bytes: int = 0
    exhausted: bool = True
    """False if the budget ended before the source did."""


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    kind: str
    weight: float
    read: Callable[[], Iterator[Document]]


def read_corpus(
    budget_bytes: int,
    *,
    data: str | Path | None = None,
    include_tests: bool = False,
    found: list[Found] | None = None,
    skipped: list[Skipped] | None = None,
) -> Iterator[Document]:
    """Documents with `source` and `kind` labels, `budget_bytes` of UTF-8 text in all (the last one may exceed it).

    With `data`, the documents of that file or folder in its own order; otherwise those of the installed Python.
    `found` receives one entry a source as the iteration goes on, `skipped` what could not be read. Raises ValueError if
    `data` does not exist or holds no text.
    """
    if budget_bytes < 1:
        raise ValueError(f"the corpus budget is {budget_bytes} bytes; give a positive number")
    if data is not None:
        name = str(data)
        user = _Source(name, "", 1.0, lambda: read_documents([data], skipped=skipped, piece_bytes=1 << 15))
        return _mix([user], budget_bytes, found)
    return _mix(_sources(include_tests), budget_bytes, found)


def _sources(include_tests: bool) -> list[_Source]:
    return [
        _Source("language reference", "reference", 2.0, _language_reference),
        _Source("standard library docstrings", "docs", 3.0, _docstrings),
        _Source("standard library", "code", 4.0, lambda: _standard_library(include_tests)),
        _Source("pages and notes of Python", "docs", 1.0, _pages_and_notes),
        _Source("descriptions of installed packages", "docs", 1.5, _package_descriptions),
        _Source("notes and licences of installed packages", "docs", 0.5, _package_notes),
        _Source("texts in East Asian scripts", "multilingual", 0.5, _east_asian_texts),
        _Source("message catalogues", "multilingual", 0.7, _message_catalogues),
    ]


def _mix(sources: Iterable[_Source], budget_bytes: int, found: list[Found] | None) -> Iterator[Document]:
    """Always take from the source that lags furthest behind its weight."""
    open_sources = [(source, source.read(), Found(source=source.name, kind=source.kind)) for source in sources]
    if found is not None:
        found += [entry for _, _, entry in open_sources]
    left = budget_bytes
    while left > 0 and open_sources:
        place = min(range(len(open_sources)), key=lambda i: open_sources[i][2].num_bytes / open_sources[i][0].weight)
        _, documents, entry = open_sources[place]
        document = next(documents, None)
        if document is None:
            del open_sources[place]
            continue
        size = len(document.text.encode("utf-8", "replace"))
        entry.num_documents += 1
        entry.num_bytes += size
        left -= size
        yield document
    for _, _, entry in open_sources:
        entry.exhausted = False


def _spread(items: Iterable[str]) -> list[str]:
    """A fixed order that is no alphabet's, so that a small budget sees a bit of everything."""
    return sorted(set(items), key=lambda item: hashlib.blake2b(item.encode("utf-8", "replace")).digest())


# ------------------------------------------------------------------------------------------------------------- Python
def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@functools.cache
def _library_files(*suffixes: str, include_tests: bool = False) -> tuple[str, ...]:
    """Paths below the library's folder, in the order of `_spread`."""
    root = _library()
    forbidden = _OTHERS if include_tests else _OTHERS | _TEST_FOLDERS
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in forbidden]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(suffixes)]
    return tuple(_spread(names))


def _read(path: Path) -> str:
    """The text of a file through the reader that every corpus uses; "" if it cannot be read."""
    try:
        return "\n".join(document.text for document in read_documents([path], piece_bytes=1 << 24))
    except ValueError:
        return ""


def _standard_library(include_tests: bool = False) -> Iterator[Document]:
    for name in _library_files(".py", include_tests=include_tests):
        if name.startswith("pydoc_data/"):  # the reference is a source of its own
            continue
        if text := _read(_library() / name):
            meta = {"module": module_name(name)}
            yield Document(id=f"python/{name}", text=text, source="standard library", kind="code", meta=meta)


def _docstrings() -> Iterator[Document]:
    source = "standard library docstrings"
    for module in _C_MODULES:
        entries = list(_help(module))
        facts = [(entry.name, sentence) for entry in entries if (sentence := first_sentence(entry.doc))]
        yield Document(
            id=f"help/{module.__name__}",
            text=as_reference(entries),
            source=source,
            kind="docs",
            meta={"facts": facts},
        )
    for name in _library_files(".py"):
        text = as_reference(described(module_name(name), _read(_library() / name)))
        if text:
            yield Document(id=f"docstrings/{name}", text=text, source=source, kind="docs")


def _help(module: ModuleType) -> Iterator[Described]:
    """What a module written in C says of its functions and classes."""
    for name, value in sorted(vars(module).items()):
        doc = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
        # sys and functools also carry names of other modules
        if doc and getattr(value, "__module__", None) in (module.__name__, "builtins", None):
            shown = name if module is builtins else f"{module.__name__}.{name}"
            signature = getattr(value, "__text_signature__", None) or ""
            kind = "class" if inspect.isclass(value) else "function"
            yield Described(name=shown, kind=kind, signature=signature.replace("$", ""), doc=doc)


def _language_reference() -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        return
    for topic in _spread(topics):
        yield Document(id=f"topic/{topic}", text=topics[topic], source="language reference", kind="reference")


def _pages_and_notes() -> Iterator[Document]:
    for name in _library_files(".html", ".rst", ".txt"):
        if not Path(name).name.startswith("Grammar") and (text := _read(_library() / name)):
            yield Document(id=f"python/{name}", text=text, source="pages and notes of Python", kind="docs")


# ----------------------------------------------------------------------------------------------------------- packages
@functools.cache
def _distributions() -> dict[str, importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower(), distribution)
    return found


def _package_descriptions() -> Iterator[Document]:
    for name in _spread(_distributions()):
        distribution = _distributions()[name]
        raw = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        metadata = email.message_from_string(raw)
        body = metadata.get("Description") or metadata.get_payload()
        text = f"{metadata.get('Name', name)}: {metadata.get('Summary', '')}\n\n{body}".strip()
        yield Document(id=f"package/{name}", text=text, source="descriptions of installed packages", kind="docs")


def _package_notes() -> Iterator[Document]:
    paths: dict[str, Path] = {}
    for name, distribution in _distributions().items():
        for file in distribution.files or ():
            # One-word lists such as top_level.txt are no text; tests' data is none either.
            if (
                file.suffix.lower() in _NOTES
                and not _TEST_FOLDERS & set(file.parts)
                and not file.name.startswith("top_")
            ):
                paths[f"{name}/{file.as_posix()}"] = Path(str(file.locate()))
    for key in _spread(paths):
        if paths[key].is_file() and (text := _read(paths[key])):
            yield Document(id=f"note/{key}", text=text, source="notes and licences of installed packages", kind="docs")


# ---------------------------------------------------------------------------------------------------- other languages
def _east_asian_texts() -> Iterator[Document]:
    folder = _library() / "test" / "cjkencodings"
    languages = {
        "gb": "zh",
        "big": "zh",
        "hz": "zh",
        "euc_jp": "ja",
        "shift": "ja",
        "euc_kr": "ko",
        "cp949": "ko",
        "joh": "ko",
    }
    for path in sorted(folder.glob("*-utf8.txt")) if folder.is_dir() else ():
        lang = next((code for prefix, code in languages.items() if path.name.startswith(prefix)), "")
        if text := _read(path):
            yield Document(
                id=f"python/test/cjkencodings/{path.name}",
                text=text,
                source="texts in East Asian scripts",
                kind="multilingual",
                lang=lang,
            )


def _message_catalogues() -> Iterator[Document]:
    """Translated messages of programs, a catalogue in pieces."""
    catalogues: dict[str, tuple[str, Path]] = {}
    for folder in _CATALOGUE_FOLDERS:
        for language in _LANGUAGES:
            for path in (folder / language / "LC_MESSAGES").glob("*.mo"):
                catalogues.setdefault(f"{language}/{path.stem}", (language, path))
    for key in _spread(catalogues):
        language, path = catalogues[key]
        try:
            with open(path, "rb") as file:
                messages = gettext.GNUTranslations(file)._catalog  # pyright: ignore[reportAttributeAccessIssue]
        except (OSError, UnicodeError, ValueError):
            continue
        lines = [text for original, text in messages.items() if original and len(text) >= 20 and text != original]
        for number, text in enumerate(_pages(lines), 1):
            yield Document(
                id=f"messages/{key}:{number}",
                text=text,
                source="message catalogues",
                kind="multilingual",
                lang=language.partition("_")[0],
            )


def _pages(lines: Iterable[str]) -> Iterator[str]:
    page: list[str] = []
    size = 0
    for line in lines:
        page.append(line)
        size += len(line) + 1
        if size >= _MESSAGES_CHARS:
            yield "\n".join(page)
            page, size = [], 0
    if page:
        yield "\n".join(page)
