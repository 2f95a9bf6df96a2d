r"""Splits of one expert of a padded mixture in two (`likelihood.padded`), and their predicted gains.

A split divides the expert's part of the input space: the two halves get its gate plus or minus a linear function h, so that its
share P_i goes to them by sigmoid(2 h) and sigmoid(-2 h). With the halves' shares fixed, their best coefficients are a linear
least-squares problem with 2 D unknowns (for a non-linear g a Gauss-Newton step of one), whose solution predicts the gain. So
hundreds of splits are scored by one pass. Experts of one part of the inputs are split by turning two copies of their line apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.padded import Objective, Ridge, gates_and_means
from moejax.model.activations import ScalarFunction
from moejax.model.gaussian import standard_normal
from moejax.model.small_linear_algebra import solve_positive_definite

RANDOM_DIRECTIONS = 4
"""Directions of splits of an expert, besides the coordinates."""
SHIFT = 0.5
"""Standard deviation of the middle of a split, in standard deviations of the part along the direction."""
SHARPNESS = (0.5, 3.0)
"""Range of the steepness of a split, the logarithm being uniform; the same unit."""
LEAST_PRECISION = 1e-6
"""Precision that is added to the ridge, for coefficients that the half of a part does not determine."""

Sample = tuple[Float[jax.Array, "D n"], Float[jax.Array, " n"], Float[jax.Array, " n"]]
"""Inputs (D, n) with a last row of ones for intercepts, labels and weights (n,)."""


def _directions(
    key: jax.Array, places: int, dim: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(places, q, dim) directions, and (places, q) middles and steepnesses of splits."""
    normal_key, uniform_key = jax.random.split(key)
    num_directions = dim + RANDOM_DIRECTIONS
    draws = standard_normal(normal_key, (places, RANDOM_DIRECTIONS * dim + num_directions), dtype)
    random = draws[:, : RANDOM_DIRECTIONS * dim].reshape(places, RANDOM_DIRECTIONS, dim)
    coordinates = jnp.broadcast_to(jnp.eye(dim, dtype=dtype)[None], (places, dim, dim))
    middles = SHIFT * draws[:, RANDOM_DIRECTIONS * dim :]
    low, high = np.log(SHARPNESS)
    steepness = jnp.exp(jax.random.uniform(uniform_key, middles.shape, dtype, low, high))
    return jnp.concatenate([coordinates, random], axis=1), middles, steepness


def divided(
    rows: Float[jax.Array, "rows D"],
    key: jax.Array,
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    ridge: Ridge,
    sample: Sample,
    *,
    fn: ScalarFunction,
    objective: Objective,
    fit_intercept: bool,
    count: int,
) -> Float[jax.Array, "c rows D"]:
    """The `count` divisions of experts of one mixture with the largest predicted gains.

    Args:
        rows: (2 K, D) the mixture.
        key: PRNG key.
        active: (K,) places with experts; the next one gets the new expert.
        variance: () s^2.
        ridge: that on the slopes is used for all coefficients of the halves.
        sample: the sample.
        fn: g.
        objective: the density.
        fit_intercept: if true, the last coefficient of a row is an intercept.
        count: c.
    """
    design, y, weights = sample
    places, size = active.shape[0], rows.shape[1]
    dim = size - int(fit_intercept)
    inputs = design[:dim]
    tiny = jnp.finfo(rows.dtype).tiny
    log_gates, means, slopes = gates_and_means(rows, active, design, fn)
    if objective == "mean":
        shares = jnp.exp(log_gates)
        error = jnp.broadcast_to((y - jnp.sum(shares * means, axis=0))[None], shares.shape)
        # a half moves f by P_i h g' times the change of its line
        factors, masses = shares * slopes, weights[None]
    else:
        error = y[None] - means
        shares = jax.nn.softmax(log_gates - 0.5 * error**2 / variance, axis=0)
        factors, masses = slopes, weights[None] * shares
    part = shares * weights[None]
    total = jnp.maximum(part.sum(axis=1), tiny)
    centres = part @ inputs.T / total[:, None]
    precision = (ridge.experts + LEAST_PRECISION) * jnp.eye(2 * size, dtype=rows.dtype)

    def one(given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, direction, middle, steepness = given
        along = direction @ (inputs - centres[i][:, None])
        spread = jnp.sqrt(part[i] @ along**2 / total[i]) + tiny
        turn = steepness / spread * direction
        offset = -steepness * (middle + direction @ centres[i] / spread) if fit_intercept else 0.0
        half = jax.nn.sigmoid(2.0 * (turn @ inputs + offset))
        mass = masses[i if objective == "likelihood" else 0] / variance
        halves = jnp.stack([half, 1.0 - half])
        if objective == "mean":
            basis = ((halves * factors[i][None])[:, None] * design[None]).reshape(2 * size, -1)
            gram, right = (basis * mass[None]) @ basis.T, basis @ (mass * error[i])
        else:  # each half has its own responsibilities: two problems in one
            basis = factors[i][None] * design
            grams = [(basis * (mass * h)[None]) @ basis.T for h in halves]
            nothing = jnp.zeros_like(grams[0])
            gram = jnp.block([[grams[0], nothing], [nothing, grams[1]]])
            right = jnp.concatenate([basis @ (mass * h * error[i]) for h in halves])
        own = jnp.tile(rows[i], 2)
        right = right - precision @ own
        step = solve_positive_definite(gram + precision, right)
        gate = jnp.append(turn, offset) if fit_intercept else turn
        return 0.5 * step @ right, jnp.concatenate([own + step, gate])

    directions, middles, steepness = _directions(key, places, dim, rows.dtype)
    which = jnp.repeat(jnp.arange(places), middles.shape[1])
    gains, found = jax.lax.map(
        one, (which, directions.reshape(-1, dim), middles.reshape(-1), steepness.reshape(-1))
    )
    best = jax.lax.top_k(jnp.where(active[which], gains, -jnp.inf), count)[1]
    slot = active.sum(dtype=jnp.int32)

    def put(i: jax.Array, new: jax.Array) -> jax.Array:
        first, second, gate = new.reshape(3, size)
        old = rows[places + i]
        made = rows.at[i].set(first).at[slot].set(second)
        return made.at[places + i].set(old + gate).at[places + slot].set(old - gate)

    return jax.vmap(put)(which[best], found[best])


def turned_apart(
    rows: Float[jax.Array, "rows D"],
    key: jax.Array,
    number: Int[jax.Array, ""],
    variance: Float[jax.Array, ""],
    count: int,
) -> Float[jax.Array, "c rows D"]:
    """`count` mixtures in which a random expert became two with one gate, and lines that differ by about the noise."""
    places, size = rows.shape[0] // 2, rows.shape[1]
    uniform_key, normal_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, (count,), rows.dtype)
    chosen = jnp.minimum((uniform * number.astype(rows.dtype)).astype(jnp.int32), number - 1)
    apart = jnp.sqrt(variance) * standard_normal(normal_key, (count, size), rows.dtype)

    def one(i: jax.Array, turn: jax.Array) -> jax.Array:
        made = rows.at[i].add(turn).at[number].set(rows[i] - turn)
        return made.at[places + number].set(rows[places + i])

    return jax.vmap(one)(chosen, apart)


def centred_gates(
    rows: Float[jax.Array, "c rows D"], active: Bool[jax.Array, " K"]
) -> Float[jax.Array, "c rows D"]:
    """The same mixtures with gates whose mean over the experts is zero."""
    places, here = active.shape[0], active[None, :, None]
    gates = rows[:, places:]
    mean = jnp.sum(jnp.where(here, gates, 0), axis=1, keepdims=True) / active.sum(dtype=rows.dtype)
    return rows.at[:, places:].set(jnp.where(here, gates - mean, 0))
