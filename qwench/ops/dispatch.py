"""Which implementation of an operation runs: chosen once per operation and device, logged, and open to be forced.

An operation is a function with a documented contract; an implementation is a function of the same signature plus a
predicate that says whether it runs on a device. The list of an operation is ordered from the most to the least
wanted, and its last entry is the reference, which supports everything.

    ATTENTION = Operation("attention", [Implementation("sdpa", _sdpa, ...), Implementation("reference", _reference)])
    ATTENTION.choose(device)(q, k, v, meta)

A choice can be forced for a block of code (`with forced({"attention": "reference"}): ...`), which is what the recipe
key `ops.attention=reference` does for a whole run.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch

log = logging.getLogger("qwench.ops")
P = ParamSpec("P")
R = TypeVar("R")

_NOTHING: Mapping[str, str] = MappingProxyType({})
_INVARIANT: ContextVar[bool] = ContextVar("batch_invariant", default=False)
_FORCED: ContextVar[Mapping[str, str]] = ContextVar("forced_implementations", default=_NOTHING)
OPERATIONS: dict[str, Operation] = {}


@dataclass(frozen=True, slots=True)
class Implementation:
    name: str
    run: Callable[..., Any]
    supports: Callable[[torch.device], bool] = lambda device: True
    """Whether this machine and device can run it at all."""


@dataclass(slots=True)
class Operation:
    name: str
    implementations: Sequence[Implementation]
    when_compiled: Callable[..., Any] | None = None
    """What `torch.compile` traces; None: the reference, which it fuses better than it could call kernels."""
    _chosen: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    def available(self, device: torch.device) -> list[Implementation]:
        return [impl for impl in self.implementations if impl.supports(device)]

    def choose(self, device: torch.device) -> Callable[..., Any]:
        """The forced implementation, else the first that supports `device` (remembered per device type)."""
        if torch.compiler.is_compiling():  # train.compile refuses forced ones
            return self.when_compiled or self.implementations[-1].run
        if name := _FORCED.get().get(self.name):
            return self.named(name, device).run
        if device.type not in self._chosen:
            self._chosen[device.type] = self.available(device)[0]
            log.info("ops.%s on %s: %s", self.name, device.type, self._chosen[device.type].name)
        return self._chosen[device.type].run

    def named(self, name: str, device: torch.device) -> Implementation:
        for impl in self.available(device):
            if impl.name == name:
                return impl
        known = ", ".join(impl.name for impl in self.available(device))
        raise ValueError(f"ops.{self.name}={name} cannot run on {device.type} here; choose one of: {known}")


@contextlib.contextmanager
def forced(choices: Mapping[str, str]) -> Iterator[None]:
    """Force implementations by operation name within the block.

    Raises ValueError for an operation that does not exist.
    """
    for name in choices:
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation ops.{name}; there are: {', '.join(sorted(OPERATIONS))}")
    token = _FORCED.set({**_FORCED.get(), **choices})
    try:
        yield
    finally:
        _FORCED.reset(token)


def bound(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with the choices that are forced now, whenever and in whatever thread it is called.

    A thread begins without forced choices, also autograd's, in which everything of a GPU's backward pass runs.
    """
    return functools.partial(contextvars.copy_context().run, function)


@contextlib.contextmanager
def batch_invariant_kernels() -> Iterator[None]:
    """Within the block, kernels whose result for a sequence depends on nothing but that sequence. GPU only, slower."""
    token = _INVARIANT.set(True)
    try:
        with forced({"linear": "invariant"}):
            yield
    finally:
        _INVARIANT.reset(token)


def forced_choices() -> Mapping[str, str]:
    return _FORCED.get()


def batch_invariant() -> bool:
    return _INVARIANT.get()


def chosen(device: torch.device) -> dict[str, str]:
    """Operation -> name of the implementation that would run on `device`: what a run records."""
    picks = _FORCED.get()
    return {name: picks.get(name) or op.available(device)[0].name for name, op in sorted(OPERATIONS.items())}
