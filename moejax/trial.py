"""One trial: (key, hyperparameters, static spec) -> TrialResult; and the settings a sweep may vary.

A trial draws a random mixture of experts and a sample from it, fits the sample with one method and measures
the recovery. `DataSettings` and `AlgorithmSettings` are what a user writes down; `prepare` turns them, on the
host, into a static `TrialSpec` (one compiled program each) and the traced `Hyperparameters` (data: they never
cost a compilation).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moejax.activations import ScalarFunction, activation_facts, get_activation
from moejax.design import sample_blocks, sum_over_blocks
from moejax.environment import PRNG
from moejax.inputs import get_input_distribution
from moejax.label_transforms import (
    TRANSFORM_KINDS,
    TransformKind,
    choose_order,
    transform_noise_std,
    why_unusable,
)
from moejax.methods import (
    METHOD_STATUS,
    STARTS,
    MethodConfig,
    Problem,
    Start,
    get_method,
    lookup_method,
    moments_of,
    require_slopes,
)
from moejax.metrics import (
    Metric,
    Recovery,
    align,
    bottleneck_assignment,
    expert_distances,
    gating_error,
    match_experts,
    registered_metrics,
)
from moejax.model import (
    InstanceScales,
    MoEParams,
    gate_logits,
    log_likelihood_per_sample,
    predict,
    random_params,
    sample_labels,
    with_stand_ins,
)
from moejax.noise import estimate_noise_std
from moejax.registry import State, registered_state
from moejax.spectral import SpectralTransforms, host_transforms, traced_transforms

METRICS = (
    "recovery_error",
    "gating_error",
    "mixing_error",
    "noise_error",
    "log_likelihood_per_sample",
    "held_out_log_likelihood",
    "predictive_rmse",
    "num_iterations",
)
STATUS_REASONS = METHOD_STATUS
NUM_HELD_OUT = 2048
"""Fresh samples on which the held-out log-likelihood and the predictive error are measured."""
SMALLEST_PADDED = 256
SAMPLING_BLOCK = 2048
"""Samples drawn with one key, whatever the device and the padding; it divides NUM_HELD_OUT."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataSettings:
    """What the truth is and how the data are drawn. Every field can be an axis of a sweep."""

    activation: str = "linear"
    dim: int = 10
    num_experts: int = 3
    num_samples: int = 10_000
    noise_std: float = 0.1
    gating_norm: float = 1.0
    gating_angle: float = 90.0
    """Angle in degrees between each gate and the span of the experts; 90 is orthogonal."""
    expert_correlation: float = 0.0
    """Cosine between every two experts."""
    expert_norms: float | tuple[float, ...] = 1.0
    """One norm for all experts, or one for each."""
    input_distribution: str = "standard_normal"


@dataclasses.dataclass(frozen=True, slots=True)
class AlgorithmSettings:
    """How a sample is fitted. Methods and algorithm fields of one instance share the same data."""

    method: str = "spectral_em"
    fit_activation: str | None = None
    """The activation that is fitted; None: the true one."""
    fit_num_experts: int | None = None
    noise_knowledge: str = "known"
    """"known" or "estimated"."""
    transform: str = "weighted"
    order: int | None = None
    """Order of the tensor that is decomposed, 3 or 4; None: the usable one with the least standard error."""
    num_restarts: int = 16
    """Restarts of the tensor power method."""
    num_starts: int | None = None
    """Random starts of a method that uses them (of the loss, for gated_losses); None: its own default."""
    start: str = "random"
    """Where joint_em starts: "random" (unit-sphere experts) or "kmeans" (clusterwise regression from there)."""
    polish: bool = True
    max_iterations: int = 100
    """Budget of the method's iterations (EM steps of joint_em, passes of gradient descent, Newton steps of a polish)."""
    record: tuple[str, ...] = ()
    """Extra results: "history" of the objective (`methods.MethodResult`), "path" of the errors along it."""


@dataclasses.dataclass(frozen=True)
class TrialSpec:
    """What is static in a trial: equal specs share a compiled program."""

    method: str
    activation: str
    dim: int
    num_experts: int
    padded_num_samples: int
    """At least num_samples: the samples beyond have weight zero."""
    input_distribution: str
    fit_activation: str
    fit_num_experts: int
    noise_knowledge: str
    transform: TransformKind | None
    """Of the transforms made in the trial, where the noise is estimated; those of a known noise are traced tables of any kind."""
    order: int
    num_restarts: int
    num_starts: int | None
    start: Start
    polish: bool
    max_iterations: int
    record_history: bool
    record_path: bool
    registered: State
    """So that a name given to another function is another program."""
    metrics: tuple[tuple[str, Metric], ...] = ()
    """Registered metrics, by name."""


class Hyperparameters(NamedTuple):
    """What is traced in a trial: it never costs a compilation."""

    num_samples: np.ndarray | jax.Array
    """() int32"""
    scales: InstanceScales
    transforms: SpectralTransforms | None
    """Of the known noise; None where the method uses none, there is no usable order, or the noise is estimated in the trial."""


class TrialResult(NamedTuple):
    """Measured recovery of one trial; NaN where a quantity is not defined (experts fitted fewer than true)."""

    recovery_error: jax.Array
    gating_error: jax.Array
    mixing_error: jax.Array
    noise_error: jax.Array
    log_likelihood_per_sample: jax.Array
    held_out_log_likelihood: jax.Array
    predictive_rmse: jax.Array
    status: jax.Array
    """int32, a key of STATUS_REASONS; 0 is ok."""
    num_iterations: jax.Array
    """int32 passes over the data, those of pilots, moments and every start included."""
    history: jax.Array | None
    """(h,) where `record` asks for it; NaN once a stage has converged."""
    path: jax.Array | None
    """(h, 2) where `record` asks for it: the recovery and the gating error at every pass of `history`; NaN where that is."""
    registered: dict[str, jax.Array]
    """() of every registered metric."""


def metric_names() -> tuple[str, ...]:
    """Columns of metrics: the built-in ones, then those that were registered.

    Raises:
        ValueError: a registered name is that of another column.
    """
    names = tuple(registered_metrics())
    fields = {field.name for kind in (DataSettings, AlgorithmSettings) for field in dataclasses.fields(kind)}
    taken = fields | set(METRICS) | {"cell", "trial", "status", "reason", "digest"}
    for name in names:
        _require(name not in taken, "metric", "a name that no other column has", name)
    return METRICS + names


def check_settings(data: DataSettings, algorithm: AlgorithmSettings) -> None:
    """Refuse settings that cannot be run.

    Raises:
        ValueError: "FIELD: expected .., got ..", one line.
    """
    _check_data(data)
    _check_algorithm(algorithm)
    num_fitted = _num_fitted(data, algorithm)
    _require(1 <= num_fitted <= data.dim, "fit_num_experts", f"1 to dim = {data.dim}", num_fitted)
    needed = num_parameters(num_fitted, data.dim) + 1
    _require(
        data.num_samples >= needed,
        "num_samples",
        f"at least {needed} for k = {num_fitted}, d = {data.dim}",
        data.num_samples,
    )
    fitted, field = algorithm.fit_activation or data.activation, "fit_" if algorithm.fit_activation else ""
    try:
        require_slopes(algorithm.method, fitted, polish=algorithm.polish)
    except ValueError as error:
        raise ValueError(f"{field}{error}") from None


@functools.lru_cache(maxsize=1024)  # a sweep asks for every method of the same data
def _check_data(data: DataSettings) -> None:
    for field in ("dim", "num_experts", "num_samples"):
        _require(getattr(data, field) >= 1, field, "a positive number", getattr(data, field))
    _require(data.num_experts <= data.dim, "num_experts", f"at most dim = {data.dim}", data.num_experts)
    noise_std, gating_norm = data.noise_std, data.gating_norm
    _require(math.isfinite(noise_std) and noise_std > 0, "noise_std", "a positive finite number", noise_std)
    _require(math.isfinite(gating_norm) and gating_norm >= 0, "gating_norm", "a number >= 0", gating_norm)
    _require(0 <= data.gating_angle <= 90, "gating_angle", "degrees from 0 to 90", data.gating_angle)
    _require(
        data.dim > data.num_experts
        or data.gating_angle == 0
        or data.gating_norm == 0
        or data.num_experts == 1,
        "gating_angle",
        "0 where dim = num_experts (nothing is orthogonal to the experts' span)",
        data.gating_angle,
    )
    lowest = -1.0 / max(data.num_experts - 1, 1)
    _require(
        lowest < data.expert_correlation < 1,
        "expert_correlation",
        f"between {lowest:.3g} and 1",
        data.expert_correlation,
    )
    norms = _expert_norms(data)
    _require(
        len(norms) == data.num_experts, "expert_norms", f"one number or {data.num_experts}", data.expert_norms
    )
    _require(
        all(math.isfinite(v) and v > 0 for v in norms), "expert_norms", "positive numbers", data.expert_norms
    )
    get_activation(data.activation)
    get_input_distribution(data.input_distribution)


@functools.lru_cache(maxsize=1024)
def _check_algorithm(algorithm: AlgorithmSettings) -> None:
    if algorithm.fit_activation is not None:
        try:
            get_activation(algorithm.fit_activation)
        except ValueError as error:
            raise ValueError(f"fit_{error}") from None
    get_method(algorithm.method)
    known = ("known", "estimated")
    _require(
        algorithm.noise_knowledge in known, "noise_knowledge", " or ".join(known), algorithm.noise_knowledge
    )
    _require(
        algorithm.transform in TRANSFORM_KINDS,
        "transform",
        f"one of {', '.join(TRANSFORM_KINDS)}",
        algorithm.transform,
    )
    _require(algorithm.order in (None, 3, 4), "order", "3 or 4", algorithm.order)
    for field in ("num_restarts", "num_starts", "max_iterations"):
        value = getattr(algorithm, field)
        _require(value is None or value >= 1, field, "a positive number", value)
    _require(algorithm.start in STARTS, "start", " or ".join(STARTS), algorithm.start)
    _require(
        set(algorithm.record) <= {"history", "path"},
        "record",
        'a list of "history" and "path"',
        list(algorithm.record),
    )


def _require(good: bool, field: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")


def _num_fitted(data: DataSettings, algorithm: AlgorithmSettings) -> int:
    return data.num_experts if algorithm.fit_num_experts is None else algorithm.fit_num_experts


def _expert_norms(data: DataSettings) -> tuple[float, ...]:
    if isinstance(data.expert_norms, int | float):
        return (float(data.expert_norms),) * data.num_experts
    return tuple(data.expert_norms)


def num_parameters(num_experts: int, dim: int) -> int:
    """Free parameters without biases: experts, gates but one, one noise level."""
    return (2 * num_experts - 1) * dim + 1


@functools.lru_cache(maxsize=8192)
def _order(
    activation: str,
    noise_std: float,
    algorithm: AlgorithmSettings,
    dim: int,
    num_experts: int,
    registered: State,
) -> int:
    """The order that the algorithm decomposes; 0 where it uses no moments.

    Raises:
        ValueError: there is no usable one, and the method cannot do without.
    """
    moments = moments_of(algorithm.method)
    if moments == "none":
        return 0
    fn = get_activation(activation)
    noise_std = transform_noise_std(fn, noise_std)
    order = lookup_method(algorithm.method).order or algorithm.order
    if order is not None:
        reason = why_unusable(fn, noise_std, 2) or why_unusable(fn, noise_std, order)
        if reason:
            raise ValueError(
                f"order: {activation} at noise_std {noise_std:g} has no usable order {order}: {reason}"
            )
        return order
    choice = choose_order(fn, noise_std, kind=algorithm.transform, dim=dim, num_experts=num_experts)
    if choice.order is None and moments == "required":
        raise ValueError(
            f"activation: {activation} at noise_std {noise_std:g} has no usable order: {choice.reason}"
        )
    return choice.order or 0


def static_spec(
    data: DataSettings, algorithm: AlgorithmSettings, padded_num_samples: int | None = None
) -> TrialSpec:
    """The static part of a trial: what is compiled.

    Args:
        data: of the cell.
        algorithm: of the cell.
        padded_num_samples: the compiled sample size; None: the next power of two, and at least SMALLEST_PADDED.

    Raises:
        ValueError: the fitted activation has no usable order at this noise.
    """
    return _static_spec(
        data.activation,
        data.dim,
        data.num_experts,
        padded_num_samples or max(SMALLEST_PADDED, 2 ** math.ceil(math.log2(data.num_samples))),
        data.input_distribution,
        data.noise_std,
        algorithm,
        registered_state(),
        tuple(registered_metrics().items()),
    )


@functools.lru_cache(maxsize=8192)  # the cells of a sweep share few
def _static_spec(
    activation: str,
    dim: int,
    num_experts: int,
    padded_num_samples: int,
    input_distribution: str,
    noise_std: float,
    algorithm: AlgorithmSettings,
    registered: State,
    metrics: tuple[tuple[str, Metric], ...],
) -> TrialSpec:
    fit_activation = algorithm.fit_activation or activation
    fit_num_experts = num_experts if algorithm.fit_num_experts is None else algorithm.fit_num_experts
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
        order=_order(fit_activation, noise_std, algorithm, dim, fit_num_experts, registered),
        num_restarts=algorithm.num_restarts,
        num_starts=algorithm.num_starts,
        start=cast(Start, algorithm.start),
        polish=algorithm.polish,
        max_iterations=algorithm.max_iterations,
        record_history="history" in algorithm.record,
        record_path="path" in algorithm.record,
        registered=registered,
        metrics=metrics,
    )


def prepare(
    data: DataSettings, algorithm: AlgorithmSettings, padded_num_samples: int | None = None
) -> tuple[TrialSpec, Hyperparameters]:
    """The static and the traced part of a cell's trials; label transforms are made here, once for a noise level.

    Arguments are those of `static_spec`.

    Raises:
        ValueError: the fitted activation has no usable order at this noise.
    """
    spec = static_spec(data, algorithm, padded_num_samples)
    dtype = jnp.result_type(float)
    transforms = None
    if spec.order and spec.noise_knowledge == "known":
        transforms = host_transforms(
            spec.fit_activation,
            data.noise_std,
            spec.order,
            cast(TransformKind, algorithm.transform),
            spec.fit_num_experts,
        )
        transforms = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), transforms)
    scales = InstanceScales(
        noise_std=np.asarray(data.noise_std, dtype),
        gating_norm=np.asarray(data.gating_norm, dtype),
        gating_angle=np.asarray(data.gating_angle, dtype),
        expert_correlation=np.asarray(data.expert_correlation, dtype),
        expert_norms=np.asarray(_expert_norms(data), dtype),
    )
    return spec, Hyperparameters(np.asarray(data.num_samples, np.int32), scales, transforms)


def run_trial(key: jax.Array, hyperparameters: Hyperparameters, *, spec: TrialSpec) -> TrialResult:
    """One trial, pure: an instance and a sample from the key, a fit, and its errors.

    Args:
        key: of the trial; methods given the same key see the same data.
        hyperparameters: traced scales, sample size and label transforms.
        spec: static.
    """
    instance_key, sample_key, method_key = jax.random.split(key, 3)
    scales = hyperparameters.scales
    dtype = scales.expert_norms.dtype
    truth = random_params(instance_key, scales, spec.dim)
    x, y, held_out_x, held_out_y = _draw(sample_key, truth, hyperparameters.num_samples, spec)
    in_sample = jnp.arange(spec.padded_num_samples, dtype=jnp.int32) < hyperparameters.num_samples
    weights = in_sample.astype(dtype)
    x, y = with_stand_ins(weights, x, y)

    fn = get_activation(spec.fit_activation)
    transforms, noise_std = hyperparameters.transforms, scales.noise_std
    if spec.noise_knowledge == "estimated":
        smallest = transform_noise_std(fn, 0.0)
        largest = transform_noise_std(fn, math.inf)
        noise_std = estimate_noise_std(y, weights, fn=fn, smallest=smallest, largest=largest)
        if spec.order and spec.transform is not None:
            transforms = traced_transforms(fn, noise_std, spec.order, spec.transform, spec.fit_num_experts)
    config = MethodConfig(
        fn=fn,
        num_experts=spec.fit_num_experts,
        order=spec.order,
        noise="known" if spec.noise_knowledge == "known" else "shared",
        num_restarts=spec.num_restarts,
        num_starts=spec.num_starts,
        start=spec.start,
        polish=spec.polish,
        max_iterations=spec.max_iterations,
        record_path=spec.record_path,
    )
    fitted = get_method(spec.method)(method_key, Problem(x, y, weights, noise_std, transforms), config)
    blocks = sample_blocks(x, y, weights, fit_intercept=False)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = jax.nn.softmax(gate_logits(truth, design.T).T, axis=0)
        return log_likelihood_per_sample(fitted.params, design.T, y, fn) @ weights, gates @ weights

    total = weights.sum()
    log_likelihood, gate_sums = sum_over_blocks(sums_of, blocks)
    held_out = log_likelihood_per_sample(fitted.params, held_out_x, held_out_y, fn)
    error = predict(fitted.params, held_out_x, fn) - held_out_y
    recovery, gating, mixing = recovery_metrics(
        truth, fitted.params, gate_sums / total, fitted.mixing_weights, fn
    )
    return TrialResult(
        recovery_error=recovery,
        gating_error=gating,
        mixing_error=mixing,
        noise_error=jnp.sqrt(jnp.mean((fitted.params.noise_std / scales.noise_std - 1.0) ** 2)),
        log_likelihood_per_sample=log_likelihood / total,
        held_out_log_likelihood=held_out.mean(),
        predictive_rmse=jnp.sqrt(jnp.mean(error**2)),
        status=fitted.status,
        num_iterations=fitted.num_iterations,
        history=fitted.history if spec.record_history else None,
        path=None if fitted.path is None else _errors_along(fitted.path, truth, fn),
        registered=_registered(
            spec, Recovery(truth, fitted.params, fitted.mixing_weights, held_out_x, held_out_y)
        ),
    )


def _registered(spec: TrialSpec, recovery: Recovery) -> dict[str, jax.Array]:
    values = {name: metric(recovery, get_activation(spec.fit_activation)) for name, metric in spec.metrics}
    for name, value in values.items():
        _require(jnp.shape(value) == (), f"metric {name}", "one number for a trial", jnp.shape(value))
    return values


def _errors_along(path: MoEParams, truth: MoEParams, fn: ScalarFunction) -> jax.Array:
    """(h, 2): recovery and gating error of parameters with leaves (h, ..); NaN where those are."""
    unused = truth.noise_std

    def errors(params: MoEParams) -> jax.Array:
        recovery, gating, _ = recovery_metrics(truth, params, unused, jnp.zeros_like(params.noise_std), fn)
        return jnp.where(jnp.isfinite(params.experts).all(), jnp.stack([recovery, gating]), jnp.nan)

    return jax.lax.map(errors, path)


def _draw(
    key: jax.Array, truth: MoEParams, num_samples: jax.Array | np.ndarray, spec: TrialSpec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, y of the padded sample, then of the held-out one; drawn in blocks, each with its own key.

    On a CPU a loop draws the blocks that have samples, and the rest stay zero; elsewhere all are drawn side by side.
    """
    num_held_out = NUM_HELD_OUT // SAMPLING_BLOCK
    num_blocks = num_held_out + -(-spec.padded_num_samples // SAMPLING_BLOCK)
    sampler, dtype = get_input_distribution(spec.input_distribution), truth.experts.dtype

    def draw(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        input_key, label_key = jax.random.split(jax.random.fold_in(key, block))
        x = sampler(input_key, SAMPLING_BLOCK, spec.dim, dtype)
        return x, sample_labels(label_key, truth, spec.activation, x)[0]

    def put(block: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(lambda all_blocks, new: all_blocks.at[block].set(new), drawn, draw(block))

    if jax.default_backend() == "cpu":
        nothing = (
            jnp.zeros((num_blocks, SAMPLING_BLOCK, spec.dim), dtype),
            jnp.zeros((num_blocks, SAMPLING_BLOCK), dtype),
        )
        num_used = num_held_out + (num_samples + SAMPLING_BLOCK - 1) // SAMPLING_BLOCK
        x, y = jax.lax.fori_loop(0, num_used, put, nothing)
    else:
        x, y = jax.vmap(draw)(jnp.arange(num_blocks))
    x, y = x.reshape(-1, spec.dim), y.reshape(-1)
    sample = slice(NUM_HELD_OUT, NUM_HELD_OUT + spec.padded_num_samples)
    return x[sample], y[sample], x[:NUM_HELD_OUT], y[:NUM_HELD_OUT]


def recovery_metrics(
    truth: MoEParams, fitted: MoEParams, true_mixing: jax.Array, mixing_weights: jax.Array, fn: ScalarFunction
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(recovery, gating, mixing) errors; NaN where fewer experts were fitted than are true, the last two where more were.

    The mixing error is the total variation distance of the estimated E[P_i] (k',) from the mean of the true gates over the
    sample (k,).
    """
    even = activation_facts(fn).parity == "even"
    num_true, num_fitted = truth.experts.shape[0], fitted.experts.shape[0]
    nothing = jnp.full((), jnp.nan, truth.experts.dtype)
    if num_fitted < num_true:
        return nothing, nothing, nothing
    recovery, _ = bottleneck_assignment(expert_distances(truth.experts, fitted.experts, even))
    if num_fitted > num_true:
        return recovery, nothing, nothing
    permutation = match_experts(truth.experts, fitted.experts, even)
    mixing = 0.5 * jnp.abs(true_mixing - mixing_weights[permutation]).sum()
    return recovery, gating_error(truth, align(truth, fitted, even)), mixing


@functools.partial(jax.jit, static_argnames=("spec", "vmap_width"))
def _run_trials(
    key_data: jax.Array, hyperparameters: Hyperparameters, spec: TrialSpec, vmap_width: int
) -> TrialResult:
    def run(inputs):
        key_data, hyperparameters = inputs
        with jax.default_matmul_precision("highest"):
            return run_trial(jax.random.wrap_key_data(key_data, impl=PRNG), hyperparameters, spec=spec)

    return jax.lax.map(run, (key_data, hyperparameters), batch_size=None if vmap_width == 1 else vmap_width)


def run_trials(
    keys: jax.Array, hyperparameters: Hyperparameters, spec: TrialSpec, vmap_width: int = 1
) -> TrialResult:
    """t trials of one spec in one compiled program: a loop over batches of `vmap_width` trials side by side.

    Args:
        keys: (t,) typed keys, or (t, 2) uint32 key data of JAX or NumPy.
        hyperparameters: stacked, each leaf with leading axis t.
        spec: static.
        vmap_width: 1 is fastest on a CPU, where an early stop then skips work; wide on an accelerator.

    Returns:
        TrialResult of (t,) arrays.
    """
    key_data = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
    return _run_trials(key_data, hyperparameters, spec, vmap_width)


def trial_memory_bytes(spec: TrialSpec) -> int:
    """Estimated peak working memory of one trial, in bytes at the default precision."""
    itemsize = jnp.dtype(jnp.result_type(float)).itemsize
    k, d = spec.fit_num_experts, spec.dim
    chunk = min(spec.padded_num_samples, 16384)
    per_sample = 3 * d + 12 * k + k**2
    in_chunk = (d + 1) * (d + 2) // 2 + 6 * (3 * k) ** 2
    return itemsize * (spec.padded_num_samples * per_sample + chunk * in_chunk + 2**18)
