"""One fit by the objective that its options name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from moejax.fitting.estimation import fit_each, fit_sample
from moejax.fitting.mean import fit_mean
from moejax.fitting.mean_trials import why_not_mean
from moejax.fitting.preparation import Sample
from moejax.fitting.result import FitResult
from moejax.fitting.selection import numbers_to_try
from moejax.methods.options import FitOptions


def fit_by_objective(
    key: jax.Array,
    sample: Sample,
    num_experts: int | str | Sequence[int],
    noise_std: np.ndarray | None,
    options: FitOptions,
) -> FitResult:
    """A fit of one number of experts, or of several among which it chooses, by likelihood, by the mean, or by either.

    Args:
        key: PRNG key.
        sample: the checked sample.
        num_experts: k, several, or "auto".
        noise_std: () or (m,) if it is known.
        options: the checked options.

    Raises:
        ValueError: as in `fit`.
    """
    mixture = dataclasses.replace(options, objective="likelihood")

    def by_likelihood(k: int, least_noise: np.ndarray | None = None) -> FitResult:
        return fit_sample(key, sample, k, noise_std, mixture, least_noise)

    numbers = (num_experts,) if isinstance(num_experts, int) else numbers_to_try(num_experts)
    reason = why_not_mean(sample, noise_std, options)
    if options.objective == "mean" or (options.objective == "auto" and reason is None):
        other = by_likelihood if options.objective == "auto" else None
        return fit_mean(key, sample, numbers, noise_std, options, other)
    if isinstance(num_experts, int):
        result = by_likelihood(num_experts)
    else:
        result = fit_each(num_experts, by_likelihood, num_rows=float(sample.weights.sum()))
    if reason is None or options.objective != "auto":
        return result
    choice = f"likelihood, without a comparison: {reason[0]} is not {reason[1]}"
    return dataclasses.replace(result, diagnostics=result.diagnostics | {"objective_choice": choice})
