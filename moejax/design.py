r"""What EM and the polish share: linear predictors of a mixture, samples in blocks, and sums over them.

A mixture has 2 k - 1 linear predictors: u_i = a_i . x + b_i of the experts, v_i = w_i . x + c_i of the gates but the last, which is
zero. Their coefficients are the rows of one (2k - 1, D) matrix, D = d or, with fitted intercepts, d + 1. With m outputs k m
predictors are of the experts, all of an expert's together, and there are (k (m + 1) - 1, D) rows.

Samples lie in blocks of (D, B) with the samples last, so that reductions over experts are vectorised and a block's products
stay in cache. Only blocks that have a sample of positive weight are visited: padding costs memory, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.model import MoEParams, with_stand_ins

BLOCK_SIZE = 2048
"""Samples in a block on a CPU: pairs of 10 inputs and two dozen coefficients then fill its second-level cache."""
ACCELERATOR_BLOCK_SIZE = 65536
"""On a GPU or TPU, where a block is a kernel launch."""


class SampleBlocks(NamedTuple):
    """A weighted sample, cut into b blocks of B."""

    design: jax.Array
    """(b, D, B): x transposed, with a last row of ones where there are intercepts; a used sample's where the weight is zero."""
    y: jax.Array
    """(b, B), or (b, m, B); a used sample's where the weight is zero."""
    weights: jax.Array
    """(b, B)"""
    num_used: jax.Array
    """() int32: blocks up to the last that has a positive weight."""


def sample_blocks(
    x: jax.Array, y: jax.Array, weights: jax.Array, *, fit_intercept: bool, block_size: int | None = None
) -> SampleBlocks:
    """Cut x (n, d), y (n,) or (n, m), weights (n,) into blocks; None takes the device's block size.

    Samples of weight zero, and those that fill the last block, become copies of a used one (`model.with_stand_ins`).
    """
    if block_size is None:
        block_size = BLOCK_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK_SIZE
    n = x.shape[0]
    block_size = max(min(block_size, n), 1)
    num_blocks = -(-n // block_size)

    def filled_up(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, num_blocks * block_size - n)] + [(0, 0)] * (a.ndim - 1))

    def blocks(a: jax.Array) -> jax.Array:
        return a.reshape(num_blocks, block_size, *a.shape[1:])

    x, y, weights = filled_up(x), filled_up(y), filled_up(weights)
    x, y = with_stand_ins(weights, x, y)
    design = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) if fit_intercept else x
    in_block = blocks(weights > 0).any(axis=1)
    num_used = jnp.max(jnp.where(in_block, jnp.arange(1, num_blocks + 1, dtype=jnp.int32), 0))
    return SampleBlocks(
        blocks(design).transpose(0, 2, 1), blocks(y).swapaxes(1, -1), blocks(weights), num_used
    )


class SampleScale(NamedTuple):
    """What the weights w of a sample say of its size."""

    mean_weight: jax.Array
    """() sum w^2 / sum w, by weight."""
    effective: jax.Array
    """() (sum w)^2 / sum w^2 samples, whatever the scale of the weights (Kish 1965)."""

    @property
    def unit(self) -> jax.Array:
        """() nats that count as one sample's: 1, or less where weights are no counts but a share each."""
        return jnp.minimum(self.mean_weight, 1.0)

    @property
    def num_samples(self) -> jax.Array:
        """() samples, with a weight above 1 as a number of equal rows."""
        return self.effective * jnp.maximum(self.mean_weight, 1.0)


def sample_scale(weights: jax.Array) -> SampleScale:
    """The scale of weights (n,), of which one at least is positive."""
    total, squares = weights.sum(), jnp.sum(weights**2)
    return SampleScale(squares / total, total**2 / squares)


def sum_over_blocks(sums_of: Callable[..., Any], blocks: SampleBlocks) -> Any:
    """The sum over the used blocks of `sums_of(design (D, B), y (B,), weights (B,))`, a pytree."""

    def of_block(index: jax.Array | int) -> Any:
        return sums_of(blocks.design[index], blocks.y[index], blocks.weights[index])

    if blocks.y.shape[0] == 1:
        return of_block(0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_block, 0))
    return jax.lax.fori_loop(
        0, blocks.num_used, lambda index, total: jax.tree.map(jnp.add, total, of_block(index)), zeros
    )


class Predictors(NamedTuple):
    """The 2 k - 1 linear predictors u_1..u_k, v_1..v_{k-1} of a mixture: rows @ design + offsets."""

    rows: jax.Array
    """(2k - 1, D)"""
    offsets: jax.Array
    """(2k - 1,): biases that are not fitted; zero where they are in the rows."""

    def __call__(self, design: jax.Array) -> jax.Array:
        """(2k - 1, B) from a (D, B) block."""
        return self.rows @ design + self.offsets[:, None]


def predictors_of(params: MoEParams, *, fit_intercept: bool) -> Predictors:
    """The predictors of a mixture whose last gate is zero."""
    rows = jnp.concatenate([params.experts.reshape(-1, params.experts.shape[-1]), params.gating[:-1]])
    biases = jnp.concatenate([params.expert_bias.reshape(-1), params.gating_bias[:-1]])
    if fit_intercept:
        return Predictors(jnp.concatenate([rows, biases[:, None]], axis=1), jnp.zeros_like(biases))
    return Predictors(rows, biases)


def params_of(predictors: Predictors, noise_std: jax.Array, *, fit_intercept: bool) -> MoEParams:
    """The inverse of `predictors_of`."""
    shape, size = noise_std.shape, noise_std.size
    rows, biases = predictors
    if fit_intercept:
        rows, biases = rows[:, :-1], rows[:, -1]
    gating, gating_bias = (jnp.concatenate([a[size:], jnp.zeros_like(a[:1])]) for a in (rows, biases))
    experts, expert_bias = (a[:size].reshape(*shape, *a.shape[1:]) for a in (rows, biases))
    return MoEParams(experts, gating, noise_std, expert_bias, gating_bias)


def weighted_gram(design: jax.Array, coefficients: jax.Array) -> jax.Array:
    """(p, D, D): sum_j coefficients[p, j] design[:, j] design[:, j]', from (D, n) and (p, n)."""
    size = design.shape[0]
    rows, columns = np.triu_indices(size)
    # coefficients first: with many mixtures side by side this stays one matrix product
    sums = coefficients @ (design[rows] * design[columns]).T
    return sums[:, _index_of_pair(size)]


def block_matrix(blocks: jax.Array) -> jax.Array:
    """(B D, B D) symmetric matrix from the (B (B + 1) / 2, D, D) blocks of its upper triangle."""
    count = int((np.sqrt(8 * blocks.shape[0] + 1) - 1) / 2)
    size = blocks.shape[1]
    return blocks[_index_of_pair(count)].transpose(0, 2, 1, 3).reshape(count * size, count * size)


def _index_of_pair(size: int) -> np.ndarray:
    """(size, size): where an unordered pair stands in `np.triu_indices`."""
    rows, columns = np.triu_indices(size)
    index = np.zeros((size, size), np.int32)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    return index


def gate_centring(num_experts: int, dtype: jnp.dtype) -> jax.Array:
    """(k - 1, k - 1): I - 11'/k; the quadratic form of the free gates that is sum_i ||w_i - mean w||^2."""
    return jnp.asarray(np.eye(num_experts - 1) - 1.0 / num_experts, dtype)


def gate_penalty(gates: jax.Array) -> jax.Array:
    """(): sum_i ||w_i - mean w||^2 / 2 of the (k - 1, D) free gates and the last, which is zero."""
    return 0.5 * jnp.sum(gates * (gate_centring(gates.shape[0] + 1, gates.dtype) @ gates))
