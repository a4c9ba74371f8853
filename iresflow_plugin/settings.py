"""Settings that hold for a while, and only for who asked: `with using(...)` in one thread or task changes no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import nn


@dataclass
class Override:
    """What some modules use instead of their own settings; a name that is missing stays as it is."""

    modules: frozenset[int]
    settings: dict[str, Any]
    over: bool = False  # the end may come in another thread or task, as that of a generator


_overrides: ContextVar[tuple[Override, ...]] = ContextVar("overrides", default=())
_lock = Lock()
_active = 0  # how many are entered anywhere: without one there is nothing to look up, and compiled code need not try


def chosen(module: nn.Module, name: str, own: Any) -> Any:
    """The innermost setting of this name for the module, or its own."""
    if not _active:
        return own
    for override in reversed(_overrides.get()):
        if not override.over and id(module) in override.modules and name in override.settings:
            return override.settings[name]
    return own


@contextmanager
def overriding(modules: list[nn.Module], settings: dict[str, Any]) -> Iterator[None]:
    """Within the context, in this thread or task alone, the modules use these settings."""
    override = Override(frozenset(map(id, modules)), settings)
    _count(1)
    _overrides.set((*_overrides.get(), override))
    try:
        yield
    finally:
        override.over = True
        _overrides.set(tuple(o for o in _overrides.get() if not o.over))
        _count(-1)


def _count(change: int) -> None:
    global _active
    with _lock:
        _active += change
