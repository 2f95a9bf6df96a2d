"""Input distributions: moments in standard errors, and the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import inputs
from moejax.inputs import get_input_distribution, input_distribution_names, register_input_distribution

N, D = 40_000, 3


def drawn(name):
    return np.asarray(get_input_distribution(name)(jax.random.key(0), N, D, jnp.float64))


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


def test_single_precision_is_kept():
    for name in input_distribution_names():
        drawn = jax.eval_shape(
            lambda key, name=name: get_input_distribution(name)(key, 4, 2, jnp.float32), jax.random.key(0)
        )
        assert (drawn.shape, drawn.dtype) == ((4, 2), jnp.float32)


def test_registry(monkeypatch):
    monkeypatch.setattr(inputs, "_REGISTRY", dict(inputs._REGISTRY))

    def sampler(key, n, d, dtype):
        return jnp.zeros((n, d), dtype)

    register_input_distribution("nothing", sampler)
    assert get_input_distribution("nothing") is sampler
    with pytest.raises(ValueError, match=r"input_distribution: unknown name 'unform'; nearest: uniform"):
        get_input_distribution("unform")
    with pytest.raises(ValueError, match="identifier"):
        register_input_distribution("not a name", sampler)
    with pytest.raises(ValueError, match="identifier"):
        register_input_distribution("name", None)
