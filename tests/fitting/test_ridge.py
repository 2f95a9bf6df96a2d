"""The ridge on the gates: next to nothing where the data determine them, finite where they do not."""

import functools

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression

import moejax
from moejax.likelihood.em import RIDGE
from moejax.likelihood.information import covariance, standard_errors
from moejax.likelihood.polish import polish
from moejax.model.activations import get_activation

OPTIONS = {"num_experts": 2, "fit_intercept": True, "method": "joint_em", "max_iterations": 500}


def sharp(n, seed=0, gate=40.0):
    """Two experts far apart, so that the labels tell the expert: the gate is a logistic regression."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    first = rng.uniform(size=n) < scipy.special.expit(gate * x[:, 0])
    y = np.where(first, 8.0, -8.0) + np.where(first, 1.0, -1.0) * x[:, 1] + 0.1 * rng.normal(size=n)
    return x, y, first


def gate_of(result, leaf):
    """The first input's coefficient in the gate of the expert with the larger bias, and its part of the MoEParams `leaf`."""
    sign = 1.0 if result.params.expert_bias[0] > 0 else -1.0
    return sign * leaf.gating[0, 0]


@pytest.mark.slow
def test_a_sharp_gate_is_that_of_an_unpenalised_logistic_regression():
    x, y, first = sharp(20_000)
    result = moejax.fit(jax.random.key(0), x, y, **OPTIONS)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, first)
    error = result.standard_errors.gating[0, 0]
    assert abs(gate_of(result, result.params) - reference.coef_[0, 0]) < 1e-3 * error
    assert result.diagnostics["ridge_cost"] < 1e-6
    assert result.diagnostics["gates_held_by_ridge"] == []


@functools.partial(jax.jit, static_argnames="ridge")
def estimate(truth, x, y, ridge):
    """(gate of the first input, its standard error) at the maximum near the truth."""
    free = {"noise": "shared", "fit_intercept": True}
    ended = polish(
        truth, x, y, jnp.ones_like(y), fn=get_activation("linear"), ridge=ridge, num_steps=12, **free
    )
    errors = standard_errors(covariance(ended.params, x, y, "linear", **free), ended.params, **free)
    return ended.params.gating[0, 0], errors.gating[0, 0]


@pytest.mark.slow
def test_the_default_interval_of_a_sharp_gate_holds_the_truth_at_a_million_rows():
    """A prior that grew with the sample excluded it in every sample; by chance two of four 95% intervals miss once in 70 times."""
    truth = compiled_model.make_params(
        np.array([[0.0, 1.0], [0.0, -1.0]]), np.array([[40.0, 0.0], [0.0, 0.0]]), 0.1, np.array([8.0, -8.0])
    )
    held = []
    for seed in range(4):
        x, y, _ = sharp(1_000_000, seed)
        gate, error = (float(v) for v in estimate(truth, jnp.asarray(x), jnp.asarray(y), RIDGE))
        held.append(abs(gate - 40.0) <= 1.96 * error)
    assert sum(held) >= 3
    free, _ = estimate(truth, jnp.asarray(x), jnp.asarray(y), 0.0)
    assert abs(gate - float(free)) < 1e-4 * error


@pytest.mark.slow
def test_gates_that_separate_are_finite_and_said():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    y = np.where(x[:, 0] > 0, 5.0 + x[:, 1], -5.0 - x[:, 1]) + 0.1 * rng.normal(size=400)
    result = moejax.fit(jax.random.key(0), x, y, **OPTIONS)
    assert np.isfinite(result.params.gating).all()
    assert result.diagnostics["gates_held_by_ridge"] == [1]
    assert any("held by the ridge" in note for note in result.diagnostics["notes"])
    assert 0.0 < result.diagnostics["ridge_cost"] < 0.1
    # the classes are told apart without doubt: the likelihood is that of the two regressions alone
    residual = np.concatenate(
        [
            (y - (5.0 + x[:, 1]))[x[:, 0] > 0],
            (y - (-5.0 - x[:, 1]))[x[:, 0] <= 0],
        ]
    )
    least = -0.5 * 400 * (np.log(2 * np.pi * np.mean(residual**2)) + 1.0)
    assert least - 0.1 < result.log_likelihood < least + 10.0
