"""The noise level from labels alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.activations import get_activation
from moejax.moments.noise import estimate_noise_std

N = 20_000


@functools.partial(jax.jit, static_argnames="name")
def estimate(y, weights, name):
    return estimate_noise_std(y, weights, fn=get_activation(name), bounds=(0.005, 5.0), num_nodes=4097)


def labels(name, noise_std, n=N, seed=0):
    """Whatever the gates and experts are, y is distributed as g(Z) + sigma N: unit experts, no biases."""
    rng = np.random.default_rng(seed)
    return get_activation(name)(jnp.asarray(rng.normal(size=n))) + noise_std * jnp.asarray(rng.normal(size=n))


@pytest.mark.parametrize(("name", "tolerance"), [("relu", 0.03), ("tanh", 0.05), ("sigmoid", 0.05)])
@pytest.mark.parametrize("noise_std", [0.03, 0.1, 0.5])
def test_noise_is_estimated_within_a_few_percent(name, tolerance, noise_std):
    assert float(estimate(labels(name, noise_std), jnp.ones(N), name)) == pytest.approx(
        noise_std, rel=tolerance
    )


def test_it_maximises_the_marginal_likelihood():
    """Against the density of g(Z) + sigma N by direct quadrature, on a grid of sigma."""
    y = labels("tanh", 0.2, 2000)
    found = float(
        estimate(jnp.concatenate([y, jnp.zeros(N - 2000)]), jnp.asarray(np.arange(N) < 2000, float), "tanh")
    )
    z = np.linspace(-7.5, 7.5, 1201)
    weight = np.exp(-0.5 * z**2)
    weight /= weight.sum()

    def log_likelihood(sigma):
        kernel = np.exp(-0.5 * ((np.asarray(y)[:, None] - np.tanh(z)[None]) / sigma) ** 2) / sigma
        return np.log(kernel @ weight).sum()

    values = [log_likelihood(found * factor) for factor in (0.97, 1.0, 1.03)]
    assert values[1] == max(values)
    curvature = 2 * values[1] - values[0] - values[2]
    assert abs(values[2] - values[0]) / (2 * curvature) * 0.03 < 2e-3  # where the parabola has its top


def test_padding_and_permutation():
    y = labels("relu", 0.1)
    one = estimate(y, jnp.ones(N), "relu")
    order = np.random.default_rng(1).permutation(N)
    assert float(estimate(y[order], jnp.ones(N), "relu")) == pytest.approx(float(one), rel=1e-9)
    half = jnp.asarray(np.arange(N) < N // 2, float)
    plain = estimate(y, half, "relu")
    junk = estimate(jnp.where(half > 0, y, jnp.nan), half, "relu")
    assert float(junk) == pytest.approx(float(plain), rel=1e-12)


def test_it_stays_within_the_range():
    assert 0.005 <= float(estimate(jnp.tanh(jnp.linspace(-2, 2, N)), jnp.ones(N), "tanh")) <= 5.0


def test_labels_far_outside_the_range_of_g_mean_much_noise():
    assert float(estimate(100.0 * labels("tanh", 0.1), jnp.ones(N), "tanh")) == pytest.approx(5.0, rel=1e-6)
