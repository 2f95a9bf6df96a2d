r"""Cross-moments of transformed labels with the score tensors of a standard normal input; no array has d^3 entries.

    S_2(x) = x x' - I,   S_3(x) = x(x)x(x)x - sym_3(x (x) I),   S_4(x) = x^{(x)4} - sym_6(x(x)x(x)I) + sym_3(I(x)I).

Contracted with a whitening W (d, k), with p = W'x and M = W'W, the third and fourth have k^3 and k^4 entries:

    S_3(W,W,W) = p(x)p(x)p - sym_3(p (x) M),   S_4(W,W,W,W) = p^{(x)4} - sym_6(p(x)p(x)M) + sym_3(M(x)M).

Every moment is a weighted sum over samples divided by the sum of the weights: sums over chunks, devices and machines
add up (`moejax.model.sums`).
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.model.sums import in_parts, natural_part_size, num_used_parts, sum_over_parts


class RawMoments(NamedTuple):
    """Weighted sums over samples; adding two of them merges two parts of a data set."""

    total_weight: Float[jax.Array, ""]
    """()"""
    zeroth: Float[jax.Array, ""]
    """() sum_j w_j l_j."""
    powers: tuple[jax.Array, ...]
    """sum_j w_j l_j p_j^{(x) r} for some orders r, each (k,) * r."""


def power_sums(
    points: Float[jax.Array, "n k"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None,
    orders: tuple[int, ...],
) -> RawMoments:
    """Weighted sums of labels times powers of the points.

    Args:
        points: (n, k), x itself or W'x.
        labels: (n,) transformed labels l(y).
        weights: (n,) or None.
        orders: which powers, 1 to 4.
    """
    chex.assert_rank([points, labels], [2, 1])
    n, k = points.shape
    weighted = labels if weights is None else jnp.where(weights > 0, labels * weights, 0)
    points = points if weights is None else jnp.where(weights[:, None] > 0, points, 0)
    rows = points.T  # with samples last, products of rows are vectorised
    pairs = (rows[:, None] * rows[None]).reshape(k * k, n) if max(orders) > 2 else rows

    def power_sum(order: int) -> jax.Array:
        if order == 1:
            return rows @ weighted
        left = rows if order == 2 else pairs
        right = pairs if order == 4 else rows
        return ((weighted[None] * right) @ left.T).reshape((k,) * order)

    total = jnp.asarray(n, points.dtype) if weights is None else weights.sum()
    return RawMoments(total, weighted.sum(), tuple(power_sum(order) for order in orders))


def _streamed_power_sums(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None,
    whitening: Float[jax.Array, "d k"] | None,
    orders: tuple[int, ...],
    chunk_size: int | None,
) -> RawMoments:
    chex.assert_equal_shape_prefix([x, labels], 1)
    part_size = natural_part_size(x.shape[0]) if chunk_size is None else min(chunk_size, x.shape[0])
    if weights is None:
        weights = jnp.ones(x.shape[0], x.dtype)  # so that the padding of the last chunk has weight zero

    def sums_of(x: jax.Array, labels: jax.Array, weights: jax.Array) -> RawMoments:
        points = x if whitening is None else (whitening.T @ x.T).T
        return power_sums(points, labels, weights, orders)

    parts = in_parts((x, labels, weights), part_size)
    return sum_over_parts(sums_of, parts, num_used_parts(parts[2]))


def symmetrised_product(
    vector_or_matrix: Float[jax.Array, "k ..."], metric: Float[jax.Array, "k k"]
) -> Float[jax.Array, "k k k ..."]:
    """The sum over distinct placements of the indices of v (x) M or B (x) M (M symmetric; B = M counts each once)."""
    if vector_or_matrix.ndim == 1:
        first = jnp.einsum("a,bc->abc", vector_or_matrix, metric)
        return first + first.transpose(1, 0, 2) + first.transpose(1, 2, 0)

    def half(left: jax.Array, right: jax.Array) -> jax.Array:
        one = jnp.einsum("ab,cd->abcd", left, right)
        return one + one.transpose(0, 2, 1, 3) + one.transpose(0, 3, 2, 1)

    if vector_or_matrix is metric:
        return half(metric, metric)
    return half(vector_or_matrix, metric) + half(metric, vector_or_matrix)


def first_moment(
    x: Float[jax.Array, "n d"], labels: Float[jax.Array, " n"], weights: Float[jax.Array, " n"] | None
) -> Float[jax.Array, " d"]:
    """mean[l S_1(x)] = mean[l x], (d,): the first cross-moment, from x (n, d), labels (n,) and weights (n,)."""
    if weights is None:
        return labels @ x / x.shape[0]
    kept = weights > 0
    return jnp.where(kept, labels * weights, 0) @ jnp.where(kept[:, None], x, 0) / weights.sum()


def second_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    chunk_size: int | None = None,
) -> Float[jax.Array, "d d"]:
    """T2 = mean[l S_2(x)], the (d, d) second cross-moment.

    Args:
        x: (n, d) inputs, standard normal.
        labels: (n,) order-2 transformed labels.
        weights: (n,) sample weights, zero for padding; None for ones.
        chunk_size: stream over chunks of that many samples; None lets the device choose.
    """
    sums = _streamed_power_sums(x, labels, weights, None, (2,), chunk_size)
    moment = (sums.powers[0] - sums.zeroth * jnp.eye(x.shape[1], dtype=x.dtype)) / sums.total_weight
    return 0.5 * (moment + moment.T)


def whitened_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    whitening: Float[jax.Array, "d k"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    order: int,
    chunk_size: int | None = None,
) -> Float[jax.Array, "k k k ..."]:
    """T_m(W, .., W) = mean[l S_m(W, .., W)], a (k,) * m tensor, m = 3 or 4, in O(n (d k + k^m)).

    Args:
        x: (n, d) inputs, standard normal.
        labels: (n,) order-m transformed labels.
        whitening: (d, k) W.
        weights: (n,) sample weights, zero for padding; None for ones.
        order: m, 3 or 4.
        chunk_size: stream over chunks of that many samples; None lets the device choose.
    """
    chex.assert_rank(whitening, 2)
    metric = whitening.T @ whitening
    orders = (1, 3) if order == 3 else (2, 4)
    sums = _streamed_power_sums(x, labels, weights, whitening, orders, chunk_size)
    low, high = sums.powers
    moment = high - symmetrised_product(low, metric)
    if order == 4:
        moment = moment + sums.zeroth * symmetrised_product(metric, metric)
    return moment / sums.total_weight
