"""Preparation of a fit: inputs and labels in the units of the fit, and the moments that it uses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.fitting.arguments import log_density_of, require_density_at
from moejax.fitting.data_units import DataUnits
from moejax.fitting.family_labels import family_labels, require_support, without_offset
from moejax.fitting.input_roles import (
    MappedInputs,
    input_roles,
    inputs_as_they_are,
    mapped_inputs,
    require_offset_known,
    with_offset_column,
)
from moejax.fitting.label_units import FittedLabels, fitted_labels
from moejax.fitting.padding import padded
from moejax.fitting.selection import num_rows_needed
from moejax.fitting.whitening import InputMap, column_map
from moejax.likelihood.collapse import resolution
from moejax.likelihood.em import RIDGE
from moejax.likelihood.free_columns import FreeColumns
from moejax.methods.method import (
    MethodConfig,
    Problem,
    lookup_method,
    method_names,
    moments_of,
    require_family,
    require_slopes,
)
from moejax.methods.options import FitOptions, WeightsAre
from moejax.methods.preparation import (
    Orders,
    choose_orders,
    third_transform_at,
    transform_kind,
    transforms_at,
)
from moejax.model.family import Channel, Family, Nuisances, as_family, is_linear_location
from moejax.model.inputs import LogDensity
from moejax.moments.family_transforms import Level
from moejax.moments.score_tensors import AffineLogDensity
from moejax.moments.spectral import SpectralTransforms


class TooManyExpertsError(ValueError):
    """The rows, or the inputs' rank, do not suffice for this number of experts."""


LARGEST_COUNT = 2.0**53
"""Largest number of rows that double precision can count."""


class Sample(NamedTuple):
    """A user's sample, checked, on the host in double precision."""

    x: np.ndarray
    """(n, d)"""
    y: np.ndarray
    """(n,) or (n, m)"""
    weights: np.ndarray
    """(n,) numbers of equal rows."""
    precision: float
    """Machine epsilon of the numbers in x as they were given."""
    offset: np.ndarray | None = None
    """(n,) known addend to the linear predictor of every expert; None if there is none."""

    @property
    def several_outputs(self) -> bool:
        """True if the labels are (n, m)."""
        return self.y.ndim == 2


def meaning_of_weights(total: float, whole: bool, are: WeightsAre | None) -> WeightsAre:
    """The meaning of weights with this sum: `are`, or for None counts if all are `whole` and their sum is countable.

    Raises:
        ValueError: counts of more rows than double precision can count.
    """
    countable = total <= LARGEST_COUNT
    if are is None:
        return "counts" if whole and countable else "reliability"
    require(are != "counts" or countable, "weights", f"counts of at most {LARGEST_COUNT:.0g} rows", total)
    return are


def rescaled_weights(weights: np.ndarray, are: WeightsAre | None) -> tuple[np.ndarray, WeightsAre]:
    """Weights (n,) as numbers of equal rows, and the meaning that was assumed.

    Counts are unchanged. Reliabilities are scaled to sum to (sum w)^2 / sum w^2, the number of equal rows with the same
    information.

    Raises:
        ValueError: counts of more rows than double precision can count.
    """
    are = meaning_of_weights(float(weights.sum()), bool(np.all(weights == np.round(weights))), are)
    if are == "counts":
        return weights, are
    share = weights / weights.max()
    share = share / share.sum()
    return share / (share @ share), are


class Prepared(NamedTuple):
    """A fit that is ready to run."""

    problem: Problem
    config: MethodConfig
    units: DataUnits
    order_reason: str


def prepare(
    sample: Sample,
    num_experts: int,
    noise_std: np.ndarray | None,
    options: FitOptions,
    inputs: InputMap | None = None,
    least_noise: np.ndarray | None = None,
) -> Prepared:
    """Inputs and labels in the units of the fit, and the label transforms of its moments.

    Args:
        sample: the checked sample.
        num_experts: k.
        noise_std: () or (m,) if it is known.
        options: the checked options.
        inputs: the whitening, if it is that of more rows than the sample's; None finds it.
        least_noise: () or (m,), with a noise for each expert, the least that one may have, in units of y; None takes the resolution
            of the labels.

    Raises:
        TooManyExpertsError: k is more than the data admit; ValueError: data and options that contradict each other.
    """
    method, intercept = options.method, options.fit_intercept
    fn, density = options.channel, log_density_of(options.log_density)
    several = sample.several_outputs
    _require_consistent(sample, options, density)
    mapped = _mapped_inputs(sample, options) if inputs is None else inputs_as_they_are(inputs)
    mapped = mapped if sample.offset is None else with_offset_column(mapped, fit_intercept=intercept)
    inputs, of_experts, columns = mapped.inputs, mapped.of_experts, mapped.columns
    used, rank = int((sample.weights > 0).sum()), of_experts.rank
    name = "x" if options.expert_inputs is None else "expert_inputs"
    require(rank > 0, name, "a column that varies", "constant columns only")
    _require_rows(sample, used, rank, num_experts, method, intercept, columns)
    z = inputs(sample.x)
    labels, nuisances = _labels(sample, z[:, : mapped.num_expert_inputs], noise_std, options)
    level: Level = 0.0 if several else float(labels.noise_std)
    level = level if nuisances is None else nuisances
    dtype = jnp.result_type(float)
    y = labels.map(sample.y)
    _require_representable(y[sample.weights > 0], labels, noise_std, np.dtype(dtype))
    if sample.offset is not None:
        z[:, -1] = sample.offset / labels.map.scale
        _require_representable_offset(z[:, -1], np.dtype(dtype))
    kind = transform_kind(options.transform, method, options.num_residual_passes)
    without_moments = "several outputs" if several else "an offset" if sample.offset is not None else ""
    orders, reason, needs_third = (
        Orders((), f"no moments: {without_moments}")
        if without_moments
        else choose_orders(
            method,
            fn,
            level,
            num_rows=used,
            dim=rank,
            num_experts=num_experts,
            order=options.order,
            kind=kind,
        )
    )
    normal_inputs = density is None
    transforms = transforms_at(fn, level, orders, kind, num_experts, normal_inputs=normal_inputs)
    # the third moment without whitening is that of normal inputs
    third = third_transform_at(fn, level, num_experts) if needs_third and normal_inputs else None
    transforms, third = jax.device_put((transforms, third))
    config = MethodConfig(
        fn=fn,
        num_experts=num_experts,
        order=orders[0] if orders else 0,
        more_orders=orders[1:],
        noise="known" if noise_std is not None or not as_family(fn).has_dispersion else options.noise,
        fit_intercept=intercept if columns is None else columns.has_ones,
        columns=columns,
        num_residual_passes=options.num_residual_passes,
        log_density=None
        if density is None
        else AffineLogDensity(density, of_experts.mean, of_experts.matrix),
        num_restarts=options.num_restarts,
        num_starts=options.num_starts,
        start=options.start,
        polish=options.polish,
        max_iterations=options.max_iterations,
        ridge=RIDGE if options.ridge is None or options.ridge == "evidence" else options.ridge,
        chunk_size=options.chunk_size,
    )
    least = _least_noise(sample, labels, least_noise, fn) if config.noise == "per_expert" else None
    problem = _problem(sample.weights, z, y, labels.noise_std, transforms, least, nuisances)
    problem = problem._replace(third=third)
    return Prepared(problem, config, DataUnits(inputs, labels.map), reason)


def _labels(
    sample: Sample, own: np.ndarray, noise_std: np.ndarray | None, options: FitOptions
) -> tuple[FittedLabels, Nuisances | None]:
    """The unit of the labels and their noise, and the nuisances of a family; those of labels without the offset.

    For linear experts with noise of a location, these are the labels less the offset. For others the nuisances, which make a start
    only, are corrected.

    Args:
        sample: the sample.
        own: (n, r) white inputs of the experts.
        noise_std: () or (m,) if it is known.
        options: the checked options.
    """
    fn, y, offset = options.channel, sample.y, sample.offset
    about = {
        "fit_intercept": options.fit_intercept,
        "noise_std": noise_std,
        "standardise": options.standardise,
    }
    if offset is not None and is_linear_location(fn):
        y, offset = y - offset, None
    if not isinstance(fn, Family):
        return fitted_labels(own, y, sample.weights, fn, **about), None
    labels, nuisances = family_labels(y, sample.weights, own, fn, **about)
    if offset is None:
        return labels, nuisances
    offset = offset / labels.map.scale
    return labels, without_offset(nuisances, offset, sample.weights, fit_intercept=options.fit_intercept)


def _problem(
    weights: np.ndarray,
    z: np.ndarray,
    y: np.ndarray,
    noise_std: np.ndarray,
    transforms: tuple[SpectralTransforms, ...],
    least_noise: np.ndarray | None,
    nuisances: Nuisances | None,
) -> Problem:
    """The problem of white inputs z (n, r) and fitted labels y (n,) or (n, m), padded, on the device."""
    dtype = jnp.result_type(float)
    whole = padded(weights, z, y)
    # converted on the host: each jnp.asarray with a dtype would be a program
    kept, x, labels, level = jax.device_put([np.asarray(a, dtype) for a in (*whole, noise_std)])
    least, of_labels = jax.device_put(
        jax.tree.map(lambda value: np.asarray(value, dtype), (least_noise, nuisances))
    )
    first = transforms[0] if transforms else None
    return Problem(x, labels, kept, level, first, transforms[1:], least, of_labels)


def _least_noise(sample: Sample, labels: FittedLabels, given: np.ndarray | None, fn: Channel) -> np.ndarray:
    """() or (m,) the least noise of an expert in units of the fitted labels: the given one, or the resolution of the labels."""
    if given is None and not as_family(fn).location_scale:
        return np.zeros(sample.y.shape[1:])  # of a dispersion, labels have no resolution
    least = resolution(sample.y[sample.weights > 0]) if given is None else given
    return np.broadcast_to(least / np.asarray(labels.map.scale), sample.y.shape[1:])


def _require_consistent(sample: Sample, options: FitOptions, density: LogDensity | None) -> None:
    """Refuse options that the method, or the sample, does not go with.

    Raises:
        ValueError: there is one.
    """
    method, registered = options.method, lookup_method(options.method)
    if sample.several_outputs and not registered.several_outputs:
        able = " or ".join(repr(name) for name in method_names() if lookup_method(name).several_outputs)
        raise ValueError(f"method: expected {able} for several outputs, got {method!r}")
    if sample.offset is not None:
        require_offset_known(options)
        require(not sample.several_outputs, "y", "one output with an offset", f"shape {sample.y.shape}")
    require_slopes(method, options.channel, polish=options.polish)
    require_family(method, options.channel)
    if isinstance(options.channel, Family):
        words = f"one output with family {options.channel.name}"
        require(not sample.several_outputs, "y", words, f"shape {sample.y.shape}")
        require_support(sample.y, sample.weights, options.channel)
        words = f"'random' with family {options.channel.name}, for which there is no clusterwise regression"
        require(options.start == "random", "start", words, options.start)
    if density is None:
        return
    words = f"None for method {method!r}, whose moments are those of normal inputs"
    normal = registered.wide or registered.moments == "third"
    require(not normal, "log_density", words, options.log_density)
    num_inputs = len(input_roles(options, sample.x.shape[1]).experts)
    words = "None with expert_inputs, because it is a density of all inputs"
    require(num_inputs == sample.x.shape[1], "log_density", words, options.log_density)
    require_density_at(density, sample.x[0])


def _mapped_inputs(sample: Sample, options: FitOptions) -> MappedInputs:
    """The map to white inputs, or to standardised ones for a wide method."""
    if lookup_method(options.method).wide:
        standardised = column_map(
            sample.x, sample.weights, centre=options.fit_intercept, precision=sample.precision
        )
        return inputs_as_they_are(standardised)
    return mapped_inputs(
        sample.x,
        sample.weights,
        input_roles(options, sample.x.shape[1]),
        fit_intercept=options.fit_intercept,
        precision=sample.precision,
    )


def _require_rows(
    sample: Sample,
    used: int,
    rank: int,
    num_experts: int,
    method: str,
    intercept: bool,
    columns: FreeColumns | None,
) -> None:
    """Refuse a number of experts that the rows, or the rank of the inputs, do not admit.

    Raises:
        TooManyExpertsError: k is too large.
    """
    if num_experts > rank and moments_of(method) in ("required", "third"):
        raise TooManyExpertsError(
            f"num_experts: expected 1 to {rank} (the rank of the inputs) for a method of moments, got {num_experts}"
        )
    needed = num_rows_needed(num_experts, rank, intercept, columns)
    effective = float(sample.weights.sum())  # for reliabilities, equal rows with the same information
    if min(used, effective * (1 + 1e-9)) < needed:
        got = (
            f"{used}"
            if used <= effective * (1 + 1e-9)
            else f"{used} that say as much as {effective:.3g} equal ones"
        )
        raise TooManyExpertsError(
            f"x: expected at least {needed} rows with weight for k = {num_experts} experts of {rank} inputs, got {got}"
        )


def _require_representable_offset(offset: np.ndarray, dtype: np.dtype) -> None:
    """Refuse an offset (n,), in the unit of the fit, whose squares overflow in the precision of the computation.

    Raises:
        ValueError: there is one, with its row.
    """
    most, at = float(np.finfo(dtype).max) ** 0.5 / 1e3, int(np.argmax(np.abs(offset)))
    words = f"numbers of at most {most:.0e} in the unit of the fit, in {dtype}"
    if abs(offset[at]) > most:
        raise ValueError(f"offset: expected {words}, got {offset[at]:.3g} in row {at}")


def _require_representable(
    y: np.ndarray, labels: FittedLabels, given: np.ndarray | None, dtype: np.dtype
) -> None:
    """Refuse fitted labels, or a noise, whose squares overflow or vanish in the precision of the computation.

    Args:
        y: (n,) or (n, m) fitted labels with weight.
        labels: their unit and noise.
        given: () or (m,) the noise in the user's units, if it is known.
        dtype: floating dtype of the computation.

    Raises:
        ValueError: a square is zero or infinite; float64 or other units may help.
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
        level = float(np.min(noise_std)) * unit if given is None else float(np.min(given))
        raise ValueError(
            f"noise_std: expected {least * unit:.0e} to {most * unit:.0e} for these labels in {dtype}, "
            f"got {level:.3g}"
        )
