"""Mixtures in arrays of K places: sums against JAX's derivatives of the plain formula, the climb against SciPy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import moejax
from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.padded import (
    INTERCEPT_PRECISION,
    SUMS,
    Ridge,
    climb_padded,
    params_of_padded,
    prior_of,
)
from moejax.model.activations import get_activation

N, D, K = 60, 2, 3
VARIANCE = 0.3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
Y = np.sin(X[:, 0]) + 0.3 * RNG.normal(size=N)
WEIGHTS = np.where(np.arange(N) % 7 == 0, 0.0, RNG.integers(1, 3, size=N)).astype(float)
ROWS = 0.7 * RNG.normal(size=(2 * K, D + 1))
RIDGE = Ridge(0.4, 0.2)


def in_places(rows, places):
    """Rows of K experts in arrays of more places."""
    count = len(rows) // 2
    whole = np.zeros((2 * places, rows.shape[1]))
    whole[:count], whole[places : places + count] = rows[:count], rows[count:]
    return whole


def taken(array, places):
    """The entries of the first K experts of (2 places D,) or of a matrix of this size."""
    index = np.arange(2 * places * (D + 1)).reshape(2, places, D + 1)[:, :K].ravel()
    return array[index] if array.ndim == 1 else array[np.ix_(index, index)]


def blocks_of(block_size):
    return sample_blocks(*map(jnp.asarray, (X, Y, WEIGHTS)), fit_intercept=True, block_size=block_size)


@functools.partial(jax.jit, static_argnames=("name", "objective", "block_size"))
def sums(rows, name, objective, block_size=None):
    blocks = blocks_of(block_size)
    active = jnp.arange(rows.shape[0] // 2) < K
    return SUMS[objective](rows, active, jnp.asarray(VARIANCE), blocks, get_activation(name))


def mean_by_hand(flat, name):
    """f(x) (n,) of coefficients (2 K D,), in plain JAX."""
    rows = flat.reshape(2 * K, D + 1)
    predictors = rows @ np.column_stack([X, np.ones(N)]).T
    return jnp.sum(jax.nn.softmax(predictors[K:], axis=0) * get_activation(name)(predictors[:K]), axis=0)


@pytest.mark.parametrize("name", ["linear", "tanh"])
def test_the_sums_of_a_mean_are_those_of_jax(name):
    found = sums(ROWS, name, "mean")

    @jax.jit
    def by_hand(flat):
        f, jacobian = mean_by_hand(flat, name), jax.jacfwd(mean_by_hand)(flat, name)
        return f, jacobian

    f, jacobian = by_hand(ROWS.ravel())
    error = Y - f
    value = WEIGHTS @ (-0.5 * error**2 / VARIANCE - 0.5 * np.log(2 * np.pi * VARIANCE))
    np.testing.assert_allclose(found.log_likelihood, value, rtol=1e-12)
    np.testing.assert_allclose(found.squares, WEIGHTS @ error**2, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, jacobian.T @ (WEIGHTS * error) / VARIANCE, atol=1e-11)
    gauss_newton = jacobian.T @ (WEIGHTS[:, None] * jacobian) / VARIANCE
    np.testing.assert_allclose(found.information, gauss_newton, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "tanh"])
def test_the_sums_of_a_mixture_are_those_of_its_log_likelihood(name):
    found = sums(ROWS, name, "likelihood")

    @jax.jit
    @jax.value_and_grad
    def by_hand(flat):
        rows = flat.reshape(2 * K, D + 1)
        params = params_of_padded(rows, jnp.asarray(VARIANCE), K, fit_intercept=True)
        return moejax.log_likelihood(params, *map(jnp.asarray, (X, Y)), name, weights=jnp.asarray(WEIGHTS))

    value, gradient = by_hand(ROWS.ravel())
    np.testing.assert_allclose(found.log_likelihood, value, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-11)
    information = np.asarray(found.information)
    assert np.linalg.eigvalsh(information).min() > -1e-9
    middle = K * (D + 1)
    np.testing.assert_array_equal(information[:middle, middle:], 0.0)
    # of the gates it is that of a multinomial regression, for responsibilities as labels
    design = np.column_stack([X, np.ones(N)])
    gates = scipy.special.softmax(design @ ROWS[K:].T, axis=1)
    cov = np.einsum("ni,ij->nij", gates, np.eye(K)) - gates[:, :, None] * gates[:, None]
    expected = np.einsum("n,nij,nd,ne->idje", WEIGHTS, cov, design, design).reshape(middle, middle)
    np.testing.assert_allclose(information[middle:, middle:], expected, atol=1e-10)


@pytest.mark.parametrize("objective", ["mean", "likelihood"])
def test_empty_places_and_blocks_change_nothing(objective):
    four, six = (sums(in_places(ROWS, places), "linear", objective) for places in (4, 6))
    cut = sums(in_places(ROWS, 4), "linear", objective, block_size=7)
    for name in ("log_likelihood", "squares"):
        np.testing.assert_allclose(getattr(four, name), getattr(six, name), rtol=1e-13)
        np.testing.assert_allclose(getattr(four, name), getattr(cut, name), rtol=1e-13)
    for name in ("gradient", "information"):
        few, many = (taken(np.asarray(getattr(s, name)), p) for s, p in ((four, 4), (six, 6)))
        np.testing.assert_allclose(few, many, atol=1e-12)
        np.testing.assert_allclose(getattr(four, name), getattr(cut, name), atol=1e-11)
        # nothing outside the experts' places
        assert np.abs(few).sum() == pytest.approx(np.abs(np.asarray(getattr(four, name))).sum(), rel=1e-13)


@functools.partial(jax.jit, static_argnames="objective")
def climbed(rows, objective):
    return climb_padded(
        rows,
        jnp.arange(rows.shape[0] // 2) < K,
        jnp.asarray(VARIANCE),
        RIDGE,
        blocks_of(None),
        fn=get_activation("tanh"),
        objective=objective,
        fit_intercept=True,
        num_steps=2000,
        tolerance=1e-11,
    )


def centred(gates):
    return gates - gates.mean(axis=0)


def test_a_climb_ends_where_scipys_least_squares_ends():
    end = climbed(in_places(ROWS, 4), "mean")

    def residuals(flat):
        rows = flat.reshape(2 * K, D + 1)
        design = np.column_stack([X, np.ones(N)])
        gates = scipy.special.softmax(design @ rows[K:].T, axis=1)
        f = np.sum(gates * np.tanh(design @ rows[:K].T), axis=1)
        return np.concatenate(
            [
                np.sqrt(WEIGHTS / VARIANCE) * (Y - f),
                np.sqrt(RIDGE.experts) * rows[:K, :-1].ravel(),
                np.sqrt(INTERCEPT_PRECISION) * rows[:K, -1],
                np.sqrt(RIDGE.gates) * centred(rows[K:]).ravel(),
            ]
        )

    def by_scipy(rows):
        return scipy.optimize.least_squares(
            residuals, rows.ravel(), method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15
        )

    constant = -0.5 * WEIGHTS.sum() * np.log(2 * np.pi * VARIANCE)
    assert bool(end.converged)
    # there are several optima: SciPy stays at that of the climb, and the climb at that of SciPy from the same start
    ours = np.asarray(end.rows).reshape(2, 4, D + 1)[:, :K]
    assert float(end.value) == pytest.approx(constant - by_scipy(ours).cost, abs=1e-6)
    found = by_scipy(ROWS)
    again = climbed(in_places(found.x.reshape(2 * K, D + 1), 4), "mean")
    assert float(again.value) == pytest.approx(constant - found.cost, abs=1e-6)
    assert np.abs(np.asarray(end.rows)[[3, 7]]).max() == 0.0
    assert np.abs(np.asarray(end.rows)[4:7].sum(axis=0)).max() < 1e-6  # gates keep their mean


def test_a_climb_of_the_mixture_ends_at_a_maximum_for_scipy():
    end = climbed(in_places(ROWS, 4), "likelihood")
    rows = np.concatenate([np.asarray(end.rows)[:K], np.asarray(end.rows)[4 : 4 + K]])

    @jax.jit
    @jax.value_and_grad
    def objective(flat):
        rows, variance = flat[:-1].reshape(2 * K, D + 1), jnp.exp(flat[-1])
        params = params_of_padded(rows, variance, K, fit_intercept=True)
        value = moejax.log_likelihood(params, *map(jnp.asarray, (X, Y)), "tanh", weights=jnp.asarray(WEIGHTS))
        penalty = RIDGE.experts * jnp.sum(rows[:K, :-1] ** 2) + INTERCEPT_PRECISION * jnp.sum(
            rows[:K, -1] ** 2
        )
        gates = rows[K:] - rows[K:].mean(axis=0, keepdims=True)
        return -(value - 0.5 * (penalty + RIDGE.gates * jnp.sum(gates**2)))

    at = np.append(rows.ravel(), np.log(float(end.variance)))
    assert float(end.value) == pytest.approx(-float(objective(at)[0]), abs=1e-9)
    better = scipy.optimize.minimize(
        lambda flat: tuple(np.asarray(part, float) for part in objective(flat)),
        at,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert float(end.value) == pytest.approx(-better.fun, abs=1e-5)


def test_the_prior_is_the_sum_of_its_quadratic_forms():
    active = jnp.arange(5) < K
    prior = jax.jit(functools.partial(prior_of, size=D + 1, fit_intercept=True, dtype=jnp.dtype("float64")))(
        active
    )
    rows = in_places(ROWS, 5)
    matrix = np.asarray(prior.matrix(Ridge(2.0, 5.0)))
    flat, mean = rows.ravel(), ROWS[K:].mean(axis=0)
    expected = 2.0 * np.sum(ROWS[:K, :-1] ** 2) + INTERCEPT_PRECISION * np.sum(ROWS[:K, -1] ** 2)
    expected += 5.0 * np.sum((ROWS[K:] - mean) ** 2) + K * mean @ mean
    assert flat @ matrix @ flat == pytest.approx(expected, rel=1e-12)
    slopes, gates = prior.squares(jnp.asarray(rows))
    assert float(slopes) == pytest.approx(np.sum(ROWS[:K, :-1] ** 2))
    assert float(gates) == pytest.approx(np.sum((ROWS[K:] - mean) ** 2))
    assert (float(prior.num_slopes), float(prior.num_gates)) == (K * D, (K - 1) * (D + 1))
