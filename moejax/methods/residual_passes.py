r"""Residual passes make the moment estimate consistent if the gates are not orthogonal to the experts.

In that case E[l(y) S_m(x)] is not sum_i E[P_i] a_i^{(x) m}, and no sample size removes the difference. A pass takes the
gates P_i that gating EM finds with the experts a_i of the previous pass, and decomposes

    T_m = sum_i p_i a_i^{(x) m} + mean[ (l(y) - sum_i P_i(x) h_i(a_i . x)) S_m(x) ],   h_i(z) = E[l(Y) | a_i . x = z],

p_i the mean of P_i. The first term is the moment that these experts should have; only the residual part of the labels is measured.
With the true experts and gates the bracket has expectation zero given x. So the truth is a fixed point for any gates, any
distribution of the inputs and any S_m. Much of the labels' variance is subtracted, so the moments are less noisy even if the plain
ones are consistent.

To first order a pass multiplies the error e_i of an expert by the distance of E[P_i h'(a_i . x) (e_i . x) S_m] from
p_i sym(a_i^{(x) m-1} (x) e_i), which is zero if the gates are orthogonal to the experts. By Cauchy and Schwarz it is bounded by the
gates' variation times the root of a second moment of l weighted as tau_m is: the "weighted" transforms, which have the smallest,
contract best. The other kinds contracted for a linear g; for relu their errors grew again from the fourth pass on (`kinds` in
benchmarks/residual_passes.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.likelihood.em import RIDGE, EMRun, gating_em
from moejax.likelihood.free_columns import FreeColumns, expert_inputs, widened_experts
from moejax.methods.starts import index_of_best, zero_gates
from moejax.model.family import Channel, Nuisances, as_family, channel_facts, is_gaussian
from moejax.model.gaussian import HALF_WIDTH, gaussian_grid
from moejax.model.inputs import LogDensity
from moejax.model.label_rule import label_rule
from moejax.model.metrics import match_experts
from moejax.model.mixture import MoEParams, NoiseModel, gate_logits, mean_gates
from moejax.moments.label_transforms import LabelTransform
from moejax.moments.spectral import (
    SpectralEstimate,
    SpectralLabels,
    SpectralTransforms,
    TensorPart,
    estimate_from_labels,
)

NUM_NODES = 4097
"""Nodes of the tables of h over +-8.5."""
NUM_NOISE_NODES = 81
"""Nodes over the noise: h is accurate to 3e-4 of its range, even if the noise is four times that of the transform."""
NUM_PASSES = 5
GATING_STEPS = 30
GATING_TOLERANCE = 1e-7
"""EM steps for the gates of one pass, and the gain in nats per sample below which they stop."""


class ConditionalMeans(NamedTuple):
    """Tables of h_i(z) = E[l(g(z) + sigma_i N)] over a uniform grid of z, for some label transforms l and every expert."""

    start: Float[jax.Array, ""]
    """() smallest z."""
    step: Float[jax.Array, ""]
    """() spacing."""
    values: Float[jax.Array, "t k num_nodes"]
    """(t, k, num_nodes); linear between the nodes, constant beyond them."""

    def __call__(self, z: Float[jax.Array, "k n"]) -> Float[jax.Array, "t k n"]:
        """(t, k, n) from the experts' predictors z (k, n)."""
        t, k, num_nodes = self.values.shape
        position = jnp.clip((z - self.start) / self.step, 0, num_nodes - 1)
        left = jnp.clip(jnp.floor(position), 0, num_nodes - 2).astype(jnp.int32)
        fraction = position - left.astype(position.dtype)
        index = left + num_nodes * jnp.arange(k, dtype=jnp.int32)[:, None]
        flat = self.values.reshape(t, k * num_nodes)
        at_left, at_right = (jnp.take(flat, i, axis=1, mode="clip") for i in (index, index + 1))
        return at_left + fraction[None] * (at_right - at_left)


def conditional_means(
    transforms: tuple[LabelTransform, ...],
    noise_std: Float[jax.Array, " k"],
    *,
    fn: Channel,
    nuisances: Nuisances | None = None,
) -> ConditionalMeans:
    """h_i(t) = E[l(Y) | t] of the transforms as they are applied, by quadrature over the labels of a predictor t.

    Args:
        transforms: t of them.
        noise_std: (k,) sigma_i, traced or not; it may differ from the noise that the transforms were made for.
        fn: g, or an output family.
        nuisances: norm and intercept of the experts, which give the range of t; None for 1 and 0.
    """
    dtype, family = noise_std.dtype, as_family(fn)
    norm, intercept = (1.0, 0.0) if nuisances is None else nuisances[:2]
    nodes = intercept + norm * jnp.linspace(-HALF_WIDTH, HALF_WIDTH, NUM_NODES, dtype=dtype)
    noise = gaussian_grid(NUM_NOISE_NODES, half_width=7.0, dtype=dtype)

    def at_noise(noise_std: jax.Array) -> jax.Array:
        if is_gaussian(fn):
            y = family.mean(nodes, noise_std)[:, None] + noise_std * noise.nodes[None]
            return jnp.stack([transform(y) @ noise.weights for transform in transforms])
        rule = label_rule(family, nodes, gaussian_grid(NUM_NODES, dtype=dtype).weights, noise_std)
        labels = jnp.stack([transform(rule.nodes) for transform in transforms]) * rule.weights[None]
        mass = jnp.exp(family.log_density(rule.nodes[None], nodes[:, None], noise_std))
        return (mass @ labels.T).T

    values = jax.lax.map(at_noise, noise_std).transpose(1, 0, 2)
    return ConditionalMeans(nodes[0], nodes[1] - nodes[0], values)


def residual_labels(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    transforms: SpectralTransforms,
    scale: Float[jax.Array, ""],
    *,
    fn: Channel,
    chunk_size: int | None = None,
    nuisances: Nuisances | None = None,
) -> SpectralLabels:
    """l(y) - scale * sum_i P_i(x) h_i(a_i . x + b_i) for every transform l of a spectral estimate.

    Args:
        params: the mixture whose expectation is subtracted; the h_i use its noise_std (k,).
        x: (n, d).
        y: (n,).
        transforms: the label transforms l.
        scale: () 1, or 0 for the plain labels.
        fn: g, or an output family.
        chunk_size: samples taken at once; None takes all.
        nuisances: norm and intercept of the experts; None for 1 and 0.
    """
    used = tuple(transform for transform in transforms if transform is not None)
    means = conditional_means(used, params.noise_std, fn=fn, nuisances=nuisances)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = chunk
        gates = jax.nn.softmax(gate_logits(params, x).T, axis=0)
        expected = jnp.sum(gates[None] * means(params.experts @ x.T + params.expert_bias[:, None]), axis=1)
        return jnp.stack([transform(y) for transform in used]) - scale * expected

    n = x.shape[0]
    if chunk_size is None or chunk_size >= n:
        labels = of_chunk((x, y))
    else:
        num_chunks = -(-n // chunk_size)
        padding = num_chunks * chunk_size - n
        chunks = (
            jnp.pad(x, ((0, padding), (0, 0))).reshape(num_chunks, chunk_size, -1),
            jnp.pad(y, (0, padding)).reshape(num_chunks, chunk_size),
        )
        labels = jax.lax.map(of_chunk, chunks).transpose(1, 0, 2).reshape(len(used), -1)[:, :n]
    return SpectralLabels(labels[0], labels[1], labels[2] if len(used) == 3 else None)


def _in_order_of(
    experts: Float[jax.Array, "k d"], estimate: SpectralEstimate, fn: Channel
) -> SpectralEstimate:
    """The estimate with its experts in the order of the nearest of these (k, d)."""
    order = match_experts(experts, estimate.experts, channel_facts(fn).parity == "even")
    return estimate._replace(experts=estimate.experts[order], mixing_weights=estimate.mixing_weights[order])


class ResidualEstimate(NamedTuple):
    """The end of residual passes."""

    params: MoEParams
    """Unit-norm experts of the pass kept, the gates that gating EM fits to them, and the noise of that fit."""
    mixing_weights: Float[jax.Array, " k"]
    """(k,) weighted mean of the gates over the sample."""
    history: Float[jax.Array, " gating_passes"]
    """((num_passes + 1) * GATING_STEPS,) histories of gating EM (`EMRun.history`), in nats; NaN after each has converged."""
    num_steps: Int[jax.Array, ""]
    """() int32 passes of gating EM over the data."""
    converged: Bool[jax.Array, ""]
    """() bool: gating EM with the kept experts converged."""
    log_likelihoods: Float[jax.Array, " passes"]
    """(num_passes + 1,) log-likelihoods after gating EM with the experts of each pass, the plain estimate's first."""
    experts: Float[jax.Array, "passes k d"]
    """(num_passes + 1, k, d) experts of each pass."""
    best_pass: Int[jax.Array, ""]
    """() int32 index of the pass that was kept, the one of highest likelihood."""
    spectral: SpectralEstimate
    """Moment diagnostics of the pass that was kept."""


def residual_estimate(
    key: jax.Array,
    x: Float[jax.Array, "n d"],
    y: Float[jax.Array, " n"],
    transforms: SpectralTransforms,
    weights: Float[jax.Array, " n"],
    noise_std: Float[jax.Array, ""],
    *,
    fn: Channel,
    num_experts: int,
    order: int,
    num_passes: int = NUM_PASSES,
    noise: NoiseModel = "shared",
    fit_intercept: bool = False,
    ridge: float = RIDGE,
    num_restarts: int = 16,
    num_polar_iterations: int = 8,
    chunk_size: int | None = None,
    log_density: LogDensity | None = None,
    columns: FreeColumns | None = None,
    nuisances: Nuisances | None = None,
) -> ResidualEstimate:
    """Experts from moments; then `num_passes` times gates by EM with these experts, and experts from residual moments.

    The pass whose experts and gates have the highest likelihood is kept, so passes that do not contract do no harm.

    Args:
        key: PRNG key of the restarts of the tensor power method.
        x: (n, d) inputs.
        y: (n,) labels.
        transforms: label transforms of orders 2 and `order`, and 1 if signs need it; preferably of kind "weighted".
        weights: (n,) sample weights.
        noise_std: () sigma, known or estimated beforehand; the h_i use it and EM starts from it.
        fn: g.
        num_experts: k.
        order: 3 or 4.
        num_passes: linear experts need 2 or 3, relu 4 or 5; 0 is the plain estimate with gates fitted to it.
        noise: noise model of gating EM. Use "shared" even if sigma is known: the error of inexact experts adds to it, and held
            noise makes the first gates overconfident. "per_expert" gives each expert its own sigma, in EM and in its h_i.
        fit_intercept: if true, the gates have biases; the experts have none.
        ridge: ridge on the gates.
        num_restarts: as in `tensor_power_method`.
        num_polar_iterations: as in `tensor_power_method`.
        chunk_size: samples that the moments process at once; None takes all.
        log_density: log density of inputs that are not standard normal, as in `spectral_estimate`.
        columns: the columns whose coefficients are free; None for all. The score tensors are those of the experts' inputs.
        nuisances: norm and intercept that every expert has; None for 1 and 0.
    """
    k, of_experts = num_experts, expert_inputs(x, columns)
    norm, intercept = (1.0, 0.0) if nuisances is None else nuisances[:2]
    # the first pass subtracts nothing; its experts to match with may be any distinct ones
    eye = jnp.eye(k, of_experts.shape[1], dtype=x.dtype)
    start = zero_gates(widened_experts(norm * eye, columns), jnp.asarray(noise_std, x.dtype))
    start = start._replace(expert_bias=start.expert_bias + intercept)

    def advance(params: MoEParams, step: tuple[jax.Array, jax.Array]) -> tuple[MoEParams, Any]:
        key, scale = step
        # a shared noise is known better beforehand than from EM with inexact experts; a noise for each expert is not
        expected = params if noise == "per_expert" else params._replace(noise_std=start.noise_std)
        estimate = estimate_from_labels(
            key,
            of_experts,
            residual_labels(
                expected, x, y, transforms, scale, fn=fn, chunk_size=chunk_size, nuisances=nuisances
            ),
            weights,
            TensorPart(expert_inputs(params.experts, columns) / norm, scale * mean_gates(params, x, weights)),
            num_experts=k,
            order=order,
            num_restarts=num_restarts,
            num_polar_iterations=num_polar_iterations,
            chunk_size=chunk_size,
            log_density=log_density,
        )
        # a decomposition gives the experts in any order; each starts from the gate of the nearest previous expert
        estimate = _in_order_of(expert_inputs(params.experts, columns) / norm, estimate, fn)
        gates = gating_em(
            params._replace(experts=widened_experts(norm * estimate.experts, columns)),
            x,
            y,
            weights,
            fn=fn,
            num_steps=GATING_STEPS,
            fit_intercept=fit_intercept,
            noise=noise,
            ridge=ridge,
            tolerance=GATING_TOLERANCE,
            columns=columns,
        )
        return gates.params, (estimate, gates)

    scales = jnp.ones(num_passes + 1, x.dtype).at[0].set(0.0)
    _, (estimates, runs) = jax.lax.scan(advance, start, (jax.random.split(key, num_passes + 1), scales))
    return _best_pass(estimates, runs, x, weights)


def _best_pass(
    estimates: SpectralEstimate,
    runs: EMRun,
    x: Float[jax.Array, "n d"],
    weights: Float[jax.Array, " n"],
) -> ResidualEstimate:
    """The pass of the highest likelihood, from the estimates and runs of all, leaves (num_passes + 1, ..)."""
    best = index_of_best(runs.log_likelihood).astype(jnp.int32)
    estimate, run = jax.tree.map(lambda leaf: leaf[best], (estimates, runs))
    return ResidualEstimate(
        params=run.params,
        mixing_weights=mean_gates(run.params, x, weights),
        history=runs.history.reshape(-1),
        num_steps=runs.num_steps.sum().astype(jnp.int32),
        converged=run.converged,
        log_likelihoods=runs.log_likelihood,
        experts=estimates.experts,
        best_pass=best,
        spectral=estimate,
    )
