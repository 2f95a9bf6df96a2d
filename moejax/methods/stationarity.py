"""Test of stationarity: a fit is at a stationary point of its objective if one more Newton step predicts little gain, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from moejax.likelihood.blocks import sample_blocks, sample_scale, sum_over_blocks
from moejax.likelihood.collapse import held_noises
from moejax.likelihood.derivatives import Curvature, likelihood_curvature, without
from moejax.likelihood.free_columns import num_coefficients
from moejax.likelihood.polish import damped_step
from moejax.likelihood.predictors import (
    block_matrix,
    gate_centring,
    gate_penalty,
    predictors_of,
    weighted_gram,
)
from moejax.methods.method import MethodConfig, Problem, least_noise_of
from moejax.model.activations import activation_and_slope
from moejax.model.family import activation_of, channel_facts
from moejax.model.mixture import MoEParams

NATS_FROM_STATIONARY = 0.5
"""Largest predicted gain, in nats, at a point that counts as stationary: one standard error in one direction."""
STATIONARY_DAMPING = 1e-6


def is_stationary(curvature: Curvature, weights: Float[jax.Array, " n"]) -> Bool[jax.Array, ""]:
    """(): true if the Newton step of an objective in nats, on samples of weights (n,), gains less than NATS_FROM_STATIONARY.

    It is false at a saddle, where the information is not positive definite, and if any value is not finite.
    """
    step = damped_step(curvature, jnp.asarray(STATIONARY_DAMPING, weights.dtype))
    return step.found & (step.promised < NATS_FROM_STATIONARY * sample_scale(weights).unit)


def likelihood_is_stationary(
    params: MoEParams, problem: Problem, config: MethodConfig, *, experts_free: bool = True
) -> Bool[jax.Array, ""]:
    """(): true if the likelihood is stationary in experts, gates and noise, or in the gates and the noise only."""
    weights, k = problem.weights, config.num_experts
    width = None
    if channel_facts(config.fn).kinked:
        width = params.noise_std.min() * jnp.sqrt(params.experts.size / sample_scale(weights).num_samples)
    curvature = likelihood_curvature(
        params,
        sample_blocks(problem.x, problem.y, weights, fit_intercept=config.fit_intercept),
        fn=config.fn,
        noise=config.noise,
        fit_intercept=config.fit_intercept,
        ridge=config.ridge,
        width=width,
        columns=config.columns,
    )
    held = held_noises(params.noise_std, curvature.gradient, least_noise_of(problem, config), weights.sum())
    if held is not None:  # at the floor, the likelihood is stationary in the other parameters
        curvature = without(curvature, held)
    if not experts_free:
        of_expert, _ = num_coefficients(problem.x.shape[1], config.fit_intercept, config.columns)
        free = slice(k * of_expert, None)
        curvature = curvature._replace(
            gradient=curvature.gradient[free],
            observed=curvature.observed[free, free],
            complete=curvature.complete[free, free],
        )
    return is_stationary(curvature, weights)


def squared_error_curvature(params: MoEParams, problem: Problem, config: MethodConfig) -> Curvature:
    """The objective of `gradient_mse` in nats, with its Gauss-Newton matrix as the information.

    The objective is minus the squared errors of the mean, with the gates' penalty, over twice their weighted mean s^2. Up to a
    constant it is the log-likelihood if the labels were normal about that mean with variance s^2.
    """
    fn = activation_of(config.fn)
    k, size = config.num_experts, problem.x.shape[1] + int(config.fit_intercept)
    blocks = sample_blocks(problem.x, problem.y, problem.weights, fit_intercept=config.fit_intercept)
    predictors = predictors_of(params, fit_intercept=config.fit_intercept)
    rows, columns = np.triu_indices(2 * k - 1)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
        at = predictors(design)
        means, slopes = activation_and_slope(fn, at[:k])
        gates = jax.nn.softmax(jnp.concatenate([at[k:], jnp.zeros_like(at[:1])]), axis=0)
        mean = jnp.sum(gates * means, axis=0)
        error = y - mean
        slopes = jnp.concatenate([gates * slopes, (gates * (means - mean[None]))[: k - 1]])
        gram = weighted_gram(design, slopes[rows] * slopes[columns] * weights[None])
        return error**2 @ weights, (slopes * (weights * error)[None]) @ design.T, gram, y**2 @ weights

    squares, gradient, gram, total = sum_over_blocks(sums_of, blocks)
    # the rounding residual of an exact fit is no variance
    squares = jnp.maximum(squares, jnp.finfo(squares.dtype).eps * total + jnp.finfo(squares.dtype).tiny)
    variance = squares / problem.weights.sum()
    ridge, centring = 0.5 * config.ridge, gate_centring(k, squares.dtype)
    gates = predictors.rows[k:]
    gradient = jnp.concatenate([gradient[:k], gradient[k:] - ridge * (centring @ gates)]).reshape(-1)
    penalty = jax.scipy.linalg.block_diag(
        jnp.zeros((k * size, k * size), squares.dtype),
        ridge * jnp.kron(centring, jnp.eye(size, dtype=squares.dtype)),
    )
    information = (block_matrix(gram) + penalty) / variance
    value = -(0.5 * squares + ridge * gate_penalty(gates)) / variance
    return Curvature(value, gradient / variance, information, information)
