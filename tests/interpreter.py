"""Makes Triton's CPU interpreter accept loops with bounds from tensors. Import it where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope) -> None:
    """A loop bound is an array of one element, which NumPy 2.4 no longer turns into an int by itself."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
