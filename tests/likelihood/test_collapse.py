"""Which experts count as collapsed: by their rows and by rounding, never by how precise the data are."""

import jax
import numpy as np
import pytest

import moejax
from moejax.likelihood.collapse import is_collapsed, label_rounding

EPS = np.finfo(float).eps


def test_rows_and_rounding_decide():
    options = {"num_coefficients": 3, "least_noise": 40 * EPS}
    noise, counts = np.array([1e-3, 0.5, 20 * EPS]), np.array([3.2, 40.0, 90.0])
    # at the floor, ten rows are too few to describe labels without noise, and ninety are not
    assert is_collapsed(noise, counts, per_expert=True, **options).tolist() == [True, False, False]
    counts[2] = 10.0
    assert is_collapsed(noise, counts, per_expert=True, **options).tolist() == [True, False, True]
    assert is_collapsed(noise, counts, per_expert=False, **options).tolist() == [False, False, True]
    outputs = np.array([[0.3, 20 * EPS], [0.3, 0.3]])
    assert is_collapsed(outputs, counts[1:], per_expert=False, **options).tolist() == [True, False]


def test_rows_without_weight_have_no_rounding():
    y, weights = np.array([1.0, -3.0, 1e30]), np.array([1.0, 2.0, 0.0])
    assert float(label_rounding(jax.numpy.asarray(y), jax.numpy.asarray(weights))) == pytest.approx(3 * EPS)


def lines(noise, n=500, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    first = rng.uniform(size=n) < 1.0 / (1.0 + np.exp(-2.0 * x[:, 0]))
    means = np.where(first, 1.0 + x[:, 1], -1.0 - 2.0 * x[:, 0])
    return x, means + noise * rng.normal(size=n), means


OPTIONS = {
    "num_experts": 2,
    "fit_intercept": True,
    "method": "joint_em",
    "num_starts": 4,
    "max_iterations": 300,
}


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-1, 1e-5])
def test_precise_labels_have_small_noise_and_standard_errors(noise):
    x, y, _ = lines(noise)
    result = moejax.fit(jax.random.key(0), x, y, **OPTIONS)
    assert result.status == "ok"
    # the standard error of sigma is sigma / sqrt(2 n) = 3.2%
    np.testing.assert_allclose(result.params.noise_std, noise, rtol=4 * 0.032)
    np.testing.assert_allclose(result.standard_errors.noise_std, noise / np.sqrt(1000), rtol=0.1)


@pytest.mark.slow
def test_labels_without_noise_are_said_to_be_fitted_exactly():
    x, _, means = lines(0.0)
    result = moejax.fit(jax.random.key(0), x, means, **OPTIONS)
    assert "ran off to zero" in result.status
    assert result.standard_errors is None


@pytest.mark.slow
def test_a_choice_of_k_takes_no_expert_that_goes_through_its_rows():
    """With noises of their own and few rows, three experts have a likelihood without bound."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 1))
    y = np.where(rng.random(40) < 0.5, x[:, 0], -x[:, 0]) + 0.3 * rng.normal(size=40)
    options = OPTIONS | {"num_starts": 20, "noise": "per_expert"}
    result = moejax.fit(jax.random.key(0), x, y, **options | {"num_experts": [1, 2, 3, 4]})
    table = result.selection.set_index("num_experts")
    assert (table["status"] != "ok").any()  # the case occurs
    assert result.status == "ok"
    eligible = table.loc[table["status"] == "ok", "bic"]
    assert table["bic"].min() < eligible.min()  # and it would have been chosen
    assert table.index[table["chosen"]][0] == eligible.idxmin()
