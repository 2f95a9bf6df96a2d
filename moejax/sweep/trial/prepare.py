"""Conversion of settings to the static and the traced part of a trial."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moejax.methods.method import Start
from moejax.methods.preparation import choose_orders, third_transform_at, transforms_at
from moejax.model.activations import get_activation
from moejax.model.instances import InstanceScales
from moejax.model.metrics import Metric, registered_metrics
from moejax.moments.label_transforms import LabelTransform, TransformKind
from moejax.moments.spectral import SpectralTransforms
from moejax.registry import State, registered_state
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings, norms_of_experts

SMALLEST_PADDED = 256


@dataclasses.dataclass(frozen=True)
class TrialSpec:
    """The static part of a trial: equal specs share a compiled program."""

    method: str
    activation: str
    dim: int
    num_experts: int
    padded_num_samples: int
    """At least num_samples; additional samples have weight zero."""
    input_distribution: str
    fit_activation: str
    fit_num_experts: int
    noise_knowledge: str
    transform: TransformKind | None
    """Kind of the transforms made in the trial if it estimates the noise; with known noise they are traced tables of any kind."""
    orders: tuple[int, ...]
    """Orders of the tensors that are decomposed, the best first; empty if the method uses no moments."""
    num_restarts: int
    num_starts: int | None
    start: Start
    polish: bool
    max_iterations: int
    record_history: bool
    record_path: bool
    registered: State
    """State of the registries, so that a name with a different function gives a different program."""
    metrics: tuple[tuple[str, Metric], ...] = ()
    """Registered metrics, by name."""
    third: bool = False
    """True if the third moment is decomposed without whitening."""


class Hyperparameters(NamedTuple):
    """The traced part of a trial, which never causes a compilation."""

    num_samples: np.ndarray | jax.Array
    """() int32"""
    scales: InstanceScales[Any]
    transforms: tuple[SpectralTransforms, ...]
    """Transforms for each order at the known noise; empty if the trial estimates the noise."""
    third: LabelTransform[Any] | None = None
    """Transform of a third moment without whitening, at the known noise."""


def static_spec(
    data: DataSettings, algorithm: AlgorithmSettings, padded_num_samples: int | None = None
) -> TrialSpec:
    """The static part of a trial, which determines its program.

    Args:
        data: data settings of the cell.
        algorithm: algorithm settings of the cell.
        padded_num_samples: the compiled sample size; None: the next power of two, and at least SMALLEST_PADDED.

    Raises:
        ValueError: the fitted activation has no usable order at this noise.
    """
    return _static_spec(
        data.activation,
        data.dim,
        data.num_experts,
        data.num_samples,
        padded_num_samples or max(SMALLEST_PADDED, 2 ** math.ceil(math.log2(data.num_samples))),
        data.input_distribution,
        data.noise_std,
        algorithm,
        registered_state(),
        tuple(registered_metrics().items()),
    )


@functools.lru_cache(maxsize=8192)  # the cells of a sweep share few values
def _static_spec(
    activation: str,
    dim: int,
    num_experts: int,
    num_samples: int,
    padded_num_samples: int,
    input_distribution: str,
    noise_std: float,
    algorithm: AlgorithmSettings,
    registered: State,
    metrics: tuple[tuple[str, Metric], ...],
) -> TrialSpec:
    fit_activation = algorithm.fit_activation or activation
    fit_num_experts = num_experts if algorithm.fit_num_experts is None else algorithm.fit_num_experts
    orders, _, third = choose_orders(
        algorithm.method,
        fit_activation,
        noise_std,
        num_rows=num_samples,
        dim=dim,
        num_experts=fit_num_experts,
        order=algorithm.order,
        kind=cast(TransformKind, algorithm.transform),
    )
    return TrialSpec(
        method=algorithm.method,
        activation=activation,
        dim=dim,
        num_experts=num_experts,
        padded_num_samples=padded_num_samples,
        input_distribution=input_distribution,
        fit_activation=fit_activation,
        fit_num_experts=fit_num_experts,
        noise_knowledge=algorithm.noise_knowledge,
        transform=cast(TransformKind, algorithm.transform)
        if algorithm.noise_knowledge == "estimated"
        else None,
        orders=orders,
        num_restarts=algorithm.num_restarts,
        num_starts=algorithm.num_starts,
        start=cast(Start, algorithm.start),
        polish=algorithm.polish,
        max_iterations=algorithm.max_iterations,
        record_history="history" in algorithm.record,
        record_path="path" in algorithm.record,
        registered=registered,
        metrics=metrics,
        third=third,
    )


def prepare(
    data: DataSettings, algorithm: AlgorithmSettings, padded_num_samples: int | None = None
) -> tuple[TrialSpec, Hyperparameters]:
    """The static and the traced part of a cell's trials; label transforms are made here, once for a noise level.

    The arguments are those of `static_spec`.

    Raises:
        ValueError: the fitted activation has no usable order at this noise.
    """
    spec = static_spec(data, algorithm, padded_num_samples)
    dtype = jnp.result_type(float)
    transforms: tuple[SpectralTransforms, ...] = ()
    third = None
    if spec.noise_knowledge == "known":
        if spec.third:
            third = third_transform_at(
                get_activation(spec.fit_activation), data.noise_std, spec.fit_num_experts
            )
        transforms = transforms_at(
            get_activation(spec.fit_activation),
            data.noise_std,
            spec.orders,
            cast(TransformKind, algorithm.transform),
            spec.fit_num_experts,
        )
    scales = InstanceScales(
        noise_std=np.asarray(data.noise_std, dtype),
        gating_norm=np.asarray(data.gating_norm, dtype),
        gating_angle=np.asarray(data.gating_angle, dtype),
        expert_correlation=np.asarray(data.expert_correlation, dtype),
        expert_norms=np.asarray(norms_of_experts(data), dtype),
    )
    return spec, Hyperparameters(np.asarray(data.num_samples, np.int32), scales, transforms, third)


def trial_memory_bytes(spec: TrialSpec) -> int:
    """Estimated peak working memory of one trial, in bytes at the default precision."""
    itemsize = jnp.dtype(jnp.result_type(float)).itemsize
    k, d = spec.fit_num_experts, spec.dim
    chunk = min(spec.padded_num_samples, 16384)
    per_sample = 3 * d + 12 * k + k**2
    in_chunk = (d + 1) * (d + 2) // 2 + 6 * (3 * k) ** 2
    return itemsize * (spec.padded_num_samples * per_sample + chunk * in_chunk + 2**18)
