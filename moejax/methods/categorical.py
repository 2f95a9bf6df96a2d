"""The search for the best mixture of multinomial logistic regressions: random gates, short ascents, long ones for the best."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.categorical import CategoricalRun, maximise_categorical
from moejax.methods.stages import stage
from moejax.model.small_linear_algebra import unit_rows

NUM_STARTS = 16
"""Random starts if `num_starts` is None."""
FIRST_STEPS = 100
"""Passes of the short ascent of each start."""
FINALISTS = 4
"""Starts that go on to their maximum."""
GATE_NORM = 3.0
"""Norm of the gates of a start, for inputs of unit variance."""
EXPERT_RIDGE = 1e-3
"""Default ridge on the experts, in nats: a normal prior of standard deviation 32 on every coefficient, for inputs of unit variance.
An expert whose classes are separable has coefficients of about ten then; others hardly change."""


@stage(static=("num_experts", "num_classes", "num_starts", "num_steps", "fit_intercept"), fast=True)
def search_categorical(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    expert_ridge: Float[jax.Array, ""] | float,
    gate_ridge: Float[jax.Array, ""] | float,
    *,
    num_experts: int,
    num_classes: int,
    num_starts: int,
    num_steps: int,
    fit_intercept: bool,
) -> CategoricalRun:
    """The best of several ascents of the penalised log-likelihood; `num_steps` of the result counts the passes of all.

    A start has random gates and equal experts, which its first steps make different. So no class is treated unlike another. One
    expert has one maximum, and takes one ascent.

    Args:
        key: PRNG key of the starts.
        x: (n, d) inputs of about unit variance.
        y: (n,) classes 0 .. C - 1.
        weights: (n,) non-negative, not all zero.
        expert_ridge: r_a >= 0, as in `maximise_categorical`.
        gate_ridge: r_w >= 0.
        num_experts: k.
        num_classes: C.
        num_starts: random starts.
        num_steps: budget of passes of the long ascents.
        fit_intercept: if true, experts and gates have biases.
    """
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    size = blocks.design.shape[1]

    def climb(rows: jax.Array, budget: int) -> CategoricalRun:
        with jax.default_matmul_precision("highest"):
            return maximise_categorical(
                rows,
                blocks,
                num_classes=num_classes,
                num_steps=budget,
                expert_ridge=expert_ridge,
                gate_ridge=gate_ridge,
            )

    def start(key: jax.Array) -> jax.Array:
        gates = GATE_NORM * unit_rows(jax.random.normal(key, (num_experts, size), x.dtype))
        gates = gates - gates.mean(axis=0, keepdims=True)
        return jnp.concatenate([jnp.zeros((num_experts * num_classes, size), x.dtype), gates])

    if num_experts == 1:
        return climb(jnp.zeros((num_classes + 1, size), x.dtype), num_steps)
    starts = jax.vmap(start)(jax.random.split(key, num_starts))
    first = jax.lax.map(lambda rows: climb(rows, min(FIRST_STEPS, num_steps)), starts)
    best = jax.lax.top_k(first.objective, min(FINALISTS, num_starts))[1]
    ends = jax.lax.map(lambda rows: climb(rows, num_steps), first.rows[best])
    chosen = jnp.argmax(ends.objective)
    run = jax.tree.map(lambda leaf: leaf[chosen], ends)
    return run._replace(num_steps=first.num_steps.sum() + ends.num_steps.sum())
