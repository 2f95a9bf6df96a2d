r"""Gradient descent on the likelihood and on the squared error, tuned as carefully as its advocates would tune it.

The baselines (these, `joint_em` and `gated_loss`) start from the same rule (experts uniform on the unit sphere, zero gates), keep
the best of `num_starts` runs by their own objective, and count every pass over the data of all their runs, pilots and
moments.

The gradient methods are Adam (optax) on minibatches with a cosine decay; the learning rate is the one of a
geometric grid that is best on a short pilot. If g is homogeneous they run in units in which the labels have the spread of g, so
that the user's units do not matter.

All end with status "ok" if they are at a stationary point of their own objective; otherwise the status is that the budget ended
first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.likelihood.blocks import SampleBlocks, sample_blocks, sum_over_blocks
from moejax.likelihood.collapse import noise_floor
from moejax.likelihood.em import expectation
from moejax.likelihood.m_step import Point, noise_m_step
from moejax.likelihood.predictors import free_parameters, gate_penalty, params_from_free, predictors_of
from moejax.methods.method import (
    MethodConfig,
    MethodResult,
    Problem,
    finish,
    least_noise_of,
    noise_while_inexact,
    with_path,
)
from moejax.methods.starts import (
    index_of_best,
    label_mean,
    label_spread,
    number_of_starts,
    random_starts,
    start_noise,
)
from moejax.methods.stationarity import is_stationary, likelihood_is_stationary, squared_error_curvature
from moejax.model.family import Channel, channel_facts, is_gaussian
from moejax.model.mixture import MoEParams, NoiseModel, log_likelihood_per_sample, predict


def _known_noise(params: MoEParams, problem: Problem, config: MethodConfig) -> MoEParams:
    """The parameters with the given noise if it is known."""
    if config.noise != "known":
        return params
    return params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))


# Gradient descent

Loss = Callable[[MoEParams, Float[jax.Array, "n d"], Float[jax.Array, " n"]], Float[jax.Array, " n"]]
"""(params, x (n, d), y (n,)) -> (n,) loss of each sample."""

MINIBATCH = 256
LEARNING_RATES = np.geomspace(1e-3, 1e-1, 5)
PILOT_PASSES = 4
"""The pilot runs each learning rate, from the first start, through a whole cosine schedule of that many passes."""
NOISE_FREE = 0.75
"""Share of the passes during which even a known noise is estimated: at a small known noise the likelihood of a poor start
is steep and rough."""


class Descent(NamedTuple):
    """The end of s runs of gradient descent side by side."""

    free: Float[jax.Array, "s P"]
    """(s, P) free parameters."""
    loss: Float[jax.Array, " s"]
    """(s,) mean loss of a sample over the last pass."""
    path: Float[jax.Array, "num_passes s P"]
    """(num_passes, s, P) free parameters after every pass."""


def _minibatches(key: jax.Array, problem: Problem, batch_size: int) -> SampleBlocks:
    """The sample in a random order, in blocks; samples without weight come last and cost nothing."""
    draws = jax.random.uniform(key, problem.y.shape, problem.y.dtype)
    order = jnp.argsort(jnp.where(problem.weights > 0, draws, 2.0))
    shuffled = (problem.x[order], problem.y[order], problem.weights[order])
    return sample_blocks(*shuffled, fit_intercept=False, block_size=batch_size)


def descend(
    key: jax.Array,
    free: Float[jax.Array, "s P"],
    rates: Float[jax.Array, " s"],
    batches: SampleBlocks,
    *,
    objective: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    constrain: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    num_passes: int,
) -> Descent:
    """Adam with a cosine decay of the learning rate, on the minibatches in a new random order every pass.

    Args:
        key: PRNG key of the orders.
        free: (s, P) starts.
        rates: (s,) initial learning rate of each start.
        batches: minibatches.
        objective: (free (P,), design (D, B), y (B,), weights (B,)) -> () estimate of the mean loss of a sample.
        constrain: (free (P,), () share of the passes made) -> start of the next pass, and 1 for the entries (P,) that may move.
        num_passes: passes over the data.
    """
    import optax

    optimiser, decay = optax.scale_by_adam(), optax.cosine_decay_schedule(1.0, num_passes)
    num_blocks = batches.y.shape[0]
    used = jnp.arange(num_blocks, dtype=jnp.int32) < batches.num_used
    gradients = jax.vmap(jax.value_and_grad(objective), in_axes=(0, None, None, None))

    def one_pass(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]):
        (free, state), (key, number) = carry, inputs
        order = jnp.argsort(jnp.where(used, jax.random.uniform(key, (num_blocks,)), 2.0))
        free, movable = jax.vmap(lambda row: constrain(row, number / num_passes))(free)

        def one_batch(index: jax.Array, carry: tuple[jax.Array, Any, jax.Array]):
            free, state, total = carry
            block = order[index]
            batch = (batches.design[block], batches.y[block], batches.weights[block])
            loss, gradient = gradients(free, *batch)
            fraction = index.astype(free.dtype) / batches.num_used.astype(free.dtype)
            with jax.numpy_dtype_promotion("standard"):  # optax combines its integer counts with floats
                updates, state = optimiser.update(gradient * movable, state)
                rate = (rates * jnp.asarray(decay(number + fraction), free.dtype))[:, None]
            assert isinstance(updates, jax.Array)  # a tree of one leaf, as the gradient is
            return free - rate * updates * movable, state, total + loss

        total = jnp.zeros(free.shape[0], free.dtype)
        free, state, total = jax.lax.fori_loop(0, batches.num_used, one_batch, (free, state, total))
        return (free, state), (free, total / batches.num_used.astype(free.dtype))

    numbers = jnp.arange(num_passes, dtype=free.dtype)
    start = (free, optimiser.init(free))
    (free, _), (path, losses) = jax.lax.scan(one_pass, start, (jax.random.split(key, num_passes), numbers))
    return Descent(free, losses[-1], path)


class GradientFit(NamedTuple):
    """The best run of gradient descent."""

    params: MoEParams
    ends: MoEParams
    """Leaves (s, ..): the ends of all runs."""
    path: MoEParams
    """Leaves (num_passes, ..): parameters after every pass."""
    loss: Float[jax.Array, ""]
    """() mean loss of a sample over its last pass."""
    rate: Float[jax.Array, ""]
    """() learning rate that the pilot chose."""
    num_passes: int
    """Passes over the data of the pilot and of all runs."""


def gradient_descent(
    key: jax.Array,
    starts: MoEParams,
    problem: Problem,
    config: MethodConfig,
    *,
    loss: Loss,
    noise: NoiseModel,
    experts_free: bool = True,
    batch_size: int | None = MINIBATCH,
    rates: Float[np.ndarray, " num_rates"] = LEARNING_RATES,
) -> GradientFit:
    """Minimise a loss of the mixture over experts, gates and noise from several starts; the best result is kept.

    Args:
        key: PRNG key of the minibatches.
        starts: leaves (s, ..).
        problem: the sample.
        config: options of the method; `max_iterations` passes for each start.
        loss: loss of each sample.
        noise: which noise parameters are free ("known": none). A noise that the problem knows is held fixed after NOISE_FREE of
            the passes.
        experts_free: if false, only the gates and the noise move.
        batch_size: None for the whole sample.
        rates: learning rates that the pilot compares; a single one needs no pilot.
    """
    order_key, pilot_key, run_key = jax.random.split(key, 3)
    n, k, d = problem.x.shape[0], config.num_experts, problem.x.shape[1]
    batches = _minibatches(order_key, problem, n if batch_size is None else min(batch_size, n))
    total = problem.weights.sum()
    mean_weight = total / batches.num_used.astype(problem.x.dtype)
    like = jax.tree.map(lambda leaf: leaf[0], starts)
    least_noise = least_noise_of(problem, config) if noise == "per_expert" else None

    def pack(params: MoEParams) -> jax.Array:
        return free_parameters(params, noise=noise, fit_intercept=config.fit_intercept)

    def unpack(free: jax.Array) -> MoEParams:
        return params_from_free(free, like, noise=noise, fit_intercept=config.fit_intercept)

    def objective(free: jax.Array, design: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        params = unpack(free)
        gates = predictors_of(params, fit_intercept=config.fit_intercept).rows[k:]
        of_sample = loss(params, design.T, y)
        return of_sample @ weights / mean_weight + config.ridge / total * gate_penalty(gates)

    free = jax.vmap(pack)(starts)
    num_predictor = (2 * k - 1) * (d + int(config.fit_intercept))
    position = jnp.arange(free.shape[1])
    is_noise = position >= num_predictor
    is_expert = position < k * (d + int(config.fit_intercept))

    def constrain(free: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        hold = is_noise & (share >= NOISE_FREE) if config.noise == "known" else jnp.zeros_like(is_noise)
        free = jnp.where(hold, jnp.log(problem.noise_std), free)
        if least_noise is not None:
            free = free.at[-k:].max(jnp.log(noise_floor(jnp.exp(free[-k:]), least_noise, total)))
        held = hold if experts_free else hold | is_expert
        return free, (~held).astype(free.dtype)

    def run(key: jax.Array, free: jax.Array, rates: jax.Array, num_passes: int) -> Descent:
        return descend(
            key, free, rates, batches, objective=objective, constrain=constrain, num_passes=num_passes
        )

    grid = jnp.asarray(rates, free.dtype)
    rate, pilot_passes = grid[0], 0
    if len(rates) > 1:
        pilot = run(pilot_key, jnp.tile(free[:1], (len(rates), 1)), grid, PILOT_PASSES)
        rate, pilot_passes = grid[index_of_best(-pilot.loss)], len(rates) * PILOT_PASSES
    runs = run(run_key, free, jnp.full(free.shape[0], rate), config.max_iterations)
    best = index_of_best(-runs.loss)
    return GradientFit(
        params=unpack(runs.free[best]),
        ends=jax.vmap(unpack)(runs.free),
        path=jax.vmap(unpack)(runs.path[:, best]),
        loss=runs.loss[best],
        rate=rate,
        num_passes=pilot_passes + free.shape[0] * config.max_iterations,
    )


def negative_log_likelihood(fn: Channel) -> Loss:
    """-log p(y | x) of each sample, in nats."""
    return lambda params, x, y: -log_likelihood_per_sample(params, x, y, fn)


def squared_error(fn: Channel) -> Loss:
    """(y - sum_i P_i(x) g(a_i . x + b_i))^2 of each sample, in squared units of y."""
    return lambda params, x, y: (y - predict(params, x, fn)) ** 2


def _history(path: MoEParams, problem: Problem, config: MethodConfig) -> Float[jax.Array, " h"]:
    """(h,) log-likelihood along a path. No method uses it, so it does not count as passes, and is computed only on request."""
    blocks = sample_blocks(problem.x, problem.y, problem.weights, fit_intercept=False)

    def value(params: MoEParams) -> jax.Array:
        return sum_over_blocks(
            lambda design, y, weights: log_likelihood_per_sample(params, design.T, y, config.fn) @ weights,
            blocks,
        )

    return jax.lax.map(value, path)


def standard_labels(problem: Problem, config: MethodConfig) -> tuple[Problem, Float[jax.Array, ""]]:
    """The problem with labels and noise divided by a unit (), and the unit: unit-norm experts then explain the labels' spread.

    The experts of a homogeneous g, such as the linear one, absorb any unit; for any other g the unit is 1.
    """
    facts = channel_facts(config.fn)
    if not (facts.homogeneous and is_gaussian(config.fn)):
        return problem, jnp.ones((), problem.y.dtype)
    spread = label_spread(problem)
    unit = jnp.where(spread > 0, spread / facts.standard_deviation, 1.0)
    least = None if problem.least_noise is None else problem.least_noise / unit
    return problem._replace(y=problem.y / unit, noise_std=problem.noise_std / unit, least_noise=least), unit


def descent_starts(key: jax.Array, standard: Problem, config: MethodConfig, num_starts: int) -> MoEParams:
    """`random_starts` with the labels' standard deviation as noise and, for a homogeneous g with biases, their mean as bias."""
    starts = random_starts(key, standard, config, num_starts, start_noise(standard, config))
    homogeneous = channel_facts(config.fn).homogeneous and is_gaussian(config.fn)
    if not (config.fit_intercept and homogeneous):
        return starts
    return starts._replace(expert_bias=starts.expert_bias + label_mean(standard))


def in_label_units(params: MoEParams, unit: Float[jax.Array, ""]) -> MoEParams:
    """Parameters for labels y from those for labels y / unit."""
    return params._replace(
        experts=unit * params.experts,
        expert_bias=unit * params.expert_bias,
        noise_std=unit * params.noise_std,
    )


def gradient_nll(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Adam on the negative log-likelihood, over experts, gates and noise; the best of `num_starts` starts.

    The noise starts at the labels' standard deviation; a known noise is restored for the last quarter of the passes. The
    status is ok if the likelihood is stationary where it ends.
    """
    start_key, fit_key = jax.random.split(key)
    standard, unit = standard_labels(problem, config)
    starts = descent_starts(start_key, standard, config, number_of_starts(config))
    noise = noise_while_inexact(config)
    loss = negative_log_likelihood(config.fn)
    fitted = gradient_descent(fit_key, starts, standard, config, loss=loss, noise=noise)
    converged = likelihood_is_stationary(fitted.params, standard, config)
    return gradient_result(fitted, converged, unit, problem, config)


NOISE_PASSES = 5


def gradient_mse(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Adam on the squared error of the mixture's mean prediction, over experts and gates; the best of `num_starts` starts.

    The squared error does not depend on the noise: if the noise is unknown, a few EM steps that update only the noise follow. The
    status is ok if the squared error is stationary at the end; that point is no maximum of the likelihood.
    """
    start_key, fit_key = jax.random.split(key)
    standard, unit = standard_labels(problem, config)
    starts = descent_starts(start_key, standard, config, number_of_starts(config))
    if config.noise == "known":
        starts = starts._replace(noise_std=jnp.full_like(starts.noise_std, standard.noise_std))
    fitted = gradient_descent(fit_key, starts, standard, config, loss=squared_error(config.fn), noise="known")
    converged = is_stationary(squared_error_curvature(fitted.params, standard, config), problem.weights)
    if config.noise == "known":
        return gradient_result(fitted, converged, unit, problem, config)
    residual = jnp.sqrt(fitted.loss)
    path = fitted.path._replace(noise_std=jnp.full_like(fitted.path.noise_std, residual))
    params = fitted.params._replace(noise_std=jnp.full_like(fitted.params.noise_std, residual))
    blocks = sample_blocks(standard.x, standard.y, standard.weights, fit_intercept=config.fit_intercept)
    predictors = predictors_of(params, fit_intercept=config.fit_intercept)

    def step(noise_std: jax.Array, _: None):
        sums = expectation(Point(predictors, noise_std), blocks, fn=config.fn, experts_free=False)
        least_noise = least_noise_of(standard, config)
        return noise_m_step(noise_std, sums.counts, sums.dispersion[0], config.noise, least_noise), None

    noise_std, _ = jax.lax.scan(step, params.noise_std, length=NOISE_PASSES)
    path = path._replace(noise_std=path.noise_std.at[-1].set(noise_std))
    fitted = fitted._replace(
        params=params._replace(noise_std=noise_std), path=path, num_passes=fitted.num_passes + NOISE_PASSES
    )
    return gradient_result(fitted, converged, unit, problem, config)


def gradient_result(
    fitted: GradientFit, converged: jax.Array, unit: jax.Array, problem: Problem, config: MethodConfig
) -> MethodResult:
    """The result in the labels' own unit, from a fit to labels divided by `unit`.

    The test of convergence changes no parameter and, like the history, does not count as a pass over the data.
    """
    params, path = in_label_units(fitted.params, unit), in_label_units(fitted.path, unit)
    passes = jnp.asarray(fitted.num_passes, jnp.int32)
    result = finish(params, _history(path, problem, config), passes, converged, problem, None)
    return with_path(result, config, path)


LOSS_GRADIENT = 1e-3
"""Norm of the gradient, in units of the penalty, below which the loss counts as stationary. The coordinates and the curvature are
of order one, so this is also the error of the coordinates."""
