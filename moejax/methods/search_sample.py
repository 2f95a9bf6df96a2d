"""The rows that a search reads, their precision, and the scales by which it compares mixtures on them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.methods.method import MethodConfig, Problem
from moejax.model.family import Channel, computes_in

SAME_MIXTURE = 12.0
"""Mixtures whose log-densities of the samples differ by less than this, as a sum of squares, count as one.

Near an optimum that sum is about twice the log-likelihood, in nats, that separates them: two on their way to the same optimum are
recognised as one before they reach it.
"""
SEARCH_RIDGE = 1e-6
"""Ridge on the gates during the search, per sample, if the fit's own is smaller."""
LARGEST_LABEL = 1e15
"""Labels beyond this size, whose squares have no sum in single precision, are cut to it in the search."""


def search_sample(key: jax.Array, problem: Problem, num_rows: int) -> Problem:
    """The problem on at most `num_rows` rows, those of positive weight drawn without replacement."""
    if problem.x.shape[0] <= num_rows:
        return problem
    draw = jax.random.uniform(key, problem.weights.shape, problem.weights.dtype)
    _, rows = jax.lax.top_k(jnp.where(problem.weights > 0, draw, -1.0), num_rows)
    return problem._replace(x=problem.x[rows], y=problem.y[rows], weights=problem.weights[rows])


def search_ridge(problem: Problem, config: MethodConfig) -> Float[jax.Array, ""]:
    """() the ridge of the search: SEARCH_RIDGE per sample, or that of the fit if it is larger."""
    return jnp.maximum(SEARCH_RIDGE * problem.weights.sum(), jnp.asarray(config.ridge, problem.x.dtype))


def in_single_precision(sample: Problem, fn: Channel) -> Problem:
    """The sample in single precision, in which the search takes less time; as it is if g of such numbers is none.

    The search compares log-likelihoods that differ by tenths of a nat, and its best mixtures are polished in the precision of the
    data.
    """
    single = jnp.float32
    if not computes_in(fn, single):
        return sample
    return Problem(
        sample.x.astype(single),
        jnp.clip(sample.y, -LARGEST_LABEL, LARGEST_LABEL).astype(single),
        sample.weights.astype(single),
        jnp.asarray(sample.noise_std, single),
        None,
        least_noise=None if sample.least_noise is None else sample.least_noise.astype(single),
        nuisances=jax.tree.map(lambda leaf: jnp.asarray(leaf, single), sample.nuisances),
    )
