"""Uncertainty of a fit, its distance from a maximum of the likelihood, and the effect of the ridge."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.environment import compiled_fast
from moejax.likelihood.blocks import sample_blocks, sample_scale
from moejax.likelihood.collapse import held_noises
from moejax.likelihood.derivatives import (
    Curvature,
    likelihood_curvature,
    penalised,
    without,
    without_rows,
)
from moejax.likelihood.free_columns import gate_columns, num_coefficients
from moejax.likelihood.information import (
    Covariance,
    CovarianceKind,
    inverse_of_information,
    observed_information,
    score_outer_products,
)
from moejax.likelihood.predictors import gate_centring, predictors_of
from moejax.methods.method import MethodConfig, Problem, least_noise_of
from moejax.model.family import channel_facts
from moejax.model.mixture import MoEParams


class Uncertainty(NamedTuple):
    """Covariance of an estimate, and its distance from the maximum."""

    covariance: Covariance
    """Covariance of the free parameters, in the units of the fit."""
    shortfall: jax.Array
    """() nats by which the estimate is below the maximum of the likelihood with its ridge, by a quadratic model. For the
    sandwich, whose weights have no scale, they are nats of a sample of mean weight one."""
    ridge: RidgeEffect


class RidgeEffect(NamedTuple):
    """The effect of the ridge on the gates on an estimate."""

    cost: jax.Array
    """() nats of log-likelihood that the ridge costs, by a quadratic model."""
    shares: jax.Array
    """(k - 1,) the ridge's share of the information on each gate's size, relative to the last gate: nearly zero if the data
    determine it, up to one if they do not because the gate separates its samples."""


def ridge_effect(params: MoEParams, curvature: Curvature, config: MethodConfig) -> RidgeEffect:
    """The effect of the ridge at a maximum of the penalised likelihood.

    There the gradient of the log-likelihood equals that of the penalty, G = ridge C w. Without the penalty the log-likelihood
    would gain half of G' H^-1 G, H the curvature of both.

    Args:
        params: the estimate.
        curvature: curvature of the penalised log-likelihood there.
        config: configuration of the fit.
    """
    k = config.num_experts
    rows = predictors_of(params, fit_intercept=config.fit_intercept).rows
    gates = gate_columns(rows[k:], config.columns)
    of_expert, size = num_coefficients(gates.shape[1], False, config.columns)
    own = slice(k * of_expert, k * of_expert + (k - 1) * size)
    centring = gate_centring(k, rows.dtype)
    penalty = config.ridge * (centring @ gates)
    force = jnp.zeros_like(curvature.gradient).at[own].set(penalty.reshape(-1))
    cost = 0.5 * force @ inverse_of_information(curvature.observed).matrix @ force
    blocks = curvature.observed[own, own]
    blocks = blocks.reshape(k - 1, size, k - 1, size)
    known = jnp.einsum("id,idie,ie->i", gates, blocks, gates)
    of_ridge = config.ridge * jnp.diag(centring) * jnp.sum(gates**2, axis=1)
    shares = jnp.where(
        of_ridge > 0, jnp.where(known > of_ridge, of_ridge / jnp.where(known > 0, known, 1.0), 1.0), 0.0
    )
    return RidgeEffect(cost, shares)


def uncertainty_of(
    params: MoEParams,
    without_ridge: Curvature,
    observed: jax.Array,
    score_products: jax.Array | None,
    mean_weight: jax.Array | float,
    config: MethodConfig,
    held: jax.Array | None = None,
) -> Uncertainty:
    """The uncertainty of an estimate, from sums over the sample.

    Args:
        params: the estimate.
        without_ridge: the log-likelihood and its derivatives there.
        observed: (P, P) the observed information; for a g with kinks, with averaged derivatives (`observed_information`).
        score_products: (P, P) those of `score_outer_products`, for the sandwich; None for the inverse of the information.
        mean_weight: () that of the sample (`SampleScale`).
        config: configuration of the fit.
        held: (P,) bool, true for noises at their floor (`held_noises`), which count as known; None if no noise can be there.
    """
    predictors = predictors_of(params, fit_intercept=config.fit_intercept)
    curvature = penalised(without_ridge, predictors, config.num_experts, config.ridge, config.columns)
    if held is None:
        of = bread = inverse_of_information(observed)
    else:
        curvature = without(curvature, held)
        bread = inverse_of_information(without_rows(observed, held))
        matrix, null, scale = (jnp.where(held[:, None] | held[None], 0.0, a) for a in bread[:3])
        of = bread = bread._replace(matrix=matrix, null=null, scale=scale)
    shortfall = 0.5 * curvature.gradient @ bread.matrix @ curvature.gradient
    if score_products is not None:
        of = bread._replace(matrix=bread.matrix @ score_products @ bread.matrix)
        shortfall = shortfall / mean_weight
    return Uncertainty(of, shortfall, ridge_effect(params, curvature, config))


@functools.partial(jax.jit, static_argnames=("kind", "config"), compiler_options=compiled_fast())
def uncertainty(
    params: MoEParams, problem: Problem, kind: CovarianceKind, config: MethodConfig
) -> Uncertainty:
    """The uncertainty of an estimate with one output, from its sample; `kind` as in `covariance`."""
    free: dict[str, Any] = {
        "noise": config.noise,
        "fit_intercept": config.fit_intercept,
        "columns": config.columns,
    }
    x, y, weights, fn = problem.x, problem.y, problem.weights, config.fn
    scale = sample_scale(weights)
    with jax.default_matmul_precision("highest"):
        blocks = sample_blocks(x, y, weights, fit_intercept=config.fit_intercept)
        without_ridge = likelihood_curvature(params, blocks, fn=fn, **free)
        observed = without_ridge.observed
        if channel_facts(fn).kinked:  # derivatives averaged over the kink, from another pass over the data
            size = scale.num_samples if kind == "observed" else scale.effective
            observed = observed_information(params, x, y, weights, fn, num_samples=size, **free)
        products = None
        if kind == "sandwich":
            products = score_outer_products(params, x, y, weights**2, fn, **free)
        least = least_noise_of(problem, config)
        held = held_noises(params.noise_std, without_ridge.gradient, least, weights.sum())
        return uncertainty_of(params, without_ridge, observed, products, scale.mean_weight, config, held)
