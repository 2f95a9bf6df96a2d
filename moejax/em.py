r"""Expectation maximisation: gates with the experts known, and jointly; one step, and runs by scan.

Gating EM (Makkuva et al. 2019, Algorithm 2): E, responsibilities r under the current gates; M, one Newton step on the
weighted softmax regression sum_j sum_i r_ij log P_i(x_j), or, where that does not raise it, a step with Boehning's (1992)
bound on its Hessian, which always does. Joint EM (Jordan and Jacobs 1994) adds the experts, by a safeguarded
Gauss-Newton step that is the closed-form weighted least squares for a linear g, and the noise in closed form.

Inside this module samples are the last axis: (k, n) and (D, n) arrays keep the reductions over experts vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.activations import ScalarFunction, activation_and_slope, apply_activation
from moejax.model import LOG_TWO_PI, MoEParams
from moejax.moments import streamed_sum

NoiseModel = Literal["known", "shared", "per_expert"]
RIDGE = 1e-6
"""Default ridge on the gates, relative to the sample size: it keeps separable gates finite. It acts on the gates less their mean
over experts, so that it does not depend on which expert is the reference."""
CHUNK_SIZE = 16384
"""Samples that one pass takes at once; larger samples stream."""


class EMRun(NamedTuple):
    """Where a run of EM ended."""

    params: MoEParams
    log_likelihood: jax.Array
    """() sum over samples at `params`, in nats."""
    history: jax.Array
    """(num_steps,) objective before each step; NaN once frozen."""
    num_steps: jax.Array
    """() int32, steps made before the gain fell below the tolerance."""
    converged: jax.Array
    """() bool."""


def with_intercept(x: jax.Array, fit_intercept: bool) -> jax.Array:
    """(D, n): x transposed, with a last row of ones where there are intercepts; the design of gates and experts."""
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1).T if fit_intercept else x.T


def split_intercept(rows: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Coefficients (k, d) and biases (k,) of rows over the design; zero biases where it has no intercept."""
    if rows.shape[1] == dim:
        return rows, jnp.zeros(rows.shape[0], rows.dtype)
    return rows[:, :dim], rows[:, dim]


def join_intercept(coefficients: jax.Array, biases: jax.Array, fit_intercept: bool) -> jax.Array:
    """(k, D): rows over the design, the inverse of `split_intercept`."""
    return jnp.concatenate([coefficients, biases[:, None]], axis=1) if fit_intercept else coefficients


def weighted_gram(design: jax.Array, coefficients: jax.Array) -> jax.Array:
    """(p, D, D): sum_j coefficients[p, j] design[:, j] design[:, j]', from (D, n) and (p, n)."""
    size = design.shape[0]
    rows, columns = np.triu_indices(size)
    pair_of = np.zeros((size, size), np.int32)
    pair_of[rows, columns] = pair_of[columns, rows] = np.arange(rows.size)

    def pair_sums(design_chunk: jax.Array, coefficient_chunk: jax.Array) -> jax.Array:
        design_rows, coefficient_rows = design_chunk.T, coefficient_chunk.T
        return (design_rows[rows] * design_rows[columns]) @ coefficient_rows.T

    sums = streamed_sum(pair_sums, design.T, coefficients.T, chunk_size=CHUNK_SIZE)
    return sums[pair_of].transpose(2, 0, 1)


def block_matrix(blocks: jax.Array, size: int) -> jax.Array:
    """(B D, B D) symmetric matrix from the (B (B + 1) / 2, D, D) blocks of its upper triangle."""
    count = int((np.sqrt(8 * blocks.shape[0] + 1) - 1) / 2)
    rows, columns = np.triu_indices(count)
    pair_of = np.zeros((count, count), np.int32)
    pair_of[rows, columns] = pair_of[columns, rows] = np.arange(rows.size)
    return blocks[pair_of].transpose(0, 2, 1, 3).reshape(count * size, count * size)


def gate_log_probabilities(gates: jax.Array, design: jax.Array) -> jax.Array:
    """(k, n): log P_i(x_j), from the (k - 1, D) free gates; the last gate is zero."""
    logits = gates @ design
    return jax.nn.log_softmax(jnp.concatenate([logits, jnp.zeros_like(design[:1])]), axis=0)


def log_normal(squared_residual: jax.Array, noise_std: jax.Array) -> jax.Array:
    """(k, n): log N(residual; 0, sigma_i^2) from squared residuals (k, n) and noise_std (k,)."""
    scaled = squared_residual * (0.5 / noise_std**2)[:, None]
    return -scaled - (jnp.log(noise_std) + 0.5 * LOG_TWO_PI)[:, None]


class GatingTarget(NamedTuple):
    """What the M-step of the gates is given, apart from the responsibilities."""

    design: jax.Array
    """(D, n)"""
    weights: jax.Array
    """(n,)"""
    ridge: jax.Array
    """() coefficient of sum_i ||w_i - mean w||^2 / 2."""
    bound_inverse: jax.Array
    """((k-1) D, (k-1) D) inverse of Boehning's bound on the Hessian."""


def gating_target(design: jax.Array, weights: jax.Array, num_experts: int, ridge: float) -> GatingTarget:
    """Set up the M-step of the gates; `ridge` is relative to the total weight."""
    total_ridge = ridge * weights.sum()
    gram = weighted_gram(design, weights[None])[0]
    eye = jnp.eye(gram.shape[0], dtype=design.dtype)
    # Boehning's bound, (I - 11'/k) / 2 (x) gram, has the same first factor as the ridge
    hessian = jnp.kron(gate_centring(num_experts, design.dtype), 0.5 * gram + total_ridge * eye)
    return GatingTarget(design, weights, total_ridge, jnp.linalg.inv(hessian))


def gate_centring(num_experts: int, dtype: jnp.dtype) -> jax.Array:
    """(k - 1, k - 1): I - 11'/k; the quadratic form of the free gates that is sum_i ||w_i - mean w||^2."""
    return jnp.asarray(np.eye(num_experts - 1) - 1.0 / num_experts, dtype)


def gate_penalty(gates: jax.Array) -> jax.Array:
    """(): sum_i ||w_i - mean w||^2 / 2 of the (k - 1, D) free gates and the last, which is zero."""
    return 0.5 * jnp.sum(gates * (gate_centring(gates.shape[0] + 1, gates.dtype) @ gates))


def gating_m_step(
    gates: jax.Array, log_gate: jax.Array, responsibilities: jax.Array, target: GatingTarget
) -> tuple[jax.Array, jax.Array]:
    """One M-step of the gates that never lowers their objective.

    Args:
        gates: (k - 1, D) now.
        log_gate: (k, n) of `gates`.
        responsibilities: (k, n).
        target: of `gating_target`.

    Returns:
        The new gates (k - 1, D), and their (k, n) log-probabilities.
    """
    free, size = gates.shape
    if free == 0:
        return gates, log_gate
    probabilities = jnp.exp(log_gate)[:free]
    residual = target.weights[None] * (responsibilities[:free] - probabilities)
    centring = gate_centring(free + 1, gates.dtype)
    gradient = (residual @ target.design.T - target.ridge * (centring @ gates)).reshape(-1)
    rows, columns = np.triu_indices(free)
    on_diagonal = jnp.asarray(rows == columns, gates.dtype)[:, None]
    pairs = probabilities[rows] * (on_diagonal - probabilities[columns])
    hessian = block_matrix(weighted_gram(target.design, target.weights[None] * pairs), size)
    hessian = hessian + target.ridge * jnp.kron(centring, jnp.eye(size, dtype=gates.dtype))
    newton = gates + jax.scipy.linalg.solve(hessian, gradient, assume_a="pos").reshape(free, size)

    def objective(gates: jax.Array, log_gate: jax.Array) -> jax.Array:
        fit = jnp.sum(responsibilities * log_gate, axis=0) @ target.weights
        return fit - target.ridge * gate_penalty(gates)

    def bounded() -> tuple[jax.Array, jax.Array]:
        new = gates + (target.bound_inverse @ gradient).reshape(free, size)
        return new, gate_log_probabilities(new, target.design)

    newton_log_gate = gate_log_probabilities(newton, target.design)
    good = objective(newton, newton_log_gate) >= objective(
        gates, log_gate
    )  # False where Newton is not finite
    return jax.lax.cond(good, lambda: (newton, newton_log_gate), bounded)


def noise_m_step(
    noise_std: jax.Array,
    posterior: jax.Array,
    squared_residual: jax.Array,
    weights: jax.Array,
    noise: NoiseModel,
) -> jax.Array:
    """(k,): the noise that maximises the expected log-likelihood; `noise_std` itself where it is known."""
    if noise == "known":
        return noise_std
    weighted = posterior * weights[None]
    sums, counts = jnp.sum(weighted * squared_residual, axis=1), jnp.sum(weighted, axis=1)
    if noise == "shared":
        sums, counts = jnp.full_like(sums, sums.sum()), jnp.full_like(counts, counts.sum())
    tiny = jnp.finfo(sums.dtype).tiny
    return jnp.sqrt(jnp.maximum(sums / jnp.maximum(counts, tiny), tiny))


def frozen_scan(
    step: Callable[[Any], tuple[Any, jax.Array]], state: Any, num_steps: int, tolerance: jax.Array
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Scan `step` for a fixed budget; a lane whose objective gains less than `tolerance` freezes.

    Args:
        step: state -> (new state, objective at the old state).
        state: to start from.
        num_steps: budget.
        tolerance: () least gain that goes on.

    Returns:
        The last state; (num_steps,) objectives before each step, NaN once frozen; () int32 steps made; () bool converged.
    """

    def body(carry, _):
        state, objective, done, count = carry

        def advance(state):
            new_state, new_objective = step(state)
            return new_state, new_objective, new_objective - objective < tolerance

        frozen = done
        state, objective, done = jax.lax.cond(frozen, lambda s: (s, objective, True), advance, state)
        made = jnp.where(frozen, 0, 1).astype(jnp.int32)
        return (state, objective, done, count + made), jnp.where(frozen, jnp.nan, objective)

    start = (state, jnp.asarray(-jnp.inf, tolerance.dtype), jnp.asarray(False), jnp.asarray(0, jnp.int32))
    (state, _, done, count), history = jax.lax.scan(body, start, length=num_steps)
    return state, history, count, done


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
    ridge: float = RIDGE,
    tolerance: float = 1e-8,
) -> EMRun:
    """EM for the gates with the experts fixed, from the gates in `params` (start at zero).

    Args:
        params: experts (k, d) that stay, gates to start from, noise_std.
        x: (n, d).
        y: (n,).
        weights: (n,) sample weights.
        fn: the activation g.
        num_steps: budget of EM steps.
        fit_intercept: whether gates have biases.
        noise: "known" leaves noise_std; else it is updated in closed form too, which absorbs the experts' error.
        ridge: on the gates, relative to the sample size; part of the objective that never decreases.
        tolerance: least gain, in nats per sample, that goes on.
    """
    dim = x.shape[1]
    design = with_intercept(x, fit_intercept)
    target = gating_target(design, weights, params.experts.shape[0], ridge)
    means = apply_activation(fn, params.experts @ x.T + params.expert_bias[:, None])
    squared_residual = (y[None] - means) ** 2

    def step(state):
        gates, log_gate, noise_std = state
        joint = log_gate + log_normal(squared_residual, noise_std)
        log_evidence = jax.nn.logsumexp(joint, axis=0)
        posterior = jnp.exp(joint - log_evidence[None])
        objective = log_evidence @ weights - target.ridge * gate_penalty(gates)
        gates, log_gate = gating_m_step(gates, log_gate, posterior, target)
        return (
            gates,
            log_gate,
            noise_m_step(noise_std, posterior, squared_residual, weights, noise),
        ), objective

    gates = join_intercept(params.gating, params.gating_bias, fit_intercept)[:-1]
    start = (gates, gate_log_probabilities(gates, design), params.noise_std)
    (gates, log_gate, noise_std), history, count, done = frozen_scan(
        step, start, num_steps, tolerance * weights.sum()
    )
    final = jax.nn.logsumexp(log_gate + log_normal(squared_residual, noise_std), axis=0) @ weights
    gating, gating_bias = split_intercept(with_last_gate(gates), dim)
    fitted = params._replace(gating=gating, gating_bias=gating_bias, noise_std=noise_std)
    return EMRun(fitted, final, history, count, done)


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
    ridge: float = RIDGE,
    tolerance: float = 1e-8,
) -> EMRun:
    """EM for experts, gates and noise together (Jordan and Jacobs 1994), from `params`.

    The experts' M-step is a Gauss-Newton step on their weighted squared error, shortened until that does not rise;
    for a linear g it is the closed-form weighted least squares. Arguments as in `gating_em`.
    """
    dim = x.shape[1]
    design = with_intercept(x, fit_intercept)
    target = gating_target(design, weights, params.experts.shape[0], ridge)

    def step(state):
        experts, gates, noise_std = state
        means, slopes = activation_and_slope(fn, experts @ design)
        residual = y[None] - means
        log_gate = gate_log_probabilities(gates, design)
        joint = log_gate + log_normal(residual**2, noise_std)
        log_evidence = jax.nn.logsumexp(joint, axis=0)
        objective = log_evidence @ weights - target.ridge * gate_penalty(gates)
        posterior = jnp.exp(joint - log_evidence[None])
        new_gates, _ = gating_m_step(gates, log_gate, posterior, target)
        new_experts, squared_residual = expert_m_step(
            experts, residual, slopes, posterior * weights[None], design, y, fn
        )
        return (
            new_experts,
            new_gates,
            noise_m_step(noise_std, posterior, squared_residual, weights, noise),
        ), objective

    experts = join_intercept(params.experts, params.expert_bias, fit_intercept)
    gates = join_intercept(params.gating, params.gating_bias, fit_intercept)[:-1]
    start = (experts, gates, params.noise_std)
    (experts, gates, noise_std), history, count, done = frozen_scan(
        step, start, num_steps, tolerance * weights.sum()
    )
    means = apply_activation(fn, experts @ design)
    joint = gate_log_probabilities(gates, design) + log_normal((y[None] - means) ** 2, noise_std)
    gating, gating_bias = split_intercept(with_last_gate(gates), dim)
    expert_rows, expert_bias = split_intercept(experts, dim)
    fitted = MoEParams(expert_rows, gating, noise_std, expert_bias, gating_bias)
    return EMRun(fitted, jax.nn.logsumexp(joint, axis=0) @ weights, history, count, done)


def expert_m_step(
    experts: jax.Array,
    residual: jax.Array,
    slopes: jax.Array,
    weights: jax.Array,
    design: jax.Array,
    y: jax.Array,
    fn: ScalarFunction,
) -> tuple[jax.Array, jax.Array]:
    """A Gauss-Newton step on each expert's weighted squared error that never raises it.

    Args:
        experts: (k, D) now; residual and slopes (k, n): y - g and g' there.
        weights: (k, n) responsibilities times sample weights.
        design: (D, n); y (n,).

    Returns:
        The new experts (k, D), and their squared residuals (k, n).
    """
    gradient = (weights * slopes * residual) @ design.T
    gram = weighted_gram(design, weights * slopes**2)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / design.shape[0]
    # the least of ridges, for an expert that few samples or only flat parts of g support
    floor = (
        10 * jnp.finfo(gram.dtype).eps * jnp.maximum(trace, jnp.finfo(gram.dtype).tiny)
        + jnp.finfo(gram.dtype).tiny
    )
    direction = jnp.linalg.solve(
        gram + floor * jnp.eye(design.shape[0], dtype=gram.dtype)[None], gradient[:, :, None]
    )[:, :, 0]
    direction = jnp.where(jnp.isfinite(direction), direction, 0.0)

    def squared_residuals(step_sizes: jax.Array) -> jax.Array:
        return (y[None] - apply_activation(fn, (experts + step_sizes[:, None] * direction) @ design)) ** 2

    def shorten(_: int, carry):
        step_sizes, _, best = carry
        trial = jnp.where(best, step_sizes, step_sizes * 0.25)
        new_squares = squared_residuals(trial)
        return trial, new_squares, best | (jnp.sum(weights * new_squares, axis=1) <= now)

    now = jnp.sum(weights * residual**2, axis=1)
    ones = jnp.ones(experts.shape[0], experts.dtype)
    squares = squared_residuals(ones)
    accepted = jnp.sum(weights * squares, axis=1) <= now
    step_sizes, squares, accepted = jax.lax.cond(
        accepted.all(), lambda c: c, lambda c: jax.lax.fori_loop(0, 4, shorten, c), (ones, squares, accepted)
    )
    new = experts + jnp.where(accepted, step_sizes, 0.0)[:, None] * direction
    return new, jnp.where(accepted[:, None], squares, residual**2)


def with_last_gate(gates: jax.Array) -> jax.Array:
    """(k, D) from the (k - 1, D) free gates: the last gate is zero."""
    return jnp.concatenate([gates, jnp.zeros((1, gates.shape[1]), gates.dtype)])
