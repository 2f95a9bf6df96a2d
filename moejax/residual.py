r"""Residual passes: the moment estimate made consistent where the gates are not orthogonal to the experts.

Where they are not, E[l(y) S_m(x)] is not sum_i E[P_i] a_i^{(x) m}, and no sample size removes the difference. A pass takes the gates P_i
that gating EM finds with the experts a_i of the pass before, and decomposes

    T_m = sum_i p_i a_i^{(x) m} + mean[ (l(y) - sum_i P_i(x) h_i(a_i . x)) S_m(x) ],   h_i(z) = E[l(Y) | a_i . x = z],

p_i the mean of P_i: the moments that are known by then are replaced by what they should be, and only what the labels say beyond is
measured. With the true experts and gates the mean is that of a quantity whose conditional expectation given x is zero, so
the truth is a fixed point whatever the gates, the distribution of the inputs, and the S_m used; and with most of the labels' variance
taken away, the moments are less noisy also where the plain ones are consistent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.activations import ScalarFunction, apply_activation
from moejax.em import RIDGE, NoiseModel, gating_em
from moejax.gaussian import HALF_WIDTH, gaussian_grid
from moejax.label_transforms import LabelTransform
from moejax.model import MoEParams, gate_logits
from moejax.score_tensors import LogDensity
from moejax.spectral import (
    SpectralEstimate,
    SpectralLabels,
    SpectralTransforms,
    TensorPart,
    estimate_from_labels,
)

NUM_NODES = 8193
"""Nodes of the tables of h over +-8.5; linear interpolation between them errs by less than 1e-4 of h'' / 12 on average."""
NUM_NOISE_NODES = 41
GATING_STEPS = 30
GATING_TOLERANCE = 1e-7
"""EM steps for the gates of one pass, and the gain in nats per sample below which they stop."""


class ConditionalMeans(NamedTuple):
    """Tables of h_i(z) = E[l(g(z) + sigma_i N)] over a uniform grid of z, for some label transforms l and every expert."""

    start: jax.Array
    """() smallest z."""
    step: jax.Array
    """() spacing."""
    values: jax.Array
    """(t, k, num_nodes); linear between the nodes, constant beyond them."""

    def __call__(self, z: jax.Array) -> jax.Array:
        """(t, k, n) from the experts' predictors z (k, n)."""
        t, k, num_nodes = self.values.shape
        position = jnp.clip((z - self.start) / self.step, 0, num_nodes - 1)
        left = jnp.clip(jnp.floor(position), 0, num_nodes - 2).astype(jnp.int32)
        fraction = position - left.astype(position.dtype)
        index = left + num_nodes * jnp.arange(k, dtype=jnp.int32)[:, None]
        flat = self.values.reshape(t, k * num_nodes)
        at_left, at_right = (jnp.take(flat, i, axis=1, mode="clip") for i in (index, index + 1))
        return at_left + fraction[None] * (at_right - at_left)


def conditional_means(
    transforms: tuple[LabelTransform, ...], noise_std: jax.Array, *, fn: ScalarFunction
) -> ConditionalMeans:
    """h_i(z) = E[l(g(z) + sigma_i N)] of the transforms as they are applied, by quadrature over the noise.

    Args:
        transforms: t of them.
        noise_std: (k,) sigma_i, traced or not; not the one the transforms were made for where that is not the true one.
        fn: g.
    """
    dtype = noise_std.dtype
    nodes = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, NUM_NODES, dtype=dtype)
    noise = gaussian_grid(NUM_NOISE_NODES, half_width=7.0, dtype=dtype)
    labels = apply_activation(fn, nodes)

    def at_noise(noise_std: jax.Array) -> jax.Array:
        y = labels[:, None] + noise_std * noise.nodes[None]
        return jnp.stack([transform(y) @ noise.weights for transform in transforms])

    values = jax.lax.map(at_noise, noise_std).transpose(1, 0, 2)
    return ConditionalMeans(nodes[0], nodes[1] - nodes[0], values)


def residual_labels(
    params: MoEParams,
    x: jax.Array,
    y: jax.Array,
    transforms: SpectralTransforms,
    scale: jax.Array,
    *,
    fn: ScalarFunction,
    chunk_size: int | None = None,
) -> SpectralLabels:
    """l(y) - scale * sum_i P_i(x) h_i(a_i . x + b_i) for every transform l of a spectral estimate.

    Args:
        params: of the mixture whose expectation is taken away; its noise_std (k,) is that of the h_i.
        x: (n, d).
        y: (n,).
        transforms: l.
        scale: () 1, or 0 for the plain labels.
        fn: g.
        chunk_size: samples taken at once; None takes all.
    """
    used = tuple(transform for transform in transforms if transform is not None)
    means = conditional_means(used, params.noise_std, fn=fn)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = chunk
        gates = jax.nn.softmax(gate_logits(params, x).T, axis=0)
        expected = jnp.sum(gates[None] * means(params.experts @ x.T + params.expert_bias[:, None]), axis=1)
        return jnp.stack([transform(y) for transform in used]) - scale * expected

    n = x.shape[0]
    if chunk_size is None or chunk_size >= n:
        labels = of_chunk((x, y))
    else:
        num_chunks = -(-n // chunk_size)
        padding = num_chunks * chunk_size - n
        chunks = (
            jnp.pad(x, ((0, padding), (0, 0))).reshape(num_chunks, chunk_size, -1),
            jnp.pad(y, (0, padding)).reshape(num_chunks, chunk_size),
        )
        labels = jax.lax.map(of_chunk, chunks).transpose(1, 0, 2).reshape(len(used), -1)[:, :n]
    return SpectralLabels(labels[0], labels[1], labels[2] if len(used) == 3 else None)
