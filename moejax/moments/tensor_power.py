r"""Robust tensor power method on an orthogonally decomposable symmetric tensor of order 3 or 4.

T = sum_i lambda_i v_i^{(x) m} + noise, v_i orthonormal. Anandkumar, Ge, Hsu, Kakade, Telgarsky (JMLR 2014), section 5:
many random restarts of v <- T(I, v, .., v) / ||.||; the one with the largest eigenvalue is kept, iterated again and deflated. A
polar refinement follows, which uses that all v_i are orthonormal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.model.gaussian import standard_normal
from moejax.model.small_linear_algebra import polar_factor, unit_rows
from moejax.model.status import Status


class TensorDecomposition(NamedTuple):
    """Robust eigenpairs of a symmetric tensor, one lane per component."""

    eigenvalues: Float[jax.Array, " k"]
    """(k,) lambda_i."""
    eigenvectors: Float[jax.Array, "k k"]
    """(k, k) rows v_i, orthonormal after polar refinement."""
    status: Int[jax.Array, " k"]
    """(k,) int32, a `Status` for each component."""


def contract_all_but_one(
    tensor: Float[jax.Array, "k k ..."], v: Float[jax.Array, " k"]
) -> Float[jax.Array, " k"]:
    """(k,): T(I, v, .., v)."""
    for _ in range(tensor.ndim - 1):
        tensor = tensor @ v
    return tensor


def outer_power(v: Float[jax.Array, " k"], order: int) -> Float[jax.Array, " ..."]:
    """(k,) * order: v (x) .. (x) v."""
    power = v
    for _ in range(order - 1):
        power = jnp.tensordot(power, v, axes=0)
    return power


def tensor_power_method(
    key: jax.Array,
    tensor: Float[jax.Array, "k k k ..."],
    *,
    num_restarts: int = 16,
    num_iterations: int = 30,
    num_polar_iterations: int = 8,
) -> TensorDecomposition:
    """All k robust eigenpairs of a symmetric (k,) * m tensor, m = 3 or 4.

    Args:
        key: PRNG key of the random restarts.
        tensor: (k,) * m, symmetric.
        num_restarts: restarts for each component; they run side by side.
        num_iterations: power iterations of every restart, and again of the best one.
        num_polar_iterations: iterations of the refinement V <- polar factor of [lambda_i T(I, v_i, .., v_i)]_i; 0 for none.
    """
    k, order = tensor.shape[0], tensor.ndim
    tolerance = 100.0 * jnp.finfo(tensor.dtype).eps

    def iterate(deflated: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(v: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            new = unit_rows(contract_all_but_one(deflated, v))
            return new, 0.5 * jnp.sum((new - v) ** 2)

        v, moved = jax.lax.scan(step, v, length=num_iterations)
        return v, moved[-1]

    def extract(deflated: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        starts = unit_rows(standard_normal(key, (num_restarts, k), tensor.dtype))
        candidates, _ = jax.vmap(iterate, (None, 0))(deflated, starts)
        values = jax.vmap(lambda v: contract_all_but_one(deflated, v) @ v)(candidates)
        v, moved = iterate(deflated, candidates[jnp.argmax(values)])
        eigenvalue = contract_all_but_one(deflated, v) @ v
        return deflated - eigenvalue * outer_power(v, order), (v, moved)

    _, (vectors, moved) = jax.lax.scan(extract, tensor, jax.random.split(key, k))
    contract = jax.vmap(lambda v: contract_all_but_one(tensor, v))

    def polar_step(vectors: jax.Array, _: Any) -> tuple[jax.Array, None]:
        images = contract(vectors)
        refined = polar_factor(jnp.sum(images * vectors, axis=1, keepdims=True) * images)
        return jnp.where(jnp.isfinite(refined).all(), refined, vectors), None

    vectors, _ = jax.lax.scan(polar_step, vectors, length=num_polar_iterations)
    eigenvalues = jnp.sum(contract(vectors) * vectors, axis=1)
    status = jnp.where(moved <= tolerance, Status.OK, Status.TENSOR_NOT_CONVERGED)
    status = jnp.where(eigenvalues > 0, status, Status.TENSOR_NOT_POSITIVE)
    status = jnp.where(jnp.isfinite(tensor).all(), status, Status.NOT_FINITE)
    return TensorDecomposition(eigenvalues, vectors, status.astype(jnp.int32))
