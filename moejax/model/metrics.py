"""Recovery errors, after matching estimated experts to true ones (docs/method.md)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.checks import require
from moejax.model.family import Channel
from moejax.model.gaussian import AnyArray
from moejax.model.mixture import MoEParams, permute_experts
from moejax.model.small_linear_algebra import unit_rows
from moejax.registry import Registry

SUCCESS_THRESHOLD = 0.02
"""A trial succeeds if its recovery error is below this; a failed trial does not."""
_LARGEST_ENUMERATED = 6


class Recovery(NamedTuple):
    """The argument of a registered metric."""

    truth: MoEParams
    """k true experts."""
    fitted: MoEParams
    """k' fitted experts, in any order (see `align`)."""
    mixing_weights: Float[jax.Array, " fitted_k"]
    """(k',) estimated E[P_i]."""
    held_out_x: Float[jax.Array, "m d"]
    """(m, d) fresh inputs."""
    held_out_y: Float[jax.Array, " m"]
    """(m,) their labels."""


Metric = Callable[[Recovery, Channel], jax.Array]
_REGISTRY: Registry[Metric] = Registry("metric")


def register_metric(name: str, metric: Metric) -> Metric:
    """Make a metric a column of every sweep's table.

    A name may be registered again, with another function; no metric is built in, so there is no `replace`.

    Args:
        name: an identifier that no other column of the table has (docs/sweeps.md lists them); a sweep checks this when it is
            planned. One that ends in "_error" has a truth of 0: reports give its bias and RMSE.
        metric: (recovery, fitted activation) -> (), traceable by JAX; NaN if it is not defined.

    Raises:
        ValueError: the name is no identifier, or `metric` is not callable.

    Examples:
        >>> def norm_error(recovery, activation):
        ...     return jnp.linalg.norm(recovery.fitted.experts) - jnp.linalg.norm(recovery.truth.experts)
        >>> moejax.register_metric("norm_error", norm_error) is norm_error
        True
    """
    require(callable(metric), "metric", "a function (recovery, activation) -> ()", metric)
    _REGISTRY.register(name, metric)
    return metric


def registered_metrics() -> dict[str, Metric]:
    """Metrics that were registered besides the built-in ones, by name."""
    return dict(_REGISTRY.items())


def expert_distances(
    true_experts: Float[jax.Array, "k d"],
    estimated_experts: Float[jax.Array, "fitted_k d"],
    even: bool = False,
) -> Float[jax.Array, "k fitted_k"]:
    """(k, k'): 1 - cos(a_i, ahat_j) (1 - |cos| for an even g), as half the squared distance of unit vectors.

    The difference of nearly equal unit vectors keeps relative accuracy where 1 - cos would round to 0.
    """
    true, estimated = unit_rows(true_experts)[:, None, :], unit_rows(estimated_experts)[None, :, :]
    distance = 0.5 * jnp.sum((true - estimated) ** 2, axis=-1)
    return jnp.minimum(distance, 0.5 * jnp.sum((true + estimated) ** 2, axis=-1)) if even else distance


def bottleneck_assignment(
    costs: Float[jax.Array, "k fitted_k"],
) -> tuple[Float[jax.Array, ""], Int[jax.Array, " k"]]:
    """(value (), assignment (k,)) of min over injections of max_i costs[i, assignment[i]], for costs (k, k'), k <= k'.

    For k' <= 6, all injections are tried; above, a binary search over the sorted costs for the smallest threshold whose
    allowed pairs hold a perfect matching (a minimum-cost assignment of the 0/1 costs "above the threshold").
    """
    k, num_columns = costs.shape
    costs = jnp.where(jnp.isnan(costs), jnp.inf, costs)
    if num_columns <= _LARGEST_ENUMERATED:
        permutations = jnp.asarray(list(itertools.permutations(range(num_columns), k)))
        worst = costs[jnp.arange(k)[None], permutations].max(axis=1)
        best = jnp.argmin(worst)
        return worst[best], permutations[best]
    from optax.assignment import hungarian_algorithm

    thresholds = jnp.sort(costs.reshape(-1))

    def matching(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        forbidden = (costs > threshold).astype(costs.dtype)
        rows, columns = hungarian_algorithm(forbidden)
        return forbidden[rows, columns].sum() == 0, jnp.zeros(k, columns.dtype).at[rows].set(columns)

    def halve(bounds: tuple[jax.Array, jax.Array], _: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        low, high = bounds
        middle = (low + high) // 2
        feasible, _ = matching(thresholds[middle])
        return (jnp.where(feasible, low, middle + 1), jnp.where(feasible, middle, high)), None

    steps = int(np.ceil(np.log2(k * num_columns))) + 1
    bounds = (jnp.asarray(0), jnp.asarray(k * num_columns - 1))
    (_, index), _ = jax.lax.scan(halve, bounds, length=steps)
    return thresholds[index], matching(thresholds[index])[1]


def recovery_error(
    true_experts: AnyArray, estimated_experts: AnyArray, even: bool = False
) -> Float[jax.Array, ""]:
    """Return the recovery error E = 1 - max over permutations pi of min_i cos(a_i, ahat_pi(i)).

    Args:
        true_experts: (k, d).
        estimated_experts: (k, d), in any order.
        even: true for an even activation, whose experts are identified up to sign only: |cos| instead of cos.

    Returns:
        () in [0, 2]; 0 is exact recovery of all directions.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> experts = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
        >>> float(moejax.recovery_error(experts, 2.0 * experts[::-1]))  # neither order nor norms matter
        0.0
    """
    true_experts, estimated_experts = jnp.asarray(true_experts), jnp.asarray(estimated_experts)
    if true_experts.shape != estimated_experts.shape or true_experts.ndim != 2:
        raise ValueError(
            f"true_experts and estimated_experts: expected equal shapes (k, d), "
            f"got {true_experts.shape} and {estimated_experts.shape}"
        )
    return bottleneck_assignment(expert_distances(true_experts, estimated_experts, even))[0]


def match_experts(true_experts: jax.Array, estimated_experts: jax.Array, even: bool = False) -> jax.Array:
    """(k,): the permutation of the estimated experts that maximises the sum of cosines with the true ones."""
    from optax.assignment import hungarian_algorithm

    distances = expert_distances(true_experts, estimated_experts, even)
    rows, columns = hungarian_algorithm(jnp.where(jnp.isfinite(distances), distances, 2.0))
    return jnp.zeros(true_experts.shape[0], columns.dtype).at[rows].set(columns)


def align(true: MoEParams, estimated: MoEParams, even: bool = False) -> MoEParams:
    """The estimate with its experts in the order (and, for an even g, the signs) of the true ones, re-gauged."""
    estimated = permute_experts(estimated, match_experts(true.experts, estimated.experts, even))
    if not even:
        return estimated
    sign = jnp.where(jnp.sum(true.experts * estimated.experts, axis=1) < 0, -1.0, 1.0).astype(
        true.experts.dtype
    )
    return estimated._replace(
        experts=sign[:, None] * estimated.experts, expert_bias=sign * estimated.expert_bias
    )


def gating_error(true: MoEParams, aligned: MoEParams) -> Float[jax.Array, ""]:
    """||w_hat - w|| / max(||w||, 1) over all gates (Frobenius norms) of an aligned estimate."""
    difference = jnp.sqrt(jnp.sum((true.gating - aligned.gating) ** 2))
    return difference / jnp.maximum(jnp.sqrt(jnp.sum(true.gating**2)), 1.0)
