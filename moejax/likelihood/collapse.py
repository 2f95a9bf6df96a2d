r"""The least noise of an expert, where the likelihood of a mixture is unbounded, and detection of experts that end there.

If every expert has its own noise, an expert that goes through some rows exactly raises the likelihood without bound as its noise
falls (Kiefer and Wolfowitz 1956). So the noise of an expert is bounded below by

    noise_floor = max(least noise, sqrt(mean_i sigma_i^2) / n).

The least noise is the resolution of the labels: their rounding in the machine or, if they are multiples of a step,
step / sqrt(2 pi), with which the density of a label is at most 1 / step. The second term bounds the ratio of the noises, as
Hathaway (1985) does: an expert that goes through c rows by chance gains at most c log n nats by its noise, and loses about
c log(n / c) because its gate must pick these rows. So it gains about c log c, less than BIC charges for its parameters. The floor
is no penalty: an estimate whose noises are all above it is the maximum-likelihood estimate.

Sources: J. Kiefer and J. Wolfowitz, Annals of Mathematical Statistics 27, 1956; R. J. Hathaway, A constrained formulation of
maximum-likelihood estimation for normal mixture distributions, Annals of Statistics 13, 1985.
"""

from __future__ import annotations

import math
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from moejax.model.gaussian import AnyArray

ROUNDING = 4.0
"""Noise below this many machine epsilons of the largest label is the rounding of the labels, or of the computation."""
EXACT = 32.0
"""The least noise of an expert with its own is this many machine epsilons of the largest label: so many that the rounding of
residuals is small beside it."""
FEWEST_ROWS = 5.0
"""An expert whose noise is at the floor has collapsed if it has fewer effective rows than this many times its coefficients; with
more, it describes labels that have no noise, such as one value that many rows share."""
NEAR_FLOOR = 2.0
"""A noise this many times the second term of the floor, which moves with the other noises, counts as at the floor."""

LEAST_SLOPE = 0.5
"""A noise at its floor is held there if the log-likelihood would gain this many nats for each unit of log noise."""


def noise_floor(
    noise_std: Float[AnyArray, " k *m"],
    least_noise: Float[AnyArray, "*m"] | float,
    num_samples: Float[AnyArray, "*m"] | float,
) -> Any:
    """() or (m,): the least noise that an expert may have beside the others.

    Args:
        noise_std: (k,), or (k, m), the noises so far.
        least_noise: () or (m,): the resolution of the labels.
        num_samples: (), or (m,) equal ones: n, the sum of the weights.
    """
    xp = np if isinstance(noise_std, np.ndarray) else jnp
    largest = noise_std.max(axis=0)
    pooled = largest * xp.sqrt(xp.mean((noise_std / xp.broadcast_to(largest, noise_std.shape)) ** 2, axis=0))
    least = xp.broadcast_to(xp.asarray(least_noise, noise_std.dtype), pooled.shape)
    return xp.maximum(least, pooled / num_samples)


def at_floor(noise_std: Float[AnyArray, " k *m"], least_noise: Any, num_samples: Any) -> Any:
    """(k,) bool: true for experts with a noise at the floor in some output; arguments as in `noise_floor`."""
    xp = np if isinstance(noise_std, np.ndarray) else jnp
    ratio = NEAR_FLOOR * noise_floor(noise_std, 0.0, num_samples)
    least = xp.maximum(1.001 * xp.broadcast_to(xp.asarray(least_noise, noise_std.dtype), ratio.shape), ratio)
    either = noise_std <= xp.broadcast_to(least, noise_std.shape)
    return either.any(axis=1) if noise_std.ndim == 2 else either


@overload
def is_collapsed(
    noise_std: jax.Array,
    counts: jax.Array,
    *,
    num_coefficients: int,
    least_noise: jax.Array | float,
    per_expert: bool,
) -> jax.Array: ...
@overload
def is_collapsed(
    noise_std: np.ndarray,
    counts: np.ndarray,
    *,
    num_coefficients: int,
    least_noise: np.ndarray | float,
    per_expert: bool,
) -> np.ndarray: ...
def is_collapsed(
    noise_std: AnyArray,
    counts: AnyArray,
    *,
    num_coefficients: int,
    least_noise: Any,
    per_expert: bool,
) -> Any:
    """(k,) bool: true for experts whose noise ran off to zero because they go through their rows exactly.

    An expert with its own noise has collapsed if it has no more effective rows than coefficients, for it can go through any such
    rows, or if its noise is at the floor and it has few rows. If the noise is shared, all experts have collapsed if it is at most
    the rounding of the labels. The noise relative to the labels' spread is no criterion: precise data have small noise.

    Args:
        noise_std: (k,), or (k, m).
        counts: (k,) effective rows, sums of responsibilities.
        num_coefficients: D, the coefficients of each expert.
        least_noise: () or (m,): the resolution of the labels.
        per_expert: true if every expert has its own noise.
    """
    if not per_expert:
        at_rounding = noise_std <= least_noise
        return at_rounding.any(axis=1) if noise_std.ndim == 2 else at_rounding
    few = counts < FEWEST_ROWS * num_coefficients
    return (counts <= num_coefficients + 0.5) | (few & at_floor(noise_std, least_noise, counts.sum()))


def held_noises(
    noise_std: Float[jax.Array, " k"],
    gradient: Float[jax.Array, " P"],
    least_noise: jax.Array | None,
    num_samples: jax.Array | float,
) -> Bool[jax.Array, " P"] | None:
    """(P,) bool: true for log noises at their floor, where the likelihood still grows as they fall.

    Args:
        noise_std: (k,)
        gradient: (P,) of the log-likelihood there.
        least_noise: () the resolution of the labels if every expert has its own noise; None, with the result None, if not.
        num_samples: sum of the weights.
    """
    if least_noise is None:
        return None
    k = noise_std.shape[0]
    growing = gradient[-k:] < -LEAST_SLOPE
    held = at_floor(noise_std, least_noise, num_samples) & growing
    return jnp.zeros_like(gradient, bool).at[-k:].set(held)


def label_rounding(y: Float[jax.Array, " n *m"], weights: Float[jax.Array, " n"]) -> Float[jax.Array, ""]:
    """(): the rounding of the largest label with weight, in its own unit; labels are (n,), or (n, m)."""
    used = weights > 0 if y.ndim == 1 else (weights > 0)[:, None]
    return jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(y), where=used, initial=0.0)


def rounding_noise(y: Float[jax.Array, " n *m"], weights: Float[jax.Array, " n"]) -> Float[jax.Array, ""]:
    """(): the least noise of an expert with its own, for labels (n,), or (n, m), that are not multiples of a step; positive."""
    return jnp.maximum(EXACT * label_rounding(y, weights), jnp.finfo(y.dtype).tiny)


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


def label_step(y: Float[np.ndarray, " n"]) -> float:
    """The largest step of which all differences of the labels (n,) are multiples, to 1e-7 of their range; 0 if there is none.

    It is found by Euclid's algorithm on the gaps between neighbouring labels. Labels of a continuous distribution have none; labels
    that were rounded have their rounding, in any unit.

    >>> label_step(np.array([0.25, 1.0, 2.5]))
    0.75
    """
    gaps = np.diff(np.unique(y))
    gaps = gaps[gaps > 2 * ROUNDING * np.finfo(float).eps * np.abs(y).max(initial=0.0)]
    rounding = float(np.finfo(np.float32).eps) * float(gaps.sum())
    step = float(gaps.min(initial=np.inf))
    if not gaps.size or step <= rounding:
        return 0.0
    while step > ROUNDING * rounding:
        rest = np.abs(gaps - step * np.round(gaps / step))
        rest = rest[rest > rounding]
        if not rest.size:
            return step
        step = float(rest.min())
    return 0.0


def resolution(y: Float[np.ndarray, " n *m"]) -> Float[np.ndarray, " *m"]:
    """() or (m,): the noise at which the density of labels (n,), or (n, m), that are multiples of a step is at most 1 / step."""
    steps = np.array([label_step(column) / math.sqrt(2 * math.pi) for column in y.reshape(len(y), -1).T])
    return steps.reshape(y.shape[1:])
