"""fit(): a mixture of experts from a user's arrays, in the user's units.

The inputs are whitened (unless they are standard normal already, to sampling error) and the labels converted to the unit of the
fit, on the host in double precision. One compiled program runs the method. Parameters, errors and likelihoods are returned, again
on the host in double precision, in the units of the data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.environment import compiled_fast
from moejax.fitting.arguments import checked_options, noise_levels, number_of_experts, prng_key
from moejax.fitting.array_checks import checked_arrays, input_precision
from moejax.fitting.diagnostics import collapse_status, diagnose
from moejax.fitting.label_units import labels_note
from moejax.fitting.preparation import Sample, TooManyExpertsError, prepare, rescaled_weights
from moejax.fitting.result import FitResult, FittedInOwnUnits
from moejax.fitting.selection import criteria, left_out, numbers_to_try, selection_table
from moejax.fitting.uncertainty import uncertainty
from moejax.likelihood.information import CovarianceKind
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.method import Method, MethodConfig, MethodResult, Problem, lookup_method
from moejax.methods.options import EstimatedNoise, FitOptions, Start, WeightsAre
from moejax.model.activations import ActivationLike, ScalarFunction, activation_name
from moejax.model.inputs import LogDensity
from moejax.model.mixture import MoEParams, log_joint, weighted_sum, with_stand_ins
from moejax.model.status import Status
from moejax.moments.label_transforms import TransformKind

LARGEST_SHORTFALL = 0.5
"""An estimate at most this many nats below a maximum counts as the maximum: one standard error in one direction."""


def fit(  # noqa: D417 - the other arguments are the fields of FitOptions, explained there
    key: jax.Array,
    x: Any,
    y: Any,
    *,
    num_experts: int | str | Sequence[int],
    activation: ActivationLike = FitOptions.activation,
    noise_std: float | None = None,
    noise: EstimatedNoise = FitOptions.noise,
    fit_intercept: bool = FitOptions.fit_intercept,
    method: str = FitOptions.method,
    weights: Any = None,
    weights_are: WeightsAre | None = FitOptions.weights_are,
    standardise: bool = FitOptions.standardise,
    order: int | None = FitOptions.order,
    transform: TransformKind = FitOptions.transform,
    num_restarts: int = FitOptions.num_restarts,
    num_starts: int | None = FitOptions.num_starts,
    start: Start = FitOptions.start,
    polish: bool = FitOptions.polish,
    max_iterations: int = FitOptions.max_iterations,
    ridge: float = FitOptions.ridge,
    chunk_size: int | None = FitOptions.chunk_size,
    num_residual_passes: int | None = FitOptions.num_residual_passes,
    covariance: CovarianceKind = FitOptions.covariance,
    log_density: LogDensity | str | None = FitOptions.log_density,
) -> FitResult:
    """Fit y | x, z = i ~ N(g(a_i . x + b_i), sigma_i^2), z ~ softmax(w . x + c), by the named method.

    Inputs are whitened, and labels of a homogeneous g (linear, relu, abs) are scaled, so that their units do not matter. Other
    activations are fitted to the labels as given. Labels outside their range and constant columns are reported.

    Several outputs (n, m) share the gates; each has its own experts and noise, and given z and x they are independent. They are
    fitted without moments, by "multistart" or "joint_em", and have no standard errors.

    Args:
        key: PRNG key of random restarts and starts.
        x: (n, d) inputs, any units.
        y: (n,) labels, or (n, m), in the units of g's values.
        num_experts: k; for a method of moments, up to the rank of the inputs. For several (a range or list), or "auto" for 1 to 6,
            each that the data admit is fitted, and the result is the one with the least BIC among those with status "ok".
        noise_std: sigma if it is known, () or (m,), in units of y; None estimates it, from the labels' marginal likelihood for
            the moments and then jointly with the other parameters.
        weights: (n,) non-negative sample weights; None for ones. Rows of weight zero are ignored and may hold any values.

    The other arguments are the fields of `FitOptions`, which explains them.

    Returns:
        FitResult.

    Raises:
        ValueError: one line with the argument, the accepted values and the given one.

    Examples:
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 500)
        >>> result = moejax.fit(jax.random.key(1), x, y, num_experts=2, method="spectral_em")
        >>> result.status, bool(moejax.recovery_error(truth.experts, result.params.experts) < 0.01)
        ('ok', True)
    """
    options = FitOptions(
        activation=activation,
        noise=noise,
        fit_intercept=fit_intercept,
        method=method,
        weights_are=weights_are,
        standardise=standardise,
        order=order,
        transform=transform,
        num_restarts=num_restarts,
        num_starts=num_starts,
        start=start,
        polish=polish,
        max_iterations=max_iterations,
        ridge=ridge,
        chunk_size=chunk_size,
        num_residual_passes=num_residual_passes,
        covariance=covariance,
        log_density=log_density,
    )
    return _fit(key, x, y, num_experts, noise_std, weights, options)


def _fit(
    key: jax.Array,
    x: Any,
    y: Any,
    num_experts: int | str | Sequence[int],
    noise_std: float | None,
    weights: Any,
    options: FitOptions,
) -> FitResult:
    """`fit` with its options in one object."""
    given, options = options, checked_options(options)
    chosen = number_of_experts(num_experts)
    key = prng_key(key)
    arrays = checked_arrays(x, y, weights)
    levels = noise_levels(noise_std, arrays[1].shape[1:])
    require(
        options.start == "random" or arrays[1].ndim == 1,
        "start",
        "'random' for several outputs",
        options.start,
    )
    resolved, kind = rescaled_weights(arrays[2], options.weights_are)
    x_kept, y_kept = with_stand_ins(resolved, *arrays[:2], xp=np)  # a small weight may have become zero
    sample = Sample(x_kept, y_kept, resolved, input_precision(x))
    density = given.log_density
    settings = vars(options) | {
        "num_experts": chosen if isinstance(chosen, int | str) else list(chosen),
        "activation": activation_name(given.activation),
        "noise_std": None if levels is None else levels.tolist(),
        "weights_are": kind,
        "log_density": density if isinstance(density, str) or density is None else repr(density),
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


def fit_sample(
    key: jax.Array, sample: Sample, num_experts: int, noise_std: np.ndarray | None, options: FitOptions
) -> FitResult:
    """A fit of one number of experts to a sample.

    Args:
        key: PRNG key.
        sample: the checked sample.
        num_experts: k.
        noise_std: () or (m,) if it is known.
        options: the checked options.

    Raises:
        TooManyExpertsError, ValueError: as in `fit`.
    """
    problem, config, units, order_reason = prepare(sample, num_experts, noise_std, options)
    result = _run_method(key, problem, options.method, config)
    value, posterior = _evaluate(result.params, problem, config.fn)
    # a density of the fitted labels is the density of y times the unit
    per_sample = float(np.sum(np.log(np.broadcast_to(units.labels.scale, sample.y.shape[1:]))))
    offset = float(sample.weights.sum()) * per_sample
    history = np.asarray(result.history, np.float64) - offset
    known = None
    if not sample.several_outputs:
        known = uncertainty(result.params, problem, options.covariance, config)
    diagnostics = {
        "activation": activation_name(options.activation),
        "method": options.method,
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
    status = Status(int(result.status)).words
    collapsed = diagnostics["collapsed_experts"]
    if collapsed:
        status = collapse_status(collapsed)
    at_maximum = known is not None and not collapsed and float(known.shortfall) < LARGEST_SHORTFALL
    if known is not None and not collapsed and not at_maximum:
        diagnostics["notes"].append(
            "no standard errors: they are for a maximum of the likelihood, and the estimate is not at one"
        )
    covariance = known.covariance if known is not None and at_maximum else None
    kept, covariance = jax.tree.map(np.asarray, (result.params, covariance))
    fitted = FittedInOwnUnits(kept, covariance, units, config.noise, config.fit_intercept)
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
    options: FitOptions,
) -> FitResult:
    """A fit for each number of experts that the data admit; the one with the least BIC, with the table of all.

    Raises:
        ValueError: the data admit none.
    """
    noise = "known" if noise_std is not None else options.noise
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
        num_parameters = num_free_parameters(k, rank, noise, options.fit_intercept, num_outputs=num_outputs)
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


def _run_method(key: jax.Array, problem: Problem, method: str, config: MethodConfig) -> MethodResult:
    registered = lookup_method(method)
    with jax.default_matmul_precision("highest"):
        if registered.staged:
            return registered.method(key, problem, config)
        return _compiled(key, problem, config, registered.method)


@functools.partial(jax.jit, static_argnames=("method", "config"), compiler_options=compiled_fast())
def _compiled(key: jax.Array, problem: Problem, config: MethodConfig, method: Method) -> MethodResult:
    return method(key, problem, config)


@functools.partial(jax.jit, static_argnames="fn", compiler_options=compiled_fast())
def _evaluate(params: MoEParams, problem: Problem, fn: ScalarFunction) -> tuple[jax.Array, jax.Array]:
    """() log-likelihood and (n, k) responsibilities."""
    with jax.default_matmul_precision("highest"):
        joint = log_joint(params, problem.x, problem.y, fn)
    value = weighted_sum(jax.nn.logsumexp(joint, axis=1), problem.weights)
    return value, jax.nn.softmax(joint, axis=1)
