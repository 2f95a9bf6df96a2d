"""Names for functions: activations, input distributions, methods and metrics are each one `Registry`.

A name may be given another value, for example when a notebook's cell runs again. `registered_state` tells which value every name
has; caches by name have it in their keys. A built-in name is given another value only on request (`replace`).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from moejax.checks import brief, brief_text

MOST_NAMED = 32
"""Names that a hint lists at most."""
Value = TypeVar("Value")
State = tuple[tuple[str, str, int], ...]
"""(kind, name, index of its value) of every name that does not have its first value."""

_registries: list[Registry] = []
_recorders: list[list[Callable[[], None]]] = []


class Registry(Generic[Value]):
    """Values by name, in the order of their registration.

    Args:
        kind: what a name stands for; messages begin with it.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._values: dict[str, Value] = {}
        self._ever: dict[str, list[Value]] = {}
        """All values that a name has had. An index into them tells two functions apart; an address could be reused."""
        self._built_in: frozenset[str] = frozenset()
        _registries.append(self)

    def register(self, name: str, value: Value, replace: bool = False) -> None:
        """Give a name a value.

        Args:
            name: an identifier.
            value: the value that the name stands for.
            replace: if true, a built-in name may be given another value.

        Raises:
            ValueError: the name is no identifier, or it is built in and `replace` is false.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{self.kind}: expected an identifier for a name, got {brief(name)}")
        if name in self._built_in and not replace and self._values[name] != value:
            raise ValueError(
                f"{self.kind}: {name!r} is built in; take another name, or give replace=True to have it stand for something else"
            )
        self._assign(name, value)
        for recorder in _recorders:
            recorder.append(lambda: self._assign(name, value))

    def _assign(self, name: str, value: Value) -> None:
        ever = self._ever.setdefault(name, [])
        if value not in ever:
            ever.append(value)
        self._values[name] = value
        registered_state.cache_clear()

    def lookup(self, name: object) -> Value:
        """The value of a name.

        Raises:
            ValueError: it is not registered; the message ends with the hint of `nearest`.
        """
        if isinstance(name, str) and name in self._values:
            return self._values[name]
        raise ValueError(f"{self.kind}: unknown name {brief(name)}; {nearest(name, self._values)}")

    def names(self) -> tuple[str, ...]:
        """The registered names."""
        return tuple(self._values)

    def items(self) -> tuple[tuple[str, Value], ...]:
        """The registered names and their values."""
        return tuple(self._values.items())

    def changed(self) -> State:
        """The names that do not have their first value."""
        which = {name: self._ever[name].index(value) for name, value in self._values.items()}
        return tuple((self.kind, name, index) for name, index in sorted(which.items()) if index)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def close(self) -> None:
        """Mark all names registered so far as built in."""
        self._built_in = frozenset(self._values)


def take_for_built_in() -> None:
    """Mark every name registered so far, in all registries, as built in."""
    for registry in _registries:
        registry.close()


@functools.cache
def registered_state() -> State:
    """Names that no longer have their first value: part of the key of every cache by name.

    >>> from moejax.registry import registered_state
    >>> registered_state()
    ()
    """
    return tuple(entry for registry in _registries for entry in registry.changed())


@contextmanager
def recorded_registrations() -> Iterator[list[Callable[[], None]]]:
    """Record the registrations made in the block: calling the entries of the list in order repeats them."""
    record: list[Callable[[], None]] = []
    _recorders.append(record)
    try:
        yield record
    finally:
        _recorders.remove(record)


@contextmanager
def registrations_undone() -> Iterator[None]:
    """Undo, at the end of the block, the registrations made in it."""
    before = [(registry, registry.items()) for registry in _registries]
    try:
        yield
    finally:
        for registry, values in before:
            registry._values = dict(values)
        registered_state.cache_clear()


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known names, or the known ones if none is near; of many, the first.

    >>> nearest("rellu", ["linear", "relu"]), nearest(3, ["linear", "relu"])
    ('did you mean relu?', 'known: linear, relu')
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) if isinstance(name, str) else []
    if near:
        return f"did you mean {' or '.join(map(brief_text, near))}?"
    more = f", .. ({len(known)} in all)" if len(known) > MOST_NAMED else ""
    return f"known: {', '.join(map(brief_text, known[:MOST_NAMED]))}{more}"
