"""Information criteria against scipy and scikit-learn, and what `fit` says of several numbers of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LinearRegression

import moejax
from moejax.model import responsibilities
from moejax.selection import criteria, num_free_parameters, num_rows_needed, numbers_to_try, selection_table


def test_criteria_are_their_definitions():
    rng = np.random.default_rng(0)
    entropy, total = rng.uniform(1.0, 9.0), rng.uniform(50.0, 90.0)
    row = criteria(3, -123.0, 17, entropy, total, [0.5, 0.3, 0.2, 0.05], "ok")
    assert row["aic"] == pytest.approx(2 * 17 + 2 * 123.0)
    assert row["bic"] == pytest.approx(17 * np.log(total) + 2 * 123.0)
    assert row["icl"] == pytest.approx(row["bic"] + 2 * entropy)
    assert row["t2_eigenvalue"] == 0.2
    assert row["t2_eigengap"] == pytest.approx(0.15)
    sure = criteria(1, -1.0, 2, 0.0, 50.0, None, "ok")
    assert sure["icl"] == sure["bic"]
    assert np.isnan(sure["t2_eigenvalue"])


def test_counts_of_parameters():
    # three experts of four inputs and an intercept, two gates of the same, one noise level or three
    assert num_free_parameters(3, 4, "shared", True) == 3 * 5 + 2 * 5 + 1
    assert num_free_parameters(3, 4, "per_expert", False) == 3 * 4 + 2 * 4 + 3
    assert num_free_parameters(1, 4, "known", False) == 4
    assert num_rows_needed(1, 4, True) == 7


def test_numbers_to_try():
    assert numbers_to_try("auto", (10_000, 4), True) == (1, 2, 3, 4, 5, 6)
    assert numbers_to_try("auto", (30, 4), True) == (1, 2, 3)
    assert numbers_to_try(range(2, 4), (10, 4), True) == (2, 3)
    assert numbers_to_try([4, 2, 4], (10, 4), True) == (2, 4)
    for bad in ("many", [], [0, 1], [1.5]):
        with pytest.raises(ValueError, match="num_experts: expected"):
            numbers_to_try(bad, (10, 4), True)


def test_the_least_bic_is_chosen_and_a_failed_fit_is_not():
    table = selection_table(
        [{"num_experts": k, "bic": b} for k, b in ((1, 5.0), (2, np.nan), (3, 4.0), (4, 4.5))]
    )
    assert table["chosen"].tolist() == [False, False, True, False]


@pytest.mark.slow
def test_fit_finds_the_number_of_experts():
    experts = np.array([[1.0, 0.0, 0.0], [-0.5, 0.8, 0.0]])
    truth = moejax.make_params(experts, np.array([[0.0, 0.0, 1.5], [0.0, 0.0, 0.0]]), 0.2)
    x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 400)
    x, y = np.asarray(x), np.asarray(y)
    result = moejax.fit(
        jax.random.key(1), x, y, num_experts=range(1, 3), fit_intercept=True, method="spectral_em"
    )
    table = result.selection.set_index("num_experts")
    assert table.index[table["chosen"]].tolist() == [2]
    assert len(result.params.noise_std) == 2
    one = LinearRegression().fit(x, y)
    residual = y - one.predict(x)
    expected = scipy.stats.norm.logpdf(residual, scale=residual.std()).sum()
    assert table.loc[1, "log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert table.loc[1, "bic"] == pytest.approx(-2 * expected + 5 * np.log(400), abs=1e-3)
    posterior = responsibilities(result.params, jnp.asarray(x), jnp.asarray(y), "linear")
    entropy = scipy.stats.entropy(np.asarray(posterior), axis=1).sum()
    assert table.loc[2, "icl"] - table.loc[2, "bic"] == pytest.approx(2 * entropy, rel=1e-6)
    assert (np.diff(table["log_likelihood"]) > -1e-6).all()  # a larger model is no worse
    assert moejax.recovery_error(jnp.asarray(experts), result.params.experts) < 1e-2
