r"""The global maximum of the likelihood, as far as it can be had: many starts, halving, moves between optima, polish.

The likelihood of a mixture of experts has many local maxima; from one random start, EM reaches the best one with a probability
that may be a few in a thousand. `multistart` looks for it in four stages:

1. Spectral starts and random ones (unit-norm experts, zero gates) run EM side by side, and after every few passes only the
   better part goes on (successive halving: Jamieson and Talwalkar 2016).
2. What is left is a population of distinct optima. Each round makes children of it, by moves that EM itself cannot make (an expert
   dropped and another split in two, as in Ueda et al. 2000; an expert drawn anew; experts taken from two parents), runs EM on
   all, and keeps the best distinct ones.
3. The last few go on with the whole sample: the search itself takes at most SEARCH_SAMPLES of it, chosen at random.
4. The best is polished to the maximum.
"""

from __future__ import annotations

from typing import Any

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
from moejax.polish import polish

DEFAULT_STARTS = 256
"""Random starts where `num_starts` says nothing."""
SEARCH_SAMPLES = 4096
HALVING = ((1, 10), (4, 30), (16, 60))
"""(d, p): the best 1/d of the starts make p passes."""
POPULATION = 12
NUM_ROUNDS = 7
CHILDREN_PER_PARENT = 5
CHILD_PASSES = 50
NUM_FINALISTS = 3
FINAL_PASSES = 20
SAME_OPTIMUM = 1e-3
"""Optima whose log-likelihoods differ by less than this, in nats per square root of the number of samples, count as one."""
NOISE_OF_CHILDREN = 1.5
"""The noise of a child, relative to its parent's: samples then find their way to another expert."""
SIDE_BY_SIDE = 8
"""Mixtures in one batch of EM: their arrays still fit a core's cache together."""
FEWEST_FOR_MOVES = 16
"""Random starts below which no moves are made: then it is a spectral start beside a few random ones."""


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
    params: MoEParams, values: jax.Array, count: int, same: Any = None
) -> tuple[MoEParams, jax.Array]:
    """The `count` best of (s, ...) mixtures, best first; with `same` (), those within it of a better one come last."""
    order = jnp.argsort(-values)
    ranked = values[order]
    if same is not None:
        repeated = jnp.concatenate([jnp.zeros(1, bool), ranked[:-1] - ranked[1:] < same])
        order = order[jnp.argsort(repeated, stable=True)]
    kept = order[:count]
    return jax.tree.map(lambda leaf: leaf[kept], params), values[kept]


def move(key: jax.Array, parent: MoEParams, other: MoEParams) -> MoEParams:
    """A child of a mixture: one expert dropped and another split, or an expert drawn anew, or experts of two parents."""
    kind_key, choice_key, draw_key = jax.random.split(key, 3)
    k, d = parent.experts.shape
    dtype = parent.experts.dtype
    # gates without a reference expert, so that those of two parents can stand side by side
    parent, other = (
        p._replace(gating=p.gating - p.gating.mean(axis=0), gating_bias=p.gating_bias - p.gating_bias.mean())
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


def multistart(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The best of spectral and random starts, by halving, moves between optima and polish (see the module).

    `config.num_starts` random starts (None: DEFAULT_STARTS), `config.max_iterations` passes of the polish. With fewer than
    FEWEST_FOR_MOVES random starts, no moves are made.
    """
    sample_key, start_key, spectral_key, move_key = jax.random.split(key, 4)
    num_starts = DEFAULT_STARTS if config.num_starts is None else config.num_starts
    small = search_sample(sample_key, problem)
    params = scaled_starts(start_key, small, config, num_starts)
    num_passes = jnp.asarray(0, jnp.int32)
    for divisor, passes in HALVING:
        count = max(num_starts // divisor, min(num_starts, POPULATION))
        params, values = climb(params, small, config, passes)
        next_divisor = divisor * 4
        params, values = keep_best(params, values, max(num_starts // next_divisor, min(count, POPULATION)))
        num_passes += passes * count
    estimate = None
    if problem.transforms is not None:
        start = spectral(spectral_key, problem, config)
        estimate = start.spectral
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
        led = jax.tree.map(lambda leaf: leaf[None], gates.params)
        led, led_value = climb(led, small, config, HALVING[-1][1])
        params, values = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), (params, values), (led, led_value)
        )
        num_passes += gates.num_steps + HALVING[-1][1]
    population = min(POPULATION, values.shape[0])
    same = SAME_OPTIMUM * jnp.sqrt(small.weights.sum())
    params, values = keep_best(params, values, population, same)
    if num_starts >= FEWEST_FOR_MOVES and config.num_experts > 1:

        def advance(
            state: tuple[MoEParams, jax.Array], key: jax.Array
        ) -> tuple[tuple[MoEParams, jax.Array], None]:
            parents, _ = state
            choice_key, move_key = jax.random.split(key)
            count = population * CHILDREN_PER_PARENT
            others = jax.random.randint(choice_key, (count,), 0, population)
            mine = jnp.arange(count, dtype=others.dtype) % population
            children = jax.vmap(move)(
                jax.random.split(move_key, count),
                *(jax.tree.map(lambda leaf, i=i: leaf[i], parents) for i in (mine, others)),
            )
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parents, children)
            return keep_best(*climb(both, small, config, CHILD_PASSES), population, same), None

        (params, values), _ = jax.lax.scan(advance, (params, values), jax.random.split(move_key, NUM_ROUNDS))
        num_passes += NUM_ROUNDS * population * (1 + CHILDREN_PER_PARENT) * CHILD_PASSES

    finalists = min(NUM_FINALISTS, population)
    params, final_values = climb(
        jax.tree.map(lambda leaf: leaf[:finalists], params), problem, config, FINAL_PASSES
    )
    best, _ = keep_best(params, final_values, 1)
    fitted = jax.tree.map(lambda leaf: leaf[0], best)
    if config.noise == "known":
        fitted = fitted._replace(noise_std=jnp.full_like(fitted.noise_std, problem.noise_std))
    run = polish(
        fitted,
        problem.x,
        problem.y,
        problem.weights,
        fn=config.fn,
        num_steps=config.max_iterations,
        noise=config.noise,
        fit_intercept=config.fit_intercept,
        ridge=config.ridge,
    )
    num_passes += finalists * FINAL_PASSES + run.num_steps
    result = finish(run.params, run.history, num_passes, run.converged, problem, estimate)
    return with_path(result._replace(optima=values), config, run.path)


register_method("multistart", multistart, moments="optional")
