"""The summary of a fit against least squares by hand, and the numbers of the result itself."""

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats

import moejax

N = 300


def line():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2))
    return x, 1.0 + x @ [2.0, 0.0] + 0.5 * rng.normal(size=N)


def test_one_expert_has_the_table_of_least_squares():
    x, y = line()
    options = {"num_experts": 1, "fit_intercept": True, "method": "joint_em"}
    with jax.enable_x64(True):
        result = moejax.fit(jax.random.key(0), pd.DataFrame(x, columns=["dose", "age"]), y, **options)
    summary = result.summary(level=0.9)
    (table,) = summary.experts
    design = np.column_stack([x, np.ones(N)])
    coefficients, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    sigma = np.sqrt(squares[0] / N)
    errors = sigma * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    at = [("expert", "dose"), ("expert", "age"), ("expert", "(intercept)")]
    np.testing.assert_allclose(table.loc[at, "coefficient"], coefficients, rtol=1e-6)
    np.testing.assert_allclose(table.loc[at, "std error"], errors, rtol=1e-6)
    z = coefficients / errors
    np.testing.assert_allclose(table.loc[at, "z"], z, rtol=1e-5)
    np.testing.assert_allclose(
        table.loc[at, "P>|z|"], 2 * scipy.stats.norm.sf(np.abs(z)), rtol=1e-3, atol=1e-300
    )
    reach = scipy.stats.norm.ppf(0.95) * errors
    np.testing.assert_allclose(table.loc[at, "5%"], coefficients - reach, rtol=1e-5)
    np.testing.assert_allclose(table.loc[at, "95%"], coefficients + reach, rtol=1e-5)
    assert table.loc[("noise", "sigma"), "coefficient"] == pytest.approx(sigma, rel=1e-6)
    assert np.isnan(table.loc[("noise", "sigma"), "P>|z|"])
    assert len(table) == 4
    log_likelihood = scipy.stats.norm.logpdf(y - design @ coefficients, scale=sigma).sum()
    assert summary.header["log-likelihood"] == pytest.approx(log_likelihood, rel=1e-9)
    assert summary.header["BIC"] == pytest.approx(-2 * log_likelihood + 4 * np.log(N), rel=1e-9)
    assert summary.header["AIC"] == pytest.approx(-2 * log_likelihood + 8, rel=1e-9)
    assert summary.header["ICL"] == summary.header["BIC"]
    assert summary.header["samples"] == N
    assert summary.header["objective"] == "likelihood"
    text = str(summary)
    assert "dose" in text
    assert f"{sigma:.4g}" in text
    assert "<table" in summary._repr_html_()


def test_gates_are_relative_to_the_last_and_names_are_checked():
    x, y = line()
    result = moejax.fit(jax.random.key(0), x, y, num_experts=2, method="joint_em", max_iterations=3)
    summary = result.summary(feature_names=["a", "b"])
    first, last = summary.experts
    assert first.index.tolist() == [
        ("expert", "a"), ("expert", "b"), ("gate", "a"), ("gate", "b"), ("noise", "sigma"),
    ]  # fmt: skip
    assert "gate" not in last.index.get_level_values("part")
    np.testing.assert_array_equal(first.loc["gate", "coefficient"], result.params.gating[0])
    assert result.summary().experts[0].loc["expert"].index.tolist() == ["x1", "x2"]
    assert all(note in str(summary) for note in result.diagnostics["notes"])
    with pytest.raises(ValueError, match=r"^feature_names: expected 2 names, got 1"):
        result.summary(feature_names=["a"])
    with pytest.raises(ValueError, match=r"^level: expected a number between 0 and 1, got 95"):
        result.summary(level=95)


def test_several_outputs_have_rows_each():
    x, y = line()
    targets = np.column_stack([y, -y + np.random.default_rng(1).normal(size=N)])
    result = moejax.fit(jax.random.key(0), x, targets, num_experts=2, method="joint_em", max_iterations=3)
    table = result.summary().experts[0]
    assert table.loc[("expert y2", "x1"), "coefficient"] == result.params.experts[0, 1, 0]
    assert table.loc[("noise y2", "sigma"), "coefficient"] == result.params.noise_std[0, 1]
    assert table["std error"].isna().all()
    assert result.summary().header["outputs"] == 2
