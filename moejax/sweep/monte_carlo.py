"""Estimates over repeated trials, each with its Monte Carlo standard error.

Formulae of Morris, White, Crowther 2019, "Using simulation studies to evaluate statistical methods"
(Statistics in Medicine 38, table 6), with n_sim the number of trials. The median's standard error is that
of Maritz and Jarrett 1978, "A note on estimating the variance of the sample median" (JASA 73): the exact
bootstrap variance of a sample median, which needs no density estimate and no random numbers.

Every function takes (cells, trials) arrays of finite numbers, one row per cell, and returns two (cells,)
arrays: the estimate and its Monte Carlo standard error (NaN with a single trial).
"""

from __future__ import annotations

import functools

import numpy as np

from moejax.model.metrics import SUCCESS_THRESHOLD


def mean_and_mcse(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and s / sqrt(n_sim) with s the sample standard deviation (divisor n_sim - 1)."""
    trials = values.shape[1]
    if trials < 2:
        return values.mean(axis=1), np.full(values.shape[0], np.nan)
    return values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(trials)


def median_and_mcse(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median, and the Maritz-Jarrett standard error from the order statistics."""
    if values.shape[1] < 2:
        return np.median(values, axis=1), np.full(values.shape[0], np.nan)
    ordered = np.sort(values, axis=1)
    weights = _maritz_jarrett_weights(values.shape[1])
    centre = ordered @ weights
    variance = (ordered - centre[:, None]) ** 2 @ weights  # centring first avoids cancellation
    return np.median(values, axis=1), np.sqrt(variance)


def root_mean_square_and_mcse(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square of (estimate - truth), and its standard error.

    The mean square has standard error sqrt(sum((e^2 - MSE)^2) / (n_sim (n_sim - 1))); the delta method
    divides by 2 RMSE for its root.
    """
    mean_square, mcse = mean_and_mcse(errors**2)
    root = np.sqrt(mean_square)
    return root, np.divide(mcse, 2 * root, out=np.zeros_like(root), where=root > 0)


def success_and_mcse(recovery_errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of trials with recovery error below 0.02, and sqrt(p (1 - p) / n_sim); NaN counts as no success."""
    trials = recovery_errors.shape[1]
    share = (recovery_errors < SUCCESS_THRESHOLD).mean(axis=1)
    return share, np.sqrt(share * (1 - share) / trials)


@functools.lru_cache(maxsize=256)
def _maritz_jarrett_weights(trials: int) -> np.ndarray:
    """Probability that a bootstrap median is the i-th order statistic (exact for odd numbers of trials)."""
    half = (trials + 1) / 2
    import scipy.special

    edges = scipy.special.betainc(half, half, np.linspace(0, 1, trials + 1))
    return np.diff(edges)
