"""Predictions of a fit's result: against the mixture's own formulas, its log-likelihood and quadrature."""

import copy
import pickle

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
from jax import numpy as jnp

import moejax


def data(outputs=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) * [10.0, 0.1] + [3.0, 5.0]
    z = (x - [3.0, 5.0]) / [10.0, 0.1]
    y = np.where(z[:, 1] + rng.logistic(size=200) * 0.3 > 0, z[:, 0], -z[:, 0]) + 0.2 * rng.normal(size=200)
    return (x, np.column_stack([y, z[:, 1] + 0.1 * rng.normal(size=200)])) if outputs else (x, y)


OPTIONS = {"num_experts": 2, "method": "joint_em", "fit_intercept": True, "max_iterations": 20}


@pytest.fixture(scope="module")
def fitted():
    x, y = data()
    return x, y, moejax.fit(jax.random.key(0), x, y, noise="per_expert", **OPTIONS)


def test_predictions_are_those_of_the_mixture_at_the_parameters(fitted):
    x, y, result = fitted
    np.testing.assert_allclose(result.predict(x), moejax.predict(result.params, x, "linear"), rtol=1e-9)
    expected = moejax.responsibilities(result.params, x, y, "linear")
    np.testing.assert_allclose(result.responsibilities(x, y), expected, atol=1e-9)
    assert result.log_density(x, y).sum() == pytest.approx(result.log_likelihood, abs=1e-8)
    gates, means = result.gate_probabilities(x), result.predict_experts(x)
    np.testing.assert_allclose((gates * means).sum(axis=1), result.predict(x), rtol=1e-12)


def test_quantiles_intervals_and_deviations_are_those_of_the_density(fitted):
    x, _, result = fitted
    row = x[:1]
    levels = [0.05, 0.5, 0.95]
    quantiles = result.predict_quantiles(row, levels)[0]
    np.testing.assert_array_equal(result.predict_interval(row, 0.9)[0], quantiles[[0, 2]])
    for level, quantile in zip(levels, quantiles, strict=True):
        assert result.probability_below(row, [quantile])[0] == pytest.approx(level, abs=1e-12)

    def moment(power):
        return scipy.integrate.quad(
            lambda t: t**power * np.exp(result.log_density(row, [t])[0]), -8, 8, limit=400
        )[0]

    assert moment(0) == pytest.approx(1.0, abs=1e-7)
    assert result.predict(row)[0] == pytest.approx(moment(1), abs=1e-7)
    assert result.predict_std(row)[0] == pytest.approx(np.sqrt(moment(2) - moment(1) ** 2), abs=1e-6)


def test_a_result_survives_pickle_and_predicts(fitted):
    x, _, result = fitted
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        np.testing.assert_array_equal(again.predict(x), result.predict(x))


def relu(t):
    """A function of the user's that has the name of a registered one."""
    return jnp.where(t > 0, t, 0.5 * t)


def test_the_function_of_the_fit_predicts_not_the_registered_one_of_its_name(tmp_path):
    x, y = data()
    result = moejax.fit(jax.random.key(0), x, y, activation=relu, **OPTIONS)
    expected = moejax.predict(result.params, x, relu)
    np.testing.assert_allclose(result.predict(x), expected, rtol=1e-9)
    result.save(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"^activation: expected 'relu', the fit's, to be registered"):
        moejax.load_fit(tmp_path / "fit")
    np.testing.assert_array_equal(
        moejax.load_fit(tmp_path / "fit", activation=relu).predict(x), result.predict(x)
    )


def test_several_outputs_have_means_and_densities_but_no_quantiles():
    x, y = data(outputs=True)
    result = moejax.fit(jax.random.key(0), x, y, **OPTIONS)
    assert result.predict(x).shape == result.predict_std(x).shape == (200, 2)
    assert result.log_density(x, y).sum() == pytest.approx(result.log_likelihood, abs=1e-8)
    np.testing.assert_allclose(result.responsibilities(x, y).sum(axis=1), 1.0)
    with pytest.raises(ValueError, match=r"^level: expected a fit of one output, got '2 outputs'"):
        result.predict_interval(x)


def test_bad_rows_are_one_line(fitted):
    x, y, result = fitted
    for rows, words in [
        (x[:, :1], r"^x: expected 2 columns, those of the fit, got '1 columns'"),
        (x[0], r"^x: expected an array \(n, d\)"),
        (np.where(x > 3, np.nan, x), r"^x: expected finite numbers"),
        ([["a", "b"]], r"^x: expected"),
    ]:
        with pytest.raises(ValueError, match=words):
            result.predict(rows)
    with pytest.raises(ValueError, match=r"^y: expected shape \(200,\) to go with x"):
        result.responsibilities(x, y[:-1])
    with pytest.raises(ValueError, match=r"^quantiles: expected numbers between 0 and 1"):
        result.predict_quantiles(x, [0.0])
    with pytest.raises(ValueError, match=r"^level: expected numbers between 0 and 1"):
        result.predict_interval(x, 1.5)


def test_columns_of_a_table_keep_their_order():
    x, y = data()
    frame = pd.DataFrame(x, columns=["a", "b"])
    result = moejax.fit(jax.random.key(0), frame, y, **OPTIONS)
    np.testing.assert_array_equal(result.predict(frame), result.predict(x))
    with pytest.raises(ValueError, match=r"^x: expected columns 'a', 'b' in this order, got 'b'"):
        result.predict(frame[["b", "a"]])


@pytest.mark.slow
def test_a_mean_fit_has_gates_as_responsibilities_and_one_normal_density():
    x, y = data()
    options = {"num_experts": 2, "fit_intercept": True, "objective": "mean", "num_starts": 2}
    result = moejax.fit(jax.random.key(0), x, y, **options)
    np.testing.assert_array_equal(result.responsibilities(x, y), result.gate_probabilities(x))
    np.testing.assert_allclose(result.predict(x), moejax.predict(result.params, x, "linear"), rtol=1e-6)
    # the variance of f is in the density of a new label, not in the likelihood
    assert (result.predict_std(x) > result.params.noise_std[0]).all()
    middle, std = result.predict(x), result.predict_std(x)
    np.testing.assert_allclose(
        result.predict_interval(x, 0.95), middle[:, None] + 1.959963984540054 * std[:, None] * [-1, 1]
    )
