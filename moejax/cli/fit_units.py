"""The units in which a fit is printed and saved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from moejax.fitting.result import FitResult
from moejax.fitting.tables import Dataset
from moejax.model.activations import get_activation
from moejax.model.family import Channel, as_family, channel_facts

UNIT_NAMES = ("data", "standardised")


class Units(NamedTuple):
    """Units in which a fit is shown: inputs (x - input_mean) / input_std, target (y - target_mean) / target_std."""

    name: str
    input_mean: np.ndarray
    input_std: np.ndarray
    target_mean: float
    target_std: float


def data_units(table: Dataset) -> Units:
    """The units of the data without conversion."""
    d = table.x.shape[1]
    return Units(UNIT_NAMES[0], np.zeros(d), np.ones(d), 0.0, 1.0)


def standardised_units(table: Dataset, channel: Channel, intercept: bool) -> Units:
    """Units of standard deviations, about the mean if the model allows it.

    With intercepts, the mean of the inputs is subtracted. The target is scaled if g is homogeneous, and its mean subtracted if g is
    linear with intercepts; for any other g, and for families that are not of a location, it stays unchanged.
    """
    spread = table.x.std(axis=0)
    scaled = channel_facts(channel).homogeneous
    linear = scaled and (as_family(channel).activation is get_activation("linear"))
    return Units(
        UNIT_NAMES[1],
        table.x.mean(axis=0) if intercept else np.zeros(table.x.shape[1]),
        np.where(spread > 0, spread, 1.0),
        float(table.y.mean()) if intercept and linear else 0.0,
        float(table.y.std()) if scaled else 1.0,
    )


def summary_in_units(
    table: Dataset, result: FitResult, posterior: np.ndarray, predicted: np.ndarray, units: Units
) -> dict[str, Any]:
    """Likelihood, error and experts in some units; the table may be a random subsample of the rows that were fitted."""
    num_rows = result.diagnostics.get("num_rows", len(table.y))
    params, errors = result.in_units(units.input_mean, units.input_std, units.target_mean, units.target_std)
    y = (table.y - units.target_mean) / units.target_std
    value = result.log_likelihood + num_rows * math.log(units.target_std)
    effective = posterior.sum(axis=0)

    def by_input(row: np.ndarray) -> dict[str, float]:
        return dict(zip(table.input_names, row.tolist(), strict=True))

    one_noise = result.objective == "mean"  # about the mean of all experts
    experts = []
    for i in range(params.experts.shape[0]):
        experts.append(
            {
                "expert": i + 1,
                "share": float(effective[i] / effective.sum()),
                "effective_samples": float(effective[i]) * num_rows / len(y),
                "bias": float(params.expert_bias[i]),
                "mean_target": float(posterior[:, i] @ y / effective[i]),
                "coefficients": by_input(params.experts[i]),
                "gating": by_input(params.gating[i]),
                "gating_bias": float(params.gating_bias[i]),
            }
        )
        if not one_noise:
            experts[-1]["noise_std"] = float(params.noise_std[i])
        if errors is not None:
            experts[-1] |= {
                "coefficient_errors": by_input(errors.experts[i]),
                "gating_errors": by_input(errors.gating[i]),
                "bias_error": float(errors.expert_bias[i]),
                "gating_bias_error": float(errors.gating_bias[i]),
            }
            if not one_noise:
                experts[-1]["noise_std_error"] = float(errors.noise_std[i])
    noise = {"noise_std": float(params.noise_std[0])} if one_noise else {}
    if one_noise and errors is not None:
        noise["noise_std_error"] = float(errors.noise_std[0])
    return {
        **noise,
        "log_likelihood": value,
        "log_likelihood_per_sample": value / num_rows,
        "rmse": float(np.sqrt(np.mean((predicted - table.y) ** 2))) / units.target_std,
        "experts": experts,
        "scaling": {
            name: np.asarray(number).tolist() for name, number in units._asdict().items() if name != "name"
        },
    }
