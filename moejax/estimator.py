r"""`MoERegressor`: a mixture of experts as a scikit-learn estimator.

p(y | x) = sum_i P_i(x) N(y; m_i(x), sigma_i^2),   P = softmax(w . x + c),   m_i(x) = shift + scale g(a_i . x + b_i).

`shift` and `scale` are 0 and 1 for linear experts, which take up the target's units themselves; an activation with a range of its
own is fitted to the standardised target. Several targets share the gates: given the expert they are independent.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.special
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from moejax import fitting
from moejax.activations import ActivationLike, ScalarFunction, get_activation, values_on_host
from moejax.arguments import (
    as_numbers,
    checked_inputs,
    checked_options,
    checked_targets,
    checked_weights,
    noise_levels,
    number_of_experts,
)
from moejax.checks import brief, brief_text, require
from moejax.em import RIDGE, NoiseModel
from moejax.fitting import DEFAULT_METHOD, FitResult
from moejax.label_transforms import TransformKind
from moejax.model import LOG_TWO_PI, MoEParams, expert_means, gate_logits
from moejax.selection import num_free_parameters
from moejax.whitening import InputMap, params_in_input_units, varying

ENTROPY_NODES = 64
_SMALLEST_SHAPE = 64


class _Inputs(NamedTuple):
    """What of X is fitted: z = (x - mean) @ matrix, of r columns, without constant columns and directions."""

    map: InputMap
    """mean (d,), matrix (d, r)."""
    constants: np.ndarray
    """(d,) the values of constant columns, zero for the others."""
    intercept: bool
    """Whether biases are fitted, to be given back as they are or as coefficients of the constant columns."""


class _Target(NamedTuple):
    """The fitted target is (y - shift) / scale, of each output."""

    shift: float | np.ndarray
    scale: float | np.ndarray


def _several_experts(estimator: MoERegressor) -> bool:
    check_is_fitted(estimator)
    return estimator.num_experts_ > 1


class MoERegressor(RegressorMixin, BaseEstimator):
    """Mixture-of-experts regression by maximum likelihood.

    Inputs are whitened inside; constant and collinear columns do no harm. Data too few for what was asked, (2k - 1)(r + 1) + 2
    distinct samples for k experts of r directions, are fitted by fewer experts or, at last, one expert of the leading
    principal directions, with a ConvergenceWarning.

    Args:
        num_experts: k.
        activation: g, a registered name or a scalar JAX function.
        noise: one sigma for all experts, "shared", or one each, "per_expert".
        noise_std: sigma where it is known, in units of y, () or (m,); None estimates it.
        fit_intercept: give experts and gates biases.
        method: a registered method. One linear expert is least squares.
        standardise: fit the target less its mean, in units of its standard deviation (without an intercept: of its root mean
            square). Linear experts are given back in the user's units, which then are all the same to the fit; others keep
            `target_shift_` and `target_scale_`.
        num_starts: random starts; None takes the method's own number.
        max_iterations: budget of passes of the last stage.
        order: of the tensor that moments decompose; None chooses.
        transform_kind: of the label transforms; a parameter named transform would make scikit-learn see a transformer.
        ridge: on the gates, in units of the total weight, for whitened inputs.
        precision: of the computation; None takes JAX's present default.
        random_state: seed, generator or None, of random starts.

    Attributes:
        params_: MoEParams of NumPy arrays, for X in the user's units and for (y - target_shift_) / target_scale_.
        coef_, intercept_: (k, d), (k,) of `params_`, the experts; gating_coef_, gating_intercept_: of the gates, the last 0.
        noise_std_: (k,) in units of y.
        target_shift_, target_scale_: 0 and 1 unless the target was standardised and g is not linear.
            With m targets, coef_ is (k, m, d), intercept_ and noise_std_ (k, m), shift and scale (m,).
        num_experts_: how many were fitted.
        method_: by which method.
        n_parameters_: free parameters, those of dropped directions not counted, nor shift and scale.
        log_likelihood_: weighted sum over the training sample, in nats, in units of y.
        history_, status_, diagnostics_, n_iter_: as `moejax.FitResult` says; passes over the data.
        n_features_in_, feature_names_in_: as in scikit-learn.
    """

    def __init__(
        self,
        num_experts: int = 3,
        activation: ActivationLike = "linear",
        *,
        noise: NoiseModel = "shared",
        noise_std: float | None = None,
        fit_intercept: bool = True,
        method: str = DEFAULT_METHOD,
        standardise: bool = True,
        num_starts: int | None = None,
        max_iterations: int = 500,
        order: int | None = None,
        transform_kind: TransformKind = "weighted",
        ridge: float = RIDGE,
        precision: Literal["float32", "float64"] | None = "float64",
        random_state: Any = None,
    ):
        self.num_experts = num_experts
        self.activation = activation
        self.noise = noise
        self.noise_std = noise_std
        self.fit_intercept = fit_intercept
        self.method = method
        self.standardise = standardise
        self.num_starts = num_starts
        self.max_iterations = max_iterations
        self.order = order
        self.transform_kind = transform_kind
        self.ridge = ridge
        self.precision = precision
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> MoERegressor:
        """Fit to X (n, d), y (n,) or (n, m), and non-negative weights (n,); an integer weight counts as so many equal rows.

        Raises:
            ValueError: arrays or settings that cannot be fitted, in one line.
        """
        checked_options(
            activation=self.activation,
            noise=self.noise,
            fit_intercept=self.fit_intercept,
            method=self.method,
            standardise=self.standardise,
            num_starts=self.num_starts,
            max_iterations=self.max_iterations,
            order=self.order,
            transform_kind=self.transform_kind,
            ridge=self.ridge,
            precision=self.precision,
        )
        number_of_experts(self.num_experts, several=False)
        fn = get_activation(self.activation)
        _random_state(self.random_state)
        x = checked_inputs(X, "X", least_rows=2)
        self._columns(X, y, reset=True)
        y = as_numbers(y, "y")
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        y = checked_targets(y, len(x), rows_of="X")
        weights = checked_weights(sample_weight, len(x), "sample_weight", "X")
        noise_levels(self.noise_std, y.shape[1:])
        used = weights > 0
        x, y, weights = x[used], y[used], weights[used]

        linear = _is_linear(fn)
        num_experts, inputs = self._supported(x, y, weights, linear)
        target = self._target(y, weights, inputs.intercept)
        nothing = inputs.map.matrix.shape[1] == 0
        constant = bool(np.any(target.scale == 0.0))
        alone = linear and num_experts == 1 and y.ndim == 1
        if alone and (self.method == DEFAULT_METHOD or nothing or constant):
            method, target = "least squares", _Target(0.0, 1.0)
            result = _least_squares(x, y, weights, inputs, self.noise_std)
        elif nothing or constant:
            what = "X" if nothing else "y"
            raise ValueError(
                f"{what}: expected values that vary, in 4 or more distinct samples, to fit experts"
            )
        else:
            method, result = self.method, self._run(x, y, weights, inputs, target, num_experts)
        params = MoEParams(*(np.asarray(leaf, np.float64) for leaf in result.params))
        self.target_shift_, self.target_scale_ = target
        if linear:
            self.target_shift_, self.target_scale_ = 0.0 * target.shift, 1.0 + 0.0 * target.scale
            params = MoEParams(
                experts=np.asarray(target.scale)[..., None] * params.experts,
                gating=params.gating,
                noise_std=target.scale * params.noise_std,
                expert_bias=target.shift + target.scale * params.expert_bias
                if inputs.intercept
                else params.expert_bias,
                gating_bias=params.gating_bias,
            )
        self.params_ = _in_input_units(params, inputs, fit_intercept=self.fit_intercept)
        if not all(np.isfinite(leaf).all() for leaf in self.params_):
            raise ValueError(f"y: the fit came to no finite parameters: {result.status}")
        self.coef_, self.intercept_ = self.params_.experts, self.params_.expert_bias
        self.gating_coef_, self.gating_intercept_ = self.params_.gating, self.params_.gating_bias
        self.noise_std_ = self.target_scale_ * self.params_.noise_std
        self.num_experts_ = num_experts
        self.method_ = method
        self.n_parameters_ = num_free_parameters(
            num_experts,
            inputs.map.matrix.shape[1],
            self.noise if self.noise_std is None else "known",
            inputs.intercept,
            num_outputs=1 if y.ndim == 1 else y.shape[1],
        )
        self.log_likelihood_ = result.log_likelihood - float(weights.sum() * np.log(target.scale).sum())
        self.history_, self.status_, self.diagnostics_ = result.history, result.status, result.diagnostics
        self.n_iter_ = int(result.diagnostics.get("num_passes", 0))
        if result.status != "ok":
            warnings.warn(f"fit of {num_experts} experts: {result.status}", ConvergenceWarning, stacklevel=2)
        return self

    def _columns(self, X: Any, y: Any = "no_validation", *, reset: bool) -> None:
        """Keep the number and the names of the columns of X, or compare them with those of the fit."""
        try:
            validate_data(self, X, y, reset=reset, skip_check_array=True)
        except TypeError as error:  # names of several types
            raise ValueError(f"X: {brief_text(error)}") from error

    def predict(self, X: ArrayLike) -> np.ndarray:
        """(n,), or (n, m): E[y | x] = sum_i P_i(x) m_i(x)."""
        log_gates, means = self._mixture(X)
        return _averaged(np.exp(log_gates), means)

    def predict_std(
        self, X: ArrayLike, *, components: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,), or (n, m): standard deviation of y given x under the mixture, in units of y.

        Its square is sum_i P_i sigma_i^2, the noise within the experts, plus sum_i P_i (m_i - E[y | x])^2, what they differ by.

        Args:
            X: (n, d).
            components: return the total, the part within and the part between the experts.
        """
        log_gates, means = self._mixture(X)
        gates = np.exp(log_gates)
        within = gates @ self.noise_std_**2
        between = _averaged(gates, (means - _averaged(gates, means)[:, None]) ** 2)
        total = np.sqrt(within + between)
        return (total, np.sqrt(within), np.sqrt(between)) if components else total

    def predict_experts(self, X: ArrayLike) -> np.ndarray:
        """(n, k), or (n, k, m): m_i(x), what each expert predicts."""
        return self._mixture(X)[1]

    def gate_probabilities(self, X: ArrayLike) -> np.ndarray:
        """(n, k): P(z = i | x), the probability of each expert at x."""
        return np.exp(self._mixture(X)[0])

    @available_if(_several_experts)
    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """(n, k): `gate_probabilities`, under scikit-learn's name.

        scikit-learn wants the name on nothing that tells no classes apart: a mixture of one expert does not have it.
        """
        return self.gate_probabilities(X)

    def responsibilities(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """(n, k): P(z = i | x, y), the probability that expert i made the label."""
        return scipy.special.softmax(self._log_joint(X, y), axis=1)

    def sample(self, X: ArrayLike, random_state: Any = None) -> np.ndarray:
        """(n,), or (n, m): one draw of y given each row of X."""
        generator = _random_state(random_state)
        log_gates, means = self._mixture(X)
        cumulative = np.cumsum(np.exp(log_gates), axis=1)
        uniform = generator.uniform(size=(len(means), 1))
        chosen = np.sum(uniform >= cumulative[:, :-1], axis=1)
        noise = generator.standard_normal((len(means), *means.shape[2:]))
        return means[np.arange(len(means)), chosen] + self.noise_std_[chosen] * noise

    def score_samples(self, X: ArrayLike, y: ArrayLike | None = None) -> np.ndarray:
        """(n,): log p(y | x), in nats, in units of y.

        Without y, its expectation under the mixture itself, minus the entropy of y given x, by Gauss-Hermite quadrature of each
        expert: in the mean over a sample, the two agree where the model is right.

        Raises:
            ValueError: several targets without y, or a y of another shape.
        """
        if y is not None:
            return scipy.special.logsumexp(self._log_joint(X, y), axis=1)
        log_gates, means = self._mixture(X)
        if means.ndim == 3:
            raise ValueError("y: needed to score several targets; the quadrature without it is for one")
        nodes, weights = hermegauss(ENTROPY_NODES)
        weights = weights / weights.sum()
        expected = np.zeros(len(means))
        for i, noise_std in enumerate(self.noise_std_):
            values = means[:, i, None] + noise_std * nodes
            residual = values[:, None] - means[:, :, None]
            joint = log_gates[:, :, None] + _log_normal(residual, self.noise_std_[:, None])
            expected += np.exp(log_gates[:, i]) * (scipy.special.logsumexp(joint, axis=1) @ weights)
        return expected

    def bic(self, X: ArrayLike, y: ArrayLike) -> float:
        """Bayesian information criterion on (X, y): -2 log-likelihood + parameters log n; the lower the better."""
        values = self.score_samples(X, y)
        return float(-2.0 * values.sum() + self.n_parameters_ * math.log(len(values)))

    def aic(self, X: ArrayLike, y: ArrayLike) -> float:
        """Akaike's information criterion on (X, y): -2 log-likelihood + 2 parameters; the lower the better."""
        return float(-2.0 * self.score_samples(X, y).sum() + 2.0 * self.n_parameters_)

    def _supported(
        self, x: np.ndarray, y: np.ndarray, weights: np.ndarray, linear: bool
    ) -> tuple[int, _Inputs]:
        """The experts and the directions of the inputs that the distinct samples support."""
        distinct = len(pd.DataFrame(np.column_stack([x, y])).drop_duplicates())
        low, high = x.min(axis=0), x.max(axis=0)
        constants = np.where(low == high, low, 0.0)
        intercept = bool(self.fit_intercept) or bool(constants.any())
        inputs = _principal_inputs(x, weights, low != high, intercept)
        rank = inputs.matrix.shape[1]
        width = rank + int(intercept)
        supported = 1 if width == 0 else max((((distinct - 2) // width) + 1) // 2, 1)
        num_experts = min(int(self.num_experts), supported)
        same = bool(np.all(y == y[0])) and (intercept or not y[0].any())
        if linear and (same or rank == 0):
            num_experts = 1  # there is nothing by which to tell more
        directions = rank if num_experts > 1 else min(rank, max(distinct - 2 - int(intercept), 0))
        if num_experts < self.num_experts or directions < rank:
            of = f"{directions} of {rank} principal directions" if directions < rank else f"{rank} directions"
            warnings.warn(
                f"num_experts={self.num_experts}: {distinct} distinct samples support {num_experts} of {of} of the inputs",
                ConvergenceWarning,
                stacklevel=3,
            )
        if directions < rank:
            inputs = inputs._replace(
                matrix=inputs.matrix[:, :directions], dropped=inputs.dropped + rank - directions
            )
        elif not inputs.dropped and (low != high).all():  # no need to turn them
            inputs = inputs._replace(matrix=np.diag(inputs.scale))
        return num_experts, _Inputs(
            InputMap(inputs.mean, inputs.matrix, inputs.dropped, False), constants, intercept
        )

    def _target(self, y: np.ndarray, weights: np.ndarray, intercept: bool) -> _Target:
        share = weights / weights.sum()
        mean = share @ y if intercept else 0.0 * y[0]
        spread = np.sqrt(share @ (y - mean) ** 2)
        if intercept:
            spread = np.where(y.min(axis=0) < y.max(axis=0), spread, 0.0)
        if not self.standardise and np.all(spread > 0.0):
            mean, spread = 0.0 * mean, 1.0 + 0.0 * spread
        return _Target(mean, spread) if y.ndim == 2 else _Target(float(mean), float(spread))

    def _run(
        self, x: np.ndarray, y: np.ndarray, weights: np.ndarray, inputs: _Inputs, target: _Target, k: int
    ) -> FitResult:
        """`moejax.fit` of the reduced inputs and the scaled target."""
        z = (x - inputs.map.mean) @ inputs.map.matrix
        labels = (y - target.shift) / target.scale
        padding = _padded(len(y)) - len(y)  # few shapes are few compilations; a weight of zero is no sample
        z, labels, weights = (
            np.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)) for a in (z, labels, weights)
        )
        seed = _random_state(self.random_state).randint(np.iinfo(np.int32).max)

        with self._in_precision():
            return fitting.fit(
                jax.random.key(seed),
                z,
                labels,
                num_experts=k,
                activation=self.activation,
                noise_std=None if self.noise_std is None else self.noise_std / target.scale,
                noise=self.noise,
                fit_intercept=inputs.intercept,
                method=self.method,
                weights=weights,
                order=self.order,
                transform=self.transform_kind,
                num_starts=self.num_starts,
                max_iterations=self.max_iterations,
                ridge=self.ridge,
            )

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
        padded = np.pad(x, [(0, _padded(len(x)) - len(x)), (0, 0)])
        with self._in_precision():
            dtype = jnp.result_type(float)
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.params_)
            log_gates, means = _gates_and_means(
                params, jnp.asarray(padded, dtype), get_activation(self.activation)
            )
        log_gates, means = (np.asarray(a, np.float64)[: len(x)] for a in (log_gates, means))
        return log_gates, self.target_shift_ + self.target_scale_ * means

    def _log_joint(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """(n, k): log P(z = i, y | x)."""
        log_gates, means = self._mixture(X)
        y = as_numbers(y, "y")
        if y.shape == (len(means), 1) and means.ndim == 2:
            y = y[:, 0]
        expected = means[:, 0].shape
        require(y.shape == expected, "y", f"shape {expected} to go with X", y.shape)
        y = checked_targets(y, len(means), rows_of="X")
        log_densities = _log_normal(y[:, None] - means, self.noise_std_)
        return log_gates + (log_densities.sum(axis=2) if means.ndim == 3 else log_densities)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _random_state(value: Any) -> np.random.RandomState:
    try:
        return check_random_state(value)
    except (ValueError, TypeError) as error:
        words = "None, a whole number from 0 to 2**32 - 1 or a NumPy RandomState"
        raise ValueError(f"random_state: expected {words}, got {brief(value)}") from error


def _averaged(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n, ..): the mean over experts of (n, k, ..) by gates (n, k)."""
    return np.einsum("ni,ni...->n...", gates, values)


def _log_normal(residual: np.ndarray, noise_std: np.ndarray) -> np.ndarray:
    """log N(residual; 0, sigma^2)."""
    return -0.5 * (residual / noise_std) ** 2 - np.log(noise_std) - 0.5 * LOG_TWO_PI


class _PrincipalInputs(NamedTuple):
    mean: np.ndarray
    """(d,) zero where there is no intercept."""
    matrix: np.ndarray
    """(d, r) principal directions of the scaled inputs over the scale, the largest variance first."""
    dropped: int
    """Directions in which the inputs that vary do not vary together."""
    scale: np.ndarray
    """(d,) one over each input's standard deviation; zero for a constant one."""


def _principal_inputs(
    x: np.ndarray, weights: np.ndarray, varies: np.ndarray, centre: bool
) -> _PrincipalInputs:
    share = weights / weights.sum()
    mean = share @ x if centre else np.zeros(x.shape[1])
    spread = np.sqrt(share @ (x - mean) ** 2)
    scale = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0)
    scaled = (x - mean) * scale
    values, vectors = np.linalg.eigh((scaled * share[:, None]).T @ scaled)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = varying(values, vectors, scaled)
    return _PrincipalInputs(mean, scale[:, None] * vectors[:, kept], int(varies.sum() - kept.sum()), scale)


def _in_input_units(params: MoEParams, inputs: _Inputs, *, fit_intercept: bool) -> MoEParams:
    """Parameters for X; without an intercept, biases are coefficients of the constant columns."""
    params = MoEParams(
        *(np.asarray(leaf) for leaf in params_in_input_units(params, inputs.map.mean, inputs.map.matrix))
    )
    if fit_intercept or not inputs.intercept:
        return params
    direction = inputs.constants / (inputs.constants @ inputs.constants)
    return params._replace(
        experts=params.experts + params.expert_bias[:, None] * direction,
        gating=params.gating + params.gating_bias[:, None] * direction,
        expert_bias=np.zeros_like(params.expert_bias),
        gating_bias=np.zeros_like(params.gating_bias),
    )


def _least_squares(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, inputs: _Inputs, noise_std: float | None
) -> FitResult:
    """One linear expert: its maximum-likelihood estimate, in units of y and for the reduced inputs."""
    z = (x - inputs.map.mean) @ inputs.map.matrix
    share = weights / weights.sum()
    mean = float(share @ y) if inputs.intercept else 0.0
    root = np.sqrt(share)
    coefficients = np.linalg.lstsq(z * root[:, None], (y - mean) * root, rcond=None)[0]
    spread = math.sqrt(float(share @ (y - mean - z @ coefficients) ** 2))
    # what rounding leaves of an exact fit is no noise level
    smallest = math.sqrt(np.finfo(float).eps * float(share @ y**2) + np.finfo(float).tiny)
    sigma = max(spread, smallest) if noise_std is None else float(noise_std)
    none = np.zeros_like(coefficients)[None]
    params = MoEParams(coefficients[None], none, np.full(1, sigma), np.full(1, mean), np.zeros(1))
    value = -0.5 * (spread / sigma) ** 2 - math.log(sigma) - 0.5 * LOG_TWO_PI
    return FitResult(params, float(weights.sum()) * value, np.zeros(0), {"num_passes": 1}, "ok")


@functools.lru_cache(maxsize=64)
def _is_linear(fn: ScalarFunction) -> bool:
    """Whether g is the identity, so that experts take up the target's units."""
    points = np.array([-3.0, -0.5, 0.0, 0.7, 2.0])
    return fn is get_activation("linear") or bool(np.array_equal(values_on_host(fn, points), points))


@functools.partial(jax.jit, static_argnames="fn")
def _gates_and_means(params: MoEParams, x: jax.Array, fn: ScalarFunction) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.nn.log_softmax(gate_logits(params, x), axis=1), expert_means(params, x, fn)


def _padded(count: int) -> int:
    """The next power of two."""
    return max(_SMALLEST_SHAPE, 1 << (count - 1).bit_length())
