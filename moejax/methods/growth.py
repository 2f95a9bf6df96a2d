r"""Growth: mixtures of 1, 2, .., K experts, each from the best ones with one expert fewer by a split of one expert.

From the parents with k experts, the best of hundreds of splits (`methods.splits`) climb a few passes. The best distinct ends are
the parents of k + 1, and climb on: for the mean with ridges and noise by evidence, for the likelihood with weak ridges. A growth
ends when the score, evidence or BIC, has not risen for some numbers of experts. One compiled program makes all numbers
(`likelihood.padded`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks
from moejax.likelihood.evidence import FIRST_RIDGE, VARIANCE_FLOOR, maximise_evidence
from moejax.likelihood.padded import Objective, Ridge, climb_padded, gates_and_means, mean_of
from moejax.methods.population import repetitions
from moejax.methods.splits import Sample, centred_gates, divided, turned_apart
from moejax.model.activations import ScalarFunction
from moejax.model.family import LOG_TWO_PI
from moejax.model.gaussian import standard_normal

NUM_PARENTS = 2
NUM_CANDIDATES = 16
"""Splits of all parents that climb."""
CLIMB_STEPS, ROUNDS, ROUND_STEPS = 8, 3, 8
"""Passes of a candidate's climb; rounds of evidence for the parents, and passes of each."""
LIKELIHOOD_STEPS, LIKELIHOOD_ROUNDS = 15, 40
"""Passes of a candidate's climb and of the parents', if the objective is the likelihood."""
WEAK_RIDGE = 1e-2
"""Ridges of the mixture while it grows: its choice is by BIC."""
SAME_FUNCTION = 4.0
"""Two mixtures whose fitted values differ by less than this sum of squares, in units of s^2, count as one; for the likelihood the
same of their log-densities."""
CLIMB_TOLERANCE = 1e-2
"""nats"""
LARGEST_SHARE = 0.5
"""Largest share of the rows that may be coefficients which the data determine."""
FIRST_SIZE = 0.1
"""Standard deviation of the first expert's coefficients: an even g has no slope at zero."""
SIZES = (6,)
"""Climbs of at most so many experts work in arrays of so many places, which are smaller."""


class Grown(NamedTuple):
    """The best mixture of each number of experts; leaves (K, ..)."""

    rows: Float[jax.Array, "K rows D"]
    score: Float[jax.Array, " K"]
    """(K,) log evidence, or minus half of BIC, in nats; minus infinity for a number that was not made."""
    log_likelihood: Float[jax.Array, " K"]
    variance: Float[jax.Array, " K"]
    ridge: Ridge
    effective: Float[jax.Array, " K"]
    """(K,) coefficients that the data determine; for the likelihood, all."""
    num_passes: Int[jax.Array, ""]
    """() passes over the data."""


class GrowthRules(NamedTuple):
    """The limits of a growth; all are traced."""

    most: Int[jax.Array, ""] | int
    """() largest number of experts."""
    largest_share: Float[jax.Array, ""] | float
    """() a mixture of several experts with more than this share of the rows as effective coefficients has no score."""
    ridge: Ridge | None
    """Fixed ridges of the mean; None: by evidence."""


class _End(NamedTuple):
    """The end of a climb."""

    rows: Float[jax.Array, "rows D"]
    score: Float[jax.Array, ""]
    log_likelihood: Float[jax.Array, ""]
    variance: Float[jax.Array, ""]
    ridge: Ridge
    effective: Float[jax.Array, ""]
    num_passes: Int[jax.Array, ""]


class _Beam(NamedTuple):
    """The state between two numbers of experts."""

    number: Int[jax.Array, ""]
    parents: Float[jax.Array, "B rows D"]
    variance: Float[jax.Array, ""]
    ridge: Ridge
    grown: Grown


@dataclasses.dataclass(frozen=True)
class _Growth:
    """The functions of one growth, while it is traced."""

    key: jax.Array
    blocks: SampleBlocks
    sample: Sample
    rules: GrowthRules
    fn: ScalarFunction
    objective: Objective
    places: int
    fit_intercept: bool
    patience: int | None

    @property
    def floor(self) -> Float[jax.Array, ""]:
        """() the least s^2."""
        return VARIANCE_FLOOR * self.mean_square

    @property
    def mean_square(self) -> Float[jax.Array, ""]:
        """() that of the labels."""
        _, y, weights = self.sample
        return jnp.sum(weights * y**2) / weights.sum()

    @property
    def how(self) -> dict[str, Any]:
        return {"fn": self.fn, "fit_intercept": self.fit_intercept}

    def active(self, number: jax.Array) -> Bool[jax.Array, " K"]:
        return jnp.arange(self.places, dtype=number.dtype) < number

    def in_small_arrays(self, climb: Any, number: jax.Array, rows: jax.Array) -> _End:
        """`climb(rows, active)` of mixtures with `number` experts, in arrays of the first of SIZES that holds them."""
        places = self.places
        sizes = [*(size for size in SIZES if size < places), places]

        def at(size: int) -> Any:
            def branch(rows: jax.Array) -> _End:
                small = jnp.concatenate([rows[:size], rows[places : places + size]])
                end = climb(small, jnp.arange(size, dtype=number.dtype) < number)
                whole = jnp.zeros_like(rows).at[:size].set(end.rows[:size])
                return end._replace(rows=whole.at[places : places + size].set(end.rows[size:]))

            return branch

        if len(sizes) == 1:
            return at(places)(rows)
        index = jnp.sum(number > jnp.asarray(sizes[:-1], number.dtype))
        return jax.lax.switch(index, [at(size) for size in sizes], rows)

    def climbed(self, beam: _Beam, number: jax.Array, rows: jax.Array, num_steps: int) -> _End:
        """The end of a climb with the beam's ridges, scored by its objective."""

        def climb(rows: jax.Array, active: jax.Array) -> _End:
            end = climb_padded(
                rows,
                active,
                beam.variance,
                beam.ridge,
                self.blocks,
                objective=self.objective,
                num_steps=num_steps,
                tolerance=CLIMB_TOLERANCE,
                floor=self.floor,
                **self.how,
            )
            value = end.sums.log_likelihood
            score = jnp.where(jnp.isfinite(end.value), end.value, -jnp.inf)
            free = jnp.zeros_like(value)
            return _End(end.rows, score, value, end.variance, beam.ridge, free, end.num_passes)

        return self.in_small_arrays(climb, number, rows)

    def settled(self, beam: _Beam, rows: jax.Array) -> _End:
        """A parent at its optimum, with its evidence, or minus half of its BIC."""
        if self.objective == "likelihood":
            end = self.climbed(beam, beam.number, rows, LIKELIHOOD_ROUNDS)
            free = ((2 * beam.number - 1) * rows.shape[1] + 1).astype(rows.dtype)
            score = end.log_likelihood - 0.5 * free * jnp.log(self.sample[2].sum())
            return end._replace(score=jnp.where(jnp.isfinite(score), score, -jnp.inf), effective=free)

        def climb(rows: jax.Array, active: jax.Array) -> _End:
            found = maximise_evidence(
                rows,
                active,
                beam.variance,
                beam.ridge,
                self.blocks,
                num_rounds=ROUNDS,
                num_steps=ROUND_STEPS,
                tolerance=CLIMB_TOLERANCE,
                fixed_ridge=self.rules.ridge is not None,
                **self.how,
            )
            return _End(
                found.rows,
                found.log_evidence,
                found.log_likelihood,
                found.variance,
                found.ridge,
                found.effective,
                found.num_passes,
            )

        return self.in_small_arrays(climb, beam.number, rows)

    def profile(self, rows: jax.Array, active: jax.Array, variance: jax.Array) -> Float[jax.Array, " n"]:
        """(n,) fitted values, or log-densities, in which repetitions of a mixture agree."""
        design, y, weights = self.sample
        if self.objective == "mean":
            return jnp.sqrt(weights / variance) * mean_of(rows, active, design, self.fn)
        log_gates, means, _ = gates_and_means(rows, active, design, self.fn)
        log_joint = log_gates - 0.5 * ((y[None] - means) ** 2 / variance + jnp.log(variance) + LOG_TWO_PI)
        return jnp.sqrt(weights) * jax.nn.logsumexp(log_joint, axis=0)

    def recorded(self, beam: _Beam) -> _Beam:
        """The parents at their optima, the best of which is recorded."""
        found = jax.lax.map(lambda rows: self.settled(beam, rows), beam.parents)
        few = found.effective <= self.rules.largest_share * self.sample[2].sum()
        scores = jnp.where(few | (beam.number == 1), found.score, -jnp.inf)
        best = jax.tree.map(lambda leaf: leaf[jnp.argmax(scores)], found)._replace(score=scores.max())
        old, place = beam.grown, beam.number - 1
        new = Grown(*best)._replace(num_passes=found.num_passes.sum(dtype=jnp.int32))
        # the passes add up, the rest is put in its place
        recorded = jax.tree.map(
            lambda all_, one: all_.at[place].set(one) if all_.ndim else all_ + one,
            old,
            new,
        )
        return _Beam(beam.number, found.rows, best.variance, best.ridge, recorded)

    def next_parents(self, beam: _Beam) -> _Beam:
        """Parents with one expert more: the best distinct ends of climbs from splits."""
        number, shape = beam.number, beam.parents.shape[1:]
        active = self.active(number + 1)
        keys = jax.random.split(jax.random.fold_in(self.key, number), 2 * NUM_PARENTS)
        each = NUM_CANDIDATES // NUM_PARENTS
        count = each if self.objective == "mean" else each // 2

        def divisions(given: tuple[jax.Array, jax.Array]) -> jax.Array:
            before = self.active(number)
            return divided(
                *given,
                before,
                beam.variance,
                beam.ridge,
                self.sample,
                objective=self.objective,
                count=count,
                **self.how,
            )

        splits = jax.lax.map(divisions, (beam.parents, keys[:NUM_PARENTS])).reshape(-1, *shape)
        if count < each:
            turned = jax.vmap(turned_apart, (0, 0, None, None, None))(
                beam.parents, keys[NUM_PARENTS:], number, beam.variance, each - count
            )
            splits = jnp.concatenate([splits, turned.reshape(-1, *shape)])
        steps = CLIMB_STEPS if self.objective == "mean" else LIKELIHOOD_STEPS
        ends = jax.lax.map(
            lambda rows: self.climbed(beam, number + 1, rows, steps), centred_gates(splits, active)
        )
        ranked = jax.tree.map(lambda leaf: leaf[jnp.argsort(-ends.score)], ends)
        profiles = jax.lax.map(
            lambda end: self.profile(end[0], active, end[1]), (ranked.rows, ranked.variance)
        )
        kept = jnp.argsort(repetitions(profiles, SAME_FUNCTION), stable=True)[:NUM_PARENTS]
        passes = beam.grown.num_passes + ends.num_passes.sum(dtype=jnp.int32)
        grown = beam.grown._replace(num_passes=passes)
        return _Beam(number + 1, ranked.rows[kept], ranked.variance[kept[0]], beam.ridge, grown)

    def advance(self, state: tuple[_Beam, jax.Array]) -> tuple[_Beam, jax.Array]:
        """Record one number of experts and go on to the next, unless the growth ends."""
        beam = self.recorded(state[0])
        going = beam.number < self.rules.most
        if self.patience is not None:
            going &= beam.number - 1 - jnp.argmax(beam.grown.score).astype(beam.number.dtype) < self.patience
        return jax.lax.cond(going, self.next_parents, lambda beam: beam, beam), ~going

    def run(self) -> Grown:
        """The whole growth."""
        size, dtype, places = self.sample[0].shape[0], self.sample[0].dtype, self.places
        ridge = self.rules.ridge
        if ridge is None:
            weak = (WEAK_RIDGE, WEAK_RIDGE)
            given = FIRST_RIDGE if self.objective == "mean" else weak
            ridge = Ridge(*(jnp.asarray(value, dtype) for value in given))
        zeros = jnp.zeros(places, dtype)
        nothing = Grown(
            jnp.zeros((places, 2 * places, size), dtype),
            zeros - jnp.inf,
            zeros,
            zeros + 1,
            Ridge(zeros, zeros),
            zeros,
            jnp.asarray(0, jnp.int32),
        )
        start = jnp.zeros((NUM_PARENTS, 2 * places, size), dtype)
        start = start.at[:, 0].set(FIRST_SIZE * standard_normal(self.key, (1, size), dtype))
        begun = _Beam(jnp.asarray(1, jnp.int32), start, self.mean_square, ridge, nothing)
        return jax.lax.while_loop(lambda state: ~state[1], self.advance, (begun, jnp.asarray(False)))[0].grown


def grow(
    key: jax.Array,
    blocks: SampleBlocks,
    sample: Sample,
    rules: GrowthRules,
    *,
    fn: ScalarFunction,
    objective: Objective,
    places: int,
    fit_intercept: bool,
    patience: int | None,
) -> Grown:
    """Mixtures of 1 to `rules.most` experts.

    Args:
        key: PRNG key.
        blocks: the sample.
        sample: the same, in one piece.
        rules: the limits.
        fn: g.
        objective: "mean", with ridges by evidence, or "likelihood".
        places: K.
        fit_intercept: if true, the last coefficient of a row is an intercept.
        patience: growth ends after so many numbers of experts without a better score; None: never.
    """
    return _Growth(key, blocks, sample, rules, fn, objective, places, fit_intercept, patience).run()
