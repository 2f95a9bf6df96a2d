r"""Accuracy of the parameters: Fisher information, Cramer-Rao bounds, standard errors and intervals.

All results are conditional on the inputs. They are in the free parameters of `predictors.free_parameters`: experts, gates but the
last, log noise, and biases if they are fitted. The score of a sample is (scores in the 2k - 1 linear predictors) x (inputs) and
scores in log sigma, in closed form (see `polish`); so an information matrix is one weighted Gram matrix of the inputs.

* Fisher information: see `fisher`.
* Observed information H: minus the Hessian at the estimate; H^-1 is the covariance if the model is true (Efron and Hinkley 1978).
* Sandwich H^-1 J H^-1, J = sum_j w_j^2 s_j s_j': the covariance even if the model is wrong (Huber 1967, White 1982).

At a kink of g the score jumps by r e (change of g') / sigma, and the Hessian of the expected log-likelihood gets the density of
samples on the kink times the mean of that jump. If the model is true, the mean is E[r_i e_i | x] = P_i E[e] = 0, so that the
pointwise Hessian, the averaged one and J all tend to the same matrix. If the model is wrong, the mean is not zero. Only derivatives
of g that are averaged over a small width, with many samples inside, contain the term. H therefore averages over the standard error
of a linear predictor, at any n: a pointwise H would make the sandwich wrong exactly where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.likelihood.blocks import sample_blocks, sample_scale, sum_over_blocks
from moejax.likelihood.derivatives import likelihood_curvature, predictor_derivatives
from moejax.likelihood.fisher import free_noise
from moejax.likelihood.free_columns import FreeColumns, expert_inputs, free_positions
from moejax.likelihood.predictors import (
    free_parameters,
    num_noise_parameters,
    params_from_free,
    predictors_of,
)
from moejax.model.families import ChannelLike, get_channel
from moejax.model.family import channel_facts
from moejax.model.gaussian import Array
from moejax.model.mixture import MoEParams, NoiseModel
from moejax.model.small_linear_algebra import eigh

CovarianceKind = Literal["observed", "sandwich"]
COVARIANCE_KINDS = ("observed", "sandwich")
_RANK_TOLERANCE = 10.0
"""Eigenvalues of the information (of unit diagonal) below this many times P eps of the largest are treated as zero."""


class Covariance(NamedTuple):
    """Covariance of P parameters, or of linear functions of them, with the directions that the data do not determine."""

    matrix: Float[jax.Array, "P P"]
    """(P, P): the inverse of the information; its pseudo-inverse if that is singular."""
    null: Float[jax.Array, "P P"]
    """(P, P) positive semi-definite: a linear function c of the parameters is identified if c' null c = 0."""
    scale: Float[jax.Array, "P P"]
    """(P, P): c' null c is compared with c' scale c; the two would be equal if nothing were identified."""
    condition: Float[jax.Array, ""]
    """() condition number of the information scaled to a unit diagonal, so that units do not matter; infinite if it is singular or
    indefinite."""


def parameter_blocks(
    num_experts: int, dim: int, *, noise: NoiseModel, fit_intercept: bool
) -> dict[str, np.ndarray]:
    """Positions of "experts", "gates", "noise" and "biases" (of experts and gates) in the P free parameters; some may be empty."""
    size = dim + int(fit_intercept)
    rows = np.arange((2 * num_experts - 1) * size).reshape(2 * num_experts - 1, size)
    return {
        "experts": rows[:num_experts, :dim].reshape(-1),
        "gates": rows[num_experts:, :dim].reshape(-1),
        "noise": rows.size + np.arange(num_noise_parameters(noise, num_experts)),
        "biases": rows[:, dim:].reshape(-1),
    }


def score_outer_products(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    squared_weights: Float[jax.Array, " n"],
    activation: ChannelLike,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    columns: FreeColumns | None = None,
) -> Float[jax.Array, "P P"]:
    """(P, P): J = sum_j squared_weights_j s_j s_j', s_j (P,) the score of sample j.

    Args:
        params: the point of evaluation.
        x: (n, d).
        y: (n,).
        squared_weights: (n,) squares of the sample weights.
        activation: g, or an output family; at a kink its one-sided derivative is used.
        noise: which noise parameters are free.
        fit_intercept: if true, biases are free.
        columns: the columns whose coefficients are free; None for all.
    """
    fn = get_channel(activation)
    predictors = predictors_of(params, fit_intercept=fit_intercept)
    blocks = sample_blocks(x, y, squared_weights, fit_intercept=fit_intercept)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        at = predictor_derivatives(predictors(design), y, params.noise_std, fn)
        of_rows = (at.gradient[:, None] * design[None]).reshape(-1, y.shape[0])
        scores = jnp.concatenate([of_rows, free_noise(at.noise_gradient, noise)])
        if columns is not None:
            k = params.noise_std.shape[0]
            scores = scores[free_positions(k, k, num_noise_parameters(noise, k), columns)]
        return (scores * weights[None]) @ scores.T

    return sum_over_blocks(sums_of, blocks)


def observed_information(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    activation: ChannelLike,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    num_samples: Float[jax.Array, ""] | None = None,
    columns: FreeColumns | None = None,
) -> Float[jax.Array, "P P"]:
    """(P, P): H = minus the Hessian of sum_j weights_j log p(y_j | x_j), without ridge.

    The derivatives of a g with kinks are averaged over the standard error of a linear predictor from `num_samples` () samples
    (see the module). None counts a weight as a number of equal rows.
    """
    fn = get_channel(activation)
    width = None
    if channel_facts(fn).kinked:
        num_samples = sample_scale(weights).num_samples if num_samples is None else num_samples
        width = params.noise_std.min() * jnp.sqrt(expert_inputs(params.experts, columns).size / num_samples)
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    curvature = likelihood_curvature(
        params, blocks, fn=fn, noise=noise, fit_intercept=fit_intercept, width=width, columns=columns
    )
    return curvature.observed


def cramer_rao_bound(information: Float[jax.Array, "P P"]) -> Covariance:
    """The smallest covariance (P, P) of any unbiased estimate: the inverse of the Fisher information (P, P).

    For a singular information it is the bound of the identified functions, and `null` holds the others; it never fails.
    """
    return inverse_of_information(information)


def inverse_of_information(information: Float[jax.Array, "P P"]) -> Covariance:
    """The inverse (P, P) of an information (P, P), and the directions that it leaves undetermined."""
    diagonal = jnp.diag(information)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    values, vectors = eigh(information / (scale[:, None] * scale[None]))
    threshold = _RANK_TOLERANCE * values.size * jnp.finfo(values.dtype).eps * values[-1]
    kept = values > threshold
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)
    basis = vectors / scale[:, None]
    condition = jnp.where(kept[0], values[-1] / jnp.where(kept[0], values[0], 1.0), jnp.inf)
    null = (basis * (~kept).astype(basis.dtype)[None]) @ basis.T
    return Covariance((basis * inverse[None]) @ basis.T, null, jnp.diag(1.0 / scale**2), condition)


def covariance(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    activation: ChannelLike,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    weights: Float[jax.Array, " n"] | None = None,
    kind: CovarianceKind = "observed",
) -> Covariance:
    """Covariance of the maximum-likelihood estimate, from the data.

    Args:
        params: the estimate.
        x: (n, d).
        y: (n,).
        activation: g, or an output family.
        noise: which noise parameters were estimated.
        fit_intercept: if true, biases were estimated.
        weights: (n,) the weights of the fit; None for ones.
        kind: "observed", H^-1, assumes that the model is true and that a weight is a number of equal rows. "sandwich",
            H^-1 J H^-1, assumes neither: a weight is how much one row counts (sampling or importance weights), and a common
            factor of all weights changes nothing.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in COVARIANCE_KINDS:
        raise ValueError(f"kind: expected {' or '.join(map(repr, COVARIANCE_KINDS))}, got {kind!r}")
    weights = jnp.ones_like(y) if weights is None else weights
    free: dict[str, Any] = {"noise": noise, "fit_intercept": fit_intercept}
    if kind == "observed":
        return inverse_of_information(observed_information(params, x, y, weights, activation, **free))
    size = sample_scale(weights).effective
    bread = inverse_of_information(
        observed_information(params, x, y, weights, activation, num_samples=size, **free)
    )
    filling = score_outer_products(params, x, y, weights**2, activation, **free)
    return bread._replace(matrix=bread.matrix @ filling @ bread.matrix)


def transform_covariance(of: Covariance, jacobian: Float[jax.Array, "Q P"]) -> Covariance:
    """The covariance of Q functions of the parameters with derivatives `jacobian` (Q, P): exact for linear ones."""
    matrix, null, scale = (jacobian @ a @ jacobian.T for a in (of.matrix, of.null, of.scale))
    return Covariance(matrix, null, scale, of.condition)


def standard_errors(
    of: Covariance,
    params: MoEParams,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    transform: Callable[[MoEParams], MoEParams] | None = None,
) -> MoEParams:
    """Standard errors of every parameter, in its own unit: zero if it was not estimated, NaN if it is not identified.

    Args:
        of: covariance of the free parameters, from `covariance` or `cramer_rao_bound`.
        params: the estimate.
        noise: which noise parameters are free; the standard error of sigma is sigma times that of log sigma.
        fit_intercept: if true, biases are free.
        transform: applied to the parameters before they are reported, such as the change to the user's units or another order
            of the experts. Errors are carried through its derivatives, which is exact if it is linear. The covariance may have
            fewer inputs than the report (collinear inputs).

    Returns:
        MoEParams of `transform(params)`'s shapes.
    """

    def reported(free: jax.Array) -> MoEParams:
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        return at if transform is None else transform(at)

    jacobian = jax.jacfwd(reported)(free_parameters(params, noise=noise, fit_intercept=fit_intercept))

    def of_leaf(jacobian: jax.Array) -> jax.Array:
        variance, null, scale = (
            jnp.sum((jacobian @ a) * jacobian, axis=-1) for a in (of.matrix, of.null, of.scale)
        )
        tolerance = math.sqrt(jnp.finfo(variance.dtype).eps)
        errors = jnp.where(null <= tolerance * scale, jnp.sqrt(variance), jnp.nan)
        # a parameter that depends on no free parameter was not estimated
        return jnp.where(scale > 0, errors, 0.0)

    return jax.tree.map(of_leaf, jacobian)


def confidence_intervals(
    params: MoEParams[Array],
    errors: MoEParams[Array],
    level: float = 0.95,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    num_inputs: int | None = None,
    corrected: bool = True,
) -> tuple[MoEParams[Array], MoEParams[Array]]:
    """(lower, upper) ends of Wald intervals for every parameter.

    The maximum-likelihood sigma is too small by the degrees of freedom that the means take: log sigma is low by m / 2n to first
    order, m coefficients fitted to n residuals (exact in regression). That is m times the squared standard error of log sigma,
    also with uncertain posteriors, to within 12% in our measurements. Intervals of sigma are symmetric in log sigma
    about the corrected value; uncorrected ones at 95% hold the truth in 92 to 94%.

    Args:
        params: the estimate.
        errors: its standard errors.
        level: probability that one interval holds its parameter.
        noise: the noise model of the fit; "shared" has the coefficients of all experts for one sigma.
        fit_intercept: if true, biases were fitted.
        num_inputs: rank of the inputs; None for d.
        corrected: if false, intervals of sigma are about the estimate; the correction is that of Gaussian labels.

    Raises:
        ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    num_experts, dim = params.experts.shape
    coefficients = (dim if num_inputs is None else num_inputs) + int(fit_intercept)
    coefficients *= (num_experts if noise == "shared" else 1) if corrected else 0
    quantile = NormalDist().inv_cdf(0.5 + 0.5 * level)
    log_error = errors.noise_std / params.noise_std
    xp = np if isinstance(log_error, np.ndarray) else jnp

    def end(sign: float) -> MoEParams[Array]:
        ends = jax.tree.map(lambda value, error: value + sign * quantile * error, params, errors)
        factor = xp.exp(coefficients * log_error**2 + sign * quantile * log_error)
        return ends._replace(noise_std=params.noise_std * factor)

    return end(-1.0), end(1.0)
