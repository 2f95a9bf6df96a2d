"""Score tensors by differentiation: against Hermite tensors, dense derivatives of the density, and Stein's identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import make_params, recovery_error, sample_labels

from moejax import fit
from moejax.model.inputs import get_input_distribution, get_log_density, normal, normal_mixture
from moejax.moments.cross_moments import first_moment, second_moment, whitened_moment
from moejax.moments.score_tensors import (
    AffineLogDensity,
    score_first_moment,
    score_second_moment,
    score_whitened_moment,
)

pytestmark = pytest.mark.slow

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


@functools.partial(jax.jit, static_argnames=("log_density", "orders", "chunk_size"))
def score_moments(x, labels, whitening, weights, log_density, orders=(1, 2, 3, 4), chunk_size=None):
    """The moments of some orders; fewer of them compile faster."""
    common = {"log_density": log_density, "chunk_size": chunk_size}
    of_order = {1: score_first_moment, 2: score_second_moment}
    return [
        of_order[order](x, labels, weights, **common)
        if order in of_order
        else score_whitened_moment(x, labels, whitening, weights, order=order, **common)
        for order in orders
    ]


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


def test_standard_normal_density_gives_the_hermite_moments_also_in_chunks():
    x, labels, weights, w = data()
    got = score_moments(x, labels, w, weights, get_log_density("standard_normal"), chunk_size=40)
    assert_close(got, hermite_moments(x, labels, np.eye(D), w, weights))


def test_a_normal_density_gives_the_hermite_moments_of_its_whitened_inputs():
    """S_m(x)(W, .., W) = He tensors of z = R^-1 (x - mu), contracted with R^-1 W, where R R' is the covariance."""
    x, labels, weights, w = data()
    inverse = np.linalg.inv(ROOT)
    z = (np.asarray(x) - MEAN) @ inverse.T
    expected = hermite_moments(z, labels, inverse, inverse @ np.asarray(w), weights)
    log_density = normal(MEAN, ROOT @ ROOT.T).log_density
    assert_close(score_moments(x, labels, w, weights, log_density, (1, 2, 3)), expected[:3])


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
        density = np.exp(jax.jit(jax.vmap(MIXTURE.log_density))(x)).reshape(-1, *(1,) * order)
        factors = (np.asarray(labels) * weights / np.sum(weights)).reshape(density.shape)
        dense = (-1) ** order * factors * tensors / density
        expected.append(np.einsum(subscripts, dense, *[w] * (order if order > 2 else 0)))
    assert_close(score_moments(x, labels, w, weights, MIXTURE.log_density), expected, 1e-10)


def test_rows_of_zero_weight_change_nothing():
    x, labels, weights, w = data()
    plain = score_moments(x, labels, w, weights, MIXTURE.log_density)
    unused = np.asarray(weights) == 0
    assert int(unused.sum()) > 10
    assert bool(unused[0])  # the density may be evaluated at a sample that has weight, not at the first
    for junk in (np.nan, 1e30):
        junk_x, junk_labels = np.where(unused[:, None], junk, x), np.where(unused, junk, labels)
        assert_close(score_moments(junk_x, junk_labels, w, weights, MIXTURE.log_density), plain)


@pytest.mark.parametrize("name", ["mixture", "student_t"])
def test_stein_identity(name):
    """E[f(x) S_m(x)] = E[grad^m f(x)], f(x) = sin(b . x + 0.3), on one sample, in standard errors of the difference."""
    n, num_batches = 100_000, 50
    sampler, log_density = (
        MIXTURE if name == "mixture" else (get_input_distribution(name), get_log_density(name))
    )
    draw = jax.jit(sampler, static_argnums=(1, 2, 3))
    x = np.asarray(draw(jax.random.key(3), n, D, jnp.float64))
    b = np.asarray([0.6, -0.8, 0.5])
    w = np.asarray([[1.0, 0.2], [-0.4, 0.8], [0.3, -0.5]])
    phase = x @ b + 0.3

    @jax.jit
    def moments(x, phase):
        one = lambda batch: score_moments(batch[0], jnp.sin(batch[1]), w, None, log_density, (2, 3))  # noqa: E731
        return jax.lax.map(one, (x, phase))

    got = moments(x.reshape(num_batches, -1, D), phase.reshape(num_batches, -1))
    for moment, derivative, power in zip(
        got,
        (-np.sin(phase), -np.cos(phase)),
        (np.multiply.outer(b, b), functools.reduce(np.multiply.outer, [b @ w] * 3)),
        strict=True,
    ):
        mean = np.asarray(derivative).reshape(num_batches, -1).mean(axis=1)
        difference = np.asarray(moment) - mean.reshape(-1, *(1,) * power.ndim) * power
        standard_error = difference.std(axis=0, ddof=1) / num_batches**0.5
        assert np.all(np.abs(difference.mean(axis=0)) < 4.5 * standard_error)
        # there is something to see
        assert np.abs(np.asarray(moment).mean(axis=0)).max() > 10 * standard_error.max()


def test_density_of_whitened_inputs():
    x, labels, weights, w = data()
    matrix = np.linalg.inv(ROOT).T
    log_density = normal(MEAN, ROOT @ ROOT.T).log_density
    whitened = AffineLogDensity(log_density, MEAN, matrix)
    z = (np.asarray(x) - MEAN) @ matrix
    got = score_moments(z, labels, w, weights, whitened, (1, 2, 3))
    assert_close(got, hermite_moments(z, labels, np.eye(D), w, weights)[:3])
    assert whitened == AffineLogDensity(log_density, MEAN.copy(), matrix.copy())
    assert hash(whitened) == hash(AffineLogDensity(log_density, MEAN.copy(), matrix.copy()))
    assert whitened != AffineLogDensity(log_density, MEAN + 1.0, matrix)
    assert whitened != AffineLogDensity(MIXTURE.log_density, MEAN, matrix)


def test_fit_takes_a_density_in_the_users_units():
    """Two clusters of inputs, where moments of a normal density have a bias."""
    offset = np.array([1.2, 0.0, 0.0, 0.0])
    inputs = normal_mixture([0.5, 0.5], [offset, -offset], [0.5 * np.eye(4)] * 2)
    experts = np.asarray([[0.6, 0.8, 0.0, 0.0], [0.6, -0.8, 0.0, 0.0]])
    truth = make_params(experts, np.asarray([[0.0, 0.0, 1.0, 0.0], [0.0] * 4]), 0.1)
    x = jax.jit(inputs.sampler, static_argnums=(1, 2, 3))(jax.random.key(0), 100_000, 4, jnp.float64)
    y, _ = sample_labels(jax.random.key(1), truth, "linear", x)
    units = np.asarray([1.0, 10.0, 0.1, 3.0])

    def log_density(x):
        return inputs.log_density(x / units)

    errors = []
    for density in (None, log_density):
        result = fit(
            jax.random.key(2),
            np.asarray(x) * units,
            y,
            num_experts=2,
            noise_std=0.1,
            method="spectral",
            log_density=density,
        )
        errors.append(float(recovery_error(experts, np.asarray(result.params.experts) * units)))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("density", "words"),
    [
        (3.0, "log_density: expected a function"),
        ("uniform", "log_density: input distribution 'uniform' has no density"),
        ("uniformly", "did you mean uniform"),
        (lambda x: x, r"log_density: expected a finite number \(\) at x"),
        (lambda x: jnp.log(0.0 * x.sum()), "log_density: expected a finite number"),
    ],
)
def test_what_is_no_density_is_refused(density, words):
    x = np.random.default_rng(0).normal(size=(60, 3))
    with pytest.raises(ValueError, match=words):
        fit(jax.random.key(0), x, x[:, 0], num_experts=2, method="spectral", log_density=density)
