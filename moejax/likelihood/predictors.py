r"""The linear predictors of a mixture, which EM and the polish share.

A mixture has 2 k - 1 linear predictors: u_i = a_i . x + b_i of the experts, v_i = w_i . x + c_i of the gates but the last, which is
zero. Their coefficients are the rows of one (2k - 1, D) matrix, D = d or, with fitted intercepts, d + 1. With m outputs,
the experts have k m predictors, those of one expert next to each other, and there are (k (m + 1) - 1, D) rows.

Samples lie in blocks of (D, B) with the samples last, so that reductions over experts are vectorised and a block's products
stay in cache. Only blocks that have a sample of positive weight are visited: padding costs memory, not time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.likelihood.free_columns import (
    FreeColumns,
    expert_columns,
    free_positions,
    gate_columns,
    num_coefficients,
)
from moejax.model.mixture import MoEParams, NoiseModel


class Predictors(NamedTuple):
    """The 2 k - 1 linear predictors u_1..u_k, v_1..v_{k-1} of a mixture: rows @ design + offsets."""

    rows: Float[jax.Array, " 2*k-1 D"]
    """(2k - 1, D)"""
    offsets: Float[jax.Array, " 2*k-1"]
    """(2k - 1,): biases that are not fitted; zero if the rows contain the biases."""

    def __call__(self, design: Float[jax.Array, "D B"]) -> Float[jax.Array, "q B"]:
        """(2k - 1, B) from a (D, B) block."""
        return self.rows @ design + self.offsets[:, None]


def predictors_of(params: MoEParams, *, fit_intercept: bool) -> Predictors:
    """The predictors of a mixture whose last gate is zero."""
    rows = jnp.concatenate([params.experts.reshape(-1, params.experts.shape[-1]), params.gating[:-1]])
    biases = jnp.concatenate([params.expert_bias.reshape(-1), params.gating_bias[:-1]])
    if fit_intercept:
        return Predictors(jnp.concatenate([rows, biases[:, None]], axis=1), jnp.zeros_like(biases))
    return Predictors(rows, biases)


def params_of(
    predictors: Predictors, noise_std: Float[jax.Array, " k *m"], *, fit_intercept: bool
) -> MoEParams:
    """The inverse of `predictors_of`."""
    shape, size = noise_std.shape, noise_std.size
    rows, biases = predictors
    if fit_intercept:
        rows, biases = rows[:, :-1], rows[:, -1]
    gating, gating_bias = (jnp.concatenate([a[size:], jnp.zeros_like(a[:1])]) for a in (rows, biases))
    experts, expert_bias = (a[:size].reshape(*shape, *a.shape[1:]) for a in (rows, biases))
    return MoEParams(experts, gating, noise_std, expert_bias, gating_bias)


def weighted_gram(
    design: Float[jax.Array, "D n"], coefficients: Float[jax.Array, "p n"]
) -> Float[jax.Array, "p D D"]:
    """(p, D, D): sum_j coefficients[p, j] design[:, j] design[:, j]', from (D, n) and (p, n)."""
    size = design.shape[0]
    rows, columns = np.triu_indices(size)
    # coefficients first: with many mixtures side by side this stays one matrix product
    sums = coefficients @ (design[rows] * design[columns]).T
    return sums[:, _index_of_pair(size)]


def block_matrix(blocks: Float[jax.Array, "pairs D D"]) -> Float[jax.Array, "BD BD"]:
    """(B D, B D) symmetric matrix from the (B (B + 1) / 2, D, D) blocks of its upper triangle."""
    count = int((np.sqrt(8 * blocks.shape[0] + 1) - 1) / 2)
    size = blocks.shape[1]
    return blocks[_index_of_pair(count)].transpose(0, 2, 1, 3).reshape(count * size, count * size)


def _index_of_pair(size: int) -> np.ndarray:
    """(size, size): the index of an unordered pair in `np.triu_indices`."""
    rows, columns = np.triu_indices(size)
    index = np.zeros((size, size), np.int32)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    return index


def gate_centring(num_experts: int, dtype: jnp.dtype) -> Float[jax.Array, "{num_experts}-1 {num_experts}-1"]:
    """(k - 1, k - 1): I - 11'/k, the matrix of sum_i ||w_i - mean w||^2 as a quadratic form of the free gates."""
    return jnp.asarray(np.eye(num_experts - 1) - 1.0 / num_experts, dtype)


def gate_penalty(gates: Float[jax.Array, "free_gates D"]) -> Float[jax.Array, ""]:
    """(): sum_i ||w_i - mean w||^2 / 2 of the (k - 1, D) free gates and the last, which is zero."""
    return 0.5 * jnp.sum(gates * (gate_centring(gates.shape[0] + 1, gates.dtype) @ gates))


def num_noise_parameters(noise: NoiseModel, num_experts: int) -> int:
    """The number of free noise parameters of a noise model."""
    return {"known": 0, "shared": 1, "per_expert": num_experts}[noise]


def num_free_parameters(
    num_experts: int,
    dim: int,
    noise: NoiseModel,
    fit_intercept: bool,
    num_outputs: int = 1,
    columns: FreeColumns | None = None,
) -> int:
    """P: experts of each output, gates but one, biases, noise levels of each output; of free `columns` only, if given."""
    of_expert, of_gate = num_coefficients(dim, fit_intercept, columns)
    coefficients = num_outputs * num_experts * of_expert + (num_experts - 1) * of_gate
    return coefficients + num_outputs * num_noise_parameters(noise, num_experts)


def free_parameters(
    params: MoEParams, *, noise: NoiseModel, fit_intercept: bool, columns: FreeColumns | None = None
) -> Float[jax.Array, " P"]:
    """(P,): experts (k D), all gates but the last ((k - 1) D), log noise (0, 1 or k), D = d or d + 1 with biases.

    With `columns`, experts and gates have their own free columns only.
    """
    k, rows = params.noise_std.shape[0], predictors_of(params, fit_intercept=fit_intercept).rows
    log_noise = jnp.log(params.noise_std)[: num_noise_parameters(noise, k)]
    if columns is None:
        return jnp.concatenate([rows.reshape(-1), log_noise])
    experts, gates = expert_columns(rows[:k], columns), gate_columns(rows[k:], columns)
    return jnp.concatenate([experts.reshape(-1), gates.reshape(-1), log_noise])


def params_from_free(
    free: Float[jax.Array, " P"],
    like: MoEParams,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    columns: FreeColumns | None = None,
) -> MoEParams:
    """The inverse of `free_parameters`; parameters that are not free are taken from `like`."""
    rows, offsets = predictors_of(like, fit_intercept=fit_intercept)
    noise_std, num_free = like.noise_std, rows.size
    if columns is None:
        values = free[:num_free].reshape(rows.shape)
    else:
        places = free_positions(noise_std.shape[0], noise_std.shape[0], 0, columns)
        num_free = places.size
        values = rows.reshape(-1).at[places].set(free[:num_free]).reshape(rows.shape)
    if noise != "known":
        noise_std = jnp.broadcast_to(jnp.exp(free[num_free:]), noise_std.shape)
    return params_of(Predictors(values, offsets), noise_std, fit_intercept=fit_intercept)


def log_sum_and_shares(
    logits: Float[jax.Array, "k n"],
) -> tuple[Float[jax.Array, " n"], Float[jax.Array, "k n"]]:
    """(n,) log sum exp and (k, n) softmax over the rows of (k, n), with one exponential each."""
    largest = logits.max(axis=0)
    terms = jnp.exp(logits - largest[None])
    total = terms.sum(axis=0)
    return largest + jnp.log(total), terms / total[None]
