r"""`MoERegressor`: a mixture of experts as a scikit-learn estimator.

p(y | x) = sum_i P_i(x) N(y; m_i(x), sigma_i^2),   P = softmax(w . x + c),   m_i(x) = g(a_i . x + b_i).

Linear experts, and those of any homogeneous g, are reported in the user's units. Any other activation needs a
target in its range (scikit-learn's TransformedTargetRegressor makes one). Several targets share the gates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, _safe_indexing, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from moejax.checks import brief_text
from moejax.environment import compiled_fast
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
    checked_labels,
    checked_random_state,
    least_squares_fit,
    supported_size,
)
from moejax.fitting.input_roles import names_of, roles_undone, with_numbered_columns
from moejax.fitting.label_units import is_linear, labels_note
from moejax.fitting.padding import padded_size
from moejax.fitting.pipeline import fit_sample
from moejax.fitting.predictive import expected_log_density, root_mean_square
from moejax.fitting.preparation import Sample, rescaled_weights
from moejax.fitting.result import FitResult
from moejax.fitting.whitening import params_in_input_units
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.options import Column, EstimatedNoise, FitOptions, Gate, WeightsAre
from moejax.model.activations import ActivationLike, ScalarFunction, activation_name, get_activation
from moejax.model.mixture import LOG_TWO_PI, MoEParams, expert_means, gate_logits, posterior
from moejax.moments.label_transforms import TransformKind


def _several_experts(estimator: MoERegressor) -> bool:
    check_is_fitted(estimator)
    return estimator.num_experts_ > 1


class MoERegressor(RegressorMixin, BaseEstimator):
    """Mixture-of-experts regression by maximum likelihood.

    Inputs are whitened. k experts need (2k - 1) r + 2 distinct samples, r the rank of the inputs, plus one with intercepts; if
    there are fewer, fewer experts (at least one, of the leading principal directions) are fitted, with a warning.

    Args:
        num_experts: k. (`moejax.fit` can also choose it, and has standard errors.)
        activation: g, a registered name or a scalar JAX function.
        noise: one sigma for all experts, "shared", or one each, "per_expert".
        noise_std: sigma if it is known, in units of y, () or (m,); None estimates it.
        fit_intercept: give experts and gates biases.
        gate, gate_inputs, expert_inputs: constant gates, and the columns of gates and experts, as in `moejax.fit`.
        method: a registered method. With the default, a single linear expert is fitted by least squares.
        standardise: scale the target of a homogeneous activation for the fit, so that its units do not matter.
        weights_are: the meaning of `sample_weight`, as in `moejax.fit`.
        num_starts: random starts; None takes the method's own number.
        max_iterations: budget of passes of the last stage.
        order: order of the tensor that moments decompose; None chooses.
        transform_kind: the option `transform` of `moejax.fit`; by that name scikit-learn would take this for a transformer.
        ridge: ridge on the gates for whitened inputs, the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats.
        precision: precision of the computation; None takes JAX's current default.
        random_state: seed, generator or None, for random starts.

    Attributes:
        params_: MoEParams of NumPy arrays, for X and y in the user's units.
        coef_, intercept_: (k, d), (k,) of the experts, from `params_`; gating_coef_, gating_intercept_: of the gates, the last 0.
        noise_std_: (k,) in units of y.
            With m targets, coef_ is (k, m, d), intercept_ and noise_std_ (k, m).
        num_experts_: the number of fitted experts; method_: the method that fitted them.
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
        num_experts: int = 3,
        activation: ActivationLike = FitOptions.activation,
        *,
        noise: EstimatedNoise = FitOptions.noise,
        noise_std: float | None = None,
        fit_intercept: bool = True,
        gate: Gate = FitOptions.gate,
        gate_inputs: Sequence[Column] | None = FitOptions.gate_inputs,
        expert_inputs: Sequence[Column] | None = FitOptions.expert_inputs,
        method: str = FitOptions.method,
        standardise: bool = FitOptions.standardise,
        weights_are: WeightsAre | None = FitOptions.weights_are,
        num_starts: int | None = FitOptions.num_starts,
        max_iterations: int = FitOptions.max_iterations,
        order: int | None = FitOptions.order,
        transform_kind: TransformKind = FitOptions.transform,
        ridge: float = FitOptions.ridge,
        precision: Literal["float32", "float64"] | None = "float64",
        random_state: Any = None,
    ):
        self.num_experts = num_experts
        self.activation = activation
        self.noise: EstimatedNoise = noise
        self.noise_std = noise_std
        self.fit_intercept = fit_intercept
        self.gate: Gate = gate
        self.gate_inputs = gate_inputs
        self.expert_inputs = expert_inputs
        self.method = method
        self.standardise = standardise
        self.weights_are: WeightsAre | None = weights_are
        self.num_starts = num_starts
        self.max_iterations = max_iterations
        self.order = order
        self.transform_kind: TransformKind = transform_kind
        self.ridge = ridge
        self.precision = precision
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> MoERegressor:
        """Fit to X (n, d), y (n,) or (n, m), and non-negative weights (n,), whose meaning is that of `weights_are`.

        Raises:
            ValueError: arrays or settings that cannot be fitted, in one line.
        """
        for name in ("transform_kind", "precision"):
            CHECKS[name](getattr(self, name), name)
        options = checked_options(
            FitOptions(
                activation=self.activation,
                noise=self.noise,
                fit_intercept=self.fit_intercept,
                gate=self.gate,
                gate_inputs=self.gate_inputs,
                expert_inputs=self.expert_inputs,
                method=self.method,
                standardise=self.standardise,
                weights_are=self.weights_are,
                num_starts=self.num_starts,
                max_iterations=self.max_iterations,
                order=self.order,
                transform=self.transform_kind,
                ridge=self.ridge,
            )
        )
        number_of_experts(self.num_experts, several=False)
        fn = get_activation(self.activation)
        checked_random_state(self.random_state)
        x = checked_inputs(X, "X", least_rows=2)
        self._columns(X, y, reset=True)
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
        support = supported_size(sample, self.num_experts, options, is_linear=is_linear(fn))
        num_experts, inputs, _, columns = support
        rank = inputs.matrix.shape[1]
        constant = bool(np.any(sample.y.max(axis=0) == sample.y.min(axis=0)))
        alone = is_linear(fn) and num_experts == 1 and y.ndim == 1
        if alone and (self.method == FitOptions.method or rank == 0 or constant):
            method, result = "least squares", least_squares_fit(sample, inputs, self.fit_intercept, levels)
        elif rank == 0 or constant:
            what = "X" if rank == 0 else "y"
            raise ValueError(
                f"{what}: expected values that vary, in 4 or more distinct samples, to fit experts"
            )
        else:
            method, result = self.method, self._run(sample, support, levels, options)
        self.params_ = result.params
        if result.status != "ok" and not all(np.isfinite(leaf).all() for leaf in self.params_):
            raise ValueError(f"y: the fit came to no finite parameters: {result.status}")
        self.coef_, self.intercept_ = self.params_.experts, self.params_.expert_bias
        self.gating_coef_, self.gating_intercept_ = self.params_.gating, self.params_.gating_bias
        self.noise_std_ = self.params_.noise_std
        self.num_experts_ = num_experts
        self.method_ = method
        self.n_parameters_ = num_free_parameters(
            num_experts,
            rank,
            self.noise if self.noise_std is None else "known",
            self.fit_intercept,
            num_outputs=1 if y.ndim == 1 else y.shape[1],
            columns=columns,
        )
        self.log_likelihood_ = result.log_likelihood
        self.history_, self.status_, self.diagnostics_ = result.history, result.status, result.diagnostics
        self.n_iter_ = int(result.diagnostics.get("num_passes", 0))
        if result.status != "ok":
            warnings.warn(f"fit of {num_experts} experts: {result.status}", ConvergenceWarning, stacklevel=2)
        note = labels_note(sample.y, sample.weights, fn, activation_name(self.activation))
        if note is not None:
            warnings.warn(f"y: {note}", UserWarning, stacklevel=2)
        return self

    def _columns(self, X: Any, y: Any = "no_validation", *, reset: bool) -> None:
        """Store the number and the names of the columns of X, or compare them with those of the fit."""
        try:
            validate_data(self, X, y, reset=reset, skip_check_array=True)
        except TypeError as error:  # names of several types
            raise ValueError(f"X: {brief_text(error)}") from error

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the mean E[y | x] = sum_i P_i(x) m_i(x), (n,) or (n, m), for X (n, d)."""
        log_gates, means = self._mixture(X)
        return _averaged(np.exp(log_gates), means)

    def predict_std(
        self, X: ArrayLike, *, components: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the standard deviation of y given x under the mixture, (n,) or (n, m), in units of y.

        Its square is sum_i P_i sigma_i^2, the noise within the experts, plus sum_i P_i (m_i - E[y | x])^2, that between them.

        Args:
            X: (n, d).
            components: return the total, the part within and the part between the experts.
        """
        log_gates, means = self._mixture(X)
        gates = np.exp(log_gates)
        within = root_mean_square(gates, self.noise_std_[None])
        between = root_mean_square(gates, means - _averaged(gates, means)[:, None])
        total = np.hypot(within, between)
        return (total, within, between) if components else total

    def predict_experts(self, X: ArrayLike) -> np.ndarray:
        """Return the prediction m_i(x) of each expert, (n, k) or (n, k, m), for X (n, d)."""
        return self._mixture(X)[1]

    def gate_probabilities(self, X: ArrayLike) -> np.ndarray:
        """Return the probability of each expert at x, P(z = i | x), (n, k), for X (n, d)."""
        return np.exp(self._mixture(X)[0])

    @available_if(_several_experts)
    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return `gate_probabilities`, (n, k). A fit of one expert lacks it: scikit-learn expects it only with classes."""
        return self.gate_probabilities(X)

    def responsibilities(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the probability that expert i made the label, P(z = i | x, y), (n, k), for X (n, d) and y (n,) or (n, m)."""
        log_gates, means = self._mixture(X)
        with np.errstate(over="ignore"):  # the difference in nats may overflow
            return posterior(log_gates, means, checked_labels(y, means), self.noise_std_, xp=np)

    def sample(self, X: ArrayLike, random_state: Any = None) -> np.ndarray:
        """Draw one y given each row of X, (n,) or (n, m)."""
        generator = checked_random_state(random_state)
        log_gates, means = self._mixture(X)
        cumulative = np.cumsum(np.exp(log_gates), axis=1)
        uniform = generator.uniform(size=(len(means), 1))
        chosen = np.sum(uniform >= cumulative[:, :-1], axis=1)
        noise = generator.standard_normal((len(means), *means.shape[2:]))
        return means[np.arange(len(means)), chosen] + self.noise_std_[chosen] * noise

    def score_samples(self, X: ArrayLike, y: ArrayLike | None = None) -> np.ndarray:
        """Return log p(y | x), (n,) in nats, in units of y.

        Without y, the result is its expectation under the mixture: minus the entropy of y given x, by quadrature to 1e-7 nats.
        If the model is true, the two agree in the mean over a sample.

        Raises:
            ValueError: several targets without y, or a y of another shape or with values that are not finite.
        """
        if y is not None:
            return np.asarray(scipy.special.logsumexp(self._log_joint(X, y), axis=1))
        log_gates, means = self._mixture(X)
        if means.ndim == 3:
            raise ValueError("y: needed to score several targets; the quadrature without it is for one")
        return expected_log_density(log_gates, means, self.noise_std_)

    def bic(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the Bayesian information criterion on (X, y), -2 log-likelihood + parameters log n; lower is better.

        With weights (n,), the likelihood is weighted and n is their sum; `weights_are` defines their meaning, as in `fit`.
        """
        value, size = self._weighted_log_likelihood(X, y, sample_weight)
        return -2.0 * value + self.n_parameters_ * math.log(size)

    def aic(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return Akaike's information criterion on (X, y), -2 log-likelihood + 2 parameters, with weights as in `bic`."""
        return -2.0 * self._weighted_log_likelihood(X, y, sample_weight)[0] + 2.0 * self.n_parameters_

    def _weighted_log_likelihood(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[float, float]:
        """The weighted sum of `score_samples`, and that of the weights; rows of weight zero are ignored."""
        check_is_fitted(self)
        weights = checked_weights(sample_weight, len(np.atleast_1d(y)), "sample_weight", "X")
        weights, _ = rescaled_weights(weights, self.weights_are)
        used = np.flatnonzero(weights)
        if used.size < len(weights):
            X, y = _safe_indexing(X, used), _safe_indexing(y, used)
        return float(weights[used] @ self.score_samples(X, y)), float(weights.sum())

    def _run(
        self, sample: Sample, support: Support, noise_std: np.ndarray | None, options: FitOptions
    ) -> FitResult:
        """A fit to the inputs, or to their leading directions if the samples support only these."""
        num_experts, inputs, is_reduced, _ = support
        options = roles_undone(options) if is_reduced else options  # a single expert, which no gate chooses
        x = inputs(sample.x) if is_reduced else sample.x
        seed = checked_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        with self._in_precision():
            result = fit_sample(jax.random.key(seed), sample._replace(x=x), num_experts, noise_std, options)
        if is_reduced:
            params = params_in_input_units(result.params, inputs.mean, inputs.matrix)
            result = dataclasses.replace(result, params=params, standard_errors=None)
        return result

    def _in_precision(self) -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext()
            if self.precision is None
            else jax.enable_x64(self.precision == "float64")
        )

    def _mixture(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """log P_i(x) (n, k) and m_i(x) (n, k), or (n, k, m)."""
        check_is_fitted(self)
        x = checked_inputs(X, "X")
        self._columns(X, reset=False)
        padded = np.pad(x, [(0, padded_size(len(x)) - len(x)), (0, 0)])  # few shapes need few programs
        # always in double precision: inputs and biases may have offsets that cancel
        with jax.enable_x64(True):
            params = jax.tree.map(jnp.asarray, self.params_)
            log_gates, means = _gates_and_means(params, jnp.asarray(padded), get_activation(self.activation))
        return np.asarray(log_gates)[: len(x)], np.asarray(means)[: len(x)]

    def _log_joint(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """(n, k): log P(z = i, y | x)."""
        log_gates, means = self._mixture(X)
        with np.errstate(over="ignore"):  # a density may be zero
            log_densities = _log_normal(checked_labels(y, means)[:, None] - means, self.noise_std_)
        return log_gates + (log_densities.sum(axis=2) if means.ndim == 3 else log_densities)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _averaged(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n, ..): the mean over experts of (n, k, ..) by gates (n, k)."""
    return np.einsum("ni,ni...->n...", gates, values)


def _log_normal(residual: np.ndarray, noise_std: np.ndarray) -> np.ndarray:
    """log N(residual; 0, sigma^2)."""
    return -0.5 * (residual / noise_std) ** 2 - np.log(noise_std) - 0.5 * LOG_TWO_PI


@functools.partial(jax.jit, static_argnames="fn", compiler_options=compiled_fast())
def _gates_and_means(params: MoEParams, x: jax.Array, fn: ScalarFunction) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.nn.log_softmax(gate_logits(params, x), axis=1), expert_means(params, x, fn)
