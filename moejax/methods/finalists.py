"""The end of a search: its best mixtures are polished on the whole sample, unless they have lost already."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from moejax.likelihood.em import EMRun, joint_em
from moejax.likelihood.polish import PolishRun, polish
from moejax.methods.from_moments import em_before_polish
from moejax.methods.method import (
    Finalists,
    MethodConfig,
    MethodResult,
    Problem,
    SearchEnd,
    finish,
    least_noise_of,
    with_path,
)
from moejax.methods.population import collapsed_experts, in_precision_of, rows_of, side_by_side
from moejax.methods.search_plan import Plan, Search, more_parameters
from moejax.methods.stages import stage
from moejax.model.family import Channel, is_gaussian
from moejax.model.mixture import MoEParams, log_likelihood_per_sample

NUM_FINALISTS = 6
RULED_OUT = 5.0
"""A finalist has lost if its log-likelihood on the search's sample is this many standard errors of the difference behind."""
ROWS_FOR_PARAMETER = 10
"""With fewer rows for each parameter in the search's sample, its optima may be others than those of all rows."""
EM_STEPS_FOR_ONE = 10
"""EM passes allowed for each pass of the polish, if EM replaces it."""


def contenders(params: MoEParams, sample: Problem, fn: Channel) -> Bool[jax.Array, " s"]:
    """(s,): true for mixtures, leaves (s, ..), that may be as good as the first on the data that `sample` was drawn from.

    The difference of two log-likelihoods is a sum over the sample, and has a standard error (Vuong 1989).
    """
    densities = jax.lax.map(lambda one: log_likelihood_per_sample(one, sample.x, sample.y, fn), params)
    weights = sample.weights
    behind = jnp.where(weights > 0, densities[:1] - densities, 0.0)
    mean = behind @ weights / weights.sum()
    variance = (behind - mean[:, None]) ** 2 @ weights**2
    return ~(mean * weights.sum() > RULED_OUT * jnp.sqrt(variance))


def eligible_values(
    runs: PolishRun | EMRun, problem: Problem, config: MethodConfig
) -> Float[jax.Array, " s"]:
    """(s,): the log-likelihoods of runs, leaves (s, ..), minus infinity for those with a collapsed expert unless all have one.

    With a noise for each expert, a collapsed run may have a higher one than every proper run.
    """
    values = jnp.where(jnp.isfinite(runs.log_likelihood), runs.log_likelihood, -jnp.inf)
    if config.noise != "per_expert":
        return values
    least_noise = problem.resolution

    def proper(params: MoEParams) -> jax.Array:
        return ~collapsed_experts(params, problem, config, least_noise).any()

    eligible = jax.lax.map(proper, runs.params)
    among_eligible = jnp.where(eligible, values, -jnp.inf)
    return jnp.where(jnp.isfinite(among_eligible).any(), among_eligible, values)


@stage(static=("config", "plan"), fast=True)
def polished(search: Search, problem: Problem, *, config: MethodConfig, plan: Plan) -> MethodResult:
    """The best of the search's finalists, polished on the whole sample."""

    def finish_one(params: MoEParams) -> PolishRun | EMRun:
        if config.noise == "known":
            params = params._replace(noise_std=jnp.broadcast_to(problem.noise_std, params.noise_std.shape))
        maximise = polish if problem.y.ndim == 1 else joint_em
        return maximise(
            params,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=config.max_iterations * (1 if maximise is polish else EM_STEPS_FOR_ONE),
            noise=config.noise,
            fit_intercept=config.fit_intercept,
            ridge=config.ridge,
            record_path=config.record_path,
            least_noise=least_noise_of(problem, config),
            columns=config.columns,
        )

    is_part = search.sample.x.shape[0] < problem.x.shape[0]
    count = min(NUM_FINALISTS, plan.num_parents)
    may_win = jnp.isfinite(search.values[:count]).at[0].set(True)
    if is_part:
        may_win &= contenders(rows_of(search.population, slice(count)), search.sample, config.fn)
    may_win &= ~search.by_descent  # the runs of gradient descent lead by far
    finalists = in_precision_of(problem.x, rows_of(search.population, slice(count)))
    crowded = ROWS_FOR_PARAMETER * more_parameters(problem, config) > search.sample.x.shape[0]
    if is_part and plan.num_spectral and (crowded or not is_gaussian(config.fn)):
        # few rows, or labels that tell little, have other optima, but the moments are those of all rows
        starts = in_precision_of(problem.x, rows_of(search.drawn, slice(plan.num_spectral)))
        climbed = jax.lax.map(lambda start: em_before_polish(start, problem, config).params, starts)
        finalists = side_by_side(climbed, finalists)
        may_win = jnp.concatenate([jnp.ones(plan.num_spectral, bool), may_win])
    if search.descended is not None and search.descended_values is not None:
        finalists = side_by_side(in_precision_of(problem.x, search.descended), finalists)
        may_win = jnp.concatenate([jnp.isfinite(search.descended_values), may_win])
    untouched = jax.eval_shape(finish_one, rows_of(finalists, 0))

    def lost(_: MoEParams) -> PolishRun | EMRun:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), untouched)
        return nothing._replace(log_likelihood=jnp.full_like(nothing.log_likelihood, -jnp.inf))

    runs = jax.lax.map(
        lambda inputs: jax.lax.cond(inputs[0], finish_one, lost, inputs[1]), (may_win, finalists)
    )
    values = eligible_values(runs, problem, config)
    best = jnp.argmax(values)
    run = jax.tree.map(lambda leaf: leaf[best], runs)
    num_passes = search.num_passes + runs.num_steps.sum(dtype=jnp.int32)
    result = finish(run.params, run.history, num_passes, run.converged, problem, search.spectral)
    result = result._replace(
        optima=search.values.astype(problem.x.dtype),
        search=SearchEnd(search.num_starts, search.settled, search.by_descent, *search.optima),
        finalists=Finalists(runs.params, values),
    )
    return with_path(result, config, run.path)
