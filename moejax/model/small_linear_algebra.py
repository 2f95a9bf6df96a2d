"""Factorisations and solves of small matrices, alone or many side by side in one program.

On a CPU, jaxlib 0.10 distributes the matrices of a *batched* LAPACK call over the threads that run the program, and waits for them
in one of these threads. Two such calls at once can take all threads and then wait for ever. So no program here contains one:

* One matrix by itself goes to LAPACK. Such a call runs in the thread that makes it.
* Matrices side by side, as under `jax.vmap`, are factorised by loops over rows; each step is one lax operation on all matrices.
* Larger matrices (see LARGEST_SOLVED), for which LAPACK takes less time than these steps, go to LAPACK one after the other.

Every function takes leading axes, the batch, and may be vmapped on top of that. Accelerators keep JAX's own batched calls, which
do not wait in this way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.environment import runs_on_cpu

LARGEST_SOLVED, LARGEST_FACTORISED, LARGEST_ROTATED = 12, 8, 6
"""Largest number of rows for which the loops over all matrices are faster than LAPACK on one matrix after the other: for linear
systems; for triangular and orthonormal factors; for eigenvalues and singular values. Up to these sizes the loops are also faster
than a batched LAPACK call if the batch is wide; beyond, our way is slower than the batched call would be."""
MAX_SWEEPS = 30
"""Sweeps of rotations; six or so reach the precision."""


def cholesky(matrix: Float[jax.Array, "*b n n"]) -> Float[jax.Array, "*b n n"]:
    """(..., n, n): lower triangular L, L L' = matrix (..., n, n); its triangle is NaN if the matrix is not positive definite."""
    return _CHOLESKY(matrix)


def solve_positive_definite(
    matrix: Float[jax.Array, "*b n n"], right: Float[jax.Array, "*b n"]
) -> Float[jax.Array, "*b n"]:
    """(..., n): matrix^-1 right for matrix (..., n, n) and right (..., n); NaN if the matrix is not positive definite."""
    return _SOLVE_POSITIVE_DEFINITE(matrix, right[..., None])[..., 0]


def inverse_positive_definite(matrix: Float[jax.Array, "*b n n"]) -> Float[jax.Array, "*b n n"]:
    """(..., n, n): the inverse of matrix (..., n, n); NaN if the matrix is not positive definite."""
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return _SOLVE_POSITIVE_DEFINITE(matrix, jnp.broadcast_to(identity, matrix.shape))


def solve(
    matrix: Float[jax.Array, "*b n n"], right: Float[jax.Array, "*shape"]
) -> Float[jax.Array, "*shape"]:
    """(..., n, m), or (..., n): matrix^-1 right for matrix (..., n, n) and right of that shape; not finite if singular."""
    if right.ndim == matrix.ndim:
        return _SOLVE(matrix, right)
    return _SOLVE(matrix, right[..., None])[..., 0]


def eigh(
    matrix: Float[jax.Array, "*b n n"],
) -> tuple[Float[jax.Array, "*b n"], Float[jax.Array, "*b n n"]]:
    """(..., n) increasing eigenvalues and (..., n, n) eigenvectors, in columns, of a symmetric matrix (..., n, n)."""
    return _EIGH(matrix)


def polar_factor(matrix: Float[jax.Array, "*b n n"]) -> Float[jax.Array, "*b n n"]:
    """(..., n, n): the orthogonal matrix that is nearest to matrix (..., n, n); if that is singular, NaN or any nearest one."""
    return _POLAR_FACTOR(matrix)


def pseudo_inverse(matrix: Float[jax.Array, "*b k d"]) -> Float[jax.Array, "*b d k"]:
    """(..., d, k): the Moore-Penrose inverse of matrix (..., k, d), k <= d.

    Singular values below 10 d eps times the largest count as zero.
    """
    return _PSEUDO_INVERSE(matrix)


def orthonormal_columns(matrix: Float[jax.Array, "*b d k"]) -> Float[jax.Array, "*b d k"]:
    """(..., d, k): Q of matrix (..., d, k) = Q R, R upper triangular with a positive diagonal, for a matrix of rank k <= d."""
    return _ORTHONORMAL_COLUMNS(matrix)


class _Batched:
    """A function of matrices that chooses how a batch of them is computed."""

    def __init__(self, of_one: Callable[..., Any], of_many: Callable[..., Any], largest: int) -> None:
        """`of_many` is `of_one` for arrays with one more leading axis; it is used up to `largest` rows."""
        self._of_one, self._of_many, self._largest = of_one, of_many, largest
        self._function = jax.custom_batching.custom_vmap(of_one)
        self._function.def_vmap(self._of_batch)

    def __call__(self, *matrices: jax.Array) -> Any:
        function = self._function
        for _ in range(matrices[0].ndim - 2):
            function = jax.vmap(function)
        return function(*matrices)

    def _of_batch(self, size: int, in_batched: list[bool], *matrices: jax.Array) -> tuple[Any, Any]:
        matrices = tuple(
            a if batched else jnp.broadcast_to(a[None], (size, *a.shape))
            for a, batched in zip(matrices, in_batched, strict=True)
        )
        if not runs_on_cpu():
            result = jax.vmap(self._of_one)(*matrices)
        elif matrices[0].shape[1] <= self._largest:
            result = self._of_many(*matrices)
        else:
            result = jax.lax.map(lambda one: self._function(*one), matrices)
        return result, jax.tree.map(lambda _: True, result)


# Elimination


def _row(array: jax.Array, index: jax.Array | int) -> jax.Array:
    """(B, ..) row `index` of each of (B, n, ..)."""
    return jax.lax.dynamic_index_in_dim(array, index, 1, keepdims=False)


def _entry(row: jax.Array, index: jax.Array | int) -> jax.Array:
    """(B, 1) entry `index` of each of (B, n)."""
    return jax.lax.dynamic_index_in_dim(row, index, 1)


def _eliminated(rows: jax.Array) -> jax.Array:
    """(B, n, n + m) rows [U | U A^-1 R] of symmetric systems [A | R], U upper triangular.

    This is Gaussian elimination without exchange of rows, which is stable for positive definite A. A pivot that is not positive
    makes all rows NaN, unless it is the last. The row and the column of the next pivot are carried from step to step: if a step
    read them from the array, XLA could not change the array in place.
    """
    size = rows.shape[1]
    index = jnp.arange(size)

    def step(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        rows, column, row = state
        rows = rows - column[:, :, None] * row[:, None]
        row = _row(rows, j)
        return rows, jnp.where((index > j)[None], row[:, :size], 0), row / _positive(_entry(row, j))

    nothing = jnp.zeros_like(rows[:, 0])
    return jax.lax.fori_loop(0, size, step, (rows, nothing[:, :size], nothing))[0]


def _positive(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, values, jnp.nan)


def _back_substituted(rows: jax.Array, check: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(B, n, m): U^-1 R of (B, n, n + m) rows [U | R], U upper triangular; its diagonal goes through `check` first.

    Entries of U below the diagonal are not used.
    """
    size = rows.shape[1]

    def step(i: jax.Array, solution: jax.Array) -> jax.Array:
        j = size - 1 - i
        row = _row(rows, j)
        known = jnp.sum(row[:, :size, None] * solution, axis=1)  # entries not yet known are zero
        found = (row[:, size:] - known) / check(_entry(row, j))
        return jax.lax.dynamic_update_index_in_dim(solution, found, j, 1)

    return jax.lax.fori_loop(0, size, step, jnp.zeros_like(rows[:, :, size:]))


def _cholesky_of_many(matrices: jax.Array) -> jax.Array:
    """Cholesky factors by the steps of `_eliminated`, with rows divided by the roots of their pivots."""
    index = jnp.arange(matrices.shape[1])

    def step(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        rows, factor, row = state
        column = jnp.where((index >= j)[None], row, 0)
        rows = rows - column[:, :, None] * column[:, None]
        row = _row(rows, j)
        row = jnp.where((index >= j)[None], row / jnp.sqrt(_positive(_entry(row, j))), 0)
        return rows, jax.lax.dynamic_update_index_in_dim(factor, row, j, 1), row

    start = (matrices, matrices, jnp.zeros_like(matrices[:, 0]))
    factor = jax.lax.fori_loop(0, index.size, step, start)[1]
    failed = jnp.isnan(factor[:, -1:, -1:])  # a pivot that is not positive makes all later ones NaN
    lower = (index[:, None] >= index[None])[None]
    return jnp.where(failed & lower, jnp.nan, factor.swapaxes(1, 2))


def _solve_positive_definite_one(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), right)


def _solve_positive_definite_many(matrices: jax.Array, right: jax.Array) -> jax.Array:
    return _back_substituted(_eliminated(jnp.concatenate([matrices, right], axis=2)), _positive)


def _solve_many(matrices: jax.Array, right: jax.Array) -> jax.Array:
    """Gaussian elimination with partial pivoting: the pivot of a column is its largest entry."""
    size = matrices.shape[1]
    index = jnp.arange(size)

    def column_of(rows: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(rows, j, 2, keepdims=False)

    def step(j: jax.Array, rows: jax.Array) -> jax.Array:
        pivots = jnp.where((index >= j)[None], jnp.abs(column_of(rows, j)), -1.0)
        chosen = jnp.argmax(pivots, axis=1)[:, None]
        exchanged = jnp.where((index == j)[None], chosen, jnp.where(index[None] == chosen, j, index[None]))
        rows = jnp.take_along_axis(rows, exchanged[:, :, None], axis=1)
        row = _row(rows, j)
        column = jnp.where((index > j)[None], column_of(rows, j), 0)
        return rows - column[:, :, None] * (row / _entry(row, j))[:, None]

    rows = jax.lax.fori_loop(0, size - 1, step, jnp.concatenate([matrices, right], axis=2))
    return _back_substituted(rows, lambda pivot: pivot)


# Rotations


def _orthogonalised(rows: jax.Array, length: int) -> jax.Array:
    """(B, n, p): rows (B, n, p), p >= length, after rotations that make their first `length` entries orthogonal.

    One-sided Jacobi (Hestenes 1958): sweeps over all pairs of rows, each rotated until orthogonal. n / 2 pairs are rotated at once;
    the order is a round robin, in which the first row stays in its place and the others move on by one.
    """
    num_rows = rows.shape[1]
    half = (num_rows + 1) // 2
    tolerance = length * jnp.finfo(rows.dtype).eps
    rows = jnp.pad(rows, [(0, 0), (0, 2 * half - num_rows), (0, 0)])

    def rotate(_: Any, state: tuple[jax.Array, jax.Array, jax.Array]):
        first, second, largest = state
        one, other = first[:, :, :length], second[:, :, :length]
        square, other_square = jnp.sum(one**2, axis=2), jnp.sum(other**2, axis=2)
        product, scale = jnp.sum(one * other, axis=2), jnp.sqrt(square) * jnp.sqrt(other_square)
        cosine = jnp.where(scale > 0, jnp.abs(product) / jnp.where(scale > 0, scale, 1.0), 0.0)
        turned = product != 0
        ratio = (other_square - square) / jnp.where(turned, 2.0 * product, 1.0)
        tangent = jnp.where(ratio < 0, -1.0, 1.0) / (jnp.abs(ratio) + jnp.sqrt(1.0 + ratio**2))
        tangent = jnp.where(turned, tangent, 0.0)[:, :, None]
        c = 1.0 / jnp.sqrt(1.0 + tangent**2)
        first, second = c * (first - tangent * second), c * (second + tangent * first)
        if half > 1:
            first, second = (
                jnp.concatenate([first[:, :1], second[:, :1], first[:, 1:-1]], axis=1),
                jnp.concatenate([second[:, 1:], first[:, -1:]], axis=1),
            )
        return first, second, jnp.maximum(largest, cosine.max())

    def sweep(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
        first, second, _, count = state
        begun = (first, second, jnp.zeros((), rows.dtype))
        return *jax.lax.fori_loop(0, 2 * half - 1, rotate, begun), count + 1

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[2] > tolerance) & (state[3] < MAX_SWEEPS)  # False for NaN

    start = (rows[:, :half], rows[:, half:], jnp.asarray(jnp.inf, rows.dtype), jnp.asarray(0, jnp.int32))
    first, second, *_ = jax.lax.while_loop(unfinished, sweep, start)
    return jnp.concatenate([first, second], axis=1)[:, :num_rows]


def _eigh_of_many(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A / |A| + 2 has eigenvalues between 1 and 3; its rows, made orthogonal by rotations, are eigenvectors times these."""
    identity = jnp.eye(matrices.shape[1], dtype=matrices.dtype)[None]
    bound = jnp.abs(matrices).sum(axis=2).max(axis=1)
    scaled = matrices / jnp.where(bound > 0, bound, 1.0)[:, None, None]
    rows = _orthogonalised(scaled + 2.0 * identity, matrices.shape[1])
    vectors = rows / jnp.sqrt(jnp.sum(rows**2, axis=2, keepdims=True))
    values = jnp.sum((vectors @ matrices) * vectors, axis=2)
    order = jnp.argsort(values, axis=1)
    vectors = jnp.take_along_axis(vectors, order[:, :, None], axis=1)
    return jnp.take_along_axis(values, order, axis=1), vectors.swapaxes(1, 2)


def _singular_vectors(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U' (B, k, k), singular values (B, k), V' (B, k, d) of (B, k, d) = U S V'; in V', NaN for a singular value of zero."""
    num_rows, length = matrices.shape[1:]
    bound = jnp.abs(matrices).max(axis=(1, 2))[:, None, None]
    bound = jnp.where(bound > 0, bound, 1.0)
    identity = jnp.broadcast_to(
        jnp.eye(num_rows, dtype=matrices.dtype)[None], (*matrices.shape[:2], num_rows)
    )
    rows = _orthogonalised(jnp.concatenate([matrices / bound, identity], axis=2), length)
    norms = jnp.sqrt(jnp.sum(rows[:, :, :length] ** 2, axis=2))
    return rows[:, :, length:], norms * bound[:, :, 0], rows[:, :, :length] / norms[:, :, None]


def _polar_factor_one(matrix: jax.Array) -> jax.Array:
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _polar_factor_many(matrices: jax.Array) -> jax.Array:
    left, _, right = _singular_vectors(matrices)
    return left.swapaxes(1, 2) @ right


def _pseudo_inverse_many(matrices: jax.Array) -> jax.Array:
    left, values, right = _singular_vectors(matrices)
    smallest = 10 * max(matrices.shape[1:]) * jnp.finfo(values.dtype).eps * values.max(axis=1, keepdims=True)
    kept = values > smallest
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)
    return (jnp.where(kept[:, :, None], right, 0) * inverse[:, :, None]).swapaxes(1, 2) @ left


# Orthonormalisation


def _orthonormal_columns_one(matrix: jax.Array) -> jax.Array:
    frame, triangle = jnp.linalg.qr(matrix)
    return frame * jnp.where(jnp.diagonal(triangle) < 0, -1.0, 1.0).astype(matrix.dtype)[None]


def _orthonormal_columns_many(matrices: jax.Array) -> jax.Array:
    """The Gram-Schmidt process, applied twice, which is enough (Giraud, Langou, Rozloznik 2005)."""
    rows = matrices.swapaxes(1, 2)

    def step(j: jax.Array, basis: jax.Array) -> jax.Array:
        row = _row(rows, j)
        for _ in range(2):
            shares = jnp.sum(basis * row[:, None], axis=2)
            row = row - jnp.sum(shares[:, :, None] * basis, axis=1)
        row = row / jnp.sqrt(jnp.sum(row**2, axis=1, keepdims=True))
        return jax.lax.dynamic_update_index_in_dim(basis, row, j, 1)

    return jax.lax.fori_loop(0, rows.shape[1], step, jnp.zeros_like(rows)).swapaxes(1, 2)


_CHOLESKY = _Batched(lambda matrix: jnp.linalg.cholesky(matrix), _cholesky_of_many, LARGEST_FACTORISED)
_SOLVE_POSITIVE_DEFINITE = _Batched(
    _solve_positive_definite_one, _solve_positive_definite_many, LARGEST_SOLVED
)
_SOLVE = _Batched(lambda matrix, right: jnp.linalg.solve(matrix, right), _solve_many, LARGEST_SOLVED)
_EIGH = _Batched(lambda matrix: tuple(jnp.linalg.eigh(matrix)), _eigh_of_many, LARGEST_ROTATED)
_POLAR_FACTOR = _Batched(_polar_factor_one, _polar_factor_many, LARGEST_ROTATED)
_PSEUDO_INVERSE = _Batched(lambda matrix: jnp.linalg.pinv(matrix), _pseudo_inverse_many, LARGEST_ROTATED)
_ORTHONORMAL_COLUMNS = _Batched(_orthonormal_columns_one, _orthonormal_columns_many, LARGEST_FACTORISED)


def unit_rows(a: Float[jax.Array, "*rows d"]) -> Float[jax.Array, "*rows d"]:
    """Rows divided by their Euclidean norms; a zero row stays zero."""
    norms = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.where(norms > 0, norms, 1.0)
