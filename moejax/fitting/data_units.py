"""A fit's parameters and their standard errors in the units of the user's data, on the host in double precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moejax.checks import require
from moejax.fitting.label_units import LabelMap
from moejax.fitting.whitening import InputMap, params_in_input_units
from moejax.likelihood.free_columns import FreeColumns, expert_columns, gate_columns
from moejax.likelihood.information import Covariance
from moejax.likelihood.predictors import num_noise_parameters
from moejax.model.mixture import AnyParams, HostParams, MoEParams, NoiseModel

SMALLEST = float(np.finfo(float).tiny)
"""Smallest normal number: numbers nearer to zero have fewer digits."""
NEGLIGIBLE = 1e-8
"""Largest coefficient, for white inputs and labels in their own unit, that counts as zero."""
UNITS = "units in which the coefficients and the noise are numbers in double precision"


def are_numbers(params: HostParams) -> bool:
    """True if parameters, as NumPy arrays, are finite and no noise is so near zero that it lost digits."""
    return all(np.isfinite(leaf).all() for leaf in params) and bool((params.noise_std >= SMALLEST).all())


def require_numbers(params: HostParams, fitted: HostParams) -> None:
    """Refuse parameters that double precision cannot represent.

    Args:
        params: parameters in the units of the data.
        fitted: the same parameters for white inputs and labels in their own unit.

    Raises:
        ValueError: a coefficient is infinite, or a noise or all coefficients of an expert or a gate became zero.
    """
    require(are_numbers(params), "x, y", UNITS, [np.abs(params.experts).max(), params.noise_std.min()])
    for before, after in ((fitted.experts, params.experts), (fitted.gating, params.gating)):
        sizes = (np.abs(values).max(axis=-1, initial=0.0) for values in (before, after))
        vanished = (next(sizes) > NEGLIGIBLE) & (next(sizes) < SMALLEST)
        require(not vanished.any(), "x, y", UNITS, "coefficients that vanish")


class DataUnits(NamedTuple):
    """The maps from the user's inputs and labels to the fitted ones."""

    inputs: InputMap
    labels: LabelMap

    def seen_from(
        self, input_mean: np.ndarray, input_std: np.ndarray, target_mean: float = 0.0, target_std: float = 1.0
    ) -> DataUnits:
        """The units if the user's inputs were (x - input_mean) / input_std and the labels (y - target_mean) / target_std."""
        inputs = self.inputs._replace(
            mean=(self.inputs.mean - input_mean) / input_std,
            matrix=(self.inputs.matrix.T * np.asarray(input_std)).T,
        )
        labels = LabelMap((self.labels.shift - target_mean) / target_std, self.labels.scale / target_std)
        return DataUnits(inputs, labels)

    def params(self, params: AnyParams) -> HostParams:
        """Parameters of the fit (any kind of array) turned into parameters for the user's x and y.

        With z = (x - mean) @ M and fitted labels (y - shift) / scale, a_x = scale M a_z and b_x = shift + scale b_z - a_x . mean.

        Raises:
            ValueError: double precision cannot represent them in the user's units.
        """
        host = MoEParams(*(np.asarray(leaf, np.float64) for leaf in params))
        scale = np.asarray(self.labels.scale, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = host._replace(
                experts=host.experts * scale[..., None],
                noise_std=host.noise_std * scale,
                expert_bias=host.expert_bias * scale + self.labels.shift,
            )
            given = params_in_input_units(scaled, self.inputs.mean, self.inputs.matrix)
        if are_numbers(host):
            # the coefficient of an offset is that of none of the user's inputs
            own = np.where(self.inputs.matrix.any(axis=0), host.experts, 0.0)
            require_numbers(given, host._replace(experts=own))
        return given

    def errors(
        self,
        of: Covariance,
        params: AnyParams,
        *,
        noise: NoiseModel,
        fit_intercept: bool,
        columns: FreeColumns | None = None,
    ) -> HostParams:
        """Standard errors of `params(..)`: zero if a parameter was not estimated, NaN if the data do not determine it.

        Every row of coefficients is a linear function T of one row of the fit, so its covariance is T C T', C that of the fit's
        row.

        Args:
            of: covariance of the fit's free parameters, for one output.
            params: parameters of the fit.
            noise: which noise parameters are free; the error of sigma is sigma times that of log sigma.
            fit_intercept: if true, biases are free.
            columns: the free columns of the design; None for all.
        """
        mean, matrix = (np.asarray(a, np.float64) for a in (self.inputs.mean, self.inputs.matrix))
        (d, rank), k = matrix.shape, np.shape(params.noise_std)[0]
        turned, has_biases = matrix, fit_intercept if columns is None else columns.has_ones
        if has_biases:
            turned = np.zeros((d + 1, rank + 1))
            turned[:d, :rank], turned[d, :rank], turned[d, rank] = matrix, -mean @ matrix, 1.0
        tolerance = math.sqrt(np.finfo(np.asarray(of.matrix).dtype).eps)
        matrices = [np.asarray(a, np.float64) for a in (of.matrix, of.null, of.scale)]

        def of_rows(turned: np.ndarray, first: int, count: int) -> list[np.ndarray]:
            # rows of T may have any scale: they are squared in units of their largest entry
            unit = np.maximum(np.abs(turned).max(axis=1, initial=0.0), np.finfo(float).tiny)
            turned, size = turned / unit[:, None], turned.shape[1]

            def of_row(index: int) -> np.ndarray:
                block = slice(first + index * size, first + (index + 1) * size)
                variance, null, scale = (
                    np.sum((turned @ a[block, block]) * turned, axis=1) for a in matrices
                )
                errors = np.where(null <= tolerance * scale, np.sqrt(np.maximum(variance, 0.0)), np.nan)
                return np.where(scale > 0, unit * errors, 0.0)

            return [of_row(index) for index in range(count)]

        of_expert, of_gate = expert_columns(turned, columns), gate_columns(turned, columns)
        first = k * of_expert.shape[1]
        errors = of_rows(of_expert, 0, k) + of_rows(of_gate, first, k - 1)
        rows = np.stack([*errors, np.zeros(len(turned))])
        if not has_biases:
            rows = np.concatenate([rows, np.zeros((2 * k, 1))], axis=1)
        label_scale = float(self.labels.scale)
        noise_std = np.asarray(params.noise_std, np.float64)
        levels = first + (k - 1) * of_gate.shape[1] + np.arange(num_noise_parameters(noise, k))
        variance, null, scale = (np.diag(a)[levels] for a in matrices)
        log_errors = np.where(null <= tolerance * scale, np.sqrt(variance), np.nan)
        noise_errors = noise_std * (np.broadcast_to(log_errors, k) if levels.size else np.zeros(k))
        return MoEParams(
            label_scale * rows[:k, :d],
            rows[k:, :d],
            label_scale * noise_errors,
            label_scale * rows[:k, d],
            rows[k:, d],
        )
