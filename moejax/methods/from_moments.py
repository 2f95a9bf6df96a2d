"""The methods that start from moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax.likelihood.em import EMRun, gating_em, joint_em
from moejax.likelihood.free_columns import expert_inputs
from moejax.likelihood.polish import PolishRun, polish
from moejax.methods.method import (
    MethodConfig,
    MethodResult,
    Problem,
    finish,
    least_noise_of,
    noise_while_inexact,
    with_path,
)
from moejax.methods.residual_passes import NUM_PASSES, residual_estimate
from moejax.methods.starts import with_experts_inputs, with_nuisances, zero_gates
from moejax.model.mixture import MoEParams
from moejax.model.status import Status
from moejax.moments.spectral import spectral_estimate

MOMENT_PASSES = 2
"""Passes over the data: one for the second moment, one for the tensor that it whitens."""


def spectral(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments only: unit-norm experts and mixing weights; the gates stay zero. With residual passes it is `spectral_residual`."""
    assert problem.transforms is not None, "a method of moments is given label transforms"
    if config.num_residual_passes:
        return spectral_residual(key, problem, config)
    estimate = spectral_estimate(
        key,
        expert_inputs(problem.x, config.columns),
        problem.y,
        problem.transforms,
        problem.weights,
        num_experts=config.num_experts,
        order=config.order,
        num_restarts=config.num_restarts,
        num_polar_iterations=config.num_polar_iterations,
        chunk_size=config.chunk_size,
        log_density=config.log_density,
    )
    params = with_nuisances(zero_gates(estimate.experts, problem.noise_std), problem)
    params = with_experts_inputs(params, config)
    history = jnp.zeros(0, problem.x.dtype)
    mixing_weights = estimate.mixing_weights / estimate.mixing_weights.sum()
    num_iterations = jnp.asarray(MOMENT_PASSES, jnp.int32)
    result = MethodResult(params, mixing_weights, history, num_iterations, estimate.status, estimate)
    return with_path(result, config)


def spectral_residual(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments and residual passes, no polish: unit-norm experts, the gates that EM fits to them, and mixing weights.

    EM estimates the noise even if it is known, because the error of inexact experts adds to it; a known noise is restored at the
    end.
    """
    assert problem.transforms is not None, "a method of moments is given label transforms"
    passes = NUM_PASSES if config.num_residual_passes is None else config.num_residual_passes
    run = residual_estimate(
        key,
        problem.x,
        problem.y,
        problem.transforms,
        problem.weights,
        problem.noise_std,
        fn=config.fn,
        num_experts=config.num_experts,
        order=config.order,
        num_passes=passes,
        noise=noise_while_inexact(config),
        fit_intercept=config.fit_intercept,
        ridge=config.ridge,
        num_restarts=config.num_restarts,
        num_polar_iterations=config.num_polar_iterations,
        chunk_size=config.chunk_size,
        log_density=config.log_density,
        columns=config.columns,
        nuisances=problem.nuisances,
    )
    params = run.params
    if config.noise == "known":
        params = params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))
    status = jnp.where(
        (run.spectral.status == Status.OK) & ~run.converged, Status.NOT_CONVERGED, run.spectral.status
    )
    return MethodResult(
        params, run.mixing_weights, run.history, run.num_steps, status.astype(jnp.int32), run.spectral
    )


EM_STEPS = 30
EM_TOLERANCE = 2e-2
"""EM steps between the moments and the polish, and the gain in nats per sample below which they stop. They only need to enter the
region where Newton's method converges."""


def spectral_em(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments, gating EM with those experts, then the polish to the maximum-likelihood estimate.

    With `config.polish` False, the algorithm of Makkuva et al. 2019 as published: the experts stay where the moments put
    them and gating EM runs at the given noise. With the polish, the noise is inflated by its M-step while the experts are
    still inexact. The experts join EM once the gates' own step promises little; a known noise is restored before the polish.
    """
    return climbed_from(spectral(key, problem, config), problem, config)


def climbed_from(start: MethodResult, problem: Problem, config: MethodConfig) -> MethodResult:
    """The maximum-likelihood estimate from the experts of a moment estimate; without polish, the gates that EM fits to them."""
    if not config.polish:
        run = gating_em(
            start.params,
            problem.x,
            problem.y,
            problem.weights,
            fn=config.fn,
            num_steps=config.max_iterations,
            fit_intercept=config.fit_intercept,
            noise=config.noise,
            ridge=config.ridge,
            record_path=config.record_path,
            least_noise=least_noise_of(problem, config),
            columns=config.columns,
        )
        num_steps = start.num_iterations + run.num_steps
        result = finish(run.params, run.history, num_steps, run.converged, problem, start.spectral)
        return with_path(result, config, run.path)
    joint = em_before_polish(start.params, problem, config)
    run = polish_from(joint.params, problem, config)
    history = jnp.concatenate([joint.history, run.history])
    num_steps = start.num_iterations + joint.num_steps + run.num_steps
    result = finish(run.params, history, num_steps, run.converged, problem, start.spectral)
    return with_path(result, config, joint.path, run.path)


def em_before_polish(params: MoEParams, problem: Problem, config: MethodConfig) -> EMRun:
    """EM from the moments' experts: for the gates at first, then jointly, with the noise inflated even if it is known."""
    return joint_em(
        params,
        problem.x,
        problem.y,
        problem.weights,
        fn=config.fn,
        num_steps=EM_STEPS,
        fit_intercept=config.fit_intercept,
        noise=noise_while_inexact(config),
        ridge=config.ridge,
        tolerance=EM_TOLERANCE,
        before_polish=True,
        record_path=config.record_path,
        least_noise=least_noise_of(problem, config),
        columns=config.columns,
    )


def polish_from(params: MoEParams, problem: Problem, config: MethodConfig) -> PolishRun:
    """The polish of a method's last stage, from EM's parameters; a known noise is restored first."""
    if config.noise == "known":
        params = params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))
    return polish(
        params,
        problem.x,
        problem.y,
        problem.weights,
        fn=config.fn,
        num_steps=config.max_iterations,
        noise=config.noise,
        fit_intercept=config.fit_intercept,
        ridge=config.ridge,
        economical=config.economical,
        record_path=config.record_path,
        least_noise=least_noise_of(problem, config),
        columns=config.columns,
    )
