"""Random starts, and the scale that the labels give them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.likelihood.free_columns import expert_inputs, widened_experts
from moejax.methods.method import MethodConfig, Problem
from moejax.model.family import as_family, channel_facts, is_gaussian, is_linear_location
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


def start_noise(problem: Problem, config: MethodConfig) -> Float[jax.Array, "*m"]:
    """() or (m,): the noise, or dispersion, of a random start, which explains its labels by noise first.

    For Gaussian labels it is their standard deviation; for another location family, robustly, that of the estimated signal and
    noise; for others the dispersion that was estimated before.
    """
    if is_gaussian(config.fn):
        return label_spread(without_offset(problem, config))
    facts = channel_facts(config.fn)
    if not as_family(config.fn).location_scale or problem.nuisances is None:
        return problem.noise_std
    return jnp.hypot(problem.noise_std, problem.nuisances.norm * facts.standard_deviation)


def without_offset(problem: Problem, config: MethodConfig) -> Problem:
    """The problem with labels less the offset, if g is linear; else, or without an offset, the problem itself."""
    place = None if config.columns is None else config.columns.offset
    if place is None or not is_linear_location(config.fn):
        return problem
    return problem._replace(y=problem.y - problem.x[:, place])


def with_nuisances(params: MoEParams, problem: Problem) -> MoEParams:
    """Parameters whose unit-norm experts get the norm, and the intercept, that were estimated from the labels."""
    if problem.nuisances is None:
        return params
    norm, intercept, _ = problem.nuisances
    return params._replace(experts=norm * params.experts, expert_bias=norm * params.expert_bias + intercept)


def random_starts(
    key: jax.Array,
    problem: Problem,
    config: MethodConfig,
    num_starts: int,
    noise_std: Float[jax.Array, "*m"] | float,
) -> MoEParams:
    """Leaves (s, ..): experts uniform on the unit sphere, zero gates, one noise level (), or (m,) for several outputs.

    If there are more experts than inputs, experts are normal instead, and so are the biases if there are intercepts. In few
    dimensions, random experts on the sphere coincide, and EM keeps equal experts equal. If norm and intercept were estimated
    (`Problem.nuisances`), all experts have these.
    """
    dim = expert_inputs(problem.x, config.columns).shape[1]
    crowded = config.num_experts > dim
    shape = (num_starts, config.num_experts, *problem.y.shape[1:], dim + int(crowded))
    draws = standard_normal(key, shape, problem.x.dtype)
    starts = jax.vmap(zero_gates, (0, None))(draws[..., :dim] if crowded else unit_rows(draws), noise_std)
    if crowded and config.has_expert_biases:
        starts = starts._replace(expert_bias=draws[..., -1])
    return with_experts_inputs(with_nuisances(starts, problem), config)


def with_experts_inputs(params: MoEParams, config: MethodConfig) -> MoEParams:
    """Experts (.., r) of their own inputs as experts of all inputs, and of the offset if there is one, with zero gates."""
    columns = config.columns
    if columns is None:
        return params
    gating = jnp.zeros((*params.gating.shape[:-1], columns.dim), params.gating.dtype)
    return params._replace(experts=widened_experts(params.experts, columns), gating=gating)
