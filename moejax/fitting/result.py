"""The result of a fit."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moejax.fitting.data_units import DataUnits
from moejax.likelihood.information import Covariance, confidence_intervals
from moejax.model.mixture import HostParams, MoEParams, NoiseModel


class FittedInOwnUnits(NamedTuple):
    """A fit in its own units; parameters and errors in other units are computed from it."""

    params: MoEParams
    covariance: Covariance | None
    """None if there are no standard errors."""
    units: DataUnits
    noise: NoiseModel
    fit_intercept: bool

    def errors(self, units: DataUnits) -> HostParams | None:
        """Standard errors in these units; None if there is no covariance."""
        if self.covariance is None:
            return None
        return units.errors(self.covariance, self.params, noise=self.noise, fit_intercept=self.fit_intercept)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A fitted mixture of experts, the result of `fit`.

    Examples:
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 500)
        >>> result = moejax.fit(jax.random.key(1), x, y, num_experts=2, method="spectral_em")
        >>> low, high = result.intervals(level=0.95)
        >>> bool((low.noise_std < 0.1).all() and (0.1 < high.noise_std).all())
        True
    """

    params: HostParams
    """NumPy arrays in double precision, in the units of the given x and y."""
    log_likelihood: float
    """Weighted sum over samples, in nats, in the units of the given y."""
    history: np.ndarray
    """(passes,) objective in nats along the passes over the data: the log-likelihood minus the ridge's penalty on the gates
    (at the end `diagnostics["ridge_penalty"]`). The gradient baselines omit the penalty; for "spectral" it is empty."""
    diagnostics: dict[str, Any]
    """Diagnostics of the data and of the theory's assumptions: numbers by name, and "notes" in words."""
    status: str
    """"ok", or the reason not to trust the result. It is ok if the method converged in its own objective. A least squared error
    (gradient_mse) or fixed experts (gated_losses, spectral) are no maximum of the likelihood;
    `diagnostics["nats_below_maximum"]` is the distance from one."""
    standard_errors: HostParams | None = None
    """Standard error of every parameter, in its unit: 0 if it was not estimated, NaN if the data do not determine it. None if the
    fit did not end at a maximum: the formula holds only there. Along directions in which the inputs do not vary
    (`diagnostics["collinear_inputs"]`) experts and gates are zero by choice; the errors cover the other directions."""
    selection: pd.DataFrame | None = None
    """A row of criteria for each number of experts, if several were tried (see `moejax.fitting.selection`)."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Every option of the fit by name, as used, and the precision of the computation; they are enough to repeat it."""
    _fitted: FittedInOwnUnits | None = dataclasses.field(default=None, repr=False)

    def in_units(
        self,
        input_mean: np.ndarray,
        input_std: np.ndarray,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> tuple[HostParams, HostParams | None]:
        """(parameters, standard errors) for inputs (x - input_mean) / input_std and labels (y - target_mean) / target_std.

        Args:
            input_mean: (d,), zero for a fit without intercepts.
            input_std: (d,), positive.
            target_mean: must be zero unless g is linear with intercepts.
            target_std: must be one unless g is homogeneous.

        Raises:
            ValueError: this result was not made by `fit`.
        """
        if self._fitted is None:
            raise ValueError("in_units: this result was not made by fit, and has no units of its own")
        units = self._fitted.units.seen_from(input_mean, input_std, target_mean, target_std)
        return units.params(self._fitted.params), self._fitted.errors(units)

    def intervals(self, level: float = 0.95) -> tuple[HostParams, HostParams]:
        """(lower, upper) ends of a Wald interval for each parameter; for sigma on the log scale.

        Raises:
            ValueError: there are no standard errors, or the level is not between 0 and 1.
        """
        if self.standard_errors is None:
            raise ValueError(f"intervals: this fit has no standard errors; its status is {self.status!r}")
        return confidence_intervals(
            self.params,
            self.standard_errors,
            level,
            noise=self.diagnostics["noise"],
            fit_intercept=self.diagnostics["fit_intercept"],
            num_inputs=self.params.experts.shape[-1] - self.diagnostics["collinear_directions_dropped"],
        )
