r"""The units in which a mixture is fitted to labels.

For a homogeneous g, g(c t) = c g(t) for c > 0 (linear, relu, leaky_relu, abs), the experts absorb the unit of the labels. So the
labels are scaled; the label transforms assume experts of norm 1, and are then right for the fitted labels. A linear g with
intercepts also absorbs a shift. Every other g has a fixed range: its labels are fitted as given, because in another unit the model
would be a different one.

The scale rho is the norm of the experts. For standard normal inputs and no biases E[y^2] = rho^2 E[g(Z)^2] + sigma^2, which
leaves the ratio sigma / rho open. A known sigma determines it. Otherwise it is estimated from the labels' marginal distribution
(`estimate_relative_noise`). That fails for a linear g, whose labels are normal for any ratio: there the trace of T2 is rho^2.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.environment import compiled_fast
from moejax.fitting.padding import padded
from moejax.model.activations import ScalarFunction, activation_facts, values_on_host
from moejax.model.gaussian import gaussian_grid
from moejax.moments.noise import estimate_noise_std, estimate_relative_noise
from moejax.moments.orders import RELATIVE_NOISE_RANGE

LEAST_SIGNAL = 0.1
"""Least share of a linear mixture's label variance that is estimated to be signal. Transforms for a smaller share have second
moments too large to be used; for a linear g, transforms for too much signal are still consistent."""
LARGEST_ARGUMENT = 1e6
"""Largest argument of g at which its range is examined."""
_UNBOUNDED = 1e3
"""Values of this size, for such arguments, count as no bound."""
OUTSIDE_RANGE = 0.01
"""Share of the labels' variance outside the range of g from which a fit reports it."""
LARGEST_RATIO = 1e150
"""A known noise that is more times the labels' spread counts as this many: its square is finite."""


class LabelMap(NamedTuple):
    """The map to the fitted labels, (y - shift) / scale for each output."""

    shift: np.ndarray | float
    """() or (m,)"""
    scale: np.ndarray | float
    """() or (m,)"""

    def __call__(self, y: np.ndarray) -> np.ndarray:
        """The fitted labels (n,), or (n, m)."""
        return (y - self.shift) / self.scale


class FittedLabels(NamedTuple):
    """Unit and noise level of the labels, found before the fit."""

    map: LabelMap
    noise_std: np.ndarray
    """() or (m,): known, or estimated for the label transforms, in units of the fitted labels."""


@functools.lru_cache(maxsize=64)
def is_linear(fn: ScalarFunction) -> bool:
    """True if g is the identity, so that experts absorb the labels' units.

    Raises:
        ValueError: g is no activation.
    """
    activation_facts(fn)
    points = np.array([-3.0, -0.5, 0.0, 0.7, 2.0])
    return bool(np.array_equal(values_on_host(fn, points), points))


def fitted_labels(
    z: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    fn: ScalarFunction,
    *,
    fit_intercept: bool,
    noise_std: float | np.ndarray | None,
    standardise: bool,
) -> FittedLabels:
    """The units in which labels are fitted, and their noise.

    Args:
        z: (n, r) white inputs.
        y: (n,), or (n, m).
        weights: (n,).
        fn: g.
        fit_intercept: if true, there are biases.
        noise_std: () or (m,), sigma if it is known.
        standardise: if false, labels are not scaled.

    Raises:
        ValueError: labels that do not vary, or beyond the range of double precision.
    """
    used = weights > 0
    z, y, share = z[used], y[used], weights[used] / weights[used].sum()
    facts = activation_facts(fn)
    linear, scaled = is_linear(fn), facts.homogeneous and not facts.constant and standardise
    centre = linear and fit_intercept and scaled
    origin = y[0] if centre else np.zeros_like(y[0])
    with np.errstate(over="ignore"):
        size, varies = np.abs(y - origin).max(axis=0), y.max(axis=0) - y.min(axis=0)
    if not np.all((varies > 0) & np.isfinite(varies)):
        output = int(np.argmin((varies > 0) & np.isfinite(varies)))
        of, values = ("", y) if y.ndim == 1 else (f" in output {output}", y[:, output])
        raise ValueError(
            f"y: expected labels that vary by a finite amount, got values from {values.min():.6g} to {values.max():.6g}{of}"
        )
    unit = (y - origin) / size
    middle = share @ unit if centre else 0.0 * size
    spread = np.sqrt(share @ (unit - middle) ** 2)
    shift, scale = origin + size * middle, size * spread
    known = None if noise_std is None else np.asarray(noise_std, float)
    if y.ndim == 2:
        deviation = size * np.sqrt(share @ (unit - share @ unit) ** 2)
        labels = LabelMap(shift, scale) if scaled else LabelMap(0.0 * scale, 0.0 * scale + 1.0)
        return FittedLabels(labels, (deviation if known is None else known) / labels.scale)
    if not scaled:
        level = _noise_std(y, weights[used], fn) if known is None else known
        return FittedLabels(LabelMap(0.0, 1.0), level)
    standard = (unit - middle) / spread  # E[standard^2] = 1
    low, high = RELATIVE_NOISE_RANGE
    square = 1.0 if linear else float(_second_moment(fn))
    if known is not None:
        # rho^2 E[g^2] = 1 - sigma^2, in units of the labels' spread
        relative = min(float(known) / float(scale), LARGEST_RATIO)
        signal = max(1.0 - relative**2, 1e-300)
        ratio = relative * math.sqrt(square / signal)
    elif linear:
        signal = 0.5 * float(share @ ((standard**2 - 1.0) * (np.sum(z**2, axis=1) - z.shape[1])))
        # if labels are nearly all noise, so is the trace, which may be negative
        ratio = math.sqrt(max(1.0 / max(signal, LEAST_SIGNAL) - 1.0, 0.0))
    else:
        ratio = _relative_noise(standard, weights[used], fn)
    spread_of_g = facts.standard_deviation
    ratio = min(max(ratio, low * spread_of_g), high * spread_of_g)
    norm = 1.0 / math.sqrt(square + ratio**2)
    units = float(scale) * norm
    return FittedLabels(
        LabelMap(float(shift), units), np.asarray(ratio if known is None else float(known) / units)
    )


def _second_moment(fn: ScalarFunction) -> float:
    """E[g(Z)^2]."""
    grid = gaussian_grid(8193, dtype=np.dtype(float), xp=np)
    return float(grid.weights @ values_on_host(fn, grid.nodes) ** 2)


@functools.partial(jax.jit, static_argnames="fn", compiler_options=compiled_fast())
def _estimated(y: jax.Array, weights: jax.Array, fn: ScalarFunction) -> jax.Array:
    return estimate_noise_std(y, weights, fn=fn)


@functools.partial(jax.jit, static_argnames=("fn", "square"), compiler_options=compiled_fast())
def _estimated_ratio(y: jax.Array, weights: jax.Array, fn: ScalarFunction, square: float) -> jax.Array:
    return estimate_relative_noise(y, weights, fn=fn, second_moment=square)


def _noise_std(y: np.ndarray, weights: np.ndarray, fn: ScalarFunction) -> np.ndarray:
    """sigma from the labels' marginal distribution, in their own units."""
    if activation_facts(fn).constant:
        share = weights / weights.sum()
        return np.sqrt(share @ (y - share @ y) ** 2)
    weights, y = _for_a_program(weights, y)
    return np.asarray(_estimated(y, weights, fn), float)


def _relative_noise(y: np.ndarray, weights: np.ndarray, fn: ScalarFunction) -> float:
    """sigma / rho from labels with E[y^2] = 1."""
    weights, y = _for_a_program(weights, y)
    return float(_estimated_ratio(y, weights, fn, _second_moment(fn)))


def _for_a_program(weights: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    dtype = jnp.result_type(float)
    return tuple(np.asarray(a, dtype) for a in padded(weights, y))


@functools.lru_cache(maxsize=64)
def activation_range(fn: ScalarFunction) -> tuple[float, float]:
    """(lowest, highest) value of g for arguments up to LARGEST_ARGUMENT in size; infinite if g still changes there."""
    outer = np.geomspace(8.5, LARGEST_ARGUMENT, 512)
    values = values_on_host(fn, np.concatenate([-outer, np.linspace(-8.5, 8.5, 4097), outer]))
    values = values[~np.isnan(values)]
    low, high = float(values.min()), float(values.max())
    return (low if low > -_UNBOUNDED else -math.inf), (high if high < _UNBOUNDED else math.inf)


def share_outside_range(y: np.ndarray, weights: np.ndarray, fn: ScalarFunction) -> float:
    """The mean squared distance of the labels (n,) from the range of g, as a share of their variance about their mean.

    It is zero for labels inside the range, and infinite for equal labels outside.
    """
    low, high = activation_range(fn)
    used = weights > 0
    y, share = y[used], weights[used] / weights[used].sum()
    size = np.abs(y).max() or 1.0
    outside = float(share @ ((y - np.clip(y, low, high)) / size) ** 2)
    variance = float(share @ ((y - share @ y) / size) ** 2)
    if outside == 0.0:
        return 0.0
    return outside / variance if variance > 0 else math.inf


def labels_note(y: np.ndarray, weights: np.ndarray, fn: ScalarFunction, name: str) -> str | None:
    """A note on labels outside the range of g; None if there are too few."""
    if y.ndim == 2 or not share_outside_range(y, weights, fn) > OUTSIDE_RANGE:
        return None
    low, high = activation_range(fn)
    used = weights > 0
    outside = float(weights[used] @ ((y < low) | (y > high))[used] / weights[used].sum())
    return (
        f"{100 * outside:.0f}% of the labels lie outside the range [{low:.4g}, {high:.4g}] of {name}, which its experts reach by "
        "noise alone: give labels in the units of g's values, or another activation"
    )
