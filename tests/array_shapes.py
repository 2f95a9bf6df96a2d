"""Checks of arrays against the shapes in signatures, for the import hook of jaxtyping (see conftest.py)."""

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_HAS_SHAPES = re.compile(r"\b(Bool|Float|Int)\[")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and results are checked where their annotation says a shape.

    Other annotations are the type checker's: beartype has no support for named tuples that are generic, as MoEParams is. Arguments
    that are functions of arrays are moejax's own to check.
    """
    function.__annotations__ = {
        name: hint
        for name, hint in function.__annotations__.items()
        if _HAS_SHAPES.search(str(hint)) and "Callable" not in str(hint)
    }
    return beartype(function)
