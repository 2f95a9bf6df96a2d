r"""Search for the global maximum of the likelihood: many starts, moves between optima, halving, polish.

The likelihood of a mixture of experts has many local maxima; from one random start, EM reaches the best one with a probability
that may be a few in a thousand. `multistart` looks for it in generations of mixtures that run EM side by side:

1. Independent starts, spectral and random ones (unit-norm experts, zero gates), climb alone, in rounds of a few passes. The
   search is settled if, by the number of distinct optima that they reached, few starts lead to one that none of them reached,
   and several reached the best one (`distinct_optima`). For labels that the model made this is usual.
2. Otherwise a few runs of gradient descent on minibatches follow (`methods.descents`). The search is settled if nearly all of them
   reach one optimum, and no other start a better one.
3. Otherwise the first generations are more random starts. After every few passes only the best distinct mixtures (by the
   log-densities of the samples) go on, as the population: successive halving (Jamieson and Talwalkar 2016) with fresh starts in the
   free places.
4. In the later generations the free places go to children of the population, by moves that EM itself cannot make: an expert is
   dropped and another split in two (Ueda et al. 2000), an expert is drawn anew, or an expert comes from another mixture. Newcomers
   compete only with newcomers in their first generation, and with the population one generation later.
5. A ridge on the gates keeps them from saturating before experts have found their samples. In the last generations it falls to
   that of the fit: the best mixture with sharp gates is seldom the best one with soft gates, made sharp.
6. The last few are polished to their maxima on the whole sample, and the best is the result. The search uses at most
   `search_rows` random rows of it, in single precision; mixtures that are clearly worse on these are not polished. Several
   outputs are polished by EM.

The rule of 1 is wrong if better optima have a small share of the starts: with a share p they are missed by all N starts with
probability (1 - p)^N.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import sample_scale
from moejax.likelihood.free_columns import compact, expanded
from moejax.methods.descents import descents
from moejax.methods.finalists import polished
from moejax.methods.from_moments import spectral
from moejax.methods.method import MethodConfig, MethodResult, Problem
from moejax.methods.moves import children_of
from moejax.methods.population import (
    Mixtures,
    Optima,
    climb,
    distinct_optima,
    in_precision_of,
    keep_best,
    rows_of,
    side_by_side,
)
from moejax.methods.search_plan import (
    NEWCOMERS,
    NUM_DESCENTS,
    Plan,
    Search,
    more_parameters,
    plan_of,
    search_rows,
)
from moejax.methods.search_sample import SAME_MIXTURE, in_single_precision, search_ridge, search_sample
from moejax.methods.stages import stage
from moejax.methods.starts import label_mean, random_starts, start_noise, without_offset
from moejax.methods.third_moment import third_moment_experts, third_moment_passes
from moejax.model.family import channel_facts
from moejax.model.mixture import MoEParams
from moejax.moments.spectral import SpectralEstimate

PASSES = 15
"""EM passes of a generation."""
SMALLEST_RIDGE = 1e-9
"""Ridge of the last generation, per sample, if the fit's own is smaller: EM without a polish needs some ridge."""
ROUND_PASSES = 10
"""EM passes of a round of the independent starts."""
MOST_ROUNDS = 9
"""Rounds in which they may arrive at their optima."""
SAME_OPTIMUM = 1.0
"""`SAME_MIXTURE` for the ends of independent starts, which count as one optimum only if they have arrived at it."""
LARGEST_UNSEEN = 0.01
"""The search ends with the independent starts if the optima that they did not reach draw at most this share of all starts."""
FEWEST_AT_BEST = 3
"""It ends so only if this many starts, spectral or random, reached the best optimum."""
LEAST_GAIN = 10.0
"""And only if the best is better than one expert alone by this many nats for each further parameter. With less, the data have
optima of nearly equal likelihood, of which some draw few starts."""


def scaled_starts(key: jax.Array, problem: Problem, config: MethodConfig, num_starts: int) -> MoEParams:
    """`random_starts` with the labels' standard deviation as noise.

    For a homogeneous g, the experts get the scale of the labels and, with intercepts, their mean.
    """
    spread, facts = start_noise(problem, config), channel_facts(config.fn)
    starts = random_starts(key, problem, config, num_starts, spread)
    if not facts.homogeneous or problem.nuisances is not None:
        return starts
    starts = compact(starts, config.columns)  # the coefficient of an offset is not scaled
    shape = starts.expert_bias.shape
    scale = jnp.broadcast_to(spread / facts.standard_deviation, shape)
    bias = scale * starts.expert_bias
    if config.has_expert_biases:
        bias = bias + jnp.broadcast_to(label_mean(without_offset(problem, config)), shape)
    starts = starts._replace(experts=scale[..., None] * starts.experts, expert_bias=bias)
    return expanded(starts, config.columns)


def ridges_of(
    num_generations: int, num_last: int, problem: Problem, config: MethodConfig
) -> Float[jax.Array, " {num_generations}"]:
    """(g,) the ridge of each generation: the search's, and in the last ones down to the fit's by equal factors."""
    high = search_ridge(problem, config)
    low = jnp.clip(jnp.asarray(config.ridge, high.dtype), SMALLEST_RIDGE * problem.weights.sum(), high)
    steps = jnp.clip(jnp.arange(1 - num_generations, 1) + num_last, 0, num_last).astype(high.dtype)
    return high * (low / high) ** (steps / max(num_last, 1))


def spectral_starts(
    key: jax.Array, problem: Problem, config: MethodConfig
) -> tuple[MoEParams | None, SpectralEstimate | None, jax.Array]:
    """Leaves (s, ..): experts from the moments of each order of transforms, or from the third alone, with zero gates.

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
        starts.append(start.params)
        estimates.append(start.spectral)
        num_passes = num_passes + start.num_iterations
    if problem.third is not None:
        starts.append(third_moment_experts(key, problem, config))
        num_passes = num_passes + third_moment_passes(problem, config)
    if not starts:
        return None, None, num_passes
    estimate = estimates[0] if estimates else None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts), estimate, num_passes


class Rounds(NamedTuple):
    """The state of the independent starts between two rounds."""

    number: Int[jax.Array, ""]
    """() int32 rounds made."""
    ends: Mixtures
    alone: Float[jax.Array, ""]
    optima: Optima
    settled: Bool[jax.Array, ""]


def climb_alone(search: Search, config: MethodConfig, plan: Plan, *, again: bool) -> Search:
    """The first mixtures of the population climb independently, until they suffice, or for MOST_ROUNDS rounds.

    Args:
        search: the state before.
        config: the static choices.
        plan: the numbers of mixtures.
        again: if false, the first `plan.num_independent` climb, all from their starts, and one more with equal experts, for the
            log-likelihood of one expert. If true, the first `plan.num_more`, if `search.more_may_suffice`.
    """
    sample = search.sample
    unit, dtype = sample_scale(sample.weights).unit, sample.x.dtype
    ridge = search_ridge(sample, config)
    least_gain = LEAST_GAIN * more_parameters(sample, config) * unit
    count = plan.num_more if again else plan.num_independent
    starts, may_begin = rows_of(search.population, slice(count)), jnp.asarray(True)
    if again:
        may_begin = search.more_may_suffice
    else:
        first = rows_of(search.drawn, slice(plan.num_spectral, plan.num_spectral + 1))
        equal = first._replace(
            experts=jnp.broadcast_to(first.experts[:, :1], first.experts.shape),
            expert_bias=jnp.broadcast_to(first.expert_bias[:, :1], first.expert_bias.shape),
        )
        starts = side_by_side(starts, equal)
    total = starts.noise_std.shape[0]

    def gains_enough(ends: Mixtures, alone: jax.Array) -> jax.Array:
        if config.num_experts == 1:
            return jnp.asarray(True)
        return ends.values.max() - alone >= least_gain

    def advance(rounds: Rounds) -> Rounds:
        held, alone = None, rounds.alone
        if not again:
            # at first only the gates of the spectral starts climb, for their experts are near the truth if the model holds
            held = (jnp.arange(total) < plan.num_spectral) & (rounds.number == 0)
        ends = climb(rounds.ends.params, sample, config, ROUND_PASSES, ridge, held)
        if not again:
            alone = jnp.where(rounds.number == 0, ends.values[-1], alone)
        independent = rows_of(ends, slice(count))
        optima = distinct_optima(independent, SAME_OPTIMUM * unit)
        settled = (optima.unseen <= LARGEST_UNSEEN) & (optima.num_best >= FEWEST_AT_BEST)
        settled &= gains_enough(independent, alone)
        return Rounds(rounds.number + 1, ends, alone, optima, settled & (rounds.number > 0))

    def unfinished(rounds: Rounds) -> jax.Array:
        return may_begin & (rounds.number < MOST_ROUNDS) & ~rounds.settled

    nothing = jnp.zeros((total, sample.x.shape[0]), dtype)
    begun = Mixtures(starts, jnp.full(total, -jnp.inf, dtype), nothing)
    rounds = Rounds(jnp.asarray(0, jnp.int32), begun, search.alone, search.optima, search.settled)
    rounds = jax.lax.while_loop(unfinished, advance, rounds)
    ends = rows_of(rounds.ends, slice(count))
    ranked = keep_best(ends, count, SAME_MIXTURE * unit)
    distinct, most = rounds.optima.num_distinct, LARGEST_UNSEEN * plan.num_more * (plan.num_more - 1)
    few = min(count, plan.num_parents)
    climbed = search._replace(
        population=side_by_side(ranked.params, rows_of(search.population, slice(count, None))),
        values=search.values.at[:few].set(ranked.values[:few]),
        num_starts=jnp.asarray(count, jnp.int32),
        num_passes=search.num_passes + rounds.number * (total * ROUND_PASSES),
        alone=rounds.alone,
        optima=rounds.optima,
        settled=rounds.settled,
        more_may_suffice=~rounds.settled
        & (distinct * (distinct + 1) <= math.floor(most))
        & gains_enough(ends, rounds.alone),
    )
    return (
        jax.tree.map(lambda new, old: jnp.where(may_begin, new, old), climbed, search) if again else climbed
    )


@stage(static=("config", "plan"), fast=True)
def independent_starts(key: jax.Array, problem: Problem, *, config: MethodConfig, plan: Plan) -> Search:
    """The sample and the starts of the search, the first of which climb alone."""
    sample_key, start_key, spectral_key, search_key = jax.random.split(key, 4)
    sample = in_single_precision(search_sample(sample_key, problem, search_rows(config.fn)), config.fn)
    from_moments, estimate, num_passes = spectral_starts(spectral_key, problem, config)
    # one draw for all starts: each draw costs compile time
    drawn = scaled_starts(start_key, sample, config, plan.num_drawn - plan.num_spectral)
    if from_moments is not None:
        drawn = side_by_side(in_precision_of(drawn.experts, from_moments), drawn)
    zero, low = jnp.asarray(0, jnp.int32), jnp.full((), -jnp.inf, sample.x.dtype)
    search = Search(
        search_key,
        sample,
        drawn,
        rows_of(drawn, slice(plan.size)),
        jnp.broadcast_to(low, (plan.num_parents,)),
        zero,
        num_passes,
        low,
        Optima(zero, zero, -low),
        jnp.asarray(False),
        jnp.asarray(False),
        jnp.asarray(False),
        estimate,
        rows_of(drawn, slice(NUM_DESCENTS)) if plan.has_descents else None,
        jnp.full(NUM_DESCENTS, low) if plan.has_descents else None,
    )
    return climb_alone(search, config, plan, again=False) if plan.num_independent else search


@stage(static=("config", "plan"), fast=True)
def more_independent_starts(search: Search, *, config: MethodConfig, plan: Plan) -> Search:
    """More starts climb alone, if they may suffice."""
    return climb_alone(search, config, plan, again=True)


@stage(static=("config", "plan"), fast=False)
def generations(search: Search, *, config: MethodConfig, plan: Plan) -> Search:
    """All generations of random starts and of children, unless the search is settled."""
    sample, size, num_parents = search.sample, plan.size, plan.num_parents
    same = SAME_MIXTURE * sample_scale(sample.weights).unit
    ridges = ridges_of(plan.num_generations, plan.num_last, sample, config)

    def newcomers_of(generation: jax.Array, population: MoEParams) -> MoEParams:
        random = children = None
        if plan.num_fresh:
            first = size + jnp.minimum(generation, plan.num_fresh - 1) * NEWCOMERS
            random = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, NEWCOMERS), search.drawn
            )
        if plan.has_children:
            key = jax.random.fold_in(search.key, generation)
            parents = compact(rows_of(population, slice(num_parents)), config.columns)
            children = expanded(children_of(key, parents, NEWCOMERS), config.columns)
        if random is None or children is None:
            one = random if children is None else children
            assert one is not None, "newcomers are children or random starts"
            return one
        is_random = generation < plan.num_fresh
        return jax.tree.map(lambda new, child: jnp.where(is_random, new, child), random, children)

    def advance(state: tuple[jax.Array, MoEParams, jax.Array]) -> tuple[jax.Array, MoEParams, jax.Array]:
        generation, population, _ = state
        if not plan.num_newcomers:
            kept = keep_best(climb(population, sample, config, PASSES, ridges[generation]), size, same)
            return generation + 1, kept.params, kept.values
        newcomers = newcomers_of(generation, population)
        climbed = climb(side_by_side(population, newcomers), sample, config, PASSES, ridges[generation])
        parents = keep_best(rows_of(climbed, slice(size)), num_parents, same)
        # newcomers compete with newcomers, and one generation later with mixtures that had more passes
        newcomers = rows_of(climbed, slice(size, None))
        promoted = keep_best(newcomers, size - num_parents, same, beside=parents.profiles)
        return generation + 1, side_by_side(parents.params, promoted.params), parents.values

    def unfinished(state: tuple[jax.Array, MoEParams, jax.Array]) -> jax.Array:
        return (state[0] < plan.num_generations) & ~search.settled

    begun = (jnp.asarray(0, jnp.int32), search.population, search.values)
    number, population, values = jax.lax.while_loop(unfinished, advance, begun)
    num_passes = search.num_passes + number * ((size + plan.num_newcomers) * PASSES)
    num_starts = jnp.where(search.settled, search.num_starts, plan.num_starts)
    return search._replace(population=population, values=values, num_starts=num_starts, num_passes=num_passes)


def multistart(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The best of spectral and random starts and of moves from there, polished (see the module).

    Unless the independent starts suffice, there are at least `config.num_starts` random ones (None: DEFAULT_STARTS; beyond the
    first population they come in whole generations). Each polish has `config.max_iterations` passes. With fewer than
    FEWEST_FOR_CHILDREN starts, no moves are made. A pass over the search's sample counts as a whole one in `num_iterations`, even
    if that is a small part of the data.

    Each stage is a program of its own, and a search that is settled needs no generations, unless the caller is traced.
    """
    plan = plan_of(problem, config)
    search = independent_starts(key, problem, config=config, plan=plan)
    traced = isinstance(search.settled, Tracer)
    if plan.num_more and (traced or search.more_may_suffice):
        search = more_independent_starts(search, config=config, plan=plan)
    if plan.has_descents and (traced or not search.settled):
        # folded in: the starts before have the keys that they would have without
        make = functools.partial(descents, jax.random.fold_in(key, 1), problem=problem, config=config)
        search = jax.lax.cond(search.settled, lambda search: search, make, search) if traced else make(search)
    if traced or not search.settled:
        search = generations(search, config=config, plan=plan)
    return polished(search, problem, config=config, plan=plan)
