"""fit(): a mixture of experts from arrays a user has, in the user's units.

The inputs are whitened (unless they are standard normal already, to sampling error), one compiled program runs the method, and the
parameters are given back for the inputs as they came.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from moejax.activations import (
    ActivationLike,
    ScalarFunction,
    activation_facts,
    activation_name,
    get_activation,
)
from moejax.design import sample_blocks, sample_scale
from moejax.diagnostics import diagnose
from moejax.em import RIDGE, NoiseModel
from moejax.information import (
    COVARIANCE_KINDS,
    CovarianceKind,
    confidence_intervals,
    covariance,
    standard_errors,
)
from moejax.inputs import get_log_density
from moejax.label_transforms import (
    TRANSFORM_KINDS,
    TransformKind,
    choose_order,
    transform_noise_std,
    why_unusable,
)
from moejax.methods import (
    METHOD_STATUS,
    STARTS,
    MethodConfig,
    MethodResult,
    Problem,
    Start,
    get_method,
    lookup_method,
    method_names,
    moments_of,
)
from moejax.model import MoEParams, log_joint, weighted_sum, with_stand_ins
from moejax.noise import estimate_noise_std
from moejax.polish import likelihood_curvature
from moejax.score_tensors import AffineLogDensity, LogDensity
from moejax.selection import criteria, num_free_parameters, num_rows_needed, numbers_to_try, selection_table
from moejax.spectral import host_transforms
from moejax.whitening import input_map, params_in_input_units

NOISE_MODELS = ("shared", "per_expert")
DEFAULT_METHOD = "multistart"


class NoUsableOrderError(ValueError):
    """No tensor of the moments tells the experts of this activation at this noise."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A fitted mixture of experts."""

    params: MoEParams
    """In the units of the x and y that were given."""
    log_likelihood: float
    """Weighted sum over samples, in nats."""
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


@functools.partial(jax.jit, static_argnames=("method", "config"))
def _run_method(key: jax.Array, problem: Problem, method: str, config: MethodConfig) -> MethodResult:
    with jax.default_matmul_precision("highest"):
        return get_method(method)(key, problem, config)


@functools.partial(jax.jit, static_argnames=("fn", "smallest", "largest"))
def _estimate_noise(y, weights, fn, smallest, largest):
    return estimate_noise_std(y, weights, fn=fn, smallest=smallest, largest=largest)


@functools.partial(jax.jit, static_argnames="fn")
def _evaluate(params: MoEParams, problem: Problem, fn: ScalarFunction) -> tuple[jax.Array, jax.Array]:
    """() log-likelihood and (n, k) responsibilities."""
    with jax.default_matmul_precision("highest"):
        joint = log_joint(params, problem.x, problem.y, fn)
    value = weighted_sum(jax.nn.logsumexp(joint, axis=1), problem.weights)
    return value, jax.nn.softmax(joint, axis=1)


class _Uncertainty(NamedTuple):
    """How well the data determine an estimate."""

    errors: MoEParams
    """Standard errors, in the input units."""
    condition: jax.Array
    """() of the observed information."""
    shortfall: jax.Array
    """() nats by which the estimate is below the maximum of the likelihood with its ridge, by a quadratic model; of a sample of
    mean weight one with the sandwich, whose weights have no scale."""


@functools.partial(jax.jit, static_argnames=("fn", "noise", "fit_intercept", "kind", "ridge"))
def _uncertainty(
    params: MoEParams,
    problem: Problem,
    mean: jax.Array,
    matrix: jax.Array,
    fn: ScalarFunction,
    noise: NoiseModel,
    fit_intercept: bool,
    kind: CovarianceKind,
    ridge: float,
) -> _Uncertainty:
    free: dict[str, Any] = {"noise": noise, "fit_intercept": fit_intercept}
    with jax.default_matmul_precision("highest"):
        of = covariance(params, problem.x, problem.y, fn, weights=problem.weights, kind=kind, **free)
        blocks = sample_blocks(problem.x, problem.y, problem.weights, fit_intercept=fit_intercept)
        curvature = likelihood_curvature(params, blocks, fn=fn, ridge=ridge * problem.weights.sum(), **free)
        observed = of
        if kind != "observed":
            observed = covariance(params, problem.x, problem.y, fn, weights=problem.weights, **free)
        shortfall = 0.5 * curvature.gradient @ observed.matrix @ curvature.gradient
        shortfall = shortfall / (1.0 if kind == "observed" else sample_scale(problem.weights).mean_weight)
        errors = standard_errors(
            of, params, transform=lambda p: params_in_input_units(p, mean, matrix), **free
        )
    return _Uncertainty(errors, of.condition, shortfall)


FEWEST_ROWS_FOR_MOMENTS = 500
"""Below this, a method that can do without moments does."""
LARGEST_SHORTFALL = 0.5
"""Nats below a maximum up to which an estimate counts as being there: one standard error in one direction."""


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

    Several outputs (n, m) share the gates; each has its own experts and noise, and given z and x they are independent. They are
    fitted without moments, by "multistart" or "joint_em", and have no standard errors.

    Args:
        key: PRNG key of random restarts and starts.
        x: (n, d) inputs, any units; they are whitened inside.
        y: (n,) labels, or (n, m), in the units of g's values.
        num_experts: k; for a method of moments, up to the rank of the inputs. Several (a range or list), or "auto" for 1 to 6:
            each is fitted, and the one with the least BIC is the result.
        activation: g, a registered name or a scalar JAX function.
        noise_std: sigma where it is known, () or (m,); None estimates it, from the labels' marginal likelihood for the moments and
            then jointly with the rest.
        noise: where it is estimated, one sigma for all experts ("shared") or one each ("per_expert").
        fit_intercept: give experts and gates biases.
        method: a registered method: "multistart" (spectral and random starts, the best optimum found), "spectral_em" (moments,
            gating EM, polish), "spectral" (moments only), "spectral_residual" (moments and residual passes), or a baseline:
            "joint_em", "gradient_nll", "gradient_mse", "gated_losses".
        weights: (n,) non-negative sample weights; None for ones. Rows of weight zero are not looked at and may hold anything.
        order: of the tensor that is decomposed, 3 or 4; None takes the usable one with the least predicted error.
        transform: kind of the label transforms.
        num_restarts: of the tensor power method.
        num_starts: random starts; None takes the method's own number (multistart 256, baselines 1).
        start: where "joint_em" starts, "random" or "kmeans".
        polish: with "spectral_em", go on to the maximum-likelihood estimate; False is the published algorithm.
        max_iterations: budget of passes of the last stage.
        ridge: on the gates, in units of the total weight, for whitened inputs.
        chunk_size: samples that the moments take at once; None takes all.
        num_residual_passes: of "spectral_residual" (default 5), or after the moments of "spectral" (default 0).
        covariance: of the standard errors: "observed" (the model is true, weights count equal rows) or "sandwich" (neither is).
        log_density: x (d,) -> () log p(x), up to a constant, of inputs that are not normal, or the name of a registered input
            distribution: moments are then of its score tensors, in place of those of a normal density with the inputs' mean and
            covariance.

    Returns:
        FitResult.

    Raises:
        ValueError: one line that names the argument, what was expected and what was given: wrong shapes, non-finite values, a
            constant column, k < 1 or, for moments, k > d, too few samples, noise_std <= 0, an unknown name, or an activation
            without a usable order for a method of moments.
    """
    if not isinstance(num_experts, int | np.integer):
        settings = {
            name: value for name, value in locals().items() if name not in ("key", "x", "y", "num_experts")
        }
        return _fit_several(key, x, y, num_experts, settings)
    _require(hasattr(key, "dtype"), "key", "a PRNG key such as jax.random.key(0)", key)
    fn, density = get_activation(activation), _log_density(log_density)
    get_method(method)
    x_host, y_host, weights_host = _checked_arrays(x, y, weights)
    d, several = x_host.shape[1], y_host.ndim == 2
    if several and not lookup_method(method).several_outputs:
        able = " or ".join(repr(name) for name in method_names() if lookup_method(name).several_outputs)
        raise ValueError(f"method: expected {able} for several outputs, got {method!r}")
    _require(not several or start == "random", "start", "'random' for several outputs", start)
    needs_moments = moments_of(method) == "required"
    if needs_moments:
        _require(1 <= num_experts <= d, "num_experts", f"1 to {d} (the number of inputs)", num_experts)
    _require(num_experts >= 1, "num_experts", "a positive number", num_experts)
    if noise_std is not None:
        levels = np.asarray(noise_std)
        good = levels.dtype.kind in "fiu" and levels.shape in ((), y_host.shape[1:])
        good = good and bool(np.all(np.isfinite(levels) & (levels > 0)))
        _require(good, "noise_std", "a positive finite number, or None to estimate it", noise_std)
    _require(noise in NOISE_MODELS, "noise", " or ".join(map(repr, NOISE_MODELS)), noise)
    _require(transform in TRANSFORM_KINDS, "transform", f"one of {', '.join(TRANSFORM_KINDS)}", transform)
    _require(order in (None, 3, 4), "order", "3, 4 or None", order)
    _require(max_iterations >= 1, "max_iterations", "a positive number", max_iterations)
    _require(num_restarts >= 1, "num_restarts", "a positive number", num_restarts)
    _require(num_starts is None or num_starts >= 1, "num_starts", "a positive number or None", num_starts)
    _require(start in STARTS, "start", " or ".join(map(repr, STARTS)), start)
    _require(
        covariance in COVARIANCE_KINDS, "covariance", " or ".join(map(repr, COVARIANCE_KINDS)), covariance
    )
    needed = num_rows_needed(num_experts, d, fit_intercept)
    used = int((weights_host > 0).sum())
    _require(
        used >= needed,
        "x",
        f"at least {needed} rows with weight for k = {num_experts} experts of {d} inputs",
        used,
    )

    if density is not None:
        try:
            value = np.asarray(density(jnp.asarray(x_host[0])))
        except (TypeError, ValueError) as error:
            raise ValueError(f"log_density: failed at x[0]: {error}") from error
        good = value.shape == () and bool(np.isfinite(value))
        _require(good, "log_density", "a finite number () at x[0]", value)
    whitening = input_map(x_host, weights_host, centre=fit_intercept)
    rank = whitening.matrix.shape[1]
    _require(
        not needs_moments or num_experts <= rank,
        "num_experts",
        f"at most {rank}, the rank of the inputs",
        num_experts,
    )
    dtype = jnp.result_type(float)
    z = jnp.asarray((x_host - whitening.mean) @ whitening.matrix, dtype)
    labels, sample_weights = jnp.asarray(y_host, dtype), jnp.asarray(weights_host, dtype)
    smallest, largest = transform_noise_std(fn, 0.0), transform_noise_std(fn, math.inf)
    start_noise: Any
    if noise_std is not None:
        start_noise = np.zeros(y_host.shape[1:]) + np.asarray(noise_std, np.float64)
        start_noise = start_noise if several else float(start_noise)
    elif several:
        share = weights_host / weights_host.sum()
        start_noise = np.sqrt(share @ (y_host - share @ y_host) ** 2)
    elif activation_facts(fn).constant:
        start_noise = float(np.std(y_host[weights_host > 0]))
    else:
        start_noise = float(_estimate_noise(labels, sample_weights, fn, smallest, largest))
    orders, order_reason = (
        ((), "no moments: several outputs")
        if several
        else _orders(activation, start_noise, order, transform, rank, num_experts, method, used)
    )
    transforms = tuple(
        jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype),
            host_transforms(fn, start_noise, m, transform, num_experts, normal_inputs=density is None),
        )
        for m in orders
    )
    config = MethodConfig(
        fn=fn,
        num_experts=int(num_experts),
        order=orders[0] if orders else 0,
        more_orders=orders[1:],
        noise=noise if noise_std is None else "known",
        fit_intercept=fit_intercept,
        num_restarts=num_restarts,
        num_starts=num_starts,
        start=start,
        polish=polish,
        max_iterations=max_iterations,
        ridge=ridge,
        chunk_size=chunk_size,
        num_residual_passes=num_residual_passes,
        log_density=None if density is None else AffineLogDensity(density, whitening.mean, whitening.matrix),
    )
    problem = Problem(
        z,
        labels,
        sample_weights,
        jnp.asarray(start_noise, dtype),
        transforms[0] if transforms else None,
        transforms[1:],
    )
    result = _run_method(key, problem, method, config)
    value, posterior = _evaluate(result.params, problem, fn)
    mean, matrix = jnp.asarray(whitening.mean, dtype), jnp.asarray(whitening.matrix, dtype)
    errors, shortfall, condition = None, math.nan, math.nan
    if not several:
        uncertainty = _uncertainty(
            result.params, problem, mean, matrix, fn, config.noise, fit_intercept, covariance, ridge
        )
        shortfall, condition = float(uncertainty.shortfall), float(uncertainty.condition)
        errors = uncertainty.errors if shortfall < LARGEST_SHORTFALL else None
    history = np.asarray(result.history)
    diagnostics = {
        "activation": activation_name(activation),
        "method": method,
        "noise": config.noise,
        "fit_intercept": fit_intercept,
        "order": orders[0] if orders else None,
        "order_choice": order_reason,
        "moment_noise_std": np.asarray(start_noise).tolist(),
        "mixing_weights": np.asarray(result.mixing_weights).tolist(),
        "num_passes": int(result.num_iterations),
        "nats_below_maximum": shortfall,
        "information_condition": condition,
        **diagnose(result, problem, np.asarray(posterior, np.float64), whitening, config),
    }
    status = METHOD_STATUS[int(result.status)]
    collapsed = diagnostics["collapsed_experts"]
    if collapsed:
        status = f"the noise of expert {', '.join(map(str, collapsed))} ran off to zero: the likelihood has no maximum there"
    return FitResult(
        params_in_input_units(result.params, mean, matrix),
        float(value),
        history[np.isfinite(history)],
        diagnostics,
        status,
        None if collapsed else errors,
    )


def _fit_several(
    key: jax.Array, x: Any, y: Any, num_experts: str | Sequence[int], settings: dict[str, Any]
) -> FitResult:
    """A fit for each number of experts; the one with the least BIC, with the table of all."""
    shape, intercept = np.shape(x), settings["fit_intercept"]
    candidates = numbers_to_try(num_experts, shape, intercept)
    results = {k: fit(key, x, y, num_experts=k, **settings) for k in candidates}
    weights = np.ones(shape[0]) if settings["weights"] is None else settings["weights"]
    noise = "known" if settings["noise_std"] is not None else settings["noise"]
    rows = []
    for k, result in results.items():
        rows.append(
            criteria(
                k,
                result.log_likelihood,
                num_free_parameters(
                    k,
                    shape[1] - result.diagnostics["collinear_directions_dropped"],
                    noise,
                    intercept,
                    num_outputs=1 if np.ndim(y) == 1 else np.shape(y)[1],
                ),
                result.diagnostics["classification_entropy"],
                float(np.sum(weights)),
                result.diagnostics.get("second_moment_eigenvalues"),
                result.status,
            )
        )
    table = selection_table(rows)
    return dataclasses.replace(
        results[int(table.loc[table["chosen"], "num_experts"].iloc[0])], selection=table
    )


def _log_density(log_density: LogDensity | str | None) -> LogDensity | None:
    if not isinstance(log_density, str):
        good = log_density is None or callable(log_density)
        _require(
            good,
            "log_density",
            "a function of x (d,), the name of an input distribution, or None",
            log_density,
        )
        return log_density
    named = get_log_density(log_density)
    if named is None:
        raise ValueError(f"log_density: input distribution {log_density!r} has no density")
    return named


def _require(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _checked_arrays(x: Any, y: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (n, d), y (n,) or (n, m), and weights (n,) in double precision.

    Raises:
        ValueError: as `fit` says.
    """
    arrays = {}
    for name, value in (
        ("x", x),
        ("y", y),
        ("weights", np.ones(np.shape(x)[:1]) if weights is None else weights),
    ):
        try:
            arrays[name] = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected numbers, got {error}") from error
    x, y, weights = arrays["x"], arrays["y"], arrays["weights"]
    _require(x.ndim == 2 and x.size > 0, "x", "an array (n, d)", x.shape)
    several = y.ndim == 2 and y.shape[1] > 1 and y.shape[0] == x.shape[0]
    _require(several or y.shape == x.shape[:1], "y", f"shape {x.shape[:1]} to go with x", y.shape)
    _require(weights.shape == x.shape[:1], "weights", f"shape {x.shape[:1]} to go with x", weights.shape)
    x, y = with_stand_ins(weights, x, y, xp=np)  # what has no weight is no sample, whatever it holds
    for name, value in (("x", x), ("y", y), ("weights", weights)):
        if not np.isfinite(value).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise ValueError(f"{name}: expected finite values, got {value[place]} at index {place}")
    _require(
        bool((weights >= 0).all()) and weights.sum() > 0,
        "weights",
        "non-negative numbers, not all zero",
        float(weights.min()),
    )
    seen = x[weights > 0]
    spread = seen.max(axis=0) - seen.min(axis=0)
    if (spread == 0).any() and len(seen) > 1:
        column = int(np.argmin(spread))
        raise ValueError(
            f"x: expected columns that vary, got a constant column {column} (value {seen[0, column]:g})"
        )
    return x, y, weights


def _orders(
    activation: ActivationLike,
    noise_std: float,
    order: int | None,
    kind: TransformKind,
    dim: int,
    num_experts: int,
    method: str,
    num_rows: int,
) -> tuple[tuple[int, ...], str]:
    """Orders of the tensors that the method decomposes, the best first, and why.

    Raises:
        NoUsableOrderError: there is none, and the method cannot do without.
    """
    moments = moments_of(method)
    if moments == "none":
        return (), "no moments"
    if moments == "optional" and num_experts > dim:
        return (), f"no moments: {num_experts} experts of {dim} inputs"
    if moments == "optional" and order is None and num_rows < FEWEST_ROWS_FOR_MOMENTS:
        return (), f"no moments: fewer than {FEWEST_ROWS_FOR_MOMENTS} rows say too little of a third moment"
    fn, name = get_activation(activation), activation_name(activation)
    noise_std = transform_noise_std(fn, noise_std)
    where, advice = f"at noise_std {noise_std:.3g}", 'method="joint_em" uses no moments'
    asked = lookup_method(method).order or order
    if asked is not None:
        reason = why_unusable(fn, noise_std, 2) or why_unusable(fn, noise_std, asked)
        if reason:
            raise NoUsableOrderError(f"order: {name} has no usable order {asked} {where}: {reason}; {advice}")
        return (asked,), "as asked"
    choice = choose_order(fn, noise_std, kind=kind, dim=dim, num_experts=num_experts)
    if choice.order is None:
        if moments == "optional":
            return (), f"no moments: {choice.reason}"
        raise NoUsableOrderError(f"activation: {name} has no usable order {where}: {choice.reason}; {advice}")
    others = (
        m
        for m in (3, 4)
        if m != choice.order and moments == "optional" and not why_unusable(fn, noise_std, m)
    )
    return (choice.order, *others), choice.reason
