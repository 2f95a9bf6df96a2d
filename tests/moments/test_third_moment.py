"""Experts from the third moment alone, against dense tensors and tensors with known components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sample
from moejax.methods.preparation import third_transform_at
from moejax.model.metrics import recovery_error
from moejax.model.mixture import MoEParams
from moejax.moments import third_moment
from moejax.moments.third_moment import (
    contraction,
    decompose_third_moment,
    leading_span,
    num_contractions,
    third_moment_estimate,
)

RNG = np.random.default_rng(0)


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def dense_third_moment(x, labels, weights):
    """mean[l (x (x) x (x) x - sym_3(x (x) I))], (d, d, d)."""
    share, eye = weights / weights.sum(), np.eye(x.shape[1])
    first = np.einsum("n,na->a", share * labels, x)
    cube = np.einsum("n,na,nb,nc->abc", share * labels, x, x, x)
    return cube - sum(np.einsum(s, first, eye) for s in ("a,bc->abc", "b,ac->abc", "c,ab->abc"))


def sin_of_twice(t):
    return jnp.sin(2 * t)


def test_contractions_and_span_are_those_of_the_dense_tensor():
    n, d, k = 257, 5, 3
    x, labels, weights = RNG.standard_normal((n, d)), RNG.standard_normal(n), RNG.uniform(0, 2, n)
    weights[-7:] = 0.0
    dense = dense_third_moment(x, labels, weights)
    padded = x.copy()
    padded[-7:] = np.nan  # rows of weight zero may hold anything
    u = RNG.standard_normal(d)
    arrays = [jnp.asarray(a) for a in (padded, labels)]
    np.testing.assert_allclose(
        contraction(*arrays, jnp.asarray(u), jnp.asarray(weights)), dense @ u, atol=1e-10
    )
    values, basis = leading_span(
        jax.random.key(0), *arrays, jnp.asarray(weights), num_vectors=k, chunk_size=100
    )
    left, singular, _ = np.linalg.svd(dense.reshape(d, d * d), full_matrices=False)
    np.testing.assert_allclose(values, singular, rtol=1e-8)
    np.testing.assert_allclose(np.abs(left[:, :k].T @ np.asarray(basis)), np.eye(k), atol=1e-8)


def test_many_inputs_take_random_contractions(monkeypatch):
    monkeypatch.setattr(third_moment, "MOST_DIRECTIONS", 6)
    n, d, k = 60_000, 12, 2
    assert num_contractions(d) == 6
    experts = unit(RNG.standard_normal((k, d)))
    x = RNG.standard_normal((n, d))
    labels = ((x @ experts.T) ** 3).sum(axis=1) / 6  # E[l S_3] = sum_i a_i^{(x) 3}
    _, basis = leading_span(jax.random.key(1), jnp.asarray(x), jnp.asarray(labels), num_vectors=k)
    inside = experts @ np.asarray(basis)
    assert (inside**2).sum(axis=1).min() > 0.98


@pytest.mark.parametrize("k", [1, 2, 4])
def test_components_that_are_not_orthogonal_are_found(k):
    rng = np.random.default_rng(k)
    vectors = unit(np.eye(k) + 0.3 * rng.standard_normal((k, k)))
    shares = rng.uniform(0.1, 0.5, k)
    tensor = np.einsum("i,ia,ib,ic->abc", shares, vectors, vectors, vectors)
    found = decompose_third_moment(jax.random.key(2), jnp.asarray(1e-3 * tensor))
    cosines = vectors @ np.asarray(found.vectors).T
    order = cosines.argmax(axis=1)
    assert sorted(order) == list(range(k))
    np.testing.assert_allclose(cosines.max(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.coefficients)[order], 1e-3 * shares, rtol=1e-3)
    assert abs(float(found.residual)) < 1e-9 * float((tensor**2).sum())


def test_a_zero_tensor_gives_finite_components():
    found = decompose_third_moment(jax.random.key(3), jnp.zeros((3, 3, 3)), num_tries=2)
    assert np.isfinite(np.asarray(found.vectors)).all()


def test_vmap_is_the_loop():
    vectors = unit(np.eye(3)[None] + 0.2 * np.random.default_rng(5).standard_normal((2, 3, 3)))
    tensors = jnp.asarray(np.einsum("tia,tib,tic->tabc", vectors, vectors, vectors))
    keys = jax.random.split(jax.random.key(4), 2)
    many = jax.vmap(decompose_third_moment)(keys, tensors)
    for i in range(2):
        one = decompose_third_moment(keys[i], tensors[i])
        np.testing.assert_allclose(many.coefficients[i], one.coefficients, rtol=1e-5)
        np.testing.assert_allclose(many.vectors[i], one.vectors, atol=1e-5)


def test_experts_of_an_activation_without_a_second_moment_are_found():
    """sin(2 t): E[He_2(Z) | Y] is nearly constant. The labels are scaled by their transform so that c_3 = 1: shares are E[P_i]."""
    n, d, k = 40_000, 8, 3
    experts = np.eye(k, d) + 0.2 * np.eye(k, d, 1)
    zeros = jnp.zeros(k)
    params = MoEParams(jnp.asarray(unit(experts)), jnp.zeros((k, d)), jnp.full(k, 0.1), zeros, zeros)
    x, y, _ = sample(jax.random.key(5), params, sin_of_twice, n)
    labels = jax.tree.map(jnp.asarray, third_transform_at(sin_of_twice, 0.1, k))(y)
    found = third_moment_estimate(jax.random.key(6), x, labels, num_experts=k)
    assert float(recovery_error(params.experts, found.experts)) < 0.02
    np.testing.assert_allclose(found.mixing_weights, 1 / k, atol=0.08)
    assert 0 <= float(found.residual) < 0.2
