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
from moejax.model.families import channel_of, get_family
from moejax.model.family import Nuisances
from moejax.model.instances import InstanceScales
from moejax.model.metrics import Metric, registered_metrics
from moejax.moments.family_transforms import Level
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
    family: str
    fit_family: str
    fit_intercept: bool
    has_outliers: bool
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
    expert_steps: int
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
    outlier_share: np.ndarray | jax.Array
    """()"""
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
        known_level(data, algorithm),
        data.family,
        data.outlier_share > 0,
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
    level: Level,
    family: str,
    has_outliers: bool,
    algorithm: AlgorithmSettings,
    registered: State,
    metrics: tuple[tuple[str, Metric], ...],
) -> TrialSpec:
    fit_activation = algorithm.fit_activation or activation
    fit_num_experts = num_experts if algorithm.fit_num_experts is None else algorithm.fit_num_experts
    fit_family = algorithm.fit_family or family
    orders, _, third = choose_orders(
        algorithm.method,
        channel_of(fit_family, fit_activation),
        level,
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
        family=family,
        fit_family=fit_family,
        fit_intercept=algorithm.fit_intercept,
        has_outliers=has_outliers,
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
        expert_steps=algorithm.expert_steps,
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
            channel = channel_of(spec.fit_family, spec.fit_activation)
            third = third_transform_at(channel, known_level(data, algorithm), spec.fit_num_experts)
        transforms = transforms_at(
            channel_of(spec.fit_family, spec.fit_activation),
            known_level(data, algorithm),
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
        expert_bias=np.asarray(data.expert_bias, dtype),
        gating_bias=np.asarray(data.gating_bias, dtype),
    )
    count, share = np.asarray(data.num_samples, np.int32), np.asarray(data.outlier_share, dtype)
    return spec, Hyperparameters(count, scales, share, transforms, third)


def known_level(data: DataSettings, algorithm: AlgorithmSettings) -> Level:
    """The noise of Gaussian labels that are fitted, or the true nuisances of another family."""
    if (algorithm.fit_family or data.family) == "gaussian":
        return data.noise_std
    family = get_family(algorithm.fit_family or data.family)
    norms = norms_of_experts(data)
    dispersion = float(data.noise_std) if family.has_dispersion else 1.0
    return Nuisances(sum(norms) / len(norms), float(data.expert_bias), dispersion)


def trial_memory_bytes(spec: TrialSpec) -> int:
    """Estimated peak working memory of one trial, in bytes at the default precision."""
    itemsize = jnp.dtype(jnp.result_type(float)).itemsize
    k, d = spec.fit_num_experts, spec.dim
    chunk = min(spec.padded_num_samples, 16384)
    per_sample = 3 * d + 12 * k + k**2
    in_chunk = (d + 1) * (d + 2) // 2 + 6 * (3 * k) ** 2
    return itemsize * (spec.padded_num_samples * per_sample + chunk * in_chunk + 2**18)
