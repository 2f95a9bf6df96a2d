"""Recovery metrics against brute force and SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import align, gating_error, make_params, match_experts, permute_experts, recovery_error
from scipy.optimize import linear_sum_assignment

from moejax.model.metrics import bottleneck_assignment, expert_distances

bottleneck = jax.jit(bottleneck_assignment)
distances = jax.jit(expert_distances, static_argnames="even")


def brute_force(true, estimated, even):
    """1 - max over injections of min_i cos, over all of them."""
    true, estimated = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (true, estimated))
    cosines = true @ estimated.T
    cosines = np.abs(cosines) if even else cosines
    rows = range(len(true))
    return 1 - max(
        min(cosines[i, p[i]] for i in rows) for p in itertools.permutations(range(len(estimated)), len(true))
    )


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_recovery_error_is_the_bottleneck(k, even):
    rng = np.random.default_rng(k)
    for noise in (0.1, 1.0, 10.0):
        true = rng.normal(size=(k, 4)) * rng.uniform(0.1, 5.0, size=(k, 1))
        signs = rng.choice([-1.0, 1.0], size=(k, 1)) if even else 1.0
        estimated = signs * (true + noise * rng.normal(size=(k, 4)))[rng.permutation(k)]
        expected = brute_force(true, estimated, even)
        assert float(recovery_error(true, estimated, even=even)) == pytest.approx(expected, abs=1e-12)


def test_bottleneck_assignment_is_an_assignment_that_reaches_its_value():
    rng = np.random.default_rng(0)
    for shape in ((5, 5), (8, 8), (3, 5), (2, 9)):
        costs = rng.uniform(size=shape)
        value, assignment = bottleneck(jnp.asarray(costs))
        assignment = np.asarray(assignment)
        assert len(set(assignment.tolist())) == shape[0]
        assert costs[np.arange(shape[0]), assignment].max() == pytest.approx(float(value))
        if shape != (8, 8):
            best = min(
                max(costs[i, p[i]] for i in range(shape[0]))
                for p in itertools.permutations(range(shape[1]), shape[0])
            )
            assert float(value) == pytest.approx(best)
        # no threshold below the value has a perfect matching
        allowed = costs < float(value) - 1e-12
        rows, columns = linear_sum_assignment(~allowed)
        assert (~allowed)[rows, columns].any()


def test_bottleneck_differs_from_the_sum_optimal_matching():
    # sum-optimal: 0 + 1.0; bottleneck: 0.6 at worst
    costs = jnp.asarray([[0.0, 0.6], [0.6, 1.0]])
    value, assignment = bottleneck(costs)
    assert float(value) == 0.6
    assert assignment.tolist() == [1, 0]


@pytest.mark.slow
def test_tiny_errors_keep_relative_accuracy():
    for dtype, size, tolerance in (
        (np.float64, 1e-12, 1e-3),
        (np.float32, 1e-9, 1e-2),
        (np.float32, 1e-12, 0.25),
    ):
        # 1 - cos(angle) = size where the tangent vector is sqrt(2 size) long
        true = np.eye(2, 4)
        estimated = true.copy()
        estimated[:, 2] = (2 * size) ** 0.5
        got = recovery_error(true.astype(dtype), estimated.astype(dtype))
        assert got.dtype == dtype
        assert float(got) == pytest.approx(size, rel=tolerance)
    assert float(recovery_error(np.eye(3), 7.0 * np.eye(3)[[2, 0, 1]])) == 0.0


def test_not_finite_estimates_are_the_worst():
    estimated = np.diag([np.nan, 1.0])
    assert float(recovery_error(np.eye(2), estimated)) == np.inf


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"expected equal shapes \(k, d\), got \(2, 3\) and \(3, 3\)"):
        recovery_error(np.eye(2, 3), np.eye(3))


def test_distance_is_one_minus_cosine():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 4)), rng.normal(size=(2, 4))
    cosines = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    np.testing.assert_allclose(distances(a, b), 1 - cosines, atol=1e-14)
    np.testing.assert_allclose(distances(a, b, even=True), 1 - np.abs(cosines), atol=1e-14)


def random_mixture(rng, k=3, d=4):
    arrays = (
        rng.normal(size=(k, d)),
        rng.normal(size=(k, d)),
        rng.uniform(0.1, 1, k),
        rng.normal(size=k),
        rng.normal(size=k),
    )
    return jax.device_get(make_params(*arrays))


@pytest.mark.slow
def test_matching_maximises_the_sum_of_cosines():
    rng = np.random.default_rng(2)
    for _ in range(5):
        a, b = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
        distance = np.asarray(distances(a, b))
        rows, columns = linear_sum_assignment(distance)
        found = np.asarray(match_experts(a, b))
        assert distance[np.arange(4), found].sum() == pytest.approx(distance[rows, columns].sum())


@pytest.mark.slow
@pytest.mark.parametrize("even", [False, True])
def test_alignment_undoes_order_gauge_and_signs(even):
    rng = np.random.default_rng(3)
    truth = random_mixture(rng)
    for permutation in itertools.permutations(range(3)):
        estimate = jax.device_get(permute_experts(truth, np.asarray(permutation)))
        if even:
            signs = np.asarray([1.0, -1.0, -1.0])
            estimate = estimate._replace(
                experts=signs[:, None] * estimate.experts, expert_bias=signs * estimate.expert_bias
            )
        aligned = align(truth, estimate, even)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), aligned, truth)
        assert float(gating_error(truth, aligned)) < 1e-13


def test_gating_error_is_relative_to_the_gates_but_not_below_one():
    rng = np.random.default_rng(4)
    truth = random_mixture(rng)
    move = np.zeros_like(truth.gating)
    move[0, 0] = 0.3
    moved = truth._replace(gating=truth.gating + move)
    size = np.linalg.norm(truth.gating)
    assert size > 1
    assert float(gating_error(truth, moved)) == pytest.approx(0.3 / size)
    small = truth._replace(gating=0.01 * truth.gating)
    assert float(gating_error(small, small._replace(gating=small.gating + move))) == pytest.approx(0.3)
