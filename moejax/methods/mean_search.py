r"""The mean fit: y = f(x) + noise, f(x) = sum_i P_i(x) g(a_i . x + b_i), by penalised least squares.

The parameters are those of the mixture, but the labels' density is N(y; f(x), s^2): experts are blended, not chosen. It suits data
that are a function plus noise. The sum of squares has many local minima; several growths (`methods.growth`) look for good ones, and
their ends are climbed by Levenberg-Marquardt on all rows, with the ridges on slopes and gates and the noise by evidence
(`likelihood.evidence`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.evidence import Evidence, maximise_evidence
from moejax.likelihood.padded import Objective, Ridge, params_of_padded
from moejax.methods.growth import Grown, GrowthRules, grow
from moejax.methods.method import MethodConfig, MethodResult, Problem, finish, with_path
from moejax.methods.search_sample import in_single_precision
from moejax.methods.stages import stage
from moejax.model.family import activation_of
from moejax.model.mixture import with_stand_ins

NUM_GROWTHS = 8
"""Growths of a mean fit, with different random splits, if `num_starts` is None."""
GROWTH_ROWS = 4096
"""The growths use at most this many random rows."""
PLACES = (4, 8, 12)
"""Sizes of the arrays of experts: those of k experts have the least of these sizes that holds them, else k."""
PATIENCE = 4
"""A growth ends after so many numbers of experts without a better score."""
LAST_ROUNDS, LAST_STEPS = 8, 100
"""Rounds of evidence on all rows, and passes of each."""
LAST_TOLERANCE = 1e-3
"""nats"""
THREADS = 2
"""Growths that run at once, on a machine with so many cores."""


def places_for(num_experts: int) -> int:
    """The size of the arrays that hold `num_experts` experts."""
    return next((size for size in PLACES if size >= num_experts), num_experts)


@stage(static=("config", "objective", "places", "patience"), fast=True)
def growth_from(
    rows_key: jax.Array,
    key: jax.Array,
    problem: Problem,
    rules: GrowthRules,
    *,
    config: MethodConfig,
    objective: Objective,
    places: int,
    patience: int | None,
) -> Grown:
    """Leaves (K, ..): a growth from a key, on at most GROWTH_ROWS rows that `rows_key` draws."""
    x, y, weights = problem.x, problem.y, problem.weights
    if x.shape[0] > GROWTH_ROWS:
        draw = jax.random.uniform(rows_key, weights.shape, weights.dtype)
        rows = jax.lax.top_k(jnp.where(weights > 0, draw, -1.0), GROWTH_ROWS)[1]
        x, y, weights = x[rows], y[rows], weights[rows]
    x, y = with_stand_ins(weights, x, y)
    problem = in_single_precision(problem._replace(x=x, y=y, weights=weights), config.fn)
    x, y, weights = problem.x, problem.y, problem.weights
    design = jnp.concatenate([x.T, jnp.ones_like(y)[None]]) if config.fit_intercept else x.T
    limits = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), rules)
    rules = limits._replace(most=jnp.asarray(rules.most, jnp.int32))
    with jax.default_matmul_precision("highest"):
        return grow(
            key,
            sample_blocks(x, y, weights, fit_intercept=config.fit_intercept),
            (design, y, weights),
            rules,
            fn=activation_of(config.fn),
            objective=objective,
            places=places,
            fit_intercept=config.fit_intercept,
            patience=patience,
        )


class Request(NamedTuple):
    """Growths of one objective."""

    objective: Objective
    keys: jax.Array
    """(g,)"""
    rules: GrowthRules


def growths_of(
    rows_key: jax.Array,
    requests: Sequence[Request],
    problem: Problem,
    *,
    config: MethodConfig,
    places: int,
) -> list[Grown]:
    """For each request the growths from its keys, leaves (g, K, ..).

    They run in THREADS threads, which change no result. The first ones of the requests compile side by side, before the others
    start.
    """
    # JAX's settings by context hold in one thread only
    double, device = jnp.result_type(float) == np.float64, jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    jobs = [
        (request, index)
        for index in range(max(len(r.keys) for r in requests))
        for request in requests
        if index < len(request.keys)
    ]

    def run(job: tuple[Request, int]) -> Grown:
        request, index = job
        with jax.enable_x64(double), jax.default_device(device):
            return growth_from(
                rows_key,
                request.keys[index],
                problem,
                request.rules,
                config=config,
                objective=request.objective,
                places=places,
                patience=PATIENCE,
            )

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        first = list(pool.map(run, jobs[: len(requests)]))
        grown = [*first, *pool.map(run, jobs[len(requests) :])]
    of_request = [
        [one for (owner, _), one in zip(jobs, grown, strict=True) if owner is request] for request in requests
    ]
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *some) for some in of_request]


@stage(static=("config", "fixed_ridge"), fast=True)
def refined(
    rows: Float[jax.Array, "rows D"],
    number: Int[jax.Array, ""] | int,
    variance: Float[jax.Array, ""],
    ridge: Ridge,
    problem: Problem,
    *,
    config: MethodConfig,
    fixed_ridge: bool,
) -> Evidence:
    """The end of a growth (2 K, D) with `number` experts, at its optimum on all rows."""
    blocks = sample_blocks(problem.x, problem.y, problem.weights, fit_intercept=config.fit_intercept)
    with jax.default_matmul_precision("highest"):
        return maximise_evidence(
            rows,
            jnp.arange(rows.shape[0] // 2) < number,
            variance,
            ridge,
            blocks,
            fn=activation_of(config.fn),
            fit_intercept=config.fit_intercept,
            num_rounds=LAST_ROUNDS,
            num_steps=min(LAST_STEPS, config.max_iterations),
            tolerance=LAST_TOLERANCE,
            fixed_ridge=fixed_ridge,
        )


def mean_fit(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The mean fit of `config.num_experts` experts: the best of `config.num_starts` growths (None: NUM_GROWTHS) by evidence.

    The noise of the result is s for every expert. `history` is the log-likelihood of N(y; f(x), s^2) at the end.
    """
    k = config.num_experts
    keys = jax.random.split(key, NUM_GROWTHS if config.num_starts is None else config.num_starts)
    rules = GrowthRules(k, jnp.inf, None)

    def one(some: jax.Array) -> Grown:
        return growth_from(
            keys[0], some, problem, rules, config=config, objective="mean", places=k, patience=None
        )

    grown = jax.lax.map(one, keys)
    best = jnp.argmax(grown.score[:, k - 1])
    rows, variance, ridge = jax.tree.map(
        lambda leaf: leaf[best, k - 1].astype(problem.x.dtype), (grown.rows, grown.variance, grown.ridge)
    )
    end = refined(rows, k, variance, ridge, problem, config=config, fixed_ridge=False)
    return mean_result(end, k, grown.num_passes.sum(dtype=jnp.int32), problem, config)


def mean_result(
    end: Evidence, num_experts: int, num_passes: jax.Array, problem: Problem, config: MethodConfig
) -> MethodResult:
    """The result of a mean fit, from its refined end and the passes before that."""
    params = params_of_padded(end.rows, end.variance, num_experts, fit_intercept=config.fit_intercept)
    converged = end.converged & jnp.isfinite(end.log_evidence)
    result = finish(params, end.log_likelihood[None], num_passes + end.num_passes, converged, problem, None)
    return with_path(result, config, jax.tree.map(lambda leaf: leaf[None], params))
