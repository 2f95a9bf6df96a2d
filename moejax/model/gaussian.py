"""One-dimensional Gaussian integrals that survive kinks, and Hermite polynomials.

All numbers in a label transform are expectations over one standard normal variable. They come from the trapezoidal rule on
a uniform grid: for smooth integrands it converges faster than any power of the spacing
(the weight and all its derivatives vanish at the ends), and a kink costs only O(spacing^2), where Gauss-Hermite
rules of a practical size fail altogether.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Generic, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from typing_extensions import TypeVar

Array = TypeVar("Array", jax.Array, np.ndarray, default=jax.Array)
"""The array type of functions that run in JAX and on the host: a jax.Array or a numpy.ndarray."""
AnyArray = jax.Array | np.ndarray
"""An array that a function accepts in either type and converts."""

HALF_WIDTH = 8.5
"""The grids span +-8.5 standard deviations; the mass outside is 2e-17."""


class GaussianGrid(NamedTuple, Generic[Array]):
    """Nodes and weights with sum_j weights[j] f(nodes[j]) = E[f(Z)], Z ~ N(0, 1)."""

    nodes: Float[Array, " m"]
    """(m,) increasing, symmetric about 0."""
    weights: Float[Array, " m"]
    """(m,) non-negative, summing to 1."""


@overload
def gaussian_grid(
    num_nodes: int, half_width: float = HALF_WIDTH, dtype: np.dtype | None = None
) -> GaussianGrid: ...
@overload
def gaussian_grid(
    num_nodes: int, half_width: float = HALF_WIDTH, dtype: np.dtype | None = None, *, xp: ModuleType
) -> GaussianGrid[Any]: ...
def gaussian_grid(
    num_nodes: int, half_width: float = HALF_WIDTH, dtype: np.dtype | None = None, xp: ModuleType = jnp
) -> GaussianGrid[Any]:
    """The trapezoidal rule for expectations over a standard normal variable.

    Args:
        num_nodes: number of nodes; odd, so that 0 (where most activations have their kink) is a node.
        half_width: the grid covers [-half_width, half_width].
        dtype: floating dtype; None takes the default.
        xp: jax.numpy, or numpy for tables made on the host.
    """
    if num_nodes % 2 == 0:
        raise ValueError(f"num_nodes: expected an odd number, got {num_nodes}")
    nodes = xp.linspace(-half_width, half_width, num_nodes, dtype=dtype)
    density = xp.exp(-0.5 * nodes**2)
    return GaussianGrid(nodes, density / density.sum())


def hermite_polynomials(
    z: Float[Array, "*points"], max_order: int, xp: ModuleType = jnp
) -> Float[Array, " {max_order}+1 *points"]:
    """Probabilists' Hermite polynomials He_0 .. He_max_order at z: He_{m+1}(z) = z He_m(z) - m He_{m-1}(z).

    Args:
        z: (...) points.
        max_order: the last order.
        xp: `jax.numpy` or `numpy`.

    Returns:
        (max_order + 1, ...) with entry m equal to He_m(z); E[He_m(Z)^2] = m!.
    """
    values = [xp.ones_like(z), z]
    for m in range(1, max_order):
        values.append(z * values[m] - m * values[m - 1])
    return xp.stack(values[: max_order + 1])


def standard_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[jax.Array, " ..."]:
    """Independent standard normal numbers, the same as `jax.random.normal` draws.

    They are drawn as a flat array: with a short last axis, compilation on a CPU takes ten times as long and the draw four times.
    """
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
