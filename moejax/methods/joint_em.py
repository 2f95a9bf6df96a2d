"""Joint EM from random or k-means starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.likelihood.blocks import sample_blocks, sum_over_blocks
from moejax.likelihood.em import EMRun, joint_em
from moejax.likelihood.free_columns import expert_inputs
from moejax.likelihood.predictors import weighted_gram
from moejax.methods.method import MethodConfig, MethodResult, Problem, finish, least_noise_of, with_path
from moejax.methods.starts import (
    index_of_best,
    number_of_starts,
    random_starts,
    start_noise,
    with_experts_inputs,
    zero_gates,
)
from moejax.model.activations import ScalarFunction, activation_and_slope
from moejax.model.family import activation_of, as_family
from moejax.model.mixture import MoEParams
from moejax.model.small_linear_algebra import solve_positive_definite

# Joint EM

CLUSTERWISE_PASSES = 10
CLUSTERWISE_DAMPING = 1e-2
"""Damping relative to the Gram matrix that a cluster of mean size would have with a linear g."""


def clusterwise_regression(
    experts: Float[jax.Array, "k d"],
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    fn: ScalarFunction,
    num_steps: int = CLUSTERWISE_PASSES,
) -> tuple[Float[jax.Array, "k d"], Float[jax.Array, ""]]:
    """k-means with regressions for centres (Spaeth 1979): each sample goes to the expert that predicts it best.

    It minimises sum_j weights_j (y_j - g(a_{z_j} . x_j))^2 over assignments z and experts a in turn: the assignment exactly, each
    expert by one Gauss-Newton step, slightly damped, on its own samples (least squares for a linear g).

    Args:
        experts: (k, d) to start from.
        x: (n, d).
        y: (n,).
        weights: (n,) sample weights.
        fn: g.
        num_steps: passes over the data.

    Returns:
        experts (k, d) with the least loss of all passes, and its root mean square residual ().
    """
    k, dim = experts.shape
    blocks = sample_blocks(x, y, weights, fit_intercept=False)
    total = weights.sum()
    floor = CLUSTERWISE_DAMPING * total / k * jnp.eye(dim, dtype=x.dtype)

    def step(state: tuple[jax.Array, jax.Array, jax.Array], _: None):
        experts, best, least = state

        def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
            mean, slope = activation_and_slope(fn, experts @ design)
            error = y[None] - mean
            nearest = jnp.argmin(error**2, axis=0)
            own_weights = weights[None] * (nearest[None] == jnp.arange(k)[:, None]).astype(y.dtype)
            gradient = (own_weights * slope * error) @ design.T
            return jnp.sum(own_weights * error**2), gradient, weighted_gram(design, own_weights * slope**2)

        loss, gradient, gram = sum_over_blocks(sums_of, blocks)
        improved = loss < least  # False if it is not finite
        best, least = jnp.where(improved, experts, best), jnp.where(improved, loss, least)
        moved = experts + solve_positive_definite(gram + floor[None], gradient)
        return (jnp.where(jnp.isfinite(moved), moved, experts), best, least), None

    start = (experts, experts, jnp.asarray(jnp.inf, x.dtype))
    (_, best, least), _ = jax.lax.scan(step, start, length=num_steps)
    return best, jnp.sqrt(least / total)


def joint_em_starts(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Joint EM (Jordan and Jacobs 1994) from `num_starts` starts; the run with the highest likelihood is kept.

    Each run has `max_iterations` EM steps and no polish. It starts at zero gates and at experts on the unit sphere; with `start`
    "kmeans", clusterwise regression improves these first. The noise starts at the labels' standard deviation ("kmeans": at the
    residuals') and is estimated; a known noise is restored for the second half of the steps. `config.expert_steps` is the number of
    Gauss-Newton steps of the experts in each.
    """
    spread = start_noise(problem, config)
    data = (problem.x, problem.y, problem.weights)
    common = {
        "fn": config.fn,
        "fit_intercept": config.fit_intercept,
        "ridge": config.ridge,
        "record_path": config.record_path,
        "least_noise": least_noise_of(problem, config),
        "columns": config.columns,
        "expert_steps": config.expert_steps,
    }

    def run(start: MoEParams) -> EMRun:
        if config.start == "kmeans":
            own = expert_inputs(start.experts, config.columns), expert_inputs(problem.x, config.columns)
            experts, residual = clusterwise_regression(*own, *data[1:], fn=activation_of(config.fn))
            start = zero_gates(experts, jnp.where(jnp.isfinite(residual), residual, spread))
            start = with_experts_inputs(start, config)
        if config.noise != "known" or not as_family(config.fn).has_dispersion:
            return joint_em(start, *data, num_steps=config.max_iterations, noise=config.noise, **common)

        def stage(params: MoEParams, noise_known: jax.Array):
            known = jnp.broadcast_to(problem.noise_std, params.noise_std.shape)
            params = params._replace(noise_std=jnp.where(noise_known, known, params.noise_std))
            budget = max(config.max_iterations // 2, 1)
            run = joint_em(params, *data, num_steps=budget, noise="shared", hold_noise=noise_known, **common)
            return run.params, run

        _, runs = jax.lax.scan(stage, start, jnp.asarray([False, True]))
        last = jax.tree.map(lambda leaf: leaf[-1], runs)
        path = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), runs.path)
        return last._replace(history=runs.history.reshape(-1), num_steps=runs.num_steps.sum(), path=path)

    runs = jax.lax.map(run, random_starts(key, problem, config, number_of_starts(config), spread))
    kept = jax.tree.map(lambda leaf: leaf[index_of_best(runs.log_likelihood)], runs)
    passes = runs.num_steps.sum(dtype=jnp.int32)
    if config.start == "kmeans":
        passes = passes + CLUSTERWISE_PASSES * number_of_starts(config)
    result = finish(kept.params, kept.history, passes, kept.converged, problem, None)
    return with_path(result, config, kept.path)
