"""Grammars in an engine of several ranks: rank 0 runs them, the others are told each outcome.

Whether a grammar becomes too expensive is decided by a clock, so only one rank may decide it. All ranks ask their
matchers the same questions in the same order; rank 0's `LedMatcher` answers them and sends the answer, the others'
`HeardMatcher` waits for it. Both have the methods of `grammar.Matcher` that steps use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from qwench.engine.grammar import Matcher

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one call: what it returned, or the text of the ValueError that it raised."""

    value: Any = None
    error: str | None = None


class LedMatcher:
    """Rank 0's: a matcher whose outcomes go to `tell`."""

    def __init__(self, matcher: Matcher, tell: Callable[[Outcome], None]) -> None:
        self._matcher, self._tell = matcher, tell

    @property
    def is_finished(self) -> bool:
        return self._told(lambda: self._matcher.is_finished)

    def fill_mask(self, row: np.ndarray) -> None:
        def fill() -> bytes:
            self._matcher.fill_mask(row)
            return row.tobytes()

        self._told(fill)

    def consume(self, token_id: int) -> None:
        self._told(lambda: self._matcher.consume(token_id))

    def rollback(self, num_tokens: int) -> None:
        self._told(lambda: self._matcher.rollback(num_tokens))

    def copy(self) -> LedMatcher:
        return LedMatcher(self._matcher.copy(), self._tell)

    def _told(self, call: Callable[[], T]) -> T:
        try:
            value = call()
        except ValueError as error:
            self._tell(Outcome(error=str(error)))
            raise
        self._tell(Outcome(value))
        return value


class HeardMatcher:
    """The other ranks': `hear` waits for rank 0's next outcome."""

    def __init__(self, hear: Callable[[], Outcome]) -> None:
        self._hear = hear

    @property
    def is_finished(self) -> bool:
        return self._heard()

    def fill_mask(self, row: np.ndarray) -> None:
        row[:] = np.frombuffer(self._heard(), row.dtype)

    def consume(self, token_id: int) -> None:
        self._heard()

    def rollback(self, num_tokens: int) -> None:
        self._heard()

    def copy(self) -> HeardMatcher:
        return self

    def _heard(self) -> Any:
        outcome = self._hear()
        if outcome.error is not None:
            raise ValueError(outcome.error)
        return outcome.value
