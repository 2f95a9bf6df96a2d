"""The orders and the label transforms of the moments that a method uses.

`fit`, the trials of a sweep and the experiments all use this module, so that a method is the same algorithm everywhere.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.methods.method import lookup_method
from moejax.model.families import ChannelLike, channel_name, get_channel
from moejax.model.family import Channel, Nuisances, activation_of, as_family
from moejax.moments.family_transforms import Level, traced_family_transforms, transform_at
from moejax.moments.label_transforms import LabelTransform, TransformKind, traced_label_transforms
from moejax.moments.orders import choose_order, transform_level, transform_noise_range, why_unusable
from moejax.moments.spectral import SpectralTransforms, host_transforms, traced_transforms

FEWEST_ROWS_FOR_MOMENTS = 500
"""With fewer rows, a method for which moments are optional does not use them: they determine a third moment too poorly."""


class NoUsableOrderError(ValueError):
    """A method needs moments, and no order of them is usable for this activation at this noise."""


class Orders(NamedTuple):
    """Orders of the tensors that a method decomposes."""

    orders: tuple[int, ...]
    """The best first; empty if the method uses no moments here."""
    reason: str
    """The reason for these orders."""
    third: bool = False
    """True if the third moment is decomposed without whitening (`third_transform_at`)."""


def transform_kind(
    kind: TransformKind | None, method: str, num_residual_passes: int | None = None
) -> TransformKind:
    """The kind of the label transforms: the given one, or if None "relaxed" with residual passes and "weighted" without.

    With gates that are not orthogonal to the experts, a relaxed transform has more bias in some settings, unless residual passes
    remove it.
    """
    if kind is not None:
        return kind
    by_default = 1 if method == "spectral_residual" else 0
    return "relaxed" if (by_default if num_residual_passes is None else num_residual_passes) else "weighted"


def choose_orders(
    method: str,
    activation: ChannelLike,
    noise_std: Level,
    *,
    num_rows: int,
    dim: int,
    num_experts: int,
    order: int | None = None,
    kind: TransformKind = "weighted",
) -> Orders:
    """The orders of the score tensors that a method decomposes.

    A method that needs moments gets one order: its own, the one given, or the usable one with the least predicted error. A
    method for which moments are optional gets every usable order; it gets none if there are more experts than inputs, or if no
    order was given and there are fewer than FEWEST_ROWS_FOR_MOMENTS rows. If order 2, which whitening needs, is not usable but
    order 3 is, such a method gets the third moment without whitening.

    Args:
        method: a registered name.
        activation: g, or an output family.
        noise_std: sigma in units of g's values, or the nuisances of a family; a sigma is moved into the range for which
            transforms are built.
        num_rows: rows with weight.
        dim: d, or the rank of the inputs.
        num_experts: k.
        order: the order that the user gave, 3 or 4, or None.
        kind: kind of the label transforms.

    Raises:
        NoUsableOrderError: there is none, and the method needs one or the user gave one.
    """
    registered = lookup_method(method)
    if registered.moments == "none":
        return Orders((), "no moments")
    optional = registered.moments == "optional"
    if optional and num_experts > dim:
        return Orders((), f"no moments: {num_experts} experts of {dim} inputs")
    if optional and order is None and num_rows < FEWEST_ROWS_FOR_MOMENTS:
        return Orders(
            (), f"no moments: fewer than {FEWEST_ROWS_FOR_MOMENTS} rows say too little of a third moment"
        )
    fn, name = get_channel(activation), channel_name(activation)
    noise_std = transform_level(fn, noise_std)
    if isinstance(noise_std, Nuisances) and kind in ("polynomial", "centred"):
        words = f"'weighted', 'relaxed' or 'least_norm' with family {name}"
        raise NoUsableOrderError(f"transform: expected {words}, got {kind!r}")
    where, advice = _place(noise_std), 'method="joint_em" uses no moments'
    third = Orders((), "the third moment, without whitening", third=True)
    if registered.moments == "third":
        reason = why_unusable(fn, noise_std, 3, "relaxed")
        if reason:
            raise NoUsableOrderError(f"activation: {name} has no usable order 3 {where}: {reason}; {advice}")
        return third
    chosen = registered.order or order
    if chosen is not None:
        reason = why_unusable(fn, noise_std, 2) or why_unusable(fn, noise_std, chosen, kind)
        if reason:
            raise NoUsableOrderError(
                f"order: {name} has no usable order {chosen} {where}: {reason}; {advice}"
            )
        return Orders((chosen,), "as asked")
    choice = choose_order(fn, noise_std, kind=kind, dim=dim, num_experts=num_experts)
    if choice.order is None and not optional:
        raise NoUsableOrderError(f"activation: {name} has no usable order {where}: {choice.reason}; {advice}")
    if (
        choice.order is None
        and why_unusable(fn, noise_std, 2)
        and not why_unusable(fn, noise_std, 3, "relaxed")
    ):
        return third._replace(reason=f"{third.reason}: {choice.reason}")
    if choice.order is None:
        return Orders((), f"no moments: {choice.reason}")
    others = [m for m in (3, 4) if m != choice.order and not why_unusable(fn, noise_std, m, kind)]
    return Orders((choice.order, *(others if optional else ())), choice.reason)


def _place(level: Level) -> str:
    if not isinstance(level, Nuisances):
        return f"at noise_std {level:.3g}"
    return f"at norm {level.norm:.3g}, intercept {level.intercept:.3g}, dispersion {level.dispersion:.3g}"


def transforms_at(
    fn: Channel,
    noise_std: Level | jax.Array,
    orders: tuple[int, ...],
    kind: TransformKind,
    num_experts: int,
    *,
    normal_inputs: bool = True,
) -> tuple[SpectralTransforms, ...]:
    """The label transforms for each of the orders, as `Problem.transforms` and `Problem.more_transforms` hold them.

    Args:
        fn: g.
        noise_std: sigma, or the nuisances of a family; numbers (computed on the host in double precision; NumPy leaves
            in the default precision), or traced.
        orders: the result of `choose_orders`.
        kind: kind of the transforms.
        num_experts: k.
        normal_inputs: true if the inputs are normal; required if noise_std is traced.
    """
    if isinstance(noise_std, jax.Array) or (
        isinstance(noise_std, Nuisances) and isinstance(noise_std.norm, jax.Array)
    ):
        return tuple(traced_transforms(fn, noise_std, m, kind, num_experts) for m in orders)
    round_leaf = functools.partial(np.asarray, dtype=jnp.result_type(float))
    made = (host_transforms(fn, noise_std, m, kind, num_experts, normal_inputs=normal_inputs) for m in orders)
    return tuple(jax.tree.map(round_leaf, transforms) for transforms in made)


def third_transform_at(fn: Channel, noise_std: Level | jax.Array, num_experts: int) -> LabelTransform[Any]:
    """The label transform of `Problem.third`: the relaxed one of order 3, which exists for more activations than a full one.

    Args:
        fn: g, or an output family.
        noise_std: sigma or nuisances, numbers or traced, as in `transforms_at`.
        num_experts: k.
    """
    wanted: tuple[tuple[int, TransformKind], ...] = ((3, "relaxed"),)
    if isinstance(noise_std, Nuisances) and isinstance(noise_std.norm, jax.Array):
        return traced_family_transforms(as_family(fn), noise_std, wanted, num_experts)[0]
    if isinstance(noise_std, jax.Array):
        own = activation_of(fn)
        smallest, _ = transform_noise_range(own)
        return traced_label_transforms(own, noise_std, wanted, num_experts, smallest)[0]
    made = transform_at(fn, transform_level(fn, noise_std), 3, "relaxed", num_experts)
    return jax.tree.map(functools.partial(np.asarray, dtype=jnp.result_type(float)), made)
