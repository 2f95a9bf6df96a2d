r"""Experts from moments: whiten with T2, decompose the whitened T3 or T4, un-whiten (Makkuva et al. 2019, Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.activations import ActivationLike, ScalarFunction, activation_facts, get_activation
from moejax.label_transforms import (
    LabelTransform,
    TransformKind,
    traced_label_transforms,
    transform_noise_std,
    transform_on_host,
)
from moejax.model import unit_rows
from moejax.moments import first_moment, second_moment, whitened_moment
from moejax.tensor_power import NOT_CONVERGED, TensorDecomposition, tensor_power_method

OK, RANK_DEFICIENT, TENSOR_NOT_CONVERGED, TENSOR_NOT_POSITIVE, NOT_FINITE = range(5)
SPECTRAL_STATUS = {
    OK: "ok",
    RANK_DEFICIENT: "T2 has fewer positive eigenvalues than experts: the sample is too small or the model wrong",
    TENSOR_NOT_CONVERGED: "the tensor power iteration did not converge within its budget",
    TENSOR_NOT_POSITIVE: "the whitened moment tensor has a non-positive eigenvalue: the sample is too small or the model wrong",
    NOT_FINITE: "the moments are not finite",
}


class SpectralTransforms(NamedTuple):
    """The label transforms of one activation and noise level that a spectral estimate needs."""

    second: LabelTransform
    """Order 2, for whitening."""
    high: LabelTransform
    """Order 3 or 4, for the decomposition."""
    first: LabelTransform | None
    """Order 1, for the signs of experts found at order 4; None where signs are known (order 3) or free (even g)."""


def needs_signs(fn: ScalarFunction, order: int) -> bool:
    """Whether an order-1 moment must tell the signs of the experts: order 4 of a function that is not even."""
    return order == 4 and activation_facts(fn).parity != "even"


def host_transforms(
    activation: ActivationLike, noise_std: float, order: int, kind: TransformKind, num_experts: int
) -> SpectralTransforms:
    """The transforms of a spectral estimate at a noise level that is a number; NumPy leaves in double precision."""
    fn = get_activation(activation)
    noise_std = transform_noise_std(fn, noise_std)
    first = transform_on_host(fn, noise_std, 1, kind, num_experts) if needs_signs(fn, order) else None
    second, high = (transform_on_host(fn, noise_std, m, kind, num_experts) for m in (2, order))
    return SpectralTransforms(second, high, first)


def traced_transforms(
    fn: ScalarFunction, noise_std: jax.Array, order: int, kind: TransformKind, num_experts: int
) -> SpectralTransforms:
    """The same at a traced noise level."""
    smallest = transform_noise_std(fn, 0.0)
    orders = (2, order, 1) if needs_signs(fn, order) else (2, order)
    wanted: tuple[tuple[int, TransformKind], ...] = tuple((m, kind) for m in orders)
    second, high, *first = traced_label_transforms(fn, noise_std, wanted, num_experts, smallest)
    return SpectralTransforms(second, high, first[0] if first else None)


class SpectralEstimate(NamedTuple):
    """What the moments say about the mixture."""

    experts: jax.Array
    """(k, d) unit rows."""
    mixing_weights: jax.Array
    """(k,) estimates of E[P_i], from the second moment alone, which is less noisy than the tensor's eigenvalues; they
    need not sum to 1."""
    second_moment_eigenvalues: jax.Array
    """(d,) of T2, decreasing; in theory the k-th is positive and the rest are 0."""
    decomposition: TensorDecomposition
    """Of the whitened tensor."""
    status: jax.Array
    """() int32, a key of SPECTRAL_STATUS."""


def spectral_estimate(
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    transforms: SpectralTransforms,
    weights: jax.Array | None = None,
    *,
    num_experts: int,
    order: int,
    num_restarts: int = 16,
    num_iterations: int = 30,
    num_polar_iterations: int = 8,
    chunk_size: int | None = None,
) -> SpectralEstimate:
    """Unit-norm experts from the label-score moments of (x, y).

    Args:
        key: PRNG key of the restarts of the tensor power method.
        x: (n, d) inputs, standard normal (whiten others first).
        y: (n,) labels.
        transforms: of the activation and noise, of orders 2 and `order`.
        weights: (n,) sample weights; None for ones.
        num_experts: k <= d.
        order: m, 3 or 4.
        num_restarts, num_iterations, num_polar_iterations: of `tensor_power_method`.
        chunk_size: stream the moments over chunks of that many samples.

    Returns:
        SpectralEstimate. Where T2 has non-positive eigenvalues among its top k, their absolute values whiten and the
        status says so: the experts are then a start, not an estimate.
    """
    moment = second_moment(x, transforms.second(y), weights, chunk_size=chunk_size)
    finite = jnp.isfinite(moment).all()
    eigenvalues, eigenvectors = jnp.linalg.eigh(jnp.where(finite, moment, jnp.eye(x.shape[1], dtype=x.dtype)))
    top_values, basis = eigenvalues[::-1][:num_experts], eigenvectors[:, ::-1][:, :num_experts]
    floor = 1e-3 * jnp.maximum(jnp.abs(eigenvalues).max(), jnp.finfo(x.dtype).tiny)
    scales = jnp.sqrt(jnp.maximum(jnp.abs(top_values), floor))
    whitening = basis / scales[None]
    tensor = whitened_moment(x, transforms.high(y), whitening, weights, order=order, chunk_size=chunk_size)
    finite = finite & jnp.isfinite(tensor).all()
    decomposition = tensor_power_method(
        key,
        jnp.where(finite, tensor, 0),
        num_restarts=num_restarts,
        num_iterations=num_iterations,
        num_polar_iterations=num_polar_iterations,
    )
    unwhitened = decomposition.eigenvectors @ (basis * scales[None]).T  # sqrt(E[P_i]) a_i
    experts = unit_rows(unwhitened)
    if transforms.first is not None:
        # E[l1(y) x] = sum_i E[P_i] a_i: in the dual basis its coordinates are the mixing weights, which are positive
        first = first_moment(x, transforms.first(y), weights)
        sign = jnp.sign(decomposition.eigenvectors @ (whitening.T @ first))
        experts = experts * jnp.where(sign == 0, 1.0, sign)[:, None]
    values = decomposition.eigenvalues
    mixing_weights = jnp.sum(unwhitened**2, axis=1)
    status = jnp.where(jnp.any(decomposition.status == NOT_CONVERGED), TENSOR_NOT_CONVERGED, OK)
    status = jnp.where(jnp.any(values <= 0), TENSOR_NOT_POSITIVE, status)
    status = jnp.where(top_values[-1] <= 0, RANK_DEFICIENT, status)
    status = jnp.where(finite, status, NOT_FINITE).astype(jnp.int32)
    return SpectralEstimate(experts, mixing_weights, eigenvalues[::-1], decomposition, status)
