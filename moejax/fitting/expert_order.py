"""The order in which a fit reports its experts: by their shares of the samples, so that two seeds print the same table."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moejax.fitting.data_units import DataUnits
from moejax.likelihood.derivatives import Curvature
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.methods.method import MethodResult, Problem
from moejax.model.mixture import MoEParams, NoiseModel, permute_experts

EQUAL_SHARES = 1e-9
"""Shares that differ by less than this, or by rounding, are equal."""


def order_of_experts(counts: np.ndarray, first_coefficients: np.ndarray, rounding: float = 0.0) -> np.ndarray:
    """(k,) indices of the experts by decreasing effective samples; equal ones by their first coefficient.

    >>> order_of_experts(np.array([10.0, 30.0, 10.0]), np.array([0.5, 0.0, -0.5])).tolist()
    [1, 2, 0]

    Args:
        counts: (k,) sums of responsibilities.
        first_coefficients: (k,)
        rounding: relative rounding error of the counts, if it is more than EQUAL_SHARES.
    """
    falling = np.argsort(-counts, kind="stable")
    steps = -np.diff(counts[falling]) > max(EQUAL_SHARES, rounding) * counts.sum()
    rank = np.empty(len(counts), int)
    rank[falling] = np.concatenate([[0], np.cumsum(steps)])
    return np.lexsort((first_coefficients, rank))


def order_in(params: MoEParams, posterior: jax.Array, problem: Problem, units: DataUnits) -> np.ndarray:
    """(k,) the order of a fit's experts, as they are if a number is not finite.

    Args:
        params: the estimate in the units of the fit.
        posterior: (n, k) responsibilities.
        problem: the sample.
        units: those of the data, in which the first coefficients are compared.

    Raises:
        ValueError: double precision cannot represent the parameters in the user's units.
    """
    counts = np.asarray(problem.weights, np.float64) @ np.asarray(posterior, np.float64)
    first = units.params(params).experts.reshape(len(counts), -1)[:, 0]
    if not (np.isfinite(counts).all() and np.isfinite(first).all()):
        return np.arange(len(counts))
    return order_of_experts(counts, first, 8.0 * float(np.finfo(np.asarray(posterior).dtype).eps))


def in_order(
    result: MethodResult, posterior: jax.Array, problem: Problem, units: DataUnits
) -> tuple[MethodResult, jax.Array]:
    """An estimate and its responsibilities (n, k) with the experts in their order; arguments as in `order_in`."""
    order = order_in(result.params, posterior, problem, units)
    if np.array_equal(order, np.arange(len(order))):
        return result, posterior
    weights = jax.device_put(np.asarray(result.mixing_weights)[order])
    posterior = jax.device_put(np.asarray(posterior)[:, order])
    return result._replace(params=reordered(result.params, order), mixing_weights=weights), posterior


def reordered(params: MoEParams, order: np.ndarray) -> MoEParams:
    """Parameters with expert order[i] at i, in their precision; on the host, where it takes no program."""
    host = MoEParams(*(np.asarray(leaf) for leaf in params))
    return jax.device_put(permute_experts(host, order))


def curvature_in_order(
    curvature: Curvature, params: MoEParams, order: np.ndarray, *, noise: NoiseModel, fit_intercept: bool
) -> Curvature:
    """The curvature at `reordered(params, order)`, from that at `params`: either's free parameters are linear in the other's."""
    free: dict[str, Any] = {"noise": noise, "fit_intercept": fit_intercept}
    there, back = reordered(params, order), np.argsort(order)

    def before(after: jax.Array) -> jax.Array:
        return free_parameters(permute_experts(params_from_free(after, there, **free), back), **free)

    jacobian = jax.jacfwd(before)(free_parameters(there, **free))
    return curvature._replace(
        gradient=jacobian.T @ curvature.gradient,
        observed=jacobian.T @ curvature.observed @ jacobian,
        complete=jacobian.T @ curvature.complete @ jacobian,
    )
