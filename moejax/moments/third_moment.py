r"""Experts from the third moment alone, for a g whose second moment shows nothing.

T_3 = mean[l(y) S_3(x)] is close to sum_i p_i a_i^{(x) 3} if c_3(l) = 1 and the gates are weak. It is not whitened, so no second
moment is needed: for sin(2 t), whose E[He_2(Z) | Y] is nearly constant, there is none. Two steps:

1. The span of the experts is that of the k leading left singular vectors of the d x d^2 unfolding of T_3. These are the leading
   eigenvectors of the Gram matrix sum_b T_3(I, e_b, I)^2, a sum over matrices that are computed one after the other from the data;
   T_3 is never formed. For many inputs, random directions u take the place of the e_b: one generic T_3(I, u, I) has the whole span.
2. The k x k x k tensor T_3(U, U, U) is decomposed by alternating least squares from random starts,

       X <- rows T(I, x_i, x_i) times the inverse of the matrix (x_i . x_j)^2,   normalised,

   each step the least-squares solution for one factor with the other two held; the start with the smallest residual is kept.
   The vectors need not be orthogonal.

With gates, E[l(y) S_3(x)] has terms with r < 3 experts and 3 - r gradients of P_i, with the factors c_r(l). They have expectation
zero if c_1 = c_2 = 0. Else these experts are a start, and not an estimate, unless the gates are weak.

Sources: J. Kruskal, Three-way arrays, 1977 (uniqueness); J. Carroll and J. Chang 1970, R. Harshman 1970 (alternating least
squares).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.model.gaussian import standard_normal
from moejax.model.small_linear_algebra import eigh, orthonormal_columns, solve_positive_definite, unit_rows
from moejax.moments.cross_moments import first_moment, second_moment, whitened_moment

NUM_TRIES = 20
NUM_STEPS = 60
"""Random starts, and steps of alternating least squares from each. Six in ten starts end at the experts of a tensor with little
noise, for k from 3 to 8."""
LAST_STEPS = 200
"""Further steps of the best: they converge slowly where two vectors have a small angle."""
DAMPING = 1e-6
"""Added to the diagonal of the normal equations, whose diagonal is 1, for starts in which two vectors meet."""
MOST_DIRECTIONS = 48
"""Contractions T_3(I, u, I) of the Gram matrix: all d unit vectors, or this many random directions if there are more inputs."""


class ThirdMomentEstimate(NamedTuple):
    """Experts from the third moment."""

    experts: Float[jax.Array, "k d"]
    """(k, d) unit rows."""
    mixing_weights: Float[jax.Array, " k"]
    """(k,) estimates of E[P_i], not negative; they need not sum to 1."""
    singular_values: Float[jax.Array, " d"]
    """(d,) of the unfolding, decreasing (relative to one another only, if the directions were random)."""
    residual: Float[jax.Array, ""]
    """() sum of squares of T_3(U, U, U) that the components leave, as a share of the whole."""


class Components(NamedTuple):
    """A symmetric tensor as a sum of few cubes, sum_i c_i v_i^{(x) 3}."""

    coefficients: Float[jax.Array, " k"]
    """(k,) c_i >= 0."""
    vectors: Float[jax.Array, "k k"]
    """(k, k) unit rows v_i."""
    residual: Float[jax.Array, ""]
    """() sum of squares of the rest."""


def num_contractions(dim: int) -> int:
    """The number of contractions T_3(I, u, I) that find the span of the experts among `dim` inputs."""
    return min(dim, MOST_DIRECTIONS)


def contraction(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    direction: Float[jax.Array, " d"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    chunk_size: int | None = None,
) -> Float[jax.Array, "d d"]:
    """(d, d): T_3(I, u, I) = mean[l ((u . x)(x x' - I) - u x' - x u')] for a direction u (d,).

    The other arguments are those of `second_moment`.
    """
    points = x if weights is None else jnp.where(weights[:, None] > 0, x, 0)
    first = jnp.outer(direction, first_moment(x, labels, weights))
    return second_moment(x, labels * (points @ direction), weights, chunk_size=chunk_size) - first - first.T


def leading_span(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    num_vectors: int,
    chunk_size: int | None = None,
) -> tuple[Float[jax.Array, " d"], Float[jax.Array, "d k"]]:
    """(d,) singular values of the unfolding of T_3, decreasing, and (d, k) its leading left singular vectors.

    Each direction takes one pass over the data and n d^2 operations.
    """
    dim = x.shape[1]
    if dim <= MOST_DIRECTIONS:
        directions = jnp.eye(dim, dtype=x.dtype)
    else:
        directions = orthonormal_columns(standard_normal(key, (dim, MOST_DIRECTIONS), x.dtype)).T

    def add(gram: jax.Array, direction: jax.Array) -> tuple[jax.Array, None]:
        matrix = contraction(x, labels, direction, weights, chunk_size=chunk_size)
        return gram + matrix @ matrix, None

    gram, _ = jax.lax.scan(add, jnp.zeros((dim, dim), x.dtype), directions)
    finite = jnp.isfinite(gram).all()
    values, vectors = eigh(jnp.where(finite, gram, jnp.eye(dim, dtype=x.dtype)))
    return jnp.sqrt(jnp.maximum(values[::-1], 0)), vectors[:, ::-1][:, :num_vectors]


def alternating_least_squares(
    tensor: Float[jax.Array, "k k k"], start: Float[jax.Array, "k k"], *, num_steps: int = NUM_STEPS
) -> Components:
    """The components of a symmetric tensor near the unit rows of `start`.

    Args:
        tensor: (k, k, k), symmetric.
        start: (k, k) unit rows.
        num_steps: steps of alternating least squares.
    """
    damping = DAMPING * jnp.eye(tensor.shape[0], dtype=tensor.dtype)

    def contracted(rows: jax.Array) -> jax.Array:
        """(k, k): rows T(I, v_i, v_i)."""
        return jnp.einsum("ajk,ij,ik->ia", tensor, rows, rows)

    def step(rows: jax.Array, _: Any) -> tuple[jax.Array, None]:
        gram = (rows @ rows.T) ** 2 + damping
        solved = jax.vmap(solve_positive_definite, (None, 1), 1)(gram, contracted(rows))
        new = unit_rows(solved)
        return jnp.where(jnp.isfinite(new), new, rows), None

    rows, _ = jax.lax.scan(step, start, length=num_steps)
    gram = (rows @ rows.T) ** 3
    projections = jnp.sum(contracted(rows) * rows, axis=1)
    coefficients = solve_positive_definite(gram + damping, projections)
    fitted = 2 * coefficients @ projections - coefficients @ gram @ coefficients
    sign = jnp.where(coefficients < 0, -1.0, 1.0).astype(tensor.dtype)
    return Components(jnp.abs(coefficients), rows * sign[:, None], jnp.sum(tensor**2) - fitted)


def decompose_third_moment(
    key: jax.Array, tensor: Float[jax.Array, "k k k"], *, num_tries: int = NUM_TRIES
) -> Components:
    """The components of a symmetric k x k x k tensor: alternating least squares, the best of `num_tries` random starts."""
    k = tensor.shape[0]
    scale = jnp.sqrt(jnp.sum(tensor**2))
    scaled = tensor / jnp.where(scale > 0, scale, 1.0)
    starts = unit_rows(standard_normal(key, (num_tries, k, k), tensor.dtype))
    runs = jax.vmap(alternating_least_squares, (None, 0))(scaled, starts)
    best = jnp.argmin(jnp.where(jnp.isfinite(runs.residual), runs.residual, jnp.inf))
    end = alternating_least_squares(scaled, runs.vectors[best], num_steps=LAST_STEPS)
    return Components(scale * end.coefficients, end.vectors, scale**2 * end.residual)


def third_moment_estimate(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    num_experts: int,
    num_tries: int = NUM_TRIES,
    chunk_size: int | None = None,
) -> ThirdMomentEstimate:
    """Unit-norm experts from the third moment, without whitening (see the module).

    Args:
        key: PRNG key of the random starts.
        x: (n, d) inputs, standard normal.
        labels: (n,) order-3 transformed labels, c_3 = 1.
        weights: (n,) sample weights; None for ones.
        num_experts: k <= d.
        num_tries: random starts of the decomposition.
        chunk_size: stream the moments over chunks of that many samples.
    """
    span_key, start_key = jax.random.split(key)
    values, basis = leading_span(span_key, x, labels, weights, num_vectors=num_experts, chunk_size=chunk_size)
    tensor = whitened_moment(x, labels, basis, weights, order=3, chunk_size=chunk_size)
    tensor = jnp.where(jnp.isfinite(tensor).all(), tensor, 0)
    found = decompose_third_moment(start_key, tensor, num_tries=num_tries)
    size = jnp.sum(tensor**2)
    return ThirdMomentEstimate(
        found.vectors @ basis.T,
        found.coefficients,
        values,
        found.residual / jnp.where(size > 0, size, 1.0),
    )
