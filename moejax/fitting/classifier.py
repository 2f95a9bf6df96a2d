r"""`MoEClassifier`: a mixture of multinomial logistic regressions as a scikit-learn classifier.

With P = softmax(w . x + c), a class has the probability

    P(y = c | x) = sum_i P_i(x) softmax_c(A_i x + b_i).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.special
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from moejax.checks import brief, brief_text, require
from moejax.fitting.arguments import CHECKS, checked_options, number_of_experts
from moejax.fitting.array_checks import checked_inputs, checked_weights, input_precision
from moejax.fitting.estimation import LARGEST_SHORTFALL, RISES, fit_sample
from moejax.fitting.estimator_inputs import checked_random_state, require_columns
from moejax.fitting.expert_order import order_of_experts
from moejax.fitting.padding import padded
from moejax.fitting.pipeline import fit_settings
from moejax.fitting.predictive import log_gates_and_predictors
from moejax.fitting.preparation import Sample, TooManyExpertsError, rescaled_weights
from moejax.fitting.result import FitResult
from moejax.fitting.selection import criteria, numbers_to_try, selection_table
from moejax.fitting.whitening import input_map, params_in_input_units
from moejax.likelihood.em import RIDGE
from moejax.methods.categorical import EXPERT_RIDGE, NUM_STARTS, search_categorical
from moejax.methods.options import FitOptions
from moejax.model.mixture import HostParams, MoEParams, permute_experts
from moejax.model.status import Status


class MoEClassifier(ClassifierMixin, BaseEstimator):
    """Mixture-of-experts classification: each expert is a multinomial logistic regression, and gates choose among them.

    P(y = c | x) = sum_i P_i(x) softmax_c(A_i x + b_i). Inputs are whitened. By default two classes are fitted by `moejax.fit` with
    `family="bernoulli"`, which gives standard errors and diagnostics, if that ends well
    and the classes overlap; otherwise, and with more classes, the log-likelihood minus a ridge is maximised by L-BFGS from random
    starts. The order of the rows does not matter in any digit.

    Args:
        num_experts: k; or several, or "auto" for 1 to 12, among which BIC chooses.
        fit_intercept: give experts and gates biases.
        num_starts: random starts; None takes the method's own number.
        max_iterations: budget of passes over the data of the last stage.
        ridge: coefficient of the sum of squares of all coefficients, of experts and gates, / 2 in nats, for whitened inputs. It is
            1 / C of scikit-learn's LogisticRegression, and a larger one may predict better. None is a ridge that matters only where
            classes or experts are separable: 1e-3 on the experts (none in a fit by `moejax.fit`) and 1e-6 on the gates.
        precision: precision of the computation; None takes JAX's current default.
        random_state: seed, generator or None, for random starts.

    Attributes:
        classes_: (C,) the labels, sorted.
        coef_, intercept_: (k, C, d), (k, C) of the experts, for X as given; their sums over classes are zero.
        gating_coef_, gating_intercept_: (k, d), (k,) of the gates, the last 0.
        num_experts_: the number of fitted experts, the one with the largest share first.
        fit_result_: the `moejax.FitResult` of two classes, which has `summary()` and standard errors; its experts are the log odds
            of `classes_[1]`. None if `moejax.fit` was not used.
        selection_: criteria for each number of experts that was tried, a DataFrame; None if there was one.
        n_parameters_: free parameters.
        log_likelihood_: weighted sum over the training sample, in nats, without the ridge.
        history_: objective along the passes of the last ascent; n_iter_: passes over the data; status_: "ok", or a reason.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Examples:
        >>> X = np.random.default_rng(0).uniform(-1, 1, (300, 2))
        >>> y = np.where(X[:, 0] * X[:, 1] > 0, "same", "other")
        >>> model = moejax.MoEClassifier(num_experts=2, ridge=0.1, random_state=0).fit(X, y)
        >>> model.predict([[0.5, 0.5], [-0.5, 0.5]]).tolist()
        ['same', 'other']
    """

    def __init__(
        self,
        num_experts: int | str | Sequence[int] = 2,
        *,
        fit_intercept: bool = True,
        num_starts: int | None = None,
        max_iterations: int = 2000,
        ridge: float | None = None,
        precision: Literal["float32", "float64"] | None = "float64",
        random_state: Any = None,
    ):
        self.num_experts = num_experts
        self.fit_intercept = fit_intercept
        self.num_starts = num_starts
        self.max_iterations = max_iterations
        self.ridge = ridge
        self.precision: Literal["float32", "float64"] | None = precision
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> MoEClassifier:
        """Fit to X (n, d), classes y (n,), and non-negative weights (n,): counts of rows if all are whole, else reliabilities.

        Raises:
            ValueError: arrays or settings that cannot be fitted, in one line.
        """
        chosen = number_of_experts(self.num_experts)
        numbers = (chosen,) if isinstance(chosen, int) else numbers_to_try(chosen)
        for name in ("fit_intercept", "num_starts", "max_iterations", "precision", "ridge"):
            CHECKS[name](getattr(self, name), name)
        require(self.ridge != "evidence", "ridge", "a finite number >= 0 or None", self.ridge)
        seed = checked_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        x = checked_inputs(X, "X", least_rows=2)
        require_columns(self, X, y, reset=True)
        labels = _checked_classes(y, len(x))
        weights = checked_weights(sample_weight, len(x), "sample_weight", "X")
        weights, _ = rescaled_weights(weights, None)
        used = weights > 0
        self.classes_, codes = np.unique(labels[used], return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"y: expected at least two classes, got one: {brief(self.classes_[0])}")
        sample = _merged(x[used], codes, weights[used], input_precision(X))
        require(bool(np.ptp(sample.x, axis=0).any()), "X", "values that vary", "equal rows")
        self.selection_, self.fit_result_ = None, None
        with self._in_precision():
            key = jax.random.key(seed)
            several = len(numbers) > 1
            self.num_experts_ = self._select(key, sample, numbers) if several else min(numbers)
            self._fit_categorical(key, sample, self.num_experts_)
            if len(self.classes_) == 2 and self.ridge is None and not self._fits_every_row(sample):
                self._fit_bernoulli(key, sample, self.num_experts_)
        self.coef_, self.intercept_ = self.params_.experts, self.params_.expert_bias
        self.gating_coef_, self.gating_intercept_ = self.params_.gating, self.params_.gating_bias
        if self.status_ != "ok":
            words = f"fit of {self.num_experts_} experts: {self.status_}"
            warnings.warn(words, ConvergenceWarning, stacklevel=2)
        return self

    def _select(self, key: jax.Array, sample: Sample, numbers: Sequence[int]) -> int:
        """The number of experts with the least BIC, by penalised likelihood; keeps the table of all."""
        rows, total, rises = [], float(sample.weights.sum()), 0
        for k in numbers:
            self._fit_categorical(key, sample, k)
            r = self._posterior(sample.x, sample.y.astype(int))
            entropy = float(sample.weights @ scipy.special.entr(r).sum(axis=1))
            size = self.n_parameters_
            rows.append(criteria(k, self.log_likelihood_, size, entropy, total, None, self.status_))
            rises = 0 if rows[-1]["bic"] <= min(row["bic"] for row in rows) else rises + 1
            if isinstance(self.num_experts, str) and rises == RISES:
                break
        table = selection_table(rows)
        self.selection_: pd.DataFrame | None = table
        return int(table.loc[table["chosen"], "num_experts"].iloc[0])

    def _fits_every_row(self, sample: Sample) -> bool:
        """True if the fit gives every row its class: the classes are separable, and the likelihood has no maximum."""
        return bool(np.all(np.argmax(self._log_mixture(sample.x), axis=1) == sample.y))

    def _fit_bernoulli(self, key: jax.Array, sample: Sample, num_experts: int) -> None:
        """Two classes by `moejax.fit`, which replaces the penalised fit if it ends as well.

        It does not if the rows do not admit it, if its likelihood is half a nat lower, or if the maximum is at infinity, or nearly
        so: the ridge would then cost half a nat or more.
        """
        options = FitOptions(
            family="bernoulli",
            fit_intercept=self.fit_intercept,
            num_starts=self.num_starts,
            max_iterations=self.max_iterations,
        )
        checked = checked_options(options)
        try:
            result = fit_sample(key, sample, num_experts, None, checked)
        except TooManyExpertsError:
            return
        _, log_odds = log_gates_and_predictors(result.params, sample.x)
        # |a|^2 + b^2 of white inputs is the mean square of a . x + b, and the two rows of a class are -+ half of it
        squares = float(sample.weights @ (log_odds**2).sum(axis=1)) / float(sample.weights.sum())
        as_high = result.log_likelihood > self.log_likelihood_ - LARGEST_SHORTFALL
        if result.status != "ok" or not as_high or not 0.25 * EXPERT_RIDGE * squares < LARGEST_SHORTFALL:
            return
        half = 0.5 * result.params.experts, 0.5 * result.params.expert_bias
        self.params_: HostParams = result.params._replace(
            experts=np.stack([-half[0], half[0]], axis=1), expert_bias=np.stack([-half[1], half[1]], axis=1)
        )
        columns = getattr(self, "feature_names_in_", None)  # of a table
        names = {} if columns is None else {"input_names": list(columns)}
        settings = fit_settings(key, options, checked, num_experts, None) | {"weights_are": "counts"}
        self.fit_result_: FitResult | None = dataclasses.replace(
            result, settings=settings, diagnostics=result.diagnostics | names
        )
        self.n_parameters_, self.log_likelihood_ = result.num_parameters, result.log_likelihood
        self.history_, self.status_ = result.history, result.status
        self.n_iter_ = int(result.diagnostics["num_passes"])

    def _fit_categorical(self, key: jax.Array, sample: Sample, num_experts: int) -> None:
        """Any number of classes by penalised likelihood."""
        k, num_classes = num_experts, len(self.classes_)
        inputs = input_map(sample.x, sample.weights, centre=self.fit_intercept, precision=sample.precision)
        weights, z, y = padded(sample.weights, inputs(sample.x), sample.y)
        run = search_categorical(
            key,
            jnp.asarray(z, float),
            jnp.asarray(y, float),
            jnp.asarray(weights, float),
            EXPERT_RIDGE if self.ridge is None else float(self.ridge),
            RIDGE if self.ridge is None else float(self.ridge),
            num_experts=k,
            num_classes=num_classes,
            num_starts=self.num_starts or NUM_STARTS,
            num_steps=int(self.max_iterations),
            fit_intercept=bool(self.fit_intercept),
        )
        rows = np.asarray(run.rows, np.float64)
        if not np.isfinite(rows).all() or not np.isfinite(float(run.objective)):
            raise ValueError("y: the fit came to no finite parameters")
        size = inputs.matrix.shape[1]
        slopes = rows[:, :size]
        biases = rows[:, size] if self.fit_intercept else np.zeros(len(rows))
        cut = k * num_classes
        params = MoEParams(
            slopes[:cut].reshape(k, num_classes, size),
            slopes[cut:],
            np.ones(k),
            biases[:cut].reshape(k, num_classes),
            biases[cut:],
        )
        self.params_ = params_in_input_units(params, inputs.mean, inputs.matrix)
        counts = sample.weights @ self._posterior(sample.x, sample.y.astype(int))
        order = order_of_experts(counts, self.params_.experts[:, 0, 0])
        self.params_ = permute_experts(self.params_, order)
        of_row = size + int(self.fit_intercept)
        self.n_parameters_ = (k * (num_classes - 1) + k - 1) * of_row
        self.log_likelihood_ = float(run.log_likelihood)
        history = np.asarray(run.history, np.float64)
        self.history_ = history[np.isfinite(history)]
        self.n_iter_ = int(run.num_steps)
        self.status_ = (Status.OK if bool(run.converged) else Status.NOT_CONVERGED).words

    def _in_precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        return jax.enable_x64(self.precision == "float64")

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the most probable class, (n,), for X (n, d)."""
        log_classes = self.predict_log_proba(X)
        return self.classes_[np.argmax(log_classes, axis=1)]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return P(y = c | x), (n, C), in the order of `classes_`, for X (n, d)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:
        """Return log P(y = c | x), (n, C), in nats."""
        return self._log_mixture(self._checked_rows(X))

    def predict_experts(self, X: ArrayLike) -> np.ndarray:
        """Return the probabilities of the classes by each expert, softmax(A_i x + b_i), (n, k, C)."""
        return np.exp(self._log_parts(self._checked_rows(X))[1])

    def gate_probabilities(self, X: ArrayLike) -> np.ndarray:
        """Return the gates P_i(x), (n, k), for X (n, d): the probability of each expert."""
        return np.exp(self._log_parts(self._checked_rows(X))[0])

    def responsibilities(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the probability that expert i made the class, P(z = i | x, y), (n, k), for X (n, d) and y (n,).

        Raises:
            ValueError: a class that is not in `classes_`, or another number of rows.
        """
        x = self._checked_rows(X)
        labels = _checked_classes(y, len(x))
        known = np.isin(labels, self.classes_)
        words = f"classes of the fit, {brief(self.classes_.tolist())}"
        require(bool(known.all()), "y", words, None if known.all() else labels[np.argmin(known)])
        return self._posterior(x, np.searchsorted(self.classes_, labels))

    def _posterior(self, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(n, k): P(z = i | x, y) for class numbers (n,)."""
        log_gates, log_classes = self._log_parts(x)
        own = np.take_along_axis(log_classes, codes[:, None, None], axis=2)[:, :, 0]
        return scipy.special.softmax(log_gates + own, axis=1)

    def bic(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return the Bayesian information criterion on (X, y), -2 log-likelihood + parameters log n; lower is better."""
        log_classes = self.predict_log_proba(X)
        labels = _checked_classes(y, len(log_classes))
        own = labels[:, None] == self.classes_[None]
        with np.errstate(divide="ignore"):  # a class that was not in the fit has probability zero
            values = np.where(own.any(axis=1), np.sum(np.where(own, log_classes, 0.0), axis=1), -np.inf)
        return -2.0 * float(values.sum()) + self.n_parameters_ * math.log(len(labels))

    def _log_mixture(self, x: np.ndarray) -> np.ndarray:
        """(n, C): log P(y = c | x)."""
        log_gates, log_classes = self._log_parts(x)
        mixed = np.asarray(scipy.special.logsumexp(log_gates[:, :, None] + log_classes, axis=1))
        return np.minimum(mixed, 0.0)  # above 0 by rounding only

    def _log_parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) log P_i(x) and (n, k, C) log softmax_c(A_i x + b_i)."""
        log_gates, predictors = log_gates_and_predictors(self.params_, x)
        return log_gates, np.asarray(scipy.special.log_softmax(predictors, axis=2))

    def _checked_rows(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        x = checked_inputs(X, "X")
        require_columns(self, X, reset=False)
        return x


def _checked_classes(y: Any, num_rows: int) -> np.ndarray:
    """(n,) labels of classes, of any type that can be sorted.

    Raises:
        ValueError: they are something else, or of another n.
    """
    try:
        labels = column_or_1d(y, warn=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"y: expected classes (n,), got {brief_text(error)}") from error
    require(len(labels) == num_rows, "y", f"shape {(num_rows,)} to go with X", labels.shape)
    try:
        with np.errstate(invalid="ignore"):  # of numbers that are not finite, which are refused
            check_classification_targets(labels)
        np.unique(labels)
    except (ValueError, TypeError) as error:
        raise ValueError(f"y: expected classes, got {brief_text(error)}") from error
    return labels


def _merged(x: np.ndarray, codes: np.ndarray, weights: np.ndarray, precision: float) -> Sample:
    """The sample with equal rows as one row of their joint weight, sorted: a fit does not depend on their order in any digit."""
    rows, places = np.unique(np.column_stack([x, codes]), axis=0, return_inverse=True)
    return Sample(rows[:, :-1], rows[:, -1], np.bincount(places.reshape(-1), weights), precision)
