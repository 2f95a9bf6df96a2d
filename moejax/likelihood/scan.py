"""Scans with a budget, in which a finished lane no longer changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

SEGMENT = 4
"""Steps of one scan: whether all lanes are done is asked between two scans."""


def frozen_scan(
    advance: Callable[[Any], tuple[Any, Any, jax.Array]], state: Any, num_steps: int
) -> tuple[Any, Any, Int[jax.Array, ""], Bool[jax.Array, ""]]:
    """Scan `advance` for a budget of steps; a lane that is done freezes, while the others continue.

    The budget is scanned in segments, and ends with the segment in which the last lane is done: side by side (vmap), every lane
    computes each step of a segment, also a frozen one, whose result is dropped.

    Args:
        advance: state -> (new state, floating values to record, () bool done).
        state: the start.
        num_steps: budget.

    Returns:
        The last state; (num_steps, ..) values, NaN once frozen; () int32 steps made; () bool done.
    """
    value_like = jax.eval_shape(advance, state)[1]

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        def go(carry: Any) -> tuple[Any, Any]:
            state, _, count = carry
            state, value, done = advance(state)
            return (state, done, count + 1), value

        def stay(carry: Any) -> tuple[Any, Any]:
            return carry, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), value_like)

        _, done, count = carry
        return jax.lax.cond(done | (count >= num_steps), stay, go, carry)

    def unfinished(loop: tuple[Any, Any, jax.Array]) -> jax.Array:
        (_, done, _), _, segment = loop
        return ~done & (segment * SEGMENT < num_steps)

    def scan_segment(loop: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
        carry, history, segment = loop
        carry, values = jax.lax.scan(step, carry, length=SEGMENT)
        history = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, segment * SEGMENT, 0),
            history,
            values,
        )
        return carry, history, segment + 1

    budget = -(-num_steps // SEGMENT) * SEGMENT
    history = jax.tree.map(lambda leaf: jnp.full((budget, *leaf.shape), jnp.nan, leaf.dtype), value_like)
    zero = jnp.asarray(0, jnp.int32)
    start = ((state, jnp.asarray(False), zero), history, zero)
    (state, done, count), history, _ = jax.lax.while_loop(unfinished, scan_segment, start)
    return state, jax.tree.map(lambda leaf: leaf[:num_steps], history), count, done
