"""Checks of the estimator's labels and seeds, the model size that its sample supports, and the fit of one linear expert."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from moejax.checks import brief, brief_text
from moejax.fitting.data_units import require_numbers
from moejax.fitting.diagnostics import input_findings, input_notes
from moejax.fitting.input_roles import input_roles, mapped_inputs
from moejax.fitting.preparation import Sample
from moejax.fitting.result import FitResult
from moejax.fitting.whitening import InputMap, params_in_input_units
from moejax.likelihood.free_columns import FreeColumns, num_coefficients
from moejax.methods.options import FitOptions
from moejax.model.family import LOG_TWO_PI
from moejax.model.mixture import MoEParams


def checked_random_state(value: Any) -> np.random.RandomState:
    """A seed, a generator or None as a NumPy RandomState.

    Raises:
        ValueError: it is something else.
    """
    try:
        return check_random_state(value)
    except (ValueError, TypeError) as error:
        words = "None, a whole number from 0 to 2**32 - 1 or a NumPy RandomState"
        raise ValueError(f"random_state: expected {words}, got {brief(value)}") from error


def require_columns(estimator: Any, X: Any, y: Any = "no_validation", *, reset: bool) -> None:
    """Store the number and the names of the columns of X in an estimator, or compare them with those of its fit.

    Raises:
        ValueError: other columns than in the fit, or names of several types.
    """
    try:
        validate_data(estimator, X, y, reset=reset, skip_check_array=True)
    except TypeError as error:  # names of several types
        raise ValueError(f"X: {brief_text(error)}") from error


class Support(NamedTuple):
    """The model sizes that the distinct samples support."""

    num_experts: tuple[int, ...]
    inputs: InputMap
    """The map to white inputs, in the directions that are fitted."""
    is_reduced: bool
    """True if these directions are fewer than those of the inputs."""
    columns: FreeColumns | None
    """The free columns of the design, if gates and experts do not have the same inputs."""


def supported_size(
    sample: Sample, numbers: Sequence[int], options: FitOptions, *, is_linear: bool
) -> Support:
    """The numbers of experts among `numbers`, and the directions of the inputs, that the distinct samples support.

    If none of them is supported, the largest supported number takes their place. That, and fewer directions than there are, is a
    ConvergenceWarning at the line that calls the caller.
    """
    distinct = len(pd.DataFrame(np.column_stack([sample.x, sample.y])).drop_duplicates())
    fit_intercept, roles = options.fit_intercept, input_roles(options, sample.x.shape[1])
    mapped = mapped_inputs(
        sample.x, sample.weights, roles, fit_intercept=fit_intercept, precision=sample.precision
    )
    inputs, rank = mapped.of_experts, mapped.num_expert_inputs
    of_expert, of_gate = num_coefficients(rank, fit_intercept, mapped.columns)
    most = max((distinct - 2 + of_gate) // max(of_expert + of_gate, 1), 1) if of_expert else 1
    supported = min(max(numbers), most)
    same = bool(np.all(sample.y == sample.y[0])) and (fit_intercept or not sample.y[0].any())
    if is_linear and (same or rank == 0):
        supported = 1  # the data cannot distinguish more experts
    directions = rank if supported > 1 else min(rank, max(distinct - 2 - int(fit_intercept), 0))
    admitted = tuple(k for k in numbers if k <= supported) or (supported,)
    if supported < min(numbers) or directions < rank:
        of = f"{directions} of {rank} principal directions" if directions < rank else f"{rank} directions"
        warnings.warn(
            f"num_experts={min(numbers)}: {distinct} distinct samples support {supported} of {of} of the inputs",
            ConvergenceWarning,
            stacklevel=3,
        )
    if directions < rank:
        return Support(admitted, _leading_directions(sample, inputs, directions), True, None)
    return Support(admitted, inputs, False, mapped.columns)


def _leading_directions(sample: Sample, inputs: InputMap, count: int) -> InputMap:
    """The map to the first principal directions of the inputs, in units of their spreads."""
    share = sample.weights / sample.weights.sum()
    centred = sample.x - inputs.mean
    size = np.abs(centred).max(axis=0)
    varies = np.any(inputs.matrix != 0.0, axis=1)
    unit = np.where(varies, size, 1.0)
    spread = unit * np.sqrt(share @ (centred / unit) ** 2)
    scale = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0)
    directions = np.linalg.svd(centred * scale * np.sqrt(share)[:, None], full_matrices=False)[2]
    matrix = scale[:, None] * directions[:count].T
    return inputs._replace(matrix=matrix, dropped=len(scale) - count, identity=False)


def least_squares_fit(
    sample: Sample, inputs: InputMap, fit_intercept: bool, noise_std: np.ndarray | None
) -> FitResult:
    """One linear expert: its maximum-likelihood estimate, in units of y and for the mapped inputs."""
    x, y, weights = sample[:3]
    z = inputs(x)
    share = weights / weights.sum()
    unit = np.abs(y).max() or 1.0
    labels = y / unit
    # inputs that were already standard normal have not been centred
    middle, mean = (share @ z, float(share @ labels)) if fit_intercept else (np.zeros(z.shape[1]), 0.0)
    root = np.sqrt(share)
    coefficients = np.linalg.lstsq((z - middle) * root[:, None], (labels - mean) * root, rcond=None)[0]
    mean = mean - float(middle @ coefficients)
    spread = math.sqrt(float(share @ (labels - mean - z @ coefficients) ** 2))
    # the rounding residual of an exact fit is no noise level
    smallest = math.sqrt(np.finfo(float).eps * float(share @ labels**2) + np.finfo(float).tiny)
    sigma = max(spread, smallest) if noise_std is None else float(noise_std) / unit
    none = np.zeros_like(coefficients)[None]
    fitted = MoEParams(coefficients[None], none, np.full(1, sigma), np.full(1, mean), np.zeros(1))
    with np.errstate(over="ignore"):
        squares = float(
            np.square(np.divide(spread, sigma))
        )  # infinite for a noise that is tiny beside the labels' spread
    value = -0.5 * squares - math.log(sigma) - math.log(unit) - 0.5 * LOG_TWO_PI
    found = input_findings(inputs)
    diagnostics = {
        "method": "least squares",
        "activation": "linear",
        "num_passes": 1,
        **found,
        "notes": input_notes(found),
    }
    with np.errstate(over="ignore", invalid="ignore"):
        params = MoEParams(
            unit * fitted.experts, none, unit * fitted.noise_std, unit * fitted.expert_bias, np.zeros(1)
        )
        params = params_in_input_units(params, inputs.mean, inputs.matrix)
    require_numbers(params, fitted)
    return FitResult(params, float(weights.sum()) * value, np.zeros(0), diagnostics, "ok")
