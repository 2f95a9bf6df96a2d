"""A problem made ready for its program: inputs and labels in the units of the fit, and the moments that it uses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.fitting.arguments import WeightsAre, require_density_at
from moejax.fitting.data_units import DataUnits
from moejax.fitting.label_units import FittedLabels, fitted_labels
from moejax.fitting.selection import num_rows_needed
from moejax.fitting.whitening import input_map
from moejax.methods.method import (
    MethodConfig,
    Problem,
    lookup_method,
    method_names,
    moments_of,
    require_slopes,
)
from moejax.model.activations import ActivationLike, activation_name, get_activation
from moejax.moments.orders import choose_order, transform_noise_std, why_unusable
from moejax.moments.score_tensors import AffineLogDensity
from moejax.moments.spectral import host_transforms

FEWEST_ROWS_FOR_MOMENTS = 500
"""With fewer rows, methods for which moments are optional do not use them."""


class NoUsableOrderError(ValueError):
    """No tensor of the moments tells the experts of this activation at this noise."""


class TooManyExpertsError(ValueError):
    """The rows, or the inputs' rank, do not suffice for this number of experts."""


LARGEST_COUNT = 2.0**53
"""Rows that double precision tells apart from one more."""


class Sample(NamedTuple):
    """What a user gave, checked, on the host in double precision."""

    x: np.ndarray
    """(n, d)"""
    y: np.ndarray
    """(n,) or (n, m)"""
    weights: np.ndarray
    """(n,) numbers of equal rows."""
    precision: float
    """Machine epsilon of the numbers in x as they were given."""

    @property
    def several_outputs(self) -> bool:
        return self.y.ndim == 2


def rescaled_weights(weights: np.ndarray, are: WeightsAre | None) -> tuple[np.ndarray, WeightsAre]:
    """Weights (n,) as numbers of equal rows, and what they were taken for.

    Counts stay as they are. Reliabilities are scaled to sum to (sum w)^2 / sum w^2, the number of equal rows that say as much.

    Raises:
        ValueError: counts of more rows than double precision can count.
    """
    countable = float(weights.max()) * len(weights) <= LARGEST_COUNT
    if are is None:
        are = "counts" if countable and bool(np.all(weights == np.round(weights))) else "reliability"
    require(
        are != "counts" or countable, "weights", f"counts of at most {LARGEST_COUNT:.0g} rows", weights.max()
    )
    if are == "counts":
        return weights, are
    share = weights / weights.max()
    share = share / share.sum()
    return share / (share @ share), are


class Prepared(NamedTuple):
    """A fit before its program runs."""

    problem: Problem
    config: MethodConfig
    units: DataUnits
    order_reason: str


def prepare(
    sample: Sample, num_experts: int, noise_std: np.ndarray | None, options: dict[str, Any]
) -> Prepared:
    """Inputs and labels in the units of the fit, and what of the moments it uses.

    Raises:
        TooManyExpertsError: k is more than the data admit; ValueError: data or options that do not go together.
    """
    method, activation, intercept = options["method"], options["activation"], options["fit_intercept"]
    fn, density = get_activation(activation), options["log_density"]
    registered, several = lookup_method(method), sample.several_outputs
    if several and not registered.several_outputs:
        able = " or ".join(repr(name) for name in method_names() if lookup_method(name).several_outputs)
        raise ValueError(f"method: expected {able} for several outputs, got {method!r}")
    require_slopes(method, activation, polish=options["polish"])
    if density is not None:
        require_density_at(density, sample.x[0])
    inputs = input_map(sample.x, sample.weights, centre=intercept, precision=sample.precision)
    used, rank = int((sample.weights > 0).sum()), inputs.matrix.shape[1]
    require(rank > 0, "x", "a column that varies", "constant columns only")
    if num_experts > rank and moments_of(method) == "required":
        raise TooManyExpertsError(
            f"num_experts: expected 1 to {rank} (the rank of the inputs) for a method of moments, got {num_experts}"
        )
    needed = num_rows_needed(num_experts, rank, intercept)
    effective = float(sample.weights.sum())  # of reliabilities, the number of equal rows that say as much
    if min(used, effective * (1 + 1e-9)) < needed:
        got = (
            f"{used}"
            if used <= effective * (1 + 1e-9)
            else f"{used} that say as much as {effective:.3g} equal ones"
        )
        raise TooManyExpertsError(
            f"x: expected at least {needed} rows with weight for k = {num_experts} experts of {rank} inputs, got {got}"
        )
    z = (sample.x - inputs.mean) @ inputs.matrix
    labels = fitted_labels(
        z,
        sample.y,
        sample.weights,
        fn,
        fit_intercept=intercept,
        noise_std=noise_std,
        standardise=options["standardise"],
    )
    dtype = jnp.result_type(float)
    y = labels.map(sample.y)
    _require_representable(y[sample.weights > 0], labels, np.dtype(dtype))
    orders, reason = (
        ((), "no moments: several outputs")
        if several
        else _orders(activation, float(labels.noise_std), options, rank, num_experts, used)
    )
    transforms = tuple(
        jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype),
            host_transforms(
                fn,
                float(labels.noise_std),
                m,
                options["transform"],
                num_experts,
                normal_inputs=density is None,
            ),
        )
        for m in orders
    )
    static = ("num_restarts", "num_starts", "start", "polish", "max_iterations", "ridge", "chunk_size")
    config = MethodConfig(
        fn=fn,
        num_experts=num_experts,
        order=orders[0] if orders else 0,
        more_orders=orders[1:],
        noise="known" if noise_std is not None else options["noise"],
        fit_intercept=intercept,
        num_residual_passes=options["num_residual_passes"],
        log_density=None if density is None else AffineLogDensity(density, inputs.mean, inputs.matrix),
        **{name: options[name] for name in static},
    )
    problem = Problem(
        jnp.asarray(z, dtype),
        jnp.asarray(y, dtype),
        jnp.asarray(sample.weights, dtype),
        jnp.asarray(labels.noise_std, dtype),
        transforms[0] if transforms else None,
        transforms[1:],
    )
    return Prepared(problem, config, DataUnits(inputs, labels.map), reason)


def _require_representable(y: np.ndarray, labels: FittedLabels, dtype: np.dtype) -> None:
    """Refuse fitted labels, or a noise, whose squares are no numbers in the precision of the computation.

    Args:
        y: (n,) or (n, m) fitted labels with weight.
        labels: their unit and noise.
        dtype: of the computation.

    Raises:
        ValueError: one of them is not; float64 or other units may help.
    """
    info = np.finfo(dtype)
    least, most = float(info.tiny) ** 0.5 * 1e3, float(info.max) ** 0.5 / 1e3
    largest = np.abs(y).max(axis=0)
    if np.any((largest < least) | (largest > most)):
        raise ValueError(
            f"y: expected labels of {least:.0e} to {most:.0e} in {dtype}, got {float(np.max(largest)):.3g} as the largest: "
            "give them in other units"
        )
    noise_std = np.asarray(labels.noise_std)
    if np.any((noise_std < least) | (noise_std > most)):
        unit = float(np.max(labels.map.scale))
        raise ValueError(
            f"noise_std: expected {least * unit:.0e} to {most * unit:.0e} for these labels in {dtype}, "
            f"got {float(np.min(noise_std)) * unit:.3g}"
        )


def _orders(
    activation: ActivationLike,
    noise_std: float,
    options: dict[str, Any],
    dim: int,
    num_experts: int,
    num_rows: int,
) -> tuple[tuple[int, ...], str]:
    """Orders of the tensors that the method decomposes, the best first, and why.

    Raises:
        NoUsableOrderError: there is none, and the method cannot do without.
    """
    method, order = options["method"], options["order"]
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
    choice = choose_order(fn, noise_std, kind=options["transform"], dim=dim, num_experts=num_experts)
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
