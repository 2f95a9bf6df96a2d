"""One trial: (key, hyperparameters, static spec) -> TrialResult.

A trial draws a random mixture of experts and a sample from it, fits the sample with one method and measures
the recovery. A user gives `DataSettings` and `AlgorithmSettings`; `prepare` converts them, on the
host, to a static `TrialSpec` (one compiled program each) and the traced `Hyperparameters` (data, which never
cause a compilation).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.environment import PRNG, runs_on_cpu
from moejax.likelihood.blocks import sample_blocks, sum_over_blocks
from moejax.methods.method import MethodConfig, MethodResult, Problem, get_method
from moejax.methods.preparation import third_transform_at, transforms_at
from moejax.model.families import channel_of
from moejax.model.family import Family, Nuisances, as_family
from moejax.model.inputs import get_input_distribution
from moejax.model.instances import random_params
from moejax.model.metrics import Recovery
from moejax.model.mixture import (
    MoEParams,
    gate_logits,
    log_likelihood_per_sample,
    predict,
    sample_labels,
    with_stand_ins,
)
from moejax.model.status import Status
from moejax.moments.marginal import estimate_nuisances
from moejax.moments.noise import estimate_noise_std
from moejax.sweep.trial.measures import NUM_HELD_OUT, errors_along, recovery_metrics
from moejax.sweep.trial.prepare import Hyperparameters, TrialSpec

STATUS_REASONS = {int(status): status.words for status in Status}
OUTLIER_STD = 10.0
"""Standard deviation of the normal labels that replace others."""
SAMPLING_BLOCK = 2048
"""Samples drawn with one key, on any device and with any padding; it divides NUM_HELD_OUT."""


class TrialResult(NamedTuple):
    """Measured recovery of one trial; NaN if a quantity is not defined (fewer fitted experts than true ones)."""

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
    """int32 passes over the data, including those of pilots, moments and every start."""
    history: jax.Array | None
    """(h,) if `record` asks for it; NaN once a stage has converged."""
    path: jax.Array | None
    """(h, 2) if `record` asks for it: the recovery and the gating error at every pass of `history`; NaN where that is NaN."""
    registered: dict[str, jax.Array]
    """() value of every registered metric."""


def run_trial(key: jax.Array, hyperparameters: Hyperparameters, *, spec: TrialSpec) -> TrialResult:
    """One trial, pure: an instance and a sample from the key, a fit, and its errors.

    Args:
        key: PRNG key of the trial; methods with the same key get the same data.
        hyperparameters: traced scales, sample size and label transforms.
        spec: static part of the trial.
    """
    data = draw_trial(key, hyperparameters, spec=spec)
    problem, config = posed(data, hyperparameters, spec=spec)
    fitted = get_method(spec.method)(data.method_key, problem, config)
    return measured(data, fitted, hyperparameters, spec=spec)


class TrialData(NamedTuple):
    """The mixture that a trial draws, and its samples."""

    truth: MoEParams
    method_key: jax.Array
    """PRNG key of the method."""
    x: jax.Array
    """(padded n, d)"""
    y: jax.Array
    """(padded n,)"""
    weights: jax.Array
    """(padded n,) one, or zero for padding."""
    held_out_x: jax.Array
    """(NUM_HELD_OUT, d)"""
    held_out_y: jax.Array
    """(NUM_HELD_OUT,)"""


def draw_trial(key: jax.Array, hyperparameters: Hyperparameters, *, spec: TrialSpec) -> TrialData:
    """The first stage of a trial: its random mixture and samples. Arguments as in `run_trial`."""
    instance_key, sample_key, method_key = jax.random.split(key, 3)
    scales = hyperparameters.scales
    truth = random_params(instance_key, scales, spec.dim)
    x, y, held_out_x, held_out_y = _draw(
        sample_key, truth, hyperparameters.num_samples, hyperparameters.outlier_share, spec
    )
    in_sample = jnp.arange(spec.padded_num_samples, dtype=jnp.int32) < hyperparameters.num_samples
    weights = in_sample.astype(scales.expert_norms.dtype)
    x, y = with_stand_ins(weights, x, y)
    return TrialData(truth, method_key, x, y, weights, held_out_x, held_out_y)


def posed(
    data: TrialData, hyperparameters: Hyperparameters, *, spec: TrialSpec
) -> tuple[Problem, MethodConfig]:
    """The arguments of the trial's method, with label transforms and noise level."""
    fn = channel_of(spec.fit_family, spec.fit_activation)
    transforms, third, scales = hyperparameters.transforms, hyperparameters.third, hyperparameters.scales
    noise_std, nuisances = scales.noise_std, None
    if isinstance(fn, Family):
        nuisances = _nuisances(fn, data, hyperparameters, spec)
        noise_std = nuisances.dispersion
    elif spec.noise_knowledge == "estimated":
        noise_std = estimate_noise_std(data.y, data.weights, fn=fn)
    if spec.noise_knowledge == "estimated":
        level = noise_std if nuisances is None else nuisances
        if spec.transform is not None:
            transforms = transforms_at(fn, level, spec.orders, spec.transform, spec.fit_num_experts)
        if spec.third:
            third = third_transform_at(fn, level, spec.fit_num_experts)
    config = MethodConfig(
        economical=True,
        fn=fn,
        num_experts=spec.fit_num_experts,
        order=spec.orders[0] if spec.orders else 0,
        more_orders=spec.orders[1:],
        noise="known" if spec.noise_knowledge == "known" or not as_family(fn).has_dispersion else "shared",
        fit_intercept=spec.fit_intercept,
        num_restarts=spec.num_restarts,
        num_starts=spec.num_starts,
        start=spec.start,
        polish=spec.polish,
        max_iterations=spec.max_iterations,
        expert_steps=spec.expert_steps,
        record_path=spec.record_path,
    )
    first = transforms[0] if transforms else None
    problem = Problem(data.x, data.y, data.weights, noise_std, first, transforms[1:], nuisances=nuisances)
    return problem._replace(third=third), config


def _nuisances(
    family: Family, data: TrialData, hyperparameters: Hyperparameters, spec: TrialSpec
) -> Nuisances:
    """Norm, intercept and dispersion for the moments and the starts: the true ones, or those of the labels' marginal likelihood."""
    scales = hyperparameters.scales
    norm, one = scales.expert_norms.mean(), jnp.ones_like(scales.noise_std)
    dispersion = scales.noise_std if family.has_dispersion else one
    if spec.noise_knowledge == "known":
        return Nuisances(norm, scales.expert_bias + 0.0 * one, dispersion)
    known = None if family.marginal_tells_norm else norm
    return estimate_nuisances(data.y, data.weights, family=family, norm=known).nuisances


def measured(
    data: TrialData, fitted: MethodResult, hyperparameters: Hyperparameters, *, spec: TrialSpec
) -> TrialResult:
    """The last stage of a trial: the errors of the method's result."""
    fn, truth = channel_of(spec.fit_family, spec.fit_activation), data.truth
    blocks = sample_blocks(data.x, data.y, data.weights, fit_intercept=False)

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = jax.nn.softmax(gate_logits(truth, design.T).T, axis=0)
        return log_likelihood_per_sample(fitted.params, design.T, y, fn) @ weights, gates @ weights

    total = data.weights.sum()
    log_likelihood, gate_sums = sum_over_blocks(sums_of, blocks)
    held_out = log_likelihood_per_sample(fitted.params, data.held_out_x, data.held_out_y, fn)
    error = predict(fitted.params, data.held_out_x, fn) - data.held_out_y
    recovery, gating, mixing = recovery_metrics(
        truth, fitted.params, gate_sums / total, fitted.mixing_weights, fn
    )
    comparable = spec.fit_family == spec.family and as_family(fn).has_dispersion
    noise_ratio = fitted.params.noise_std / hyperparameters.scales.noise_std
    return TrialResult(
        recovery_error=recovery,
        gating_error=gating,
        mixing_error=mixing,
        noise_error=jnp.sqrt(jnp.mean((noise_ratio - 1.0) ** 2))
        if comparable
        else jnp.full_like(error[0], jnp.nan),
        log_likelihood_per_sample=log_likelihood / total,
        held_out_log_likelihood=held_out.mean(),
        predictive_rmse=jnp.sqrt(jnp.mean(error**2)),
        status=fitted.status,
        num_iterations=fitted.num_iterations,
        history=fitted.history if spec.record_history else None,
        path=None if fitted.path is None else errors_along(fitted.path, truth, fn),
        registered=_registered(
            spec,
            Recovery(truth, fitted.params, fitted.mixing_weights, data.held_out_x, data.held_out_y),
        ),
    )


def _registered(spec: TrialSpec, recovery: Recovery) -> dict[str, jax.Array]:
    values = {
        name: metric(recovery, channel_of(spec.fit_family, spec.fit_activation))
        for name, metric in spec.metrics
    }
    for name, value in values.items():
        require(jnp.shape(value) == (), f"metric {name}", "one number for a trial", jnp.shape(value))
    return values


def _draw(
    key: jax.Array,
    truth: MoEParams,
    num_samples: jax.Array | np.ndarray,
    outlier_share: jax.Array | np.ndarray,
    spec: TrialSpec,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, y of the padded sample, then of the held-out one; drawn in blocks, each with its own key.

    On a CPU a loop draws the blocks that have samples, and the others stay zero; elsewhere all are drawn side by side.
    """
    num_held_out = NUM_HELD_OUT // SAMPLING_BLOCK
    num_blocks = num_held_out + -(-spec.padded_num_samples // SAMPLING_BLOCK)
    sampler, dtype = get_input_distribution(spec.input_distribution), truth.experts.dtype
    channel = channel_of(spec.family, spec.activation)

    def draw(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        input_key, label_key = jax.random.split(jax.random.fold_in(key, block))
        x = sampler(input_key, SAMPLING_BLOCK, spec.dim, dtype)
        y = sample_labels(label_key, truth, channel, x)[0]
        if not spec.has_outliers:
            return x, y
        place_key, value_key = jax.random.split(jax.random.fold_in(label_key, 1))
        replaced = jax.random.uniform(place_key, y.shape, y.dtype) < outlier_share
        replaced &= block >= num_held_out
        return x, jnp.where(replaced, OUTLIER_STD * jax.random.normal(value_key, y.shape, y.dtype), y)

    def put(block: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(lambda all_blocks, new: all_blocks.at[block].set(new), drawn, draw(block))

    if runs_on_cpu():
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
        spec: static part of the trial.
        vmap_width: 1 is fastest on a CPU, where an early stop then skips work; wide on an accelerator.

    Returns:
        TrialResult of (t,) arrays.
    """
    key_data = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
    return _run_trials(key_data, hyperparameters, spec, vmap_width)
