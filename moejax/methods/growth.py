r"""Growth: mixtures of 1, 2, .., K experts, each from the best ones with one expert fewer by splitting one expert.

A split replaces an expert by two copies that divide its part of the input space, P_i h and P_i (1 - h), h a logistic function
along a direction (a coordinate or a random one) through the part. The best coefficients of both are a linear least-squares problem
with 2 D unknowns, so that hundreds of splits are scored in one pass; the best go on to a climb of all coefficients, and the best
distinct ends of these are the parents of the next number of experts. A mixture is also split without a division of the inputs, into
two copies whose lines turn apart at random. One compiled program makes all numbers of experts (see `likelihood.padded`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks
from moejax.likelihood.evidence import FIRST_RIDGE, VARIANCE_FLOOR, Evidence, maximise_evidence
from moejax.likelihood.padded import (
    Climb,
    Objective,
    Ridge,
    climb_padded,
    gates_and_means,
    mean_of,
)
from moejax.methods.population import repetitions
from moejax.model.activations import ScalarFunction
from moejax.model.gaussian import standard_normal
from moejax.model.mixture import LOG_TWO_PI
from moejax.model.small_linear_algebra import solve_positive_definite

NUM_PARENTS = 2
NUM_CANDIDATES = 16
"""Splits of all parents that climb."""
RANDOM_DIRECTIONS = 4
"""Directions of splits of an expert, besides the coordinates."""
SHIFT = 0.5
"""Standard deviation of the middle of a split, in standard deviations of the part along the direction."""
SHARPNESS = (0.5, 3.0)
"""Range of the steepness of a split, the logarithm being uniform; the same unit."""
CLIMB_STEPS, ROUNDS, ROUND_STEPS = 8, 3, 8
"""Passes of a candidate's climb; rounds of evidence for the parents, and passes of each."""
LIKELIHOOD_STEPS, LIKELIHOOD_ROUNDS = 15, 40
"""Passes of a candidate's climb and of the parents', if the objective is the likelihood."""
WEAK_RIDGE = 1e-2
"""Ridges of the mixture while it grows: its choice is by BIC."""
SAME_FUNCTION = 4.0
"""Two mixtures whose fitted values differ by less than this sum of squares, in units of s^2, count as one."""
CLIMB_TOLERANCE = 1e-2
LARGEST_SHARE = 0.5
"""Largest share of the rows that may be coefficients which the data determine."""


class Grown(NamedTuple):
    """The best mixture of each number of experts; leaves (K, ..)."""

    rows: Float[jax.Array, "K 2*K D"]
    score: Float[jax.Array, " K"]
    """(K,) log evidence, or minus half of BIC, in nats; minus infinity for a number that was not made."""
    log_likelihood: Float[jax.Array, " K"]
    variance: Float[jax.Array, " K"]
    ridge: Ridge
    effective: Float[jax.Array, " K"]
    """(K,) coefficients that the data determine; for the likelihood, all."""
    num_passes: Int[jax.Array, ""]
    """() passes over the data."""


class _Beam(NamedTuple):
    number: Int[jax.Array, ""]
    parents: Float[jax.Array, "B 2*K D"]
    variance: Float[jax.Array, ""]
    ridge: Ridge
    grown: Grown


def _division_scores(
    rows: Float[jax.Array, "2*K D"],
    key: jax.Array,
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    ridge: Ridge,
    sample: tuple[jax.Array, jax.Array, jax.Array],
    *,
    fn: ScalarFunction,
    objective: Objective,
    fit_intercept: bool,
) -> tuple[jax.Array, jax.Array]:
    """Splits of every expert of one mixture: (s,) predicted gains in nats, and (s, 2 K, D) the mixtures after the split."""
    design, y, weights = sample
    count, size = active.shape[0], rows.shape[1]
    d = size - int(fit_intercept)
    inputs = design[:d]
    log_gates, means, slopes = gates_and_means(rows, active, design, fn)
    gates = jnp.exp(log_gates)
    if objective == "mean":
        shares, factor = gates, gates * slopes
        error = jnp.broadcast_to((y - jnp.sum(gates * means, axis=0))[None], gates.shape)
    else:
        error = y[None] - means
        log_joint = log_gates - 0.5 * error**2 / variance
        shares = jax.nn.softmax(log_joint, axis=0)
        factor = slopes
    mass = shares * weights[None]
    total = jnp.maximum(mass.sum(axis=1), jnp.finfo(rows.dtype).tiny)
    centre = mass @ inputs.T / total[:, None]
    normal_key, uniform_key = jax.random.split(key)
    num_directions = d + RANDOM_DIRECTIONS
    draws = standard_normal(normal_key, (count, RANDOM_DIRECTIONS * d + num_directions), rows.dtype)
    random = draws[:, : RANDOM_DIRECTIONS * d].reshape(count, RANDOM_DIRECTIONS, d)
    coordinates = jnp.broadcast_to(jnp.eye(d, dtype=rows.dtype)[None], (count, d, d))
    directions = jnp.concatenate([coordinates, random], axis=1)
    middle = SHIFT * draws[:, RANDOM_DIRECTIONS * d :]
    low, high = np.log(SHARPNESS)
    steepness = jnp.exp(jax.random.uniform(uniform_key, middle.shape, rows.dtype, low, high))
    eye = jnp.eye(2 * size, dtype=rows.dtype)

    def one(inputs_of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, direction, shift, steep = inputs_of
        along = direction @ (inputs - centre[i][:, None])
        spread = jnp.sqrt(mass[i] @ along**2 / total[i]) + jnp.finfo(rows.dtype).tiny
        turn = steep / spread * direction
        offset = -steep * (shift + direction @ centre[i] / spread)
        if not fit_intercept:
            offset = jnp.zeros_like(offset)
        half = jax.nn.sigmoid(2.0 * (turn @ inputs + offset))
        basis = jnp.stack([half, 1.0 - half])
        if objective == "mean":
            basis = basis * factor[i][None]
            weight = weights
        else:
            weight = None
        if weight is None:
            # each half has its own responsibilities: two separate problems, solved as one
            parts = [((mass[i] * b * factor[i] ** 2)[None] * design) @ design.T / variance for b in basis]
            nothing = jnp.zeros_like(parts[0])
            gram = jnp.block([[parts[0], nothing], [nothing, parts[1]]])
            right = jnp.concatenate([design @ (mass[i] * b * factor[i] * error[i]) for b in basis]) / variance
        else:
            stacked = (basis[:, None] * design[None]).reshape(2 * size, -1)
            gram = (stacked * weight[None]) @ stacked.T / variance
            right = stacked @ (weight * error[i]) / variance
        own = jnp.tile(rows[i], 2)
        prior = ridge.experts + 1e-6
        right = right - prior * own
        step = solve_positive_definite(gram + prior * eye, right)
        gain = 0.5 * step @ right
        gate = jnp.append(turn, offset) if fit_intercept else turn
        return gain, jnp.concatenate([own[:size] + step[:size], own[size:] + step[size:], gate])

    which = jnp.repeat(jnp.arange(count), num_directions)
    gains, found = jax.lax.map(
        one, (which, directions.reshape(-1, d), middle.reshape(-1), steepness.reshape(-1))
    )
    slot = active.sum()

    def put(i: jax.Array, new: jax.Array) -> jax.Array:
        first, second, gate = new.reshape(3, size)
        old = rows[count + i]
        made = rows.at[i].set(first).at[slot].set(second)
        made = made.at[count + i].set(old + gate).at[count + slot].set(old - gate)
        return made

    mixtures = jax.vmap(put)(which, found)
    return jnp.where(active[which], gains, -jnp.inf), mixtures


def _turned_apart(
    rows: Float[jax.Array, "2*K D"],
    key: jax.Array,
    number: Int[jax.Array, ""],
    variance: Float[jax.Array, ""],
    count: int,
) -> Float[jax.Array, "c 2*K D"]:
    """`count` mixtures in which a random expert became two with one gate, and lines that differ by about the noise."""
    places, size = rows.shape[0] // 2, rows.shape[1]
    uniform_key, normal_key = jax.random.split(key)
    chosen = jnp.minimum((jax.random.uniform(uniform_key, (count,)) * number).astype(jnp.int32), number - 1)
    apart = jnp.sqrt(variance) * standard_normal(normal_key, (count, size), rows.dtype)

    def one(i: jax.Array, turn: jax.Array) -> jax.Array:
        made = rows.at[i].add(turn).at[number].set(rows[i] - turn)
        return made.at[places + number].set(rows[places + i])

    return jax.vmap(one)(chosen, apart)


def _centred_gates(rows: jax.Array, active: jax.Array) -> jax.Array:
    """The same mixtures (s, 2 K, D) with gates whose mean over the experts is zero."""
    count = active.shape[0]
    gates = rows[:, count:]
    mean = jnp.sum(jnp.where(active[None, :, None], gates, 0), axis=1, keepdims=True) / active.sum()
    return rows.at[:, count:].set(jnp.where(active[None, :, None], gates - mean, 0))


def grow(
    key: jax.Array,
    blocks: SampleBlocks,
    sample: tuple[jax.Array, jax.Array, jax.Array],
    most: Int[jax.Array, ""] | int,
    *,
    fn: ScalarFunction,
    objective: Objective,
    places: int,
    fit_intercept: bool,
    patience: int | None,
    largest_share: Float[jax.Array, ""] | float = LARGEST_SHARE,
    ridge: Ridge | None = None,
) -> Grown:
    """Mixtures of 1 to `most` experts.

    Args:
        key: PRNG key.
        blocks: the sample.
        sample: the same, (D, n) inputs with a last row of ones for intercepts, (n,) labels and (n,) weights.
        most: () largest number of experts, at most `places`.
        fn: g.
        objective: "mean", with ridges by evidence, or "likelihood".
        places: K.
        fit_intercept: if true, the last coefficient of a row is an intercept.
        patience: growth ends after so many numbers of experts without a better score; None: never.
        largest_share: a mixture with more than this share of the rows as effective coefficients has no score, but for one expert.
        ridge: fixed ridges of the mean; None: by evidence.
    """
    design, y, weights = sample
    size, dtype, total = design.shape[0], design.dtype, weights.sum()
    how = {"fn": fn, "fit_intercept": fit_intercept}
    roots = jnp.sqrt(weights)
    floor = VARIANCE_FLOOR * jnp.sum(weights * y**2) / total

    def settled(rows: jax.Array, active: jax.Array, variance: jax.Array, ridge: Ridge) -> Evidence:
        """A parent at its optimum, with its score in place of the evidence."""
        if objective == "mean":
            return maximise_evidence(
                rows,
                active,
                variance,
                ridge,
                blocks,
                num_rounds=ROUNDS,
                num_steps=ROUND_STEPS,
                tolerance=CLIMB_TOLERANCE,
                fixed_ridge=given is not None,
                **how,
            )
        end = climbed(rows, active, variance, ridge, LIKELIHOOD_ROUNDS)
        free = ((2 * active.sum() - 1) * size + 1).astype(dtype)
        score = end.sums.log_likelihood - 0.5 * free * jnp.log(total)
        return Evidence(
            end.rows,
            jnp.where(jnp.isfinite(score), score, -jnp.inf),
            end.sums.log_likelihood,
            end.sums.squares,
            end.variance,
            ridge,
            free,
            end.sums.information,
            end.num_passes,
            end.converged,
        )

    def climbed(rows: jax.Array, active: jax.Array, variance: jax.Array, ridge: Ridge, steps: int) -> Climb:
        return climb_padded(
            rows,
            active,
            variance,
            ridge,
            blocks,
            objective=objective,
            num_steps=steps,
            tolerance=CLIMB_TOLERANCE,
            floor=floor,
            **how,
        )

    def profile(rows: jax.Array, active: jax.Array, variance: jax.Array) -> jax.Array:
        """(n,) fitted values, or log-densities, on which equal mixtures agree."""
        if objective == "mean":
            return roots * mean_of(rows, active, design, fn) / jnp.sqrt(variance)
        log_gates, means, _ = gates_and_means(rows, active, design, fn)
        log_joint = log_gates - 0.5 * ((y[None] - means) ** 2 / variance + jnp.log(variance) + LOG_TWO_PI)
        return roots * jax.nn.logsumexp(log_joint, axis=0)

    def recorded(beam: _Beam) -> _Beam:
        """The parents at their optima, the best of which is recorded."""
        active = jnp.arange(places) < beam.number
        found = jax.lax.map(lambda one: settled(one, active, beam.variance, beam.ridge), beam.parents)
        few = (found.effective <= largest_share * total) | (beam.number == 1)
        scores = jnp.where(few, found.log_evidence, -jnp.inf)
        best = jax.tree.map(lambda leaf: leaf[jnp.argmax(scores)], found)
        new = (best.rows, scores.max(), best.log_likelihood, best.variance, best.ridge, best.effective)
        old = beam.grown
        grown = Grown(
            *jax.tree.map(lambda all_, one: all_.at[beam.number - 1].set(one), tuple(old)[:6], new),
            num_passes=old.num_passes + found.num_passes.sum(dtype=jnp.int32),
        )
        return _Beam(beam.number, found.rows, best.variance, best.ridge, grown)

    def next_parents(beam: _Beam) -> _Beam:
        """Parents with one expert more: the best distinct ends of climbs from splits."""
        number = beam.number
        before, active = jnp.arange(places) < number, jnp.arange(places) <= number
        keys = jax.random.split(jax.random.fold_in(key, number), 2 * NUM_PARENTS).reshape(2, NUM_PARENTS)

        def splits(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return _division_scores(
                *inputs, before, beam.variance, beam.ridge, sample, objective=objective, **how
            )

        gains, made = jax.lax.map(splits, (beam.parents, keys[0]))
        each = NUM_CANDIDATES // NUM_PARENTS
        divided = each if objective == "mean" else each // 2
        top = jax.lax.top_k(gains, divided)[1]
        chosen = jnp.take_along_axis(made, top[:, :, None, None], axis=1).reshape(-1, *made.shape[2:])
        if objective == "likelihood":
            turned = jax.vmap(_turned_apart, (0, 0, None, None, None))(
                beam.parents, keys[1], number, beam.variance, each - divided
            )
            chosen = jnp.concatenate([chosen, turned.reshape(-1, *made.shape[2:])])
        steps = CLIMB_STEPS if objective == "mean" else LIKELIHOOD_STEPS
        ends = jax.lax.map(
            lambda one: climbed(one, active, beam.variance, beam.ridge, steps), _centred_gates(chosen, active)
        )
        order = jnp.argsort(-jnp.where(jnp.isfinite(ends.value), ends.value, -jnp.inf))
        rows, variances = ends.rows[order], ends.variance[order]
        profiles = jax.lax.map(lambda one: profile(one[0], active, one[1]), (rows, variances))
        kept = jnp.argsort(repetitions(profiles, SAME_FUNCTION), stable=True)[:NUM_PARENTS]
        grown = beam.grown._replace(num_passes=beam.grown.num_passes + ends.num_passes.sum(dtype=jnp.int32))
        return _Beam(number + 1, rows[kept], variances[kept[0]], beam.ridge, grown)

    def advance(state: tuple[_Beam, jax.Array]) -> tuple[_Beam, jax.Array]:
        beam = recorded(state[0])
        going = beam.number < most
        if patience is not None:
            going &= beam.number - 1 - jnp.argmax(beam.grown.score) < patience
        return jax.lax.cond(going, next_parents, lambda beam: beam, beam), ~going

    given = ridge
    first = tuple(jnp.asarray(value, dtype) for value in FIRST_RIDGE)
    if objective == "likelihood":
        first = (jnp.asarray(WEAK_RIDGE, dtype),) * 2
    begin = Ridge(*first) if given is None else given
    nothing = jnp.zeros(places, dtype)
    empty = Grown(
        jnp.zeros((places, 2 * places, size), dtype),
        nothing - jnp.inf,
        nothing,
        nothing + 1,
        Ridge(nothing, nothing),
        nothing,
        jnp.asarray(0, jnp.int32),
    )
    start = jnp.zeros((NUM_PARENTS, 2 * places, size), dtype)
    start = start.at[:, 0].set(0.1 * standard_normal(key, (1, size), dtype))
    spread = jnp.sum(weights * y**2) / total
    begun = _Beam(jnp.asarray(1, jnp.int32), start, spread, begin, empty)
    return jax.lax.while_loop(lambda state: ~state[1], advance, (begun, jnp.asarray(False)))[0].grown
