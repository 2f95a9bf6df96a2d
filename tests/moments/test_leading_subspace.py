"""The leading eigenpairs of T2 without T2: against a dense decomposition, and invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.sums import sum_over_rows
from moejax.moments.leading_subspace import leading_subspace, second_moment_product

N, D, K = 3000, 150, 2
BLOCKS = 16
"""So few that the Krylov space does not fill all dimensions: (K + 4) * BLOCKS < D."""


@functools.cache
def planted():
    """Inputs, and labels whose T2 has two eigenvalues near 0.5 above the noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(N, D))
    y = np.where(random.random(N) < 0.5, x[:, 0], x[:, 1]) + 0.1 * random.normal(size=N)
    return x, (y**2 - 1.01) / 2.0


def dense(x, labels, weights):
    """T2 as a matrix."""
    share = weights / weights.sum()
    return np.einsum("n,ni,nj->ij", share * labels, x, x, optimize=True) - share @ labels * np.eye(x.shape[1])


@functools.partial(jax.jit, static_argnames=("num_vectors", "num_blocks", "tolerance", "chunk_size"))
def leading(key, x, labels, weights=None, num_vectors=K, num_blocks=BLOCKS, tolerance=1e-6, chunk_size=None):
    return leading_subspace(
        key,
        x,
        labels,
        weights,
        num_vectors=num_vectors,
        num_blocks=num_blocks,
        tolerance=tolerance,
        chunk_size=chunk_size,
    )


KEY = jax.random.key(0)


@pytest.mark.parametrize("chunk_size", [None, 700])
def test_it_agrees_with_a_dense_decomposition(chunk_size):
    x, labels = planted()
    values, vectors = np.linalg.eigh(dense(x, labels, np.ones(N)))
    found = leading(KEY, x, labels, chunk_size=chunk_size)
    assert bool(found.converged)
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:K], rtol=1e-9)
    cosines = np.linalg.svd(vectors[:, -K:].T @ np.asarray(found.eigenvectors), compute_uv=False)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-9)
    np.testing.assert_allclose(found.eigenvectors.T @ found.eigenvectors, np.eye(K), atol=1e-12)
    # a Ritz value is at most the eigenvalue of its rank
    assert float(found.next_eigenvalue) <= values[-K - 1] + 1e-12
    assert float(found.next_eigenvalue) == pytest.approx(values[-K - 1], rel=1e-2)
    assert int(found.num_products) == int(found.num_passes) * (K + 4) < BLOCKS * (K + 4)


def test_the_residuals_are_those_of_its_pairs():
    x, labels = planted()
    found = leading(KEY, x, labels, tolerance=1e-2)
    vectors = np.asarray(found.eigenvectors)
    error = dense(x, labels, np.ones(N)) @ vectors - vectors * np.asarray(found.eigenvalues)
    np.testing.assert_allclose(found.residuals, np.linalg.norm(error, axis=0), rtol=1e-6)
    assert float(found.residuals.max()) <= 1e-2 * float(found.eigenvalues[0])


def test_the_largest_eigenvalues_are_the_largest_algebraically():
    """A large negative eigenvalue is not taken."""
    x, labels = planted()
    values = np.linalg.eigvalsh(dense(x, -labels, np.ones(N)))
    assert -values[0] > 2 * values[-1]
    found = leading(KEY, x, -labels, num_blocks=24, tolerance=1e-3)
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:K], rtol=1e-4)


def test_few_inputs_are_decomposed_densely():
    x, labels = planted()
    found = leading(KEY, x[:, :8], labels, num_vectors=3)
    values = np.linalg.eigvalsh(dense(x[:, :8], labels, np.ones(N)))
    np.testing.assert_allclose([*found.eigenvalues, found.next_eigenvalue], values[::-1][:4], rtol=1e-10)
    assert int(found.num_passes) == 1
    everything = leading(KEY, x[:, :3], labels, num_vectors=3)
    assert np.isnan(float(everything.next_eigenvalue))


def test_rows_of_weight_zero_may_hold_any_values_and_weights_are_repetitions():
    x, labels = planted()
    counts = np.random.default_rng(1).integers(0, 4, N).astype(float)
    junk = counts == 0
    dirty_x, dirty_labels = np.where(junk[:, None], np.nan, x), np.where(junk, np.inf, labels)
    repeated = np.repeat(np.arange(N), counts.astype(int))
    weighted = leading(KEY, dirty_x, dirty_labels, counts)
    plain = leading(KEY, x[repeated], labels[repeated])
    np.testing.assert_allclose(weighted.eigenvalues, plain.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(weighted.eigenvectors, plain.eigenvectors, atol=1e-6)


def test_it_turns_with_the_inputs():
    x, labels = planted()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
    found, turned = leading(KEY, x, labels), leading(KEY, x @ turn, labels)
    np.testing.assert_allclose(turned.eigenvalues, found.eigenvalues, rtol=1e-9)
    cosines = np.abs(np.sum(np.asarray(turned.eigenvectors) * (turn.T @ found.eigenvectors), axis=0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-8)


def test_single_precision_and_side_by_side():
    x, labels = planted()
    values = np.linalg.eigvalsh(dense(x, labels, np.ones(N)))[::-1][:K]
    x, labels = x.astype(np.float32), labels.astype(np.float32)
    found = leading(KEY, x, labels, tolerance=1e-3)
    assert found.eigenvectors.dtype == jnp.float32
    assert bool(found.converged)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-4)
    several = jax.vmap(lambda sign: leading(KEY, x, sign * labels, tolerance=1e-3))(np.float32([1.0, 0.5]))
    np.testing.assert_allclose(several.eigenvalues[0], values, rtol=1e-4)
    np.testing.assert_allclose(several.eigenvalues[1], values / 2, rtol=1e-4)


def test_values_that_are_not_finite_do_not_converge():
    x, labels = planted()
    found = leading(KEY, x, np.where(np.arange(N) == 5, np.nan, labels))
    assert not bool(found.converged)


def test_no_array_of_d_squared_entries_is_formed():
    dim = 4000
    shapes = (jax.ShapeDtypeStruct((256, dim), jnp.float32), jax.ShapeDtypeStruct((256,), jnp.float32))
    compiled = leading.lower(KEY, *shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * dim**2


@pytest.mark.parametrize("part_size", [1, 7, 50, 64, 1000])
def test_a_sum_over_rows_is_that_of_all_rows(part_size):
    rows = np.arange(50.0)
    values = np.random.default_rng(3).normal(size=(50, 3))
    total = sum_over_rows(
        lambda a, b: (a @ b, b.sum(axis=0)), (jnp.asarray(rows), jnp.asarray(values)), part_size
    )
    np.testing.assert_allclose(total[0], rows @ values, rtol=1e-12)
    np.testing.assert_allclose(total[1], values.sum(axis=0), rtol=1e-12)


def test_a_product_is_that_of_the_matrix():
    x, labels = planted()
    vectors = np.random.default_rng(4).normal(size=(D, 3))
    weights = np.random.default_rng(5).random(N)
    arrays = (jnp.asarray(a) for a in (x, labels, vectors, weights))
    product = second_moment_product(*arrays, chunk_size=999)
    np.testing.assert_allclose(product, dense(x, labels, weights) @ vectors, atol=1e-12)
