"""The mixture of experts: parameters, sampling, likelihood, responsibilities, prediction.

P(z = i | x) = softmax_i(w_i . x + c_i),   y | x, z = i ~ N(g(a_i . x + b_i), sigma_i^2).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Generic, Literal, NamedTuple, SupportsIndex, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from moejax.checks import require
from moejax.model.families import ChannelLike, get_channel
from moejax.model.family import Family, as_family, is_gaussian
from moejax.model.gaussian import AnyArray, Array, standard_normal
from moejax.model.shapes import require_shapes
from moejax.model.sums import in_parts, natural_part_size, num_used_parts, sum_over_parts


class MoEParams(NamedTuple, Generic[Array]):
    """Parameters of a mixture of k experts in d dimensions. Gates are gauged so that the last one is zero.

    With m outputs that share the gates, y (n, m), each has its own experts and noise: experts (k, m, d), noise_std and expert_bias
    (k, m).

    Examples:
        >>> params = moejax.make_params(jnp.eye(2), jnp.zeros((2, 2)), noise_std=0.1)
        >>> {name: leaf.shape for name, leaf in params._asdict().items()}["gating"]
        (2, 2)
    """

    experts: Float[Array, "k *m d"]
    """(k, d) a_i, in units of g's argument per unit of x."""
    gating: Float[Array, "k d"]
    """(k, d) w_i, in nats per unit of x; the last row is 0."""
    noise_std: Float[Array, " k *m"]
    """(k,) sigma_i, in units of y."""
    expert_bias: Float[Array, " k *m"]
    """(k,) b_i; 0 where unused."""
    gating_bias: Float[Array, " k"]
    """(k,) c_i, the last 0; 0 where unused."""


HostParams: TypeAlias = MoEParams[np.ndarray]
"""Parameters as NumPy arrays, outside JAX programs."""
AnyParams: TypeAlias = MoEParams | HostParams
"""Parameters that a function accepts in either type and converts."""


def make_params(
    experts: jax.Array,
    gating: jax.Array,
    noise_std: jax.Array | float,
    expert_bias: jax.Array | float = 0.0,
    gating_bias: jax.Array | float = 0.0,
) -> MoEParams:
    """Make MoEParams from arrays, re-gauged so that the last gate is zero.

    Args:
        experts: (k, d) a_i.
        gating: (k, d) w_i.
        noise_std: () or (k,) sigma_i.
        expert_bias: () or (k,) b_i.
        gating_bias: () or (k,) c_i.

    Raises:
        ValueError: experts and gating are not both (k, d), or a noise_std is not positive.

    Examples:
        >>> moejax.make_params([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [1.0, 0.0]], noise_std=0.1).gating.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    if not isinstance(noise_std, Tracer) and not np.all(np.asarray(noise_std) > 0):
        raise ValueError(f"noise_std: expected positive numbers, got {noise_std}")
    experts, gating = jnp.asarray(experts), jnp.asarray(gating)
    if experts.ndim != 2 or experts.shape != gating.shape:
        raise ValueError(
            f"experts and gating: expected two arrays (k, d), got {experts.shape} and {gating.shape}"
        )
    dtype = jnp.result_type(experts, gating, jnp.result_type(float))
    per_expert = [
        jnp.broadcast_to(jnp.asarray(v, dtype), experts.shape[:1])
        for v in (noise_std, expert_bias, gating_bias)
    ]
    return regauge(MoEParams(experts.astype(dtype), gating.astype(dtype), *per_expert))


def regauge(params: MoEParams[Array]) -> MoEParams[Array]:
    """The same mixture with the last gate (weights and bias) subtracted from all gates: softmax does not change."""
    return params._replace(
        gating=params.gating - params.gating[-1:], gating_bias=params.gating_bias - params.gating_bias[-1:]
    )


def permute_experts(params: MoEParams[Array], permutation: Int[AnyArray, " k"]) -> MoEParams[Array]:
    """Expert i of the result is expert permutation[i] of `params`; the last gate is zero again afterwards."""
    return regauge(params._make(leaf[permutation] for leaf in params))


def gate_logits(params: MoEParams[Array], x: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """(n, k): w_i . x + c_i."""
    return (params.gating @ x.T + params.gating_bias[:, None]).T


def expert_means(
    params: AnyParams, x: Float[AnyArray, "n d"], activation: ChannelLike
) -> Float[jax.Array, "n k *m"]:
    """(n, k), or (n, k, m): g(a_i . x + b_i)."""
    return jnp.moveaxis(_means_and_logits(params, x, as_family(get_channel(activation)))[0], -1, 0)


def _means_and_logits(
    params: AnyParams, x: Float[AnyArray, "n d"], family: Family
) -> tuple[Float[jax.Array, "k *m n"], Float[jax.Array, "k n"]]:
    """(k, n), or (k, m, n), E[y | x, z = i] and (k, n) w_i . x + c_i."""
    predictors, logits = _predictors(params, x)
    return family.mean(predictors, jnp.asarray(params.noise_std)[..., None]), logits


def _predictors(
    params: AnyParams, x: Float[AnyArray, "n d"]
) -> tuple[Float[jax.Array, "k *m n"], Float[jax.Array, "k n"]]:
    """(k, n), or (k, m, n), a_i . x + b_i and (k, n) w_i . x + c_i.

    Both come from one product: with two products that share x, XLA's CPU compiler (jaxlib 0.10.2) made wrong rows at n = 20000.
    """
    shape, size = params.expert_bias.shape, params.expert_bias.size
    rows = jnp.concatenate([params.experts.reshape(size, -1), params.gating])
    biases = jnp.concatenate([params.expert_bias.reshape(-1), params.gating_bias])
    predictors = rows @ x.T + biases[:, None]
    return predictors[:size].reshape(*shape, -1), predictors[size:]


def log_joint(
    params: AnyParams, x: Float[AnyArray, "n d"], y: Float[AnyArray, " n *m"], activation: ChannelLike
) -> Float[jax.Array, "n k"]:
    """(n, k): log P(z = i, y | x), in nats."""
    return _log_joint_rows(params, x, y, activation).T


def _log_joint_rows(
    params: AnyParams, x: Float[AnyArray, "n d"], y: Float[AnyArray, " n *m"], activation: ChannelLike
) -> Float[jax.Array, "k n"]:
    """(k, n) of `log_joint`: with samples last, the reductions over experts are vectorised."""
    predictors, logits = _predictors(params, x)
    family = as_family(get_channel(activation))
    log_densities = family.log_density(
        jnp.asarray(y).T[None], predictors, jnp.asarray(params.noise_std)[..., None]
    )
    if y.ndim == 2:
        log_densities = log_densities.sum(axis=1)
    return jax.nn.log_softmax(logits, axis=0) + log_densities


def log_likelihood_per_sample(
    params: AnyParams, x: Float[AnyArray, "n d"], y: Float[AnyArray, " n *m"], activation: ChannelLike
) -> Float[jax.Array, " n"]:
    """(n,): log p(y_j | x_j), in nats."""
    return jax.nn.logsumexp(_log_joint_rows(params, x, y, activation), axis=0)


def log_likelihood(
    params: AnyParams,
    x: Float[AnyArray, "n d"],
    y: Float[AnyArray, " n *m"],
    activation: ChannelLike,
    weights: Float[AnyArray, " n"] | None = None,
) -> Float[jax.Array, ""]:
    """Return the log-likelihood of a sample, sum_j weights_j log p(y_j | x_j), () in nats.

    It is traceable and checks shapes, not values; so do `responsibilities` and `predict`.

    Args:
        params: the mixture, k experts in d dimensions.
        x: (n, d).
        y: (n,), or (n, m).
        activation: g, a registered name or a scalar JAX function; or an output `Family`.
        weights: (n,); None for ones. A row of weight zero may hold any values.

    Raises:
        ValueError: the shapes do not belong together.

    Examples:
        >>> one = moejax.make_params([[1.0]], [[0.0]], noise_std=1.0)  # y ~ N(x, 1)
        >>> round(float(moejax.log_likelihood(one, jnp.ones((2, 1)), jnp.ones(2), "linear")), 4)
        -1.8379
    """
    require_shapes(params, x, y, weights)
    if weights is not None:
        x, y = with_stand_ins(weights, x, y)
    return weighted_sum(log_likelihood_per_sample(params, x, y, activation), weights)


def responsibilities(
    params: AnyParams, x: Float[AnyArray, "n d"], y: Float[AnyArray, " n *m"], activation: ChannelLike
) -> Float[jax.Array, "n k"]:
    """Return the responsibilities (n, k): P(z = i | x, y), the probability that expert i made the label.

    Args:
        params: the mixture, k experts in d dimensions.
        x: (n, d).
        y: (n,), or (n, m).
        activation: g, a registered name or a scalar JAX function; or an output `Family`.

    Raises:
        ValueError: the shapes do not belong together.

    Examples:
        >>> params = moejax.make_params([[1.0], [-1.0]], [[0.0], [0.0]], noise_std=0.1)
        >>> moejax.responsibilities(params, jnp.ones((1, 1)), jnp.ones(1), "linear").round(3).tolist()
        [[1.0, 0.0]]
    """
    require_shapes(params, x, y)
    if not is_gaussian(get_channel(activation)):
        return jax.nn.softmax(_log_joint_rows(params, x, y, activation), axis=0).T
    means, logits = _means_and_logits(params, x, as_family(get_channel(activation)))
    log_gates = jax.nn.log_softmax(logits, axis=0).T
    return posterior(log_gates, jnp.moveaxis(means, -1, 0), y, params.noise_std, xp=jnp)


def posterior(
    log_gates: Float[Array, "n k"],
    means: Float[Array, "n k *m"],
    y: Float[AnyArray, " n *m"],
    noise_std: Float[AnyArray, " k *m"],
    *,
    xp: ModuleType,
) -> Float[Array, "n k"]:
    """(n, k): P(z = i | x, y), for any distance of y from the experts.

    Far from all experts the densities underflow, and their logarithms overflow with the squares of the residuals. So we form
    differences of squares between experts, in units in which all are at most one, and scale back only the difference from the best.

    Args:
        log_gates: (n, k) log P(z = i | x).
        means: (n, k), or (n, k, m), m_i(x).
        y: (n,), or (n, m).
        noise_std: (k,), or (k, m).
        xp: jax.numpy, or numpy.
    """
    n, k = log_gates.shape
    m = math.prod(means.shape[2:])
    means, noise_std = means.reshape(n, k, m), noise_std.reshape(1, k, m)
    residual = y.reshape(n, 1, m) - means
    unit = largest_size(residual, xp=xp)
    scaled = residual / unit / noise_std
    steepest = largest_size(scaled, xp=xp)
    scaled = scaled / steepest
    nearest = xp.argmin((scaled**2).sum(axis=2), axis=1).reshape(n, 1, 1)
    its_mean, its_residual, its_scaled, its_noise = (
        xp.take_along_axis(xp.broadcast_to(values, means.shape), nearest, axis=1)
        for values in (means, residual, scaled, noise_std)
    )
    # z_i^2 - z_j^2 = (z_i - z_j) (z_i + z_j): far out, only the first factor resolves the difference of two means
    apart = (its_mean - means) / unit / noise_std
    apart = (apart + its_residual / unit * (1.0 / noise_std - 1.0 / its_noise)) / steepest
    behind = 0.5 * (apart * (scaled + its_scaled)).sum(axis=2)
    behind = behind - behind.min(axis=1, keepdims=True)
    for factor in (steepest, steepest, unit, unit):
        behind = behind * factor[:, :, 0]
    logits = log_gates - xp.log(noise_std).sum(axis=2) - behind
    shares = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def largest_size(values: Float[Array, "n k m"], *, xp: ModuleType) -> Float[Array, "n 1 1"]:
    """(n, 1, 1): the largest absolute value in each row of (n, k, m); one if all are zero."""
    largest = xp.abs(values).max(axis=(1, 2), keepdims=True)
    return xp.where(largest > 0, largest, xp.ones_like(largest))


def predict(
    params: AnyParams, x: Float[AnyArray, "n d"], activation: ChannelLike
) -> Float[jax.Array, " n *m"]:
    """Return the mean of the label, E[y | x] = sum_i P_i(x) g(a_i . x + b_i), (n,) or (n, m).

    Args:
        params: the mixture, k experts in d dimensions.
        x: (n, d).
        activation: g, a registered name or a scalar JAX function; or an output `Family`.

    Raises:
        ValueError: the shapes do not belong together.

    Examples:
        >>> params = moejax.make_params([[1.0], [3.0]], [[0.0], [0.0]], noise_std=0.1)
        >>> moejax.predict(params, jnp.ones((1, 1)), "linear").tolist()
        [2.0]
    """
    require_shapes(params, x)
    means, logits = _means_and_logits(params, x, as_family(get_channel(activation)))
    return jnp.einsum("in,i...n->n...", jax.nn.softmax(logits, axis=0), means)


@overload
def with_stand_ins(weights: AnyArray, *arrays: AnyArray) -> tuple[jax.Array, ...]: ...
@overload
def with_stand_ins(weights: np.ndarray, *arrays: np.ndarray, xp: ModuleType) -> tuple[np.ndarray, ...]: ...
def with_stand_ins(weights: AnyArray, *arrays: AnyArray, xp: ModuleType = jnp) -> tuple[AnyArray, ...]:
    """Arrays (n, ..) in which every row of weight zero is a copy of the first row that has weight; zeros if none has.

    A row of weight zero may hold any values, and a weighted sum multiplies the function there by zero. At an arbitrary point that
    could be 0 times infinity, which is NaN. On a copy of a used row every quantity is as finite as on the data. `xp` is jax.numpy,
    or numpy for arrays on the host.
    """
    used = weights > 0
    first = xp.argmax(used)

    def filled(array: AnyArray) -> AnyArray:
        kept = used.reshape(used.shape + (1,) * (array.ndim - 1))
        stand_in = xp.where(used[first], array[first], xp.zeros_like(array[first]))
        return xp.where(kept, array, stand_in[None])

    return tuple(filled(array) for array in arrays)


def weighted_sum(
    values: Float[jax.Array, " n *rest"], weights: Float[AnyArray, " n"] | None
) -> Float[jax.Array, "*rest"]:
    """sum_j weights_j values_j over the leading axis; a sample of weight zero is left out, even if its value is not finite."""
    if weights is None:
        return values.sum(axis=0)
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - 1))
    return jnp.where(weights > 0, weights * jnp.where(weights > 0, values, 0), 0).sum(axis=0)


def sample(
    key: jax.Array, params: MoEParams, activation: ChannelLike, num_samples: int
) -> tuple[Float[jax.Array, "n d"], Float[jax.Array, " n *m"], Int[jax.Array, " n"]]:
    """Draw from the model with standard normal inputs.

    Args:
        key: PRNG key.
        params: the mixture, k experts in d dimensions.
        activation: g, a registered name or a scalar JAX function; or an output `Family`.
        num_samples: n.

    Returns:
        x (n, d) ~ N(0, I); y (n,), or (n, m); z (n,) int32, the expert that made each y.

    Raises:
        ValueError: the shapes of the parameters do not belong together, or num_samples is no number of samples.

    Examples:
        >>> params = moejax.make_params(jnp.eye(3)[:2], jnp.zeros((2, 3)), noise_std=0.1)
        >>> x, y, z = moejax.sample(jax.random.key(0), params, "relu", 5)
        >>> x.shape, y.shape, z.shape
        ((5, 3), (5,), (5,))
    """
    require_shapes(params)
    is_number = isinstance(num_samples, SupportsIndex) and num_samples >= 0
    require(is_number, "num_samples", "a whole number of at least 0", num_samples)
    x_key, label_key = jax.random.split(key)
    x = standard_normal(x_key, (num_samples, params.experts.shape[-1]), params.experts.dtype)
    y, z = sample_labels(label_key, params, activation, x)
    return x, y, z


def sample_labels(
    key: jax.Array, params: MoEParams, activation: ChannelLike, x: Float[jax.Array, "n d"]
) -> tuple[Float[jax.Array, " n *m"], Int[jax.Array, " n"]]:
    """y (n,), or (n, m), and z (n,) given inputs x (n, d); a ValueError if the family has no sampler."""
    family = as_family(get_channel(activation))
    draw = family.sample
    if draw is None:
        raise ValueError(f"family {family.name}: expected one with a sampler, to draw labels")
    z_key, noise_key = jax.random.split(key)
    predictors, logits = _predictors(params, x)
    cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=0)[:-1], axis=0)
    z = jnp.sum(jax.random.uniform(z_key, x.shape[:1], x.dtype)[None] >= cumulative, axis=0)
    is_chosen = z[None] == jnp.arange(cumulative.shape[0] + 1)[:, None]
    if predictors.ndim == 3:
        is_chosen = is_chosen[:, None]
    chosen = jnp.sum(jnp.where(is_chosen, predictors, 0), axis=0).T
    return draw(noise_key, chosen, params.noise_std[z]), z.astype(jnp.int32)


NoiseModel = Literal["known", "shared", "per_expert"]


def mean_gates(
    params: MoEParams, x: Float[jax.Array, "n d"], weights: Float[jax.Array, " n"]
) -> Float[jax.Array, " k"]:
    """(k,): the weighted mean over the sample of P_i(x)."""

    def sums_of(x: jax.Array, weights: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(gate_logits(params, x).T, axis=0)
        return jnp.where(weights > 0, gates, 0) @ weights

    parts = in_parts((x, weights), natural_part_size(x.shape[0]))
    return sum_over_parts(sums_of, parts, num_used_parts(parts[1])) / weights.sum()
