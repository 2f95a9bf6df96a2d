"""Usability of label transforms, and the order of the tensor that is decomposed."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from moejax.model.activations import (
    ActivationLike,
    ScalarFunction,
    activation_facts,
    activation_name,
    get_activation,
)
from moejax.model.family import Channel, Nuisances, activation_of, as_family
from moejax.moments.family_transforms import Level, transform_at, why_no_transform
from moejax.moments.label_transforms import (
    ORDERS,
    TRANSFORM_KINDS,
    LabelTransform,
    TransformKind,
    traced_label_transforms,
    transform_on_host,
)

LARGEST_SECOND_MOMENT = 1000.0
"""An order is usable when E[l^2] <= 1000 at c_m = 1. Above, the signal would be lost in the rounding of float32,
and at any precision would need more than a million samples."""
RELATIVE_NOISE_RANGE = (0.01, 10.0)
"""The range of sigma / std(g(Z)) for which transforms are built."""


def label_transform(
    activation: ActivationLike,
    noise_std: float | jax.Array,
    order: int = 3,
    kind: TransformKind = "weighted",
    *,
    num_experts: int = 3,
    smallest_noise_std: float = 0.01,
) -> LabelTransform[Any]:
    """The order-m transform of the labels of an activation at a noise level.

    Args:
        activation: a registered name, or any scalar JAX function.
        noise_std: sigma, in units of y. If it is a number, the transform is computed in double precision under any default
            of JAX, and cast. If it is traced, it is computed in its own dtype inside the caller's program.
        order: m of the score tensor it goes with, 1 to 4.
        kind: "weighted", "least_norm", "centred", "polynomial" or "relaxed". A relaxed transform of order 3 or 4 has only
            c_{m-1} = 0 and c_m = 1: it is right in a whitened moment if the gate differences are orthogonal to the experts' span,
            and biased otherwise. The other kinds have c_1 = ... = c_{m-1} = 0.
        num_experts: k; the weighted and relaxed kinds assume mixing weights 1/k.
        smallest_noise_std: the smallest value that a traced noise_std may take (it fixes the quadrature).

    Returns:
        LabelTransform; call it on y.

    Raises:
        ValueError: an unknown activation or kind, noise_std not positive, or no usable transform of that order,
            with the reason and the numbers.

    Examples:
        >>> square = moejax.label_transform("linear", noise_std=0.1, order=2, kind="polynomial")  # y^2 / 2
        >>> round(float(square(jnp.asarray(2.0))), 6)
        2.0

    Source: docs/method.md; Makkuva et al. 2019 for the polynomial kind.
    """
    fn = get_activation(activation)
    if kind not in TRANSFORM_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(TRANSFORM_KINDS)}, got {kind!r}")
    if order not in (1, *ORDERS):
        raise ValueError(f"order: expected 1, 2, 3 or 4, got {order!r}")
    if isinstance(noise_std, Tracer):
        return traced_label_transforms(fn, noise_std, ((order, kind),), num_experts, smallest_noise_std)[0]
    reason = why_unusable(fn, float(noise_std), order, kind)
    if reason:
        raise ValueError(f"activation {activation_name(activation)}: no order-{order} transform: {reason}")
    transform = transform_on_host(fn, float(noise_std), order, kind, num_experts)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), transform)


def transform_noise_range(fn: ScalarFunction) -> tuple[float, float]:
    """(smallest, largest) noise level for which label transforms of g are built, in units of g's values."""
    low, high = RELATIVE_NOISE_RANGE
    spread = activation_facts(fn).standard_deviation
    return low * spread, high * spread


def transform_level(fn: Channel, level: Level) -> Level:
    """The level to build transforms for: `transform_noise_std` of Gaussian labels, or a family's nuisances as they are."""
    return level if isinstance(level, Nuisances) else transform_noise_std(activation_of(fn), level)


def transform_noise_std(fn: ScalarFunction, noise_std: float) -> float:
    """The noise level to build transforms for: `noise_std` moved into the range for which they are built.

    Below the range, transforms of its lower end are used. They assume slightly more noise than there is, so their
    c_r are wrong by up to about 1e-2; the moments are then a start, not an estimate.
    """
    low, high = transform_noise_range(fn)
    return min(max(noise_std, low), high)


def why_unusable(fn: Channel, noise_std: Level, order: int, kind: TransformKind = "weighted") -> str:
    """The reason why no order-m transform of g is usable at this noise, with the numbers; empty if one is.

    A relaxed transform has its own bound; all other kinds that of the least-norm transform, or of a family's weighted one.

    Args:
        fn: g, or an output family.
        noise_std: sigma, or the family's nuisances.
        order: m.
        kind: kind of the transform.

    Raises:
        ValueError: noise_std is not a positive finite number.
    """
    if isinstance(noise_std, Nuisances):
        family = as_family(fn)
        own: TransformKind = "relaxed" if kind == "relaxed" and order > 2 else "weighted"
        return why_no_transform(family, noise_std, order, own, LARGEST_SECOND_MOMENT)
    if not (math.isfinite(noise_std) and noise_std > 0):
        raise ValueError(f"noise_std: expected a positive finite number, got {noise_std!r}")
    fn = activation_of(fn)
    facts = activation_facts(fn)
    if facts.constant:
        return "g is constant, so every c_m is 0"
    low, high = transform_noise_range(fn)
    if not low <= noise_std <= high:
        return f"noise_std = {noise_std:g} is outside [{low:.3g}, {high:.3g}], for which its transforms are built"
    if facts.parity == "even" and order % 2 == 1:
        return f"c_{order} = 0 for every label transform of an even activation"
    relaxed = kind == "relaxed" and order > 2
    draft = transform_on_host(fn, noise_std, order, "relaxed" if relaxed else "least_norm", 3, draft=True)
    second_moment = float(draft.second_moment)
    if not second_moment <= LARGEST_SECOND_MOMENT:
        size = (
            f"is at least {second_moment:,.0f}"
            if 0 < second_moment < 1e12
            else "is unbounded (c_m is 0 to rounding)"
        )
        return f"E[l_{order}^2] at c_{order} = 1 {size}, above the bound of {LARGEST_SECOND_MOMENT:,.0f}"
    return ""


def predicted_mse(
    fn: Channel,
    noise_std: Level,
    order: int,
    kind: TransformKind,
    *,
    dim: int = 10,
    num_experts: int = 3,
) -> float:
    """Predicted n * E||a_hat_i - a_i||^2 of the spectral estimate, to first order in 1/n, for equal mixing weights.

    p^-2 { (d-k) E[l2^2 tau_2] + (k-1) E[l_m^2 tau_m] }, p = 1/k, orthogonal experts and gates (docs/method.md).
    """
    two = transform_at(fn, noise_std, 2, kind, num_experts, draft=True)
    high = transform_at(fn, noise_std, order, kind, num_experts, draft=True)
    return num_experts**2 * float(
        (dim - num_experts) * two.weighted_second_moment + (num_experts - 1) * high.weighted_second_moment
    )


class OrderChoice(NamedTuple):
    """The order of the score tensor to decompose for an activation at a noise level."""

    order: int | None
    """3 or 4; None if neither is usable."""
    reason: str
    """The reason for this order, or for none."""


@functools.lru_cache(maxsize=4096)
def choose_order(
    fn: Channel,
    noise_std: Level,
    *,
    kind: TransformKind = "weighted",
    dim: int = 10,
    num_experts: int = 3,
) -> OrderChoice:
    """The usable order, 3 or 4, with the least predicted mean squared error; order 2 must be usable as well."""
    order_two = why_unusable(fn, noise_std, 2, kind)
    if order_two:
        return OrderChoice(None, f"order 2, which whitening needs: {order_two}")
    reasons = {m: why_unusable(fn, noise_std, m, kind) for m in (3, 4)}
    usable = [m for m in (3, 4) if not reasons[m]]
    if not usable:
        return OrderChoice(None, "; ".join(f"order {m}: {reasons[m]}" for m in (3, 4)))
    mse = {m: predicted_mse(fn, noise_std, m, kind, dim=dim, num_experts=num_experts) for m in usable}
    best = min(usable, key=lambda m: mse[m])
    return OrderChoice(
        best,
        "; ".join(
            f"order {m}: n MSE {mse[m]:.0f}" if m in mse else f"order {m}: {reasons[m]}" for m in (3, 4)
        ),
    )
