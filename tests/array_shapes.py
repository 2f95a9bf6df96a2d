"""Checks of arrays against the shapes in signatures, for the import hook of jaxtyping (see conftest.py)."""

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_HAS_SHAPES = re.compile(r"\b(Bool|Float|Int)\[")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and results are checked where their annotation says the shape of an array.

    Other annotations are the type checker's: beartype has no support for named tuples that are generic, as MoEParams is, and of a
    function it sees only that it can be called, which is for the function that takes it to refuse.
    """
    function.__annotations__ = {
        name: hint
        for name, hint in function.__annotations__.items()
        if _HAS_SHAPES.search(str(hint)) and "Callable[" not in str(hint)
    }
    return beartype(function)
