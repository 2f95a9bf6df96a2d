"""The gated losses of Makkuva, Oh, Kannan and Viswanath 2020, "Learning in gated neural networks".

The experts come from order-4 moments, by gradient descent on a loss whose minimisers are the scaled dual basis; the gates then come
from the likelihood.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from moejax.methods.from_moments import MOMENT_PASSES
from moejax.methods.gradient_descent import (
    LOSS_GRADIENT,
    gradient_descent,
    gradient_result,
    negative_log_likelihood,
)
from moejax.methods.method import MethodConfig, MethodResult, Problem, noise_while_inexact
from moejax.methods.starts import index_of_best, number_of_starts, zero_gates
from moejax.methods.stationarity import likelihood_is_stationary
from moejax.model.gaussian import standard_normal
from moejax.model.small_linear_algebra import eigh, pseudo_inverse, unit_rows
from moejax.model.status import Status
from moejax.moments.cross_moments import first_moment, second_moment, whitened_moment

# Gated losses

MU = 0.5
"""Weight of the own fourth moments, in (0, 1): above, there are spurious minima. 0.5 and 0.9 gave similar errors, 0.1 larger."""
LAMBDA_FACTOR = 2.0
"""lambda in units of the largest absolute eigenvalue of the whitened fourth moment as a k^2 x k^2 matrix, which in the population
is 1 / min E[P_i]: the loss is bounded below if lambda is more than mu of it."""
DELTA = 1e-4
LOSS_STARTS = 16
LOSS_STEPS = 500
LOSS_RATE = 0.05
"""Learning rate of Adam with a cosine decay, on the k^2 coordinates of U in the whitened span; no data are read."""


class GatedLossMoments(NamedTuple):
    """The two moments that the loss is a polynomial of, in a basis W (d, k) of T2's top-k span."""

    second: Float[jax.Array, "k k"]
    """(k, k) W' T2 W."""
    fourth: Float[jax.Array, "k k k k"]
    """(k, k, k, k) T4(W, W, W, W)."""
    metric: Float[jax.Array, "k k"]
    """(k, k) W'W."""


def gated_loss(
    coordinates: Float[jax.Array, "k k"],
    moments: GatedLossMoments,
    *,
    mu: float,
    penalty: Float[jax.Array, ""] | float,
    delta: float,
) -> Float[jax.Array, ""]:
    """The loss of U = V W', V (k, k) its coordinates.

    With the rows u_i of U, it is

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
    """Experts from the gated loss."""

    experts: Float[jax.Array, "k d"]
    """(k, d) unit rows; signs are arbitrary unless the order-1 moment determines them."""
    loss: Float[jax.Array, ""]
    """() the least loss found."""
    second_moment_eigenvalue: Float[jax.Array, ""]
    """() the k-th of T2."""
    converged: Bool[jax.Array, ""]
    """() bool: the loss is stationary at the experts (LOSS_GRADIENT)."""


def gated_loss_experts(
    key: jax.Array, problem: Problem, *, num_experts: int, num_starts: int, chunk_size: int | None = None
) -> GatedLossExperts:
    """Experts from the gated loss, minimised inside T2's top-k span from random starts.

    The loss is a polynomial of U through k^2 + k^4 moments, so it takes MOMENT_PASSES passes over the data. It is minimised in
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

    import optax

    # in units of the penalty, so that one learning rate suits all
    optimiser = optax.adam(optax.cosine_decay_schedule(LOSS_RATE, LOSS_STEPS))
    gradients = jax.vmap(jax.grad(lambda coordinates: loss(coordinates) / penalty))

    def step(state: tuple[jax.Array, Any], _: None):
        coordinates, optimiser_state = state
        with jax.numpy_dtype_promotion("standard"):  # optax combines its integer counts with floats
            updates, optimiser_state = optimiser.update(gradients(coordinates), optimiser_state)
        assert isinstance(updates, jax.Array)  # a tree of one leaf, as the coordinates are
        return (coordinates + updates, optimiser_state), None

    start = unit_rows(standard_normal(key, (num_starts, k, k), x.dtype))
    (coordinates, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=LOSS_STEPS)
    losses = jax.vmap(loss)(coordinates)
    best = index_of_best(-losses)
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

    The loss starts from LOSS_STARTS * `num_starts` points, which read no data. While the gates are found, the noise is estimated,
    because the experts' errors add to it; a known noise is restored for the last quarter of the passes. The status is ok if the
    loss is stationary at the experts and the likelihood in the gates.
    """
    loss_key, fit_key = jax.random.split(key)
    found = gated_loss_experts(
        loss_key,
        problem,
        num_experts=config.num_experts,
        num_starts=LOSS_STARTS * number_of_starts(config),
        chunk_size=config.chunk_size,
    )
    starts = jax.tree.map(lambda leaf: leaf[None], zero_gates(found.experts, problem.noise_std))
    noise = noise_while_inexact(config)
    loss = negative_log_likelihood(config.fn)
    fitted = gradient_descent(fit_key, starts, problem, config, loss=loss, noise=noise, experts_free=False)
    converged = found.converged & likelihood_is_stationary(fitted.params, problem, config, experts_free=False)
    fitted = fitted._replace(num_passes=fitted.num_passes + MOMENT_PASSES)
    result = gradient_result(fitted, converged, jnp.ones((), problem.y.dtype), problem, config)
    deficient = (result.status != Status.NOT_FINITE) & (found.second_moment_eigenvalue <= 0)
    return result._replace(status=jnp.where(deficient, Status.RANK_DEFICIENT, result.status))
