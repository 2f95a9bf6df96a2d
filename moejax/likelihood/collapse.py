"""Experts whose noise ran off to zero, where the likelihood of a mixture has no maximum."""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model.gaussian import AnyArray

ROUNDING = 4.0
"""Noise below this many machine epsilons of the largest label is the rounding of the labels, or of the computation."""


@overload
def is_collapsed(
    noise_std: jax.Array,
    counts: jax.Array,
    *,
    num_coefficients: int,
    label_rounding: jax.Array | float,
    per_expert: bool,
) -> jax.Array: ...
@overload
def is_collapsed(
    noise_std: np.ndarray,
    counts: np.ndarray,
    *,
    num_coefficients: int,
    label_rounding: float,
    per_expert: bool,
) -> np.ndarray: ...
def is_collapsed(
    noise_std: AnyArray,
    counts: AnyArray,
    *,
    num_coefficients: int,
    label_rounding: jax.Array | float,
    per_expert: bool,
) -> Any:
    """(k,) bool: which experts fit their rows exactly, so that the likelihood grows without bound as their noise falls.

    An expert with a noise of its own has collapsed if it has no more effective rows than coefficients: it goes through them,
    whatever they are. Any expert has if its noise is no more than the rounding of the labels. How small the noise is beside the
    labels' spread says nothing: precise data have small noise.

    Args:
        noise_std: (k,), or (k, m).
        counts: (k,) effective rows, sums of responsibilities.
        num_coefficients: D of each expert.
        label_rounding: () of the labels, as `label_rounding` has it.
        per_expert: whether every expert has a noise of its own.
    """
    at_rounding = noise_std <= ROUNDING * label_rounding
    if noise_std.ndim == 2:
        at_rounding = at_rounding.any(axis=1)
    return at_rounding | (counts <= num_coefficients + 0.5) if per_expert else at_rounding


def label_rounding(y: Float[jax.Array, " n *m"], weights: Float[jax.Array, " n"]) -> Float[jax.Array, ""]:
    """(): the rounding of the largest label (n,), or (n, m), that has weight, in its own unit."""
    used = weights > 0 if y.ndim == 1 else (weights > 0)[:, None]
    return jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(y), where=used, initial=0.0)


def label_rounding_on_host(
    y: Float[np.ndarray, " n *m"],
    fitted: Float[np.ndarray, " n *m"],
    scale: Float[np.ndarray, " *m"] | float,
    dtype: np.dtype,
) -> float:
    """The rounding of the fitted labels, and of the given ones, in the fitted labels' unit.

    Args:
        y: (n,), or (n, m), as they were given, in double precision, those with weight only.
        fitted: the same in the unit of the fit.
        scale: () or (m,), that unit.
        dtype: of the computation.
    """
    given = float(np.max(np.finfo(float).eps * np.abs(y).max(axis=0) / scale))
    return max(given, float(np.finfo(dtype).eps) * float(np.abs(fitted).max()))
