r"""Expectation maximisation by scan: the gates with the experts known, and gates, experts and noise jointly.

Gating EM (Makkuva et al. 2019, Algorithm 2): E, responsibilities r under the current gates; M, one Newton step on the
weighted softmax regression sum_j sum_i r_ij log P_i(x_j). Joint EM (Jordan and Jacobs 1994) adds the experts, by a
Gauss-Newton step that is the closed-form weighted least squares for a linear g, and the noise in closed form.

One pass over the data makes the E-step at a point and the sums of which the M-step is made (`expectation`); the M-step itself
touches no sample (`maximisation`). A step is kept only if the next pass finds that the likelihood gained a fair part of what
the M-step promised; else it is made again with damping mu: the gates' Hessian gets mu times Boehning's (1992) bound on it, which
at mu = 1 cannot fail, and the experts' step is divided by 1 + mu. After a success the damping falls to zero again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.activations import ScalarFunction, activation_and_slope
from moejax.design import (
    Predictors,
    SampleBlocks,
    block_matrix,
    gate_centring,
    gate_penalty,
    params_of,
    predictors_of,
    sample_blocks,
    sum_over_blocks,
    weighted_gram,
)
from moejax.model import LOG_TWO_PI, MoEParams
from moejax.small_linear_algebra import solve_positive_definite

NoiseModel = Literal["known", "shared", "per_expert"]
RIDGE = 1e-6
"""Default ridge on the gates, the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats: a normal prior of standard deviation 1000 on
every gate, for inputs of unit variance. It is the same for every sample size, so that its bias vanishes as the data grow, and it
keeps separable gates finite. It acts on the gates less their mean over experts, so that it does not depend on which expert is the
reference."""


PROMISE_KEPT = 0.25
"""A step is kept if the likelihood gains this fraction of what the M-step promised."""
TRUSTED_CHANGE = 2.0
"""Root mean square change of the logits, in nats, up to which a Newton step of the gates is tried: from saturated gates, a longer
one may raise the likelihood by accident and lead to where they are more saturated still."""
LEAST_DAMPING = 1 / 64
"""The first mu of the gates' steps after one that was cut."""


class EMRun(NamedTuple):
    """Where a run of EM ended."""

    params: MoEParams
    log_likelihood: jax.Array
    """() sum over samples at `params`, in nats."""
    history: jax.Array
    """(num_steps,) objective (with its ridge) of the best point so far at each pass, the start's first; NaN once frozen."""
    num_steps: jax.Array
    """() int32 passes over the data."""
    converged: jax.Array
    """() bool: the gain fell below the tolerance."""
    path: MoEParams | None
    """Leaves (num_steps, ..): the point of which `history` says the objective, NaN once frozen; None unless recorded."""


class Point(NamedTuple):
    """Where EM is."""

    predictors: Predictors
    noise_std: jax.Array
    """(k,), or (k, m)"""


class Expectation(NamedTuple):
    """The sums over samples that one E-step leaves to the M-step; r are responsibilities times sample weights.

    With m outputs, what is of each expert is of each output of each expert: k m for k.
    """

    log_likelihood: jax.Array
    """()"""
    gate_gradient: jax.Array
    """(k - 1, D) sum (r - P) x."""
    gate_information: jax.Array
    """((k - 1) D, (k - 1) D) sum (diag P - P P') (x) x x'."""
    counts: jax.Array
    """(k,) sum r."""
    squares: jax.Array
    """(k,) sum r (y - g)^2."""
    expert_gradient: jax.Array | None
    """(k, D) sum r (y - g) g' x; None where the experts are fixed."""
    expert_information: jax.Array | None
    """(k, D, D) sum r g'^2 x x'; None where the experts are fixed."""


def expectation(point: Point, blocks: SampleBlocks, *, fn: ScalarFunction, experts_free: bool) -> Expectation:
    """The E-step at a point, in one pass over the data."""
    k, noise_std = point.noise_std.shape[0], point.noise_std.reshape(-1)
    rows, columns = np.triu_indices(k - 1)
    on_diagonal = (rows == columns).astype(blocks.y.dtype)[:, None]

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> Expectation:
        predictors = point.predictors(design)
        mean, slope = activation_and_slope(fn, predictors[: noise_std.size])
        error = (y[None] if y.ndim == 1 else jnp.tile(y, (k, 1))) - mean
        logits = jnp.concatenate([predictors[noise_std.size :], jnp.zeros_like(weights)[None]])
        log_densities = log_normal(error**2, noise_std)
        if y.ndim == 2:
            log_densities = log_densities.reshape(k, *y.shape).sum(axis=1)
        evidence, r = _log_sum_and_shares(logits + log_densities)
        gate_evidence, prior = _log_sum_and_shares(logits)
        r, prior = weights[None] * r, prior[:-1]
        weighted_prior = weights[None] * prior
        r_free = r[:-1]
        if y.ndim == 2:
            r = jnp.repeat(r, y.shape[0], axis=0)
        coefficients = weighted_prior[rows] * (on_diagonal - prior[columns])
        if experts_free:
            coefficients = jnp.concatenate([coefficients, r * slope**2])
        grams = weighted_gram(design, coefficients)
        gate_grams = grams[: rows.size]
        return Expectation(
            log_likelihood=(evidence - gate_evidence) @ weights,
            gate_gradient=(r_free - weighted_prior) @ design.T,
            gate_information=block_matrix(gate_grams),
            counts=r.sum(axis=1),
            squares=jnp.sum(r * error**2, axis=1),
            expert_gradient=(r * slope * error) @ design.T if experts_free else None,
            expert_information=grams[rows.size :] if experts_free else None,
        )

    return sum_over_blocks(sums_of, blocks)


def _log_sum_and_shares(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(n,) log sum exp and (k, n) softmax over the rows of (k, n), with one exponential each."""
    largest = logits.max(axis=0)
    terms = jnp.exp(logits - largest[None])
    total = terms.sum(axis=0)
    return largest + jnp.log(total), terms / total[None]


def log_normal(squared_residual: jax.Array, noise_std: jax.Array) -> jax.Array:
    """(k, n): log N(residual; 0, sigma_i^2) from squared residuals (k, n) and noise_std (k,)."""
    scaled = squared_residual * (0.5 / noise_std**2)[:, None]
    return -scaled - (jnp.log(noise_std) + 0.5 * LOG_TWO_PI)[:, None]


def boehning_bound(blocks: SampleBlocks, num_experts: int, ridge: jax.Array) -> jax.Array:
    """((k-1) D, (k-1) D): (I - 11'/k) / 2 (x) sum w x x' and the ridge: no Hessian of the gates' objective is larger."""
    gram = sum_over_blocks(lambda design, y, weights: weighted_gram(design, weights[None])[0], blocks)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jnp.kron(gate_centring(num_experts, gram.dtype), 0.5 * gram + ridge * eye)


class MStep(NamedTuple):
    """A point that the M-step proposes."""

    point: Point
    promised: jax.Array
    """() its gain of the expected log-likelihood, were g linear and the gates' objective quadratic."""
    shortened: jax.Array
    """() bool: the gates' step went beyond where it can be trusted and was cut there."""


def maximisation(
    point: Point,
    sums: Expectation,
    *,
    damping: jax.Array,
    caution: jax.Array,
    bound: jax.Array,
    ridge: jax.Array,
    noise: NoiseModel,
    hold_noise: jax.Array | bool = False,
) -> MStep:
    """The M-step from the sums of an E-step, damped.

    Args:
        point: of the E-step.
        sums: of the E-step.
        damping: () mu >= 0.
        caution: () mu of the gates' step alone, where it is more.
        bound: of `boehning_bound`.
        ridge: () coefficient of sum_i ||w_i - mean w||^2 / 2.
        noise: which noise is updated.
        hold_noise: () bool, traced: whether it stays after all.
    """
    (rows, offsets), noise_std = point
    k, num_rows, size = noise_std.shape[0], noise_std.size, rows.shape[1]
    experts, gates, promised = rows[:num_rows], rows[num_rows:], jnp.zeros((), rows.dtype)
    shortened = jnp.asarray(False)
    if k > 1:
        centring = gate_centring(k, rows.dtype)
        gradient = (sums.gate_gradient - ridge * (centring @ gates)).reshape(-1)
        hessian = sums.gate_information + ridge * jnp.kron(centring, jnp.eye(size, dtype=rows.dtype))
        total = sums.counts.sum() / (num_rows // k)
        step, shortened = _trusted_step(hessian, gradient, bound, jnp.maximum(damping, caution), total)
        gates = gates + step.reshape(k - 1, size)
        promised = step @ gradient - 0.5 * step @ hessian @ step
    squares = sums.squares
    if sums.expert_gradient is not None and sums.expert_information is not None:
        step = _least_squares(sums.expert_information, sums.expert_gradient) / (1.0 + damping)
        experts = experts + step
        fall = 2.0 * jnp.sum(step * sums.expert_gradient, axis=1)
        fall = fall - jnp.einsum("id,ide,ie->i", step, sums.expert_information, step)
        # what rounding leaves of an exact fit is no noise level
        squares = jnp.maximum(squares - fall, 10 * jnp.finfo(squares.dtype).eps * squares)
    counts, before, after = (a.reshape(noise_std.shape) for a in (sums.counts, sums.squares, squares))
    updated = jnp.where(hold_noise, noise_std, noise_m_step(noise_std, counts, after, noise))

    def noise_loss(squares: jax.Array, noise_std: jax.Array) -> jax.Array:
        return jnp.sum(0.5 * squares / noise_std**2 + counts * jnp.log(noise_std))

    promised = promised + noise_loss(before, noise_std) - noise_loss(after, updated)
    point = Point(Predictors(jnp.concatenate([experts, gates]), offsets), updated)
    return MStep(point, promised, shortened)


def _trusted_step(
    hessian: jax.Array, gradient: jax.Array, bound: jax.Array, mu: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The step (H + mu B)^-1 gradient of the gates, cut to where it can be trusted, and whether it was.

    The quadratic model of a softmax holds over a few nats of the logits, whose change is measured in B; with mu >= 1 it is a bound.
    """
    # what rounding may take from a Hessian that saturated gates leave nearly singular
    rounding = gradient.size * jnp.finfo(gradient.dtype).eps * jnp.diag(jnp.diag(hessian))
    step = solve_positive_definite(hessian + rounding + mu * bound, gradient)
    change = jnp.sqrt(step @ bound @ step / total)
    shortened = (change > TRUSTED_CHANGE) & (mu < 1.0)
    return jnp.where(shortened, TRUSTED_CHANGE / change, 1.0) * step, shortened


def _least_squares(gram: jax.Array, gradient: jax.Array) -> jax.Array:
    """(k, D): gram^-1 gradient for each of (k, D, D) and (k, D), zero where that is not finite."""
    size, info = gram.shape[1], jnp.finfo(gram.dtype)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / size
    # the least of ridges, for an expert that few samples or only flat parts of g support
    floor = (10 + size) * info.eps * jnp.maximum(trace, info.tiny) + info.tiny
    step = solve_positive_definite(gram + floor * jnp.eye(size, dtype=gram.dtype)[None], gradient)
    return jnp.where(jnp.isfinite(step), step, 0.0)


def noise_m_step(noise_std: jax.Array, counts: jax.Array, squares: jax.Array, noise: NoiseModel) -> jax.Array:
    """(k,), or (k, m): the noise that maximises the expected log-likelihood; `noise_std` itself where it is known."""
    if noise == "known":
        return noise_std
    if noise == "shared":  # by the experts; every output has its own
        squares, counts = (jnp.zeros_like(a) + a.sum(axis=0, keepdims=True) for a in (squares, counts))
    tiny = jnp.finfo(squares.dtype).tiny
    return jnp.sqrt(jnp.maximum(squares / jnp.maximum(counts, tiny), tiny))


def frozen_scan(
    advance: Callable[[Any], tuple[Any, Any, jax.Array]], state: Any, num_steps: int
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Scan `advance` for a fixed budget; a lane that is done freezes, the others go on.

    Args:
        advance: state -> (new state, floating values to record, () bool done).
        state: to start from.
        num_steps: budget.

    Returns:
        The last state; (num_steps, ..) values, NaN once frozen; () int32 steps made; () bool done.
    """

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        def go(carry: Any) -> tuple[Any, Any]:
            state, _, count = carry
            state, value, done = advance(state)
            return (state, done, count + 1), value

        def stay(carry: Any) -> tuple[Any, Any]:
            return carry, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), value_like)

        return jax.lax.cond(carry[1], stay, go, carry)

    value_like = jax.eval_shape(advance, state)[1]
    start = (state, jnp.asarray(False), jnp.asarray(0, jnp.int32))
    (state, done, count), history = jax.lax.scan(body, start, length=num_steps)
    return state, history, count, done


class _Climb(NamedTuple):
    """The state of a run: the best point and the E-step there, and the candidate that the next pass evaluates."""

    best: Point
    sums: Expectation
    objective: jax.Array
    candidate: MStep
    damping: jax.Array
    caution: jax.Array


def _run(
    params: MoEParams,
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    num_steps: int,
    fit_intercept: bool,
    noise: NoiseModel,
    ridge: jax.Array | float,
    tolerance: float,
    experts_free: bool,
    hold_noise: jax.Array | bool = False,
    record_path: bool = False,
) -> EMRun:
    k = params.experts.shape[0]
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    total_tolerance = tolerance * weights.sum()
    penalty = jnp.asarray(ridge, x.dtype)
    bound = boehning_bound(blocks, k, penalty)
    rounding = 10 * jnp.finfo(x.dtype).eps

    def expect(point: Point) -> Expectation:
        return expectation(point, blocks, fn=fn, experts_free=experts_free)

    def advance(state: _Climb) -> tuple[_Climb, tuple[jax.Array, Point | None], jax.Array]:
        point, promised, shortened = state.candidate
        sums = expect(point)
        gates = point.predictors.rows[point.noise_std.size :]
        objective = sums.log_likelihood - penalty * gate_penalty(gates)
        gain = objective - state.objective
        # the likelihood gains no less than its bound; the first pass gains infinitely; False where not finite
        accept = gain >= PROMISE_KEPT * jnp.maximum(promised, 0.0)
        best, sums, objective = jax.tree.map(
            lambda new, old: jnp.where(accept, new, old),
            (point, sums, objective),
            (state.best, state.sums, state.objective),
        )
        damping = jnp.where(
            accept,
            jnp.where(state.damping > 0.1, 0.25 * state.damping, 0.0),
            jnp.maximum(4.0 * state.damping, 1.0),
        )
        caution = jnp.where(
            shortened,
            jnp.clip(4.0 * state.caution, LEAST_DAMPING, 1.0),
            jnp.where(state.caution > LEAST_DAMPING, 0.25 * state.caution, 0.0),
        )
        # a loss within rounding, or of a step that promised next to nothing, ends the run as a small gain does
        flat = accept | (gain > -rounding * jnp.abs(objective)) | (promised < total_tolerance)
        candidate = maximisation(
            best,
            sums,
            damping=damping,
            caution=caution,
            bound=bound,
            ridge=penalty,
            noise=noise,
            hold_noise=hold_noise,
        )
        return (
            _Climb(best, sums, objective, candidate, damping, caution),
            (objective, best if record_path else None),
            flat & (gain < total_tolerance),
        )

    start = Point(predictors_of(params, fit_intercept=fit_intercept), params.noise_std)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(expect, start))
    zero = jnp.zeros((), x.dtype)
    nothing = nothing._replace(
        log_likelihood=jnp.full_like(zero, -jnp.inf)
    )  # of a start that is never accepted
    first = _Climb(
        start, nothing, jnp.full_like(zero, -jnp.inf), MStep(start, zero, jnp.asarray(False)), zero, zero
    )
    end, (history, path), count, done = frozen_scan(advance, first, num_steps)

    def params_at(point: Point) -> MoEParams:
        return params_of(*point, fit_intercept=fit_intercept)

    path = None if path is None else jax.vmap(params_at)(path)
    return EMRun(params_at(end.best), end.sums.log_likelihood, history, count, done, path)


def gating_em(
    params: MoEParams,
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    num_steps: int,
    fit_intercept: bool = False,
    noise: NoiseModel = "known",
    ridge: jax.Array | float = RIDGE,
    tolerance: float = 1e-8,
    record_path: bool = False,
) -> EMRun:
    """EM for the gates with the experts fixed, from the gates in `params` (start at zero).

    Args:
        params: experts (k, d) that stay, gates to start from, noise_std; biases stay unless the intercepts are fitted.
        x: (n, d).
        y: (n,), or (n, m).
        weights: (n,) sample weights.
        fn: the activation g.
        num_steps: budget of passes over the data; the first evaluates the start.
        fit_intercept: whether gates have biases that are fitted.
        noise: "known" leaves noise_std; else it is updated in closed form too, which absorbs the experts' error.
        ridge: coefficient of sum_i ||w_i - mean w||^2 / 2 in nats; part of the objective that never decreases.
        tolerance: least gain, in nats per sample, that goes on.
        record_path: keep every point; it costs a sixth of the time of a short run, so that only who asks pays.
    """
    return _run(
        params,
        x,
        y,
        weights,
        fn=fn,
        num_steps=num_steps,
        fit_intercept=fit_intercept,
        noise=noise,
        ridge=ridge,
        tolerance=tolerance,
        experts_free=False,
        record_path=record_path,
    )


def joint_em(
    params: MoEParams,
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    num_steps: int,
    fit_intercept: bool = False,
    noise: NoiseModel = "shared",
    ridge: jax.Array | float = RIDGE,
    tolerance: float = 1e-8,
    hold_noise: jax.Array | bool = False,
    record_path: bool = False,
) -> EMRun:
    """EM for experts, gates and noise together (Jordan and Jacobs 1994), from `params`. Arguments as in `gating_em`.

    The experts' M-step is a Gauss-Newton step on their weighted squared error: for a linear g, weighted least squares.
    `hold_noise` () keeps the noise where it is true; unlike noise="known" it may be traced.
    """
    return _run(
        params,
        x,
        y,
        weights,
        fn=fn,
        num_steps=num_steps,
        fit_intercept=fit_intercept,
        noise=noise,
        ridge=ridge,
        tolerance=tolerance,
        experts_free=True,
        hold_noise=hold_noise,
        record_path=record_path,
    )
