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
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, _safe_indexing, check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from moejax import fitting
from moejax.activations import ActivationLike, ScalarFunction, get_activation, values_on_host
from moejax.em import RIDGE, NoiseModel
from moejax.fitting import DEFAULT_METHOD, FitResult
from moejax.label_transforms import TransformKind
from moejax.methods import get_method
from moejax.model import LOG_TWO_PI, MoEParams, expert_means, gate_logits, posterior
from moejax.predictive import expected_log_density, root_mean_square
from moejax.selection import num_free_parameters
from moejax.whitening import InputMap, params_in_input_units, varying

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
        fn = get_activation(self.activation)
        get_method(self.method)
        levels = np.asarray(1.0 if self.noise_std is None else self.noise_std)
        if levels.dtype.kind not in "fiu" or not np.all(np.isfinite(levels) & (levels > 0)):
            raise ValueError(f"noise_std: expected a positive finite number or None, got {self.noise_std!r}")
        if self.noise not in fitting.NOISE_MODELS:
            models = " or ".join(map(repr, fitting.NOISE_MODELS))
            raise ValueError(f"noise: expected {models}, got {self.noise!r}")
        if self.precision not in ("float32", "float64", None):
            raise ValueError(f"precision: expected 'float32', 'float64' or None, got {self.precision!r}")
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int | np.integer):
            raise ValueError(f"num_experts: expected a whole number, got {self.num_experts!r}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts: expected a positive number, got {self.num_experts}")
        X, y = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        if y.ndim == 1 or y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        y = y.astype(np.float64)
        if levels.shape not in ((), y.shape[1:]):
            raise ValueError(
                f"noise_std: expected one number or one for each target, got shape {levels.shape}"
            )
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weights.sum() > 0:
            raise ValueError("sample_weight: expected a positive sum, got zeros only")
        used = weights > 0
        x, y, weights = X[used], y[used], weights[used]

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
        within = root_mean_square(gates, self.noise_std_[None])
        between = root_mean_square(gates, means - _averaged(gates, means)[:, None])
        total = np.hypot(within, between)
        return (total, within, between) if components else total

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
        log_gates, means = self._mixture(X)
        with np.errstate(over="ignore"):  # an expert may be behind by more nats than a number holds
            return posterior(log_gates, means, _checked_labels(y, means), self.noise_std_, xp=np)

    def sample(self, X: ArrayLike, random_state: Any = None) -> np.ndarray:
        """(n,), or (n, m): one draw of y given each row of X."""
        generator = check_random_state(random_state)
        log_gates, means = self._mixture(X)
        cumulative = np.cumsum(np.exp(log_gates), axis=1)
        uniform = generator.uniform(size=(len(means), 1))
        chosen = np.sum(uniform >= cumulative[:, :-1], axis=1)
        noise = generator.standard_normal((len(means), *means.shape[2:]))
        return means[np.arange(len(means)), chosen] + self.noise_std_[chosen] * noise

    def score_samples(self, X: ArrayLike, y: ArrayLike | None = None) -> np.ndarray:
        """(n,): log p(y | x), in nats, in units of y.

        Without y, its expectation under the mixture itself, minus the entropy of y given x, by quadrature to 1e-7 nats: in the mean
        over a sample, the two agree where the model is right.

        Raises:
            ValueError: several targets without y, or a y of another shape or with values that are not finite.
        """
        if y is not None:
            return scipy.special.logsumexp(self._log_joint(X, y), axis=1)
        log_gates, means = self._mixture(X)
        if means.ndim == 3:
            raise ValueError("y: needed to score several targets; the quadrature without it is for one")
        return expected_log_density(log_gates, means, self.noise_std_)

    def bic(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Bayesian information criterion on (X, y): -2 log-likelihood + parameters log n; the lower the better.

        With weights (n,), the likelihood is weighted and n is their sum.
        """
        value, size = self._weighted_log_likelihood(X, y, sample_weight)
        return -2.0 * value + self.n_parameters_ * math.log(size)

    def aic(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Akaike's information criterion on (X, y): -2 log-likelihood + 2 parameters; the lower the better. Weights as in `bic`."""
        return -2.0 * self._weighted_log_likelihood(X, y, sample_weight)[0] + 2.0 * self.n_parameters_

    def _weighted_log_likelihood(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[float, float]:
        """The weighted sum of `score_samples`, and that of the weights; rows of weight zero are not looked at."""
        check_is_fitted(self)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        used = np.flatnonzero(weights)
        if not used.size:
            raise ValueError("sample_weight: expected a positive sum, got zeros only")
        if used.size < len(weights):
            X, y = _safe_indexing(X, used), _safe_indexing(y, used)
        return float(weights[used] @ self.score_samples(X, y)), float(weights.sum())

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
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)

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
        x = validate_data(self, X, dtype=np.float64, reset=False)
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
        with np.errstate(over="ignore"):  # a density of zero
            log_densities = _log_normal(_checked_labels(y, means)[:, None] - means, self.noise_std_)
        return log_gates + (log_densities.sum(axis=2) if means.ndim == 3 else log_densities)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _checked_labels(y: ArrayLike, means: np.ndarray) -> np.ndarray:
    """y (n,), or (n, m), in double precision, to go with means (n, k), or (n, k, m).

    Raises:
        ValueError: another shape, or values that are not finite numbers.
    """
    try:
        y = np.asarray(y, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y: expected numbers, got {error}") from error
    if y.shape == (len(means), 1) and means.ndim == 2:
        y = y[:, 0]
    expected = means[:, 0].shape
    if y.shape != expected:
        raise ValueError(f"y: expected shape {expected} to go with X, got {y.shape}")
    if not np.isfinite(y).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(y))[0])
        raise ValueError(f"y: expected finite values, got {y[place]} at index {place}")
    return y


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
        experts=params.experts + params.expert_bias[..., None] * direction,
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
