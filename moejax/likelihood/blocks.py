"""Samples in blocks, and sums over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.environment import runs_on_cpu
from moejax.model.mixture import with_stand_ins
from moejax.model.sums import PART_SIZE, in_parts, num_used_parts, sum_over_parts

ACCELERATOR_BLOCK_SIZE = 65536
"""Samples in a block on a GPU or TPU, where each block costs a kernel launch."""


class SampleBlocks(NamedTuple):
    """A weighted sample, cut into b blocks of B."""

    design: Float[jax.Array, "b D B"]
    """(b, D, B): x transposed, with a last row of ones for intercepts; where the weight is zero, a copy of a used sample."""
    y: Float[jax.Array, "b *m B"]
    """(b, B), or (b, m, B); where the weight is zero, a copy of a used sample's."""
    weights: Float[jax.Array, "b B"]
    """(b, B)"""
    num_used: Int[jax.Array, ""]
    """() int32: blocks up to the last that has a positive weight."""


def sample_blocks(
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n *m"],
    weights: Float[jax.Array, " n"],
    *,
    fit_intercept: bool,
    block_size: int | None = None,
) -> SampleBlocks:
    """Cut x (n, d), y (n,) or (n, m), weights (n,) into blocks; None takes the device's block size.

    Samples of weight zero, and those that fill the last block, become copies of a used one (`mixture.with_stand_ins`).
    """
    if block_size is None:
        block_size = PART_SIZE if runs_on_cpu() else ACCELERATOR_BLOCK_SIZE
    block_size = max(min(block_size, x.shape[0]), 1)
    # whole blocks first, so that rows which fill the last one become copies too
    x, y, weights = (in_parts(a, block_size).reshape(-1, *a.shape[1:]) for a in (x, y, weights))
    x, y = with_stand_ins(weights, x, y)
    design = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) if fit_intercept else x
    design, y, weights = (in_parts(a, block_size) for a in (design, y, weights))
    return SampleBlocks(design.transpose(0, 2, 1), y.swapaxes(1, -1), weights, num_used_parts(weights))


class SampleScale(NamedTuple):
    """The size of a sample of weights w."""

    mean_weight: Float[jax.Array, ""]
    """() sum w^2 / sum w: the mean of the weights, weighted by themselves."""
    effective: Float[jax.Array, ""]
    """() (sum w)^2 / sum w^2, the effective number of samples; it does not depend on the scale of the weights (Kish 1965)."""

    @property
    def unit(self) -> Float[jax.Array, ""]:
        """() nats that count as one sample's: 1, or less if the weights are not counts and have a mean below 1."""
        return jnp.minimum(self.mean_weight, 1.0)

    @property
    def num_samples(self) -> Float[jax.Array, ""]:
        """() number of samples, where a weight above 1 counts as a number of equal rows."""
        return self.effective * jnp.maximum(self.mean_weight, 1.0)


def sample_scale(weights: Float[jax.Array, " n"]) -> SampleScale:
    """The scale of weights (n,), at least one of which is positive."""
    total, squares = weights.sum(), jnp.sum(weights**2)
    return SampleScale(squares / total, total**2 / squares)


def sum_over_blocks(sums_of: Callable[..., Any], blocks: SampleBlocks) -> Any:
    """The sum over the used blocks of `sums_of(design (D, B), y (B,), weights (B,))`, a pytree."""
    return sum_over_parts(sums_of, (blocks.design, blocks.y, blocks.weights), blocks.num_used)
