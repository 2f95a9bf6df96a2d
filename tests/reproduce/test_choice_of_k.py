"""The choices of experiments/choice_of_k.py and their shares, against choices by hand and counts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moejax.reproduce.experiment import load_module

EXPERIMENT = load_module(Path(__file__).parents[2] / "experiments" / "choice_of_k.py")


def selection(*rows):
    return pd.DataFrame(rows, columns=["num_experts", "bic", "icl", "status"])


def test_a_choice_is_the_least_criterion_of_the_fits_that_are_ok():
    table = selection((1, 9.0, 9.0, "ok"), (2, 5.0, 11.0, "ok"), (3, 1.0, np.nan, "not converged"))
    assert EXPERIMENT.least(table, "bic") == 2
    assert EXPERIMENT.least(table, "icl") == 1
    assert EXPERIMENT.least(table.iloc[2:], "bic") == 0


def test_shares_are_counts_over_trials_with_binomial_errors():
    """Eight choices with a true number of 3: five are right, two too low and one too high."""
    chosen = [3, 3, 3, 3, 3, 2, 1, 5]
    cell = {"density": "mixture", "activation": "linear", "noise_std": 0.1, "num_samples": 500}
    rows = [
        cell | {"criterion": EXPERIMENT.BIC} | EXPERIMENT.verdict(number, 3) | {"chosen_num_experts": number}
        for number in chosen
    ]
    (row,) = EXPERIMENT.summary(pd.DataFrame(rows)).to_dict("records")
    assert [row[name] for name in EXPERIMENT.SHARES] == [5 / 8, 2 / 8, 1 / 8]
    assert row["trials"] == 8
    # the standard deviation of the mean of 8 draws of 0 or 1
    assert row["right_se"] == pytest.approx(np.std([1] * 5 + [0] * 3) / np.sqrt(8))
    assert row["too_few_se"] == pytest.approx(np.std([1] * 2 + [0] * 6) / np.sqrt(8))


def test_labels_of_a_mixture_and_of_a_mean_have_their_variance():
    """A label less its mean f(x) has variance s^2 for a mean, and s^2 + sum_i P_i (m_i - f)^2 for a mixture."""
    cell = {"seed": 0, "dim": 8, "num_samples": 40_000, "gating_norm": 2.0, "true_num_experts": 3}
    x, mean_labels = EXPERIMENT.planted(cell | {"case": ["mean", "linear", 0.3]}, 0)
    same, labels = EXPERIMENT.planted(cell | {"case": ["mixture", "linear", 0.3]}, 0)
    np.testing.assert_array_equal(x, same)
    difference = labels - mean_labels  # the noise is the same
    frame = np.linalg.qr(np.random.default_rng([0, 0, 3, 40_000]).normal(size=(8, 8)))[0].T
    gates = np.exp(np.concatenate([2 * x @ frame[3:5].T, np.zeros((len(x), 1))], axis=1))
    gates /= gates.sum(axis=1, keepdims=True)
    means = x @ frame[:3].T
    f = (gates * means).sum(axis=1)
    spread = (gates * (means - f[:, None]) ** 2).sum(axis=1)
    for values in (mean_labels - f, difference):
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(x))
    for values, expected in (((mean_labels - f) ** 2, 0.09), (difference**2, spread)):
        gap = values - expected
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(x))
