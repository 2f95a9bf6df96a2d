"""Sums over samples whose rows lie on several devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = "rows"
"""The axis of the mesh along which the rows are cut."""


def sum_over_devices(sums_of: Callable[..., Any], devices: Sequence[Any]) -> Callable[..., Any]:
    """A compiled function (shared, x, y, weights) -> the sum over all rows of `sums_of(shared, x, y, weights)`, a pytree.

    Each device sums its equal part of the rows, and one `psum` adds the parts: the result is the same on all of them.

    Args:
        sums_of: additive over rows; x (n, d), y (n,) or (n, m), weights (n,).
        devices: the devices that take part; n is a multiple of their number.
    """
    if len(devices) == 1:
        return jax.jit(sums_of)
    whole, rows = PartitionSpec(), PartitionSpec(ROWS)

    def of_device(shared: Any, x: jax.Array, y: jax.Array, weights: jax.Array) -> Any:
        return jax.lax.psum(sums_of(shared, x, y, weights), ROWS)

    mesh = Mesh(np.asarray(devices), (ROWS,))
    over_all = jax.shard_map(
        of_device, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=whole, check_vma=False
    )
    return jax.jit(over_all)


def placement_of_rows(devices: Sequence[Any]) -> Any:
    """The placement for `jax.device_put` of arrays (n, ..), with an equal part of the rows on each device."""
    if len(devices) == 1:
        return devices[0]
    return NamedSharding(Mesh(np.asarray(devices), (ROWS,)), PartitionSpec(ROWS))
