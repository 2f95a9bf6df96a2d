"""Residual passes: the expectation they take away, their fixed point, and what they do where gates are not orthogonal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import align, make_params, match_experts, recovery_error, results_on_the_host, sample
from scipy import special

from moejax.methods import MethodConfig, Problem, get_method
from moejax.methods.preparation import transform_kind
from moejax.methods.residual_passes import GATING_STEPS, conditional_means, residual_estimate, residual_labels
from moejax.model.activations import get_activation
from moejax.model.mixture import MoEParams
from moejax.model.status import Status
from moejax.moments.spectral import (
    SpectralLabels,
    TensorPart,
    estimate_from_labels,
    host_transforms,
    spectral_estimate,
)

pytestmark = pytest.mark.slow

D, K, NOISE = 5, 2, 0.1
KEY = jax.random.key(0)


@functools.cache
def transforms_of(name, order=3, noise_std=NOISE, kind="weighted"):
    return jax.tree.map(jnp.asarray, host_transforms(name, noise_std, order, kind, K))


@functools.cache
def truth() -> MoEParams:
    """Experts that are not orthogonal, and a gate that is not orthogonal to them."""
    experts = np.zeros((K, D))
    experts[0, 0], experts[1, :2] = 1.0, (0.3, 0.91**0.5)
    gating = np.zeros((K, D))
    gating[0, :3] = (3.0, -3.0, 1.0)
    return make_params(experts, gating, NOISE)


def table_mean(transform, g, noise_std):
    """E[l(g + sigma N)] of the table that is applied, by 4001 nodes over the noise and numpy's interpolation."""
    noise = np.linspace(-8.0, 8.0, 4001)
    density = np.exp(-0.5 * noise**2)
    y = np.asarray(g)[..., None] + noise_std * noise
    start, step, table, coefficients = (np.asarray(leaf) for leaf in transform[:4])
    values = np.interp(y, start + step * np.arange(table.size), table)
    values = values + np.polynomial.polynomial.polyval(y, coefficients)
    return values @ (density / density.sum())


@pytest.mark.parametrize(
    ("name", "kind"), [("relu", "weighted"), ("tanh", "weighted"), ("linear", "polynomial")]
)
def test_conditional_means_are_the_expected_labels(name, kind):
    """Also at a noise level that is traced and not the one the transforms are made for."""
    transforms = transforms_of(name, kind=kind)[:2]
    fn, levels = get_activation(name), np.array([NOISE, 0.37])
    z = np.random.default_rng(0).normal(size=(2, 300)) * 1.5
    means = jax.jit(lambda levels, z: conditional_means(transforms, levels, fn=fn)(z))
    got = np.asarray(means(jnp.asarray(levels), jnp.asarray(z)))
    for transform, of_transform in zip(transforms, got, strict=True):
        for noise_std, points, mean in zip(levels, z, of_transform, strict=True):
            expected = table_mean(transform, jax.vmap(fn)(jnp.asarray(points)), noise_std)
            assert np.abs(mean - expected).max() < 3e-4 * np.abs(expected).max()


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_residual_labels_are_labels_less_their_expectation(chunk_size):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(150, D)), rng.normal(size=150)
    params = truth()._replace(expert_bias=np.asarray([0.2, -0.4]), gating_bias=np.asarray([0.5, 0.0]))
    transforms = transforms_of("softplus", 4)
    labels = jax.jit(functools.partial(residual_labels, fn=get_activation("softplus"), chunk_size=chunk_size))
    got = jax.device_get(labels(params, x, y, transforms, 1.0))
    plain = jax.device_get(labels(params, x, y, transforms, 0.0))
    gate = 1 / (1 + np.exp(-(x @ np.asarray(params.gating)[0] + 0.5)))
    means = np.log1p(np.exp(x @ np.asarray(params.experts).T + np.asarray(params.expert_bias)))
    assert transforms.first is not None
    for transform, before, after in zip(
        (transforms.second, transforms.high, transforms.first), plain, got, strict=True
    ):
        label = table_mean(transform, y, 1e-12)
        expected = gate * table_mean(transform, means[:, 0], NOISE)
        expected += (1 - gate) * table_mean(transform, means[:, 1], NOISE)
        np.testing.assert_allclose(before, label, atol=1e-9 * np.abs(label).max())
        np.testing.assert_allclose(after, label - expected, atol=1e-4 * np.abs(label).max())


def test_added_part_is_a_sum_of_tensor_powers():
    rng = np.random.default_rng(2)
    experts, mixing, w = rng.normal(size=(K, D)), rng.uniform(size=K), rng.normal(size=(D, 3))
    part, a = TensorPart(experts, mixing), experts @ w
    contracted = jax.jit(TensorPart.contracted, static_argnums=2)
    np.testing.assert_allclose(contracted(part, None, 1), mixing @ experts)
    np.testing.assert_allclose(contracted(part, None, 2), np.einsum("i,ia,ib->ab", mixing, experts, experts))
    expected = np.einsum("i,ia,ib,ic,id->abcd", mixing, a, a, a, a)
    np.testing.assert_allclose(contracted(part, w, 4), expected)


@pytest.mark.parametrize("order", [3, 4])
def test_labels_without_a_residual_give_back_the_experts(order):
    experts = jnp.asarray(np.asarray(truth().experts) * [[1.0], [-1.0]])
    part = TensorPart(experts, jnp.asarray([0.7, 0.3]))
    zeros = jnp.asarray(np.zeros(40))
    labels = SpectralLabels(zeros, zeros, zeros if order == 4 else None)
    found = jax.jit(lambda x: estimate_from_labels(KEY, x, labels, None, part, num_experts=K, order=order))(
        np.ones((40, D))
    )
    same = np.asarray(match_experts(experts, found.experts))
    np.testing.assert_allclose(np.asarray(found.experts)[same], experts, atol=1e-9)
    np.testing.assert_allclose(np.asarray(found.mixing_weights)[same], part.mixing_weights, atol=1e-9)


@functools.cache
def drawn(name, n=40_000):
    x, y, _ = sample(jax.random.key(1), truth(), name, n)
    return x, y, jnp.asarray(np.ones(n))


@results_on_the_host
@functools.partial(jax.jit, static_argnames=("name", "num_passes", "order", "noise", "chunk_size"))
def estimate(
    x, y, weights, transforms, noise_std, name, num_passes=3, order=3, noise="shared", chunk_size=None
):
    return residual_estimate(
        KEY,
        x,
        y,
        transforms,
        weights,
        noise_std,
        fn=get_activation(name),
        num_experts=K,
        order=order,
        num_passes=num_passes,
        noise=noise,
        chunk_size=chunk_size,
    )


def test_passes_remove_the_bias_of_gates_that_are_not_orthogonal():
    x, y, weights = drawn("relu")
    transforms = transforms_of("relu")
    found = estimate(x, y, weights, transforms, jnp.asarray(NOISE), "relu", chunk_size=4096)
    plain = jax.jit(lambda x, y: spectral_estimate(KEY, x, y, transforms, num_experts=K, order=3))(x, y)
    errors = [float(recovery_error(truth().experts, experts)) for experts in found.experts]
    # the first is the plain estimate, from another key
    assert float(recovery_error(found.experts[0], plain.experts)) < 1e-9
    assert errors[0] > 0.0015
    assert errors[-1] < 0.2 * errors[0]
    assert int(found.best_pass) == int(np.argmax(found.log_likelihoods))
    np.testing.assert_array_equal(found.params.experts, found.experts[found.best_pass])
    np.testing.assert_allclose(np.linalg.norm(found.params.experts, axis=1), 1.0)
    fitted = align(truth(), found.params)
    assert np.linalg.norm(np.asarray(fitted.gating) - truth().gating) < 0.4
    np.testing.assert_allclose(fitted.noise_std, NOISE, rtol=0.05)
    gates = special.softmax(np.asarray(x) @ np.asarray(truth().gating).T, axis=1).mean(axis=0)
    same = np.asarray(match_experts(truth().experts, found.params.experts))
    np.testing.assert_allclose(np.asarray(found.mixing_weights)[same], gates, atol=0.01)
    assert bool(found.converged)
    assert int(found.spectral.status) == Status.OK
    assert int(np.isfinite(found.history).sum()) == int(found.num_steps)


def test_the_method_restores_a_known_noise_and_takes_padding():
    x, y, weights = drawn("relu", 4000)
    junk = [
        np.concatenate([a, np.full((96, *a.shape[1:]), fill)])
        for a, fill in ((x, np.nan), (y, np.inf), (weights, 0.0))
    ]
    config = MethodConfig(get_activation("relu"), K, 3, noise="known", num_residual_passes=1, chunk_size=1000)
    results = [
        jax.jit(lambda problem, name=name: get_method(name)(KEY, problem, config))(
            Problem(*arrays, jnp.asarray(NOISE), transforms_of("relu"))
        )
        for name, arrays in (("spectral_residual", (x, y, weights)), ("spectral", junk))
    ]
    for result in results:
        np.testing.assert_array_equal(result.params.noise_std, NOISE)
        assert int(result.status) in (Status.OK, Status.NOT_CONVERGED)
        assert result.history.shape == (2 * GATING_STEPS,)
        assert np.abs(np.asarray(result.params.gating)[0]).max() > 0.1
        assert float(np.sum(result.mixing_weights)) == pytest.approx(1.0)
    # `spectral` with that option is the same method, and samples without weight change nothing
    np.testing.assert_allclose(results[0].params.experts, results[1].params.experts, atol=1e-6)
    np.testing.assert_allclose(results[0].params.gating, results[1].params.gating, atol=1e-5)


def test_order_four_has_residual_passes_with_signs():
    x, y, weights = drawn("softplus", 100_000)
    found = estimate(x, y, weights, transforms_of("softplus", 4), jnp.asarray(NOISE), "softplus", order=4)
    errors = [float(recovery_error(truth().experts, experts)) for experts in found.experts]
    assert errors[-1] < min(3e-4, errors[0])


def test_the_noise_of_each_expert_is_found():
    params = truth()._replace(noise_std=np.asarray([0.1, 0.5]))
    x, y, _ = sample(jax.random.key(4), params, "tanh", 100_000)
    transforms = transforms_of("tanh", noise_std=0.3)
    found = estimate(x, y, np.ones(100_000), transforms, jnp.asarray(0.3), "tanh", 5, noise="per_expert")
    fitted = align(params, found.params)
    np.testing.assert_allclose(fitted.noise_std, params.noise_std, rtol=0.03)
    errors = [float(recovery_error(params.experts, experts)) for experts in found.experts]
    assert errors[-1] < 3e-3


def test_residual_passes_take_relaxed_transforms_by_default():
    assert transform_kind(None, "spectral_residual") == "relaxed"
    assert transform_kind(None, "spectral", 3) == "relaxed"
    assert transform_kind(None, "spectral_residual", 0) == transform_kind(None, "multistart") == "weighted"
    assert transform_kind("centred", "spectral_residual") == "centred"
