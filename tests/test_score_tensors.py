"""Score tensors by differentiation: against Hermite tensors, dense derivatives of the density, and Stein's identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.inputs import get_input_distribution, get_log_density, normal, normal_mixture
from moejax.moments import first_moment, second_moment, whitened_moment
from moejax.score_tensors import (
    AffineLogDensity,
    score_first_moment,
    score_second_moment,
    score_whitened_moment,
)

D, K, N = 3, 2, 101
MEAN = np.array([0.4, -1.0, 0.2])
ROOT = np.array([[1.2, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.4, 0.6]])
MIXTURE = normal_mixture([0.3, 0.7], [[1.0, 0.0, -0.5], [-0.4, 0.3, 0.2]], [ROOT @ ROOT.T, np.eye(D)])


@functools.cache
def data():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 2.0, N)
    weights[::7] = 0.0
    arrays = rng.normal(size=(N, D)), rng.normal(size=N), weights, rng.normal(size=(D, K))
    return tuple(jnp.asarray(a) for a in arrays)


@functools.partial(jax.jit, static_argnames=("log_density", "chunk_size"))
def all_moments(x, labels, whitening, weights, log_density, chunk_size=None):
    common = {"log_density": log_density, "chunk_size": chunk_size}
    return (
        score_first_moment(x, labels, weights, **common),
        score_second_moment(x, labels, weights, **common),
        score_whitened_moment(x, labels, whitening, weights, order=3, **common),
        score_whitened_moment(x, labels, whitening, weights, order=4, **common),
    )


@jax.jit
def hermite_moments(z, labels, directions, whitening, weights):
    """The moments of z standard normal, contracted with directions (d, d) at orders 1 and 2, else with whitening."""
    return (
        directions.T @ first_moment(z, labels, weights),
        directions.T @ second_moment(z, labels, weights) @ directions,
        whitened_moment(z, labels, whitening, weights, order=3),
        whitened_moment(z, labels, whitening, weights, order=4),
    )


def assert_close(got, expected, tolerance=1e-11):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(np.abs(other).max()))


@pytest.mark.parametrize("chunk_size", [None, 40])
def test_standard_normal_density_gives_the_hermite_moments(chunk_size):
    x, labels, weights, w = data()
    got = all_moments(x, labels, w, weights, get_log_density("standard_normal"), chunk_size)
    assert_close(got, hermite_moments(x, labels, jnp.eye(D), w, weights))


def test_a_normal_density_gives_the_hermite_moments_of_its_whitened_inputs():
    """S_m(x)(W, .., W) = He tensors of z = R^-1 (x - mu), contracted with R^-1 W, where R R' is the covariance."""
    x, labels, weights, w = data()
    inverse = jnp.asarray(np.linalg.inv(ROOT))
    expected = hermite_moments((x - MEAN) @ inverse.T, labels, inverse, inverse @ w, weights)
    assert_close(all_moments(x, labels, w, weights, normal(MEAN, ROOT @ ROOT.T).log_density), expected)


def test_any_density_gives_its_dense_derivatives_contracted():
    """S_m = (-1)^m grad^m p / p by differentiating p itself m times, all d^m entries."""
    x, labels, weights, w = data()
    derivative = lambda x: jnp.exp(MIXTURE.log_density(x))  # noqa: E731
    expected = []
    for order, subscripts in enumerate(
        ("na->a", "nab->ab", "nabc,ai,bj,ck->ijk", "nabcd,ai,bj,ck,dl->ijkl"), 1
    ):
        derivative = jax.jacfwd(derivative)
        tensors = np.asarray(jax.jit(jax.vmap(derivative))(x))
        density = np.exp(jax.vmap(MIXTURE.log_density)(x)).reshape(-1, *(1,) * order)
        factors = np.asarray(labels * weights / weights.sum()).reshape(density.shape)
        dense = (-1) ** order * factors * tensors / density
        expected.append(np.einsum(subscripts, dense, *[w] * (order if order > 2 else 0)))
    assert_close(all_moments(x, labels, w, weights, MIXTURE.log_density), expected, 1e-10)


def test_rows_of_zero_weight_change_nothing():
    x, labels, weights, w = data()
    plain = all_moments(x, labels, w, weights, MIXTURE.log_density)
    for junk in (np.nan, 1e30):
        padded = [
            jnp.concatenate([jnp.full((30, *a.shape[1:]), fill), a])
            for a, fill in ((x, junk), (labels, junk), (weights, 0.0))
        ]
        assert_close(all_moments(padded[0], padded[1], w, padded[2], MIXTURE.log_density), plain)


@pytest.mark.parametrize("name", ["mixture", "student_t"])
def test_stein_identity(name):
    """E[f(x) S_m(x)] = E[grad^m f(x)], f(x) = sin(b . x + 0.3), on one sample, in standard errors of the difference."""
    n, num_batches = 100_000, 50
    sampler, log_density = (
        MIXTURE if name == "mixture" else (get_input_distribution(name), get_log_density(name))
    )
    x = sampler(jax.random.key(3), n, D, jnp.float64)
    b = jnp.asarray([0.6, -0.8, 0.5])
    w = jnp.asarray([[1.0, 0.2], [-0.4, 0.8], [0.3, -0.5]])
    phase = x @ b + 0.3

    @jax.jit
    def moments(batch):
        x, phase = batch
        return all_moments(x, jnp.sin(phase), w, None, log_density)

    got = jax.lax.map(moments, (x.reshape(num_batches, -1, D), phase.reshape(num_batches, -1)))
    means = [
        np.asarray(a).reshape(num_batches, -1).mean(axis=1)
        for a in (jnp.cos(phase), -jnp.sin(phase), -jnp.cos(phase), jnp.sin(phase))
    ]
    powers = [
        functools.reduce(np.multiply.outer, [v] * order)
        for order, v in ((1, b), (2, b), (3, b @ w), (4, b @ w))
    ]
    for moment, mean, power in zip(got, means, powers, strict=True):
        difference = np.asarray(moment) - mean.reshape(-1, *(1,) * power.ndim) * power
        standard_error = difference.std(axis=0, ddof=1) / num_batches**0.5
        assert np.all(np.abs(difference.mean(axis=0)) < 4.5 * standard_error)
        assert np.abs(mean.mean() * power).max() > 3 * standard_error.min()  # there is something to see


def test_density_of_whitened_inputs():
    x, labels, weights, w = data()
    matrix = np.linalg.inv(ROOT).T
    log_density = normal(MEAN, ROOT @ ROOT.T).log_density
    whitened = AffineLogDensity(log_density, MEAN, matrix)
    got = all_moments((x - MEAN) @ matrix, labels, w, weights, whitened)
    assert_close(got, hermite_moments((x - MEAN) @ matrix, labels, jnp.eye(D), w, weights))
    assert whitened == AffineLogDensity(log_density, MEAN.copy(), matrix.copy())
    assert hash(whitened) == hash(AffineLogDensity(log_density, MEAN.copy(), matrix.copy()))
    assert whitened != AffineLogDensity(log_density, MEAN + 1.0, matrix)
    assert whitened != AffineLogDensity(MIXTURE.log_density, MEAN, matrix)
