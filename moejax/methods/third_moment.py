"""The method that starts from the third moment alone, for an activation whose second moment shows nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Int

from moejax.likelihood.free_columns import expert_inputs
from moejax.methods.from_moments import climbed_from
from moejax.methods.method import MethodConfig, MethodResult, Problem
from moejax.methods.starts import with_experts_inputs, with_nuisances, zero_gates
from moejax.model.mixture import MoEParams
from moejax.model.status import Status
from moejax.moments.third_moment import ThirdMomentEstimate, num_contractions, third_moment_estimate


def third_moment_passes(problem: Problem, config: MethodConfig) -> Int[jax.Array, ""]:
    """() int32 passes over the data of the moments: one for each contraction, and one for the tensor in their span."""
    dim = expert_inputs(problem.x, config.columns).shape[1]
    return jnp.asarray(num_contractions(dim) + 1, jnp.int32)


def _estimate(
    key: jax.Array, problem: Problem, config: MethodConfig
) -> tuple[ThirdMomentEstimate, MoEParams]:
    """The moments' estimate, and its experts with zero gates, of all inputs and of the norm of the family's nuisances."""
    assert problem.third is not None, "the third moment is given its label transform"
    estimate = third_moment_estimate(
        key,
        expert_inputs(problem.x, config.columns),
        problem.third(problem.y),
        problem.weights,
        num_experts=config.num_experts,
        chunk_size=config.chunk_size,
    )
    params = with_nuisances(zero_gates(estimate.experts, problem.noise_std), problem)
    return estimate, with_experts_inputs(params, config)


def third_moment_experts(key: jax.Array, problem: Problem, config: MethodConfig) -> MoEParams:
    """Experts from the third moment, with zero gates: a start of a search."""
    return _estimate(key, problem, config)[1]


def third_moment(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Experts from the third moment without whitening, then EM for the gates, joint EM and the polish, as in `spectral_em`.

    It needs an order-3 transform only: sin(2 t), whose labels have no second moment with the inputs, has one. With strong gates it
    has more bias than `spectral_em`, which is better where both can be used.
    """
    estimate, params = _estimate(key, problem, config)
    total = jnp.maximum(estimate.mixing_weights.sum(), jnp.finfo(problem.x.dtype).tiny)
    start = MethodResult(
        params,
        estimate.mixing_weights / total,
        jnp.zeros(0, problem.x.dtype),
        third_moment_passes(problem, config),
        jnp.asarray(Status.OK, jnp.int32),
        None,
    )
    return climbed_from(start, problem, config)
