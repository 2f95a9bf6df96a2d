"""Detection of experts whose noise goes to zero, where the likelihood of a mixture is unbounded."""

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
    """(k,) bool: true for experts that fit their rows exactly, so that the likelihood grows without bound as their noise falls.

    An expert with its own noise has collapsed if it has no more effective rows than coefficients: it can interpolate any such
    rows. Any expert has collapsed if its noise is at most the rounding of the labels. The noise relative to the
    labels' spread is no criterion: precise data have small noise.

    Args:
        noise_std: (k,), or (k, m).
        counts: (k,) effective rows, sums of responsibilities.
        num_coefficients: D, the coefficients of each expert.
        label_rounding: () rounding of the labels, from `label_rounding`.
        per_expert: true if every expert has its own noise.
    """
    at_rounding = noise_std <= ROUNDING * label_rounding
    if noise_std.ndim == 2:
        at_rounding = at_rounding.any(axis=1)
    return at_rounding | (counts <= num_coefficients + 0.5) if per_expert else at_rounding


def label_rounding(y: Float[jax.Array, " n *m"], weights: Float[jax.Array, " n"]) -> Float[jax.Array, ""]:
    """(): the rounding of the largest label with weight, in its own unit; labels are (n,), or (n, m)."""
    used = weights > 0 if y.ndim == 1 else (weights > 0)[:, None]
    return jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(y), where=used, initial=0.0)


def label_rounding_on_host(
    y: Float[np.ndarray, " n *m"],
    fitted: Float[np.ndarray, " n *m"],
    scale: Float[np.ndarray, " *m"] | float,
    dtype: np.dtype,
) -> float:
    """The rounding of the labels in the unit of the fit: that of the given or of the fitted labels, whichever is larger.

    Args:
        y: (n,), or (n, m): the given labels with weight, in double precision.
        fitted: the same labels in the unit of the fit.
        scale: () or (m,): that unit.
        dtype: floating dtype of the computation.
    """
    given = float(np.max(np.finfo(float).eps * np.abs(y).max(axis=0) / scale))
    return max(given, float(np.finfo(dtype).eps) * float(np.abs(fitted).max()))
