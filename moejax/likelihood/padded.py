r"""Mixtures of 1 to K experts in arrays of K places, so that one compiled program serves every number of experts.

The first k places hold experts. A mixture has 2 K rows of coefficients (2 K, D): those of u_i = a_i . x + b_i, then those of
v_i = w_i . x + c_i, D = d or, with intercepts, d + 1. All gates are free here; a prior keeps the mean over the experts, on which
the softmax does not depend, at zero. Rows of empty places are zero.

Two densities have these parameters, with P = softmax(v) and m_i = g(u_i):

* the mixture, p(y | x) = sum_i P_i N(y; m_i, s^2);
* the mean, p(y | x) = N(y; f(x), s^2), f = sum_i P_i m_i: the data are a function plus noise.

Both are climbed by damped Newton steps with a positive definite matrix. For the mean it is the Gauss-Newton matrix J'J / s^2 with
df/du_i = P_i g'(u_i) and df/dv_i = P_i (m_i - f) (Levenberg 1944, Marquardt 1963); for the mixture it is the complete-data
information, and the step one of EM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks, sum_over_blocks
from moejax.likelihood.predictors import block_matrix, weighted_gram
from moejax.model.activations import ScalarFunction, activation_and_slope
from moejax.model.family import LOG_TWO_PI
from moejax.model.mixture import MoEParams, regauge
from moejax.model.small_linear_algebra import solve_positive_definite

Objective = Literal["likelihood", "mean"]

INTERCEPT_PRECISION = 0.01
"""Prior precision of the experts' intercepts, in units of the labels' variance: nearly free."""
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-7, 1e8
"""Marquardt's factor of the diagonal: at the start, and its bounds. At the upper one a climb ends."""
AFTER_SUCCESS, AFTER_FAILURE = 0.3, 4.0


class Ridge(NamedTuple):
    """Precisions of normal priors with mean zero."""

    experts: Float[jax.Array, ""]
    """() of the experts' slopes."""
    gates: Float[jax.Array, ""]
    """() of the gates, biases included, minus their mean over experts."""


class Sums(NamedTuple):
    """A point's sums over the sample."""

    log_likelihood: Float[jax.Array, ""]
    """() in nats."""
    squares: Float[jax.Array, ""]
    """() sum w (y - f)^2, or for the mixture sum w r_i (y - m_i)^2."""
    gradient: Float[jax.Array, " P"]
    """(P,) of the log-likelihood, P = 2 K D."""
    information: Float[jax.Array, "P P"]
    """(P, P)"""


def gates_and_means(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    design: Float[jax.Array, "D n"],
    fn: ScalarFunction,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(K, n) log P_i, minus infinity in empty places; (K, n) m_i and g'(u_i), zero there."""
    count = active.shape[0]
    predictors = rows @ design
    means, slopes = activation_and_slope(fn, predictors[:count])
    here = active[:, None]
    log_gates = jax.nn.log_softmax(jnp.where(here, predictors[count:], -jnp.inf), axis=0)
    return log_gates, jnp.where(here, means, 0), jnp.where(here, slopes, 0)


def mean_of(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    design: Float[jax.Array, "D n"],
    fn: ScalarFunction,
) -> Float[jax.Array, " n"]:
    """(n,): f(x)."""
    log_gates, means, _ = gates_and_means(rows, active, design, fn)
    return jnp.sum(jnp.exp(log_gates) * means, axis=0)


def mean_slopes(
    log_gates: Float[jax.Array, "K n"], means: Float[jax.Array, "K n"], slopes: Float[jax.Array, "K n"]
) -> tuple[Float[jax.Array, " n"], Float[jax.Array, "rows n"]]:
    """(n,) f, and (2 K, n) its derivatives in the linear predictors u and v."""
    gates = jnp.exp(log_gates)
    f = jnp.sum(gates * means, axis=0)
    return f, jnp.concatenate([gates * slopes, gates * jnp.where(gates > 0, means - f[None], 0)])


def mean_sums(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    blocks: SampleBlocks,
    fn: ScalarFunction,
) -> Sums:
    """The sums for y ~ N(f(x), s^2), with the Gauss-Newton matrix."""
    first, second = np.triu_indices(rows.shape[0])

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        f, slopes = mean_slopes(*gates_and_means(rows, active, design, fn))
        error = y - f
        weighted = weights[None] * slopes
        grams = weighted_gram(design, weighted[first] * slopes[second])
        return weights.sum(), weights @ error**2, (weighted * error[None]) @ design.T, block_matrix(grams)

    total, squares, gradient, information = sum_over_blocks(sums_of, blocks)
    value = -0.5 * (squares / variance + total * (jnp.log(variance) + LOG_TWO_PI))
    return Sums(value, squares, gradient.reshape(-1) / variance, information / variance)


def mixture_sums(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    blocks: SampleBlocks,
    fn: ScalarFunction,
) -> Sums:
    """The sums for the mixture with one noise, with its complete-data information."""
    count, size = active.shape[0], rows.shape[1]
    first, second = np.triu_indices(count)
    on_diagonal = (first == second).astype(rows.dtype)[:, None]

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        log_gates, means, slopes = gates_and_means(rows, active, design, fn)
        error = y[None] - means
        log_joint = log_gates - 0.5 * (error**2 / variance + jnp.log(variance) + LOG_TWO_PI)
        evidence = jax.nn.logsumexp(log_joint, axis=0)
        gates, r = jnp.exp(log_gates), weights[None] * jnp.exp(log_joint - evidence[None])
        weighted = weights[None] * gates
        scores = jnp.concatenate([r * slopes * error / variance, r - weighted])
        coefficients = jnp.concatenate(
            [r * slopes**2 / variance, weighted[first] * (on_diagonal - gates[second])]
        )
        grams = weighted_gram(design, coefficients)
        information = jnp.zeros((2 * count * size,) * 2, rows.dtype)
        middle = count * size
        of_experts = jnp.einsum("ide,ij->idje", grams[:count], jnp.eye(count, dtype=rows.dtype))
        information = information.at[:middle, :middle].set(of_experts.reshape(middle, middle))
        information = information.at[middle:, middle:].set(block_matrix(grams[count:]))
        return evidence @ weights, jnp.sum(r * error**2), scores @ design.T, information

    value, squares, gradient, information = sum_over_blocks(sums_of, blocks)
    return Sums(value, squares, gradient.reshape(-1), information)


SUMS: dict[Objective, Callable[..., Sums]] = {"mean": mean_sums, "likelihood": mixture_sums}


class Prior(NamedTuple):
    """The quadratic forms of the priors; rows of empty places have unit precision."""

    slopes: Float[jax.Array, " P/2"]
    """(K D,) one for a slope of an expert."""
    fixed: Float[jax.Array, " P/2"]
    """(K D,) precisions of the experts' intercepts, and of empty places."""
    centred: Float[jax.Array, "K K"]
    """(K, K) I - 11'/k over the experts."""
    pinned: Float[jax.Array, "K K"]
    """(K, K) 11'/k over the experts, and the identity over empty places."""
    num_slopes: Float[jax.Array, ""]
    """() k times the number of slopes of an expert."""
    num_gates: Float[jax.Array, ""]
    """() (k - 1) D."""

    def matrix(self, ridge: Ridge) -> Float[jax.Array, "P P"]:
        """(P, P): the prior precision of all rows."""
        count, half = self.centred.shape[0], self.slopes.shape[0]
        eye = jnp.eye(half // count, dtype=self.slopes.dtype)
        of_gates = jnp.kron(ridge.gates * self.centred + self.pinned, eye)
        of_experts = jnp.diag(ridge.experts * self.slopes + self.fixed)
        nothing = jnp.zeros_like(of_gates)
        return jnp.block([[of_experts, nothing], [nothing, of_gates]])

    def squares(self, rows: Float[jax.Array, "rows D"]) -> tuple[jax.Array, jax.Array]:
        """() sum of the squares of the slopes, and () of the gates minus their mean."""
        experts, gates = rows[: self.centred.shape[0]], rows[self.centred.shape[0] :]
        return self.slopes @ experts.reshape(-1) ** 2, jnp.sum(gates * (self.centred @ gates))


def prior_of(active: Bool[jax.Array, " K"], size: int, *, fit_intercept: bool, dtype: jnp.dtype) -> Prior:
    """The quadratic forms for the active places and D = `size` coefficients in a row."""
    here = active.astype(dtype)
    number = here.sum()
    slope = np.ones(size)
    slope[-1] = 0.0 if fit_intercept else 1.0
    shared = here[:, None] * here[None] / number
    return Prior(
        jnp.kron(here, jnp.asarray(slope, dtype)),
        jnp.kron(here, jnp.asarray(INTERCEPT_PRECISION * (1.0 - slope), dtype))
        + jnp.kron(1.0 - here, jnp.ones(size, dtype)),
        jnp.diag(here) - shared,
        jnp.diag(1.0 - here) + shared,
        number * float(slope.sum()),
        (number - 1.0) * size,
    )


class Climb(NamedTuple):
    """The end of a climb."""

    rows: Float[jax.Array, "rows D"]
    value: Float[jax.Array, ""]
    """() log-likelihood minus the priors' penalty, in nats."""
    sums: Sums
    variance: Float[jax.Array, ""]
    """() s^2"""
    num_passes: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]


def climb_padded(
    rows: Float[jax.Array, "rows D"],
    active: Bool[jax.Array, " K"],
    variance: Float[jax.Array, ""],
    ridge: Ridge,
    blocks: SampleBlocks,
    *,
    fn: ScalarFunction,
    objective: Objective,
    fit_intercept: bool,
    num_steps: int,
    tolerance: float,
    floor: Float[jax.Array, ""] | float = 0.0,
) -> Climb:
    """Damped steps (H + prior + mu diag) delta = gradient, each kept if the objective does not fall.

    For the mean, s^2 stays as given; for the mixture it follows its closed form, and does not fall below `floor`.
    """
    prior = prior_of(active, rows.shape[1], fit_intercept=fit_intercept, dtype=rows.dtype).matrix(ridge)
    total, shape = blocks.weights.sum(), rows.shape
    jitter = 10.0 * jnp.finfo(rows.dtype).eps

    def evaluate(at: jax.Array, variance: jax.Array) -> tuple[jax.Array, Sums]:
        sums = SUMS[objective](at, active, variance, blocks, fn)
        flat = at.reshape(-1)
        return sums.log_likelihood - 0.5 * flat @ prior @ flat, sums

    def advance(state: tuple[Climb, jax.Array, jax.Array]) -> tuple[Climb, jax.Array, jax.Array]:
        """One pass: it evaluates a point, keeps it or not, and takes a step from the one that is kept.

        The start is evaluated by the first pass, so that the sums are compiled once.
        """
        now, at, damping = state
        first = now.num_passes == 0
        variance = now.variance
        if objective == "likelihood":
            variance = jnp.where(first, variance, jnp.maximum(now.sums.squares / total, floor))
        value, sums = evaluate(at, variance)
        gain = value - now.value
        kept = first | ((gain >= 0) & jnp.isfinite(value))
        changed = jnp.where(
            kept, jnp.maximum(AFTER_SUCCESS * damping, LEAST_DAMPING), AFTER_FAILURE * damping
        )
        damping = jnp.where(first, damping, changed)
        done = ~first & ((kept & (gain < tolerance)) | (damping > MOST_DAMPING))
        passes = now.num_passes + 1
        new = Climb(at, value, sums, variance, passes, done)
        old = now._replace(num_passes=passes, converged=done)
        now = jax.tree.map(lambda a, b: jnp.where(kept, a, b), new, old)
        flat, matrix = now.rows.reshape(-1), now.sums.information + prior
        step = solve_positive_definite(
            matrix + jnp.diag((damping + jitter) * jnp.diag(matrix)), now.sums.gradient - prior @ flat
        )
        return now, (flat + step).reshape(shape), damping

    def unfinished(state: tuple[Climb, jax.Array, jax.Array]) -> jax.Array:
        passes = state[0].num_passes
        return (passes == 0) | ((passes < num_steps) & ~state[0].converged)

    zero = jnp.zeros((), rows.dtype)
    nothing = Sums(zero, zero, jnp.zeros(rows.size, rows.dtype), jnp.zeros((rows.size,) * 2, rows.dtype))
    begun = Climb(rows, zero, nothing, variance, jnp.asarray(0, jnp.int32), jnp.asarray(False))
    return jax.lax.while_loop(unfinished, advance, (begun, rows, jnp.full_like(zero, FIRST_DAMPING)))[0]


def params_of_padded(
    rows: Float[jax.Array, "rows D"],
    variance: Float[jax.Array, ""],
    num_experts: int,
    *,
    fit_intercept: bool,
) -> MoEParams:
    """The mixture of the first k places, its last gate zero and its noise s for every expert."""
    count, size = rows.shape[0] // 2, rows.shape[1]
    experts, gates = rows[:num_experts], rows[count : count + num_experts]
    zeros = jnp.zeros(num_experts, rows.dtype)
    noise_std = jnp.broadcast_to(jnp.sqrt(variance), zeros.shape)
    if not fit_intercept:
        return regauge(MoEParams(experts, gates, noise_std, zeros, zeros))
    last = size - 1
    return regauge(MoEParams(experts[:, :last], gates[:, :last], noise_std, experts[:, last], gates[:, last]))
