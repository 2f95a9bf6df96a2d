"""Methods in stages, between which the host decides whether the next one is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
from jax.core import Tracer

from moejax.environment import compiled_fast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def stage(
    *, static: Sequence[str], fast: bool
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """A decorator: the function is a compiled program of its own, but a part of the caller's if that is being traced.

    Args:
        static: names of the static arguments, which are given by name.
        fast: compile fast (`compiled_fast`), for a stage that takes less time than its compilation.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.cache  # on first use, when XLA_FLAGS are final
        def program() -> Callable[Parameters, Result]:
            options = compiled_fast() if fast else None
            return jax.jit(function, static_argnames=tuple(static), compiler_options=options)

        @functools.wraps(function)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
            return (function if traced else program())(*args, **kwargs)

        return run

    return decorate
