"""Information criteria against scipy and scikit-learn, and what `fit` says of several numbers of experts."""

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled_model import responsibilities
from sklearn.linear_model import LinearRegression

import moejax
from moejax.fitting.selection import (
    criteria,
    left_out,
    num_free_parameters,
    num_rows_needed,
    numbers_to_try,
    selection_table,
)


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
    assert numbers_to_try("auto") == tuple(range(1, 13))
    assert numbers_to_try([4, 2, 4]) == (2, 4)


def row(num_experts, bic, status="ok"):
    return {"num_experts": num_experts, "bic": bic, "status": status}


def test_the_least_bic_is_chosen_and_a_failed_fit_is_not():
    table = selection_table([row(1, 5.0), row(2, np.nan), row(3, 4.0), row(4, 4.5)])
    assert table["chosen"].tolist() == [False, False, True, False]


def test_a_fit_whose_status_is_not_ok_is_not_chosen():
    collapsed = "the noise of expert 1 ran off to zero"
    table = selection_table([row(2, 213.0), row(3, -876.0, collapsed)])
    assert table["chosen"].tolist() == [True, False]
    table = selection_table([left_out(1, "no rows"), row(2, 5.0, collapsed), row(3, 4.0, collapsed)])
    assert table["chosen"].tolist() == [False, True, False]


def test_what_the_data_do_not_admit_is_left_out_and_said():
    x, y = np.random.default_rng(0).normal(size=(60, 2)), np.random.default_rng(1).normal(size=60)
    options = {"method": "spectral_em", "fit_intercept": True, "max_iterations": 5}
    result = moejax.fit(jax.random.key(0), x, y, num_experts=[1, 3, 500], **options)
    table = result.selection.set_index("num_experts")
    assert table["chosen"].tolist() == [True, False, False]
    assert "1 to 2 (the rank of the inputs)" in table.loc[3, "status"]
    assert table.loc[500, "status"].startswith("left out")
    weights = (np.arange(60) < 8).astype(float)
    few = moejax.fit(jax.random.key(0), x, y, num_experts="auto", weights=weights, **options)
    assert "at least 11 rows with weight for k = 2" in few.selection.set_index("num_experts").loc[2, "status"]
    with pytest.raises(ValueError, match="num_experts: expected 1 to 2"):
        moejax.fit(jax.random.key(0), x, y, num_experts=[3, 4], **options)


@pytest.mark.slow
def test_fit_finds_the_number_of_experts():
    experts = np.array([[1.0, 0.0, 0.0], [-0.5, 0.8, 0.0]])
    truth = compiled_model.make_params(experts, np.array([[0.0, 0.0, 1.5], [0.0, 0.0, 0.0]]), 0.2)
    x, y, _ = compiled_model.sample(jax.random.key(0), truth, "linear", 400)
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
    assert compiled_model.recovery_error(jnp.asarray(experts), result.params.experts) < 1e-2
