r"""The polish: damped Newton steps on the observed likelihood, from a root-n consistent start to its maximum.

The log-likelihood of one sample depends on the parameters only through 2k - 1 linear predictors, u_i = a_i . x + b_i and
v_i = w_i . x + c_i, and through s_i = log sigma_i. With r the posterior and P the prior of the expert,
e_i = (y - g(u_i)) / sigma_i, d_i = e_i g'(u_i) / sigma_i,

    dl/du_i = r_i d_i,   dl/dv_i = r_i - P_i,   dl/ds_i = r_i (e_i^2 - 1),

and the Hessian in (u, v, s) has a closed form too (`predictor_derivatives`). Of another output family than the Gaussian, d_i is
the derivative of its log-density in u_i, and the last bracket that in s_i, the logarithm of its dispersion. So the Hessian in
the parameters is one product of (pairs of inputs) x (pairs of predictors): exact Newton costs no more than the outer-product
approximation.

A step solves (H + mu C) delta = gradient, H the observed and C the complete-data information (Louis 1982): with mu = 0 it
is Newton's, with a large mu a short step of EM (Lange 1995). It is kept only if the likelihood does not decrease.

If every expert has its own noise, no noise falls below the floor of `collapse.noise_floor`. A noise at the floor whose derivative
is negative is held there: the step is that of the other parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleScale, sample_blocks, sample_scale
from moejax.likelihood.collapse import ROUNDING, label_rounding, noise_floor, rounding_noise
from moejax.likelihood.derivatives import Curvature, likelihood_curvature, without
from moejax.likelihood.free_columns import FreeColumns, compact
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.likelihood.scan import frozen_scan
from moejax.model.family import Channel, channel_facts
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


class Ascent(NamedTuple):
    """The state of a polish: the current point, and the step that the next pass tries."""

    free: Float[jax.Array, " P"]
    """(P,) the best point so far."""
    now: Curvature
    """The derivatives of the penalised log-likelihood there."""
    damping: Float[jax.Array, ""]
    """() mu of the next step."""
    step: DampedStep
    """The step from the best point that the next pass tries."""
    passes: Int[jax.Array, ""]
    """() int32 passes over the data so far."""


class AscentRules(NamedTuple):
    """When a polish keeps a step, and when it ends."""

    tolerance: Float[jax.Array, ""]
    """() nats: it ends if the predicted gain of the next step is less."""
    widest: Float[jax.Array, ""]
    """() half-width over which the derivatives of a g with kinks are averaged in the first pass; 0 for a g without."""
    slack: Float[jax.Array, ""] | float = 0.0
    """() nats that a step may lose and still be kept: the rounding error of the log-likelihood."""
    economical: bool = False
    """True if the last step is not evaluated: it is made if the gain predicted for the step after it, from the fall of the
    predicted gains so far, is below the tolerance."""
    least_noise: Float[jax.Array, " k"] | None = None
    """(k,) equal numbers, the resolution of the labels, if every expert has its own noise; else None."""
    num_samples: Float[jax.Array, ""] | float = 1.0
    """() n, for the floor of the noises."""
    rounding: Float[jax.Array, ""] | float = 0.0
    """() the rounding error of residuals, if every expert has its own noise."""

    def width(self, passes: Int[jax.Array, ""]) -> Float[jax.Array, ""]:
        """The half-width of the pass after so many."""
        shrunk = self.widest * KINK_RATE ** passes.astype(self.widest.dtype)
        return jnp.maximum(shrunk, self.widest / KINK_RANGE)

    def least_gain(self, free: Float[jax.Array, " P"]) -> Float[jax.Array, ""]:
        """() nats: the tolerance, or the gain that rounding errors of the gradient at `free` promise, if that is more."""
        if self.least_noise is None:
            return self.tolerance
        least = jnp.exp(free[-self.least_noise.shape[0] :].min())
        return jnp.maximum(self.tolerance, 0.5 * free.shape[0] * (self.rounding / least) ** 2)

    def bounded_step(
        self, free: Float[jax.Array, " P"], now: Curvature, damping: Float[jax.Array, ""]
    ) -> DampedStep:
        """The step from `free`, on which no noise falls below its floor."""
        if self.least_noise is None:
            return damped_step(now, damping)
        k = self.least_noise.shape[0]
        log_noise = free[-k:]
        floor = jnp.log(noise_floor(jnp.exp(log_noise), self.least_noise[0], self.num_samples))
        rounding = 8 * jnp.finfo(free.dtype).eps * (1.0 + jnp.abs(floor))
        held = (log_noise <= floor + rounding) & (now.gradient[-k:] < 0)
        step = damped_step(without(now, jnp.zeros_like(free, bool).at[-k:].set(held)), damping)
        lowest = jnp.minimum(floor - log_noise, 0.0)
        return step._replace(delta=step.delta.at[-k:].max(lowest))


def ascent_rules(
    params: MoEParams,
    scale: SampleScale,
    fn: Channel,
    tolerance: float,
    *,
    economical: bool = False,
    least_noise: Float[jax.Array, ""] | None = None,
    rounding: Float[jax.Array, ""] | float = 0.0,
) -> AscentRules:
    """The rules of a polish that starts at `params`.

    Args:
        params: the start.
        scale: the size of the sample.
        fn: g.
        tolerance: in nats, multiplied by the mean weight if that is below one.
        economical: as in `AscentRules`.
        least_noise: () the resolution of the labels if every expert has its own noise; else None.
        rounding: () that of `label_rounding`, used with `least_noise`.
    """
    widest = params.noise_std.min() * jnp.sqrt(params.experts.size / scale.num_samples)
    widest = widest if channel_facts(fn).kinked else jnp.zeros_like(widest)
    rules = AscentRules(jnp.asarray(tolerance, widest.dtype) * scale.unit, widest, economical=economical)
    if least_noise is None:
        return rules
    least = jnp.broadcast_to(least_noise, params.noise_std.shape)
    return rules._replace(
        least_noise=least, num_samples=scale.num_samples, rounding=0.5 * ROUNDING * rounding
    )


def first_ascent(free: Float[jax.Array, " P"]) -> Ascent:
    """The state before the first pass, which evaluates the start `free` (P,)."""
    square, zero = jnp.zeros((free.shape[0],) * 2, free.dtype), jnp.zeros((), free.dtype)
    nowhere = Curvature(jnp.full_like(zero, -jnp.inf), jnp.zeros_like(free), square, square)
    no_step = DampedStep(jnp.zeros_like(free), zero, zero, jnp.asarray(False))
    return Ascent(free, nowhere, zero, no_step, jnp.asarray(0, jnp.int32))


def ascend(state: Ascent, candidate: Curvature, rules: AscentRules) -> tuple[Ascent, Bool[jax.Array, ""]]:
    """One pass of a polish: keep or refuse the step, and choose the next one.

    Args:
        state: before the pass.
        candidate: the penalised log-likelihood and its derivatives at `state.free + state.step.delta`, averaged over
            `rules.width(state.passes)` for a g with kinks.
        rules: when to keep the step, and when to end.

    Returns:
        The next state, and () bool: the ascent has converged.
    """
    free, now, damping, (step, promised, used, found), count = state
    gain = candidate.log_likelihood - now.log_likelihood
    # true at the first pass too, which only evaluates the start: its gain is infinite
    accept = gain >= -rules.slack
    # trust the quadratic model as far as it has just been right (Marquardt's rule with the gain ratio)
    good = found & accept & (gain >= 0.5 * promised)
    damping = jnp.where(good, used * 0.1, jnp.where(found & accept, used, used * 10.0))
    damping = jnp.where(count == 0, DAMPING_AT_START, jnp.clip(damping, 1e-6, 1e8))
    free = jnp.where(accept, free + step, free)
    now = jax.tree.map(lambda new, old: jnp.where(accept, new, old), candidate, now)
    step = rules.bounded_step(free, now, damping)
    settled = rules.width(count) <= rules.widest / KINK_RANGE
    # the distance to the maximum is the next step's predicted gain; after a failure the damped step predicts less
    tolerance = rules.least_gain(free)
    short = (accept | (promised < tolerance)) & (step.promised < tolerance)
    # near the maximum the predicted gains fall at least as fast again from one step to the next
    short |= rules.economical & good & (step.promised**2 < tolerance * promised)
    done = settled & step.found & short & jnp.isfinite(now.log_likelihood)
    return Ascent(free, now, damping, step, count + 1), done


def polish(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    fn: Channel,
    num_steps: int = 50,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    ridge: float = 0.0,
    tolerance: float = 1e-4,
    economical: bool = False,
    record_path: bool = False,
    least_noise: Float[jax.Array, ""] | None = None,
    columns: FreeColumns | None = None,
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
        economical: if true, the run ends with a step that no pass evaluates (`AscentRules`). `curvature` is then that of the point
            before it, and `log_likelihood` has the gain that the step predicts.
        record_path: keep every point.
        least_noise: () with a noise for each expert, the least that one may have (see `noise_floor`); None takes the rounding of
            the labels.
        columns: the columns whose coefficients are free, while the others stay as in `params`; None for all.
    """
    if noise == "per_expert" and least_noise is None:
        least_noise = rounding_noise(y, weights)
    bound = least_noise if noise == "per_expert" else None
    rules = ascent_rules(
        compact(params, columns),
        sample_scale(weights),
        fn,
        tolerance,
        economical=economical,
        least_noise=bound,
        rounding=label_rounding(y, weights),
    )
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    kinked = channel_facts(fn).kinked

    def params_at(free: jax.Array) -> MoEParams:
        return params_from_free(free, params, noise=noise, fit_intercept=fit_intercept, columns=columns)

    def advance(state: Ascent) -> tuple[Ascent, tuple[jax.Array, jax.Array | None], jax.Array]:
        at = params_at(state.free + state.step.delta)
        candidate = likelihood_curvature(
            at,
            blocks,
            fn=fn,
            noise=noise,
            fit_intercept=fit_intercept,
            ridge=ridge,
            width=rules.width(state.passes) if kinked else None,
            columns=columns,
        )
        state, done = ascend(state, candidate, rules)
        return state, (state.now.log_likelihood, state.free if record_path else None), done

    free = free_parameters(params, noise=noise, fit_intercept=fit_intercept, columns=columns)
    start = first_ascent(free)
    end, (history, path), count, done = frozen_scan(advance, start, num_steps)
    log_likelihood = end.now.log_likelihood
    if economical:
        end = end._replace(free=jnp.where(done, end.free + end.step.delta, end.free))
        log_likelihood = jnp.where(done, log_likelihood + end.step.promised, log_likelihood)

    path = None if path is None else jax.vmap(params_at)(path)
    return PolishRun(params_at(end.free), log_likelihood, history, count, done, end.now, path)
