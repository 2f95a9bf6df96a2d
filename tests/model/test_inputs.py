"""Input distributions: moments in standard errors, and the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moejax.model.inputs import (
    get_input_distribution,
    get_log_density,
    input_distribution_names,
    normal,
    normal_mixture,
    register_input_distribution,
)

N, D = 40_000, 3


def compiled(sampler):
    return jax.jit(sampler, static_argnums=(1, 2, 3))


@functools.cache
def drawn(name):
    return np.asarray(compiled(get_input_distribution(name))(jax.random.key(0), N, D, jnp.float64))


@pytest.mark.parametrize(
    "name", ["standard_normal", "uniform", "rademacher", "student_t", "gaussian_mixture", "correlated_normal"]
)
def test_mean_zero_and_identity_covariance(name):
    x = drawn(name)
    assert x.shape == (N, D)
    assert x.dtype == np.float64
    assert np.all(np.abs(x.mean(axis=0)) < 4.5 * x.std(axis=0) / N**0.5)
    products = x[:, :, None] * x[:, None, :]
    correlation = 0.5 if name == "correlated_normal" else 0.0
    error = products.mean(axis=0) - (correlation + (1 - correlation) * np.eye(D))
    assert np.all(np.abs(error) < 4.5 * products.std(axis=0) / N**0.5 + 1e-12)


def test_fourth_moments_tell_them_apart():
    """E[x^4] of one coordinate: 3, 9/5, 1, 3 + 6/(8-4); along the diagonal of the mixture, 3 - 2 * 0.9^4."""
    for name, fourth in (("standard_normal", 3.0), ("uniform", 1.8), ("rademacher", 1.0), ("student_t", 4.5)):
        powers = drawn(name)[:, 0] ** 4
        assert abs(powers.mean() - fourth) < 4.5 * powers.std() / N**0.5 + 1e-12
    powers = (drawn("gaussian_mixture").sum(axis=1) / D**0.5) ** 4
    assert abs(powers.mean() - (3 - 2 * 0.9**4)) < 4.5 * powers.std() / N**0.5


MEAN = np.array([1.0, -0.5, 0.2])
COVARIANCE = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
SHIFTED_COVARIANCE = 0.5 ** np.abs(np.subtract.outer(np.arange(D), np.arange(D)))


@pytest.mark.parametrize(
    ("sampler", "mean", "covariance"),
    [
        (get_input_distribution("shifted_normal"), np.full(D, 0.5), SHIFTED_COVARIANCE),
        (normal(MEAN, COVARIANCE).sampler, MEAN, COVARIANCE),
        # the spread of the centres adds to the covariance of a mixture
        (
            normal_mixture([1.0, 3.0], [MEAN, -MEAN], [np.eye(D), COVARIANCE]).sampler,
            -0.5 * MEAN,
            0.25 * np.eye(D) + 0.75 * COVARIANCE + 0.75 * np.outer(MEAN, MEAN),
        ),
    ],
)
def test_mean_and_covariance(sampler, mean, covariance):
    x = np.asarray(compiled(sampler)(jax.random.key(1), N, D, jnp.float64))
    assert np.all(np.abs(x.mean(axis=0) - mean) < 4.5 * x.std(axis=0) / N**0.5)
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert np.all(np.abs(products.mean(axis=0) - covariance) < 4.5 * products.std(axis=0) / N**0.5)


def scipy_density(name):
    along = np.full((D, D), 1 / D)
    normal_density = scipy.stats.multivariate_normal
    clusters = [
        normal_density(sign * 0.9 * np.full(D, D**-0.5), np.eye(D) - 0.81 * along) for sign in (1, -1)
    ]
    return {
        "standard_normal": normal_density(np.zeros(D), np.eye(D)).logpdf,
        "student_t": lambda x: scipy.stats.t(8, scale=0.75**0.5).logpdf(x).sum(axis=1),
        "gaussian_mixture": lambda x: np.log(0.5 * sum(cluster.pdf(x) for cluster in clusters)),
        "correlated_normal": normal_density(np.zeros(D), 0.5 * np.eye(D) + 0.5).logpdf,
        "shifted_normal": normal_density(np.full(D, 0.5), SHIFTED_COVARIANCE).logpdf,
    }[name]


@pytest.mark.slow
def test_log_densities():
    x = np.random.default_rng(0).normal(size=(20, D)) * 1.5
    for name in input_distribution_names():
        log_density = get_log_density(name)
        if name in ("uniform", "rademacher"):
            assert log_density is None
            continue
        np.testing.assert_allclose(
            jax.jit(jax.vmap(log_density))(x), scipy_density(name)(x), rtol=1e-12, err_msg=name
        )
    mixture = normal_mixture([1.0, 3.0], [MEAN, -MEAN], [np.eye(D), COVARIANCE])
    parts = [scipy.stats.multivariate_normal(m, c) for m, c in ((MEAN, np.eye(D)), (-MEAN, COVARIANCE))]
    expected = np.log(0.25 * parts[0].pdf(x) + 0.75 * parts[1].pdf(x))
    np.testing.assert_allclose(jax.jit(jax.vmap(mixture.log_density))(x), expected, rtol=1e-12)


def test_what_is_no_distribution_is_refused():
    with pytest.raises(ValueError, match=r"expected shapes \(d,\) and \(d, d\), got \(3,\) and \(2, 2\)"):
        normal(MEAN, np.eye(2))
    with pytest.raises(ValueError, match=r"covariance: .* positive definite"):
        normal(MEAN, np.eye(D) - 1.0)
    with pytest.raises(ValueError, match=r"mixing_weights: expected 1 positive"):
        normal_mixture([-1.0], [MEAN], [COVARIANCE])
    with pytest.raises(ValueError, match=r"dim: expected 3, .* got 4"):
        normal(MEAN, COVARIANCE).sampler(jax.random.key(0), 2, 4, jnp.float64)


def test_single_precision_is_kept():
    for name in input_distribution_names():
        drawn = jax.eval_shape(
            lambda key, name=name: get_input_distribution(name)(key, 4, 2, jnp.float32), jax.random.key(0)
        )
        assert (drawn.shape, drawn.dtype) == ((4, 2), jnp.float32)


def test_registry():

    def sampler(key, n, d, dtype):
        return jnp.zeros((n, d), dtype)

    register_input_distribution("nothing", sampler)
    assert get_input_distribution("nothing") is sampler
    assert get_log_density("nothing") is None
    register_input_distribution("mine", *normal(MEAN, COVARIANCE))
    assert float(get_log_density("mine")(jnp.asarray(MEAN))) == pytest.approx(
        scipy.stats.multivariate_normal(MEAN, COVARIANCE).logpdf(MEAN)
    )
    with pytest.raises(ValueError, match=r"input_distribution: unknown name 'unform'; did you mean uniform"):
        get_input_distribution("unform")
    with pytest.raises(ValueError, match="identifier"):
        register_input_distribution("not a name", sampler)
    with pytest.raises(ValueError, match="expected a function"):
        register_input_distribution("name", None)
    with pytest.raises(ValueError, match="log_density: expected a function"):
        register_input_distribution("name", sampler, 3.0)
