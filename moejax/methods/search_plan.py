"""The numbers of mixtures in a search for the global maximum, and its state between stages."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jaxtyping import Bool, Float, Int

from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.method import MethodConfig, Problem
from moejax.methods.population import Optima
from moejax.model.family import Channel, as_family
from moejax.model.mixture import MoEParams
from moejax.moments.spectral import SpectralEstimate

DEFAULT_STARTS = 256
"""Random starts if `num_starts` is None."""
SEARCH_SAMPLES = 2048
"""The search uses at most this many random rows."""
MORE_FOR_OTHERS = 2
"""The factor of SEARCH_SAMPLES for families without a location, whose labels tell less of their expert."""
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
NUM_DESCENTS = 4
"""Runs of gradient descent, if the starts that climb alone do not suffice."""
FEWEST_FOR_DESCENTS = 15
"""With fewer random starts there are none."""
FEWEST_INDEPENDENT, MOST_INDEPENDENT, INDEPENDENT_ROWS = 15, 47, 2**15
"""Starts that climb alone at first, the spectral ones among them: so many that their number times the rows of the sample is
INDEPENDENT_ROWS, within these bounds. Small samples have more optima, and cost less. One more climbs with equal experts."""


def more_parameters(sample: Problem, config: MethodConfig) -> int:
    """The number of free parameters of the mixture beyond those of one expert alone."""
    noise = "per_expert" if config.noise == "per_expert" else "shared"
    sizes = (sample.x.shape[1], noise, config.fit_intercept, math.prod(sample.y.shape[1:]), config.columns)
    return num_free_parameters(config.num_experts, *sizes) - num_free_parameters(1, *sizes)


class Plan(NamedTuple):
    """The numbers of mixtures in a search; all are static."""

    num_spectral: int
    num_independent: int
    """Starts that climb alone at first; 0 for none."""
    num_more: int
    """Starts that climb alone after that, the first ones among them, if these may suffice; 0 if they are no more."""
    size: int
    """Parents and kept newcomers."""
    num_parents: int
    num_newcomers: int
    """New mixtures of a generation."""
    num_fresh: int
    """First generations, whose newcomers are random starts."""
    num_generations: int
    num_last: int
    """The last generations, in which the ridge falls."""
    has_children: bool
    has_descents: bool = False
    """If true, gradient descent is tried before the generations."""

    @classmethod
    def of(cls, num_random: int, num_spectral: int, num_experts: int, num_rows: int) -> Plan:
        """The plan for a number of starts, and of rows in the search's sample."""
        has_children = num_random >= FEWEST_FOR_CHILDREN and num_experts > 1
        size = min(POPULATION + KEPT_NEWCOMERS, num_random + num_spectral)
        num_fresh = max(-(-(num_random + num_spectral - size) // NEWCOMERS), 0)
        num_newcomers = NEWCOMERS if num_fresh or has_children else 0
        num_independent = min(max(INDEPENDENT_ROWS // num_rows, FEWEST_INDEPENDENT), MOST_INDEPENDENT)
        return cls(
            num_spectral,
            num_independent if size >= num_independent else 0,
            MOST_INDEPENDENT if size >= MOST_INDEPENDENT > num_independent else 0,
            size,
            min(POPULATION, size // 2) if num_newcomers else size,
            num_newcomers,
            num_fresh,
            max(num_fresh + GENERATIONS_OF_CHILDREN * has_children, 1),
            LAST_GENERATIONS if has_children else 0,
            has_children,
        )

    @property
    def num_drawn(self) -> int:
        """Spectral and random starts, if every generation is made."""
        return self.size + self.num_fresh * self.num_newcomers

    @property
    def num_starts(self) -> int:
        """All starts, children included, if every generation is made."""
        return self.size + self.num_generations * self.num_newcomers


class Search(NamedTuple):
    """The state of a search."""

    key: jax.Array
    sample: Problem
    """The search's sample."""
    drawn: MoEParams
    """Leaves (Plan.num_drawn, ..): the starts, the spectral ones first."""
    population: MoEParams
    """Leaves (Plan.size, ..): the parents, best first, and the newcomers of the last generation."""
    values: Float[jax.Array, " p"]
    """(Plan.num_parents,) log-likelihoods of the parents."""
    num_starts: Int[jax.Array, ""]
    """() int32 starts made so far, children included."""
    num_passes: Int[jax.Array, ""]
    """() int32 passes over the sample."""
    alone: Float[jax.Array, ""]
    """() log-likelihood of one expert: that of equal experts after one round, in which they stay equal."""
    optima: Optima
    """The optima of the independent starts."""
    settled: Bool[jax.Array, ""]
    """() bool: the independent starts, or the runs of gradient descent, suffice."""
    by_descent: Bool[jax.Array, ""]
    """() bool: the runs of gradient descent do; `optima` is then about them."""
    more_may_suffice: Bool[jax.Array, ""]
    """() bool: they do not, but `Plan.num_more` of them may, if no further optimum appears."""
    spectral: SpectralEstimate | None
    """The moments' diagnostics."""
    descended: MoEParams | None = None
    """Leaves (NUM_DESCENTS, ..): the ends of the runs of gradient descent, best first; None if the plan has none."""
    descended_values: Float[jax.Array, " s"] | None = None
    """(NUM_DESCENTS,) their log-likelihoods; minus infinity for a repetition, and for all before they are made."""


def search_rows(fn: Channel) -> int:
    """The most rows of a search: SEARCH_SAMPLES, and more for labels that tell less of their expert."""
    family = as_family(fn)
    if family.location_scale:
        return SEARCH_SAMPLES
    return SEARCH_SAMPLES * MORE_FOR_OTHERS


def plan_of(problem: Problem, config: MethodConfig) -> Plan:
    """The plan of the search for a problem."""
    num_random = DEFAULT_STARTS if config.num_starts is None else config.num_starts
    num_spectral = (
        (problem.transforms is not None) + len(problem.more_transforms) + (problem.third is not None)
    )
    num_rows = min(problem.x.shape[0], search_rows(config.fn))
    plan = Plan.of(num_random, num_spectral, config.num_experts, num_rows)
    has_descents = num_random >= FEWEST_FOR_DESCENTS and config.num_experts > 1
    has_descents &= problem.y.ndim == 1 and config.columns is None
    return plan._replace(has_descents=has_descents)
