r"""Ridges and noise of a mean fit by evidence (MacKay 1992), in rounds of climbs.

For y ~ N(f(x), s^2) and normal priors of precision l_e on the slopes of the experts and l_g on the gates (minus their mean), let
theta be the mode, L the prior precision and H = J'J / s^2 + L. Laplace's approximation of the evidence is

    log p(y) = log p(y | theta) - theta' L theta / 2 + (log det L - log det H) / 2 + log Gamma(k' + 1).

The last term counts the relabellings of a mixture, which are modes of equal height: k! if the experts are distinct. Experts that
the ridges make equal have no separate modes; k' = 1 + gamma_g / D is the number of distinct ones. The numbers of coefficients
that the data determine are

    gamma_e = #slopes - l_e tr(H^-1 C_e),   gamma_g = #gates - l_g tr(H^-1 C_g),

C the quadratic forms of the priors, D the coefficients of a gate. A maximum of the evidence satisfies
l_e = gamma_e / theta' C_e theta, likewise l_g, and s^2 = RSS / (n - gamma). Each round climbs to the mode and applies these once.
All have bounds: with few rows the evidence may grow without limit as s^2 goes to zero.

Source: D. J. C. MacKay, Bayesian interpolation, Neural Computation 4, 1992.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks
from moejax.likelihood.padded import Climb, Prior, Ridge, climb_padded, prior_of
from moejax.model.activations import ScalarFunction
from moejax.model.small_linear_algebra import cholesky, inverse_positive_definite

FIRST_RIDGE = (1.0, 0.1)
"""Precisions of slopes and gates before the first round, for white inputs and labels of unit variance."""
LEAST_RIDGE, MOST_RIDGE = 1e-3, 1e4
LEAST_SHARE = 0.1
"""The degrees of freedom n - gamma count as at least this share of n."""
VARIANCE_FLOOR = 1e-12
"""Least s^2, relative to the mean square of the labels."""


class Evidence(NamedTuple):
    """A mode with its evidence, for the ridges and the noise with which it was found."""

    rows: Float[jax.Array, "rows D"]
    log_evidence: Float[jax.Array, ""]
    """() nats; minus infinity if no round came to a finite one."""
    log_likelihood: Float[jax.Array, ""]
    """() nats."""
    squares: Float[jax.Array, ""]
    """() sum w (y - f)^2"""
    variance: Float[jax.Array, ""]
    ridge: Ridge
    effective: Float[jax.Array, ""]
    """() gamma: the coefficients that the data determine, intercepts included."""
    covariance: Float[jax.Array, "P P"]
    """(P, P) H^-1."""
    num_passes: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]
    """() bool: the last climb converged."""


def _determined(
    covariance: Float[jax.Array, "P P"], prior: Prior, ridge: Ridge
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """() gamma_e and () gamma_g: the coefficients of slopes and of gates that the data determine."""
    half, count = prior.slopes.shape[0], prior.centred.shape[0]
    of_slopes = jnp.diag(covariance)[:half] @ prior.slopes
    blocks = covariance[half:, half:].reshape(count, half // count, count, half // count)
    of_gates = jnp.einsum("idjd,ij->", blocks, prior.centred)
    return prior.num_slopes - ridge.experts * of_slopes, prior.num_gates - ridge.gates * of_gates


def _evidence(
    climb: Climb, prior: Prior, ridge: Ridge, active: Bool[jax.Array, " K"], num_passes: jax.Array
) -> Evidence:
    number, size = active.sum().astype(climb.rows.dtype), climb.rows.shape[1]
    precision = prior.matrix(ridge)
    matrix = climb.sums.information + precision
    matrix = matrix + 10.0 * jnp.finfo(matrix.dtype).eps * jnp.diag(jnp.diag(matrix))
    covariance = inverse_positive_definite(matrix)
    log_determinant = 2.0 * jnp.sum(jnp.log(jnp.diag(cholesky(matrix))))
    slopes, gates = prior.num_slopes, prior.num_gates
    num_intercepts = number * size - slopes
    of_prior = slopes * jnp.log(ridge.experts) + gates * jnp.log(ridge.gates)
    of_prior = of_prior + jnp.sum(
        jnp.where(prior.fixed > 0, jnp.log(jnp.where(prior.fixed > 0, prior.fixed, 1.0)), 0.0)
    )
    of_experts, of_gates = _determined(covariance, prior, ridge)
    effective = of_experts + of_gates + num_intercepts
    flat = climb.rows.reshape(-1)
    value = (
        climb.sums.log_likelihood
        - 0.5 * flat @ precision @ flat
        + 0.5 * (of_prior - log_determinant)
        + jax.scipy.special.gammaln(2.0 + of_gates / size)
    )
    return Evidence(
        climb.rows,
        jnp.where(jnp.isfinite(value), value, -jnp.inf),
        climb.sums.log_likelihood,
        climb.sums.squares,
        climb.variance,
        ridge,
        effective,
        covariance,
        num_passes,
        climb.converged,
    )


def next_ridge(found: Evidence, prior: Prior) -> Ridge:
    """The ridges by MacKay's fixed point at a mode, within their bounds."""
    of_experts, of_gates = _determined(found.covariance, prior, found.ridge)
    slopes, gates = prior.squares(found.rows)
    tiny = jnp.finfo(found.rows.dtype).tiny
    experts, of_gate = of_experts / jnp.maximum(slopes, tiny), of_gates / jnp.maximum(gates, tiny)
    return Ridge(
        jnp.clip(experts, LEAST_RIDGE, MOST_RIDGE),
        jnp.where(prior.num_gates > 0, jnp.clip(of_gate, LEAST_RIDGE, MOST_RIDGE), found.ridge.gates),
    )


def maximise_evidence(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    ridge: Ridge,
    blocks: SampleBlocks,
    *,
    fn: ScalarFunction,
    fit_intercept: bool,
    num_rounds: int,
    num_steps: int,
    tolerance: float,
    fixed_ridge: bool = False,
) -> Evidence:
    """Rounds of a climb; between two rounds a step of the ridges and the noise.

    Args:
        rows: (2 K, D) to start from.
        active: (K,) the places that hold experts.
        variance: () s^2 of the first round.
        ridge: of the first round; of all rounds if `fixed_ridge`.
        blocks: the sample.
        fn: g.
        fit_intercept: if true, the last coefficient of a row is an intercept.
        num_rounds: rounds.
        num_steps: passes of a round's climb.
        tolerance: nats; a climb ends at a gain below it.
        fixed_ridge: keep the ridges, and update the noise only.
    """
    prior = prior_of(active, rows.shape[1], fit_intercept=fit_intercept, dtype=rows.dtype)
    total, size = blocks.weights.sum(), rows.size
    floor = VARIANCE_FLOOR * jnp.sum(blocks.weights * blocks.y**2) / total

    def one_round(index: int, before: Evidence) -> Evidence:
        ridge = before.ridge
        residual = before.squares / jnp.maximum(total - before.effective, LEAST_SHARE * total)
        if not fixed_ridge:
            ridge = jax.tree.map(
                lambda new, old: jnp.where(index > 0, new, old), next_ridge(before, prior), ridge
            )
        end = climb_padded(
            before.rows,
            active,
            jnp.where(index > 0, jnp.maximum(residual, floor), before.variance),
            ridge,
            blocks,
            fn=fn,
            objective="mean",
            fit_intercept=fit_intercept,
            num_steps=num_steps,
            tolerance=tolerance,
        )
        found = _evidence(end, prior, ridge, active, before.num_passes + end.num_passes)
        good = jnp.isfinite(found.log_evidence)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), found, before)

    zero = jnp.zeros((), rows.dtype)
    begun = Evidence(
        rows,
        zero - jnp.inf,
        zero,
        zero,
        jnp.maximum(variance, floor),
        ridge,
        zero,
        jnp.zeros((size, size), rows.dtype),
        jnp.asarray(0, jnp.int32),
        jnp.asarray(False),
    )
    return jax.lax.fori_loop(0, num_rounds, one_round, begun)
