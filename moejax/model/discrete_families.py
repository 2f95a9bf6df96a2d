"""The built-in output families of counts and of ordered classes."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.model.family import Family
from moejax.model.special import log_gamma


def poisson() -> Family:
    """Counts of mean e^t."""
    return Family(
        "poisson",
        lambda y, t, s: y * t - jnp.exp(t) - log_gamma(y + 1.0),
        support="counts",
        mean=lambda t, s: jnp.exp(t),
        sample=lambda key, t, s: jax.random.poisson(key, jnp.exp(t), t.shape).astype(t.dtype),
        variance=lambda t, s: jnp.exp(t),
        information=lambda t, s: jnp.exp(t),
    )


def zero_inflated_poisson() -> Family:
    """A Poisson count, or zero with probability s / (1 + s) whatever t is: s is the odds of such a zero."""

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        count = y * t - jnp.exp(t) - log_gamma(y + 1.0)
        return jnp.where(y == 0, jnp.logaddexp(jnp.log(s), count), count) - jnp.log1p(s)

    def sample(key: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        count_key, zero_key = jax.random.split(key)
        count = jax.random.poisson(count_key, jnp.exp(t), t.shape).astype(t.dtype)
        return jnp.where(jax.random.uniform(zero_key, t.shape, t.dtype) < s / (1.0 + s), 0.0, count)

    return Family(
        "zero_inflated_poisson",
        log_density,
        support="counts",
        mean=lambda t, s: jnp.exp(t) / (1.0 + s),
        sample=sample,
        variance=lambda t, s: jnp.exp(t) * (1.0 + jnp.exp(t) * s / (1.0 + s)) / (1.0 + s),
        has_dispersion=True,
    )


def negative_binomial() -> Family:
    """Counts of mean mu = e^t and variance mu + s mu^2."""

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        size, log_odds = 1.0 / s, t + jnp.log(s)
        ways = log_gamma(y + size) - log_gamma(size) - log_gamma(y + 1.0)
        return ways - y * jnp.logaddexp(0.0, -log_odds) - size * jnp.logaddexp(0.0, log_odds)

    def sample(key: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        rate_key, count_key = jax.random.split(key)
        s = jnp.broadcast_to(s, t.shape)
        rate = jnp.exp(t) * s * jax.random.gamma(rate_key, 1.0 / s, t.shape, t.dtype)
        return jax.random.poisson(count_key, rate, t.shape).astype(t.dtype)

    return Family(
        "negative_binomial",
        log_density,
        support="counts",
        mean=lambda t, s: jnp.exp(t),
        sample=sample,
        variance=lambda t, s: jnp.exp(t) * (1.0 + s * jnp.exp(t)),
        has_dispersion=True,
        information=lambda t, s: 1.0 / (jnp.exp(-t) + s),
    )


@functools.cache
def binomial(number: float) -> Family:
    """Successes among N trials of probability logistic(t)."""
    good = number >= 1 and number == int(number)
    require(good, "family binomial", "a whole number of trials, as binomial(10)", number)
    size = int(number)

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        ways = 0.0 if size == 1 else math.lgamma(size + 1.0) - log_gamma(y + 1.0) - log_gamma(size - y + 1.0)
        return ways + y * t - size * jax.nn.softplus(t)

    def variance(t: jax.Array, s: jax.Array) -> jax.Array:
        return size * jax.nn.sigmoid(t) * jax.nn.sigmoid(-t)

    return Family(
        f"binomial({size})" if size > 1 else "bernoulli",
        log_density,
        support=size,
        mean=lambda t, s: size * jax.nn.sigmoid(t),
        sample=lambda key, t, s: jax.random.binomial(key, float(size), jax.nn.sigmoid(t), t.shape, t.dtype),
        variance=variance,
        information=variance,
    )


def bernoulli() -> Family:
    """0 or 1, with probability logistic(t) of 1."""
    return binomial(1)


_BEYOND_CUTS = 1e4
"""A cut beyond every linear predictor."""


@functools.cache
def ordinal(number: float, *cuts: float) -> Family:
    """Ordered classes 0, .., C - 1: P(y <= c) = logistic(cut_c - t). Without cuts, they are estimated."""
    good = number >= 2 and number == int(number)
    require(good, "family ordinal", "a number of classes, as ordinal(5)", number)
    classes = int(number)
    name = f"ordinal({classes})"
    increasing = len(cuts) == classes - 1 and all(a < b for a, b in itertools.pairwise(cuts))
    require(not cuts or increasing, f"family {name}", f"{classes - 1} increasing cuts after the number", cuts)
    given = cuts or tuple(float(c) for c in np.linspace(-1.5, 1.5, classes + 1)[1:-1])
    edges = np.concatenate([[-_BEYOND_CUTS], given, [_BEYOND_CUTS]])

    def log_density(y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        ends = jnp.asarray(edges, jnp.result_type(t))
        label = jnp.asarray(y).astype(jnp.int32)
        low, high = ends[label], ends[label + 1]
        return jax.nn.log_sigmoid(high - t) + jax.nn.log_sigmoid(t - low) + jnp.log1p(-jnp.exp(low - high))

    def probabilities(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t)
        ends = jnp.asarray(edges, t.dtype).reshape((1,) * t.ndim + (-1,))
        return jnp.diff(jax.nn.sigmoid(ends - t[..., None]), axis=-1)

    def moment(t: jax.Array, power: int) -> jax.Array:
        return probabilities(t) @ jnp.arange(classes, dtype=jnp.result_type(t)) ** power

    def sample(key: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        draw = jax.random.uniform(key, t.shape, t.dtype)
        below = jnp.cumsum(probabilities(t), axis=-1)[..., :-1]
        return jnp.sum(draw[..., None] > below, axis=-1).astype(t.dtype)

    return Family(
        f"{name[:-1]},{','.join(map(_digits, cuts))})" if cuts else name,
        log_density,
        support=classes - 1,
        mean=lambda t, s: moment(t, 1),
        sample=sample,
        variance=lambda t, s: moment(t, 2) - moment(t, 1) ** 2,
        num_parameters=0 if cuts else classes - 1,
        adapt=None
        if cuts
        else lambda y, t, s, shares: ordinal(number, *_best_cuts(y, t, shares, classes).tolist()),
    )


_CUT_DIGITS = 6


def _digits(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def _best_cuts(y: np.ndarray, t: np.ndarray | None, shares: np.ndarray, classes: int) -> np.ndarray:
    """(C - 1,) cuts of the largest expected log-likelihood; before a fit, those of a linear predictor that is standard normal."""
    import scipy.optimize  # as long to import as the whole of moejax
    import scipy.special

    label = y.astype(int)
    if t is None:
        return _cuts_of_margins(np.bincount(label, weights=shares, minlength=classes))
    begin = _cuts_of_margins(np.bincount(label, weights=shares.sum(axis=1), minlength=classes))

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        cuts = np.cumsum(np.concatenate([free[:1], np.exp(free[1:])]))
        ends = np.concatenate([[-np.inf], cuts, [np.inf]])
        high, low = (scipy.special.expit(ends[label + i][:, None] - t) for i in (1, 0))
        p = np.maximum(high - low, 1e-300)
        slope = np.zeros(classes + 1)
        np.add.at(slope, label + 1, np.sum(shares * high * (1 - high) / p, axis=1))
        np.add.at(slope, label, -np.sum(shares * low * (1 - low) / p, axis=1))
        tails = np.cumsum(slope[1:-1][::-1])[::-1]
        gradient = np.concatenate([tails[:1], tails[1:] * np.exp(free[1:])])
        return -float(np.sum(shares * np.log(p))), -gradient

    free = np.concatenate([begin[:1], np.log(np.diff(begin))])
    found = scipy.optimize.minimize(loss, free, jac=True, method="L-BFGS-B").x
    return np.round(np.cumsum(np.concatenate([found[:1], np.exp(found[1:])])), _CUT_DIGITS)


def _cuts_of_margins(counts: np.ndarray) -> np.ndarray:
    """(C - 1,) cuts at which a standard normal linear predictor gives the classes these shares; empty classes get a small one."""
    import scipy.optimize
    import scipy.special

    shares = np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()
    nodes, mass = np.polynomial.hermite_e.hermegauss(41)
    mass = mass / mass.sum()

    def gap(cut: float, below: float) -> float:
        return float(mass @ scipy.special.expit(cut - nodes)) - below

    return np.array([scipy.optimize.brentq(gap, -60.0, 60.0, args=(b,)) for b in np.cumsum(shares)[:-1]])
