"""fit(): a mixture of experts from arrays a user has, in the user's units.

The inputs are whitened (unless they are standard normal already, to sampling error), one compiled program runs the method, and the
parameters are given back for the inputs as they came.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.activations import ActivationLike, activation_facts, activation_name, get_activation
from moejax.em import RIDGE, NoiseModel
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
    moments_of,
    required_order,
)
from moejax.model import MoEParams, log_likelihood, regauge
from moejax.noise import estimate_noise_std
from moejax.spectral import SPECTRAL_STATUS, host_transforms

NOISE_MODELS = ("shared", "per_expert")


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
    """(passes,) log-likelihood in nats along the passes over the data; empty for method "spectral"."""
    diagnostics: dict[str, Any]
    """What the moments said, which order and noise were used, which inputs were dropped, in plain numbers and words."""
    status: str
    """"ok", or why the result is not to be trusted."""


class InputMap(NamedTuple):
    """z = (x - mean) @ matrix, with E[z z'] = I over the sample; `inverse` has matrix' columns as a pseudo-inverse."""

    mean: np.ndarray
    """(d,)"""
    matrix: np.ndarray
    """(d, r), r <= d the rank of the inputs."""
    dropped: int
    """d - r directions in which the inputs do not vary."""
    identity: bool
    """Whether the inputs were standard normal to sampling error, so that nothing was changed."""


_COLLINEAR = 1e-10
"""Directions with less than this share of the largest variance are dropped."""
_STANDARD_ERRORS = 5.0
"""Sample means and covariances within this many standard errors of N(0, I) count as standard."""


def input_map(x: np.ndarray, weights: np.ndarray, *, centre: bool) -> InputMap:
    """The whitening of the inputs, by the eigenvectors of their (centred) second moment.

    Args:
        x: (n, d) finite.
        weights: (n,).
        centre: subtract the mean, which a fit with intercepts can give back.
    """
    d = x.shape[1]
    share = weights / weights.sum()
    mean = share @ x
    second = (x * share[:, None]).T @ x
    effective = 1.0 / (share @ share)
    deviation = np.abs(second - np.eye(d)) / np.sqrt(1.0 + np.eye(d))
    standard = max(np.abs(mean).max(), deviation.max()) < _STANDARD_ERRORS / math.sqrt(effective)
    variances = np.linalg.eigvalsh(second - np.outer(mean, mean) if centre else second)
    if (
        standard and variances[0] > _COLLINEAR * variances[-1]
    ):  # few samples show collinear inputs as standard
        return InputMap(np.zeros(d), np.eye(d), 0, True)
    mean = mean if centre else np.zeros(d)
    scale = np.sqrt(share @ (x - mean) ** 2)
    scaled = (x - mean) / scale
    values, vectors = np.linalg.eigh((scaled * share[:, None]).T @ scaled)
    kept = values > _COLLINEAR * values.max()
    matrix = vectors[:, kept] / np.sqrt(values[kept])
    if kept.all():  # the symmetric root keeps every input recognisable
        matrix = (vectors / np.sqrt(values)) @ vectors.T
    return InputMap(mean, matrix / scale[:, None], int(d - kept.sum()), False)


def params_in_input_units(params: MoEParams, whitening: InputMap) -> MoEParams:
    """Parameters for z turned into parameters for x: a_x = matrix a_z, b_x = b_z - a_x . mean."""
    experts, gating = params.experts @ whitening.matrix.T, params.gating @ whitening.matrix.T
    return regauge(
        MoEParams(
            experts,
            gating,
            params.noise_std,
            params.expert_bias - experts @ whitening.mean,
            params.gating_bias - gating @ whitening.mean,
        )
    )


@functools.partial(jax.jit, static_argnames=("method", "config"))
def _run_method(key: jax.Array, problem: Problem, method: str, config: MethodConfig) -> MethodResult:
    with jax.default_matmul_precision("highest"):
        return get_method(method)(key, problem, config)


@functools.partial(jax.jit, static_argnames=("fn", "smallest", "largest"))
def _estimate_noise(y, weights, fn, smallest, largest):
    return estimate_noise_std(y, weights, fn=fn, smallest=smallest, largest=largest)


def fit(
    key: jax.Array,
    x: Any,
    y: Any,
    *,
    num_experts: int,
    activation: ActivationLike = "linear",
    noise_std: float | None = None,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    method: str = "spectral_em",
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
) -> FitResult:
    """Fit y | x, z = i ~ N(g(a_i . x + b_i), sigma_i^2), z ~ softmax(w . x + c), by the named method.

    Args:
        key: PRNG key of random restarts and starts.
        x: (n, d) inputs, any units; they are whitened inside.
        y: (n,) labels, in the units of g's values.
        num_experts: k; for a method of moments, up to the rank of the inputs.
        activation: g, a registered name or a scalar JAX function.
        noise_std: sigma where it is known; None estimates it, from the labels' marginal likelihood for the moments and then
            jointly with the rest.
        noise: where it is estimated, one sigma for all experts ("shared") or one each ("per_expert").
        fit_intercept: give experts and gates biases.
        method: a registered method: "spectral_em" (moments, gating EM, polish), "spectral" (moments only), or a baseline:
            "joint_em", "gradient_nll", "gradient_mse", "gated_losses".
        weights: (n,) non-negative sample weights; None for ones.
        order: of the tensor that is decomposed, 3 or 4; None takes the usable one with the least predicted error.
        transform: kind of the label transforms.
        num_restarts: of the tensor power method.
        num_starts: random starts; None takes the method's own number (multistart 256, baselines 1).
        start: where "joint_em" starts, "random" or "kmeans".
        polish: with "spectral_em", go on to the maximum-likelihood estimate; False is the published algorithm.
        max_iterations: budget of passes of the last stage.
        ridge: on the gates, in units of the total weight, for whitened inputs.
        chunk_size: samples that the moments take at once; None takes all.

    Returns:
        FitResult.

    Raises:
        ValueError: one line that names the argument, what was expected and what was given: wrong shapes, non-finite values, a
            constant column, k < 1 or, for moments, k > d, too few samples, noise_std <= 0, an unknown name, or an activation
            without a usable order for a method of moments.
    """
    fn = get_activation(activation)
    get_method(method)
    x_host, y_host, weights_host = _checked_arrays(x, y, weights)
    d = x_host.shape[1]
    if moments_of(method) == "required":
        _require(1 <= num_experts <= d, "num_experts", f"1 to {d} (the number of inputs)", num_experts)
    _require(num_experts >= 1, "num_experts", "a positive number", num_experts)
    if noise_std is not None:
        good = isinstance(noise_std, int | float | np.floating) and math.isfinite(noise_std) and noise_std > 0
        _require(good, "noise_std", "a positive finite number, or None to estimate it", noise_std)
    _require(noise in NOISE_MODELS, "noise", " or ".join(map(repr, NOISE_MODELS)), noise)
    _require(transform in TRANSFORM_KINDS, "transform", f"one of {', '.join(TRANSFORM_KINDS)}", transform)
    _require(order in (None, 3, 4), "order", "3, 4 or None", order)
    _require(max_iterations >= 1, "max_iterations", "a positive number", max_iterations)
    _require(num_restarts >= 1, "num_restarts", "a positive number", num_restarts)
    _require(num_starts is None or num_starts >= 1, "num_starts", "a positive number or None", num_starts)
    _require(start in STARTS, "start", " or ".join(map(repr, STARTS)), start)
    needed = (2 * num_experts - 1) * (d + int(fit_intercept)) + 2
    used = int((weights_host > 0).sum())
    _require(
        used >= needed,
        "x",
        f"at least {needed} rows with weight for k = {num_experts} experts of {d} inputs",
        f"{used} rows",
    )

    whitening = input_map(x_host, weights_host, centre=fit_intercept)
    _require(
        moments_of(method) != "required" or num_experts <= whitening.matrix.shape[1],
        "num_experts",
        f"at most {whitening.matrix.shape[1]}, the rank of the inputs",
        num_experts,
    )
    dtype = jnp.result_type(float)
    z = jnp.asarray((x_host - whitening.mean) @ whitening.matrix, dtype)
    labels, sample_weights = jnp.asarray(y_host, dtype), jnp.asarray(weights_host, dtype)
    smallest, largest = transform_noise_std(fn, 0.0), transform_noise_std(fn, math.inf)
    if noise_std is not None:
        start_noise = float(noise_std)
    elif activation_facts(fn).constant:
        start_noise = float(np.std(y_host))
    else:
        start_noise = float(_estimate_noise(labels, sample_weights, fn, smallest, largest))
    transforms, order_reason = None, "no moments"
    if moments_of(method) != "none":
        order, order_reason = _usable_order(
            activation, start_noise, required_order(method) or order, transform, z.shape[1], num_experts
        )
        transforms = host_transforms(fn, start_noise, order, transform, num_experts)
        transforms = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), transforms)
    config = MethodConfig(
        fn=fn,
        num_experts=num_experts,
        order=order or 3,
        noise=noise if noise_std is None else "known",
        fit_intercept=fit_intercept,
        num_restarts=num_restarts,
        num_starts=num_starts,
        start=start,
        polish=polish,
        max_iterations=max_iterations,
        ridge=ridge,
        chunk_size=chunk_size,
    )
    result = _run_method(
        key, Problem(z, labels, sample_weights, jnp.asarray(start_noise, dtype), transforms), method, config
    )
    value = float(log_likelihood(result.params, z, labels, fn, sample_weights))
    mean, matrix = jnp.asarray(whitening.mean, dtype), jnp.asarray(whitening.matrix, dtype)
    params = params_in_input_units(result.params, whitening._replace(mean=mean, matrix=matrix))
    history = np.asarray(result.history)
    diagnostics = {
        "activation": activation_name(activation),
        "method": method,
        "order": order if moments_of(method) != "none" else None,
        "order_choice": order_reason,
        "moment_noise_std": start_noise,
        "mixing_weights": np.asarray(result.mixing_weights).tolist(),
        "num_passes": int(result.num_iterations),
        "inputs_standard_normal": whitening.identity,
        "collinear_directions_dropped": whitening.dropped,
    }
    if result.spectral is not None:
        diagnostics |= {
            "second_moment_eigenvalues": np.asarray(result.spectral.second_moment_eigenvalues).tolist(),
            "tensor_eigenvalues": np.asarray(result.spectral.decomposition.eigenvalues).tolist(),
            "spectral_status": SPECTRAL_STATUS[int(result.spectral.status)],
        }
    return FitResult(
        params, value, history[np.isfinite(history)], diagnostics, METHOD_STATUS[int(result.status)]
    )


def _require(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _checked_arrays(x: Any, y: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (n, d), y (n,) and weights (n,) in double precision.

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
    for name in ("y", "weights"):
        _require(
            arrays[name].shape == x.shape[:1], name, f"shape {x.shape[:1]} to go with x", arrays[name].shape
        )
    for name, value in arrays.items():
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


def _usable_order(
    activation: ActivationLike, noise_std: float, order: int | None, kind: str, dim: int, num_experts: int
) -> tuple[int, str]:
    fn, name = get_activation(activation), activation_name(activation)
    noise_std = transform_noise_std(fn, noise_std)
    advice = 'method="joint_em" uses no moments'
    if order is None:
        choice = choose_order(fn, noise_std, kind=kind, dim=dim, num_experts=num_experts)
        if choice.order is None:
            raise NoUsableOrderError(
                f"activation: {name} has no usable order at noise_std {noise_std:.3g}: {choice.reason}; {advice}"
            )
        return choice.order, choice.reason
    reason = why_unusable(fn, noise_std, 2) or why_unusable(fn, noise_std, order)
    if reason:
        raise NoUsableOrderError(
            f"order: {name} has no usable order {order} at noise_std {noise_std:.3g}: {reason}; {advice}"
        )
    return order, "as asked"
