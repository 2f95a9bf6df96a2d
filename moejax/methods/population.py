"""Mixtures side by side: EM from each, repetitions of the same one, and the best of them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.environment import runs_on_cpu
from moejax.likelihood.collapse import is_collapsed
from moejax.likelihood.em import joint_em
from moejax.likelihood.free_columns import num_coefficients
from moejax.methods.method import MethodConfig, Problem, least_noise_of
from moejax.model.mixture import MoEParams, log_likelihood_per_sample, responsibilities, weighted_sum

SIDE_BY_SIDE = 4
"""Mixtures in one batch of EM on a CPU: XLA splits the loops of wider ones over threads, which is slower. Else all are in one."""


class Mixtures(NamedTuple):
    """s mixtures side by side, and their likelihoods."""

    params: MoEParams
    """Leaves (s, ..)."""
    values: Float[jax.Array, " s"]
    """(s,) log-likelihoods in nats; minus infinity if EM broke down, or for a repetition of a better one."""
    profiles: Float[jax.Array, "s n"]
    """(s, n) log-densities of the samples, times the square roots of their weights: equal for a mixture and its relabelling."""


Pytree = TypeVar("Pytree", MoEParams, Mixtures)


def rows_of(mixtures: Pytree, rows: slice | int | jax.Array) -> Pytree:
    """The chosen rows of mixtures side by side."""
    return jax.tree.map(lambda leaf: leaf[rows], mixtures)


def side_by_side(*mixtures: Pytree) -> Pytree:
    """Mixtures (s, ..) and (t, ..) as (s + t, ..)."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *mixtures)


def in_precision_of(array: jax.Array, params: MoEParams) -> MoEParams:
    """Parameters in the precision of an array."""
    return jax.tree.map(lambda leaf: leaf.astype(array.dtype), params)


def collapsed_experts(
    params: MoEParams, problem: Problem, config: MethodConfig, least_noise: Float[jax.Array, " *m"]
) -> Bool[jax.Array, " k"]:
    """(k,): true for an expert whose own noise ran off to zero; `least_noise` is the problem's `resolution`."""
    posterior = responsibilities(params, problem.x, problem.y, config.fn)
    return is_collapsed(
        params.noise_std,
        weighted_sum(posterior, problem.weights),
        num_coefficients=num_coefficients(problem.x.shape[1], config.fit_intercept, config.columns)[0],
        least_noise=least_noise,
        per_expert=True,
    )


def climb(
    starts: MoEParams,
    problem: Problem,
    config: MethodConfig,
    num_steps: int,
    ridge: Float[jax.Array, ""],
    held: Bool[jax.Array, " s"] | None = None,
) -> Mixtures:
    """EM from every start, leaves (s, ..).

    The noise is free, known or not: a poor start explains its labels by noise first. It is shared, unless the fit has one for each
    expert; a mixture with a collapsed expert (`is_collapsed`) then gets minus infinity.

    Args:
        starts: leaves (s, ..).
        problem: the sample.
        config: the static choices.
        num_steps: passes of EM.
        ridge: () ridge on the gates.
        held: (s,) true for starts whose experts stay fixed, while gates and noise climb; None for none.
    """
    present = problem.weights > 0
    per_expert = config.noise == "per_expert"
    least_noise = least_noise_of(problem, config)
    roots = jnp.sqrt(jnp.where(present, problem.weights, 0.0))

    def run(inputs: tuple[MoEParams, jax.Array | bool]) -> Mixtures:
        start, held = inputs
        end = joint_em(
            start,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=num_steps,
            fit_intercept=config.fit_intercept,
            noise="per_expert" if per_expert else "shared",
            ridge=ridge,
            hold_experts=held,
            least_noise=least_noise,
            columns=config.columns,
        )
        good = jnp.isfinite(end.log_likelihood)
        if least_noise is not None:
            good &= ~collapsed_experts(end.params, problem, config, least_noise).any()
        value = jnp.where(good, end.log_likelihood, -jnp.inf)
        profile = log_likelihood_per_sample(end.params, problem.x, problem.y, config.fn)
        return Mixtures(end.params, value, jnp.where(present, roots * profile, 0.0))

    count = starts.noise_std.shape[0]
    batch_size = min(SIDE_BY_SIDE, count) if runs_on_cpu() else count
    if held is None:
        return jax.lax.map(lambda start: run((start, False)), starts, batch_size=batch_size)
    return jax.lax.map(run, (starts, held), batch_size=batch_size)


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
    ranked = rows_of(mixtures, jnp.argsort(-mixtures.values))
    profiles = ranked.profiles if beside is None else jnp.concatenate([beside, ranked.profiles])
    repeated = repetitions(profiles, same)[profiles.shape[0] - ranked.values.size :]
    kept = jnp.argsort(repeated, stable=True)[:count]
    return rows_of(ranked._replace(values=jnp.where(repeated, -jnp.inf, ranked.values)), kept)


class Optima(NamedTuple):
    """The optima that independent starts reached."""

    num_distinct: Int[jax.Array, ""]
    """() w, distinct optima; a start that has not arrived counts as one."""
    num_best: Int[jax.Array, ""]
    """() starts that reached the best one."""
    unseen: Float[jax.Array, ""]
    """() w (w + 1) / (N (N - 1)), N the number of starts: the expected share of all starts that lead to an optimum which none of
    these reached, if every number of optima and every division of the starts among them is equally likely beforehand (Boender and
    Rinnooy Kan 1987)."""


def distinct_optima(mixtures: Mixtures, same: Float[jax.Array, ""] | float) -> Optima:
    """The optima among the ends (s, ..) of independent starts; ends within a sum of squares `same` are one."""
    ranked = rows_of(mixtures, jnp.argsort(-mixtures.values))
    count = ranked.values.size
    distinct = jnp.sum(~repetitions(ranked.profiles, same), dtype=jnp.int32)
    distance = jnp.sum((ranked.profiles - ranked.profiles[:1]) ** 2, axis=1)
    at_best = jnp.sum((distance < same) & jnp.isfinite(ranked.values), dtype=jnp.int32)
    number = distinct.astype(ranked.values.dtype)
    return Optima(distinct, at_best, number * (number + 1) / (count * (count - 1)))
