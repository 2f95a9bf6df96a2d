"""The predictions of a fitted estimator: means, intervals, densities, experts and gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import _safe_indexing
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from moejax.checks import require
from moejax.fitting.array_checks import checked_inputs, checked_weights
from moejax.fitting.estimator_inputs import checked_random_state, require_columns
from moejax.fitting.family_density import FamilyDensity
from moejax.fitting.predictive import (
    PredictiveDensity,
    log_gates_and_means,
    predictive_density,
)
from moejax.fitting.preparation import rescaled_weights
from moejax.fitting.result import FittedInOwnUnits
from moejax.fitting.result_predictions import checked_labels, checked_levels, posterior_of
from moejax.fitting.whitening import InputMap
from moejax.methods.options import WeightsAre
from moejax.model.activations import ActivationLike
from moejax.model.families import FamilyLike, channel_of
from moejax.model.family import Channel
from moejax.model.mixture import HostParams


def _several_experts(estimator: Predictions) -> bool:
    check_is_fitted(estimator)
    return estimator.num_experts_ > 1


class Predictions:
    """The methods of `MoERegressor` that read a fit."""

    activation: ActivationLike
    weights_are: WeightsAre | None
    num_experts_: int
    n_parameters_: int
    objective_: Literal["likelihood", "mean"]
    params_: HostParams
    noise_std_: np.ndarray
    _family: FamilyLike
    """The family of the fit, by its name if that is enough."""
    _models: tuple[FittedInOwnUnits, ...]
    _directions: InputMap | None
    """The map to the directions that were fitted, if the samples supported fewer than the inputs have."""

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the mean E[y | x] = sum_i P_i(x) m_i(x), (n,) or (n, m), for X (n, d); averaged over `members_`."""
        return self._density(X).mean

    def alone(self) -> Self:
        """Return a copy that predicts by the model `params_` alone, without the average over `members_`."""
        check_is_fitted(self)
        one = copy.copy(self)
        one._models = self._models[:1]
        return one

    def predict_std(
        self, X: ArrayLike, *, components: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the standard deviation of y given x, (n,) or (n, m), in units of y.

        For a mixture its square is sum_i P_i sigma_i^2, the noise within the experts, plus sum_i P_i (m_i - E[y | x])^2, that
        between them; for a mean fit it is s^2 + var f(x). An average has the spread between its members besides.

        Args:
            X: (n, d).
            components: return the total, the part within and the part between.
        """
        total, within, between = self._density(X).standard_deviations()
        return (total, within, between) if components else total

    def predict_quantiles(self, X: ArrayLike, quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Return quantiles of y given x, (n, q), for X (n, d) and q levels between 0 and 1.

        Raises:
            ValueError: a level is not between 0 and 1, or there are several targets.
        """
        levels = checked_levels(quantiles)
        density = self._density(X)
        require(density.means.ndim == 2, "quantiles", "one target", f"{density.means.shape[-1]} targets")
        return density.quantiles(levels)

    def predict_interval(self, X: ArrayLike, level: float = 0.9) -> np.ndarray:
        """Return the central interval that holds y given x with probability `level`, (n, 2), for X (n, d).

        Raises:
            ValueError: the level is not between 0 and 1, or there are several targets.
        """
        (level,) = checked_levels([level], "level")
        return self.predict_quantiles(X, (0.5 - 0.5 * level, 0.5 + 0.5 * level))

    def predict_experts(self, X: ArrayLike) -> np.ndarray:
        """Return the prediction m_i(x) of each expert of `params_`, (n, k) or (n, k, m), for X (n, d)."""
        return self._experts(X)[1]

    def gate_probabilities(self, X: ArrayLike) -> np.ndarray:
        """Return the gates of `params_`, P_i(x), (n, k), for X (n, d): the probability of each expert, or its share in the mean."""
        return np.exp(self._experts(X)[0])

    @available_if(_several_experts)
    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return `gate_probabilities`, (n, k). A fit of one expert lacks it: scikit-learn expects it only with classes."""
        return self.gate_probabilities(X)

    def responsibilities(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the probability that expert i made the label, P(z = i | x, y), (n, k), for X (n, d) and y (n,) or (n, m).

        In a mean fit all experts make a label together, and these are the gates.
        """
        log_gates, means = self._experts(X)
        y = checked_labels(y, means, "X")
        if self.objective_ == "mean":
            return np.exp(log_gates)
        return posterior_of(self.params_, self._checked_rows(X), y, self._channel)

    def sample(self, X: ArrayLike, random_state: Any = None) -> np.ndarray:
        """Draw one y given each row of X, (n,) or (n, m)."""
        generator = checked_random_state(random_state)
        return self._density(X).sample(generator)

    def score_samples(self, X: ArrayLike, y: ArrayLike | None = None) -> np.ndarray:
        """Return log p(y | x), (n,) in nats, in units of y.

        Without y, the result is its expectation under the model: minus the entropy of y given x, by quadrature to 1e-7 nats.
        If the model is true, the two agree in the mean over a sample.

        Raises:
            ValueError: several targets without y, or a y of another shape or with values that are not finite.
        """
        density = self._density(X)
        if y is not None:
            return density.log_density(checked_labels(y, density.means, "X"))
        if density.means.ndim == 3:
            raise ValueError("y: needed to score several targets; the quadrature without it is for one")
        return density.expected_log_density()

    def bic(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the Bayesian information criterion on (X, y), -2 log-likelihood + parameters log n; lower is better.

        With weights (n,), the likelihood is weighted and n is their sum; `weights_are` defines their meaning, as in `fit`. The
        density is that of `score_samples`, which for a mean fit or an average is not the one that was maximised.
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

    def _checked_rows(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        x = checked_inputs(X, "X")
        self.require_columns(X, reset=False)
        return x

    def _density(self, X: ArrayLike) -> PredictiveDensity | FamilyDensity:
        """The density of y at each row, averaged over the members."""
        x = self._checked_rows(X)
        x = x if self._directions is None else self._directions(x)
        return predictive_density(self._models, x, self._channel, self.objective_)

    @property
    def _channel(self) -> Channel:
        return channel_of(self._family, self.activation)

    @property
    def members_(self) -> tuple[HostParams, ...]:
        """The models over which predictions are averaged, in the units of the data; the first is `params_`."""
        check_is_fitted(self)
        return (self.params_, *(member.units.params(member.params) for member in self._models[1:]))

    def _experts(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """log P_i(x) (n, k) and m_i(x) (n, k), or (n, k, m), of `params_`."""
        return log_gates_and_means(self.params_, self._checked_rows(X), self._channel)

    def require_columns(self, X: Any, y: Any = "no_validation", *, reset: bool) -> None:
        """Store the number and the names of the columns of X, or compare them with those of the fit."""
        require_columns(self, X, y, reset=reset)
