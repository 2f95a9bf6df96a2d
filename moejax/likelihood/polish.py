r"""The polish: damped Newton steps on the observed likelihood, from a root-n consistent start to its maximum.

The log-likelihood of one sample depends on the parameters only through 2k - 1 linear predictors, u_i = a_i . x + b_i and
v_i = w_i . x + c_i, and through s_i = log sigma_i. With r the posterior and P the prior of the expert,
e_i = (y - g(u_i)) / sigma_i, d_i = e_i g'(u_i) / sigma_i,

    dl/du_i = r_i d_i,   dl/dv_i = r_i - P_i,   dl/ds_i = r_i (e_i^2 - 1),

and the Hessian in (u, v, s) has a closed form too (`predictor_derivatives`). So the Hessian in the parameters is one product of
(pairs of inputs) x (pairs of predictors): exact Newton costs no more than the outer-product approximation.

A step solves (H + mu C) delta = gradient, H the observed and C the complete-data information (Louis 1982): with mu = 0 it
is Newton's, with a large mu a short step of EM (Lange 1995). It is kept only if the likelihood does not decrease.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import sample_blocks, sample_scale
from moejax.likelihood.derivatives import Curvature, likelihood_curvature, likelihood_gradient
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.likelihood.scan import frozen_scan
from moejax.model.activations import ScalarFunction, activation_facts
from moejax.model.mixture import MoEParams, NoiseModel
from moejax.model.small_linear_algebra import solve_positive_definite


class PolishRun(NamedTuple):
    """The end of a polish."""

    params: MoEParams
    log_likelihood: Float[jax.Array, ""]
    """() penalised log-likelihood at `params`, in nats."""
    history: Float[jax.Array, " num_steps"]
    """(num_steps,) penalised log-likelihood after each pass, never decreasing; NaN after convergence."""
    num_steps: Int[jax.Array, ""]
    """() int32 passes over the data before convergence."""
    converged: Bool[jax.Array, ""]
    """() bool: the predicted gain of the next damped Newton step is below the tolerance."""
    curvature: Curvature
    """Derivatives of the log-likelihood at `params`."""
    path: MoEParams | None
    """Leaves (num_steps, ..): parameters at each entry of `history`; NaN after convergence."""


KINK_RATE, KINK_RANGE = 0.125, 8.0
"""The derivatives of a g with kinks are averaged over a width. It begins at the standard error of a linear predictor and shrinks by
KINK_RATE each pass, by KINK_RANGE in all. A wide average steps over the many small local maxima that kinks make; a narrow one
settles in one of them. These maxima differ by thousandths of a nat."""
DAMPING_AT_START = 1e-2
FALL = 0.1
"""Second derivatives are made anew after a pass in which the predicted gain did not fall to this share."""
_DAMPING_LADDER = np.array([1.0, 10.0, 100.0, 1000.0])


class DampedStep(NamedTuple):
    """A step (H + mu C) delta = gradient."""

    delta: Float[jax.Array, " P"]
    """(P,)"""
    promised: Float[jax.Array, ""]
    """() its gain in nats predicted by the quadratic model, or half its slope if that is more."""
    damping: Float[jax.Array, ""]
    """() mu."""
    found: Bool[jax.Array, ""]
    """() bool: true if some mu made H + mu C positive definite; else delta is zero."""


def damped_step(curvature: Curvature, damping: Float[jax.Array, ""]) -> DampedStep:
    """The step with the first mu of damping * (1, 10, 100, 1000) that makes H + mu C positive definite.

    The complete-data information C gets a small multiple of its own diagonal, because the data may not determine all parameters.
    """
    scale = jnp.sqrt(jnp.maximum(jnp.diag(curvature.complete), jnp.finfo(damping.dtype).tiny))
    scaled = scale[:, None] * scale[None]
    identity = jnp.eye(scale.shape[0], dtype=scale.dtype)
    observed, complete = curvature.observed / scaled, curvature.complete / scaled + 1e-3 * identity
    ladder = damping * jnp.asarray(_DAMPING_LADDER, damping.dtype)

    def climb(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rung, _, _ = state
        matrix = observed + ladder[rung] * complete + 10 * jnp.finfo(scale.dtype).eps * identity
        step = solve_positive_definite(matrix, curvature.gradient / scale) / scale
        return rung + 1, step, jnp.isfinite(step).all() & (step @ curvature.gradient >= 0)

    start = (jnp.asarray(0, jnp.int32), jnp.zeros_like(scale), jnp.asarray(False))
    tried, step, found = jax.lax.while_loop(lambda state: (state[0] < ladder.size) & ~state[2], climb, start)
    delta = jnp.where(found, step, 0.0)
    slope = delta @ curvature.gradient
    promised = jnp.maximum(slope - 0.5 * delta @ curvature.observed @ delta, 0.5 * slope)
    return DampedStep(delta, promised, ladder[tried - 1], found)


class _Ascent(NamedTuple):
    """The state of a polish: the current point, and the step that the next pass tries."""

    free: Float[jax.Array, " P"]
    now: Curvature
    damping: Float[jax.Array, ""]
    step: DampedStep
    renew: Bool[jax.Array, ""]
    """() bool: the next pass makes the second derivatives anew."""
    passes: Int[jax.Array, ""]


def polish(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    fn: ScalarFunction,
    num_steps: int = 50,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    ridge: float = 0.0,
    tolerance: float = 1e-4,
    economical: bool = False,
    record_path: bool = False,
) -> PolishRun:
    """Damped Newton ascent of the observed log-likelihood; it never decreases.

    Args:
        params: to start from.
        x: (n, d).
        y: (n,).
        weights: (n,) sample weights.
        fn: g; at kinks its one-sided derivative is used.
        num_steps: budget of passes over the data.
        noise: "known" keeps noise_std, "shared" fits one, "per_expert" fits k.
        fit_intercept: if true, biases are fitted.
        ridge: coefficient of sum_i ||w_i - mean w||^2 / 2 in nats.
        tolerance: in nats; converged if the predicted gain of the next step is less. 1e-4 is a hundredth of a standard error. If
            the mean weight is below one, the tolerance is multiplied by it (see `blocks.SampleScale`).
        economical: if true, a pass makes the first derivatives only, as long as the predicted gains fall to a share FALL or less
            from pass to pass; and the run ends with a step that no pass evaluates. It is taken when the gain predicted for the step
            after it would be below the tolerance if the gains fell once more by the same factor. `curvature` is then that of
            earlier points, and `log_likelihood` has the gain that the last step predicts.
        record_path: keep every point.
    """
    scale = sample_scale(weights)
    tolerance_here = jnp.asarray(tolerance, x.dtype) * scale.unit
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    kinked = activation_facts(fn).kinked

    def curvature_at(free: jax.Array, width: jax.Array, known: Curvature, renew: jax.Array) -> Curvature:
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        options = {"fn": fn, "noise": noise, "fit_intercept": fit_intercept, "ridge": ridge}
        options["width"] = width if kinked else None
        if not economical:
            return likelihood_curvature(at, blocks, **options)

        def first_derivatives(at: MoEParams) -> Curvature:
            value, gradient = likelihood_gradient(at, blocks, **options)
            return known._replace(log_likelihood=value, gradient=gradient)

        return jax.lax.cond(
            renew, lambda at: likelihood_curvature(at, blocks, **options), first_derivatives, at
        )

    def advance(state: _Ascent) -> tuple[_Ascent, tuple[jax.Array, jax.Array | None], jax.Array]:
        free, now, damping, (step, promised, used, found), renew, count = state
        width = jnp.maximum(widest * KINK_RATE ** count.astype(x.dtype), widest / KINK_RANGE)
        candidate = curvature_at(free + step, width, now, renew)
        gain = candidate.log_likelihood - now.log_likelihood
        accept = gain >= 0  # true at the first pass too, which only evaluates the start: its gain is infinite
        # trust the quadratic model as far as it has just been right (Marquardt's rule with the gain ratio)
        good = found & accept & (gain >= 0.5 * promised)
        damping = jnp.where(good, used * 0.1, jnp.where(found & accept, used, used * 10.0))
        damping = jnp.where(count == 0, DAMPING_AT_START, jnp.clip(damping, 1e-6, 1e8))
        free = jnp.where(accept, free + step, free)
        now = jax.tree.map(lambda new, old: jnp.where(accept, new, old), candidate, now)
        step = damped_step(now, damping)
        settled = (width <= widest / KINK_RANGE) if kinked else True
        # the distance to the maximum is the next step's predicted gain; after a failure the damped step predicts less
        short = (accept | (promised < tolerance_here)) & (step.promised < tolerance_here)
        done = settled & step.found & short
        renew = ~good | (step.promised > FALL * promised)
        renew &= count > 0
        if economical:
            done |= settled & step.found & good & (step.promised**2 < tolerance_here * promised)
        done &= jnp.isfinite(now.log_likelihood)
        return (
            _Ascent(free, now, damping, step, renew, count + 1),
            (now.log_likelihood, free if record_path else None),
            done,
        )

    free = free_parameters(params, noise=noise, fit_intercept=fit_intercept)
    widest = params.noise_std.min() * jnp.sqrt(params.experts.size / scale.num_samples)
    square, zero = jnp.zeros((free.shape[0],) * 2, x.dtype), jnp.zeros((), x.dtype)
    nowhere = Curvature(jnp.full_like(zero, -jnp.inf), jnp.zeros_like(free), square, square)
    no_step = DampedStep(jnp.zeros_like(free), zero, zero, jnp.asarray(False))
    start = _Ascent(free, nowhere, zero, no_step, jnp.asarray(True), jnp.asarray(0, jnp.int32))
    end, (history, path), count, done = frozen_scan(advance, start, num_steps)
    log_likelihood = end.now.log_likelihood
    if economical:
        end = end._replace(free=jnp.where(done, end.free + end.step.delta, end.free))
        log_likelihood = jnp.where(done, log_likelihood + end.step.promised, log_likelihood)

    def params_at(free: jax.Array) -> MoEParams:
        return params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)

    path = None if path is None else jax.vmap(params_at)(path)
    return PolishRun(params_at(end.free), log_likelihood, history, count, done, end.now, path)
