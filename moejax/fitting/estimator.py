r"""`MoERegressor`: a mixture of experts as a scikit-learn estimator.

With P = softmax(w . x + c) and m_i(x) = g(a_i . x + b_i), a label has the density of the mixture or of the mean,

    p(y | x) = sum_i P_i(x) N(y; m_i(x), sigma_i^2)   or   N(y; sum_i P_i(x) m_i(x), s^2).

Linear experts, and those of any homogeneous g, are reported in the user's units. Any other activation needs a
target in its range (scikit-learn's TransformedTargetRegressor makes one). Several targets share the gates. With another `family`,
such as "poisson" for counts, the density of an expert is its own, and the objective is the mixture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, column_or_1d

from moejax.fitting.arguments import CHECKS, checked_options, noise_levels, number_of_experts
from moejax.fitting.array_checks import (
    as_numbers,
    checked_inputs,
    checked_targets,
    checked_weights,
    input_precision,
)
from moejax.fitting.estimator_inputs import (
    Support,
    checked_random_state,
    least_squares_fit,
    supported_size,
)
from moejax.fitting.estimator_predictions import Predictions
from moejax.fitting.input_roles import names_of, roles_undone, with_numbered_columns
from moejax.fitting.label_units import is_linear, labels_note
from moejax.fitting.objectives import fit_by_objective
from moejax.fitting.preparation import Sample, rescaled_weights
from moejax.fitting.result import FitResult
from moejax.fitting.selection import numbers_to_try
from moejax.fitting.whitening import InputMap, params_in_input_units
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.options import Column, EstimatedNoise, FitOptions, Gate, Objective, WeightsAre
from moejax.model.activations import ActivationLike, activation_name
from moejax.model.families import FamilyLike, get_family
from moejax.model.family import Family, as_family
from moejax.moments.label_transforms import TransformKind


class MoERegressor(Predictions, RegressorMixin, BaseEstimator):
    """Mixture-of-experts regression, which chooses the density of its labels and the number of its experts.

    Inputs are whitened. k experts need (2k - 1) r + 2 distinct samples, r the rank of the inputs, plus one with intercepts; if
    there are fewer, fewer experts (at least one, of the leading principal directions) are fitted, with a warning.

    Args:
        num_experts: k; or several, or "auto" for 1 to 12, among which evidence or BIC chooses, as in `moejax.fit`.
        activation: g, a registered name or a scalar JAX function.
        family: the output family, such as "poisson" or "student_t", as in `moejax.fit`; "gaussian" by default.
        noise: one sigma for all experts, "shared", or one each, "per_expert".
        noise_std: sigma if it is known, in units of y, () or (m,); None estimates it.
        fit_intercept: give experts and gates biases.
        gate, gate_inputs, expert_inputs: constant gates, and the columns of gates and experts, as in `moejax.fit`.
        method: a registered method. With the default, a single linear expert of a likelihood fit is fitted by least squares.
        objective: "likelihood" (the mixture), "mean", or "auto", which takes the one with more evidence (`moejax.FitOptions`).
        average: predictions are those of this many of the best distinct optima, with equal weights.
        standardise: scale the target of a homogeneous activation for the fit, so that its units do not matter.
        weights_are: the meaning of `sample_weight`, as in `moejax.fit`.
        num_starts: random starts; None takes the method's own number.
        max_iterations: budget of passes of the last stage.
        order: order of the tensor that moments decompose; None chooses.
        transform_kind: the option `transform` of `moejax.fit`; by that name scikit-learn would take this for a transformer.
        ridge: ridge on the gates for whitened inputs, the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats, and in a mean fit
            also on the experts' slopes; "evidence"; or None, which is 1e-6 by likelihood and "evidence" by the mean.
        precision: precision of the computation; None takes JAX's current default.
        random_state: seed, generator or None, for random starts.

    Attributes:
        params_: MoEParams of NumPy arrays, for X and y in the user's units.
        coef_, intercept_: (k, d), (k,) of the experts, from `params_`; gating_coef_, gating_intercept_: of the gates, the last 0.
        noise_std_: (k,) in units of y.
            With m targets, coef_ is (k, m, d), intercept_ and noise_std_ (k, m).
        num_experts_: the number of fitted experts; method_: the method that fitted them; objective_: "likelihood" or "mean".
        members_: the models over which predictions are averaged, the first being `params_`.
        selection_: criteria for each number of experts and objective that was tried, a DataFrame; None if there was one.
        n_parameters_: free parameters, those of dropped directions not counted.
        log_likelihood_: weighted sum over the training sample, in nats, in units of y.
        history_, status_, diagnostics_: as in `moejax.FitResult`; n_iter_: passes over the data.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Examples:
        >>> X = np.random.default_rng(0).uniform(-1, 1, (400, 1))
        >>> y = np.abs(X[:, 0]) + 0.05 * np.random.default_rng(1).normal(size=400)
        >>> model = moejax.MoERegressor(num_experts=2, method="joint_em", random_state=0).fit(X, y)
        >>> model.predict([[-0.5], [0.5]]).round(1).tolist()
        [0.5, 0.5]
    """

    def __init__(
        self,
        num_experts: int | str | Sequence[int] = "auto",
        activation: ActivationLike = FitOptions.activation,
        *,
        family: FamilyLike = FitOptions.family,
        noise: EstimatedNoise = FitOptions.noise,
        noise_std: float | None = None,
        fit_intercept: bool = True,
        gate: Gate = FitOptions.gate,
        gate_inputs: Sequence[Column] | None = FitOptions.gate_inputs,
        expert_inputs: Sequence[Column] | None = FitOptions.expert_inputs,
        method: str = FitOptions.method,
        objective: Objective = "auto",
        average: int = FitOptions.average,
        standardise: bool = FitOptions.standardise,
        weights_are: WeightsAre | None = FitOptions.weights_are,
        num_starts: int | None = FitOptions.num_starts,
        max_iterations: int = FitOptions.max_iterations,
        order: int | None = FitOptions.order,
        transform_kind: TransformKind | None = FitOptions.transform,
        ridge: float | Literal["evidence"] | None = FitOptions.ridge,
        precision: Literal["float32", "float64"] | None = "float64",
        random_state: Any = None,
    ):
        self.num_experts = num_experts
        self.activation = activation
        self.family = family
        self.noise: EstimatedNoise = noise
        self.noise_std = noise_std
        self.fit_intercept = fit_intercept
        self.gate: Gate = gate
        self.gate_inputs = gate_inputs
        self.expert_inputs = expert_inputs
        self.method = method
        self.objective: Objective = objective
        self.average = average
        self.standardise = standardise
        self.weights_are: WeightsAre | None = weights_are
        self.num_starts = num_starts
        self.max_iterations = max_iterations
        self.order = order
        self.transform_kind: TransformKind | None = transform_kind
        self.ridge: float | Literal["evidence"] | None = ridge
        self.precision = precision
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> MoERegressor:
        """Fit to X (n, d), y (n,) or (n, m), and non-negative weights (n,), whose meaning is that of `weights_are`.

        Raises:
            ValueError: arrays or settings that cannot be fitted, in one line.
        """
        options = self._options()
        chosen = number_of_experts(self.num_experts)
        numbers = (chosen,) if isinstance(chosen, int) else numbers_to_try(chosen)
        channel = options.channel
        gaussian = not isinstance(channel, Family)
        linear = gaussian and is_linear(channel)
        checked_random_state(self.random_state)
        x = checked_inputs(X, "X", least_rows=2)
        self.require_columns(X, y, reset=True)
        options = with_numbered_columns(options, x.shape[1], names_of(X))
        y = as_numbers(y, "y")
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        y = checked_targets(y, len(x), rows_of="X")
        weights = checked_weights(sample_weight, len(x), "sample_weight", "X")
        levels = noise_levels(self.noise_std, y.shape[1:])
        weights, _ = rescaled_weights(weights, options.weights_are)
        used = weights > 0  # a small weight may have become zero
        sample = Sample(x[used], y[used], weights[used], input_precision(X))
        support = supported_size(sample, numbers, options, is_linear=linear)
        num_experts, inputs, is_reduced, columns = support
        rank = inputs.matrix.shape[1]
        constant = bool(np.any(sample.y.max(axis=0) == sample.y.min(axis=0)))
        alone = linear and num_experts == (1,) and y.ndim == 1
        by_default = self.method == FitOptions.method and options.objective != "mean"
        if alone and (by_default or rank == 0 or constant):
            result, is_reduced = least_squares_fit(sample, inputs, self.fit_intercept, levels), False
        elif rank == 0 or constant:
            what = "X" if rank == 0 else "y"
            raise ValueError(
                f"{what}: expected values that vary, in 4 or more distinct samples, to fit experts"
            )
        else:
            result = self._run(sample, support, levels, options)
        self._keep(result, inputs if is_reduced else None)
        noise = "shared" if result.objective == "mean" else self.noise
        of_family = result.diagnostics.get("family_parameters", 0)
        known = self.noise_std is not None or not as_family(channel).has_dispersion
        self.n_parameters_ = of_family + num_free_parameters(
            self.num_experts_,
            rank,
            "known" if known else noise,
            self.fit_intercept,
            num_outputs=1 if y.ndim == 1 else y.shape[1],
            columns=columns,
        )
        note = None
        if not isinstance(channel, Family):
            note = labels_note(sample.y, sample.weights, channel, activation_name(self.activation))
        if note is not None:
            warnings.warn(f"y: {note}", UserWarning, stacklevel=2)
        return self

    def _keep(self, result: FitResult, directions: InputMap | None) -> None:
        """Store a result in the fitted attributes, or refuse one without finite parameters; warn if its status is not ok."""
        self.params_ = result.params
        if result.status != "ok" and not all(np.isfinite(leaf).all() for leaf in self.params_):
            raise ValueError(f"y: the fit came to no finite parameters: {result.status}")
        self.coef_, self.intercept_ = self.params_.experts, self.params_.expert_bias
        self.gating_coef_, self.gating_intercept_ = self.params_.gating, self.params_.gating_bias
        self.noise_std_ = self.params_.noise_std
        self.num_experts_ = self.params_.experts.shape[0]
        self.method_ = result.diagnostics.get("method", self.method)
        self.objective_: Literal["likelihood", "mean"] = result.objective
        self._models, self._directions, self._channel = result.models, directions, result.channel
        self.selection_ = result.selection
        self.log_likelihood_ = result.log_likelihood
        self.history_, self.status_, self.diagnostics_ = result.history, result.status, result.diagnostics
        self.n_iter_ = int(result.diagnostics.get("num_passes", 0))
        if result.status != "ok":
            words = f"fit of {self.num_experts_} experts: {result.status}"
            warnings.warn(words, ConvergenceWarning, stacklevel=3)

    def _options(self) -> FitOptions:
        """The settings as checked options of `fit`."""
        for name in ("transform_kind", "precision"):
            CHECKS[name](getattr(self, name), name)
        return checked_options(
            FitOptions(
                activation=self.activation,
                family=self.family,
                noise=self.noise,
                fit_intercept=self.fit_intercept,
                gate=self.gate,
                gate_inputs=self.gate_inputs,
                expert_inputs=self.expert_inputs,
                method=self.method,
                objective=self.objective,
                average=self.average,
                standardise=self.standardise,
                weights_are=self.weights_are,
                num_starts=self.num_starts,
                max_iterations=self.max_iterations,
                order=self.order,
                transform=self.transform_kind,
                ridge=self.ridge,
            )
        )

    def _run(
        self, sample: Sample, support: Support, noise_std: np.ndarray | None, options: FitOptions
    ) -> FitResult:
        """A fit to the inputs, or to their leading directions if the samples support only these."""
        numbers, inputs, is_reduced, _ = support
        options = roles_undone(options) if is_reduced else options  # a single expert, which no gate chooses
        x = inputs(sample.x) if is_reduced else sample.x
        seed = checked_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        chosen = numbers[0] if len(numbers) == 1 else numbers
        with self._in_precision():
            result = fit_by_objective(jax.random.key(seed), sample._replace(x=x), chosen, noise_std, options)
        if is_reduced:
            params = params_in_input_units(result.params, inputs.mean, inputs.matrix)
            # the models keep the directions as their inputs, to which `_density` maps
            result = dataclasses.replace(result, params=params, standard_errors=None, _averaged=result.models)
        return result

    def _in_precision(self) -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext()
            if self.precision is None
            else jax.enable_x64(self.precision == "float64")
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self.family == "gaussian"
        tags.target_tags.positive_only = (
            self.family != "gaussian" and get_family(self.family).support != "real"
        )
        return tags
