"""Closed-form derivatives of the observed log-likelihood."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from moejax.likelihood.blocks import SampleBlocks, sum_over_blocks
from moejax.likelihood.free_columns import FreeColumns, free_positions, gate_columns, num_coefficients
from moejax.likelihood.predictors import (
    Predictors,
    block_matrix,
    gate_centring,
    gate_penalty,
    predictors_of,
    weighted_gram,
)
from moejax.model.family import Channel, as_family
from moejax.model.mixture import MoEParams, NoiseModel


class Curvature(NamedTuple):
    """Value and derivatives of the log-likelihood in the free parameters, P of them (see `free_parameters`)."""

    log_likelihood: Float[jax.Array, ""]
    """() log-likelihood; with a ridge, less its penalty."""
    gradient: Float[jax.Array, " P"]
    """(P,)"""
    observed: Float[jax.Array, "P P"]
    """(P, P) minus the Hessian."""
    complete: Float[jax.Array, "P P"]
    """(P, P) expected information if it were known which expert made each label; positive semi-definite."""


class PredictorDerivatives(NamedTuple):
    """Derivatives of each sample's log-likelihood in its predictors (u_1..u_k, v_1..v_{k-1}) and in s_1..s_k."""

    value: Float[jax.Array, " n"]
    """(n,)"""
    gradient: Float[jax.Array, "2*k-1 n"]
    """(2k - 1, n) in the predictors."""
    noise_gradient: Float[jax.Array, "k n"]
    """(k, n)"""
    observed: Float[jax.Array, "k*(2*k-1) n"]
    """(k (2k - 1), n) minus the Hessian in the predictors, its upper triangle, in the order of `_predictor_pairs`."""
    observed_cross: Float[jax.Array, "2*k-1 k n"]
    """(2k - 1, k, n) minus the mixed derivatives in predictors and s."""
    observed_noise: Float[jax.Array, "k k n"]
    """(k, k, n) minus the Hessian in s."""
    complete_experts: Float[jax.Array, "k n"]
    """(k, n) complete-data information of u, r E[(d log p / du)^2]: diagonal."""
    complete_gates: Float[jax.Array, "k*(k-1)/2 n"]
    """(k (k - 1) / 2, n) complete-data information of v, diag P - P P', its upper triangle."""
    complete_noise: Float[jax.Array, "k n"]
    """(k, n) complete-data information of s, of a Gaussian 2 r."""


def _predictor_pairs(num_experts: int) -> np.ndarray:
    """(k (2k - 1), 2) int: the unordered pairs (s, t), s <= t, of predictors.

    First (u_i, u_i), (u_i, v_i) and (v_i, v_j), whose second derivatives have more than the product of two scores; then the others.
    """
    k = num_experts
    gates = k + np.stack(np.triu_indices(k - 1), axis=1)
    first = [(i, i) for i in range(k)] + [(i, k + i) for i in range(k - 1)] + [tuple(pair) for pair in gates]
    pairs = [tuple(pair) for pair in np.stack(np.triu_indices(2 * k - 1), axis=1)]
    return np.array([*first, *(pair for pair in pairs if pair not in first)])


def predictor_derivatives(
    predictors: Float[jax.Array, "predictors n"],
    y: Float[jax.Array, " n"],
    noise_std: Float[jax.Array, " k"],
    fn: Channel,
    width: Float[jax.Array, ""] | None = None,
) -> PredictorDerivatives:
    """Derivatives of log sum_i P_i(v) p(y | u_i; s_i), from those of the family; s_i = log sigma_i.

    Args:
        predictors: (2k - 1, n), u then v.
        y: (n,).
        noise_std: (k,).
        fn: g, or an output family.
        width: () half-width over which the derivatives in u are averaged; None takes them pointwise.
    """
    k = noise_std.shape[0]
    u, v = predictors[:k], predictors[k:]
    logits = jnp.concatenate([v, jnp.zeros_like(u[:1])])
    at = as_family(fn).second_order(y[None], u, noise_std[:, None], width)
    joint = logits + at.log_density
    evidence, gate_evidence = jax.nn.logsumexp(joint, axis=0), jax.nn.logsumexp(logits, axis=0)
    r, p_free = jnp.exp(joint - evidence[None]), jnp.exp(v - gate_evidence[None])
    d, q = at.score, at.dispersion_score
    a, b, r_free = r * d, r * q, r[: k - 1]

    # a a', a r' and r r' are one outer product; the other terms are at u_i u_i and u_i v_i, and the gates' own at v v'
    score = jnp.concatenate([a, r_free])
    rows, columns = _predictor_pairs(k).T
    gate_rows, gate_columns = np.triu_indices(k - 1)
    on_diagonal = (gate_rows == gate_columns).astype(y.dtype)[:, None]
    complete_gates = p_free[gate_rows] * (on_diagonal - p_free[gate_columns])
    special = [-r * (at.curvature + d**2), -a[: k - 1]]
    special = jnp.concatenate([*special, complete_gates - on_diagonal * r_free[gate_rows]])
    observed = score[rows] * score[columns]
    observed = jnp.concatenate([observed[: special.shape[0]] + special, observed[special.shape[0] :]])

    eye = jnp.eye(k, dtype=y.dtype)[:, :, None]
    us = eye * (-r * (at.cross + d * q))[:, None] + a[:, None] * b[None]
    vs = (r_free[:, None] - eye[: k - 1]) * b[None]
    ss = eye * (-r * (at.dispersion_curvature + q**2))[:, None] + b[:, None] * b[None]
    return PredictorDerivatives(
        value=evidence - gate_evidence,
        gradient=jnp.concatenate([a, r_free - p_free]),
        noise_gradient=b,
        observed=observed,
        observed_cross=jnp.concatenate([us, vs]),
        observed_noise=ss,
        complete_experts=r * at.information,
        complete_gates=complete_gates,
        complete_noise=r * at.dispersion_information,
    )


def likelihood_curvature(
    params: MoEParams,
    blocks: SampleBlocks,
    *,
    fn: Channel,
    noise: NoiseModel,
    fit_intercept: bool,
    ridge: Float[jax.Array, ""] | float = 0.0,
    width: Float[jax.Array, ""] | None = None,
    columns: FreeColumns | None = None,
) -> Curvature:
    """Log-likelihood, gradient, observed and complete-data information, in one pass over the data.

    Args:
        params: the point of evaluation.
        blocks: the sample, from `sample_blocks`.
        fn: g, or an output family.
        noise: which noise parameters are free.
        fit_intercept: if true, biases are free.
        ridge: () coefficient of sum_i ||w_i - mean w||^2 / 2, subtracted from the log-likelihood.
        width: () argument of `activation_derivatives`.
        columns: the columns whose coefficients are free; None for all.
    """
    k = params.experts.shape[0]
    predictors = predictors_of(params, fit_intercept=fit_intercept)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
        at = predictor_derivatives(predictors(design), y, params.noise_std, fn, width)
        coefficients = jnp.concatenate([at.observed, at.complete_experts, at.complete_gates])
        noise_free, cross = at.noise_gradient, at.observed_cross
        noise_observed, noise_complete = at.observed_noise @ weights, at.complete_noise @ weights
        if noise == "shared":
            noise_free, cross = noise_free.sum(axis=0, keepdims=True), cross.sum(axis=1, keepdims=True)
            noise_observed, noise_complete = noise_observed.sum()[None, None], noise_complete.sum()[None]
        return (
            at.value @ weights,
            (at.gradient * weights[None]) @ design.T,
            noise_free @ weights,
            weighted_gram(design, coefficients * weights[None]),
            jnp.einsum("bqn,dn->bdq", cross * weights[None, None], design),
            noise_observed,
            noise_complete,
        )

    value, gradient, noise_gradient, grams, cross, noise_observed, noise_complete = sum_over_blocks(
        sums_of, blocks
    )
    num_pairs = k * (2 * k - 1)
    ones, others = _predictor_pairs(k).T
    observed = block_matrix(grams[np.lexsort((others, ones))])
    gate_information = [block_matrix(grams[num_pairs + k :])] if k > 1 else []
    complete = jax.scipy.linalg.block_diag(*grams[num_pairs : num_pairs + k], *gate_information)
    gradient = gradient.reshape(-1)
    if noise != "known":
        cross = cross.reshape(observed.shape[0], -1)
        observed = jnp.block([[observed, cross], [cross.T, noise_observed]])
        complete = jax.scipy.linalg.block_diag(complete, jnp.diag(noise_complete))
        gradient = jnp.concatenate([gradient, noise_gradient])
    if columns is not None:
        free = free_positions(k, k, noise_gradient.size if noise != "known" else 0, columns)
        gradient, observed, complete = gradient[free], observed[free][:, free], complete[free][:, free]
    return penalised(Curvature(value, gradient, observed, complete), predictors, k, ridge, columns)


def penalised(
    curvature: Curvature,
    predictors: Predictors,
    num_experts: int,
    ridge: Float[jax.Array, ""] | float,
    columns: FreeColumns | None = None,
) -> Curvature:
    """The curvature of the log-likelihood less ridge times sum_i ||w_i - mean w||^2 / 2, from that of the log-likelihood.

    Args:
        curvature: without a ridge.
        predictors: those of the point of evaluation.
        num_experts: k.
        ridge: () coefficient in nats.
        columns: the columns whose coefficients are free; None for all.
    """
    gates = gate_columns(predictors.rows[num_experts:], columns)
    of_expert, size = num_coefficients(gates.shape[1], False, columns)
    centring = gate_centring(num_experts, gates.dtype)
    first = num_experts * of_expert
    free = slice(first, first + (num_experts - 1) * size)
    second = ridge * jnp.kron(centring, jnp.eye(size, dtype=gates.dtype))
    return Curvature(
        curvature.log_likelihood - ridge * gate_penalty(gates),
        curvature.gradient.at[free].add(-ridge * (centring @ gates).reshape(-1)),
        curvature.observed.at[free, free].add(second),
        curvature.complete.at[free, free].add(second),
    )


def without(curvature: Curvature, held: Bool[jax.Array, " P"]) -> Curvature:
    """The curvature in the parameters that are not `held` (P,); that of the others is one, and their gradient zero."""
    return curvature._replace(
        gradient=jnp.where(held, 0.0, curvature.gradient),
        observed=without_rows(curvature.observed, held),
        complete=without_rows(curvature.complete, held),
    )


def without_rows(matrix: Float[jax.Array, "P P"], held: Bool[jax.Array, " P"]) -> Float[jax.Array, "P P"]:
    """(P, P): the matrix with the rows and columns of `held` (P,) parameters replaced by those of the identity."""
    return jnp.where(held[:, None] | held[None], jnp.eye(held.shape[0], dtype=matrix.dtype), matrix)
