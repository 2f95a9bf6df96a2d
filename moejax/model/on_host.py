"""Numbers computed in double precision under any default of JAX, also while a program is being traced."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from moejax.environment import compiled_fast


def on_host(function: Callable[..., Any], static: Any, *arrays: np.ndarray | float) -> Any:
    """NumPy arrays of function(static, *arrays), in double precision and by one program.

    It is evaluated in a separate thread, because JAX keeps its tracing state by thread.

    >>> on_host(lambda power, x: x**power, 2, np.array([3.0])).tolist()
    [9.0]

    Args:
        function: traceable; its first argument is static.
        static: that argument, hashable.
        arrays: the others.
    """

    def evaluate() -> Any:
        with jax.enable_x64(True):
            program = jax.jit(function, static_argnums=0, compiler_options=compiled_fast())
            return jax.tree.map(np.asarray, program(static, *(np.asarray(a, np.float64) for a in arrays)))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(evaluate).result()
