"""Further Gauss-Newton steps of the experts in one M-step of EM, at the same responsibilities."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.likelihood.blocks import SampleBlocks, sum_over_blocks
from moejax.likelihood.free_columns import FreeColumns, parts_of_design
from moejax.likelihood.m_step import Expectation, MStep, Point
from moejax.likelihood.predictors import log_sum_and_shares, weighted_gram
from moejax.model.family import Channel, as_family


def expert_sums(
    point: Point,
    responsible: Point,
    sums: Expectation,
    blocks: SampleBlocks,
    *,
    fn: Channel,
    columns: FreeColumns | None = None,
) -> Expectation:
    """The sums of an E-step at `responsible`, with those of the experts at another `point`, in one pass over the data."""
    family = as_family(fn)
    k, noise_std = point.noise_std.shape[0], responsible.noise_std.reshape(-1)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
        labels = y[None] if y.ndim == 1 else jnp.tile(y, (k, 1))
        before = responsible.predictors(design)
        log_densities = family.log_density(labels, before[: noise_std.size], noise_std[:, None])
        if y.ndim == 2:
            log_densities = log_densities.reshape(k, *y.shape).sum(axis=1)
        logits = jnp.concatenate([before[noise_std.size :], jnp.zeros_like(weights)[None]])
        r = weights[None] * log_sum_and_shares(logits + log_densities)[1]
        if y.ndim == 2:
            r = jnp.repeat(r, y.shape[0], axis=0)
        predictors = point.predictors(design)[: noise_std.size]
        at = family.first_order(labels, predictors, noise_std[:, None])
        of_experts, _ = parts_of_design(design, columns)
        return (
            tuple(jnp.sum(r * term, axis=1) for term in at.dispersion),
            (r * at.score) @ of_experts.T,
            weighted_gram(of_experts, r * at.information),
        )

    dispersion, gradient, information = sum_over_blocks(sums_of, blocks)
    return sums._replace(dispersion=dispersion, expert_gradient=gradient, expert_information=information)


def more_expert_steps(
    m_step: Callable[[Point, Expectation], MStep],
    best: Point,
    sums: Expectation,
    first: MStep,
    blocks: SampleBlocks,
    count: int,
    tolerance: Float[jax.Array, ""],
    fn: Channel,
    columns: FreeColumns | None,
) -> MStep:
    """The M-step after `count` further steps of the experts, with the gates' step from `best`."""
    num_rows = best.noise_std.size

    def again(_: int, candidate: MStep) -> MStep:
        experts = candidate.point.predictors.rows[:num_rows]
        rows = best.predictors.rows.at[:num_rows].set(experts)
        point = Point(best.predictors._replace(rows=rows), best.noise_std)
        return m_step(point, expert_sums(point, best, sums, blocks, fn=fn, columns=columns))

    last = jax.lax.fori_loop(0, count, again, first)
    # the last step alone may promise little where the first did not: the run must not end there
    return last._replace(promised=jnp.maximum(last.promised, jnp.minimum(first.promised, tolerance)))
