r"""Search for the global maximum of the likelihood: many starts, moves between optima, halving, polish.

The likelihood of a mixture of experts has many local maxima; from one random start, EM reaches the best one with a probability
that may be a few in a thousand. `multistart` looks for it in generations of mixtures that run EM side by side:

1. The first generations are spectral starts and random ones (unit-norm experts, zero gates). After every few passes only the best
   distinct ones (by the log-densities of the samples) go on, as the population: successive halving (Jamieson and Talwalkar 2016)
   with fresh starts in the free places.
2. In the later generations the free places go to children of the population, by moves that EM itself cannot make: an expert is
   dropped and another split in two (Ueda et al. 2000), an expert is drawn anew, or an expert comes from another mixture. Newcomers
   compete only with newcomers in their first generation, and with the population one generation later.
3. A ridge on the gates keeps them from saturating before experts have found their samples. In the last generations it falls to
   that of the fit: the best mixture with sharp gates is seldom the best one with soft gates, made sharp.
4. The last few are polished to their maxima on the whole sample, and the best is the result. The generations use at most
   SEARCH_SAMPLES random rows of it; mixtures that are clearly worse on these are not polished. Several outputs are polished by EM.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.environment import runs_on_cpu
from moejax.likelihood.blocks import sample_scale
from moejax.likelihood.collapse import is_collapsed, label_rounding
from moejax.likelihood.em import EMRun, gating_em, joint_em
from moejax.likelihood.polish import PolishRun, polish
from moejax.methods.from_moments import GATING_STEPS, GATING_TOLERANCE, spectral
from moejax.methods.method import MethodConfig, MethodResult, Problem, finish, with_path
from moejax.methods.moves import Mixtures, children_of, concatenated, take_rows
from moejax.methods.starts import label_mean, label_spread, random_starts
from moejax.model.activations import ScalarFunction, activation_facts
from moejax.model.mixture import MoEParams, log_likelihood_per_sample, responsibilities, weighted_sum
from moejax.moments.spectral import SpectralEstimate

DEFAULT_STARTS = 256
"""Random starts if `num_starts` is None."""
SEARCH_SAMPLES = 2048
POPULATION = 24
KEPT_NEWCOMERS = 24
"""Best newcomers of the previous generation that are kept besides the population."""
NEWCOMERS = 48
"""New mixtures of each generation, besides these two groups."""
GENERATIONS_OF_CHILDREN = 60
LAST_GENERATIONS = 24
"""The last generations, in which the ridge falls."""
FEWEST_FOR_CHILDREN = 16
"""With fewer random starts there are no children: the search is then a spectral start and a few random ones."""
PASSES = 15
"""EM passes of a generation."""
NUM_FINALISTS = 6
RULED_OUT = 5.0
"""A finalist has lost if its log-likelihood on the search's sample is this many standard errors of the difference behind."""
EM_STEPS_FOR_ONE = 10
"""EM passes allowed for each pass of the polish, if EM replaces it."""
SAME_MIXTURE = 12.0
"""Mixtures whose log-densities of the samples differ by less than this, as a sum of squares, count as one.

Near an optimum that sum is about twice the log-likelihood, in nats, that separates them: two on their way to the same optimum are
recognised as one before they reach it.
"""
SEARCH_RIDGE = 1e-6
"""Ridge on the gates during the search, per sample, if the fit's own is smaller."""
SMALLEST_RIDGE = 1e-9
"""Ridge of the last generation, per sample, if the fit's own is smaller: EM without a polish needs some ridge."""
SIDE_BY_SIDE = 4
"""Mixtures in one batch of EM on a CPU: XLA splits the loops of wider ones over threads, which is slower. Else all are in one."""


def scaled_starts(key: jax.Array, problem: Problem, config: MethodConfig, num_starts: int) -> MoEParams:
    """`random_starts` with the labels' standard deviation as noise.

    For a homogeneous g, the experts get the scale of the labels and, with intercepts, their mean.
    """
    spread, facts = label_spread(problem), activation_facts(config.fn)
    starts = random_starts(key, problem, config, num_starts, spread)
    if not facts.homogeneous:
        return starts
    shape = starts.expert_bias.shape
    scale = jnp.broadcast_to(spread / facts.standard_deviation, shape)
    bias = scale * starts.expert_bias
    if config.fit_intercept:
        bias = bias + jnp.broadcast_to(label_mean(problem), shape)
    return starts._replace(experts=scale[..., None] * starts.experts, expert_bias=bias)


def search_sample(key: jax.Array, problem: Problem) -> Problem:
    """The problem on at most SEARCH_SAMPLES rows, those of positive weight drawn without replacement."""
    if problem.x.shape[0] <= SEARCH_SAMPLES:
        return problem
    draw = jax.random.uniform(key, problem.weights.shape, problem.weights.dtype)
    _, rows = jax.lax.top_k(jnp.where(problem.weights > 0, draw, -1.0), SEARCH_SAMPLES)
    return problem._replace(x=problem.x[rows], y=problem.y[rows], weights=problem.weights[rows])


def search_ridge(problem: Problem, config: MethodConfig) -> Float[jax.Array, ""]:
    """() the ridge of the search: SEARCH_RIDGE per sample, or that of the fit if it is larger."""
    return jnp.maximum(SEARCH_RIDGE * problem.weights.sum(), jnp.asarray(config.ridge, problem.x.dtype))


def ridges_of(
    num_generations: int, num_last: int, problem: Problem, config: MethodConfig
) -> Float[jax.Array, " {num_generations}"]:
    """(g,) the ridge of each generation: the search's, and in the last ones down to the fit's by equal factors."""
    high = search_ridge(problem, config)
    low = jnp.clip(jnp.asarray(config.ridge, high.dtype), SMALLEST_RIDGE * problem.weights.sum(), high)
    steps = jnp.clip(jnp.arange(1 - num_generations, 1) + num_last, 0, num_last).astype(high.dtype)
    return high * (low / high) ** (steps / max(num_last, 1))


def climb(
    starts: MoEParams, problem: Problem, config: MethodConfig, num_steps: int, ridge: Float[jax.Array, ""]
) -> Mixtures:
    """EM from every start, leaves (s, ..), with a ridge () on the gates.

    The noise is shared and free, known or not: a poor start explains its labels by noise first.
    """
    present = problem.weights > 0
    roots = jnp.sqrt(jnp.where(present, problem.weights, 0.0))

    def run(start: MoEParams) -> Mixtures:
        end = joint_em(
            start,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=num_steps,
            fit_intercept=config.fit_intercept,
            noise="shared",
            ridge=ridge,
        )
        value = jnp.where(jnp.isfinite(end.log_likelihood), end.log_likelihood, -jnp.inf)
        profile = log_likelihood_per_sample(end.params, problem.x, problem.y, config.fn)
        return Mixtures(end.params, value, jnp.where(present, roots * profile, 0.0))

    count = starts.noise_std.shape[0]
    batch_size = min(SIDE_BY_SIDE, count) if runs_on_cpu() else count
    return jax.lax.map(run, starts, batch_size=batch_size)


def repetitions(
    profiles: Float[jax.Array, "s n"], same: Float[jax.Array, ""] | float
) -> Bool[jax.Array, " s"]:
    """(s,): true for rows within a sum of squares `same` of an earlier row that is itself no repetition."""
    profiles = profiles - profiles[:1]  # reduces cancellation
    squares = jnp.sum(profiles**2, axis=1)
    near = squares[:, None] + squares[None] - 2.0 * profiles @ profiles.T < same

    def judge(index: jax.Array | int, repeated: jax.Array) -> jax.Array:
        earlier = (jnp.arange(repeated.size) < index) & ~repeated
        return repeated.at[index].set(jnp.any(near[index] & earlier))

    return jax.lax.fori_loop(1, profiles.shape[0], judge, jnp.zeros(profiles.shape[0], bool))


def keep_best(
    mixtures: Mixtures,
    count: int,
    same: Float[jax.Array, ""] | float,
    beside: Float[jax.Array, "b n"] | None = None,
) -> Mixtures:
    """The `count` best of (s, ..) mixtures, best first.

    Repetitions of a better mixture, or of one with a profile in `beside` (b, n), come last, with value minus infinity.
    """
    ranked = take_rows(mixtures, jnp.argsort(-mixtures.values))
    profiles = ranked.profiles if beside is None else jnp.concatenate([beside, ranked.profiles])
    repeated = repetitions(profiles, same)[profiles.shape[0] - ranked.values.size :]
    kept = jnp.argsort(repeated, stable=True)[:count]
    return take_rows(ranked._replace(values=jnp.where(repeated, -jnp.inf, ranked.values)), kept)


def contenders(params: MoEParams, sample: Problem, fn: ScalarFunction) -> Bool[jax.Array, " s"]:
    """(s,): true for mixtures, leaves (s, ..), that may be as good as the first on the data that `sample` was drawn from.

    The difference of two log-likelihoods is a sum over the sample, and has a standard error (Vuong 1989).
    """
    densities = jax.lax.map(lambda one: log_likelihood_per_sample(one, sample.x, sample.y, fn), params)
    weights = sample.weights
    behind = jnp.where(weights > 0, densities[:1] - densities, 0.0)
    mean = behind @ weights / weights.sum()
    variance = (behind - mean[:, None]) ** 2 @ weights**2
    return ~(mean * weights.sum() > RULED_OUT * jnp.sqrt(variance))


def best_run(runs: PolishRun | EMRun, problem: Problem, config: MethodConfig) -> Int[jax.Array, ""]:
    """() index of the run, leaves (s, ..), of highest log-likelihood; runs with a collapsed expert count only if all have one.

    With a noise for each expert the likelihood has no bound, and a collapsed run has a higher one than every proper run.
    """
    values = jnp.where(jnp.isfinite(runs.log_likelihood), runs.log_likelihood, -jnp.inf)
    if config.noise != "per_expert":
        return jnp.argmax(values)
    rounding = label_rounding(problem.y, problem.weights)

    def proper(params: MoEParams) -> jax.Array:
        posterior = responsibilities(params, problem.x, problem.y, config.fn)
        return ~is_collapsed(
            params.noise_std,
            weighted_sum(posterior, problem.weights),
            num_coefficients=problem.x.shape[1] + int(config.fit_intercept),
            label_rounding=rounding,
            per_expert=True,
        ).any()

    eligible = jax.lax.map(proper, runs.params)
    among_eligible = jnp.where(eligible, values, -jnp.inf)
    return jnp.where(jnp.isfinite(among_eligible).any(), jnp.argmax(among_eligible), jnp.argmax(values))


def spectral_starts(
    key: jax.Array, problem: Problem, small: Problem, config: MethodConfig
) -> tuple[MoEParams | None, SpectralEstimate | None, jax.Array]:
    """Leaves (s, ..): experts from the moments of each order of transforms, with gates by EM on the small sample.

    Returns:
        The starts; the moments' diagnostics, of the first order; () int32 passes over the data.
    """
    starts, estimates, num_passes = [], [], jnp.asarray(0, jnp.int32)

    def with_gates(start: MoEParams) -> EMRun:
        return gating_em(
            start,
            small.x,
            small.y,
            small.weights,
            fn=config.fn,
            num_steps=GATING_STEPS,
            noise="shared",
            tolerance=GATING_TOLERANCE,
            fit_intercept=config.fit_intercept,
            ridge=search_ridge(small, config),
        )

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
    if not starts:
        return None, None, num_passes
    runs = jax.lax.map(with_gates, jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
    return runs.params, estimates[0], num_passes + runs.num_steps.sum(dtype=jnp.int32)


def multistart(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The best of spectral and random starts and of moves from there, polished (see the module).

    There are at least `config.num_starts` random starts (None: DEFAULT_STARTS; beyond the first population they come in whole
    generations) and `config.max_iterations` passes of each polish. With fewer than FEWEST_FOR_CHILDREN starts, no moves are made.
    A pass over the search's sample counts as a whole one in `num_iterations`, even if that is a small part of the data.
    """
    sample_key, start_key, spectral_key, search_key = jax.random.split(key, 4)
    num_starts = DEFAULT_STARTS if config.num_starts is None else config.num_starts
    small = search_sample(sample_key, problem)
    same = SAME_MIXTURE * sample_scale(small.weights).unit
    from_moments, estimate, num_passes = spectral_starts(spectral_key, problem, small, config)
    num_spectral = 0 if from_moments is None else from_moments.noise_std.shape[0]

    has_children = num_starts >= FEWEST_FOR_CHILDREN and config.num_experts > 1
    size = min(POPULATION + KEPT_NEWCOMERS, num_starts + num_spectral)
    num_fresh = max(-(-(num_starts + num_spectral - size) // NEWCOMERS), 0)
    # one draw for all starts: each draw costs compile time
    drawn = scaled_starts(start_key, small, config, size + num_fresh * NEWCOMERS)
    starts = take_rows(drawn, slice(size))
    if from_moments is not None:
        starts = take_rows(concatenated(from_moments, starts), slice(size))
    num_generations = max(num_fresh + GENERATIONS_OF_CHILDREN * has_children, 1)
    num_newcomers = NEWCOMERS if num_fresh or has_children else 0
    num_parents = min(POPULATION, size // 2) if num_newcomers else size
    no_more = [(0, num_generations - num_fresh)]

    def by_generation(leaf: jax.Array) -> jax.Array:
        fresh = leaf[size:].reshape(num_fresh, NEWCOMERS, *leaf.shape[1:])
        return jnp.pad(fresh, no_more + [(0, 0)] * leaf.ndim)

    def advance(
        grown: MoEParams, inputs: tuple[jax.Array, jax.Array, jax.Array, MoEParams]
    ) -> tuple[MoEParams, jax.Array]:
        key, ridge, is_fresh, additions = inputs
        if not num_newcomers:
            kept = keep_best(climb(grown, small, config, PASSES, ridge), size, same)
            return kept.params, kept.values
        if has_children:
            children = children_of(key, take_rows(grown, slice(num_parents)), NEWCOMERS)
            additions = jax.tree.map(lambda new, child: jnp.where(is_fresh, new, child), additions, children)
        climbed = climb(concatenated(grown, additions), small, config, PASSES, ridge)
        parents = keep_best(take_rows(climbed, slice(size)), num_parents, same)
        # newcomers compete with newcomers, and one generation later with mixtures that had more passes
        newcomers = take_rows(climbed, slice(size, None))
        promoted = keep_best(newcomers, size - num_parents, same, beside=parents.profiles)
        return concatenated(parents.params, promoted.params), parents.values

    are_fresh = jnp.arange(num_generations) < num_fresh
    generations = (
        jax.random.split(search_key, num_generations),
        ridges_of(num_generations, LAST_GENERATIONS if has_children else 0, small, config),
        are_fresh,
        jax.tree.map(by_generation, drawn),
    )
    population, values = jax.lax.scan(advance, starts, generations)
    num_passes = num_passes + num_generations * (size + num_newcomers) * PASSES

    finalists = take_rows(population, slice(min(NUM_FINALISTS, num_parents)))
    distinct = jnp.isfinite(values[-1, : finalists.noise_std.shape[0]])
    runs = runs_of_finalists(finalists, distinct, problem, small, config)
    best = best_run(runs, problem, config)
    run = jax.tree.map(lambda leaf: leaf[best], runs)
    num_passes = num_passes + runs.num_steps.sum(dtype=jnp.int32)
    result = finish(run.params, run.history, num_passes, run.converged, problem, estimate)
    return with_path(result._replace(optima=values[-1]), config, run.path)


def runs_of_finalists(
    finalists: MoEParams,
    distinct: Bool[jax.Array, " s"],
    problem: Problem,
    small: Problem,
    config: MethodConfig,
) -> PolishRun | EMRun:
    """Runs (s, ..) of the finalists on all samples; the log-likelihood of those that cannot win is minus infinity.

    If the search saw all samples, all finalists run. Otherwise a run is skipped if the finalist repeats another one (is not
    `distinct`) or is no contender on the search's sample.
    """

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
        )

    if small is problem:
        return jax.lax.map(finish_one, finalists)
    untouched = jax.eval_shape(finish_one, take_rows(finalists, 0))

    def lost(_: MoEParams) -> PolishRun | EMRun:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), untouched)
        return nothing._replace(log_likelihood=jnp.full_like(nothing.log_likelihood, -jnp.inf))

    may_win = contenders(finalists, small, config.fn) & distinct.at[0].set(True)
    return jax.lax.map(
        lambda inputs: jax.lax.cond(inputs[0], finish_one, lost, inputs[1]), (may_win, finalists)
    )
