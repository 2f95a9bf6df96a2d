r"""The global maximum of the likelihood, as far as it can be had: many starts, moves between optima, halving, polish.

The likelihood of a mixture of experts has many local maxima; from one random start, EM reaches the best one with a probability
that may be a few in a thousand. `multistart` looks for it in generations of mixtures that run EM side by side:

1. The first generations are spectral starts and random ones (unit-norm experts, zero gates). After every few passes only the best
   distinct ones go on, as the population: successive halving (Jamieson and Talwalkar 2016) with fresh starts in the free places.
2. In the later ones the free places go to children of the population, by moves that EM itself cannot make: an expert dropped and
   another split in two (Ueda et al. 2000), an expert drawn anew, an expert taken from another mixture.
3. The last few are polished to their maxima on the whole sample (the generations see at most SEARCH_SAMPLES of it, chosen at
   random), and the best is the result.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moejax.activations import activation_facts
from moejax.em import gating_em, joint_em
from moejax.gaussian import standard_normal
from moejax.methods import (
    GATING_STEPS,
    GATING_TOLERANCE,
    MethodConfig,
    MethodResult,
    Problem,
    finish,
    label_spread,
    random_starts,
    register_method,
    spectral,
    with_path,
)
from moejax.model import MoEParams, regauge, unit_rows
from moejax.polish import PolishRun, polish
from moejax.spectral import SpectralEstimate

DEFAULT_STARTS = 256
"""Random starts where `num_starts` says nothing."""
SEARCH_SAMPLES = 2048
POPULATION = 12
NEWCOMERS = 60
"""In each generation, beside the population."""
GENERATIONS_OF_CHILDREN = 7
FEWEST_FOR_CHILDREN = 16
"""Random starts below which there are no children: then it is a spectral start beside a few random ones."""
PASSES = 40
"""EM passes of a generation."""
NUM_FINALISTS = 3
SAME_OPTIMUM = 1e-3
"""Optima whose log-likelihoods differ by less than this, in nats per square root of the number of samples, count as one."""
NOISE_OF_CHILDREN = 1.5
"""The noise of a child, relative to its parent's: samples then find their way to another expert."""
SIDE_BY_SIDE = 8
"""Mixtures in one batch of EM: their arrays still fit a core's cache together."""


def scaled_starts(key: jax.Array, problem: Problem, config: MethodConfig, num_starts: int) -> MoEParams:
    """`random_starts` with the labels' standard deviation as noise.

    For a homogeneous g, whose experts have no scale of their own, they get that of the labels, and their mean.
    """
    spread, facts = label_spread(problem), activation_facts(config.fn)
    starts = random_starts(key, problem, config, num_starts, spread)
    if not facts.homogeneous:
        return starts
    scale = spread / facts.standard_deviation
    starts = starts._replace(experts=scale * starts.experts, expert_bias=scale * starts.expert_bias)
    if config.fit_intercept:
        mean = problem.y @ problem.weights / problem.weights.sum()
        starts = starts._replace(expert_bias=starts.expert_bias + mean)
    return starts


def search_sample(key: jax.Array, problem: Problem) -> Problem:
    """The problem on at most SEARCH_SAMPLES rows, those of positive weight drawn without replacement."""
    if problem.x.shape[0] <= SEARCH_SAMPLES:
        return problem
    draw = jax.random.uniform(key, problem.y.shape, problem.y.dtype)
    _, rows = jax.lax.top_k(jnp.where(problem.weights > 0, draw, -1.0), SEARCH_SAMPLES)
    return problem._replace(x=problem.x[rows], y=problem.y[rows], weights=problem.weights[rows])


def climb(
    starts: MoEParams, problem: Problem, config: MethodConfig, num_steps: int
) -> tuple[MoEParams, jax.Array]:
    """EM from every start: (s, ...) parameters and (s,) log-likelihoods, minus infinity where it broke down.

    The noise is shared and free, known or not: a start that is far off explains its labels by noise first.
    """

    def run(start: MoEParams) -> tuple[MoEParams, jax.Array]:
        end = joint_em(
            start,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=num_steps,
            fit_intercept=config.fit_intercept,
            noise="shared",
            ridge=config.ridge,
        )
        return end.params, jnp.where(jnp.isfinite(end.log_likelihood), end.log_likelihood, -jnp.inf)

    return jax.lax.map(run, starts, batch_size=min(SIDE_BY_SIDE, starts.noise_std.shape[0]))


def keep_best(
    params: MoEParams, values: jax.Array, count: int, same: jax.Array | float
) -> tuple[MoEParams, jax.Array]:
    """The `count` best of (s, ...) mixtures, best first, but those within `same` of a better one last."""
    order = jnp.argsort(-values)
    ranked = values[order]
    repeated = jnp.concatenate([jnp.zeros(1, bool), ranked[:-1] - ranked[1:] < same])
    kept = order[jnp.argsort(repeated, stable=True)][:count]
    return jax.tree.map(lambda leaf: leaf[kept], params), values[kept]


def move(key: jax.Array, parent: MoEParams, other: MoEParams) -> MoEParams:
    """A child of a mixture: one expert dropped and another split, or an expert drawn anew, or experts of two parents."""
    kind_key, choice_key, draw_key = jax.random.split(key, 3)
    k, d = parent.experts.shape
    dtype = parent.experts.dtype
    # gates without a reference expert, so that those of two parents can stand side by side
    parent, other = (
        p._replace(
            gating=p.gating - p.gating.mean(axis=0, keepdims=True),
            gating_bias=p.gating_bias - p.gating_bias.mean(),
        )
        for p in (parent, other)
    )
    order = jax.random.permutation(choice_key, k)
    dropped, chosen = order[0], order[-1]
    draws = standard_normal(draw_key, (4, d + 1), dtype)
    size = jnp.sqrt(jnp.mean(parent.experts**2)) + jnp.finfo(dtype).tiny

    def split(p: MoEParams) -> MoEParams:
        """Two copies of an expert, apart by a random direction of its coefficients and of its gate."""
        expert, gate = 0.5 * size * draws[0, :d], draws[1, :d]
        return p._replace(
            experts=p.experts.at[dropped].set(p.experts[chosen] - expert).at[chosen].add(expert),
            gating=p.gating.at[dropped].set(p.gating[chosen] - gate).at[chosen].add(gate),
            expert_bias=p.expert_bias.at[dropped].set(p.expert_bias[chosen]),
            gating_bias=p.gating_bias.at[dropped].set(p.gating_bias[chosen]),
        )

    def redraw(p: MoEParams) -> MoEParams:
        """An expert in a random direction, chosen everywhere alike."""
        return p._replace(
            experts=p.experts.at[dropped].set(
                jnp.sqrt(jnp.asarray(d, dtype)) * size * unit_rows(draws[2, :d])
            ),
            gating=p.gating.at[dropped].set(0.0),
            expert_bias=p.expert_bias.at[dropped].set(p.expert_bias.mean()),
            gating_bias=p.gating_bias.at[dropped].set(0.0),
        )

    def cross(p: MoEParams) -> MoEParams:
        """One expert replaced by one of another mixture."""
        return MoEParams(*(mine.at[dropped].set(yours[chosen]) for mine, yours in zip(p, other, strict=True)))

    child = jax.lax.switch(jax.random.randint(kind_key, (), 0, 3), [split, redraw, cross], parent)
    return regauge(child._replace(noise_std=NOISE_OF_CHILDREN * parent.noise_std))


def spectral_starts(
    key: jax.Array, problem: Problem, small: Problem, config: MethodConfig
) -> tuple[MoEParams | None, SpectralEstimate | None, jax.Array]:
    """Leaves (s, ..): experts from the moments of each order of transforms, with gates by EM on the small sample.

    Returns:
        The starts; the moments' diagnostics, of the first order; () int32 passes over the data.
    """
    starts, estimates, num_passes = [], [], jnp.asarray(0, jnp.int32)
    given = () if problem.transforms is None else ((config.order, problem.transforms),)
    for order, transforms in (*given, *zip(config.more_orders, problem.more_transforms, strict=True)):
        start = spectral(
            key,
            problem._replace(transforms=transforms),
            dataclasses.replace(config, order=order, record_path=False),
        )
        gates = gating_em(
            start.params,
            small.x,
            small.y,
            small.weights,
            fn=config.fn,
            num_steps=GATING_STEPS,
            noise="shared",
            tolerance=GATING_TOLERANCE,
            fit_intercept=config.fit_intercept,
            ridge=config.ridge,
        )
        starts.append(gates.params)
        estimates.append(start.spectral)
        num_passes = num_passes + start.num_iterations + gates.num_steps
    if not starts:
        return None, None, num_passes
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts), estimates[0], num_passes


def multistart(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The best of spectral and random starts and of moves from there, polished (see the module).

    At least `config.num_starts` random starts (None: DEFAULT_STARTS; beyond the first population they come in whole generations),
    `config.max_iterations` passes of each polish. With fewer than FEWEST_FOR_CHILDREN, no moves are made. Passes over the search's
    sample count as whole ones in `num_iterations`, also where it is a small part of the data.
    """
    sample_key, start_key, spectral_key, search_key = jax.random.split(key, 4)
    num_starts = DEFAULT_STARTS if config.num_starts is None else config.num_starts
    small = search_sample(sample_key, problem)
    same = SAME_OPTIMUM * jnp.sqrt(small.weights.sum())
    led, estimate, num_passes = spectral_starts(spectral_key, problem, small, config)
    num_led = 0 if led is None else led.noise_std.shape[0]

    num_fresh = max(-(-(num_starts - POPULATION + num_led) // NEWCOMERS), 0)
    has_children = num_starts >= FEWEST_FOR_CHILDREN and config.num_experts > 1
    num_newcomers = NEWCOMERS if has_children or num_fresh else 0
    size = min(POPULATION, num_starts + num_led)
    parents = scaled_starts(start_key, small, config, size)
    if led is not None:
        parents = jax.tree.map(lambda first, rest: jnp.concatenate([first, rest])[:size], led, parents)

    def advance(parents: MoEParams, inputs: tuple[jax.Array, jax.Array]) -> tuple[MoEParams, jax.Array]:
        key, is_fresh = inputs
        candidates = parents
        if num_newcomers:
            fresh_key, other_key, move_key = jax.random.split(key, 3)
            fresh = scaled_starts(fresh_key, small, config, num_newcomers)
            others = jax.random.randint(other_key, (num_newcomers,), 0, size)
            mine = jnp.arange(num_newcomers, dtype=others.dtype) % size
            pairs = (
                jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], parents) for chosen in (mine, others)
            )
            children = jax.vmap(move)(jax.random.split(move_key, num_newcomers), *pairs)
            candidates = jax.tree.map(
                lambda old, new, child: jnp.concatenate([old, jnp.where(is_fresh, new, child)]),
                parents,
                fresh,
                children,
            )
        best, values = keep_best(*climb(candidates, small, config, PASSES), size, same)
        return best, values

    num_generations = max(num_fresh + GENERATIONS_OF_CHILDREN * has_children, 1)
    are_fresh = jnp.arange(num_generations) < num_fresh
    population, values = jax.lax.scan(
        advance, parents, (jax.random.split(search_key, num_generations), are_fresh)
    )
    num_passes = num_passes + num_generations * (size + num_newcomers) * PASSES

    def finish_one(params: MoEParams) -> PolishRun:
        if config.noise == "known":
            params = params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))
        return polish(
            params,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=config.max_iterations,
            noise=config.noise,
            fit_intercept=config.fit_intercept,
            ridge=config.ridge,
            record_path=config.record_path,
        )

    finalists = jax.tree.map(lambda leaf: leaf[: min(NUM_FINALISTS, size)], population)
    runs = jax.lax.map(finish_one, finalists)
    best = jnp.argmax(jnp.where(jnp.isfinite(runs.log_likelihood), runs.log_likelihood, -jnp.inf))
    run = jax.tree.map(lambda leaf: leaf[best], runs)
    num_passes = num_passes + runs.num_steps.sum(dtype=jnp.int32)
    result = finish(run.params, run.history, num_passes, run.converged, problem, estimate)
    return with_path(result._replace(optima=values[-1]), config, run.path)


register_method("multistart", multistart, moments="optional")
