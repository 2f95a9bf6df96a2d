r"""Expectation maximisation by scan: for the gates with the experts known, and for gates, experts and noise jointly.

Gating EM (Makkuva et al. 2019, Algorithm 2): E, responsibilities r under the current gates; M, one Newton step on the
weighted softmax regression sum_j sum_i r_ij log P_i(x_j). Joint EM (Jordan and Jacobs 1994) adds the experts, by a
Gauss-Newton step that is the closed-form weighted least squares for a linear g, and the noise in closed form.

One pass over the data makes the E-step at a point and the sums that the M-step needs (`expectation`); the M-step itself
reads no sample (`maximisation`). The next pass evaluates the step. It is kept if the likelihood gains a fair part of the gain that
the M-step predicted. Otherwise it is repeated with damping mu: mu times Boehning's (1992) bound is added to the gates' Hessian,
which at mu = 1 cannot fail, and the experts' step is divided by 1 + mu. With every success the damping falls, soon to zero.

For an even g one Gauss-Newton step is far from the M-step's maximum. With `expert_steps` the M-step makes more of them, at the same
responsibilities, for which it reads the samples again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import SampleBlocks, sample_blocks, sum_over_blocks
from moejax.likelihood.collapse import rounding_noise
from moejax.likelihood.expert_steps import more_expert_steps
from moejax.likelihood.free_columns import FreeColumns, parts_of_design
from moejax.likelihood.m_step import Expectation, MStep, Point, boehning_bound, maximisation
from moejax.likelihood.predictors import (
    block_matrix,
    gate_penalty,
    log_sum_and_shares,
    params_of,
    predictors_of,
    weighted_gram,
)
from moejax.likelihood.scan import frozen_scan
from moejax.model.family import Channel, as_family
from moejax.model.mixture import MoEParams, NoiseModel

RIDGE = 1e-6
"""Default ridge on the gates, the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats: a normal prior of standard deviation 1000 on
every gate, for inputs of unit variance. It is the same for every sample size, so that its bias vanishes as the data grow, and it
keeps separable gates finite. It acts on the gates minus their mean over experts, so that it does not depend on the choice of the
reference expert."""


PROMISE_KEPT = 0.25
"""A step is kept if the likelihood gains this fraction of the gain that the M-step predicted."""
LEAST_DAMPING = 1 / 64
"""The first mu of the gates' steps after a step that was cut."""


class EMRun(NamedTuple):
    """The end of a run of EM."""

    params: MoEParams
    log_likelihood: Float[jax.Array, ""]
    """() sum over samples at `params`, in nats."""
    history: Float[jax.Array, " num_steps"]
    """(num_steps,) objective (with its ridge) of the best point so far at each pass, from the start on; NaN once frozen."""
    num_steps: Int[jax.Array, ""]
    """() int32 passes over the data: `expert_steps` for each entry of `history`."""
    converged: Bool[jax.Array, ""]
    """() bool: the gain fell below the tolerance."""
    path: MoEParams | None
    """Leaves (num_steps, ..): parameters at each entry of `history`, NaN once frozen; None unless recorded."""


def expectation(
    point: Point,
    blocks: SampleBlocks,
    *,
    fn: Channel,
    experts_free: bool,
    columns: FreeColumns | None = None,
) -> Expectation:
    """The E-step at a point, in one pass over the data; its sums are those of the free columns."""
    family = as_family(fn)
    k, noise_std = point.noise_std.shape[0], point.noise_std.reshape(-1)
    rows, others = np.triu_indices(k - 1)
    on_diagonal = (rows == others).astype(blocks.y.dtype)[:, None]

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> Expectation:
        predictors = point.predictors(design)
        labels = y[None] if y.ndim == 1 else jnp.tile(y, (k, 1))
        at = family.first_order(labels, predictors[: noise_std.size], noise_std[:, None])
        logits = jnp.concatenate([predictors[noise_std.size :], jnp.zeros_like(weights)[None]])
        log_densities = at.log_density
        if y.ndim == 2:
            log_densities = log_densities.reshape(k, *y.shape).sum(axis=1)
        evidence, r = log_sum_and_shares(logits + log_densities)
        gate_evidence, prior = log_sum_and_shares(logits)
        r, prior = weights[None] * r, prior[:-1]
        weighted_prior = weights[None] * prior
        r_free = r[:-1]
        if y.ndim == 2:
            r = jnp.repeat(r, y.shape[0], axis=0)
        coefficients = weighted_prior[rows] * (on_diagonal - prior[others])
        of_experts, of_gates = parts_of_design(design, columns)
        if columns is None:
            if experts_free:
                coefficients = jnp.concatenate([coefficients, r * at.information])
            grams = weighted_gram(design, coefficients)
            gate_grams, expert_grams = grams[: rows.size], grams[rows.size :]
        else:
            gate_grams = weighted_gram(of_gates, coefficients)
            expert_grams = weighted_gram(of_experts, r * at.information) if experts_free else None
        return Expectation(
            log_likelihood=(evidence - gate_evidence) @ weights,
            gate_gradient=(r_free - weighted_prior) @ of_gates.T,
            gate_information=block_matrix(gate_grams),
            counts=r.sum(axis=1),
            dispersion=tuple(jnp.sum(r * term, axis=1) for term in at.dispersion),
            expert_gradient=(r * at.score) @ of_experts.T if experts_free else None,
            expert_information=expert_grams if experts_free else None,
        )

    return sum_over_blocks(sums_of, blocks)


def _chosen(condition: Bool[jax.Array, ""], one: Any, other: Any) -> Any:
    """The pytree `one` if the condition is true, else `other`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


class _Climb(NamedTuple):
    """The state of a run: the best point, its E-step, and the candidate that the next pass evaluates."""

    best: Point
    sums: Expectation
    objective: Float[jax.Array, ""]
    candidate: MStep
    damping: Float[jax.Array, ""]
    caution: Float[jax.Array, ""]


def _run(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n *m"],
    weights: Float[jax.Array, " n"],
    *,
    fn: Channel,
    num_steps: int,
    fit_intercept: bool,
    noise: NoiseModel,
    ridge: Float[jax.Array, ""] | float,
    tolerance: float,
    experts_free: bool,
    hold_noise: Bool[jax.Array, ""] | bool = False,
    hold_experts: Bool[jax.Array, ""] | bool = False,
    before_polish: bool = False,
    record_path: bool = False,
    least_noise: Float[jax.Array, "*m"] | None = None,
    columns: FreeColumns | None = None,
    expert_steps: int = 1,
) -> EMRun:
    k = params.experts.shape[0]
    if noise == "per_expert" and least_noise is None:
        least_noise = jnp.broadcast_to(rounding_noise(y, weights), y.shape[1:])
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept)
    total_tolerance = tolerance * weights.sum()
    penalty, rounding = jnp.asarray(ridge, x.dtype), 10 * jnp.finfo(x.dtype).eps
    bound = boehning_bound(blocks, k, penalty, columns)

    def expect(point: Point) -> Expectation:
        return expectation(point, blocks, fn=fn, experts_free=experts_free, columns=columns)

    def advance(state: _Climb) -> tuple[_Climb, tuple[jax.Array, Point | None], jax.Array]:
        point, promised, shortened = state.candidate
        sums = expect(point)
        gates = point.predictors.rows[point.noise_std.size :]
        objective = sums.log_likelihood - penalty * gate_penalty(gates)
        gain = objective - state.objective
        # the likelihood gains at least the required part; the first pass gains infinitely; False if not finite
        accept = gain >= PROMISE_KEPT * jnp.maximum(promised, 0.0)
        best, sums, objective = _chosen(
            accept, (point, sums, objective), (state.best, state.sums, state.objective)
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
        # a loss within rounding, or after a negligible predicted gain, ends the run as a small gain does
        flat = accept | (gain > -rounding * jnp.abs(objective)) | (promised < total_tolerance)
        m_step = functools.partial(
            maximisation,
            damping=damping,
            caution=caution,
            bound=bound,
            ridge=penalty,
            noise=noise,
            hold_noise=hold_noise,
            hold_experts=hold_experts,
            gates_first=total_tolerance if before_polish else jnp.inf,
            least_noise=least_noise,
            columns=columns,
            fn=fn,
        )
        candidate = m_step(best, sums)
        if expert_steps > 1:
            count, least = expert_steps - 1, total_tolerance
            candidate = more_expert_steps(m_step, best, sums, candidate, blocks, count, least, fn, columns)
        done = flat & (gain < total_tolerance)
        if before_polish:
            last = accept & (candidate.promised < total_tolerance)
            best, done = _chosen(last, candidate.point, best), done | last
        return (
            _Climb(best, sums, objective, candidate, damping, caution),
            (objective, best if record_path else None),
            done,
        )

    start = Point(predictors_of(params, fit_intercept=fit_intercept), params.noise_std)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(expect, start))
    zero = jnp.zeros((), x.dtype)
    nothing = nothing._replace(
        log_likelihood=jnp.full_like(zero, -jnp.inf)
    )  # for a start that is never accepted
    first = _Climb(
        start, nothing, jnp.full_like(zero, -jnp.inf), MStep(start, zero, jnp.asarray(False)), zero, zero
    )
    end, (history, path), count, done = frozen_scan(advance, first, num_steps)

    def params_at(point: Point) -> MoEParams:
        return params_of(*point, fit_intercept=fit_intercept)

    path = None if path is None else jax.vmap(params_at)(path)
    return EMRun(params_at(end.best), end.sums.log_likelihood, history, expert_steps * count, done, path)


def gating_em(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n *m"],
    weights: Float[jax.Array, " n"],
    *,
    fn: Channel,
    num_steps: int,
    fit_intercept: bool = False,
    noise: NoiseModel = "known",
    ridge: Float[jax.Array, ""] | float = RIDGE,
    tolerance: float = 1e-8,
    record_path: bool = False,
    least_noise: Float[jax.Array, "*m"] | None = None,
    columns: FreeColumns | None = None,
) -> EMRun:
    """EM for the gates with the experts fixed, from the gates in `params` (start at zero).

    Args:
        params: experts (k, d), which stay fixed; gates to start from; noise_std. Biases stay unless intercepts are fitted.
        x: (n, d).
        y: (n,), or (n, m).
        weights: (n,) sample weights.
        fn: the activation g, or an output family.
        num_steps: budget of passes over the data; the first evaluates the start.
        fit_intercept: if true, the biases of the gates are fitted.
        noise: "known" leaves noise_std; otherwise it is updated in closed form too, which absorbs the experts' error.
        ridge: coefficient of sum_i ||w_i - mean w||^2 / 2 in nats; part of the objective that never decreases.
        tolerance: the run stops at a gain below this, in nats per sample.
        record_path: keep every point; it adds a sixth to the time of a short run, so it is off by default.
        least_noise: () or (m,): with a noise for each expert, the least that one may have (see `noise_floor`); None takes the
            rounding of the labels.
        columns: the columns whose coefficients are free, while the others stay as in `params`; None for all.
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
        least_noise=least_noise,
        columns=columns,
    )


def joint_em(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n *m"],
    weights: Float[jax.Array, " n"],
    *,
    fn: Channel,
    num_steps: int,
    fit_intercept: bool = False,
    noise: NoiseModel = "shared",
    ridge: Float[jax.Array, ""] | float = RIDGE,
    tolerance: float = 1e-8,
    hold_noise: Bool[jax.Array, ""] | bool = False,
    hold_experts: Bool[jax.Array, ""] | bool = False,
    before_polish: bool = False,
    record_path: bool = False,
    least_noise: Float[jax.Array, "*m"] | None = None,
    columns: FreeColumns | None = None,
    expert_steps: int = 1,
) -> EMRun:
    """EM for experts, gates and noise together (Jordan and Jacobs 1994), from `params`. Arguments as in `gating_em`.

    The experts' M-step is a Gauss-Newton step on their weighted squared error: for a linear g, weighted least squares. With
    `expert_steps` there are more of them in every M-step, and as many passes over the data.
    If `hold_noise` () is true, the noise is kept; unlike noise="known" it may be traced. If `hold_experts` () is true, the experts
    are kept, and the run is that of `gating_em`.

    With `before_polish`, the experts are kept while the gates' own step promises `tolerance` or more, and the run ends with a step
    that promises less. No pass evaluates that step, but the first of the polish. `history` and `log_likelihood` are without it.
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
        hold_experts=hold_experts,
        before_polish=before_polish,
        record_path=record_path,
        least_noise=least_noise,
        columns=columns,
        expert_steps=expert_steps,
    )
