r"""Moments and the likelihood for many inputs, from products of the data with a few vectors; no array is (d, d).

1. Moments: the k leading eigenvectors of T2 (`leading_subspace`) and the tensor that they whiten give the experts.
2. The likelihood in a span: for an orthonormal basis V (d, r) of a few directions, the mixture of the inputs V'x has the rows
   of coefficients V'a_i and V'w_i. EM and the polish fit them as for any r inputs.
3. A round changes the span. The gradient of the log-likelihood in all d coordinates is G = sum_j s_j x_j', (2k - 1, d), with s_j
   the derivatives in the predictors u_i = a_i . x and v_i = w_i . x. The next basis spans the present rows, the rows of G, and
   the step from the rows before: 3 (2k - 1) directions. The maximum in such a span is a step of a conjugate gradient method
   whose products are with the data only (Knyazev 2001, for eigenvectors). The old point is in the span, so that the likelihood
   never falls. The span of G does not change if its rows are mixed, so no preconditioner for the rows is needed.

The first G adds the gates. With x ~ N(0, I), Stein's lemma gives E[(r_i - P_i) x] = E[grad (r_i - P_i)], and r_i - P_i depends
on x through the experts, the gates and the present span only. So E[G] lies in their span, and one pass finds the gates'
directions up to noise.

If the true rows lie in the span, x outside of it is independent of s_j. The columns of G outside are then independent N(0, S),
S = sum_j s_j s_j', and the maximum over all coordinates is (2k - 1) d / 2 nats higher by noise alone. The rounds end once one
gains less than SMALL_GAIN of this: the estimate is then a small part of a standard error from the maximum. They converge like
conjugate gradients, in a few rounds if n >> (2k - 1) d and in more as n / d falls.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.likelihood.blocks import sample_scale
from moejax.likelihood.derivatives import predictor_derivatives
from moejax.likelihood.em import gating_em
from moejax.likelihood.polish import polish
from moejax.likelihood.predictors import gate_centring, gate_penalty, predictors_of
from moejax.likelihood.scan import frozen_scan
from moejax.methods.from_moments import EM_STEPS, EM_TOLERANCE, em_before_polish, polish_from
from moejax.methods.method import (
    MethodConfig,
    MethodResult,
    Problem,
    finish,
    least_noise_of,
    noise_while_inexact,
    with_path,
)
from moejax.methods.starts import zero_gates
from moejax.model.gaussian import standard_normal
from moejax.model.mixture import MoEParams
from moejax.model.small_linear_algebra import orthonormal_columns, unit_rows
from moejax.model.sums import sum_over_rows
from moejax.moments.leading_subspace import leading_subspace, rows_of_part
from moejax.moments.spectral import SpectralEstimate, estimate_from_eigenpairs, transformed_labels

GATE_NORM = 3.0
"""Norm of a gate under the normal prior of the ridge, for inputs of unit variance: a coordinate has variance 9 / d. Without it,
gates separate the data if n / d is about four."""
MOST_ROUNDS = 60
"""Most rounds of conjugate directions."""
SMALL_GAIN = 0.01
"""Gain of the last round, as a share of what noise alone gives. The squared distance from the maximum, in units of the
estimate's variance, is about this share."""
POLISH_STEPS = 10
POLISH_TOLERANCE = 1e-2
"""Newton passes of a round over the inputs in its span, and the predicted gain in nats below which they stop."""


class Span(NamedTuple):
    """A span of directions, and the inputs in it."""

    basis: Float[jax.Array, "d r"]
    """(d, r) orthonormal columns."""
    inputs: Float[jax.Array, "n r"]
    """(n, r) x @ basis; rows of weight zero may hold any values."""


def span_of(directions: Float[jax.Array, "d r"], x: Float[jax.Array, "n d"]) -> Span:
    """The span of r <= d independent directions, in one pass over the data."""
    basis = orthonormal_columns(directions)
    return Span(basis, x @ basis)


class Moments(NamedTuple):
    """The result of the first stage."""

    estimate: SpectralEstimate
    span: Span
    """The span of the k leading eigenvectors of T2, which has the experts."""
    num_passes: Int[jax.Array, ""]
    """() int32 passes over the data."""


def moments_of_many_inputs(key: jax.Array, problem: Problem, config: MethodConfig) -> Moments:
    """The spectral estimate without a (d, d) array; its eigenvalues of T2 are the first k and the one that follows.

    The tensor, and the first moment for signs, are those of the k inputs in the span of the eigenvectors.
    """
    assert problem.transforms is not None, "a method of moments is given label transforms"
    of_block, of_tensor = jax.random.split(key)
    k, x = config.num_experts, problem.x
    labels = transformed_labels(problem.transforms, problem.y)
    found = leading_subspace(
        of_block, x, labels.second, problem.weights, num_vectors=k, chunk_size=config.chunk_size
    )
    finite = jnp.isfinite(found.eigenvectors).all() & jnp.isfinite(found.eigenvalues).all()
    span = span_of(
        jnp.where(finite, found.eigenvectors, jnp.eye(*found.eigenvectors.shape, dtype=x.dtype)), x
    )
    values = found.eigenvalues
    if x.shape[1] > k:
        values = jnp.append(values, found.next_eigenvalue)
    estimate = estimate_from_eigenpairs(
        of_tensor,
        span.inputs,
        labels,
        values,
        jnp.eye(k, dtype=x.dtype),
        finite,
        problem.weights,
        order=config.order,
        num_restarts=config.num_restarts,
        num_polar_iterations=config.num_polar_iterations,
        chunk_size=config.chunk_size,
    )
    return Moments(estimate._replace(experts=estimate.experts @ span.basis.T), span, found.num_passes + 1)


def wide_ridge(ridge: float, num_inputs: int) -> float:
    """The ridge on the gates of `spectral_wide`: that of a prior under which a gate has norm GATE_NORM, or `ridge` if more."""
    return max(ridge, num_inputs / GATE_NORM**2)


def spectral_wide(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Moments, gates and the maximum of the likelihood for many inputs, in O(n d k) a pass.

    Time and memory besides the data are linear in n and d. `MethodResult.num_iterations` counts passes over the (n, d) inputs; the
    passes of EM and polish over the (n, r) inputs of a span, r <= 3 (2k - 1), are in `history` and not in the count.

    The moments assume that the inputs are standard normal and uncorrelated; if they are not, the moments are only a start. The
    rounds assume nothing of the inputs, but take more passes if they are correlated. The maximum of the likelihood over all
    (2k - 1) d coefficients needs n well above their number. Gates have the ridge of `wide_ridge`.

    With `config.polish` False the experts stay where the moments put them, and EM fits the gates in the span of the experts
    and of one gradient.
    """
    config = dataclasses.replace(config, ridge=wide_ridge(config.ridge, problem.x.shape[1]))
    of_moments, of_spans = jax.random.split(key)
    moments = moments_of_many_inputs(of_moments, problem, config)
    start = zero_gates(moments.estimate.experts, problem.noise_std)
    span = moments.span
    if not config.polish:
        return _published(of_spans, problem, config, moments, start)
    joint = em_before_polish(_inside(start, span.basis), problem._replace(x=span.inputs), config)
    first = _Round(
        _outside(joint.params, span.basis),
        _gradient(joint.params, span, problem, config),
        jnp.zeros((2 * config.num_experts - 1, problem.x.shape[1]), problem.x.dtype),
        joint.log_likelihood - config.ridge * gate_penalty(joint.params.gating[:-1]),
    )
    rounds = _rounds(of_spans, first, problem, config)
    params, histories, settled = (
        rounds.end.params,
        [joint.history, rounds.history],
        rounds.settled,
    )
    paths = [None if joint.path is None else _outside(joint.path, span.basis), rounds.path]
    num_passes = moments.num_passes + 1 + 2 * rounds.num_rounds
    if config.noise == "known":
        span = _span_at(of_spans, rounds.end, problem)
        last = polish_from(_inside(params, span.basis), problem._replace(x=span.inputs), config)
        params, settled, num_passes = (
            _outside(last.params, span.basis),
            settled & last.converged,
            num_passes + 1,
        )
        histories.append(last.history)
        paths.append(None if last.path is None else _outside(last.path, span.basis))
    history = jnp.concatenate(histories)
    result = _finished(of_spans, params, history, num_passes, settled, problem, moments.estimate)
    return with_path(result, config, *paths)


def _finished(
    key: jax.Array,
    params: MoEParams,
    history: Float[jax.Array, " h"],
    num_passes: Int[jax.Array, ""],
    converged: Bool[jax.Array, ""],
    problem: Problem,
    spectral: SpectralEstimate,
) -> MethodResult:
    """`finish` in the span of the rows, with one more pass: the mixing weights need no copy of the inputs then."""
    rows = _rows(params)
    rows = _unit_or(rows, standard_normal(key, rows.shape, rows.dtype))[: problem.x.shape[1]]
    span = span_of(rows.T, problem.x)
    # a result that is not finite stays so
    inside = _inside(params, span.basis)
    result = finish(inside, history, num_passes + 1, converged, problem._replace(x=span.inputs), spectral)
    return result._replace(params=params)


# Rounds


class _Round(NamedTuple):
    """The state between rounds."""

    params: MoEParams
    gradient: Float[jax.Array, "q d"]
    """(2k - 1, d) of the log-likelihood at `params`."""
    step: Float[jax.Array, "q d"]
    """(2k - 1, d) that the last round made."""
    objective: Float[jax.Array, ""]
    """() log-likelihood at `params`, less the penalty on the gates."""


class _Rounds(NamedTuple):
    """The end of the rounds."""

    end: _Round
    history: Float[jax.Array, " h"]
    path: MoEParams | None
    num_rounds: Int[jax.Array, ""]
    settled: Bool[jax.Array, ""]


def _rounds(key: jax.Array, first: _Round, problem: Problem, config: MethodConfig) -> _Rounds:
    """Rounds until one gains little."""
    num_inputs = problem.x.shape[1]
    small = SMALL_GAIN * 0.5 * first.step.size * sample_scale(problem.weights).unit

    def advance(state: _Round) -> tuple[_Round, tuple[jax.Array, MoEParams | None], jax.Array]:
        span = _span_at(key, state, problem)
        run = polish(
            _inside(state.params, span.basis),
            span.inputs,
            problem.y,
            problem.weights,
            num_steps=POLISH_STEPS,
            noise=noise_while_inexact(config),
            tolerance=POLISH_TOLERANCE,
            **_options(config, problem),
        )
        params = _outside(run.params, span.basis)
        following = _Round(
            params,
            _gradient(run.params, span, problem, config),
            _rows(params) - _rows(state.params),
            run.log_likelihood,
        )
        # a span of all directions leaves nothing to add
        done = (run.log_likelihood - state.objective < small) | (span.basis.shape[1] == num_inputs)
        path = None if run.path is None else _outside(run.path, span.basis)
        return following, (run.history, path), done & run.converged

    end, (history, path), count, settled = frozen_scan(
        advance, first, min(MOST_ROUNDS, config.max_iterations)
    )
    path = None if path is None else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), path)
    return _Rounds(end, history.reshape(-1), path, count, settled)


def _span_at(key: jax.Array, state: _Round, problem: Problem) -> Span:
    """The span of the rows, the gradient and the last step; a random direction in the place of a row of zeros."""
    rows = jnp.concatenate([_rows(state.params), state.gradient, state.step])
    rows = _unit_or(rows, standard_normal(key, rows.shape, rows.dtype))
    return span_of(rows[: problem.x.shape[1]].T, problem.x)


def _published(
    key: jax.Array, problem: Problem, config: MethodConfig, moments: Moments, start: MoEParams
) -> MethodResult:
    """The experts of the moments, and gates by EM in the span of these experts and of one gradient.

    The gradient is that after EM for the gates in the span of the experts, with a noise that has their error.
    """
    span = moments.span
    gates = gating_em(
        _inside(start, span.basis),
        span.inputs,
        problem.y,
        problem.weights,
        num_steps=EM_STEPS,
        noise=noise_while_inexact(config),
        tolerance=EM_TOLERANCE,
        **_options(config, problem),
    )
    gradient = _gradient(gates.params, span, problem, config)[config.num_experts :]
    rows = jnp.concatenate([start.experts, gradient])
    rows = _unit_or(rows, standard_normal(key, rows.shape, rows.dtype))
    span = span_of(rows[: problem.x.shape[1]].T, problem.x)
    run = gating_em(
        _inside(start, span.basis),
        span.inputs,
        problem.y,
        problem.weights,
        num_steps=config.max_iterations,
        noise=config.noise,
        **_options(config, problem),
    )
    params = _outside(run.params, span.basis)._replace(experts=start.experts)
    num_passes = moments.num_passes + 2
    result = _finished(key, params, run.history, num_passes, run.converged, problem, moments.estimate)
    return with_path(result, config, None if run.path is None else _outside(run.path, span.basis))


# Spans


def _unit_or(rows: Float[jax.Array, "r d"], others: Float[jax.Array, "r d"]) -> Float[jax.Array, "r d"]:
    """(r, d) rows of norm one; `others` where a row is zero."""
    return jnp.where((rows != 0).any(axis=1, keepdims=True), unit_rows(rows), others)


def _rows(params: MoEParams) -> Float[jax.Array, "q d"]:
    """(2k - 1, d) coefficients of the experts and of the gates but the last."""
    return jnp.concatenate([params.experts, params.gating[:-1]])


def _inside(params: MoEParams, basis: Float[jax.Array, "d r"]) -> MoEParams:
    """The mixture of the inputs in a span that contains its rows."""
    return params._replace(experts=params.experts @ basis, gating=params.gating @ basis)


def _outside(params: Any, basis: Float[jax.Array, "d r"]) -> MoEParams:
    """The mixture of all inputs, from that of the inputs in a span; leaves may have leading axes."""
    return params._replace(experts=params.experts @ basis.T, gating=params.gating @ basis.T)


def _gradient(
    params: MoEParams, span: Span, problem: Problem, config: MethodConfig
) -> Float[jax.Array, "q d"]:
    """(2k - 1, d): the gradient of the log-likelihood in all coordinates at a mixture (r inputs) of a span, in one pass."""
    weights, x = problem.weights, problem.x
    predictors = predictors_of(params, fit_intercept=False)

    def sums_of(x: jax.Array, z: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        used = weights > 0
        x, z, y = (jnp.where(used.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in (x, z, y))
        scores = predictor_derivatives(predictors(z.T), y, params.noise_std, config.fn).gradient
        return jnp.where(used[None], scores * weights[None], 0) @ x

    sums = sum_over_rows(
        sums_of, (x, span.inputs, problem.y, weights), rows_of_part(x.shape[1], config.chunk_size)
    )
    gates = _outside(params, span.basis).gating[:-1]
    centring = gate_centring(config.num_experts, x.dtype)
    return sums.at[config.num_experts :].add(-config.ridge * (centring @ gates))


# Runs in a span


def _options(config: MethodConfig, problem: Problem) -> dict[str, Any]:
    """The arguments that EM and polish share."""
    return {
        "fn": config.fn,
        "fit_intercept": config.fit_intercept,
        "ridge": config.ridge,
        "record_path": config.record_path,
        "least_noise": least_noise_of(problem, config),
    }
