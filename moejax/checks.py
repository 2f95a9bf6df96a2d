"""One way to refuse a bad value: `name: expected .., got ..`, in one line of bounded length."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST_REPR = 160
"""Characters of a value that a message shows at most."""
_SHOWN_ENTRIES = 6
"""An array of more entries is shown by its shape."""


class NoResultError(RuntimeError):
    """No trial of a sweep has a result: the cause is then more likely the environment or the program than the trials."""


def require(good: bool, name: str, expected: str, got: object) -> None:
    """Refuse a value unless `good`.

    Args:
        good: true if the value is accepted.
        name: the argument, option or field that the user gave.
        expected: the accepted values, in words.
        got: the value; `brief` shows it.

    Raises:
        ValueError: `good` is false.
    """
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {brief(got)}")


def brief(value: object) -> str:
    r"""A value in one line of at most LONGEST_REPR characters; a large array is its type and shape.

    >>> brief([1] * 1000), brief(10**5000), brief("a\nb")
    ('[1, 1, 1, 1, 1, 1, ...]', 'an integer of 16610 bits', "'a\\nb'")
    """
    return _cut(_REPR.repr(value))


def brief_text(value: object) -> str:
    """Text of a value (e.g. an exception) in one line of at most LONGEST_REPR characters; its type if the text is empty."""
    return _cut(str(value)) or type(value).__name__


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REPR else line[: LONGEST_REPR - 4] + " ..."


class _BoundedRepr(reprlib.Repr):
    """Shows containers by their first entries, strings and integers in part, arrays of every library by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxarray = _SHOWN_ENTRIES
        self.maxstring = self.maxother = self.maxlong = LONGEST_REPR
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to write out the longest integers
            return f"an integer of {x.bit_length()} bits"
        return repr(x)

    def repr_instance(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple):
            return super().repr_instance(x, level)
        try:
            if len(shape) == 0:
                return self.repr1(x.item(), level)
            if x.size <= _SHOWN_ENTRIES and hasattr(x, "tolist"):
                return self.repr1(x.tolist(), level)
        except Exception:  # not an array of numbers: its shape is enough
            return f"{type(x).__name__} of shape {shape}"
        return f"{type(x).__name__} of shape {shape}"


_REPR = _BoundedRepr()


def describe(error: BaseException) -> str:
    """Type and message of an error, on one line of reasonable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
