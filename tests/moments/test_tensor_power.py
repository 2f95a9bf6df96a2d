"""The tensor power method on tensors whose decomposition is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moejax.model.status import Status
from moejax.moments.tensor_power import (
    contract_all_but_one,
    outer_power,
    tensor_power_method,
)

run = jax.jit(tensor_power_method, static_argnames=("num_restarts", "num_iterations", "num_polar_iterations"))


def orthogonal_tensor(rng, values, order):
    vectors = np.linalg.qr(rng.normal(size=(len(values),) * 2))[0]
    tensor = sum(
        value * functools.reduce(np.multiply.outer, [v] * order)
        for value, v in zip(values, vectors, strict=True)
    )
    return tensor, vectors


def symmetric_noise(rng, k, order):
    noise = rng.normal(size=(k,) * order)
    return sum(noise.transpose(axes) for axes in itertools.permutations(range(order))) / np.sqrt(24.0)


def match(vectors, found, order):
    cosines = vectors @ np.asarray(found).T
    cosines = np.abs(cosines) if order == 4 else cosines
    rows, columns = linear_sum_assignment(-cosines)
    return columns, cosines[rows, columns]


def test_contraction_and_outer_power():
    rng = np.random.default_rng(0)
    v = rng.normal(size=3)
    np.testing.assert_allclose(
        outer_power(jnp.asarray(v), 4), np.einsum("a,b,c,d->abcd", v, v, v, v), rtol=1e-13
    )
    tensor = symmetric_noise(rng, 3, 3)
    np.testing.assert_allclose(
        contract_all_but_one(jnp.asarray(tensor), jnp.asarray(v)), np.einsum("abc,b,c->a", tensor, v, v)
    )


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("num_polar_iterations", [0, 8])
def test_orthogonal_tensors_are_recovered_exactly(order, num_polar_iterations):
    rng = np.random.default_rng(1)
    values = np.array([3.0, 1.7, 0.6])
    tensor, vectors = orthogonal_tensor(rng, values, order)
    found = run(jax.random.key(0), jnp.asarray(tensor), num_polar_iterations=num_polar_iterations)
    columns, cosines = match(vectors, found.eigenvectors, order)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(found.eigenvalues)[columns], values, rtol=1e-10)
    assert np.all(np.asarray(found.status) == Status.OK)


def test_equal_eigenvalues_and_one_component():
    rng = np.random.default_rng(2)
    tensor, vectors = orthogonal_tensor(rng, [1.0, 1.0, 1.0], 3)
    found = run(jax.random.key(1), jnp.asarray(tensor))
    np.testing.assert_allclose(match(vectors, found.eigenvectors, 3)[1], 1.0, atol=1e-12)
    single = run(jax.random.key(2), jnp.full((1, 1, 1), 2.5))
    assert float(single.eigenvalues[0]) == pytest.approx(2.5)
    assert float(single.eigenvectors[0, 0]) == pytest.approx(1.0)
    assert int(single.status[0]) == Status.OK


def test_noise_moves_the_answer_by_its_own_size_and_polar_refinement_helps():
    k, size = 3, 0.03
    rng = np.random.default_rng(3)
    for order in (3, 4):
        errors = {0: [], 8: []}
        for trial in range(60):
            tensor, vectors = orthogonal_tensor(rng, np.ones(k), order)
            noisy = jnp.asarray(tensor + size * symmetric_noise(rng, k, order))
            for steps, list_of in errors.items():
                found = run(jax.random.key(trial), noisy, num_polar_iterations=steps)
                assert np.all(np.asarray(found.status) == Status.OK)
                list_of.append(2 * np.sum(1 - match(vectors, found.eigenvectors, order)[1]))
            np.testing.assert_allclose(found.eigenvectors @ found.eigenvectors.T, np.eye(k), atol=1e-10)
        plain, polar = (np.array(errors[steps]) for steps in (0, 8))
        # with equal eigenvalues it averages two estimates of each angle: half the error, less what they share
        gain = plain - polar
        assert gain.mean() > 3 * gain.std() / np.sqrt(gain.size)
        assert 0.3 < polar.mean() / plain.mean() < 0.75
        # each of the k (k - 1) angles without it has the variance of one noise entry, (e_j, e_i, .., e_i)
        entries = np.stack([symmetric_noise(rng, k, order)[(1,) + (0,) * (order - 1)] for _ in range(2000)])
        assert plain.mean() == pytest.approx(k * (k - 1) * size**2 * entries.var(), rel=0.4)


def test_statuses():
    rng = np.random.default_rng(5)
    tensor, _ = orthogonal_tensor(rng, [1.0, 0.5, -0.8], 4)
    found = run(jax.random.key(0), jnp.asarray(tensor))
    assert Status.TENSOR_NOT_POSITIVE in np.asarray(found.status)
    broken = run(jax.random.key(0), jnp.asarray(np.full((3, 3, 3), np.nan)))
    assert np.all(np.asarray(broken.status) == Status.NOT_FINITE)
    zero = run(jax.random.key(0), jnp.zeros((3, 3, 3)))
    assert np.all(np.asarray(zero.status) == Status.TENSOR_NOT_POSITIVE)
    assert np.all(np.isfinite(zero.eigenvectors))
    slow = run(
        jax.random.key(0),
        jnp.asarray(symmetric_noise(rng, 3, 3)),
        num_iterations=1,
        num_restarts=1,
        num_polar_iterations=0,
    )
    assert Status.TENSOR_NOT_CONVERGED in np.asarray(slow.status)


def test_a_bad_lane_leaves_its_neighbours_alone():
    rng = np.random.default_rng(6)
    good, vectors = orthogonal_tensor(rng, [2.0, 1.0, 1.5], 3)
    batch = jnp.asarray(np.stack([good, np.full_like(good, np.nan), good]))
    found = jax.jit(jax.vmap(tensor_power_method))(jax.random.split(jax.random.key(0), 3), batch)
    for lane in (0, 2):
        np.testing.assert_allclose(match(vectors, found.eigenvectors[lane], 3)[1], 1.0, atol=1e-12)
        assert np.all(np.asarray(found.status[lane]) == Status.OK)
    assert np.all(np.asarray(found.status[1]) == Status.NOT_FINITE)


def test_equivariance_under_rotation():
    rng = np.random.default_rng(7)
    tensor, _ = orthogonal_tensor(rng, [2.0, 1.0, 1.5], 3)
    tensor = tensor + 0.05 * symmetric_noise(rng, 3, 3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = np.einsum("abc,ia,jb,kc->ijk", tensor, rotation, rotation, rotation)
    one, other = (run(jax.random.key(0), jnp.asarray(t)) for t in (tensor, turned))
    np.testing.assert_allclose(
        match(np.asarray(one.eigenvectors) @ rotation.T, other.eigenvectors, 3)[1], 1.0, atol=1e-9
    )
