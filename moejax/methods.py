"""The registry of methods: each maps a sample to an estimate, inside one compiled program.

A method is a function (key, problem, config) -> MethodResult: `problem` is data (arrays), `config` is static. A new one is
registered under a name with `register_method`, and is then known to `fit`, to trials and to sweeps.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.activations import ScalarFunction
from moejax.em import RIDGE, NoiseModel, gating_em, joint_em
from moejax.gaussian import standard_normal
from moejax.model import MoEParams, gate_logits, unit_rows
from moejax.polish import polish
from moejax.residual import NUM_PASSES, residual_estimate
from moejax.score_tensors import LogDensity
from moejax.spectral import (
    NOT_FINITE,
    OK,
    SPECTRAL_STATUS,
    SpectralEstimate,
    SpectralTransforms,
    spectral_estimate,
)

NOT_CONVERGED = len(SPECTRAL_STATUS)
METHOD_STATUS = SPECTRAL_STATUS | {
    NOT_CONVERGED: "the iterations ended with their budget before they converged"
}
"""Words for every status a method ends with."""


class Problem(NamedTuple):
    """What a method is given: a sample, and what is known about it."""

    x: jax.Array
    """(n, d) inputs."""
    y: jax.Array
    """(n,) labels."""
    weights: jax.Array
    """(n,) sample weights, zero for padding."""
    noise_std: jax.Array
    """() sigma, known or estimated beforehand: the label transforms are for it, and EM starts from it."""
    transforms: SpectralTransforms | None
    """Label transforms of the fitted activation at that noise; None for a method that uses no moments."""


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The static choices of a fit; hashable, one compiled program each."""

    fn: ScalarFunction
    num_experts: int
    order: int
    """Of the tensor that is decomposed, 3 or 4."""
    noise: NoiseModel = "shared"
    fit_intercept: bool = False
    num_restarts: int = 16
    num_starts: int = 1
    polish: bool = True
    max_iterations: int = 100
    num_polar_iterations: int = 8
    ridge: float = RIDGE
    chunk_size: int | None = None
    """Samples that the moments take at once; None takes all."""
    num_residual_passes: int | None = None
    """Residual passes after the moments; None: 5 for "spectral_residual", 0 for the other methods."""
    log_density: LogDensity | None = None
    """x (d,) -> log p(x) of inputs that are not standard normal; their moments are then a start, not an estimate."""


class MethodResult(NamedTuple):
    """An estimate and how it was reached."""

    params: MoEParams
    mixing_weights: jax.Array
    """(k,) estimated E[P_i]."""
    history: jax.Array
    """(h,) log-likelihood in nats at every pass over the data, stage after stage; NaN where a stage had converged."""
    num_iterations: jax.Array
    """() int32 passes made."""
    status: jax.Array
    """() int32, a key of METHOD_STATUS; 0 is ok."""
    spectral: SpectralEstimate | None
    """The moments' diagnostics, where the method uses moments."""


Method = Callable[[jax.Array, Problem, MethodConfig], MethodResult]
_REGISTRY: dict[str, tuple[Method, bool]] = {}


def register_method(name: str, method: Method, *, uses_moments: bool) -> Method:
    """Make a method available under a name to `fit`, trials and sweeps.

    Args:
        name: an identifier.
        method: (key, problem, config) -> MethodResult, traceable by JAX.
        uses_moments: whether `problem.transforms` must be there, so that an activation without a usable order is refused.

    Raises:
        ValueError: the name is no identifier, or `method` is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier() or not callable(method):
        raise ValueError(f"method: expected an identifier and a function, got {name!r} and {method!r}")
    _REGISTRY[name] = (method, uses_moments)
    return method


def method_names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_REGISTRY)


def get_method(name: str) -> Method:
    """The method behind a name.

    Raises:
        ValueError: it is not registered; the message names the nearest.
    """
    return _lookup(name)[0]


def uses_moments(name: str) -> bool:
    """Whether the method needs label transforms."""
    return _lookup(name)[1]


def _lookup(name: str) -> tuple[Method, bool]:
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(str(name), _REGISTRY, n=2, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"method: unknown name {name!r}; {nearest}registered: {', '.join(_REGISTRY)}")


def _zero_gates(experts: jax.Array, noise_std: jax.Array) -> MoEParams:
    zeros = jnp.zeros(experts.shape[0], experts.dtype)
    return MoEParams(experts, jnp.zeros_like(experts), jnp.full_like(zeros, noise_std), zeros, zeros)


def _mean_gates(params: MoEParams, problem: Problem) -> jax.Array:
    """(k,): the weighted mean over the sample of P_i(x)."""
    probabilities = jax.nn.softmax(gate_logits(params, problem.x).T, axis=0)
    return probabilities @ problem.weights / problem.weights.sum()


def spectral(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments only: unit-norm experts and mixing weights; the gates stay zero. With residual passes, as `spectral_residual`."""
    assert problem.transforms is not None, "a method of moments is given label transforms"
    if config.num_residual_passes:
        return spectral_residual(key, problem, config)
    estimate = spectral_estimate(
        key,
        problem.x,
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
    params = _zero_gates(estimate.experts, problem.noise_std)
    history = jnp.zeros(0, problem.x.dtype)
    mixing_weights = estimate.mixing_weights / estimate.mixing_weights.sum()
    return MethodResult(params, mixing_weights, history, jnp.asarray(0, jnp.int32), estimate.status, estimate)


def spectral_residual(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments and residual passes, no polish: unit-norm experts, the gates that EM fits to them, and mixing weights.

    EM estimates the noise even where it is known, because the error of inexact experts adds to it; a known one is restored after.
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
        noise="shared" if config.noise == "known" else config.noise,
        fit_intercept=config.fit_intercept,
        ridge=config.ridge,
        num_restarts=config.num_restarts,
        num_polar_iterations=config.num_polar_iterations,
        chunk_size=config.chunk_size,
        log_density=config.log_density,
    )
    params = run.params
    if config.noise == "known":
        params = params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))
    status = jnp.where((run.spectral.status == OK) & ~run.converged, NOT_CONVERGED, run.spectral.status)
    return MethodResult(
        params, run.mixing_weights, run.history, run.num_steps, status.astype(jnp.int32), run.spectral
    )


GATING_STEPS = 20
GATING_TOLERANCE = 2e-2
JOINT_STEPS = 10
JOINT_TOLERANCE = 2e-2
"""EM steps between the moments and the polish, and the gain in nats per sample below which they stop: enough to enter the
region where Newton converges, and no more."""


def spectral_em(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments, gating EM with those experts, then the polish to the maximum-likelihood estimate.

    With `config.polish` False, the algorithm of Makkuva et al. 2019 as published: the experts stay where the moments put
    them and gating EM runs at the given noise. With the polish, the noise is inflated by its M-step while the experts are
    still inexact, and a few joint EM steps lead over to Newton; a known noise is restored before it.
    """
    start = spectral(key, problem, config)
    data = (problem.x, problem.y, problem.weights)
    common = {"fn": config.fn, "fit_intercept": config.fit_intercept, "ridge": config.ridge}
    if not config.polish:
        run = gating_em(start.params, *data, num_steps=config.max_iterations, noise=config.noise, **common)
        return _finish(run.params, run.history, run.num_steps, run.converged, problem, start.spectral)
    inflated = "shared" if config.noise == "known" else config.noise
    gates = gating_em(
        start.params, *data, num_steps=GATING_STEPS, noise=inflated, tolerance=GATING_TOLERANCE, **common
    )
    joint = joint_em(
        gates.params, *data, num_steps=JOINT_STEPS, noise=inflated, tolerance=JOINT_TOLERANCE, **common
    )
    fitted = joint.params
    if config.noise == "known":
        fitted = fitted._replace(noise_std=jnp.full_like(fitted.noise_std, problem.noise_std))
    run = polish(fitted, *data, num_steps=config.max_iterations, noise=config.noise, **common)
    history = jnp.concatenate([gates.history, joint.history, run.history])
    num_steps = gates.num_steps + joint.num_steps + run.num_steps
    return _finish(run.params, history, num_steps, run.converged, problem, start.spectral)


def _finish(
    params, history, num_iterations, converged, problem: Problem, spectral: SpectralEstimate | None
) -> MethodResult:
    """A result whose status speaks of the likelihood: a poor start that was polished to a maximum is ok."""
    finite = jax.tree.reduce(lambda a, b: a & b, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params))
    status = jnp.where(converged, OK, NOT_CONVERGED)
    status = jnp.where(finite, status, NOT_FINITE).astype(jnp.int32)
    return MethodResult(params, _mean_gates(params, problem), history, num_iterations, status, spectral)


def joint_em_random(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """The baseline: joint EM from random starts (unit-sphere experts, zero gates), the best of `num_starts` kept.

    `max_iterations` EM steps each, no polish. The noise starts at the labels' standard deviation and is estimated along
    the way; where it is known, it is restored for the second half of the steps.
    """
    shape = (config.num_starts, config.num_experts, problem.x.shape[1])
    experts = unit_rows(standard_normal(key, shape, problem.x.dtype))
    total = problem.weights.sum()
    mean = problem.y @ problem.weights / total
    spread = jnp.sqrt((problem.y - mean) ** 2 @ problem.weights / total)
    common = {"fn": config.fn, "fit_intercept": config.fit_intercept, "ridge": config.ridge}

    def run(experts: jax.Array):
        data = (problem.x, problem.y, problem.weights)
        start = _zero_gates(experts, spread)
        if config.noise != "known":
            return joint_em(start, *data, num_steps=config.max_iterations, noise=config.noise, **common)

        def stage(params: MoEParams, noise_known: jax.Array):
            known = jnp.full_like(params.noise_std, problem.noise_std)
            params = params._replace(noise_std=jnp.where(noise_known, known, params.noise_std))
            budget = max(config.max_iterations // 2, 1)
            run = joint_em(params, *data, num_steps=budget, noise="shared", hold_noise=noise_known, **common)
            return run.params, run

        _, runs = jax.lax.scan(stage, start, jnp.asarray([False, True]))
        last = jax.tree.map(lambda leaf: leaf[-1], runs)
        return last._replace(history=runs.history.reshape(-1), num_steps=runs.num_steps.sum())

    runs = jax.lax.map(run, experts)
    best = jnp.argmax(jnp.where(jnp.isfinite(runs.log_likelihood), runs.log_likelihood, -jnp.inf))
    kept = jax.tree.map(lambda leaf: leaf[best], runs)
    return _finish(kept.params, kept.history, kept.num_steps, kept.converged, problem, None)


register_method("spectral", spectral, uses_moments=True)
register_method("spectral_residual", spectral_residual, uses_moments=True)
register_method("spectral_em", spectral_em, uses_moments=True)
register_method("joint_em", joint_em_random, uses_moments=False)
