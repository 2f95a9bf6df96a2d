r"""Mixtures of multinomial logistic regressions: the penalised log-likelihood and the ascent to its maximum by L-BFGS.

With k experts and C classes, P(y = c | x) = sum_i P_i(x) softmax_c(A_i x + b_i), P = softmax(w . x + c). The coefficients are the
rows of one ((C + 1) k, D) matrix: C for each expert, then one for each gate, D = d or, with intercepts, d + 1. The objective is

    sum_j weight_j log P(y_j | x_j) - r_a sum_i |A_i|^2 / 2 - r_w sum_i |w_i|^2 / 2        in nats,

biases included in the squares. All C rows of an expert and all k gates are free, so that no class and no expert is a reference.
From a start whose rows sum to zero over classes and over gates, every step keeps these sums, which the penalty prefers among
equivalent ones. With r_a, r_w > 0 the maximum is finite on separable data too.

L-BFGS (Nocedal 1980; Liu and Nocedal 1989) makes one pass over the data for each trial point. A point is kept only if the objective
gains a fair part of what its slope promised, so that the objective never decreases.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks, sum_over_blocks
from moejax.likelihood.scan import frozen_scan

MEMORY = 12
"""Pairs of steps and changes of the gradient from which L-BFGS models the curvature."""
FAIR_PART = 1e-4
"""A trial point is kept if it gains this part of the slope's promise (Armijo 1966)."""
SHORTEST_STEP = 1e-10
"""A line search ends below this part of the quasi-Newton step."""
TOLERANCE = 1e-10
"""An ascent has converged if its gain and its next promise are below this, in nats per sample, or below rounding."""


class CategoricalRun(NamedTuple):
    """The end of an ascent."""

    rows: Float[jax.Array, "rows D"]
    """((C + 1) k, D) coefficients."""
    log_likelihood: Float[jax.Array, ""]
    """() nats, without the penalty."""
    objective: Float[jax.Array, ""]
    """() nats."""
    history: Float[jax.Array, " num_steps"]
    """(num_steps,) objective of the best point so far at each pass, NaN after the end."""
    num_steps: Int[jax.Array, ""]
    """() int32 passes over the data."""
    converged: Bool[jax.Array, ""]
    """() bool"""


def log_probabilities(
    rows: Float[jax.Array, "rows D"], design: Float[jax.Array, "D n"], num_classes: int
) -> tuple[Float[jax.Array, "k n"], Float[jax.Array, "k C n"]]:
    """(k, n) log P_i(x) and (k, C, n) log softmax_c(A_i x + b_i) of a design (D, n)."""
    k = rows.shape[0] // (num_classes + 1)
    predictors = rows @ design
    experts = predictors[: k * num_classes].reshape(k, num_classes, -1)
    return jax.nn.log_softmax(predictors[k * num_classes :], axis=0), jax.nn.log_softmax(experts, axis=1)


def _log_likelihood(
    rows: jax.Array, design: jax.Array, y: jax.Array, weights: jax.Array, num_classes: int
) -> jax.Array:
    """() nats of a block, for classes y (B,) 0 .. C - 1."""
    log_gates, log_classes = log_probabilities(rows, design, num_classes)
    own = (y[None] == jnp.arange(num_classes, dtype=y.dtype)[:, None])[
        None
    ]  # no gather: its gradient is a scatter
    return weights @ jax.nn.logsumexp(log_gates + jnp.sum(jnp.where(own, log_classes, 0.0), axis=1), axis=0)


class _Memory(NamedTuple):
    """The last pairs of L-BFGS, the newest last; unused ones are zero."""

    steps: Float[jax.Array, "m P"]
    changes: Float[jax.Array, "m P"]
    """(m, P) changes of the gradient of the loss along the steps."""
    inverses: Float[jax.Array, " m"]
    """1 / (step . change)"""
    scale: Float[jax.Array, ""]
    """The inverse curvature in directions without a pair."""

    def towards(self, gradient: Float[jax.Array, " P"]) -> Float[jax.Array, " P"]:
        """(P,) minus the modelled inverse Hessian times a gradient (P,), by two loops over the pairs."""
        pairs = (self.steps, self.changes, self.inverses)

        def newest_first(q: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            step, change, inverse = pair
            share = inverse * (step @ q)
            return q - share * change, share

        def oldest_first(q: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            step, change, inverse, share = pair
            return q + (share - inverse * (change @ q)) * step, None

        q, shares = jax.lax.scan(newest_first, gradient, pairs, reverse=True)
        return -jax.lax.scan(oldest_first, self.scale * q, (*pairs, shares))[0]

    def with_pair(self, step: Float[jax.Array, " P"], change: Float[jax.Array, " P"]) -> _Memory:
        """The memory with a newer pair, if the loss curves upwards along the step; else as it is."""
        product, square = step @ change, change @ change
        good = product > jnp.finfo(step.dtype).eps * square
        safe = jnp.where(good, product, 1.0)

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(good, jnp.roll(old, -1, axis=0).at[-1].set(new), old)

        return _Memory(
            kept(self.steps, step),
            kept(self.changes, change),
            kept(self.inverses, 1.0 / safe),
            jnp.where(good, safe / jnp.where(good, square, 1.0), self.scale),
        )


class _Climb(NamedTuple):
    """The best point (P,), the loss and its gradient there, and the step that the next pass tries."""

    point: jax.Array
    loss: jax.Array
    log_likelihood: jax.Array
    gradient: jax.Array
    memory: _Memory
    direction: jax.Array
    length: jax.Array


def maximise_categorical(
    rows: Float[jax.Array, "rows D"],
    blocks: SampleBlocks,
    *,
    num_classes: int,
    num_steps: int,
    expert_ridge: Float[jax.Array, ""] | float,
    gate_ridge: Float[jax.Array, ""] | float,
) -> CategoricalRun:
    """The ascent of the penalised log-likelihood from `rows`.

    Args:
        rows: ((C + 1) k, D) coefficients to start from.
        blocks: the sample, with classes 0 .. C - 1 as labels, for inputs of about unit variance.
        num_classes: C.
        num_steps: budget of passes over the data; the first evaluates the start.
        expert_ridge: r_a >= 0.
        gate_ridge: r_w >= 0.
    """
    dtype, num_gates = rows.dtype, rows.shape[0] // (num_classes + 1)
    ridges = jnp.concatenate(
        [
            jnp.full((rows.shape[0] - num_gates, 1), expert_ridge, dtype),
            jnp.full((num_gates, 1), gate_ridge, dtype),
        ]
    )
    total = blocks.weights.sum()

    def loss_at(point: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """() loss, (P,) its gradient, () log-likelihood."""
        at = point.reshape(rows.shape)

        def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.value_and_grad(_log_likelihood)(at, design, y, weights, num_classes)

        value, gradient = sum_over_blocks(sums_of, blocks)
        return (
            0.5 * jnp.sum(ridges * at**2) - value,
            (ridges * at - gradient).reshape(-1),
            value,
        )

    def advance(state: _Climb) -> tuple[_Climb, jax.Array, jax.Array]:
        promise = -state.length * (state.gradient @ state.direction)
        trial = state.point + state.length * state.direction
        loss, gradient, value = loss_at(trial)
        gain = state.loss - loss  # infinite at the start; not a number if the trial is not finite
        accept = gain >= FAIR_PART * promise
        unit = jnp.maximum(TOLERANCE * total, jnp.finfo(dtype).eps * jnp.abs(state.loss))
        memory = state.memory.with_pair(trial - state.point, gradient - state.gradient)
        direction = memory.towards(gradient)
        upwards = gradient @ direction >= 0  # by rounding only
        direction = jnp.where(upwards, -memory.scale * gradient, direction)
        # the minimum of the parabola through the loss, its slope and the loss of the trial
        shorter = 0.5 * promise / jnp.where(promise > gain, promise - gain, jnp.inf)
        shorter = jnp.where(jnp.isfinite(gain), jnp.clip(shorter, 0.1, 0.5), 0.1) * state.length
        moved = _Climb(trial, loss, value, gradient, memory, direction, jnp.ones((), dtype))
        stayed = state._replace(length=shorter)
        new = jax.tree.map(lambda a, b: jnp.where(accept, a, b), moved, stayed)
        still = (gain < unit) & (-(gradient @ direction) < 2.0 * unit)
        stuck = (promise < unit) | (shorter < SHORTEST_STEP)
        return new, -new.loss, jnp.where(accept, still, stuck)

    begin = rows.reshape(-1)
    zero, none = jnp.zeros((), dtype), jnp.zeros_like(begin)
    pairs = jnp.zeros((MEMORY, begin.size), dtype)
    # Boehning (1992): the Hessian of a multinomial logit is at most sum w x x' / 2
    memory = _Memory(pairs, pairs, pairs[:, 0], 2.0 / total)
    first = _Climb(begin, jnp.full_like(zero, jnp.inf), zero, none, memory, none, zero + 1.0)
    end, history, count, done = frozen_scan(advance, first, num_steps)
    return CategoricalRun(end.point.reshape(rows.shape), end.log_likelihood, -end.loss, history, count, done)
