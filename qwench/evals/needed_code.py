"""What of a model's Python text a function needs: imports, and the definitions that it uses, directly or not.

EvalPlus cleans answers in this way (`evalplus.sanitize`) before they are scored: text around the code, calls and
assertions that the model added are no part of its solution. Nothing is run here.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings


def needed_code(text: str, entry_point: str) -> str:
    """The longest run of lines that is Python, without what `entry_point` does not need.

    All of that run where it does not define `entry_point`, or nothing would be left of it; of several definitions of
    a name the first counts, and functions that return nothing count as none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that a model wrote in its strings
        return _needed(_longest_python(text.replace("\r\n", "\n").replace("\r", "\n")), entry_point)


def function_body(text: str, name: str) -> str:
    """What stands below the head of a function: of `name` in a fenced block, of `name` anywhere, of the first there is;
    a text without any is taken for a body and indented. [Qwen's evaluation scripts]"""
    indented = r"(.*?)(?=\n(?!\n*(?:  |\t))|$)"
    for pattern in (
        rf"```.*?def\s+{re.escape(name)}.*?:\n(.*?)\n```",
        rf"def\s+{re.escape(name)}.*?:\n{indented}",
        rf"def.*?:\n{indented}",
    ):
        if found := re.search(pattern, text, re.DOTALL):
            return found[1]
    return textwrap.indent(text, " " * 4)


def _needed(code: str, entry_point: str) -> str:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined: dict[str, ast.stmt] = {}
    for node in body:
        if name := _defined_name(node):
            defined.setdefault(name, node)
    if entry_point not in defined and entry_point not in {getattr(node, "name", "") for node in body}:
        return code
    reached, todo = {entry_point}, [entry_point]
    while todo:
        node = defined.get(todo.pop())
        names = _names(node) - reached if node is not None else set()
        reached |= names
        todo += names
    kept = [node for name, node in defined.items() if name in reached]
    lines = code.split("\n")
    return "\n".join(_text(lines, node) for node in [*imports, *kept]) or code


def _longest_python(text: str) -> str:
    """The run of at least two lines with the most that are not blank; the first line where there is none."""
    if _is_python(text):
        return text
    lines = text.split("\n")
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    best, most = (0, 1), 0
    for start in range(len(lines) - 1):
        end = len(lines)
        while end >= start + 2 and filled[end] - filled[start] > most:
            wrong = _wrong_line("\n".join(lines[start:end]))
            if not wrong:
                best, most = (start, end), filled[end] - filled[start]
            end = min(end - 1, start + wrong - 1) if wrong else start
    return "\n".join(lines[best[0] : best[1]])


def _wrong_line(text: str) -> int:
    """The line, from 1, that no Python begins with the lines before can have; 0 where all of it is Python."""
    try:
        ast.parse(text)
    except SyntaxError as error:
        return error.lineno or text.count("\n") + 1
    except (ValueError, RecursionError, MemoryError):
        return text.count("\n") + 1
    return 0


def _is_python(text: str) -> bool:
    return not _wrong_line(text)


def _defined_name(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name if any(isinstance(inner, ast.Return) for inner in ast.walk(node)) else ""
    target = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return target.id if isinstance(target, ast.Name) else ""


def _names(node: ast.stmt) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} | {
        inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)
    }


def _text(lines: list[str], node: ast.stmt) -> str:
    decorators = node.decorator_list if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(lines[first - 1 : node.end_lineno])
