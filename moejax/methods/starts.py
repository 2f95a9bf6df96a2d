"""Random starts, and the scale that the labels give them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.likelihood.free_columns import expert_inputs, widened_experts
from moejax.methods.method import MethodConfig, Problem
from moejax.model.gaussian import standard_normal
from moejax.model.mixture import MoEParams
from moejax.model.small_linear_algebra import unit_rows


def number_of_starts(config: MethodConfig) -> int:
    """The number of random starts: one if the method is asked for none in particular."""
    return 1 if config.num_starts is None else config.num_starts


def index_of_best(values: Float[jax.Array, " s"]) -> Int[jax.Array, ""]:
    """() index of the largest finite value."""
    return jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))


def zero_gates(experts: Float[jax.Array, "k *m d"], noise_std: Float[jax.Array, "*m"] | float) -> MoEParams:
    """Experts (k, d) with one noise level (), or (k, m, d) with (m,); zero gates and no biases."""
    zeros = jnp.zeros(experts.shape[:-1], experts.dtype)
    gates = jnp.zeros((experts.shape[0], experts.shape[-1] + 1), experts.dtype)
    return MoEParams(experts, gates[:, :-1], jnp.broadcast_to(noise_std, zeros.shape), zeros, gates[:, -1])


def label_spread(problem: Problem) -> Float[jax.Array, "*m"]:
    """(), or (m,): the weighted standard deviation of the labels."""
    share = problem.weights / problem.weights.sum()
    centred = problem.y - jnp.broadcast_to(label_mean(problem), problem.y.shape)
    return jnp.sqrt(share @ jnp.where(_per_row(problem.weights > 0, centred), centred, 0) ** 2)


def label_mean(problem: Problem) -> Float[jax.Array, "*m"]:
    """(), or (m,): the weighted mean of the labels."""
    share = problem.weights / problem.weights.sum()
    return share @ jnp.where(_per_row(problem.weights > 0, problem.y), problem.y, 0)


def _per_row(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def random_starts(
    key: jax.Array,
    problem: Problem,
    config: MethodConfig,
    num_starts: int,
    noise_std: Float[jax.Array, "*m"] | float,
) -> MoEParams:
    """Leaves (s, ..): experts uniform on the unit sphere, zero gates, one noise level (), or (m,) for several outputs.

    If there are more experts than inputs, experts are normal instead, and so are the biases if there are intercepts. In few
    dimensions, random experts on the sphere coincide, and EM keeps equal experts equal.
    """
    dim = expert_inputs(problem.x, config.columns).shape[1]
    crowded = config.num_experts > dim
    shape = (num_starts, config.num_experts, *problem.y.shape[1:], dim + int(crowded))
    draws = standard_normal(key, shape, problem.x.dtype)
    starts = jax.vmap(zero_gates, (0, None))(draws[..., :dim] if crowded else unit_rows(draws), noise_std)
    if crowded and config.has_expert_biases:
        starts = starts._replace(expert_bias=draws[..., -1])
    return with_experts_inputs(starts, config)


def with_experts_inputs(params: MoEParams, config: MethodConfig) -> MoEParams:
    """Experts (.., r) of their own inputs as experts of all inputs, with zero gates."""
    columns = config.columns
    if columns is None:
        return params
    gating = jnp.zeros((*params.gating.shape[:-1], columns.dim), params.gating.dtype)
    return params._replace(experts=widened_experts(params.experts, columns), gating=gating)
