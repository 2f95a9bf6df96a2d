"""The noise level from the labels alone, for the label transforms when sigma is unknown."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax.activations import ScalarFunction, apply_activation
from moejax.gaussian import gaussian_grid

NUM_BINS = 8192
NUM_LEVELS = 48


def estimate_noise_std(
    y: jax.Array,
    weights: jax.Array,
    *,
    fn: ScalarFunction,
    smallest: float,
    largest: float,
    num_nodes: int = 16385,
) -> jax.Array:
    """sigma by marginal likelihood: the maximiser of sum_j w_j log f_sigma(y_j), f_sigma the density of g(Z) + sigma N.

    Labels and g(Z) are put into bins by linear weighting, so that every density of the search is one multiplication in Fourier
    space. The search is a geometric grid of sigma, refined once around its best point and once by a parabola.

    Args:
        y: (n,) labels.
        weights: (n,) sample weights.
        fn: g, of experts with ||a|| = 1 and without bias.
        smallest, largest: the range of sigma that is searched, in units of y.
        num_nodes: of the quadrature over z.

    Returns:
        () sigma in [smallest, largest].
    """
    dtype = y.dtype
    kept = weights > 0
    grid = gaussian_grid(num_nodes, dtype=dtype)
    noiseless = apply_activation(fn, grid.nodes)
    # labels out of reach of every sigma would all have density 0: as far out as the largest sigma explains is far enough
    y = jnp.clip(y, noiseless.min() - 3.0 * largest, noiseless.max() + 3.0 * largest)
    low = jnp.min(y, where=kept, initial=jnp.inf)
    high = jnp.max(y, where=kept, initial=-jnp.inf)
    margin = 0.25 * (high - low) + 4.0 * smallest
    low, high = low - margin, high + margin
    width = (high - low) / NUM_BINS

    def binned(values: jax.Array, mass: jax.Array) -> jax.Array:
        position = (values - low) / width
        inside = (position >= 0) & (position < NUM_BINS - 1)
        left = jnp.where(inside, jnp.floor(position), 0.0).astype(jnp.int32)
        fraction = jnp.where(inside, position - left.astype(dtype), 0.0)
        mass = jnp.where(inside, mass, 0.0)
        empty = jnp.zeros(NUM_BINS, dtype)
        return empty.at[left].add(mass * (1.0 - fraction)).at[left + 1].add(mass * fraction)

    binned_signal = binned(noiseless, grid.weights)
    signal = jnp.fft.rfft(binned_signal)
    counts = binned(y, jnp.where(kept, weights, 0.0))
    frequency = 2.0 * jnp.pi * jnp.fft.rfftfreq(NUM_BINS).astype(dtype) / width

    floor = (
        10 * jnp.finfo(dtype).eps * binned_signal.max()
    )  # the rounding of the transform; one for all sigma

    def log_likelihood(log_noise_std: jax.Array) -> jax.Array:
        smooth = jnp.exp(-0.5 * (jnp.exp(log_noise_std) * frequency) ** 2).astype(signal.dtype)
        density = jnp.fft.irfft(signal * smooth, NUM_BINS)
        return counts @ jnp.log(jnp.maximum(density, floor))

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
