"""Scans with a fixed budget, in which a finished lane no longer changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int


def frozen_scan(
    advance: Callable[[Any], tuple[Any, Any, jax.Array]], state: Any, num_steps: int
) -> tuple[Any, Any, Int[jax.Array, ""], Bool[jax.Array, ""]]:
    """Scan `advance` for a fixed budget; a lane that is done freezes, while the others continue.

    Args:
        advance: state -> (new state, floating values to record, () bool done).
        state: the start.
        num_steps: budget.

    Returns:
        The last state; (num_steps, ..) values, NaN once frozen; () int32 steps made; () bool done.
    """

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        def go(carry: Any) -> tuple[Any, Any]:
            state, _, count = carry
            state, value, done = advance(state)
            return (state, done, count + 1), value

        def stay(carry: Any) -> tuple[Any, Any]:
            return carry, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), value_like)

        return jax.lax.cond(carry[1], stay, go, carry)

    value_like = jax.eval_shape(advance, state)[1]
    start = (state, jnp.asarray(False), jnp.asarray(0, jnp.int32))
    (state, done, count), history = jax.lax.scan(body, start, length=num_steps)
    return state, history, count, done
