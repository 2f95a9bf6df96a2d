r"""Fisher information of the parameters: sum_j w_j E[s s' | x_j], s the score of a sample.

It is conditional on the inputs, and in the free parameters of `predictors.free_parameters`. The score of a sample is (scores in
the 2k - 1 linear predictors) x (inputs) and scores in the log dispersions; so the information is one weighted Gram matrix of the
inputs.
The expectation over y is a quadrature. The outer-product form needs first derivatives only. So it also holds for a g with kinks,
where the score still has mean zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.environment import runs_on_cpu
from moejax.likelihood.blocks import sample_blocks, sum_over_blocks
from moejax.likelihood.predictors import block_matrix, num_noise_parameters, predictors_of, weighted_gram
from moejax.model.activations import ScalarFunction, activation_and_slope
from moejax.model.families import ChannelLike, get_channel
from moejax.model.family import Family, activation_of, as_family, is_gaussian
from moejax.model.gaussian import GaussianGrid, gaussian_grid
from moejax.model.label_rule import LabelRule, label_rule
from moejax.model.mixture import MoEParams, NoiseModel

NUM_NODES = 129
"""Nodes of the rule over y, for each expert. Two experts that are s = |g_i - g_j| / sigma apart cause a relative error of
exp(-s^2 / 8 - 2 pi^2 / (s h)), h the spacing: below 1e-11 for every s at 129 nodes, 1e-4 at 33. For unequal noise levels, multiply
the nodes by their ratio."""
CPU_BLOCK_SIZE = 512
"""Inputs that the rule over y takes at once on a CPU. Products of scores then stay in cache, which halves the time."""


def fisher_information(
    params: MoEParams,
    x: Float[jax.Array, "n d"],
    activation: ChannelLike,
    *,
    noise: NoiseModel,
    fit_intercept: bool,
    weights: Float[jax.Array, " n"] | None = None,
    num_nodes: int = NUM_NODES,
) -> Float[jax.Array, "P P"]:
    r"""(P, P): sum_j w_j E[s(y, x_j) s(y, x_j)' | x_j], s the score, y from the mixture at `params`.

    For Gaussian labels, E over y is the sum over experts of P_i times the trapezoidal rule in (y - g(u_i)) / sigma_i; for others it
    is taken by `label_rule`, which is exact for labels 0, .., N.

    Args:
        params: the point of evaluation.
        x: (n, d) inputs.
        activation: g, or an output family; kinks are allowed.
        noise: which noise parameters are free.
        fit_intercept: if true, biases are free.
        weights: (n,) how often each input is observed; None for once.
        num_nodes: odd number of nodes of the rule over Gaussian labels for each expert (see `NUM_NODES`).
    """
    channel, k = get_channel(activation), params.experts.shape[0]
    family = as_family(channel)
    predictors = predictors_of(params, fit_intercept=fit_intercept)
    weights = jnp.ones_like(x[:, 0]) if weights is None else weights
    block_size = CPU_BLOCK_SIZE if runs_on_cpu() else None
    blocks = sample_blocks(
        x, jnp.zeros_like(weights), weights, fit_intercept=fit_intercept, block_size=block_size
    )
    if is_gaussian(channel):
        expected = _gaussian_products(
            activation_of(channel), params.noise_std, noise, gaussian_grid(num_nodes, dtype=x.dtype)
        )
    else:
        rule = _rule_for(family, params, x)
        expected = _products(family, params.noise_std, noise, rule)
    rows, columns = np.triu_indices(2 * k - 1 + num_noise_parameters(noise, k))

    def sums_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        del y
        at = predictors(design)
        log_prior = jax.nn.log_softmax(jnp.concatenate([at[k:], jnp.zeros_like(at[:1])]), axis=0)
        products = expected(at[:k], log_prior)
        return _information_of(design, products[rows, columns] * weights[None], 2 * k - 1)

    return sum_over_blocks(sums_of, blocks)


ExpectedProducts = Callable[[jax.Array, jax.Array], jax.Array]
"""(predictors (k, B), log gates (k, B)) -> E[s s'] (q, q, B) of the scores in the 2k - 1 predictors and the free dispersions."""


def _gaussian_products(
    fn: ScalarFunction, noise_std: Float[jax.Array, " k"], noise: NoiseModel, grid: GaussianGrid
) -> ExpectedProducts:
    """By the trapezoidal rule about the mean of every expert."""
    noise_std = noise_std[:, None]

    def expected(at: jax.Array, log_prior: jax.Array) -> jax.Array:
        mean, slope = activation_and_slope(fn, at)
        prior = jnp.exp(log_prior)
        log_scale = (log_prior - jnp.log(noise_std))[:, None]
        slope = (slope / noise_std)[:, None]

        def add_node(total: jax.Array | float, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            z, weight = node
            y = mean + noise_std * z  # (k, B), one label from each expert
            error = (y[None] - mean[:, None]) / noise_std[:, None]
            r = jax.nn.softmax(log_scale - 0.5 * error**2, axis=0)
            score = _scores(r, error * slope, error**2 - 1.0, prior[:, None], noise)
            products = jnp.sum(score[:, None] * score[None] * prior[None, None], axis=2)
            return total + weight * products, None

        return _sum_over_nodes(add_node, (grid.nodes, grid.weights), at, noise)

    return expected


def _rule_for(family: Family, params: MoEParams, x: Float[jax.Array, "n d"]) -> LabelRule:
    """The rule over the labels for all predictors of a sample."""
    at = params.experts @ x.T + params.expert_bias[:, None]
    t = jnp.linspace(at.min(), at.max(), _RANGE_POINTS, dtype=x.dtype)
    uniform = jnp.full_like(t, 1.0 / _RANGE_POINTS)
    return label_rule(family, t, uniform, params.noise_std.max(), nodes_in_cell=1)


def _products(
    family: Family, dispersion: Float[jax.Array, " k"], noise: NoiseModel, rule: LabelRule
) -> ExpectedProducts:
    """By one rule over the labels for all samples."""
    unit = family.unit(dispersion)[:, None]

    def expected(at: jax.Array, log_prior: jax.Array) -> jax.Array:
        prior = jnp.exp(log_prior)

        def add_node(total: jax.Array | float, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            y, weight = node
            of_label = family.first_order(y[None, None], at, dispersion[:, None])
            joint = log_prior + of_label.log_density
            log_density = jax.nn.logsumexp(joint, axis=0)
            possible = log_density > -_IMPOSSIBLE
            r = jnp.where(possible, jnp.exp(joint - jnp.where(possible, log_density, 0.0)), 0.0)
            of_dispersion = of_label.dispersion[0] if of_label.dispersion else jnp.zeros_like(r)
            score = _scores(r, unit * of_label.score, of_dispersion, prior, noise)
            score = jnp.where(possible, score, 0.0)
            return total + weight * jnp.exp(log_density) * score[:, None] * score[None], None

        return _sum_over_nodes(add_node, (rule.nodes, rule.weights), at, noise)

    return expected


_RANGE_POINTS = 257
_IMPOSSIBLE = 80.0
"""Labels whose density is below e^-80 are left out: their scores may overflow."""


def _scores(
    r: jax.Array, score: jax.Array, of_noise: jax.Array, prior: jax.Array, noise: NoiseModel
) -> jax.Array:
    """(q, ..): the scores of a label in the predictors of experts and gates and in the free dispersions."""
    return jnp.concatenate([r * score, (r - prior)[:-1], free_noise(r * of_noise, noise)])


def _sum_over_nodes(
    add_node: Any, nodes: tuple[jax.Array, jax.Array], at: jax.Array, noise: NoiseModel
) -> jax.Array:
    k = at.shape[0]
    num_scores = 2 * k - 1 + num_noise_parameters(noise, k)
    total, _ = jax.lax.scan(add_node, jnp.zeros((num_scores, num_scores, at.shape[1]), at.dtype), nodes)
    return total


def free_noise(noise_score: jax.Array, noise: NoiseModel) -> jax.Array:
    """(0, 1 or k, ...): scores in the free noise parameters, from those (k, ...) in every log sigma_i."""
    if noise == "shared":
        return noise_score.sum(axis=0, keepdims=True)
    return noise_score if noise == "per_expert" else noise_score[:0]


def _information_of(
    design: Float[jax.Array, "D B"], coefficients: Float[jax.Array, "pairs B"], num_predictors: int
) -> Float[jax.Array, "P P"]:
    """(P, P) from a (D, B) block and the (q (q + 1) / 2, B) products of scores, first in predictors, then in log noise."""
    size = design.shape[0]
    # a log sigma is a predictor whose only input is 1
    extended = jnp.concatenate([design, jnp.ones_like(design[:1])])
    matrix = block_matrix(weighted_gram(extended, coefficients))
    places = np.arange(matrix.shape[0]).reshape(-1, size + 1)
    kept = np.concatenate([places[:num_predictors, :size].reshape(-1), places[num_predictors:, size]])
    return matrix[kept][:, kept]
