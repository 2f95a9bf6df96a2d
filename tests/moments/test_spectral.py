"""The spectral estimate: invariances, statuses, signs at order 4, and its predicted error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import match_experts, random_params, recovery_error, results_on_the_host, sample

from moejax.model.activations import get_activation
from moejax.model.inputs import get_log_density, normal
from moejax.model.instances import InstanceScales
from moejax.model.status import Status
from moejax.moments.orders import predicted_mse
from moejax.moments.spectral import (
    SpectralTransforms,
    host_transforms,
    spectral_estimate,
)

D, K, N, NOISE = 5, 2, 20_000, 0.1


@results_on_the_host
@functools.partial(jax.jit, static_argnames=("order", "chunk_size", "log_density"))
def estimate(key, x, y, transforms, weights, order=3, chunk_size=None, log_density=None):
    return spectral_estimate(
        key,
        x,
        y,
        transforms,
        weights,
        num_experts=K,
        order=order,
        chunk_size=chunk_size,
        log_density=log_density,
    )


@functools.cache
def transforms_of(name, order=3, num_experts=K, kind="weighted"):
    return jax.tree.map(jnp.asarray, host_transforms(name, NOISE, order, kind, num_experts))


def scales(num_experts, gating_norm=1.0, correlation=0.0):
    values = (jnp.asarray(v) for v in (NOISE, gating_norm, 90.0, correlation))
    return InstanceScales(*values, jnp.asarray(np.ones(num_experts)))


@functools.cache
def drawn(name, correlation=0.4):
    params = random_params(jax.random.key(1), scales(K, correlation=correlation), D)
    x, y, _ = sample(jax.random.key(2), params, name, N)
    return jax.device_get((params, x, y, np.ones(N)))


KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def baseline():
    _, x, y, weights = drawn("relu")
    return estimate(KEY, x, y, transforms_of("relu"), weights)


def same(one, other, tolerance=1e-9):
    """Equal experts up to order, equal spectra."""
    assert float(recovery_error(one.experts, other.experts)) < tolerance
    assert int(one.status) == int(other.status)
    np.testing.assert_allclose(one.second_moment_eigenvalues, other.second_moment_eigenvalues, atol=1e-10)
    np.testing.assert_allclose(np.sort(one.mixing_weights), np.sort(other.mixing_weights), rtol=1e-7)


def test_experts_and_mixing_weights_are_found(baseline):
    params, *_ = drawn("relu")
    assert int(baseline.status) == Status.OK
    assert float(recovery_error(params.experts, baseline.experts)) < 0.02
    np.testing.assert_allclose(np.linalg.norm(baseline.experts, axis=1), 1.0, rtol=1e-12)
    values = np.asarray(baseline.second_moment_eigenvalues)
    assert np.all(np.diff(values) <= 0)
    assert values[K - 1] > 3 * np.abs(values[K:]).max()


def test_population_moments_give_experts_and_mixing_weights_exactly():
    """T2 and T3 from sums of tensor powers, fed through labels that reproduce them on a set of points."""
    rng = np.random.default_rng(0)
    experts = np.array([[1.0, 0.0, 0.0], [0.5, 0.75**0.5, 0.0]])
    mixing = np.array([0.7, 0.3])
    x = rng.normal(size=(200, 3))
    eye = np.eye(3)
    third = np.einsum("na,nb,nc->nabc", x, x, x)
    third -= sum(np.einsum(s, x, eye) for s in ("na,bc->nabc", "nb,ac->nabc", "nc,ab->nabc"))
    labels = []
    for scores, order in ((np.einsum("na,nb->nab", x, x) - eye, 2), (third, 3)):
        target = sum(
            p * functools.reduce(np.multiply.outer, [a] * order) for p, a in zip(mixing, experts, strict=True)
        )
        labels.append(np.linalg.lstsq(scores.reshape(200, -1).T / 200, target.reshape(-1), rcond=None)[0])
    second, high = (jnp.asarray(a) for a in labels)
    found = jax.jit(
        lambda key, x: spectral_estimate(
            key,
            x,
            x[:, 0],
            SpectralTransforms(lambda y: second, lambda y: high, None),
            num_experts=2,
            order=3,
        )
    )(KEY, jnp.asarray(x))
    order = np.asarray(match_experts(experts, found.experts))
    np.testing.assert_allclose(np.asarray(found.experts)[order], experts, atol=1e-8)
    np.testing.assert_allclose(np.asarray(found.mixing_weights)[order], mixing, atol=1e-8)
    assert int(found.status) == Status.OK


def test_permuting_the_rows(baseline):
    _, x, y, weights = drawn("relu")
    order = np.random.default_rng(0).permutation(N)
    same(baseline, estimate(KEY, x[order], y[order], transforms_of("relu"), weights))


def test_rotating_the_inputs_rotates_the_experts(baseline):
    _, x, y, weights = drawn("relu")
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    turned = estimate(KEY, x @ rotation.T, y, transforms_of("relu"), weights)
    same(baseline, turned._replace(experts=turned.experts @ rotation))


@pytest.mark.slow
def test_chunks_and_padding(baseline):
    _, x, y, weights = drawn("relu")
    transforms = transforms_of("relu")
    same(baseline, estimate(KEY, x, y, transforms, weights, chunk_size=4097))
    padded_x = np.concatenate([x, np.full((96, D), np.nan)])
    padded_y, padded_weights = (
        np.concatenate([y, np.full(96, np.inf)]),
        np.concatenate([weights, np.zeros(96)]),
    )
    same(baseline, estimate(KEY, padded_x, padded_y, transforms, padded_weights))


@pytest.mark.slow
def test_score_tensors_of_the_normal_density_change_nothing(baseline):
    _, x, y, weights = drawn("relu")
    log_density = get_log_density("standard_normal")
    same(baseline, estimate(KEY, x, y, transforms_of("relu"), weights, log_density=log_density))


@pytest.mark.slow
def test_inputs_of_a_known_normal_density_need_not_be_whitened():
    """x = R z + mu, y from z: a_z . z = (R^-T a_z) . (x - mu), and the score tensors of x find those directions."""
    params, z, y, weights = drawn("relu")
    rng = np.random.default_rng(5)
    root, mean = np.eye(D) + 0.3 * rng.normal(size=(D, D)), rng.normal(size=D)
    x = z @ root.T + mean
    log_density = normal(mean, root @ root.T).log_density
    found = estimate(KEY, x, y, transforms_of("relu"), weights, log_density=log_density)
    experts = np.linalg.solve(root.T, params.experts.T).T
    assert float(recovery_error(experts, found.experts)) < 0.02
    # without the density the inputs are taken for standard normal, and are not
    assert float(recovery_error(experts, estimate(KEY, x, y, transforms_of("relu"), weights).experts)) > 0.05


def test_restarts_do_not_matter_on_good_data(baseline):
    _, x, y, weights = drawn("relu")
    same(baseline, estimate(jax.random.key(99), x, y, transforms_of("relu"), weights))


@pytest.mark.slow
def test_statuses_on_hopeless_data():
    _, x, y, weights = drawn("relu")
    transforms = transforms_of("relu")
    first = np.arange(N) == 0
    assert int(estimate(KEY, x, np.where(first, np.nan, y), transforms, weights).status) == Status.NOT_FINITE
    # labels whose second moment is negative definite: the transform of order 2 turned around
    negative = transforms._replace(
        second=jax.tree.map(np.negative, jax.device_get(transforms.second))._replace(
            start=transforms.second.start, step=transforms.second.step
        )
    )
    assert int(estimate(KEY, x, y, negative, weights).status) == Status.RANK_DEFICIENT
    # at order 4 a sign that is wrong shows in the eigenvalues
    _, x, y, weights = drawn("abs")
    transforms = transforms_of("abs", 4)
    negative = transforms._replace(
        high=transforms.high._replace(
            values=-np.asarray(transforms.high.values), coefficients=-np.asarray(transforms.high.coefficients)
        )
    )
    result = estimate(KEY, x, y, negative, weights, order=4)
    assert int(result.status) == Status.TENSOR_NOT_POSITIVE
    assert np.all(np.isfinite(result.experts))


@pytest.mark.slow
def test_order_four_finds_experts_of_an_even_activation_up_to_sign():
    params, x, y, weights = drawn("abs")
    result = estimate(KEY, x, y, transforms_of("abs", 4), weights, order=4)
    assert transforms_of("abs", 4).first is None
    assert int(result.status) == Status.OK
    assert float(recovery_error(params.experts, result.experts, even=True)) < 0.02


@pytest.mark.slow
def test_order_four_finds_the_signs_for_an_activation_that_is_not_even():
    params, x, y, weights = drawn("softplus", correlation=-0.5)
    transforms = transforms_of("softplus", 4)
    assert transforms.first is not None
    for key in range(4):  # the power method leaves the signs to chance
        result = estimate(jax.random.key(key), x, y, transforms, weights, order=4)
        assert float(recovery_error(params.experts, result.experts)) < 0.1


@functools.partial(jax.jit, static_argnames=("name", "n", "dim", "num_experts", "polar"))
def squared_errors(keys, transforms, name, n, dim, num_experts, polar):
    """(t,): sum over experts of ||ahat_i - a_i||^2, gates zero: all mixing weights are 1 / k."""

    def one(key):
        keys = jax.random.split(key, 3)
        params = random_params(keys[0], scales(num_experts, 0.0), dim)
        x, y, _ = sample(keys[1], params, name, n)
        found = spectral_estimate(
            keys[2], x, y, transforms, num_experts=num_experts, order=3, num_polar_iterations=polar
        ).experts
        found = found[match_experts(params.experts, found)]
        return jnp.sum((found - params.experts) ** 2)

    return jax.lax.map(one, keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu"])
def test_mean_squared_error_is_as_predicted_and_polar_refinement_lowers_it(name):
    n, dim, k, trials = 40_000, 5, 3, 50
    keys = jax.random.split(jax.random.key(5), trials)
    transforms = transforms_of(name, num_experts=k)
    plain, polar = (
        n / k * np.asarray(squared_errors(keys, transforms, name, n, dim, k, steps)) for steps in (0, 8)
    )
    predicted = predicted_mse(get_activation(name), NOISE, 3, "weighted", dim=dim, num_experts=k)
    standard_error = plain.std() / trials**0.5
    # to first order in 1/n; what is left out is of relative order n MSE / n
    assert abs(plain.mean() - predicted) < 4 * standard_error + 0.1 * predicted
    gain = plain - polar
    assert gain.mean() > 2 * gain.std() / trials**0.5
