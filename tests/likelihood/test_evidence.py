"""The evidence of a mean fit: one linear expert against Bayesian linear regression, several against MacKay's fixed point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import BayesianRidge

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.evidence import LEAST_SHARE, VARIANCE_FLOOR, maximise_evidence
from moejax.likelihood.padded import INTERCEPT_PRECISION, Ridge
from moejax.model.activations import get_activation

N, D = 80, 3
RNG = np.random.default_rng(1)
X = RNG.normal(size=(N, D))
X -= X.mean(axis=0)
Y = X @ [1.0, -0.5, 0.1] + 0.5 * RNG.normal(size=N)
Y -= Y.mean()
PLACES = 3


@functools.partial(jax.jit, static_argnames=("rounds", "fixed", "fit_intercept"))
def found_by(rows, number, y, variance, ridge, rounds, fixed, fit_intercept=True):
    return maximise_evidence(
        rows,
        jnp.arange(PLACES) < number,
        variance,
        ridge,
        sample_blocks(jnp.asarray(X), y, jnp.ones(N), fit_intercept=fit_intercept),
        fn=get_activation("linear"),
        fit_intercept=fit_intercept,
        num_rounds=rounds,
        num_steps=200,
        tolerance=1e-13,
        fixed_ridge=fixed,
    )


def one_line(rounds, *, fixed, variance=0.4, ridge=(2.0, 0.3)):
    rows = jnp.zeros((2 * PLACES, D + 1))
    return found_by(rows, 1, Y, jnp.asarray(variance), Ridge(*map(jnp.asarray, ridge)), rounds, fixed)


def test_the_evidence_of_a_line_is_that_of_bayesian_linear_regression():
    found = one_line(1, fixed=True)
    design = np.column_stack([X, np.ones(N)])
    precision = np.array([2.0] * D + [INTERCEPT_PRECISION])
    covariance = 0.4 * np.eye(N) + design @ np.diag(1 / precision) @ design.T
    expected = scipy.stats.multivariate_normal(np.zeros(N), covariance).logpdf(Y)
    # empty places add nothing, and log Gamma(1 + 1) is zero
    assert float(found.log_evidence) == pytest.approx(expected, abs=1e-8)
    posterior = np.linalg.inv(design.T @ design / 0.4 + np.diag(precision))
    np.testing.assert_allclose(found.rows[0], posterior @ design.T @ Y / 0.4, atol=1e-9)
    np.testing.assert_allclose(np.asarray(found.covariance)[: D + 1, : D + 1], posterior, atol=1e-12)
    # X has mean zero: gamma is the sum over the directions of the slopes, and one for the intercept
    values = np.linalg.eigvalsh(X.T @ X / 0.4)
    assert float(found.effective) == pytest.approx(np.sum(values / (values + 2.0)) + 1.0, abs=1e-9)


def test_rounds_come_to_mackays_fixed_point_which_is_scikit_learns():
    found = one_line(60, fixed=False)
    rss, slopes = float(found.squares), np.asarray(found.rows)[0, :D]
    gamma = float(found.effective) - 1.0
    assert float(found.ridge.experts) == pytest.approx(gamma / (slopes @ slopes), rel=1e-9)
    assert float(found.variance) == pytest.approx(rss / (N - gamma - 1.0), rel=1e-9)
    # without an intercept, as the labels and the inputs have mean zero
    rows = jnp.zeros((2 * PLACES, D))
    start = (jnp.asarray(0.4), Ridge(jnp.asarray(2.0), jnp.asarray(0.3)))
    plain = found_by(rows, 1, Y, *start, 60, False, fit_intercept=False)
    reference = BayesianRidge(
        alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0, fit_intercept=False, tol=1e-12, max_iter=5000
    ).fit(X, Y)
    assert 1 / float(plain.variance) == pytest.approx(reference.alpha_, rel=1e-6)
    assert float(plain.ridge.experts) == pytest.approx(reference.lambda_, rel=1e-6)
    np.testing.assert_allclose(np.asarray(plain.rows)[0], reference.coef_, rtol=1e-6)


def two_lines(rounds, *, fixed):
    y = np.abs(X[:, 0]) - 0.8 + 0.2 * np.random.default_rng(2).normal(size=N)
    rows = np.zeros((2 * PLACES, D + 1))
    rows[0, 0], rows[1, 0], rows[PLACES, 0], rows[PLACES + 1, 0] = 1.0, -1.0, 2.0, -2.0
    start = (jnp.asarray(0.1), Ridge(jnp.asarray(1.0), jnp.asarray(0.1)))
    return found_by(jnp.asarray(rows), 2, y, *start, rounds, fixed)


def test_several_experts_satisfy_the_fixed_point_and_the_ridges_stay_if_fixed():
    found = two_lines(60, fixed=False)
    rows, size = np.asarray(found.rows), D + 1
    precision = np.zeros((2 * PLACES, size, 2 * PLACES, size))
    covariance = np.asarray(found.covariance).reshape(precision.shape)
    slopes = sum(covariance[i, d, i, d] for i in range(2) for d in range(D))
    # of two gates minus their mean, w and -w: C is (I - 11'/2) for each coefficient
    centred = np.array([[0.5, -0.5], [-0.5, 0.5]])
    gates = covariance[PLACES : PLACES + 2, :, PLACES : PLACES + 2]
    of_gates = sum(np.sum(centred * gates[:, d, :, d]) for d in range(size))
    ridge = [float(value) for value in found.ridge]
    gamma_slopes = 2 * D - ridge[0] * slopes
    gamma_gates = size - ridge[1] * of_gates
    squares = np.sum(rows[:2, :D] ** 2)
    turned = rows[PLACES : PLACES + 2] - rows[PLACES : PLACES + 2].mean(axis=0)
    assert ridge[0] == pytest.approx(gamma_slopes / squares, rel=1e-4)
    assert ridge[1] == pytest.approx(gamma_gates / np.sum(turned**2), rel=1e-4)
    assert float(found.effective) == pytest.approx(gamma_slopes + gamma_gates + 2, rel=1e-9)
    assert float(found.variance) == pytest.approx(float(found.squares / (N - found.effective)), rel=1e-4)
    assert bool(found.converged)
    assert float(found.variance) < 0.06
    kept = two_lines(6, fixed=True)
    np.testing.assert_allclose(kept.ridge, (1.0, 0.1))
    assert float(kept.log_evidence) < float(found.log_evidence)


def test_the_noise_of_exact_labels_stays_above_its_floor_and_is_finite():
    rows = jnp.zeros((2 * PLACES, D + 1))
    start = (jnp.asarray(0.4), Ridge(jnp.asarray(2.0), jnp.asarray(0.3)))
    exact = X @ np.array([1.0, 2.0, 3.0])
    found = found_by(rows, 1, exact, *start, 60, False)
    floor = VARIANCE_FLOOR * np.mean(exact**2)
    assert floor * (1 - 1e-9) <= float(found.variance) < 1e-6
    assert np.isfinite(float(found.log_evidence))
    np.testing.assert_allclose(np.asarray(found.rows)[0], [1.0, 2.0, 3.0, 0.0], atol=1e-5)
    assert 0 < LEAST_SHARE < 1
