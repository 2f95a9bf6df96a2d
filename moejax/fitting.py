"""fit(): a mixture of experts from arrays a user has, in the user's units.

On the host, in double precision, the inputs are whitened (unless they are standard normal already, to sampling error) and the
labels are put into the unit in which they are fitted; one compiled program runs the method; parameters, errors and likelihoods are
given back, on the host and in double precision, in the units in which the data came.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from moejax.activations import ActivationLike, ScalarFunction, activation_name
from moejax.arguments import (
    WeightsAre,
    checked_arrays,
    checked_options,
    input_precision,
    noise_levels,
    number_of_experts,
    prng_key,
)
from moejax.checks import require
from moejax.data_units import DataUnits
from moejax.diagnostics import collapse_status, diagnose
from moejax.em import RIDGE, NoiseModel
from moejax.information import Covariance, CovarianceKind, confidence_intervals
from moejax.label_transforms import (
    TransformKind,
)
from moejax.label_units import labels_note
from moejax.methods import (
    METHOD_STATUS,
    MethodConfig,
    MethodResult,
    Problem,
    Start,
    get_method,
)
from moejax.model import MoEParams, log_joint, weighted_sum
from moejax.preparation import (
    Sample,
    TooManyExpertsError,
    prepare,
    rescaled_weights,
)
from moejax.score_tensors import LogDensity
from moejax.selection import (
    criteria,
    left_out,
    num_free_parameters,
    numbers_to_try,
    selection_table,
)
from moejax.uncertainty import uncertainty

DEFAULT_METHOD = "multistart"
LARGEST_SHORTFALL = 0.5
"""Nats below a maximum up to which an estimate counts as being there: one standard error in one direction."""


class _Fitted(NamedTuple):
    """A fit in its own units, from which parameters and errors in others are made."""

    params: MoEParams
    covariance: Covariance | None
    """None where there are no standard errors."""
    units: DataUnits
    noise: NoiseModel
    fit_intercept: bool

    def errors(self, units: DataUnits) -> MoEParams | None:
        if self.covariance is None:
            return None
        return units.errors(self.covariance, self.params, noise=self.noise, fit_intercept=self.fit_intercept)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A fitted mixture of experts."""

    params: MoEParams
    """NumPy arrays in double precision, in the units of the x and y that were given."""
    log_likelihood: float
    """Weighted sum over samples, in nats, in the units of the y that was given."""
    history: np.ndarray
    """(passes,) objective in nats along the passes over the data: the log-likelihood less the ridge's penalty on the gates
    (`diagnostics["ridge_penalty"]` where it ends). That of the gradient baselines is without the penalty; empty for "spectral"."""
    diagnostics: dict[str, Any]
    """What the moments and the fit say of the data and of the theory's assumptions: numbers by name, and "notes" in words."""
    status: str
    """"ok", or why the result is not to be trusted. It is ok if the method converged in its own objective: a least squared error
    (gradient_mse) or fixed experts (gated_losses, spectral) are no maximum of the likelihood, from which
    `diagnostics["nats_below_maximum"]` says how far they are."""
    standard_errors: MoEParams | None = None
    """Of every parameter, in its unit: 0 where it was not estimated, NaN where the data leave it undetermined. None where the
    estimate is not at a maximum of the likelihood, for which they are derived. Along directions in which the inputs do not vary
    (`diagnostics["collinear_inputs"]`) experts and gates are zero by choice: the errors are of the rest."""
    selection: pd.DataFrame | None = None
    """Where several numbers of experts were tried: a row for each with its criteria (see `moejax.selection`)."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Every option of the fit by name, as it was used, with the precision of the computation: what repeats it."""
    _fitted: _Fitted | None = dataclasses.field(default=None, repr=False)

    def in_units(
        self,
        input_mean: np.ndarray,
        input_std: np.ndarray,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> tuple[MoEParams, MoEParams | None]:
        """(parameters, standard errors) for inputs (x - input_mean) / input_std and labels (y - target_mean) / target_std.

        Args:
            input_mean: (d,), zero for a fit without intercepts.
            input_std: (d,), positive.
            target_mean: zero unless g is linear with intercepts.
            target_std: one unless g is homogeneous.

        Raises:
            ValueError: this result was not made by `fit`.
        """
        if self._fitted is None:
            raise ValueError("in_units: this result was not made by fit, and has no units of its own")
        units = self._fitted.units.seen_from(input_mean, input_std, target_mean, target_std)
        return units.params(self._fitted.params), self._fitted.errors(units)

    def intervals(self, level: float = 0.95) -> tuple[MoEParams, MoEParams]:
        """(lower, upper) ends of Wald intervals for every parameter, each by itself; of sigma on the log scale.

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


def fit(
    key: jax.Array,
    x: Any,
    y: Any,
    *,
    num_experts: int | str | Sequence[int],
    activation: ActivationLike = "linear",
    noise_std: float | None = None,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    method: str = DEFAULT_METHOD,
    weights: Any = None,
    weights_are: WeightsAre | None = None,
    standardise: bool = True,
    order: int | None = None,
    transform: TransformKind = "weighted",
    num_restarts: int = 16,
    num_starts: int | None = None,
    start: Start = "random",
    polish: bool = True,
    max_iterations: int = 100,
    ridge: float = RIDGE,
    chunk_size: int | None = None,
    num_residual_passes: int | None = None,
    covariance: CovarianceKind = "observed",
    log_density: LogDensity | str | None = None,
) -> FitResult:
    """Fit y | x, z = i ~ N(g(a_i . x + b_i), sigma_i^2), z ~ softmax(w . x + c), by the named method.

    Inputs in any units are whitened inside, labels of a homogeneous g (linear, relu, abs) scaled: the units of x, and for such g
    those of y, do not matter. Other activations are fitted to the labels as they are; labels outside their range are reported in
    the notes. Columns of x that do not vary are left out where there are intercepts, and reported.

    Several outputs (n, m) share the gates; each has its own experts and noise, and given z and x they are independent. They are
    fitted without moments, by "multistart" or "joint_em", and have no standard errors.

    Args:
        key: PRNG key of random restarts and starts.
        x: (n, d) inputs, any units.
        y: (n,) labels, or (n, m), in the units of g's values.
        num_experts: k; for a method of moments, up to the rank of the inputs. Several (a range or list), or "auto" for 1 to 6: each
            that the data admit is fitted, and the one with the least BIC among those whose status is "ok" is the result.
        activation: g, a registered name or a scalar JAX function.
        noise_std: sigma where it is known, () or (m,), in units of y; None estimates it, from the labels' marginal likelihood for
            the moments and then jointly with the rest.
        noise: where it is estimated, one sigma for all experts ("shared") or one each ("per_expert").
        fit_intercept: give experts and gates biases.
        method: a registered method: "multistart" (spectral and random starts, the best optimum found), "spectral_em" (moments,
            gating EM, polish), "spectral" (moments only), "spectral_residual" (moments and residual passes), or a baseline:
            "joint_em", "gradient_nll", "gradient_mse", "gated_losses".
        weights: (n,) non-negative sample weights; None for ones. Rows of weight zero are not looked at and may hold anything.
        weights_are: "counts", a weight is a number of equal rows; "reliability", a weight is how much a row counts beside the
            others (sampling or importance weights), and their scale means nothing: they are scaled to sum to their effective
            number, (sum w)^2 / sum w^2 (Kish 1965). None: counts if all are whole numbers.
        standardise: scale the labels of a homogeneous g; False fits all labels as they are.
        order: of the tensor that is decomposed, 3 or 4; None takes the usable one with the least predicted error.
        transform: kind of the label transforms.
        num_restarts: of the tensor power method.
        num_starts: random starts; None takes the method's own number (multistart 256, baselines 1).
        start: where "joint_em" starts, "random" or "kmeans".
        polish: with "spectral_em", go on to the maximum-likelihood estimate; False is the published algorithm.
        max_iterations: budget of passes of the last stage.
        ridge: on the gates for whitened inputs, the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats, whatever the sample size:
            a normal prior of variance 1 / ridge. `diagnostics` says what it costs and which gates it alone holds.
        chunk_size: samples that the moments take at once; None takes all.
        num_residual_passes: of "spectral_residual" (default 5), or after the moments of "spectral" (default 0).
        covariance: of the standard errors: "observed" (the model is true, weights count equal rows) or "sandwich" (neither is).
        log_density: x (d,) -> () log p(x), up to a constant, of inputs that are not normal, or the name of a registered input
            distribution: moments are then of its score tensors, in place of those of a normal density with the inputs' mean and
            covariance.

    Returns:
        FitResult.

    Raises:
        ValueError: one line that names the argument, what was expected and what was given: wrong shapes, non-finite values, labels
            or inputs that do not vary, k < 1 or, for moments, k > d, too few samples, noise_std <= 0, an unknown name, or an
            activation without a usable order for a method of moments.
    """
    given = {name: value for name, value in locals().items() if name in DEFAULT_OPTIONS}
    options = checked_options(**given)
    chosen = number_of_experts(num_experts)
    key = prng_key(key)
    arrays = checked_arrays(x, y, weights)
    levels = noise_levels(noise_std, arrays[1].shape[1:])
    require(
        options["start"] == "random" or arrays[1].ndim == 1, "start", "'random' for several outputs", start
    )
    resolved, kind = rescaled_weights(arrays[2], weights_are)
    sample = Sample(arrays[0], arrays[1], resolved, input_precision(x))
    settings = options | {
        "num_experts": chosen if isinstance(chosen, int | str) else list(chosen),
        "activation": activation_name(activation),
        "noise_std": None if levels is None else levels.tolist(),
        "weights_are": kind,
        "log_density": log_density
        if isinstance(log_density, str) or log_density is None
        else repr(log_density),
        "key": np.asarray(
            jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        ).tolist(),
        "precision": str(jnp.result_type(float)),
    }
    if isinstance(chosen, int):
        result = fit_sample(key, sample, chosen, levels, options)
    else:
        result = _fit_several(key, sample, chosen, levels, options)
    return dataclasses.replace(result, settings=settings)


DEFAULT_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(fit).parameters.items()
    if name not in ("key", "x", "y", "num_experts", "noise_std", "weights")
}
"""The options that `checked_options` checks one by one, with their defaults."""


def fit_sample(
    key: jax.Array, sample: Sample, num_experts: int, noise_std: np.ndarray | None, options: dict[str, Any]
) -> FitResult:
    """A fit of one number of experts to a sample.

    Args:
        key: PRNG key.
        sample: checked.
        num_experts: k.
        noise_std: () or (m,) where it is known.
        options: those of `fit` that `checked_options` returns, all of them.

    Raises:
        TooManyExpertsError, ValueError: as `fit` says.
    """
    problem, config, units, order_reason = prepare(sample, num_experts, noise_std, options)
    result = _run_method(key, problem, options["method"], config)
    value, posterior = _evaluate(result.params, problem, config.fn)
    # densities of the fitted labels are those of y times the unit
    per_sample = float(np.sum(np.log(np.broadcast_to(units.labels.scale, sample.y.shape[1:]))))
    offset = float(sample.weights.sum()) * per_sample
    history = np.asarray(result.history, np.float64) - offset
    known = None
    if not sample.several_outputs:
        known = uncertainty(result.params, problem, options["covariance"], config)
    diagnostics = {
        "activation": activation_name(options["activation"]),
        "method": options["method"],
        "noise": config.noise,
        "fit_intercept": config.fit_intercept,
        "order": config.order or None,
        "order_choice": order_reason,
        "moment_noise_std": (np.asarray(problem.noise_std, np.float64) * units.labels.scale).tolist(),
        "mixing_weights": np.asarray(result.mixing_weights).tolist(),
        "num_passes": int(result.num_iterations),
        **diagnose(result, problem, np.asarray(posterior, np.float64), units, config, known),
    }
    if "optima" in diagnostics:
        diagnostics["optima"] = [value - offset for value in diagnostics["optima"]]
    note = labels_note(sample.y, sample.weights, config.fn, diagnostics["activation"])
    if note is not None:
        diagnostics["notes"].insert(0, note)
    status = METHOD_STATUS[int(result.status)]
    collapsed = diagnostics["collapsed_experts"]
    if collapsed:
        status = collapse_status(collapsed)
    at_maximum = known is not None and not collapsed and float(known.shortfall) < LARGEST_SHORTFALL
    if known is not None and not collapsed and not at_maximum:
        diagnostics["notes"].append(
            "no standard errors: they are for a maximum of the likelihood, and the estimate is not at one"
        )
    kept = jax.tree.map(np.asarray, (result.params, known.covariance if at_maximum else None))
    fitted = _Fitted(*kept, units, config.noise, config.fit_intercept)
    return FitResult(
        units.params(result.params),
        float(value) - offset,
        history[np.isfinite(history)],
        diagnostics,
        status,
        fitted.errors(units),
        _fitted=fitted,
    )


def _fit_several(
    key: jax.Array,
    sample: Sample,
    num_experts: str | Sequence[int],
    noise_std: np.ndarray | None,
    options: dict[str, Any],
) -> FitResult:
    """A fit for each number of experts that the data admit; the one with the least BIC, with the table of all.

    Raises:
        ValueError: the data admit none.
    """
    noise = "known" if noise_std is not None else options["noise"]
    num_outputs = sample.y.shape[1] if sample.several_outputs else 1
    results: dict[int, FitResult] = {}
    refusals: list[TooManyExpertsError] = []
    rows = []
    for k in numbers_to_try(num_experts):
        try:
            results[k] = result = fit_sample(key, sample, k, noise_std, options)
        except TooManyExpertsError as error:
            refusals.append(error)
            rows.append(left_out(k, str(error)))
            continue
        rank = sample.x.shape[1] - result.diagnostics["collinear_directions_dropped"]
        num_parameters = num_free_parameters(
            k, rank, noise, options["fit_intercept"], num_outputs=num_outputs
        )
        rows.append(
            criteria(
                k,
                result.log_likelihood,
                num_parameters,
                result.diagnostics["classification_entropy"],
                float(sample.weights.sum()),
                result.diagnostics.get("second_moment_eigenvalues"),
                result.status,
            )
        )
    if not results:
        raise refusals[0]
    table = selection_table(rows)
    return dataclasses.replace(
        results[int(table.loc[table["chosen"], "num_experts"].iloc[0])], selection=table
    )


@functools.partial(jax.jit, static_argnames=("method", "config"))
def _run_method(key: jax.Array, problem: Problem, method: str, config: MethodConfig) -> MethodResult:
    with jax.default_matmul_precision("highest"):
        return get_method(method)(key, problem, config)


@functools.partial(jax.jit, static_argnames="fn")
def _evaluate(params: MoEParams, problem: Problem, fn: ScalarFunction) -> tuple[jax.Array, jax.Array]:
    """() log-likelihood and (n, k) responsibilities."""
    with jax.default_matmul_precision("highest"):
        joint = log_joint(params, problem.x, problem.y, fn)
    value = weighted_sum(jax.nn.logsumexp(joint, axis=1), problem.weights)
    return value, jax.nn.softmax(joint, axis=1)
