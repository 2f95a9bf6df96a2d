r"""Experts from moments: whiten with T2, decompose the whitened T3 or T4, un-whiten (Makkuva et al. 2019, Algorithm 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.model.families import ChannelLike, get_channel
from moejax.model.family import Channel, Nuisances, activation_of, as_family, channel_facts
from moejax.model.inputs import LogDensity
from moejax.model.small_linear_algebra import eigh, unit_rows
from moejax.model.status import Status
from moejax.moments.cross_moments import first_moment, second_moment, whitened_moment
from moejax.moments.family_transforms import Level, traced_family_transforms, transform_at
from moejax.moments.label_transforms import (
    LabelTransform,
    TransformKind,
    traced_label_transforms,
)
from moejax.moments.orders import transform_level, transform_noise_range
from moejax.moments.score_tensors import score_first_moment, score_second_moment, score_whitened_moment
from moejax.moments.tensor_power import TensorDecomposition, tensor_power_method


class SpectralTransforms(NamedTuple):
    """The label transforms of one activation and noise level that a spectral estimate needs."""

    second: LabelTransform[Any]
    """Order 2, for whitening."""
    high: LabelTransform[Any]
    """Order 3 or 4, for the decomposition."""
    first: LabelTransform[Any] | None
    """Order 1, for the signs of experts found at order 4, or from inputs that are not normal; None if signs are known (order 3)
    or free (even g)."""


def needs_signs(fn: Channel, order: int, *, normal_inputs: bool = True) -> bool:
    """True if an order-1 moment is needed for the signs of the experts; for an even g they are free.

    At order 4 the tensor does not determine them; at order 3 the mean of l's third derivative is positive for normal inputs, but
    may be negative for others.
    """
    return (order == 4 or not normal_inputs) and channel_facts(fn).parity != "even"


def host_transforms(
    activation: ChannelLike,
    noise_std: Level,
    order: int,
    kind: TransformKind,
    num_experts: int,
    *,
    normal_inputs: bool = True,
) -> SpectralTransforms:
    """The transforms of a spectral estimate at a noise level that is a number; NumPy leaves in double precision."""
    fn = get_channel(activation)
    noise_std = transform_level(fn, noise_std)
    signs = needs_signs(fn, order, normal_inputs=normal_inputs)
    first = transform_at(fn, noise_std, 1, kind, num_experts) if signs else None
    second, high = (transform_at(fn, noise_std, m, kind, num_experts) for m in (2, order))
    return SpectralTransforms(second, high, first)


def traced_transforms(
    fn: Channel,
    noise_std: Float[jax.Array, ""] | Nuisances,
    order: int,
    kind: TransformKind,
    num_experts: int,
) -> SpectralTransforms:
    """The transforms of a spectral estimate at a traced noise level."""
    orders = (2, order, 1) if needs_signs(fn, order) else (2, order)
    wanted: tuple[tuple[int, TransformKind], ...] = tuple((m, kind) for m in orders)
    if isinstance(noise_std, Nuisances):
        second, high, *first = traced_family_transforms(as_family(fn), noise_std, wanted, num_experts)
    else:
        own = activation_of(fn)
        smallest, _ = transform_noise_range(own)
        second, high, *first = traced_label_transforms(own, noise_std, wanted, num_experts, smallest)
    return SpectralTransforms(second, high, first[0] if first else None)


class SpectralEstimate(NamedTuple):
    """Estimates of the experts and mixing weights from moments."""

    experts: Float[jax.Array, "k d"]
    """(k, d) unit rows."""
    mixing_weights: Float[jax.Array, " k"]
    """(k,) estimates of E[P_i], from the second moment alone, which is less noisy than the tensor's eigenvalues; they
    need not sum to 1."""
    second_moment_eigenvalues: Float[jax.Array, " r"]
    """(r,) of T2, decreasing; in theory the k-th is positive and the rest are 0. r = d, or k + 1 at most if T2 is not formed."""
    decomposition: TensorDecomposition
    """Decomposition of the whitened tensor."""
    status: Int[jax.Array, ""]
    """() int32, a `Status`."""


class SpectralLabels(NamedTuple):
    """Labels after their transforms, one for each moment of a spectral estimate; residual passes subtract a part of them."""

    second: Float[jax.Array, " n"]
    """(n,) for T2."""
    high: Float[jax.Array, " n"]
    """(n,) for T3 or T4."""
    first: Float[jax.Array, " n"] | None
    """(n,) for the signs; None if they need no moment."""


class TensorPart(NamedTuple):
    """sum_i p_i a_i^{(x) m}, the part that is added to the m-th moment of residual labels, m = 1 to 4."""

    experts: Float[jax.Array, "k d"]
    """(k, d) a_i."""
    mixing_weights: Float[jax.Array, " k"]
    """(k,) p_i."""

    def contracted(self, directions: Float[jax.Array, "d r"] | None, order: int) -> Float[jax.Array, " ..."]:
        """sum_i p_i (V'a_i)^{(x) m}, (r,) * m, for directions V (d, r); None for the identity."""
        rows = self.experts if directions is None else self.experts @ directions
        power = self.mixing_weights[:, None] * rows
        for _ in range(order - 1):
            power = power[..., None] * rows.reshape(rows.shape[0], *(1,) * (power.ndim - 1), rows.shape[1])
        return power.sum(axis=0)


def transformed_labels(transforms: SpectralTransforms, y: Float[jax.Array, " n"]) -> SpectralLabels:
    """The label transforms applied to y (n,)."""
    first = None if transforms.first is None else transforms.first(y)
    return SpectralLabels(transforms.second(y), transforms.high(y), first)


def spectral_estimate(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    transforms: SpectralTransforms,
    weights: Float[jax.Array, " n"] | None = None,
    *,
    num_experts: int,
    order: int,
    num_restarts: int = 16,
    num_iterations: int = 30,
    num_polar_iterations: int = 8,
    chunk_size: int | None = None,
    log_density: LogDensity | None = None,
) -> SpectralEstimate:
    """Unit-norm experts from the label-score moments of (x, y).

    Args:
        key: PRNG key of the restarts of the tensor power method.
        x: (n, d) inputs, standard normal (whiten others first, or give their density).
        y: (n,) labels.
        transforms: label transforms of the activation and noise, of orders 2 and `order`.
        weights: (n,) sample weights; None for ones.
        num_experts: k <= d.
        order: m, 3 or 4.
        num_restarts: random starts of the tensor power method.
        num_iterations: its iterations from each start.
        num_polar_iterations: iterations of the polar refinement that ends it.
        chunk_size: stream the moments over chunks of that many samples.
        log_density: x (d,) -> log p(x), up to a constant, of inputs that are not standard normal; their score tensors are
            its derivatives. The label transforms stay those of a standard normal a_i . x. If a_i . x is not normal, the
            constants c_r differ between experts and need not vanish, and the experts are a start, not an estimate.

    Returns:
        SpectralEstimate. If T2 has non-positive eigenvalues among its top k, their absolute values are used for whitening and
        the status reports it: the experts are then a start, not an estimate.
    """
    return estimate_from_labels(
        key,
        x,
        transformed_labels(transforms, y),
        weights,
        num_experts=num_experts,
        order=order,
        num_restarts=num_restarts,
        num_iterations=num_iterations,
        num_polar_iterations=num_polar_iterations,
        chunk_size=chunk_size,
        log_density=log_density,
    )


def estimate_from_labels(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    labels: SpectralLabels,
    weights: Float[jax.Array, " n"] | None = None,
    added: TensorPart | None = None,
    *,
    num_experts: int,
    order: int,
    num_restarts: int = 16,
    num_iterations: int = 30,
    num_polar_iterations: int = 8,
    chunk_size: int | None = None,
    log_density: LogDensity | None = None,
) -> SpectralEstimate:
    """`spectral_estimate` from labels that are already transformed; a part may be added to their moments."""
    streaming = {"chunk_size": chunk_size}
    if log_density is None:
        moment = second_moment(x, labels.second, weights, **streaming)
    else:
        moment = score_second_moment(x, labels.second, weights, log_density=log_density, **streaming)
    if added is not None:
        moment = moment + added.contracted(None, 2)
    finite = jnp.isfinite(moment).all()
    eigenvalues, eigenvectors = eigh(jnp.where(finite, moment, jnp.eye(x.shape[1], dtype=x.dtype)))
    return estimate_from_eigenpairs(
        key,
        x,
        labels,
        eigenvalues[::-1],
        eigenvectors[:, ::-1][:, :num_experts],
        finite,
        weights,
        added,
        order=order,
        num_restarts=num_restarts,
        num_iterations=num_iterations,
        num_polar_iterations=num_polar_iterations,
        chunk_size=chunk_size,
        log_density=log_density,
    )


def estimate_from_eigenpairs(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    labels: SpectralLabels,
    eigenvalues: Float[jax.Array, " r"],
    basis: Float[jax.Array, "d k"],
    finite: Bool[jax.Array, ""] | bool = True,
    weights: Float[jax.Array, " n"] | None = None,
    added: TensorPart | None = None,
    *,
    order: int,
    num_restarts: int = 16,
    num_iterations: int = 30,
    num_polar_iterations: int = 8,
    chunk_size: int | None = None,
    log_density: LogDensity | None = None,
) -> SpectralEstimate:
    """`estimate_from_labels` from the eigenvalues (r,) of T2, decreasing, and the eigenvectors (d, k) of the first k.

    `finite` () bool is true if T2 is finite. The other arguments are those of `spectral_estimate`.
    """
    streaming = {"chunk_size": chunk_size}
    top_values = eigenvalues[: basis.shape[1]]
    floor = 1e-3 * jnp.maximum(jnp.abs(eigenvalues).max(), jnp.finfo(x.dtype).tiny)
    scales = jnp.sqrt(jnp.maximum(jnp.abs(top_values), floor))
    whitening = basis / scales[None]
    if log_density is None:
        tensor = whitened_moment(x, labels.high, whitening, weights, order=order, **streaming)
    else:
        tensor = score_whitened_moment(
            x, labels.high, whitening, weights, order=order, log_density=log_density, **streaming
        )
    if added is not None:
        tensor = tensor + added.contracted(whitening, order)
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
    if labels.first is not None:
        # E[l1(y) S_1(x)] = sum_i E[P_i] a_i: in the dual basis its coordinates are the mixing weights, which are positive
        if log_density is None:
            first = first_moment(x, labels.first, weights)
        else:
            first = score_first_moment(x, labels.first, weights, log_density=log_density, **streaming)
        if added is not None:
            first = first + added.contracted(None, 1)
        sign = jnp.sign(decomposition.eigenvectors @ (whitening.T @ first))
        experts = experts * jnp.where(sign == 0, 1.0, sign)[:, None]
    values = decomposition.eigenvalues
    mixing_weights = jnp.sum(unwhitened**2, axis=1)
    status = jnp.where(
        jnp.any(decomposition.status == Status.TENSOR_NOT_CONVERGED), Status.TENSOR_NOT_CONVERGED, Status.OK
    )
    status = jnp.where(jnp.any(values <= 0), Status.TENSOR_NOT_POSITIVE, status)
    status = jnp.where(top_values[-1] <= 0, Status.RANK_DEFICIENT, status)
    status = jnp.where(finite, status, Status.NOT_FINITE).astype(jnp.int32)
    return SpectralEstimate(experts, mixing_weights, eigenvalues, decomposition, status)
