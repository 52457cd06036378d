"""Names, signatures and docstrings of Python source, read with `ast`: nothing is imported or run.

Documentation is text about code that stands beside it [Coder TR 3.1, text-code grounding]; from it come documents of
their own and questions with known answers.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!etc\.)(?<!a\.k\.a\.)[\"')\]]*\s+(?=[\"'(\[`*]*[A-Z0-9])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A module, class or function and what its author says of it.

    >>> Described(name="json.dumps", kind="function", signature="(obj, *, skipkeys=False)", doc="Serialize obj to ...")
    """

    name: str
    kind: str
    """"module", "class", "function" or "method"."""
    signature: str
    doc: str


def module_name(path: str) -> str:
    """The dotted name of a source file given its path below the import root.

    >>> module_name("json/__init__.py")
    'json'
    """
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def described(module: str, source: str) -> Iterator[Described]:
    """Everything public with a docstring, in source order, the module first. What does not parse gives nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not our user's business
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if doc := _doc(tree):
        yield Described(name=module, kind="module", signature="", doc=doc)
    yield from _members(tree, module, in_class=False)


def _members(parent: ast.Module | ast.ClassDef, prefix: str, *, in_class: bool) -> Iterator[Described]:
    for node in parent.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{node.name}", _doc(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield Described(name=name, kind="class", signature="", doc=doc)
            yield from _members(node, name, in_class=True)
        elif doc:
            kind = "method" if in_class else "function"
            yield Described(name=name, kind=kind, signature=f"({ast.unparse(node.args)})", doc=doc)


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(text).strip() if text else ""


def as_reference(entries: Iterable[Described]) -> str:
    """The entries as one page of reference text; empty if there are none."""
    return "\n\n".join(f"{entry.name}{entry.signature}\n\n{entry.doc}" for entry in entries)


def first_sentence(doc: str, *, min_chars: int = 15, max_chars: int = 160) -> str:
    """The first sentence of a docstring on one line, or "" if there is none of that length that reads as a sentence.

    >>> first_sentence("Return the sum.\\n\\nEmpty input gives zero.")
    'Return the sum.'
    """
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", doc.strip())]
    # C functions repeat their signature first.
    if len(paragraphs) > 1 and re.fullmatch(r"[\w.]+\(.*\)(?: *->.*)?", paragraphs[0]):
        paragraphs = paragraphs[1:]
    sentence = _SENTENCE_END.split(paragraphs[0], maxsplit=1)[0].strip()
    if not min_chars <= len(sentence) <= max_chars or not sentence[0].isalpha() or sentence.count(" ") < 2:
        return ""
    if (
        re.match(r"[\w.]+\(", sentence)
        or sentence[-1] in ":,;("
        or any(mark in sentence for mark in (">>>", "::", "@", " - ", "--", "->", " = "))
    ):
        return ""
    return sentence if sentence[-1] in ".!?" else f"{sentence}."
