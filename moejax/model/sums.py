"""Sums over samples, in parts that fit in a cache or in a device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.environment import runs_on_cpu


def in_parts(arrays: Any, part_size: int | None) -> Any:
    """Leaves (b, part_size, ..) from leaves (n, ..); the last part is filled up with zeros. None, or n and more: one part of n."""
    num_rows = jax.tree.leaves(arrays)[0].shape[0]
    part_size = max(num_rows if part_size is None else min(part_size, num_rows), 1)
    num_parts = -(-num_rows // part_size)

    def cut(array: Float[jax.Array, "n ..."]) -> Float[jax.Array, "b part ..."]:
        padding = [(0, num_parts * part_size - num_rows)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(num_parts, part_size, *array.shape[1:])

    return jax.tree.map(cut, arrays)


def sum_over_parts(
    sums_of: Callable[..., Any], parts: tuple[Any, ...], num_used: Int[jax.Array, ""] | int | None = None
) -> Any:
    """The sum of `sums_of(*part)`, a pytree, over the first `num_used` parts: the leading axis of all leaves; None for all.

    `in_parts` makes the parts; a part that is None is passed on. The zeros that fill the last part must add nothing, so one of the
    arrays should be the samples' weights.
    """
    num_parts = jax.tree.leaves(parts)[0].shape[0]

    def of_part(index: jax.Array | int) -> Any:
        return sums_of(*jax.tree.map(lambda leaf: leaf[index], parts))

    return of_part(0) if num_parts == 1 else _added(of_part, num_parts if num_used is None else num_used)


def _added(of_part: Callable[[jax.Array | int], Any], num_parts: Int[jax.Array, ""] | int) -> Any:
    """The sum of a pytree over the first parts, one after another."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_part, 0))
    return jax.lax.fori_loop(
        0, num_parts, lambda index, total: jax.tree.map(jnp.add, total, of_part(index)), zeros
    )


PART_SIZE = 2048
"""Samples in a part on a CPU: pairs of 10 inputs and two dozen coefficients of them fill its second-level cache."""


def natural_part_size(num_samples: int) -> int:
    """Samples in a part: PART_SIZE on a CPU, all elsewhere, where each part costs a kernel launch."""
    return min(PART_SIZE, num_samples) if runs_on_cpu() else num_samples


def num_used_parts(weights: Float[jax.Array, "b part"]) -> Int[jax.Array, ""]:
    """() int32: parts up to the last that has a positive weight, from weights (b, part)."""
    in_part = (weights > 0).any(axis=1)
    return jnp.max(jnp.where(in_part, jnp.arange(1, in_part.size + 1, dtype=jnp.int32), 0))


def sum_over_rows(sums_of: Callable[..., Any], arrays: tuple[jax.Array, ...], part_size: int) -> Any:
    """The sum of `sums_of(*rows)`, a pytree, over consecutive parts of the leading axis; the last part may be shorter.

    Unlike `in_parts`, it copies one part at a time and never the arrays.

    Args:
        sums_of: maps arrays (part, ..) to a pytree of sums.
        arrays: each (n, ..).
        part_size: rows in a part.
    """
    num_rows = arrays[0].shape[0]
    part_size = max(min(part_size, num_rows), 1)
    num_parts = num_rows // part_size

    def of_part(index: jax.Array | int) -> Any:
        return sums_of(
            *(jax.lax.dynamic_slice_in_dim(array, index * part_size, part_size) for array in arrays)
        )

    total = of_part(0) if num_parts == 1 else _added(of_part, num_parts)
    if num_parts * part_size == num_rows:
        return total
    rest = sums_of(*(array[num_parts * part_size :] for array in arrays))
    return jax.tree.map(jnp.add, total, rest)
