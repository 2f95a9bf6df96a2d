"""The built-in output families of real and of positive labels."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.model.activations import get_activation
from moejax.model.family import Family
from moejax.model.special import log_gamma

START_DEGREES_OF_FREEDOM = 4.0
DEGREES_OF_FREEDOM = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 30.0, 100.0)
"""The degrees of freedom among which an estimate chooses."""


@functools.cache
def student_t(degrees: float | None = None) -> Family:
    """y = t + s T, T Student's t; without degrees of freedom, they are estimated."""
    require(degrees is None or degrees > 0, "family student_t", "positive degrees of freedom", degrees)
    v = START_DEGREES_OF_FREEDOM if degrees is None else degrees
    constant = _log_t_constant(v)

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        return constant - jnp.log(s) - 0.5 * (v + 1) * jnp.log1p(((y - t) / s) ** 2 / v)

    def adapt(y: np.ndarray, t: np.ndarray | None, s: np.ndarray | None, shares: np.ndarray) -> Family:
        if t is None or s is None:
            return student_t(START_DEGREES_OF_FREEDOM)
        return student_t(_best_degrees(y[:, None] - t, s, shares))

    return Family(
        "student_t" if degrees is None else f"student_t({repr(float(degrees)).removesuffix('.0')})",
        log_density,
        support="real",
        mean=_itself,
        sample=lambda key, t, s: t + s * jax.random.t(key, v, t.shape, t.dtype),
        variance=lambda t, s: jnp.broadcast_to(s**2 * (v / (v - 2) if v > 2 else jnp.inf), t.shape),
        has_dispersion=True,
        information=lambda t, s: (v + 1) / (v + 3) / s**2,
        marginal_tells_norm=False,
        activation=get_activation("linear"),
        location_scale=True,
        num_parameters=int(degrees is None),
        adapt=adapt if degrees is None else None,
    )


def _itself(t: jax.Array, s: jax.Array) -> jax.Array:
    return t + jnp.zeros_like(s)


def _log_t_constant(v: float) -> float:
    return math.lgamma(0.5 * (v + 1)) - math.lgamma(0.5 * v) - 0.5 * math.log(v * math.pi)


def _best_degrees(residual: np.ndarray, s: np.ndarray, shares: np.ndarray) -> float:
    """The degrees of freedom of the largest expected log-likelihood, each with its best common factor of the scales.

    Args:
        residual: (n, k)
        s: (k,)
        shares: (n, k) responsibilities times weights.
    """
    import scipy.optimize  # as long to import as the whole of moejax

    squares = (residual / s) ** 2
    total = shares.sum()

    def loss(log_factor: float, v: float) -> float:
        fit = 0.5 * (v + 1) * float(np.sum(shares * np.log1p(squares * math.exp(-2.0 * log_factor) / v)))
        return fit + total * (log_factor - _log_t_constant(v))

    losses = [
        scipy.optimize.minimize_scalar(loss, bounds=(-5.0, 5.0), args=(v,), method="bounded").fun
        for v in DEGREES_OF_FREEDOM
    ]
    return DEGREES_OF_FREEDOM[int(np.argmin(losses))]


def laplace() -> Family:
    """y = t + s L, L with density e^-|l| / 2."""
    return Family(
        "laplace",
        lambda y, t, s: -jnp.abs(y - t) / s - jnp.log(2.0 * s),
        support="real",
        mean=_itself,
        sample=lambda key, t, s: t + s * jax.random.laplace(key, t.shape, t.dtype),
        variance=lambda t, s: jnp.broadcast_to(2.0 * s**2, t.shape),
        has_dispersion=True,
        information=lambda t, s: 1.0 / s**2,
        smooth=False,
        marginal_tells_norm=False,
        activation=get_activation("linear"),
        location_scale=True,
    )


def gamma() -> Family:
    """Positive labels of mean mu = e^t and variance s mu^2: a gamma density of shape 1 / s."""

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        shape, relative = 1.0 / s, jnp.log(y) - t
        return shape * (relative - jnp.exp(relative) - jnp.log(s)) - jnp.log(y) - log_gamma(shape)

    def sample(key: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        s = jnp.broadcast_to(s, t.shape)
        tiny = jnp.finfo(t.dtype).tiny
        return jnp.maximum(jnp.exp(t) * s * jax.random.gamma(key, 1.0 / s, t.shape, t.dtype), tiny)

    return Family(
        "gamma",
        log_density,
        support="positive",
        mean=lambda t, s: jnp.exp(t),
        sample=sample,
        variance=lambda t, s: s * jnp.exp(2.0 * t),
        has_dispersion=True,
        information=lambda t, s: 1.0 / s,
    )


def exponential() -> Family:
    """Positive labels of mean e^t with an exponential density."""
    return Family(
        "exponential",
        lambda y, t, s: -t - y * jnp.exp(-t),
        support="positive",
        mean=lambda t, s: jnp.exp(t),
        sample=lambda key, t, s: jnp.exp(t) * jax.random.exponential(key, t.shape, t.dtype),
        variance=lambda t, s: jnp.exp(2.0 * t),
        information=lambda t, s: jnp.ones_like(t),
    )


def lognormal() -> Family:
    """log y ~ N(t, s^2)."""
    return Family(
        "lognormal",
        lambda y, t, s: -0.5 * ((jnp.log(y) - t) / s) ** 2 - jnp.log(s * y) - 0.5 * math.log(2 * math.pi),
        support="positive",
        mean=lambda t, s: jnp.exp(t + 0.5 * s**2),
        sample=lambda key, t, s: jnp.exp(t + s * jax.random.normal(key, t.shape, t.dtype)),
        variance=lambda t, s: jnp.expm1(s**2) * jnp.exp(2.0 * t + s**2),
        marginal_tells_norm=False,
        has_dispersion=True,
        information=lambda t, s: 1.0 / s**2,
    )
