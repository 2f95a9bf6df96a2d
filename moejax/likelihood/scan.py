"""Loops with a fixed budget, in which a finished lane no longer changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int


def frozen_scan(
    advance: Callable[[Any], tuple[Any, Any, jax.Array]], state: Any, num_steps: int
) -> tuple[Any, Any, Int[jax.Array, ""], Bool[jax.Array, ""]]:
    """Repeat `advance` until it is done, or for a fixed budget; a lane that is done freezes, while the others continue.

    Side by side (vmap), the loop ends when its last lane does.

    Args:
        advance: state -> (new state, floating values to record, () bool done).
        state: the start.
        num_steps: budget.

    Returns:
        The last state; (num_steps, ..) values, NaN once frozen; () int32 steps made; () bool done.
    """

    def unfinished(carry: Any) -> jax.Array:
        _, _, count, done = carry
        return (count < num_steps) & ~done

    def step(carry: Any) -> Any:
        state, history, count, _ = carry
        state, value, done = advance(state)
        history = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new, count, 0), history, value
        )
        return state, history, count + 1, done

    def unrecorded(leaf: Any) -> jax.Array:
        return jnp.full((num_steps, *leaf.shape), jnp.nan, leaf.dtype)

    history = jax.tree.map(unrecorded, jax.eval_shape(advance, state)[1])
    start = (state, history, jnp.asarray(0, jnp.int32), jnp.asarray(False))
    return jax.lax.while_loop(unfinished, step, start)
