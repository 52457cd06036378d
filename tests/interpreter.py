"""Makes Triton's CPU interpreter accept loops with bounds from tensors, and twice as fast. Import it where
TRITON_INTERPRET=1 is set (tests/conftest.py does)."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter

# A loop bound is an array of one element, which NumPy 2.4 no longer turns into an int by itself.
_patch_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

# A launch replaces the functions of the language by interpreted ones. Triton 3.6 looks for them anew in every launch,
# and again in every call of a function by a kernel, where the first time has left nothing to replace.
_patch_language, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_replacements: dict[Any, list[tuple[str, Any]]] = {}
_patched: set[str] = set()
"""The modules of the language that have been patched in the launch that is running."""


class _Recorder:
    def __init__(self) -> None:
        self.changes: list[tuple[str, Any]] = []

    def set_attr(self, obj: object, name: str, value: object) -> None:
        self.changes.append((name, value))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    if package not in _replacements:
        recorder = _Recorder()
        _find_builtins(package, builder, recorder)  # pyright: ignore[reportArgumentType]
        _replacements[package] = recorder.changes
    for name, value in _replacements[package]:
        scope.set_attr(package, name, value)


def _patch_once(function: Any) -> Any:
    found = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
    found &= {"triton.language", "triton.language.core"}
    if found and found <= _patched:
        return interpreter._LangPatchScope()
    _patched.update(found)
    return _patch_language(function)


def _launch_afresh(self: Any, *arguments: Any, **named: Any) -> None:
    _patched.clear()
    try:
        _launch(self, *arguments, **named)
    finally:
        _patched.clear()


_find_builtins = interpreter._patch_builtin
interpreter._patch_builtin = _patch_builtin
interpreter._patch_lang = _patch_once
interpreter.GridExecutor.__call__ = _launch_afresh
