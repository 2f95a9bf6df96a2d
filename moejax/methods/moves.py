"""Moves between optima that EM cannot make."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.methods.population import rows_of
from moejax.model.gaussian import standard_normal
from moejax.model.mixture import MoEParams, regauge
from moejax.model.small_linear_algebra import unit_rows

NOISE_OF_CHILDREN = 1.5
"""The noise of a child, relative to its parent's; with more noise, samples move to another expert more easily."""


def children_of(key: jax.Array, population: MoEParams, count: int) -> MoEParams:
    """`count` children, leaves (count, ..), of a population (s, ..); parents are taken in turn.

    Experts and gates may have different numbers of inputs.

    In each child, one expert is dropped. Its place goes to a half of another expert that is split, to a newly drawn expert,
    or to an expert of another mixture of the population.
    """
    normal_key, uniform_key = jax.random.split(key)
    size, k = population.gating.shape[:2]
    dtype = population.gating.dtype
    # gates without a reference expert, so that the gates of two parents can be combined
    population = population._replace(
        gating=population.gating - population.gating.mean(axis=1, keepdims=True),
        gating_bias=population.gating_bias - population.gating_bias.mean(axis=1, keepdims=True),
    )
    uniform = jax.random.uniform(uniform_key, (4, count), dtype)
    bounds = jnp.asarray([size - 1, 3, k, k - 1], jnp.int32)[:, None]
    draw = jnp.clip((uniform * bounds.astype(dtype)).astype(jnp.int32), 0, bounds - 1)
    offset, kind, dropped, shift = draw
    parent_index = jnp.arange(count, dtype=jnp.int32) % size
    other_index = (parent_index + 1 + offset) % size
    parents, others = rows_of(population, parent_index), rows_of(population, other_index)
    shape, gate_inputs = population.experts.shape[2:], population.gating.shape[-1]
    num_entries = math.prod(shape)
    draws = standard_normal(normal_key, (count, 2, num_entries + gate_inputs), dtype)
    experts, gates = draws[:, :, :num_entries].reshape(count, 2, *shape), draws[:, 0, num_entries:]
    return jax.vmap(_child)(kind, dropped, (dropped + 1 + shift) % k, experts, gates, parents, others)


def _child(
    kind: Int[jax.Array, ""],
    dropped: Int[jax.Array, ""],
    chosen: Int[jax.Array, ""],
    expert_draws: Float[jax.Array, "2 *m d"],
    gate_draw: Float[jax.Array, " s"],
    parent: MoEParams,
    other: MoEParams,
) -> MoEParams:
    """A child of kind () 0 (split), 1 (new draw) or 2 (from `other`); expert_draws (2, d) or (2, m, d), gate_draw (s,)."""
    dtype = parent.experts.dtype
    size = jnp.sqrt(jnp.mean(parent.experts**2)) + jnp.finfo(dtype).tiny
    dim = jnp.asarray(parent.experts.shape[-1], dtype)

    own, transferred = rows_of(parent, chosen), rows_of(other, chosen)
    # two copies of an expert, moved apart in a random direction of its coefficients and of its gate
    apart = 0.5 * size * expert_draws[0]
    first = own._replace(experts=own.experts - apart, gating=own.gating - gate_draw)
    second = own._replace(experts=own.experts + apart, gating=own.gating + gate_draw)
    # an expert in a random direction, with a constant gate
    drawn = own._replace(
        experts=jnp.sqrt(dim) * size * unit_rows(expert_draws[1]),
        gating=jnp.zeros_like(gate_draw),
        expert_bias=parent.expert_bias.mean(axis=0),
        gating_bias=jnp.zeros((), dtype),
    )
    put = jax.tree.map(
        lambda a, b, c: jnp.where(kind == 0, a, jnp.where(kind == 1, b, c)), first, drawn, transferred
    )
    kept = jax.tree.map(lambda a, b: jnp.where(kind == 0, a, b), second, own)
    child = jax.tree.map(
        lambda leaf, new, old: leaf.at[dropped].set(new).at[chosen].set(old), parent, put, kept
    )
    return regauge(child._replace(noise_std=NOISE_OF_CHILDREN * parent.noise_std))
