"""Small linear algebra: matrices side by side against NumPy's, in both precisions, and without a batched LAPACK call."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.small_linear_algebra import (
    LARGEST_SOLVED,
    cholesky,
    eigh,
    inverse_positive_definite,
    orthonormal_columns,
    polar_factor,
    pseudo_inverse,
    solve,
    solve_positive_definite,
)

BATCH = 3


def everything(positive, general, right):
    """All functions of positive definite and general (..., n, n) and right (..., n); wide matrices get one more column."""
    wide = jnp.concatenate([general, right[..., None]], axis=-1)
    return {
        "cholesky": cholesky(positive),
        "solve_positive_definite": solve_positive_definite(positive, right),
        "inverse": inverse_positive_definite(positive),
        "solve": solve(general, right),
        "solve_many": solve(general, wide),
        "eigh": eigh(general + general.swapaxes(-1, -2)),
        "polar": polar_factor(general),
        "pseudo_inverse": pseudo_inverse(wide),
        "orthonormal": orthonormal_columns(wide.swapaxes(-1, -2)),
    }


compiled = jax.jit(everything)


def matrices(size, condition, dtype, batch=BATCH):
    """Positive definite with that condition number and units of their own, general ones, and vectors."""
    rng = np.random.default_rng(size)
    frames = np.linalg.qr(rng.normal(size=(batch, size, size)))[0]
    scale = np.geomspace(1e-3, 1e3, batch)[:, None, None]
    positive = scale * (frames * np.geomspace(1.0, 1.0 / condition, size)) @ frames.swapaxes(1, 2)
    positive = 0.5 * (positive + positive.swapaxes(1, 2))
    general = rng.normal(size=(batch, size, size)) + 2.0 * frames
    return [a.astype(dtype) for a in (positive, general, rng.normal(size=(batch, size)))]


def size_of(array):
    return np.abs(array).max(axis=tuple(range(1, array.ndim)), keepdims=True)


@pytest.mark.parametrize(("dtype", "condition"), [(np.float64, 1e10), (np.float32, 1e4)])
@pytest.mark.parametrize("size", [1, 5, LARGEST_SOLVED + 1])
def test_matrices_side_by_side_are_as_accurate_as_lapack(size, dtype, condition):
    given = matrices(size, condition, dtype)
    got = jax.tree.map(np.asarray, compiled(*(jnp.asarray(a) for a in given)))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    positive, general, right = (a.astype(np.float64) for a in given)
    got = jax.tree.map(lambda leaf: leaf.astype(np.float64), got)
    rounding = 20 * size * float(np.finfo(dtype).eps)
    wide = np.concatenate([general, right[:, :, None]], axis=2)

    def small(error, scale=1.0):
        assert np.all(np.abs(error) <= rounding * scale), np.max(np.abs(error) / scale) / rounding

    # backward errors: of the size of rounding whatever the condition
    factor = got["cholesky"]
    np.testing.assert_array_equal(factor, np.tril(factor))
    small(factor @ factor.swapaxes(1, 2) - positive, size_of(positive))
    solution = got["solve_positive_definite"][:, :, None]
    small(positive @ solution - right[:, :, None], size_of(positive) * size_of(solution))
    small((positive @ got["inverse"] - np.eye(size)), size_of(positive) * size_of(got["inverse"]))
    solution = got["solve"][:, :, None]
    small(general @ solution - right[:, :, None], size_of(general) * size_of(solution))
    small(general @ got["solve_many"] - wide, size_of(general) * size_of(got["solve_many"]))
    values, vectors = got["eigh"]
    symmetric = general + general.swapaxes(1, 2)
    small(values - np.linalg.eigvalsh(symmetric), size_of(symmetric)[:, :, 0])
    small(symmetric @ vectors - vectors * values[:, None], size_of(symmetric))
    # forward errors, of well conditioned matrices
    left, singular, turn = np.linalg.svd(general)
    small(got["polar"] - left @ turn, 1.0 / singular[:, -1:, None])
    for frame in (vectors, got["polar"], got["orthonormal"]):
        small(frame.swapaxes(1, 2) @ frame - np.eye(size))
    inverse = np.linalg.pinv(wide)
    small(got["pseudo_inverse"] - inverse, np.linalg.cond(wide)[:, None, None] * size_of(inverse))
    frame, triangle = np.linalg.qr(wide.swapaxes(1, 2))
    frame = frame * np.sign(np.diagonal(triangle, axis1=1, axis2=2))[:, None]
    small(got["orthonormal"] - frame, np.linalg.cond(wide)[:, None, None])


def test_one_matrix_and_its_batch_agree():
    given = [jnp.asarray(a) for a in matrices(5, 100.0, np.float64)]
    batch, one = compiled(*given), compiled(*(a[2] for a in given))
    for of in (batch, one):  # eigenvectors have no sign of their own
        values, vectors = of.pop("eigh")
        of["eigenvalues"], of["projections"] = values, vectors[..., :, None, :] * vectors[..., None, :, :]
    for name, all_three in batch.items():
        np.testing.assert_allclose(one[name], all_three[2], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("size", [4, LARGEST_SOLVED + 1])
def test_batches_of_batches_and_what_is_common_to_a_batch(size):
    positive, _, right = (jnp.asarray(a) for a in matrices(size, 100.0, np.float64, 4))
    flat = jax.jit(solve_positive_definite)(positive, right)
    nested = jax.jit(jax.vmap(solve_positive_definite))(
        positive.reshape(2, 2, size, size), right.reshape(2, 2, size)
    )
    np.testing.assert_allclose(nested.reshape(4, size), flat, rtol=1e-10)
    of_one = jax.jit(jax.vmap(solve_positive_definite, in_axes=(None, 0)))(positive[1], right)
    np.testing.assert_allclose(of_one, np.linalg.solve(positive[1], right.T).T, rtol=1e-10)


@pytest.mark.parametrize("size", [4, LARGEST_SOLVED + 1])
def test_no_call_of_lapack_has_a_batch(size):
    given = [jnp.asarray(a) for a in matrices(size, 100.0, np.float64)]
    text = jax.jit(jax.vmap(jax.vmap(everything))).lower(*(a[None] for a in given)).as_text()
    calls = re.findall(r"custom_call @lapack_\w+\(.*\} : \((.*)\) -> ", text)
    assert len(calls) == text.count("@lapack_")
    assert bool(calls) == (size > LARGEST_SOLVED)
    assert not any(re.search(r"tensor<\d+x\d+x\d+x", types) for types in calls)


@pytest.mark.parametrize("size", [3, LARGEST_SOLVED + 1])
def test_a_matrix_that_is_not_positive_definite_is_nan_and_its_neighbours_are_not(size):
    good = np.eye(size)
    negative_last, negative_first, singular = good.copy(), good.copy(), np.ones((size, size))
    negative_last[-1, -1] = negative_first[0, 0] = -1.0
    batch = jnp.asarray(np.stack([good, negative_last, negative_first, singular, np.full_like(good, np.nan)]))
    factor, solution = jax.jit(
        lambda batch: (cholesky(batch), solve_positive_definite(batch, jnp.ones(batch.shape[:2])))
    )(batch)
    np.testing.assert_array_equal(factor[0], good)
    np.testing.assert_array_equal(solution[0], np.ones(size))
    assert np.isnan(np.asarray(solution[1:])).all()
    np.testing.assert_array_equal(factor, np.stack([np.asarray(jnp.linalg.cholesky(one)) for one in batch]))
    assert np.isnan(np.asarray(factor[1:])).any(axis=(1, 2)).all()


def test_singular_and_zero_matrices_side_by_side():
    low = np.random.default_rng(0).normal(size=(2, 5, 2)) @ np.random.default_rng(1).normal(size=(2, 2, 5))
    zero = np.zeros((1, 5, 5))
    batch = jnp.asarray(np.concatenate([low, zero]))
    inverse, (values, vectors), solution = jax.jit(
        lambda batch: (
            pseudo_inverse(batch),
            eigh(batch + batch.swapaxes(1, 2)),
            solve(batch, jnp.ones((3, 5))),
        )
    )(batch)
    np.testing.assert_allclose(inverse[:2], np.linalg.pinv(low), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(inverse[2], 0.0)
    np.testing.assert_array_equal(values[2], 0.0)
    np.testing.assert_allclose(vectors[2], np.eye(5), atol=1e-15)
    assert not np.isfinite(np.asarray(solution[2])).any()
