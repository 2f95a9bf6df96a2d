r"""From a root-n consistent start to the maximum-likelihood estimate: damped Newton steps on the observed likelihood.

The log-likelihood of one sample depends on the parameters only through 2k - 1 linear predictors, u_i = a_i . x + b_i and
v_i = w_i . x + c_i, and through s_i = log sigma_i. With r the posterior and P the prior of the expert,
e_i = (y - g(u_i)) / sigma_i, d_i = e_i g'(u_i) / sigma_i,

    dl/du_i = r_i d_i,   dl/dv_i = r_i - P_i,   dl/ds_i = r_i (e_i^2 - 1),

and the Hessian in (u, v, s) is closed form too (`predictor_derivatives`), so the Hessian in the parameters is one product of
(pairs of inputs) x (pairs of predictors): exact Newton costs what the outer-product approximation does.

A step solves (H + mu C) delta = gradient, H the observed and C the complete-data information (Louis 1982): mu -> 0 is
Newton, a large mu a short step of EM (Lange 1995). It is kept only if the likelihood does not decrease.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.activations import ScalarFunction, activation_derivatives, activation_facts
from moejax.design import (
    Predictors,
    SampleBlocks,
    block_matrix,
    gate_centring,
    gate_penalty,
    params_of,
    predictors_of,
    sample_blocks,
    sample_scale,
    sum_over_blocks,
    weighted_gram,
)
from moejax.em import NoiseModel, frozen_scan, log_normal
from moejax.model import MoEParams
from moejax.small_linear_algebra import solve_positive_definite


class Curvature(NamedTuple):
    """Value and derivatives of the log-likelihood in the free parameters, P of them (see `free_parameters`)."""

    log_likelihood: jax.Array
    """() less the penalty, where there is a ridge."""
    gradient: jax.Array
    """(P,)"""
    observed: jax.Array
    """(P, P) minus the Hessian."""
    complete: jax.Array
    """(P, P) expected information had the experts' labels been seen; positive semi-definite."""


class PolishRun(NamedTuple):
    """Where a polish ended."""

    params: MoEParams
    log_likelihood: jax.Array
    """() penalised log-likelihood at `params`, in nats."""
    history: jax.Array
    """(num_steps,) penalised log-likelihood after each pass, never decreasing; NaN after convergence."""
    num_steps: jax.Array
    """() int32 passes over the data before convergence."""
    converged: jax.Array
    """() bool: the next damped Newton step promises less than the tolerance."""
    curvature: Curvature
    """At `params`."""
    path: MoEParams | None
    """Leaves (num_steps, ..): the point of which `history` says the value; NaN after convergence."""


def num_noise_parameters(noise: NoiseModel, num_experts: int) -> int:
    """How many free noise parameters a noise model has."""
    return {"known": 0, "shared": 1, "per_expert": num_experts}[noise]


def free_parameters(params: MoEParams, *, noise: NoiseModel, fit_intercept: bool) -> jax.Array:
    """(P,): experts (k D), all gates but the last ((k - 1) D), log noise (0, 1 or k), D = d or d + 1 with biases."""
    rows = predictors_of(params, fit_intercept=fit_intercept).rows
    log_noise = jnp.log(params.noise_std)[: num_noise_parameters(noise, params.noise_std.shape[0])]
    return jnp.concatenate([rows.reshape(-1), log_noise])


def params_from_free(
    free: jax.Array, like: MoEParams, *, noise: NoiseModel, fit_intercept: bool
) -> MoEParams:
    """The inverse of `free_parameters`; what is not free is taken from `like`."""
    rows, offsets = predictors_of(like, fit_intercept=fit_intercept)
    noise_std = like.noise_std
    if noise != "known":
        noise_std = jnp.broadcast_to(jnp.exp(free[rows.size :]), noise_std.shape)
    predictors = Predictors(free[: rows.size].reshape(rows.shape), offsets)
    return params_of(predictors, noise_std, fit_intercept=fit_intercept)


class PredictorDerivatives(NamedTuple):
    """Derivatives of each sample's log-likelihood in its predictors (u_1..u_k, v_1..v_{k-1}) and in s_1..s_k."""

    value: jax.Array
    """(n,)"""
    gradient: jax.Array
    """(2k - 1, n) in the predictors."""
    noise_gradient: jax.Array
    """(k, n)"""
    observed: jax.Array
    """(k (2k - 1), n) minus the Hessian in the predictors, its upper triangle."""
    observed_cross: jax.Array
    """(2k - 1, k, n) minus the mixed derivatives in predictors and s."""
    observed_noise: jax.Array
    """(k, k, n) minus the Hessian in s."""
    complete_experts: jax.Array
    """(k, n) complete-data information of u, r g'^2 / sigma^2: diagonal."""
    complete_gates: jax.Array
    """(k (k - 1) / 2, n) complete-data information of v, diag P - P P', its upper triangle."""
    complete_noise: jax.Array
    """(k, n) complete-data information of s, 2 r."""


def predictor_derivatives(
    predictors: jax.Array,
    y: jax.Array,
    noise_std: jax.Array,
    fn: ScalarFunction,
    width: jax.Array | None = None,
) -> PredictorDerivatives:
    """Closed-form derivatives of log sum_i P_i(v) N(y; g(u_i), sigma_i^2).

    Args:
        predictors: (2k - 1, n), u then v.
        y: (n,).
        noise_std: (k,).
        fn: g.
        width: () over which the derivatives of g are averaged; None takes them pointwise.
    """
    k = noise_std.shape[0]
    u, v = predictors[:k], predictors[k:]
    logits = jnp.concatenate([v, jnp.zeros_like(u[:1])])
    mean, slope, second = activation_derivatives(fn, u, width)
    inverse = (1.0 / noise_std)[:, None]
    error = (y[None] - mean) * inverse
    joint = logits + log_normal((y[None] - mean) ** 2, noise_std)
    evidence, gate_evidence = jax.nn.logsumexp(joint, axis=0), jax.nn.logsumexp(logits, axis=0)
    r, p_free = jnp.exp(joint - evidence[None]), jnp.exp(v - gate_evidence[None])
    slope = slope * inverse
    d, q = error * slope, error**2 - 1.0
    a, b, r_free = r * d, r * q, r[: k - 1]

    # a a', a r' and r r' are one outer product; what else there is stands at u_i u_i and u_i v_i, and on v v' the gates' own
    score = jnp.concatenate([a, r_free])
    rows, columns = np.triu_indices(2 * k - 1)
    special = jnp.concatenate([r * (slope**2 - error * second * inverse - d**2), -a[: k - 1], -r_free])
    gate_rows, gate_columns = np.triu_indices(k - 1)
    on_diagonal = (gate_rows == gate_columns).astype(y.dtype)[:, None]
    complete_gates = p_free[gate_rows] * (on_diagonal - p_free[gate_columns])
    where_special = [(i, i) for i in range(k)] + [(i, k + i) for i in range(k - 1)]
    where_special += [(k + i, k + i) for i in range(k - 1)]
    where_special += list(zip(k + gate_rows, k + gate_columns, strict=True))
    placement = np.array(
        [[(s, t) == pair for pair in where_special] for s, t in zip(rows, columns, strict=True)]
    )
    observed = score[rows] * score[columns]
    observed = observed + placement.astype(y.dtype) @ jnp.concatenate([special, complete_gates])

    eye = jnp.eye(k, dtype=y.dtype)[:, :, None]
    us = eye * (a * (2.0 - q))[:, None] + a[:, None] * b[None]
    vs = (r_free[:, None] - eye[: k - 1]) * b[None]
    ss = eye * (r * (2.0 * error**2 - q**2))[:, None] + b[:, None] * b[None]
    return PredictorDerivatives(
        value=evidence - gate_evidence,
        gradient=jnp.concatenate([a, r_free - p_free]),
        noise_gradient=b,
        observed=observed,
        observed_cross=jnp.concatenate([us, vs]),
        observed_noise=ss,
        complete_experts=r * slope**2,
        complete_gates=complete_gates,
        complete_noise=2.0 * r,
    )


def likelihood_curvature(
    params: MoEParams,
    blocks: SampleBlocks,
    *,
    fn: ScalarFunction,
    noise: NoiseModel,
    fit_intercept: bool,
    ridge: jax.Array | float = 0.0,
    width: jax.Array | None = None,
) -> Curvature:
    """Log-likelihood, gradient, observed and complete-data information, in one pass over the data.

    Args:
        params: where.
        blocks: of `sample_blocks`.
        fn: g.
        noise: which noise parameters are free.
        fit_intercept: whether biases are.
        ridge: () coefficient of sum_i ||w_i - mean w||^2 / 2, subtracted from the log-likelihood.
        width: () of `activation_derivatives`.
    """
    k, dtype = params.experts.shape[0], params.experts.dtype
    predictors = predictors_of(params, fit_intercept=fit_intercept)
    gates, size = predictors.rows[k:], predictors.rows.shape[1]

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
        at = predictor_derivatives(predictors(design), y, params.noise_std, fn, width)
        coefficients = jnp.concatenate([at.observed, at.complete_experts, at.complete_gates])
        noise_free, cross = at.noise_gradient, at.observed_cross
        noise_observed, noise_complete = at.observed_noise @ weights, at.complete_noise @ weights
        if noise == "shared":
            noise_free, cross = noise_free.sum(axis=0, keepdims=True), cross.sum(axis=1, keepdims=True)
            noise_observed, noise_complete = noise_observed.sum()[None, None], noise_complete.sum()[None]
        return (
            at.value @ weights,
            (at.gradient * weights[None]) @ design.T,
            noise_free @ weights,
            weighted_gram(design, coefficients * weights[None]),
            jnp.einsum("bqn,dn->bdq", cross * weights[None, None], design),
            noise_observed,
            noise_complete,
        )

    value, gradient, noise_gradient, grams, cross, noise_observed, noise_complete = sum_over_blocks(
        sums_of, blocks
    )
    num_pairs = k * (2 * k - 1)
    observed = block_matrix(grams[:num_pairs])
    gate_information = [block_matrix(grams[num_pairs + k :])] if k > 1 else []
    complete = jax.scipy.linalg.block_diag(*grams[num_pairs : num_pairs + k], *gate_information)
    centring = gate_centring(k, dtype)
    penalty = jax.scipy.linalg.block_diag(
        jnp.zeros((k * size, k * size), dtype), ridge * jnp.kron(centring, jnp.eye(size, dtype=dtype))
    )
    observed, complete = observed + penalty, complete + penalty
    gradient = jnp.concatenate([gradient[:k], gradient[k:] - ridge * (centring @ gates)]).reshape(-1)
    value = value - ridge * gate_penalty(gates)
    if noise != "known":
        cross = cross.reshape(observed.shape[0], -1)
        observed = jnp.block([[observed, cross], [cross.T, noise_observed]])
        complete = jax.scipy.linalg.block_diag(complete, jnp.diag(noise_complete))
        gradient = jnp.concatenate([gradient, noise_gradient])
    return Curvature(value, gradient, observed, complete)


KINK_RATE, KINK_RANGE = 0.6, 32.0
"""For a kinked g, derivatives are averaged over a width that begins at the standard error of a linear predictor and shrinks by
KINK_RATE each pass, by KINK_RANGE in all: wide, it steps over the many small local maxima that kinks make; narrow, it settles
in one."""
DAMPING_AT_START = 1e-2
_DAMPING_LADDER = np.array([1.0, 10.0, 100.0, 1000.0])


class DampedStep(NamedTuple):
    """A step (H + mu C) delta = gradient."""

    delta: jax.Array
    """(P,)"""
    promised: jax.Array
    """() its gain in nats by the quadratic model, or half its slope where that is more."""
    damping: jax.Array
    """() mu."""
    found: jax.Array
    """() bool: whether a mu made H + mu C positive definite; else delta is zero."""


def damped_step(curvature: Curvature, damping: jax.Array) -> DampedStep:
    """The step with the first mu of damping * (1, 10, 100, 1000) that makes H + mu C positive definite.

    The complete-data information C gets a small multiple of its own diagonal, for parameters the data do not reach.
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
    """The state of a polish: where it is, and the step that the next pass tries."""

    free: jax.Array
    now: Curvature
    damping: jax.Array
    step: DampedStep
    count: jax.Array


def polish(
    params: MoEParams,
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    num_steps: int = 50,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    ridge: float = 0.0,
    tolerance: float = 1e-4,
    record_path: bool = False,
) -> PolishRun:
    """Damped Newton ascent of the observed log-likelihood; it never decreases.

    Args:
        params: to start from.
        x: (n, d); y: (n,); weights: (n,) sample weights.
        fn: g; at kinks its one-sided derivative is used.
        num_steps: budget of passes over the data.
        noise: "known" keeps noise_std, "shared" fits one, "per_expert" fits k.
        fit_intercept: whether biases are fitted.
        ridge: coefficient of sum_i ||w_i - mean w||^2 / 2 in nats.
        tolerance: in nats: converged when the next step promises less than this; 1e-4 is a hundredth of a standard error. In
            nats of a sample of mean weight where that is below one (see `design.SampleScale`).
        record_path: keep every point.
    """
    scale = sample_scale(weights)
    tolerance_here = jnp.asarray(tolerance, x.dtype) * scale.unit
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    kinked = activation_facts(fn).kinked

    def curvature_at(free: jax.Array, width: jax.Array) -> Curvature:
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        return likelihood_curvature(
            at,
            blocks,
            fn=fn,
            noise=noise,
            fit_intercept=fit_intercept,
            ridge=ridge,
            width=width if kinked else None,
        )

    def advance(state: _Ascent) -> tuple[_Ascent, tuple[jax.Array, jax.Array | None], jax.Array]:
        free, now, damping, (step, promised, used, found), count = state
        width = jnp.maximum(widest * KINK_RATE ** count.astype(x.dtype), widest / KINK_RANGE)
        candidate = curvature_at(free + step, width)
        gain = candidate.log_likelihood - now.log_likelihood
        accept = gain >= 0  # also at the first pass, which only evaluates the start: its gain is infinite
        # trust the quadratic model as far as it has just been right (Marquardt's rule with the gain ratio)
        good = found & accept & (gain >= 0.5 * promised)
        damping = jnp.where(good, used * 0.1, jnp.where(found & accept, used, used * 10.0))
        damping = jnp.where(count == 0, DAMPING_AT_START, jnp.clip(damping, 1e-6, 1e8))
        free = jnp.where(accept, free + step, free)
        now = jax.tree.map(lambda new, old: jnp.where(accept, new, old), candidate, now)
        step = damped_step(now, damping)
        settled = (width <= widest / KINK_RANGE) if kinked else True
        # short of the maximum by what the next step promises; a step shortened after a failure promises less than that
        short = (accept | (promised < tolerance_here)) & (step.promised < tolerance_here)
        done = settled & step.found & short
        done &= jnp.isfinite(now.log_likelihood)
        return (
            _Ascent(free, now, damping, step, count + 1),
            (now.log_likelihood, free if record_path else None),
            done,
        )

    free = free_parameters(params, noise=noise, fit_intercept=fit_intercept)
    widest = params.noise_std.min() * jnp.sqrt(params.experts.size / scale.num_samples)
    square, zero = jnp.zeros((free.shape[0],) * 2, x.dtype), jnp.zeros((), x.dtype)
    nowhere = Curvature(jnp.full_like(zero, -jnp.inf), jnp.zeros_like(free), square, square)
    no_step = DampedStep(jnp.zeros_like(free), zero, zero, jnp.asarray(False))
    start = _Ascent(free, nowhere, zero, no_step, jnp.asarray(0, jnp.int32))
    end, (history, path), count, done = frozen_scan(advance, start, num_steps)

    def params_at(free: jax.Array) -> MoEParams:
        return params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)

    path = None if path is None else jax.vmap(params_at)(path)
    return PolishRun(params_at(end.free), end.now.log_likelihood, history, count, done, end.now, path)
