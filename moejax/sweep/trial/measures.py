"""The errors that are measured in a trial."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moejax.checks import require
from moejax.model.family import Channel, channel_facts
from moejax.model.metrics import (
    align,
    bottleneck_assignment,
    expert_distances,
    gating_error,
    match_experts,
    registered_metrics,
)
from moejax.model.mixture import MoEParams
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings

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
NUM_HELD_OUT = 2048
"""Fresh samples on which the held-out log-likelihood and the predictive error are measured."""


def metric_names() -> tuple[str, ...]:
    """Columns of metrics: the built-in ones, then the registered ones.

    Raises:
        ValueError: a registered name is that of another column.
    """
    names = tuple(registered_metrics())
    fields = {field.name for kind in (DataSettings, AlgorithmSettings) for field in dataclasses.fields(kind)}
    taken = fields | set(METRICS) | {"cell", "trial", "status", "reason", "digest"}
    for name in names:
        require(name not in taken, "metric", "a name that no other column has", name)
    return METRICS + names


def errors_along(path: MoEParams, truth: MoEParams, fn: Channel) -> jax.Array:
    """(h, 2): recovery and gating error of parameters with leaves (h, ..); NaN if those are."""
    unused = truth.noise_std

    def errors(params: MoEParams) -> jax.Array:
        recovery, gating, _ = recovery_metrics(truth, params, unused, jnp.zeros_like(params.noise_std), fn)
        return jnp.where(jnp.isfinite(params.experts).all(), jnp.stack([recovery, gating]), jnp.nan)

    return jax.lax.map(errors, path)


def recovery_metrics(
    truth: MoEParams, fitted: MoEParams, true_mixing: jax.Array, mixing_weights: jax.Array, fn: Channel
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(recovery, gating, mixing) errors; all NaN if fewer experts were fitted than are true, the last two also if more were.

    The mixing error is the total variation distance of the estimated E[P_i] (k',) from the mean of the true gates over the
    sample (k,).
    """
    even = channel_facts(fn).parity == "even"
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
