"""EM with a noise that is wide at first and falls slowly, for labels that show little of their expert until it is found.

A steep g such as tanh(4 t) makes labels near -1 and 1 only. From a random start the noise of joint EM falls to a local optimum's in
a few passes, and the responsibilities are then certain and wrong. Here the noise is held at a level that falls from the spread of
the labels, so that the responsibilities stay soft until the experts have separated: deterministic annealing (Rose, Gurewitz and
Fox 1990; Ueda and Nakano 1998) in the noise. Experts separate within a narrow range of levels, so the level must fall slowly there,
and it must begin above: levels that begin at 0.6 of the spread find nothing that joint EM does not find.

Sources: K. Rose, E. Gurewitz, G. Fox, Statistical mechanics and phase transitions in clustering, Physical Review Letters 65, 1990;
N. Ueda, R. Nakano, Deterministic annealing EM algorithm, Neural Networks 11, 1998.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.likelihood.em import EMRun, joint_em
from moejax.methods.from_moments import polish_from
from moejax.methods.global_search import scaled_starts, spectral_starts
from moejax.methods.method import MethodConfig, MethodResult, Problem, finish, least_noise_of, with_path
from moejax.methods.population import rows_of, side_by_side
from moejax.methods.starts import index_of_best, label_spread, without_offset
from moejax.model.mixture import MoEParams

NUM_LEVELS = 30
LEVEL_PASSES = 30
FIRST_LEVEL, LAST_LEVEL = 1.0, 0.15
"""Levels of the noise in units of the labels' spread, passes at each, the first and the last level; they fall by equal factors."""
FREE_PASSES = 100
"""Passes of EM with a free noise after the last level."""
ANNEALED_STARTS = 4
"""Random starts if `num_starts` is None."""


def noise_levels(problem: Problem) -> Float[jax.Array, " levels"]:
    """(NUM_LEVELS,) noise of each stage: falling by equal factors, and never below the noise of the label transforms."""
    shares = jnp.geomspace(FIRST_LEVEL, LAST_LEVEL, NUM_LEVELS, dtype=problem.x.dtype)
    return jnp.maximum(shares * label_spread(problem), problem.noise_std)


def annealed_run(
    start: MoEParams, problem: Problem, config: MethodConfig
) -> tuple[EMRun, Int[jax.Array, ""]]:
    """Joint EM from `start` with the noise held at each level in turn, then free; and all its passes over the data."""
    data = (problem.x, problem.y, problem.weights)
    common = {
        "fn": config.fn,
        "fit_intercept": config.fit_intercept,
        "noise": "per_expert" if config.noise == "per_expert" else "shared",
        "ridge": config.ridge,
        "least_noise": least_noise_of(problem, config),
        "columns": config.columns,
    }

    def stage(params: MoEParams, level: jax.Array) -> tuple[MoEParams, jax.Array]:
        held = params._replace(noise_std=jnp.broadcast_to(level, params.noise_std.shape))
        run = joint_em(held, *data, num_steps=LEVEL_PASSES, hold_noise=True, **common)
        return run.params, run.num_steps

    annealed, passes = jax.lax.scan(stage, start, noise_levels(without_offset(problem, config)))
    run = joint_em(annealed, *data, num_steps=FREE_PASSES, **common)
    return run, passes.sum(dtype=jnp.int32) + run.num_steps


def annealed_em(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Annealed EM from the experts of moments and from `num_starts` random starts; the best run is polished.

    A run takes up to NUM_LEVELS * LEVEL_PASSES passes, more than joint EM from a good start and far fewer than a search among
    many optima.
    """
    random_key, moment_key = jax.random.split(key)
    count = ANNEALED_STARTS if config.num_starts is None else config.num_starts
    starts = scaled_starts(random_key, problem, config, count)
    from_moments, estimate, num_passes = spectral_starts(moment_key, problem, config)
    if from_moments is not None:
        starts = side_by_side(from_moments, starts)
    runs, passes = jax.lax.map(lambda start: annealed_run(start, problem, config), starts)
    best = index_of_best(runs.log_likelihood)
    run = polish_from(rows_of(runs.params, best), problem, config)
    history = jnp.concatenate([runs.history[best], run.history])
    total = num_passes + passes.sum(dtype=jnp.int32) + run.num_steps
    result = finish(run.params, history, total, run.converged, problem, estimate)
    return with_path(result, config, run.path)
