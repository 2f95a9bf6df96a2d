"""Entropy and spread of a mixture's labels: against SciPy's adaptive quadrature, and in any units."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from moejax.fitting import predictive
from moejax.fitting.predictive import expected_log_density, root_mean_square


def by_scipy(log_gates, means, noise_std):
    """The integral of p log p over pieces that end at multiples of every standard deviation."""

    def integrand(y):
        value = scipy.special.logsumexp(log_gates + scipy.stats.norm.logpdf(y, means, noise_std))
        return np.exp(value) * value

    ends = np.unique(
        np.concatenate([m + s * np.linspace(-12, 12, 13) for m, s in zip(means, noise_std, strict=True)])
    )
    pieces = itertools.pairwise(ends)
    return sum(scipy.integrate.quad(integrand, a, b, epsabs=1e-11, epsrel=1e-9)[0] for a, b in pieces)


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.03, 1e-3, 1e-6])
def test_expected_log_density_of_narrow_experts_inside_and_beside_wide_ones(ratio):
    noise_std = np.array([1.0, ratio])
    log_gates = np.log([[0.5, 0.5], [0.9, 0.1], [0.001, 0.999]])
    means = np.array([[0.5, 0.7], [-2.0, 1.0], [0.0, 9.0]])
    found = expected_log_density(log_gates, means, noise_std)
    expected = [by_scipy(*row, noise_std) for row in zip(log_gates, means, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)


def test_expected_log_density_in_closed_form_in_any_units_and_parts(monkeypatch):
    means = np.linspace(-3.0, 3.0, 7)[:, None]
    of_one = -0.5 * np.log(2 * np.pi * np.e)
    for unit in (1.0, 1e-200, 1e300):
        found = expected_log_density(np.zeros((7, 1)), unit * means, np.array([unit]))
        np.testing.assert_allclose(found, of_one - np.log(unit), rtol=1e-12)
    # experts that do not overlap: the entropy of the gates and the mean of theirs
    gates, noise_std = np.array([0.2, 0.3, 0.5]), np.array([1.0, 1e-2, 3.0])
    far = np.array([[-1e3, 0.0, 1e4]]) + means
    found = expected_log_density(np.log(gates) + np.zeros((7, 3)), far, noise_std)
    expected = of_one + gates @ (np.log(gates) - np.log(noise_std))
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=0)
    monkeypatch.setattr(
        predictive, "NUMBERS_AT_ONCE", 2 * 9 * 17 * predictive.NODES_IN_PANEL
    )  # two rows at once
    np.testing.assert_array_equal(
        expected_log_density(np.log(gates) + np.zeros((7, 3)), far, noise_std), found
    )


def test_root_mean_squares_do_not_overflow():
    rng = np.random.default_rng(0)
    gates, values = rng.dirichlet(np.ones(3), size=5), rng.normal(size=(5, 3, 2))
    expected = np.sqrt(np.sum(gates[:, :, None] * values**2, axis=1))
    for unit in (1.0, 1e300, 1e-300):
        np.testing.assert_allclose(root_mean_square(gates, unit * values), unit * expected, rtol=1e-12)
    np.testing.assert_allclose(
        root_mean_square(gates, values[:1]), np.sqrt(gates @ values[0] ** 2), rtol=1e-12
    )
    np.testing.assert_array_equal(root_mean_square(gates, np.zeros((5, 3))), 0.0)
