r"""The baselines, as good as their authors would make them: joint EM, gradient descent, and the gated losses.

All start from the same rule (experts uniform on the unit sphere, zero gates), keep the best of `num_starts` runs by their own
objective, and count every pass over the data that any of their runs, pilots and moments made.

The gradient methods are Adam (optax) on minibatches with a cosine decay; the learning rate is the best, on a short pilot, of a
geometric grid. Where g is homogeneous they run in units in which the labels have the spread of g, so that the user's units do not
matter. The gated losses (Makkuva, Oh, Kannan, Viswanath 2020, "Learning in gated neural networks") find the experts from order-4
moments by gradient descent on a loss whose minimisers are the scaled dual basis, then the gates from the likelihood.

All end "ok" if they are at a stationary point of their own objective, and otherwise say that their budget ended first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.activations import ScalarFunction, activation_and_slope, activation_facts
from moejax.design import (
    SampleBlocks,
    gate_penalty,
    predictors_of,
    sample_blocks,
    sum_over_blocks,
    weighted_gram,
)
from moejax.em import EMRun, NoiseModel, Point, expectation, joint_em, noise_m_step
from moejax.gaussian import standard_normal
from moejax.methods import (
    MOMENT_PASSES,
    MethodConfig,
    MethodResult,
    Problem,
    finish,
    label_mean,
    label_spread,
    random_starts,
    register_method,
    with_path,
    zero_gates,
)
from moejax.model import MoEParams, log_likelihood_per_sample, predict, unit_rows
from moejax.moments import first_moment, second_moment, whitened_moment
from moejax.polish import free_parameters, params_from_free
from moejax.small_linear_algebra import eigh, pseudo_inverse, solve_positive_definite
from moejax.spectral import NOT_FINITE, RANK_DEFICIENT
from moejax.stationarity import (
    is_stationary,
    likelihood_is_stationary,
    squared_error_curvature,
)


def _num_starts(config: MethodConfig) -> int:
    return 1 if config.num_starts is None else config.num_starts


def _known_noise(params: MoEParams, problem: Problem, config: MethodConfig) -> MoEParams:
    """The parameters with the given noise, where it is known."""
    if config.noise != "known":
        return params
    return params._replace(noise_std=jnp.full_like(params.noise_std, problem.noise_std))


# Joint EM

CLUSTERWISE_PASSES = 10
CLUSTERWISE_DAMPING = 1e-2
"""Relative to the Gram matrix of a cluster of the mean size, were g linear."""


def clusterwise_regression(
    experts: jax.Array,
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    num_steps: int = CLUSTERWISE_PASSES,
) -> tuple[jax.Array, jax.Array]:
    """k-means with regressions for centres (Spaeth 1979): each sample goes to the expert that predicts it best.

    min over assignments z and experts a of sum_j weights_j (y_j - g(a_{z_j} . x_j))^2, by turns: the assignment exactly, each
    expert by one Gauss-Newton step, slightly damped, on its own samples (least squares for a linear g).

    Args:
        experts: (k, d) to start from.
        x: (n, d); y: (n,); weights: (n,) sample weights.
        fn: g.
        num_steps: passes over the data.

    Returns:
        experts (k, d) with the least loss met, and its root mean square residual ().
    """
    k, dim = experts.shape
    blocks = sample_blocks(x, y, weights, fit_intercept=False)
    total = weights.sum()
    floor = CLUSTERWISE_DAMPING * total / k * jnp.eye(dim, dtype=x.dtype)

    def step(state: tuple[jax.Array, jax.Array, jax.Array], _: None):
        experts, best, least = state

        def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array):
            mean, slope = activation_and_slope(fn, experts @ design)
            error = y[None] - mean
            nearest = jnp.argmin(error**2, axis=0)
            mine = weights[None] * (nearest[None] == jnp.arange(k)[:, None]).astype(y.dtype)
            gradient = (mine * slope * error) @ design.T
            return jnp.sum(mine * error**2), gradient, weighted_gram(design, mine * slope**2)

        loss, gradient, gram = sum_over_blocks(sums_of, blocks)
        improved = loss < least  # False where it is not finite
        best, least = jnp.where(improved, experts, best), jnp.where(improved, loss, least)
        moved = experts + solve_positive_definite(gram + floor[None], gradient)
        return (jnp.where(jnp.isfinite(moved), moved, experts), best, least), None

    start = (experts, experts, jnp.asarray(jnp.inf, x.dtype))
    (_, best, least), _ = jax.lax.scan(step, start, length=num_steps)
    return best, jnp.sqrt(least / total)


def joint_em_starts(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Joint EM (Jordan and Jacobs 1994) from `num_starts` starts, the one with the highest likelihood kept.

    Each starts at unit-sphere experts, or with `start` "kmeans" where clusterwise regression leads from there, and zero gates;
    `max_iterations` EM steps each, no polish. The noise starts at the labels' standard deviation ("kmeans": at the residuals')
    and is estimated along the way; where it is known, it is restored for the second half of the steps.
    """
    spread = label_spread(problem)
    data = (problem.x, problem.y, problem.weights)
    common = {
        "fn": config.fn,
        "fit_intercept": config.fit_intercept,
        "ridge": config.ridge,
        "record_path": config.record_path,
    }

    def run(start: MoEParams) -> EMRun:
        if config.start == "kmeans":
            experts, residual = clusterwise_regression(start.experts, *data, fn=config.fn)
            start = zero_gates(experts, jnp.where(jnp.isfinite(residual), residual, spread))
        if config.noise != "known":
            return joint_em(start, *data, num_steps=config.max_iterations, noise=config.noise, **common)

        def stage(params: MoEParams, noise_known: jax.Array):
            known = jnp.broadcast_to(problem.noise_std, params.noise_std.shape)
            params = params._replace(noise_std=jnp.where(noise_known, known, params.noise_std))
            budget = max(config.max_iterations // 2, 1)
            run = joint_em(params, *data, num_steps=budget, noise="shared", hold_noise=noise_known, **common)
            return run.params, run

        _, runs = jax.lax.scan(stage, start, jnp.asarray([False, True]))
        last = jax.tree.map(lambda leaf: leaf[-1], runs)
        path = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), runs.path)
        return last._replace(history=runs.history.reshape(-1), num_steps=runs.num_steps.sum(), path=path)

    runs = jax.lax.map(run, random_starts(key, problem, config, _num_starts(config), spread))
    kept = jax.tree.map(lambda leaf: leaf[_best(runs.log_likelihood)], runs)
    passes = runs.num_steps.sum(dtype=jnp.int32)
    if config.start == "kmeans":
        passes = passes + CLUSTERWISE_PASSES * _num_starts(config)
    result = finish(kept.params, kept.history, passes, kept.converged, problem, None)
    return with_path(result, config, kept.path)


def _best(values: jax.Array) -> jax.Array:
    """() index of the largest finite value."""
    return jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))


# Gradient descent

Loss = Callable[[MoEParams, jax.Array, jax.Array], jax.Array]
"""(params, x (n, d), y (n,)) -> (n,) loss of each sample."""

MINIBATCH = 256
LEARNING_RATES = np.geomspace(1e-3, 1e-1, 5)
PILOT_PASSES = 4
"""The pilot runs each learning rate, from the first start, through a whole cosine schedule of that many passes."""
NOISE_FREE = 0.75
"""Share of the passes during which a known noise is estimated all the same: at a small known noise the likelihood of a poor start
is steep and rough."""


class Descent(NamedTuple):
    """Where runs of gradient descent, s of them side by side, ended."""

    free: jax.Array
    """(s, P) free parameters."""
    loss: jax.Array
    """(s,) mean loss of a sample over the last pass."""
    path: jax.Array
    """(num_passes, s, P) free parameters after every pass."""


def _minibatches(key: jax.Array, problem: Problem, batch_size: int) -> SampleBlocks:
    """The sample in a random order, in blocks; samples without weight come last and cost nothing."""
    draws = jax.random.uniform(key, problem.y.shape, problem.y.dtype)
    order = jnp.argsort(jnp.where(problem.weights > 0, draws, 2.0))
    shuffled = (problem.x[order], problem.y[order], problem.weights[order])
    return sample_blocks(*shuffled, fit_intercept=False, block_size=batch_size)


def descend(
    key: jax.Array,
    free: jax.Array,
    rates: jax.Array,
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
        rates: (s,) initial learning rate of each.
        batches: minibatches.
        objective: (free (P,), design (D, B), y (B,), weights (B,)) -> () estimate of the mean loss of a sample.
        constrain: (free (P,), () share of the passes made) -> where a pass starts, and 1 for the entries (P,) that may move.
        num_passes: over the data.
    """
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
            with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
                updates, state = optimiser.update(gradient * movable, state)
                rate = (rates * decay(number + fraction).astype(free.dtype))[:, None]
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
    path: MoEParams
    """Leaves (num_passes, ..): after every pass."""
    loss: jax.Array
    """() mean loss of a sample over its last pass."""
    rate: jax.Array
    """() learning rate that the pilot chose."""
    num_passes: int
    """Of the pilot and of all runs."""


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
    rates: np.ndarray = LEARNING_RATES,
) -> GradientFit:
    """A loss of the mixture minimised over experts, gates and noise from several starts, the best of which is kept.

    Args:
        key: PRNG key of the minibatches.
        starts: leaves (s, ..).
        problem: the sample.
        config: of the method; `max_iterations` passes for each start.
        loss: of each sample.
        noise: of the noise parameters that are free ("known": none). A noise known to the problem is held from NOISE_FREE of the
            passes on.
        experts_free: or only the gates and the noise.
        batch_size: None for the whole sample.
        rates: learning rates to choose from on the pilot; one only makes no pilot.
    """
    order_key, pilot_key, run_key = jax.random.split(key, 3)
    n, k, d = problem.x.shape[0], config.num_experts, problem.x.shape[1]
    batches = _minibatches(order_key, problem, n if batch_size is None else min(batch_size, n))
    total = problem.weights.sum()
    mean_weight = total / batches.num_used.astype(problem.x.dtype)
    like = jax.tree.map(lambda leaf: leaf[0], starts)

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
        rate, pilot_passes = grid[_best(-pilot.loss)], len(rates) * PILOT_PASSES
    runs = run(run_key, free, jnp.full(free.shape[0], rate), config.max_iterations)
    best = _best(-runs.loss)
    return GradientFit(
        params=unpack(runs.free[best]),
        path=jax.vmap(unpack)(runs.path[:, best]),
        loss=runs.loss[best],
        rate=rate,
        num_passes=pilot_passes + free.shape[0] * config.max_iterations,
    )


def negative_log_likelihood(fn: ScalarFunction) -> Loss:
    """-log p(y | x) of each sample, in nats."""
    return lambda params, x, y: -log_likelihood_per_sample(params, x, y, fn)


def squared_error(fn: ScalarFunction) -> Loss:
    """(y - sum_i P_i(x) g(a_i . x + b_i))^2 of each sample, in squared units of y."""
    return lambda params, x, y: (y - predict(params, x, fn)) ** 2


def _history(path: MoEParams, problem: Problem, config: MethodConfig) -> jax.Array:
    """(h,) log-likelihood along a path. No method looks at it, so it counts as no passes, and is not computed if not asked for."""
    blocks = sample_blocks(problem.x, problem.y, problem.weights, fit_intercept=False)

    def value(params: MoEParams) -> jax.Array:
        return sum_over_blocks(
            lambda design, y, weights: log_likelihood_per_sample(params, design.T, y, config.fn) @ weights,
            blocks,
        )

    return jax.lax.map(value, path)


def standard_labels(problem: Problem, config: MethodConfig) -> tuple[Problem, jax.Array]:
    """The problem with its labels and noise in a unit () in which unit-norm experts make labels of their spread, and that unit.

    A homogeneous g, such as the linear one, takes any unit up in its experts; for any other g the unit is 1.
    """
    facts = activation_facts(config.fn)
    if not facts.homogeneous:
        return problem, jnp.ones((), problem.y.dtype)
    spread = label_spread(problem)
    unit = jnp.where(spread > 0, spread / facts.standard_deviation, 1.0)
    return problem._replace(y=problem.y / unit, noise_std=problem.noise_std / unit), unit


def _descent_starts(key: jax.Array, standard: Problem, config: MethodConfig) -> MoEParams:
    """`random_starts` with the labels' standard deviation as noise and, for a homogeneous g with biases, their mean in these."""
    starts = random_starts(key, standard, config, _num_starts(config), label_spread(standard))
    if not (config.fit_intercept and activation_facts(config.fn).homogeneous):
        return starts
    return starts._replace(expert_bias=starts.expert_bias + label_mean(standard))


def _in_label_units(params: MoEParams, unit: jax.Array) -> MoEParams:
    """Parameters for labels y from those for labels y / unit."""
    return params._replace(
        experts=unit * params.experts,
        expert_bias=unit * params.expert_bias,
        noise_std=unit * params.noise_std,
    )


def gradient_nll(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Adam on the negative log-likelihood, over experts, gates and noise; the best of `num_starts` starts.

    The noise starts at the labels' standard deviation; where it is known, it is restored for the last quarter of the passes. The
    status is ok if the likelihood is stationary where it ends.
    """
    start_key, fit_key = jax.random.split(key)
    standard, unit = standard_labels(problem, config)
    starts = _descent_starts(start_key, standard, config)
    noise = "shared" if config.noise == "known" else config.noise
    loss = negative_log_likelihood(config.fn)
    fitted = gradient_descent(fit_key, starts, standard, config, loss=loss, noise=noise)
    converged = likelihood_is_stationary(fitted.params, standard, config)
    return _gradient_result(fitted, converged, unit, problem, config)


NOISE_PASSES = 5


def gradient_mse(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Adam on the squared error of the mixture's mean prediction, over experts and gates; the best of `num_starts` starts.

    The squared error says nothing of the noise: where that is not known, a few EM steps of the noise alone follow. The status is ok
    if the squared error is stationary where it ends, which is no maximum of the likelihood.
    """
    start_key, fit_key = jax.random.split(key)
    standard, unit = standard_labels(problem, config)
    starts = _descent_starts(start_key, standard, config)
    if config.noise == "known":
        starts = starts._replace(noise_std=jnp.full_like(starts.noise_std, standard.noise_std))
    fitted = gradient_descent(fit_key, starts, standard, config, loss=squared_error(config.fn), noise="known")
    converged = is_stationary(squared_error_curvature(fitted.params, standard, config), problem.weights)
    if config.noise == "known":
        return _gradient_result(fitted, converged, unit, problem, config)
    residual = jnp.sqrt(fitted.loss)
    path = fitted.path._replace(noise_std=jnp.full_like(fitted.path.noise_std, residual))
    params = fitted.params._replace(noise_std=jnp.full_like(fitted.params.noise_std, residual))
    blocks = sample_blocks(standard.x, standard.y, standard.weights, fit_intercept=config.fit_intercept)
    predictors = predictors_of(params, fit_intercept=config.fit_intercept)

    def step(noise_std: jax.Array, _: None):
        sums = expectation(Point(predictors, noise_std), blocks, fn=config.fn, experts_free=False)
        return noise_m_step(noise_std, sums.counts, sums.squares, config.noise), None

    noise_std, _ = jax.lax.scan(step, params.noise_std, length=NOISE_PASSES)
    path = path._replace(noise_std=path.noise_std.at[-1].set(noise_std))
    fitted = fitted._replace(
        params=params._replace(noise_std=noise_std), path=path, num_passes=fitted.num_passes + NOISE_PASSES
    )
    return _gradient_result(fitted, converged, unit, problem, config)


def _gradient_result(
    fitted: GradientFit, converged: jax.Array, unit: jax.Array, problem: Problem, config: MethodConfig
) -> MethodResult:
    """The result in the labels' own unit, of a fit to labels in the given one.

    The test of convergence moves nothing, and like the history counts as no pass over the data.
    """
    params, path = _in_label_units(fitted.params, unit), _in_label_units(fitted.path, unit)
    passes = jnp.asarray(fitted.num_passes, jnp.int32)
    result = finish(params, _history(path, problem, config), passes, converged, problem, None)
    return with_path(result, config, path)


# Gated losses

MU = 0.5
"""Weight of the own fourth moments, in (0, 1): above, there are spurious minima. 0.5 and 0.9 gave like errors, 0.1 larger ones."""
LAMBDA_FACTOR = 2.0
"""lambda in units of the largest absolute eigenvalue of the whitened fourth moment as a k^2 x k^2 matrix, which in the population
is 1 / min E[P_i]: the loss is bounded below if lambda is more than mu of it."""
DELTA = 1e-4
LOSS_STARTS = 16
LOSS_STEPS = 500
LOSS_RATE = 0.05
"""Of Adam with a cosine decay, on the k^2 coordinates of U in the whitened span: no data are touched."""
LOSS_GRADIENT = 1e-3
"""Norm of the gradient, in units of the penalty, below which the loss is stationary: coordinates of order one, in which its
curvature is of order one too, are then good to as much."""


class GatedLossMoments(NamedTuple):
    """The two moments of which the loss is a polynomial, in a basis W (d, k) of T2's top-k span."""

    second: jax.Array
    """(k, k) W' T2 W."""
    fourth: jax.Array
    """(k, k, k, k) T4(W, W, W, W)."""
    metric: jax.Array
    """(k, k) W'W."""


def gated_loss(
    coordinates: jax.Array, moments: GatedLossMoments, *, mu: float, penalty: jax.Array | float, delta: float
) -> jax.Array:
    """The loss of U = V W', V (k, k) its coordinates, by rows:

        sum_{i != j} T4(u_i, u_i, u_j, u_j) - mu sum_i T4(u_i, u_i, u_i, u_i) + lambda sum_i (T2(u_i, u_i) - 1)^2 + delta/2 ||U||^2.

    In the population, for unit experts, its minimisers are u_i = c_i E[P_i]^(-1/2) times the dual basis of the a_i, up to order and
    sign, c_i^2 = lambda / (lambda - mu / E[P_i]), if 0 < mu < 1, lambda > mu / min E[P_i], and delta is small.
    """
    k = coordinates.shape[0]
    squares = (coordinates[:, :, None] * coordinates[:, None, :]).reshape(k, k * k)
    products = squares @ moments.fourth.reshape(k * k, k * k) @ squares.T
    norms = jnp.sum((coordinates @ moments.second) * coordinates, axis=1)
    size = jnp.sum((coordinates @ moments.metric) * coordinates)
    own = jnp.trace(products)
    return products.sum() - (1.0 + mu) * own + penalty * jnp.sum((norms - 1.0) ** 2) + 0.5 * delta * size


class GatedLossExperts(NamedTuple):
    """What the gated loss says of the experts."""

    experts: jax.Array
    """(k, d) unit rows; signs are open where order 1 does not tell them."""
    loss: jax.Array
    """() the least found."""
    second_moment_eigenvalue: jax.Array
    """() the k-th of T2."""
    converged: jax.Array
    """() bool: the loss is stationary at the experts (LOSS_GRADIENT)."""


def gated_loss_experts(
    key: jax.Array, problem: Problem, *, num_experts: int, num_starts: int, chunk_size: int | None = None
) -> GatedLossExperts:
    """Experts from the gated loss, minimised inside T2's top-k span from random starts.

    The loss is a polynomial of U through k^2 + k^4 moments, so the data are passed over MOMENT_PASSES times. It is minimised in
    whitened coordinates, where its minimisers are near the orthonormal bases.
    """
    transforms = problem.transforms
    assert transforms is not None, "a method of moments is given label transforms"
    k, x, weights = num_experts, problem.x, problem.weights
    moment = second_moment(x, transforms.second(problem.y), weights, chunk_size=chunk_size)
    finite = jnp.isfinite(moment).all()
    eigenvalues, eigenvectors = eigh(jnp.where(finite, moment, jnp.eye(x.shape[1], dtype=x.dtype)))
    top, basis = eigenvalues[::-1][:k], eigenvectors[:, ::-1][:, :k]
    scales = jnp.sqrt(jnp.maximum(jnp.abs(top), 1e-3 * jnp.abs(eigenvalues).max()))
    whitening = basis / scales[None]
    fourth = whitened_moment(
        x, transforms.high(problem.y), whitening, weights, order=4, chunk_size=chunk_size
    )
    finite = finite & jnp.isfinite(fourth).all()
    moments = GatedLossMoments(
        jnp.diag(top / scales**2), jnp.where(finite, fourth, 0), jnp.diag(1.0 / scales**2)
    )
    largest = jnp.abs(eigh(moments.fourth.reshape(k * k, k * k))[0]).max()
    penalty = LAMBDA_FACTOR * jnp.maximum(largest, 1.0)

    def loss(coordinates: jax.Array) -> jax.Array:
        return gated_loss(coordinates, moments, mu=MU, penalty=penalty, delta=DELTA)

    # in units of the penalty, so that one learning rate suits all
    optimiser = optax.adam(optax.cosine_decay_schedule(LOSS_RATE, LOSS_STEPS))
    gradients = jax.vmap(jax.grad(lambda coordinates: loss(coordinates) / penalty))

    def step(state: tuple[jax.Array, Any], _: None):
        coordinates, optimiser_state = state
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
            updates, optimiser_state = optimiser.update(gradients(coordinates), optimiser_state)
        return (coordinates + updates, optimiser_state), None

    start = unit_rows(standard_normal(key, (num_starts, k, k), x.dtype))
    (coordinates, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=LOSS_STEPS)
    losses = jax.vmap(loss)(coordinates)
    best = _best(-losses)
    slope = jax.grad(lambda coordinates: loss(coordinates) / penalty)(coordinates[best])
    converged = jnp.sqrt(jnp.sum(slope**2)) < LOSS_GRADIENT
    dual = coordinates[best] @ whitening.T
    experts = unit_rows(pseudo_inverse(dual).T)
    if transforms.first is not None:
        # E[l1(y) x] = sum_i E[P_i] a_i: in the dual basis its coordinates are positive
        sign = jnp.sign(dual @ first_moment(x, transforms.first(problem.y), weights))
        experts = experts * jnp.where(sign == 0, 1.0, sign)[:, None]
    experts = jnp.where(finite, experts, jnp.nan)
    return GatedLossExperts(experts, losses[best], top[-1], converged)


def gated_losses(key: jax.Array, problem: Problem, config: MethodConfig) -> MethodResult:
    """Makkuva et al. 2020: experts from the gated loss, then the gates by Adam on the likelihood with those experts fixed.

    The loss starts from LOSS_STARTS * `num_starts` points, which touch no data. While the gates are found, the noise is inflated by
    what the experts' errors add; where it is known, it is restored for the last quarter of the passes. The status is ok if the loss
    is stationary at the experts and the likelihood in the gates.
    """
    loss_key, fit_key = jax.random.split(key)
    found = gated_loss_experts(
        loss_key,
        problem,
        num_experts=config.num_experts,
        num_starts=LOSS_STARTS * _num_starts(config),
        chunk_size=config.chunk_size,
    )
    starts = jax.tree.map(lambda leaf: leaf[None], zero_gates(found.experts, problem.noise_std))
    noise = "shared" if config.noise == "known" else config.noise
    loss = negative_log_likelihood(config.fn)
    fitted = gradient_descent(fit_key, starts, problem, config, loss=loss, noise=noise, experts_free=False)
    converged = found.converged & likelihood_is_stationary(fitted.params, problem, config, experts_free=False)
    fitted = fitted._replace(num_passes=fitted.num_passes + MOMENT_PASSES)
    result = _gradient_result(fitted, converged, jnp.ones((), problem.y.dtype), problem, config)
    deficient = (result.status != NOT_FINITE) & (found.second_moment_eigenvalue <= 0)
    return result._replace(status=jnp.where(deficient, RANK_DEFICIENT, result.status))


register_method("joint_em", joint_em_starts, moments="none", several_outputs=True)
register_method("gradient_nll", gradient_nll, moments="none")
register_method("gradient_mse", gradient_mse, moments="none")
register_method("gated_losses", gated_losses, moments="required", order=4)
