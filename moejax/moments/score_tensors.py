r"""Cross-moments of transformed labels with the score tensors of any input density, by automatic differentiation.

    S_m(x) = (-1)^m grad^m p(x) / p(x),   S_0 = 1,   S_{m+1} = -grad S_m - S_m (x) grad log p

(Janzamin, Sedghi, Anandkumar 2014, "Score function features for discriminative learning"), so that E[f(x) S_m(x)] = E[grad^m f(x)]
if f p and its derivatives vanish at infinity. For the standard normal density these are the Hermite tensors of `cross_moments`.

The tensors are never formed: along the columns of W (d, k), S_m(x)(W, .., W) is the m-th derivative at u = 0 of p(x + W u) / p(x)
in the k variables u, and the last derivative is taken of the sum over samples, one direction after another. A sample therefore
holds k^(m-1) numbers at a time, and a block of samples is sized to that.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model.inputs import LogDensity
from moejax.model.sums import in_parts, sum_over_parts

_BLOCK_NUMBERS = 2**20
"""Most numbers (samples times tangents times inputs) that a block of samples may hold."""


class AffineLogDensity:
    """log p of z = (x - mean) @ matrix, up to a constant, from log p of x.

    Two instances with equal arrays are equal. JAX compares and hashes static arguments: each new closure over arrays would
    compile its program again.
    """

    def __init__(
        self, log_density: LogDensity, mean: Float[np.ndarray, " d"], matrix: Float[np.ndarray, "d r"]
    ):
        """Args are mean (d,) and matrix (d, r), as `fit` whitens; if r < d, x is confined to the r directions that are kept."""
        self.log_density = log_density
        self.mean = np.asarray(mean, np.float64)
        self.inverse = np.linalg.pinv(np.asarray(matrix, np.float64))

    def __call__(self, z: Float[jax.Array, " r"]) -> Float[jax.Array, ""]:
        """() log density of z (r,), up to a constant."""
        mean, inverse = (jnp.asarray(a, z.dtype) for a in (self.mean, self.inverse))
        return self.log_density(mean + z @ inverse)

    def _parts(self) -> tuple[LogDensity, bytes, bytes]:
        return self.log_density, self.mean.tobytes(), self.inverse.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AffineLogDensity) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())


class _ScoreSums(NamedTuple):
    total_weight: Float[jax.Array, ""]
    """()"""
    moment: Float[jax.Array, " ..."]
    """(k,) * m: sum_j w_j l_j S_m(x_j)(W, .., W)."""


def score_tensor_sum(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    directions: Float[jax.Array, "d k"] | None,
    *,
    order: int,
    log_density: LogDensity,
) -> Float[jax.Array, " ..."]:
    """sum_j l_j S_m(x_j)(W, .., W), a (k,) * m tensor.

    Args:
        x: (n, d) inputs.
        labels: (n,) l_j.
        directions: (d, k) W; None for the identity.
        order: m >= 1.
        log_density: x (d,) -> ().
    """
    size = x.shape[1] if directions is None else directions.shape[1]
    origin = jnp.zeros(size, x.dtype)

    def slopes(u: jax.Array) -> jax.Array:
        """(n, k): the gradient of each sample's log density in u."""
        step = u if directions is None else directions @ u
        gradient = jax.vmap(jax.grad(log_density))(x + step[None])
        return gradient if directions is None else gradient @ directions

    def scores(u: jax.Array, order: int) -> tuple[jax.Array, jax.Array]:
        """S_order of each sample at x_j + W u, (n, k, .., k), and the slopes there."""
        if order == 1:
            slope = slopes(u)
            return -slope, slope

        def lower_scores(u: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            lower, slope = scores(u, order - 1)
            return lower, (lower, slope)

        derivative, (lower, slope) = jax.jacfwd(lower_scores, has_aux=True)(u)
        return -derivative - lower[..., None] * slope.reshape(-1, *(1,) * (order - 1), size), slope

    def weighted_scores(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sum_j l_j S_{m-1}(x_j), and sum_j l_j S_{m-1}(x_j) (x) slope."""
        lower, slope = scores(u, order - 1)
        return jnp.tensordot(labels, lower, 1), jnp.tensordot(lower, labels[:, None] * slope, ((0,), (0,)))

    if order == 1:
        return -labels @ slopes(origin)
    _, derivative, products = jax.linearize(weighted_scores, origin, has_aux=True)
    derivatives = jax.lax.map(derivative, jnp.eye(size, dtype=x.dtype))
    return -jnp.moveaxis(derivatives, 0, -1) - products


def _score_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    directions: Float[jax.Array, "d k"] | None,
    weights: Float[jax.Array, " n"] | None,
    *,
    order: int,
    log_density: LogDensity,
    chunk_size: int | None,
) -> Float[jax.Array, " ..."]:
    chex.assert_rank([x, labels], [2, 1])
    chex.assert_equal_shape_prefix([x, labels], 1)
    n, d = x.shape
    size = d if directions is None else directions.shape[1]
    block_size = int(np.clip(_BLOCK_NUMBERS // (d * size ** (order - 1)), 16, 4096))
    block_size = min(n, block_size if chunk_size is None else min(block_size, chunk_size))
    # padding becomes a copy of a row that has weight: the density may have no derivatives at other points
    stand_in = x[0] if weights is None else x[jnp.argmax(weights > 0)]
    weights = jnp.ones(n, x.dtype) if weights is None else weights

    def sums_of(x: jax.Array, labels: jax.Array, weights: jax.Array) -> _ScoreSums:
        kept = weights > 0
        x, labels = jnp.where(kept[:, None], x, stand_in[None]), jnp.where(kept, labels * weights, 0)
        moment = score_tensor_sum(x, labels, directions, order=order, log_density=log_density)
        return _ScoreSums(weights.sum(), moment)

    sums = sum_over_parts(sums_of, in_parts((x, labels, weights), block_size))
    return sums.moment / sums.total_weight


def score_first_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    log_density: LogDensity,
    chunk_size: int | None = None,
) -> Float[jax.Array, " d"]:
    """mean[l S_1(x)] = -mean[l grad log p(x)], (d,). Arguments as in `score_second_moment`."""
    return _score_moment(x, labels, None, weights, order=1, log_density=log_density, chunk_size=chunk_size)


def score_second_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    log_density: LogDensity,
    chunk_size: int | None = None,
) -> Float[jax.Array, "d d"]:
    """T2 = mean[l S_2(x)] = mean[l (grad log p grad log p' + hess log p)], (d, d).

    Args:
        x: (n, d) inputs of that density.
        labels: (n,) order-2 transformed labels.
        weights: (n,) sample weights, zero for padding; None for ones.
        log_density: x (d,) -> () log p(x), up to a constant; for whitened inputs, an `AffineLogDensity`.
        chunk_size: at most that many samples at once; None takes as many as a block's memory allows.

    Returns:
        The moment. It estimates E[grad^2 E[l | x]] if p and its derivatives vanish at the ends of the support: for a uniform
        density they do not, and the score tensors carry no information.
    """
    moment = _score_moment(x, labels, None, weights, order=2, log_density=log_density, chunk_size=chunk_size)
    return 0.5 * (moment + moment.T)


def score_whitened_moment(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    whitening: Float[jax.Array, "d k"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    order: int,
    log_density: LogDensity,
    chunk_size: int | None = None,
) -> Float[jax.Array, "k k k ..."]:
    """T_m(W, .., W) = mean[l S_m(x)(W, .., W)], a (k,) * m tensor, m = 3 or 4; no sample holds more than k^(m-1) numbers.

    Args:
        x: (n, d) inputs of that density.
        labels: (n,) order-m transformed labels.
        whitening: (d, k) W.
        weights: (n,) sample weights, zero for padding; None for ones.
        order: m, 3 or 4.
        log_density: x (d,) -> () log p(x), up to a constant.
        chunk_size: at most that many samples at once; None takes as many as a block's memory allows.
    """
    chex.assert_rank(whitening, 2)
    return _score_moment(
        x, labels, whitening, weights, order=order, log_density=log_density, chunk_size=chunk_size
    )
