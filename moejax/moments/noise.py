"""The noise level, estimated only from the labels, for the label transforms if sigma is unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.model.activations import ScalarFunction, apply_activation
from moejax.model.gaussian import gaussian_grid
from moejax.moments.orders import transform_noise_range

NUM_BINS = 8192
NUM_LEVELS = 48


def estimate_noise_std(
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    fn: ScalarFunction,
    bounds: tuple[float, float] | None = None,
    num_nodes: int = 16385,
) -> Float[jax.Array, ""]:
    """sigma by marginal likelihood: the maximiser of sum_j w_j log f_sigma(y_j), f_sigma the density of g(Z) + sigma N.

    Labels and g(Z) are put into bins by linear weighting, so that every density of the search is one multiplication in Fourier
    space. The search is a geometric grid of sigma, refined once around its best point and once by a parabola.

    Args:
        y: (n,) labels.
        weights: (n,) sample weights.
        fn: g; experts are taken to have ||a|| = 1 and no bias.
        bounds: (smallest, largest) sigma of the search, in units of y; None: the range for which label transforms are built.
        num_nodes: nodes of the quadrature over z.

    Returns:
        () sigma within the bounds.
    """
    smallest, largest = bounds or transform_noise_range(fn)
    grid = gaussian_grid(num_nodes, dtype=y.dtype)
    noiseless = apply_activation(fn, grid.nodes)
    bins = _label_bins(y, weights, noiseless, smallest, largest)
    binned_signal = bins.binned(noiseless, grid.weights)

    def log_likelihood(log_noise_std: jax.Array) -> jax.Array:
        return bins.log_likelihood(binned_signal, jnp.exp(log_noise_std))

    return _best_level(log_likelihood, smallest, largest, y.dtype)


def estimate_relative_noise(
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    fn: ScalarFunction,
    second_moment: float,
    num_nodes: int = 4097,
) -> Float[jax.Array, ""]:
    """sigma / rho by marginal likelihood, for a homogeneous g and labels with E[y^2] = 1 in the sample.

    The density is that of rho g(Z) + sigma N with the labels' second moment, rho^2 (E[g^2] + (sigma / rho)^2) = 1: experts of norm
    rho, without bias. A linear g has the same density for every ratio, so this method cannot estimate it.

    Args:
        y: (n,) labels.
        weights: (n,) sample weights.
        fn: g, homogeneous.
        second_moment: E[g(Z)^2].
        num_nodes: nodes of the quadrature over z.

    Returns:
        () the ratio, in the range for which label transforms are built.
    """
    smallest, largest = transform_noise_range(fn)
    grid = gaussian_grid(num_nodes, dtype=y.dtype)
    noiseless = apply_activation(fn, grid.nodes)
    bins = _label_bins(y, weights, noiseless / second_moment**0.5, smallest / second_moment**0.5, 1.0)

    def log_likelihood(log_ratio: jax.Array) -> jax.Array:
        ratio = jnp.exp(log_ratio)
        norm = 1.0 / jnp.sqrt(second_moment + ratio**2)
        return bins.log_likelihood(bins.binned(norm * noiseless, grid.weights), norm * ratio)

    return _best_level(log_likelihood, smallest, largest, y.dtype)


class _LabelBins(NamedTuple):
    """Labels in bins of equal width."""

    low: Float[jax.Array, ""]
    """() position of the first bin."""
    width: Float[jax.Array, ""]
    """()"""
    counts: Float[jax.Array, " num_bins"]
    """(NUM_BINS,) weight of the labels in each."""

    def binned(
        self, values: Float[jax.Array, " m"], mass: Float[jax.Array, " m"]
    ) -> Float[jax.Array, " num_bins"]:
        """(NUM_BINS,): mass (m,) at values (m,), shared between the two nearest bins."""
        return _binned(values, mass, self.low, self.width)

    def log_likelihood(
        self, signal: Float[jax.Array, " num_bins"], noise_std: Float[jax.Array, ""]
    ) -> Float[jax.Array, ""]:
        """() log-likelihood of the labels, if their density is that of the binned signal convolved with a normal density."""
        dtype = signal.dtype
        frequency = 2.0 * jnp.pi * jnp.fft.rfftfreq(NUM_BINS).astype(dtype) / self.width
        spectrum = jnp.fft.rfft(signal)
        smooth = jnp.exp(-0.5 * (noise_std * frequency) ** 2).astype(spectrum.dtype)
        # the rounding of the Fourier transform; the same for all noise levels
        floor = 10 * jnp.finfo(dtype).eps * signal.max()
        density = jnp.fft.irfft(spectrum * smooth, NUM_BINS)
        return self.counts @ jnp.log(jnp.maximum(density, floor))


def _label_bins(
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    noiseless: Float[jax.Array, " m"],
    smallest: float,
    largest: float,
) -> _LabelBins:
    kept = weights > 0
    # labels beyond the reach of every sigma would all have density 0; the bins reach as far as the largest sigma explains
    y = jnp.clip(y, noiseless.min() - 3.0 * largest, noiseless.max() + 3.0 * largest)
    low = jnp.min(y, where=kept, initial=jnp.inf)
    high = jnp.max(y, where=kept, initial=-jnp.inf)
    margin = 0.25 * (high - low) + 4.0 * smallest
    low, width = low - margin, (high - low + 2.0 * margin) / NUM_BINS
    return _LabelBins(low, width, _binned(y, jnp.where(kept, weights, 0.0), low, width))


def _binned(
    values: Float[jax.Array, " m"],
    mass: Float[jax.Array, " m"],
    low: Float[jax.Array, ""],
    width: Float[jax.Array, ""],
) -> Float[jax.Array, " num_bins"]:
    position = (values - low) / width
    inside = (position >= 0) & (position < NUM_BINS - 1)
    left = jnp.where(inside, jnp.floor(position), 0.0).astype(jnp.int32)
    fraction = jnp.where(inside, position - left.astype(values.dtype), 0.0)
    mass = jnp.where(inside, mass, 0.0)
    empty = jnp.zeros(NUM_BINS, values.dtype)
    return empty.at[left].add(mass * (1.0 - fraction)).at[left + 1].add(mass * fraction)


def _best_level(
    log_likelihood: Callable[[jax.Array], jax.Array], smallest: float, largest: float, dtype: jnp.dtype
) -> Float[jax.Array, ""]:
    """() in [smallest, largest]: the maximiser of a function of the level's logarithm, by a refined geometric grid."""

    def best_of(centre: jax.Array, half_width: jax.Array) -> tuple[jax.Array, jax.Array]:
        levels = centre + half_width * jnp.linspace(-1.0, 1.0, NUM_LEVELS, dtype=dtype)
        values = jax.lax.map(log_likelihood, levels)
        i = jnp.clip(jnp.argmax(values), 1, NUM_LEVELS - 2)
        before, here, after = values[i - 1], values[i], values[i + 1]
        curvature = before - 2.0 * here + after
        shift = jnp.where(curvature < 0, 0.5 * (before - after) / curvature, 0.0)
        spacing = levels[1] - levels[0]
        return levels[i] + spacing * jnp.clip(shift, -1.0, 1.0), spacing

    bounds = jnp.log(jnp.asarray([smallest, largest], dtype))
    coarse, spacing = best_of(bounds.mean(), 0.5 * (bounds[1] - bounds[0]))
    fine, _ = best_of(coarse, 2.0 * spacing)
    return jnp.exp(jnp.clip(fine, bounds[0], bounds[1]))
