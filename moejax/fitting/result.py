"""The result of a fit."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from moejax.checks import require
from moejax.fitting.data_units import DataUnits
from moejax.fitting.label_units import LabelMap
from moejax.fitting.result_predictions import ResultPredictions
from moejax.fitting.whitening import InputMap
from moejax.likelihood.free_columns import FreeColumns
from moejax.likelihood.information import Covariance, confidence_intervals
from moejax.likelihood.predictors import num_free_parameters
from moejax.model.activations import ScalarFunction
from moejax.model.family import Family
from moejax.model.mixture import AnyParams, HostParams, NoiseModel

if TYPE_CHECKING:
    from moejax.fitting.summary import FitSummary


class FittedInOwnUnits(NamedTuple):
    """A fit in its own units; parameters and errors in other units are computed from it."""

    params: AnyParams
    """On the host."""
    covariance: Covariance | None
    """None if there are no standard errors."""
    units: DataUnits
    noise: NoiseModel
    fit_intercept: bool
    """True if the experts have biases."""
    columns: FreeColumns | None = None
    """The free columns of the design, if gates and experts do not have the same inputs."""

    @property
    def num_expert_inputs(self) -> int:
        """The rank of the experts' inputs."""
        return self.units.inputs.rank if self.columns is None else len(self.columns.expert_inputs)

    @property
    def num_parameters(self) -> int:
        """P, the number of free parameters."""
        shape, rank = self.params.noise_std.shape, self.units.inputs.rank
        outputs = 1 if len(shape) == 1 else shape[1]
        return num_free_parameters(shape[0], rank, self.noise, self.fit_intercept, outputs, self.columns)

    def errors(self, units: DataUnits) -> HostParams | None:
        """Standard errors in these units; None if there is no covariance."""
        if self.covariance is None:
            return None
        return units.errors(
            self.covariance,
            self.params,
            noise=self.noise,
            fit_intercept=self.fit_intercept,
            columns=self.columns,
        )


NO_LARGE_MATRIX = (
    "they need the information matrix of all coefficients, which a method for many inputs does not form"
)


def in_given_units(params: HostParams, *, fit_intercept: bool) -> FittedInOwnUnits:
    """Parameters for the user's x and y as a fit in these units, without a covariance."""
    d = params.experts.shape[-1]
    inputs = InputMap(np.zeros(d), np.ones(d), 0, True)
    labels = LabelMap(0.0, np.ones(params.noise_std.shape[1:]))
    return FittedInOwnUnits(params, None, DataUnits(inputs, labels), "shared", fit_intercept)


@dataclasses.dataclass(frozen=True)
class FitResult(ResultPredictions):
    """A fitted mixture of experts, the result of `fit`, which also predicts at new rows in the units of the given x.

    Attributes:
        params: NumPy arrays in double precision, in the units of the given x and y. The experts are in the order of their shares,
            the sums of their responsibilities, the largest first; experts with equal shares in that of their first coefficient.
        log_likelihood: weighted sum over samples, in nats, in the units of the given y.
        history: (passes,) objective in nats along the passes over the data: the log-likelihood minus the ridge's penalty on the
            gates (at the end `diagnostics["ridge_penalty"]`). The gradient baselines omit the penalty; for "spectral" it is empty.
        diagnostics: numbers by name, and "notes" in words; see below.
        status: "ok", or a reason not to trust the result. It is "ok" if the method converged in its own objective; that does not
            mean that the model is right or the sample large enough. A least squared error (gradient_mse) or fixed experts
            (gated_losses, spectral) are no maximum of the likelihood; `diagnostics["nats_below_maximum"]` is the distance from one.
        standard_errors: standard error of every parameter, in its unit: 0 if it was not estimated, NaN if the data do not
            determine it. None if the fit did not end at a maximum: the formula holds only there. Along directions in which the
            inputs do not vary (`diagnostics["collinear_inputs"]`) experts and gates are zero by choice; the errors cover the
            other directions.
        selection: a row of criteria for each number of experts, if several were tried (see `moejax.fitting.selection`).
        settings: every option of the fit by name, as used, and the precision of the computation; they are enough to repeat it.
        objective: the density of a label, "likelihood" for the mixture or "mean" for N(y; f(x), s^2), f = sum_i P_i m_i.

    The keys of `diagnostics`:

    - about the run: `activation`, `method`, `noise`, `fit_intercept`, `order` of the tensor and `order_choice` (its reason),
      `moment_noise_std` (the sigma of the label transforms), `mixing_weights`, `num_passes` over the data, `num_samples` (the sum
      of the weights), `has_offset`, and `input_names` if the inputs have names;
    - about the inputs: `inputs_standard_normal`, `collinear_directions_dropped` (constant columns included), `collinear_inputs`
      (the columns of each dropped direction, from 0), `constant_inputs`, `nearly_collinear_inputs` (these are kept), `input_mean`
      (the distance of the mean of the white inputs from zero), `input_kurtosis` (the mean of (z'z)^2 over that of normal inputs);
    - about the estimate: `expert_norms` and `gate_angle_degrees` for white inputs (the least angle between a gate and the experts'
      span; 90 if the moments are exact), `effective_samples` (sums of responsibilities), `classification_entropy` (theirs, in
      nats), `collapsed_experts` (their noise ran off to zero on a few rows), `exact_experts` (their noise is held at the floor,
      because they fit many rows exactly), `noise_floor` (the least noise of an expert if each has its own, in units of y;
      `moejax.likelihood.collapse`), `ridge_penalty` (nats by which the objective is below the log-likelihood);
    - about the maximum, NaN or empty if there is none: `nats_below_maximum`, `information_condition` (of a unit diagonal),
      `ridge_cost` (nats of log-likelihood), `gates_held_by_ridge` (experts, from 1);
    - with moments: `transform_signal` by order (the correlation of l(Y) and He_m(Z)), `second_moment_eigenvalues`,
      `tensor_eigenvalues`, `spectral_status`;
    - from `spectral_wide`: `input_correlation` (the sum of an input's squared correlations with the others, averaged over inputs;
      zero if they are uncorrelated), and `gate_ridge` (the ridge on the gates);
    - from a mean fit: `effective_parameters` (coefficients that the data determine), `log_evidence`, `ridge_experts` and
      `ridge_gates` (precisions, for white inputs and labels in their own unit), and with objective "auto" `objective_choice` (the
      difference of BIC, in words); `effective_samples` are then sums of gates;
    - from `multistart`: `optima` (log-likelihoods of the best distinct optima), `optima_spread`, `num_starts` (starts made,
      children included) and `search_end` (why it ended, in words).

    Several outputs have norms (k, m).

    Examples:
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 500)
        >>> result = moejax.fit(jax.random.key(1), x, y, num_experts=2, method="spectral_em")
        >>> low, high = result.intervals(level=0.95)
        >>> bool((low.noise_std < 0.1).all() and (0.1 < high.noise_std).all())
        True
        >>> result.predict_interval(x[:3], level=0.9).shape
        (3, 2)
    """

    params: HostParams
    log_likelihood: float
    history: np.ndarray
    diagnostics: dict[str, Any]
    status: str
    standard_errors: HostParams | None = None
    selection: pd.DataFrame | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: Literal["likelihood", "mean"] = "likelihood"
    _fitted: FittedInOwnUnits | None = dataclasses.field(default=None, repr=False)
    _averaged: tuple[FittedInOwnUnits, ...] = dataclasses.field(default=(), repr=False)
    _function: ScalarFunction | None = dataclasses.field(default=None, repr=False)
    _family: Family | None = dataclasses.field(default=None, repr=False)

    @property
    def members(self) -> tuple[HostParams, ...]:
        """The models over which predictions are averaged, the first of which is `params`."""
        return tuple(member.units.params(member.params) for member in self._averaged) or (self.params,)

    @property
    def models(self) -> tuple[FittedInOwnUnits, ...]:
        """The members with their units and covariances, for predictions."""
        if self._averaged:
            return self._averaged
        intercept = bool(self.diagnostics.get("fit_intercept", True))
        return (self._fitted or in_given_units(self.params, fit_intercept=intercept),)

    def _own_fit(self, name: str) -> FittedInOwnUnits:
        if self._fitted is None:
            raise ValueError(f"{name}: this result was not made by fit, and has no units of its own")
        return self._fitted

    @property
    def num_parameters(self) -> int:
        """The number of free parameters, as AIC and BIC count them."""
        of_family = int(self.diagnostics.get("family_parameters", 0))
        return self._own_fit("num_parameters").num_parameters + of_family

    def in_units(
        self,
        input_mean: np.ndarray,
        input_std: np.ndarray,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> tuple[HostParams, HostParams | None]:
        """Return the fit for inputs (x - input_mean) / input_std and labels (y - target_mean) / target_std.

        Args:
            input_mean: (d,); zero for a fit without intercepts.
            input_std: (d,), positive.
            target_mean: zero unless g is linear with intercepts; for another g with intercepts this is not checked.
            target_std: positive; one unless g is homogeneous, which is not checked.

        Returns:
            The parameters, and their standard errors (None if there are none).

        Raises:
            ValueError: this result was not made by `fit`; a shape or a value that the arguments above exclude; or units in which
                double precision cannot represent the parameters.
        """
        own = self._own_fit("in_units")
        input_mean, input_std = np.asarray(input_mean, float), np.asarray(input_std, float)
        shape, intercepts = (self.params.experts.shape[-1],), own.fit_intercept
        for name, given in (("input_mean", input_mean), ("input_std", input_std)):
            require(
                given.shape == shape and bool(np.isfinite(given).all()), name, f"{shape[0]} numbers", given
            )
        require(bool((input_std > 0).all()), "input_std", "positive numbers", input_std)
        require(math.isfinite(target_std) and target_std > 0, "target_std", "a positive number", target_std)
        for name, mean in (("input_mean", input_mean), ("target_mean", target_mean)):
            require(intercepts or not np.any(mean), name, "zero for a fit without intercepts", mean)
        units = own.units.seen_from(input_mean, input_std, target_mean, target_std)
        return units.params(own.params), own.errors(units)

    def intervals(self, level: float = 0.95) -> tuple[HostParams, HostParams]:
        """Return the lower and the upper end of a Wald interval for each parameter.

        The intervals are estimate -+ z se. That of sigma is sigma exp(m se^2 -+ z se), se the standard error of log sigma and m the
        number of expert coefficients that share one sigma: the first term corrects the bias of the estimated log sigma.

        Args:
            level: probability that one interval holds its parameter.

        Raises:
            ValueError: there are no standard errors, or the level is not between 0 and 1.

        Source: docs/evidence/efficiency.md.
        """
        if self.standard_errors is None:
            raise ValueError(f"intervals: no standard errors, because {self._why_no_errors()}")
        return confidence_intervals(
            self.params,
            self.standard_errors,
            level,
            noise=self.diagnostics["noise"],
            fit_intercept=self.diagnostics["fit_intercept"],
            num_inputs=self._own_fit("intervals").num_expert_inputs,
            corrected=self.diagnostics.get("family", "gaussian") == "gaussian",
        )

    def summary(self, *, level: float = 0.95, feature_names: Sequence[str] | None = None) -> FitSummary:
        """Return the tables of the fit: criteria and status, and each expert's estimates with errors, tests and intervals.

        `print` shows them. The attributes are `header`, a Series; `experts`, a DataFrame each, with the part ("expert", "gate" or
        "noise") and the input as its index; and `notes`. Gates are relative to the last expert, which has none.

        Args:
            level: probability that one interval holds its parameter.
            feature_names: (d,) names of the inputs; None takes those of the table or the source that was fitted, or x1, x2, ..

        Raises:
            ValueError: another number of names, or a level that is not between 0 and 1.

        Examples:
            >>> x = np.random.default_rng(0).normal(size=(100, 1))
            >>> y = 2.0 * x[:, 0] + np.random.default_rng(1).normal(size=100)
            >>> result = moejax.fit(jax.random.key(0), x, y, num_experts=1, method="joint_em")
            >>> table = result.summary(feature_names=["height"]).experts[0]
            >>> table.loc[("expert", "height"), ["coefficient", "std error"]].round(1).tolist()
            [2.0, 0.1]
        """
        from moejax.fitting.summary import summary_of

        return summary_of(self, level, feature_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to one file, from which `moejax.load_fit` makes it again, with every number to its last digit.

        The activation is stored by its name: one that is not registered is given to `load_fit`. The file is written whole or not
        at all, and replaces no file but that of another saved fit.

        Raises:
            ValueError: another file has this name; OSError: the file cannot be written.
        """
        from moejax.fitting.saved import save_fit

        save_fit(self, path)

    def _why_no_errors(self) -> str:
        if self.params.experts.ndim == 3:
            return "they are for one output"
        if self.status != "ok":
            return f"the status is {self.status!r}"
        if "input_correlation" in self.diagnostics:
            return NO_LARGE_MATRIX
        method = self.diagnostics.get("method", "")
        return (
            f'method {method!r} did not end at a maximum of the likelihood; method="spectral_em" ends at one'
        )
