r"""The leading eigenpairs of T2 for many inputs, from products of the data with a few vectors.

T2 = mean[l (x x' - I)] is used only as the map V -> (X' diag(w l) X V - sum(w l) V) / sum(w), in O(n d m) for m vectors and
without a (d, d) array. The eigenpairs come from a block Krylov space (Golub and Underwood 1977): a random block Q_1, then
Q_{j+1} = an orthonormal basis of the part of T2 Q_j outside Q_1 .. Q_j, and Rayleigh-Ritz in the span of all blocks. The error
falls like exp(-2 j sqrt(gap)) or faster, gap the distance of the k-th eigenvalue from the next relative to their range; for
subspace iteration it is exp(-j gap) (Musco and Musco 2015), and near the threshold of detection the gap is small.

Noise alone gives T2 a bulk of eigenvalues: for n >> d a semicircle of radius 2 sqrt(E[l^2] d / n). The eigenvalue p_i of an
expert leaves it if p_i > sqrt(E[l^2] d / n) (Baik, Ben Arous and Peche 2005), so an expert of mixing weight p_i can be found if

    n / d > E[l^2] / p_i^2

up to corrections for an n / d of order one. The l with the least threshold there is (r - 1) / r, r = 1 + p (E[Z^2 | Y] - 1)
(Mondelli and Montanari 2019). That is the "weighted" transform of order 2 for a g that is even or odd.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.model.gaussian import standard_normal
from moejax.model.small_linear_algebra import eigh, orthonormal_columns
from moejax.model.sums import sum_over_rows

OVERSAMPLING = 4
"""Vectors in a block beyond those that are wanted. With none, convergence takes a fifth fewer products with one vector but a third
more passes over the data, and reading the data is what takes the time."""
NUM_BLOCKS = 40
"""Most blocks of the Krylov space, one pass over the data each. 12 to 26 suffice near the threshold of detection."""
TOLERANCE = 1e-3
"""The residuals at the end, relative to the largest eigenvalue: far below the sampling error of the eigenvectors."""
ENTRIES_OF_PART = 2**21
"""Entries of the inputs in the part of rows that is multiplied at a time: a part is read once for both products."""


class LeadingSubspace(NamedTuple):
    """Leading eigenpairs of T2."""

    eigenvalues: Float[jax.Array, " k"]
    """(k,) decreasing, the largest algebraically."""
    eigenvectors: Float[jax.Array, "d k"]
    """(d, k) orthonormal columns."""
    residuals: Float[jax.Array, " k"]
    """(k,) norms of T2 u - lambda u: each eigenvalue is at most this far from one of T2."""
    next_eigenvalue: Float[jax.Array, ""]
    """() the Ritz value after those, at most the (k + 1)-th eigenvalue: where noise alone makes eigenvalues; NaN if k = d."""
    num_passes: Int[jax.Array, ""]
    """() int32 passes over the data, each a product of T2 with one block."""
    num_products: Int[jax.Array, ""]
    """() int32 products of T2 with one vector."""
    converged: Bool[jax.Array, ""]
    """() bool: all residuals are within the tolerance."""


def rows_of_part(num_inputs: int, chunk_size: int | None) -> int:
    """Rows that one part of a sum over samples has: `chunk_size`, or as many as ENTRIES_OF_PART allows."""
    return max(ENTRIES_OF_PART // num_inputs, 64) if chunk_size is None else chunk_size


def second_moment_product(
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    vectors: Float[jax.Array, "d m"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    chunk_size: int | None = None,
) -> Float[jax.Array, "d m"]:
    """T2 V, (d, m), for V (d, m), T2 = mean[l (x x' - I)]; arguments as in `second_moment`."""
    share = jnp.full_like(labels, 1.0 / x.shape[0]) if weights is None else weights / weights.sum()
    coefficients = jnp.where(share > 0, labels * share, 0)

    def sums_of(x: jax.Array, coefficients: jax.Array, share: jax.Array) -> jax.Array:
        if weights is not None:
            x = jnp.where(share[:, None] > 0, x, 0)
        return x.T @ (coefficients[:, None] * (x @ vectors))

    sums = sum_over_rows(sums_of, (x, coefficients, share), rows_of_part(x.shape[1], chunk_size))
    return sums - coefficients.sum() * vectors


class _Krylov(NamedTuple):
    """A block Krylov space and its best pairs."""

    basis: Float[jax.Array, "d R"]
    """(d, R) blocks so far, zero beyond."""
    images: Float[jax.Array, "d R"]
    """(d, R) T2 times these."""
    block: Float[jax.Array, "d m"]
    """(d, m) the next block."""
    values: Float[jax.Array, " k+1"]
    vectors: Float[jax.Array, "d k"]
    residuals: Float[jax.Array, " k"]
    num_passes: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]


def leading_subspace(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    labels: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"] | None = None,
    *,
    num_vectors: int,
    oversampling: int = OVERSAMPLING,
    num_blocks: int = NUM_BLOCKS,
    tolerance: float = TOLERANCE,
    chunk_size: int | None = None,
) -> LeadingSubspace:
    """The `num_vectors` largest eigenpairs of T2 = mean[l (x x' - I)], in O(n d m) a pass, m = num_vectors + oversampling.

    If the Krylov space would fill all d dimensions, T2 is formed and decomposed densely; d is then at most m num_blocks.

    Args:
        key: PRNG key of the first block.
        x: (n, d) inputs, standard normal.
        labels: (n,) order-2 transformed labels.
        weights: (n,) sample weights, zero for padding (such rows may hold any values); None for ones.
        num_vectors: k <= d.
        oversampling: vectors in a block beyond k.
        num_blocks: most blocks; after convergence there are no more passes.
        tolerance: largest residual at the end, relative to the largest eigenvalue.
        chunk_size: rows that are multiplied at a time; None chooses.

    Source: G. Golub, R. Underwood, The block Lanczos method for computing eigenvalues, 1977.
    """
    dim, k = x.shape[1], num_vectors
    width = min(k + oversampling, dim)
    if dim <= width * num_blocks:
        width, num_blocks = dim, 1
        first = jnp.eye(dim, dtype=x.dtype)
    else:
        first = orthonormal_columns(standard_normal(key, (dim, width), x.dtype))
    size = width * num_blocks
    num_values = min(k + 1, dim)

    def advance(state: _Krylov, index: jax.Array) -> _Krylov:
        image = second_moment_product(x, labels, state.block, weights, chunk_size=chunk_size)
        place = (jnp.zeros_like(index), index * width)
        basis = jax.lax.dynamic_update_slice(state.basis, state.block, place)
        images = jax.lax.dynamic_update_slice(state.images, image, place)
        projected = basis.T @ images
        projected = 0.5 * (projected + projected.T)
        # unused columns get eigenvalues below all others
        bound = 1.0 + jnp.abs(projected).sum()
        unused = jnp.arange(size, dtype=jnp.int32) >= (index + 1) * width
        values, rotation = eigh(projected - jnp.diag(jnp.where(unused, bound, 0)))
        values, rotation = values[::-1][:num_values], rotation[:, ::-1][:, :k]
        vectors = basis @ rotation
        residuals = jnp.sqrt(jnp.sum((images @ rotation - vectors * values[None, :k]) ** 2, axis=0))
        for _ in range(2):  # twice is enough (Giraud, Langou and Rozloznik 2005)
            image = image - basis @ (basis.T @ image)
        converged = residuals.max() <= tolerance * jnp.abs(values).max()
        return _Krylov(
            basis,
            images,
            orthonormal_columns(image),
            values,
            vectors,
            residuals,
            state.num_passes + 1,
            converged,
        )

    def body(state: _Krylov, index: jax.Array) -> tuple[_Krylov, None]:
        return jax.lax.cond(state.converged, lambda state, _: state, advance, state, index), None

    empty = jnp.zeros((dim, size), x.dtype)
    start = _Krylov(
        empty,
        empty,
        first,
        jnp.zeros(num_values, x.dtype),
        jnp.zeros((dim, k), x.dtype),
        jnp.full(k, jnp.inf, x.dtype),
        jnp.asarray(0, jnp.int32),
        jnp.asarray(False),
    )
    end, _ = jax.lax.scan(body, start, jnp.arange(num_blocks, dtype=jnp.int32))
    following = end.values[k] if num_values > k else jnp.asarray(jnp.nan, x.dtype)
    return LeadingSubspace(
        end.values[:k],
        end.vectors,
        end.residuals,
        following,
        end.num_passes,
        end.num_passes * width,
        end.converged,
    )
