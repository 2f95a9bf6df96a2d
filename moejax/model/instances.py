"""Random mixtures: the truths of recovery trials."""

from __future__ import annotations

from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.model.gaussian import Array, standard_normal
from moejax.model.mixture import MoEParams
from moejax.model.small_linear_algebra import cholesky, orthonormal_columns, unit_rows


class InstanceScales(NamedTuple, Generic[Array]):
    """Scales and angles of a random instance; all traced."""

    noise_std: Float[Array, ""]
    """() sigma, the same for every expert."""
    gating_norm: Float[Array, ""]
    """() norm of each gate but the last, which is zero."""
    gating_angle: Float[Array, ""]
    """() angle in degrees between each gate and the experts' span."""
    expert_correlation: Float[Array, ""]
    """() cosine between every two experts, in (-1/(k-1), 1)."""
    expert_norms: Float[Array, " k"]
    """(k,)"""
    expert_bias: Float[Array, ""] | float = 0.0
    """() intercept of every expert."""
    gating_bias: Float[Array, ""] | float = 0.0
    """() intercept of the first gate; those of the others fall to the last one's zero in equal steps."""


def random_params(key: jax.Array, scales: InstanceScales, dim: int) -> MoEParams:
    """A random mixture: a uniformly rotated frame of experts, and gates in random directions at a given angle.

    The experts are R C^{1/2} with R (d, k) orthonormal, uniform, and C their correlation matrix, times their norms. Each gate is
    norm * (cos(angle) u + sin(angle) v), u uniform on the sphere of the experts' span and v on that of its complement.
    With dim = num_experts the complement is empty and the gates lie in the span at any angle.
    """
    num_experts = scales.expert_norms.shape[0]
    dtype = scales.expert_norms.dtype
    draws = standard_normal(
        key, (num_experts, 2 * dim + num_experts), dtype
    )  # one call: each costs compile time
    frame = orthonormal_columns(draws[:, :dim].T)
    correlation = scales.expert_correlation + (1.0 - scales.expert_correlation) * jnp.eye(
        num_experts, dtype=dtype
    )
    experts = scales.expert_norms[:, None] * (cholesky(correlation) @ frame.T)
    in_span = draws[:, 2 * dim :] @ frame.T
    outside = draws[:, dim : 2 * dim]
    outside = outside - (outside @ frame) @ frame.T
    angle = jnp.deg2rad(scales.gating_angle) if dim > num_experts else jnp.zeros((), dtype)
    directions = jnp.cos(angle) * unit_rows(in_span) + jnp.sin(angle) * unit_rows(outside)
    gating = scales.gating_norm * directions.at[-1].set(0.0)
    zeros = jnp.zeros(num_experts, dtype)
    falling = jnp.arange(num_experts - 1, -1, -1, dtype=dtype) / max(num_experts - 1, 1)
    noise_std = jnp.full(num_experts, scales.noise_std, dtype)
    return MoEParams(experts, gating, noise_std, zeros + scales.expert_bias, scales.gating_bias * falling)
