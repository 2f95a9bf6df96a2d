"""Moments against dense score tensors, chunking, padding, permutation, and the population."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import label_transform
from moejax.model.activations import get_activation
from moejax.model.sums import in_parts, sum_over_parts
from moejax.moments.cross_moments import (
    RawMoments,
    power_sums,
    second_moment,
    symmetrised_product,
    whitened_moment,
)

D, K, N = 4, 3, 257


def score_tensors(x):
    """(S_2, S_3, S_4) of one x, dense, by summing over index placements one at a time."""
    d = x.size
    eye = np.eye(d)
    s2 = np.outer(x, x) - eye
    s3, s4 = np.zeros((d,) * 3), np.zeros((d,) * 4)
    for a, b, c in itertools.product(range(d), repeat=3):
        s3[a, b, c] = x[a] * x[b] * x[c] - x[a] * eye[b, c] - x[b] * eye[a, c] - x[c] * eye[a, b]
    for index in itertools.product(range(d), repeat=4):
        value = np.prod(x[list(index)])
        for i, j in itertools.combinations(range(4), 2):
            rest = [index[r] for r in range(4) if r not in (i, j)]
            value -= x[rest[0]] * x[rest[1]] * eye[index[i], index[j]]
        a, b, c, e = index
        s4[index] = value + eye[a, b] * eye[c, e] + eye[a, c] * eye[b, e] + eye[a, e] * eye[b, c]
    return s2, s3, s4


@functools.cache
def data():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(N, D)), rng.normal(size=N)
    weights = rng.uniform(0.2, 2.0, size=N)
    weights[::7] = 0.0
    return x, labels, weights, rng.normal(size=(D, K))


@functools.cache
def dense_scores():
    x = data()[0]
    return tuple(np.stack(s) for s in zip(*(score_tensors(row) for row in x), strict=True))


second = jax.jit(second_moment, static_argnames="chunk_size")
whitened = jax.jit(whitened_moment, static_argnames=("order", "chunk_size"))


def test_dense_score_tensors_are_hermite():
    """The reference itself: diagonal entries are He_m(x_a), and the mean over normal x is zero."""
    x = np.array([0.7, -1.1, 0.2, 1.9])
    s2, s3, s4 = score_tensors(x)
    a = np.arange(D)
    np.testing.assert_allclose(s2[a, a], x**2 - 1)
    np.testing.assert_allclose(s3[a, a, a], x**3 - 3 * x, atol=1e-14)
    np.testing.assert_allclose(s4[a, a, a, a], x**4 - 6 * x**2 + 3, atol=1e-14)
    assert s4[0, 0, 1, 1] == pytest.approx((x[0] ** 2 - 1) * (x[1] ** 2 - 1))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_moments_equal_the_dense_tensors_contracted(weighted, chunk_size):
    x, labels, weights, w = data()
    weights = weights if weighted else np.ones(N)
    given = jnp.asarray(weights) if weighted else None
    mean = functools.partial(np.einsum, "n,n...->...", weights * labels / weights.sum())
    s2, s3, s4 = dense_scores()
    t2 = second(jnp.asarray(x), jnp.asarray(labels), given, chunk_size=chunk_size)
    np.testing.assert_allclose(t2, mean(s2), atol=1e-13)
    for order, s, path in ((3, s3, "abc,ai,bj,ck->ijk"), (4, s4, "abcd,ai,bj,ck,dl->ijkl")):
        expected = np.einsum(path, mean(s), *[w] * order)
        got = np.asarray(
            whitened(
                jnp.asarray(x), jnp.asarray(labels), jnp.asarray(w), given, order=order, chunk_size=chunk_size
            )
        )
        np.testing.assert_allclose(got, expected, atol=1e-12 * np.abs(expected).max() * 10)
        for axes in itertools.permutations(range(order)):
            np.testing.assert_allclose(got, got.transpose(axes), atol=1e-12 * np.abs(got).max())


@pytest.mark.parametrize("num_used", [3000, 5000])
def test_parts_without_weight_are_skipped_and_change_nothing(num_used):
    """More rows than one part holds; the sums are NumPy's."""
    rng = np.random.default_rng(4)
    x, labels, whitening = rng.normal(size=(5000, D)), rng.normal(size=5000), data()[3]
    weights = np.where(np.arange(5000) < num_used, rng.uniform(0.2, 2.0, 5000), 0.0)
    product = (weights * labels)[:, None] * x
    expected = (product.T @ x - (weights @ labels) * np.eye(D)) / weights.sum()
    np.testing.assert_allclose(second(x, labels, weights), expected, atol=1e-12)
    p = x @ whitening
    metric, low = whitening.T @ whitening, (weights * labels) @ p
    high = np.einsum("n,na,nb,nc->abc", weights * labels, p, p, p)
    low_part = np.einsum("a,bc->abc", low, metric)
    low_part = low_part + low_part.transpose(1, 0, 2) + low_part.transpose(1, 2, 0)
    got = whitened(x, labels, whitening, weights, order=3)
    np.testing.assert_allclose(got, (high - low_part) / weights.sum(), atol=1e-11)


@pytest.mark.parametrize("junk", [0.0, 1e30, np.nan, np.inf])
def test_rows_of_zero_weight_change_nothing(junk):
    x, labels, weights, w = data()
    padded_x = np.concatenate([x, np.full((43, D), junk)])
    padded_labels, padded_weights = (
        np.concatenate([labels, np.full(43, junk)]),
        np.concatenate([weights, np.zeros(43)]),
    )
    padded = [jnp.asarray(a) for a in (padded_x, padded_labels)]
    plain = [jnp.asarray(a) for a in (x, labels)]
    for chunk_size in (None, 100):
        got = second(*padded, jnp.asarray(padded_weights), chunk_size=chunk_size)
        np.testing.assert_allclose(got, second(*plain, jnp.asarray(weights), chunk_size=None), atol=1e-13)
        for order in (3, 4):
            got = whitened(
                *padded, jnp.asarray(w), jnp.asarray(padded_weights), order=order, chunk_size=chunk_size
            )
            expected = whitened(*plain, jnp.asarray(w), jnp.asarray(weights), order=order, chunk_size=None)
            np.testing.assert_allclose(got, expected, atol=1e-12 * np.abs(expected).max() * 10)


def test_permutation_of_rows():
    x, labels, weights, w = data()
    order = np.random.default_rng(1).permutation(N)
    one = whitened(*(jnp.asarray(a) for a in (x, labels, w, weights)), order=4)
    other = whitened(*(jnp.asarray(a) for a in (x[order], labels[order], w, weights[order])), order=4)
    np.testing.assert_allclose(one, other, atol=1e-12 * np.abs(one).max())


def test_whole_weights_are_repetitions():
    x, labels, _, w = data()
    counts = np.random.default_rng(2).integers(0, 3, N)
    weighted = whitened(*(jnp.asarray(a) for a in (x, labels, w, counts.astype(float))), order=3)
    rows = np.repeat(np.arange(N), counts)
    expected = (
        np.einsum("n,nabc,ai,bj,ck->ijk", labels[rows], dense_scores()[1][rows], w, w, w, optimize=True)
        / rows.size
    )
    np.testing.assert_allclose(weighted, expected, atol=1e-11)


def test_power_sums_of_two_parts_add_up():
    x, labels, weights, _ = (jnp.asarray(a) for a in data())
    sums = jax.jit(lambda *parts: power_sums(*parts, (1, 2, 3, 4)))
    whole = sums(x, labels, weights)
    assert isinstance(whole, RawMoments)
    parts = [sums(x[s], labels[s], weights[s]) for s in (slice(0, 100), slice(100, None))]
    merged = jax.tree.map(jnp.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), merged, whole)
    third = np.einsum("n,na,nb,nc->abc", weights * labels, x, x, x)
    np.testing.assert_allclose(whole.powers[2], third, atol=1e-10)


def test_symmetrised_product_is_symmetric_and_counts_placements():
    rng = np.random.default_rng(3)
    v, b = rng.normal(size=3), rng.normal(size=(3, 3))
    m = jnp.asarray(b @ b.T)
    b = jnp.asarray(b + b.T)
    products = jax.jit(
        lambda v, b, m: (symmetrised_product(v, m), symmetrised_product(b, m), symmetrised_product(m, m))
    )
    third, mixed, fourth = (np.asarray(a) for a in products(jnp.asarray(v), b, m))
    for product, order in ((third, 3), (mixed, 4), (fourth, 4)):
        for axes in itertools.permutations(range(order)):
            np.testing.assert_allclose(product, product.transpose(axes), atol=1e-13)
    # contracted with one vector u on all sides: 3 (v.u)(u'Mu), 6 (u'Bu)(u'Mu), 3 (u'Mu)^2
    u = rng.normal(size=3)
    bu, mu = u @ b @ u, u @ m @ u
    assert np.einsum("abc,a,b,c", third, u, u, u) == pytest.approx(3 * (v @ u) * mu)
    assert np.einsum("abcd,a,b,c,d", mixed, u, u, u, u) == pytest.approx(6 * bu * mu)
    assert np.einsum("abcd,a,b,c,d", fourth, u, u, u, u) == pytest.approx(3 * mu**2)


def test_sums_over_parts_take_any_size_of_a_part_and_none_arrays():
    a, b = np.arange(10.0), np.ones(10)

    def sums_of(a, b, nothing):
        assert nothing is None
        return {"product": (a * b).sum(), "weight": b.sum()}

    @functools.partial(jax.jit, static_argnums=2)
    def sums(a, b, part_size):
        return sum_over_parts(sums_of, in_parts((a, b, None), part_size))

    for part_size in (None, 1, 3, 10, 99):
        assert jax.tree.map(float, sums(a, b, part_size)) == {"product": 45.0, "weight": 10.0}


def grid(num_nodes, half_width):
    nodes = np.linspace(-half_width, half_width, num_nodes)
    density = np.exp(-0.5 * nodes**2)
    return nodes, density / density.sum()


@pytest.mark.parametrize("name", ["softplus", "cos"])
def test_population_moments_are_sums_of_tensor_powers_of_the_experts(name):
    """E[l(y) S_m(x)] = sum_i E[P_i] a_i^{(x) m}, by quadrature over x in R^3.

    The experts span the first two coordinates and are not orthogonal; the gate lies along the third, with a bias.
    """
    noise_std, fn = 0.3, get_activation(name)
    nodes, node_weights = grid(61, 7.0)
    gate_nodes, gate_node_weights = grid(31, 6.0)
    x = np.stack(np.meshgrid(nodes, nodes, gate_nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    weights = np.einsum("a,b,c->abc", node_weights, node_weights, gate_node_weights).reshape(-1)
    kept = weights > 1e-12
    x, weights = x[kept], weights[kept]
    experts = np.array([[1.0, 0.0, 0.0], [0.5, 0.75**0.5, 0.0]])
    gate = 1 / (1 + np.exp(-(1.5 * x[:, 2] + 0.6)))
    gates = np.stack([gate, 1 - gate])
    mixing = gates @ weights
    assert abs(mixing[0] - mixing[1]) > 0.1
    projection = np.array([[1.0, 0.2], [-0.4, 0.8], [0.3, -0.5]])
    noise, noise_weights = grid(61, 7.0)
    t = np.linspace(-11.0, 11.0, 4001)
    g = np.asarray(jax.vmap(fn)(jnp.asarray(t)))
    for order in (2, 3, 4) if name == "softplus" else (2, 4):
        transform = label_transform(name, noise_std, order, "least_norm")
        mean_label = (
            np.asarray(jax.jit(transform.__call__)(jnp.asarray(g[:, None] + noise_std * noise[None])))
            @ noise_weights
        )
        labels = sum(p * np.interp(x @ a, t, mean_label) for p, a in zip(gates, experts, strict=True))
        powers = experts @ projection
        if order == 2:
            got = (
                projection.T
                @ np.asarray(second(*(jnp.asarray(a) for a in (x, labels, weights))))
                @ projection
            )
            expected = np.einsum("i,ia,ib->ab", mixing, powers, powers)
        else:
            got = np.asarray(
                whitened(*(jnp.asarray(a) for a in (x, labels, projection, weights)), order=order)
            )
            subscripts = "i,ia,ib,ic->abc" if order == 3 else "i,ia,ib,ic,id->abcd"
            expected = np.einsum(subscripts, mixing, *[powers] * order)
        np.testing.assert_allclose(got, expected, atol=1e-3, err_msg=f"{name} order {order}")
        assert np.abs(expected).max() > 0.3
