"""The M-step of EM, from the sums of an E-step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from moejax.likelihood.blocks import SampleBlocks, sum_over_blocks
from moejax.likelihood.collapse import noise_floor
from moejax.likelihood.free_columns import FreeColumns, expert_columns, gate_columns, parts_of_design
from moejax.likelihood.predictors import Predictors, gate_centring, weighted_gram
from moejax.model.family import Channel, as_family, is_gaussian
from moejax.model.mixture import NoiseModel
from moejax.model.small_linear_algebra import solve_positive_definite

TRUSTED_CHANGE = 2.0
"""Largest root mean square change of the logits, in nats, that a Newton step of the gates may make. From saturated gates, a longer
step may raise the likelihood by accident and saturate them further."""


class Point(NamedTuple):
    """The current point of EM."""

    predictors: Predictors
    noise_std: Float[jax.Array, " k *m"]
    """(k,), or (k, m)"""


class Expectation(NamedTuple):
    """The sums over samples that the M-step needs from one E-step; r are responsibilities times sample weights.

    With m outputs, fields for experts have an entry for each output of each expert: k m instead of k.
    """

    log_likelihood: Float[jax.Array, ""]
    """()"""
    gate_gradient: Float[jax.Array, "k-1 D"]
    """(k - 1, D) sum (r - P) x."""
    gate_information: Float[jax.Array, "G G"]
    """((k - 1) D, (k - 1) D) sum (diag P - P P') (x) x x'."""
    counts: Float[jax.Array, " k"]
    """(k,) sum r."""
    dispersion: tuple[Float[jax.Array, " k"], ...]
    """Each (k,): the sums of r times the terms of `FirstOrder.dispersion`; of a Gaussian one, sum r (y - g)^2."""
    expert_gradient: Float[jax.Array, "k D"] | None
    """(k, D) sum r (score) x, in the family's unit: of a Gaussian sum r (y - g) g' x. None if the experts are fixed."""
    expert_information: Float[jax.Array, "k D D"] | None
    """(k, D, D) sum r (information) x x', in the family's unit: of a Gaussian sum r g'^2 x x'. None if the experts are fixed."""


def boehning_bound(
    blocks: SampleBlocks,
    num_experts: int,
    ridge: Float[jax.Array, ""],
    columns: FreeColumns | None = None,
) -> Float[jax.Array, "G G"]:
    """((k-1) D, (k-1) D): (I - 11'/k) / 2 (x) sum w x x' and the ridge: an upper bound on every Hessian of the gates' objective."""

    def gram_of(design: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        del y
        return weighted_gram(parts_of_design(design, columns)[1], weights[None])[0]

    gram = sum_over_blocks(gram_of, blocks)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jnp.kron(gate_centring(num_experts, gram.dtype), 0.5 * gram + ridge * eye)


class MStep(NamedTuple):
    """A point that the M-step proposes."""

    point: Point
    promised: Float[jax.Array, ""]
    """() its gain in expected log-likelihood, if g were linear and the gates' objective quadratic."""
    shortened: Bool[jax.Array, ""]
    """() bool: the gates' step was longer than TRUSTED_CHANGE and was cut."""


def maximisation(
    point: Point,
    sums: Expectation,
    *,
    damping: Float[jax.Array, ""],
    caution: Float[jax.Array, ""],
    bound: Float[jax.Array, "G G"],
    ridge: Float[jax.Array, ""],
    noise: NoiseModel,
    hold_noise: Bool[jax.Array, ""] | bool = False,
    hold_experts: Bool[jax.Array, ""] | bool = False,
    gates_first: Float[jax.Array, ""] | float = jnp.inf,
    least_noise: Float[jax.Array, "*m"] | None = None,
    columns: FreeColumns | None = None,
    fn: Channel,
) -> MStep:
    """The M-step from the sums of an E-step, damped.

    Args:
        point: the point of the E-step.
        sums: the sums of the E-step.
        damping: () mu >= 0.
        caution: () mu of the gates' step only, used if it is larger than `damping`.
        bound: the matrix of `boehning_bound`.
        ridge: () coefficient of sum_i ||w_i - mean w||^2 / 2.
        noise: which noise is updated.
        hold_noise: () bool, traced: if true, the noise is not updated.
        hold_experts: () bool, traced: if true, the experts are not updated.
        gates_first: () nats: the experts are not updated if the step of the gates promises this gain or more.
        least_noise: () or (m,), as in `noise_m_step`.
        columns: the columns whose coefficients are free, as in the sums; None for all.
        fn: the activation g, or an output family.
    """
    (rows, offsets), noise_std = point
    k, num_rows, promised = noise_std.shape[0], noise_std.size, jnp.zeros((), rows.dtype)
    experts, gates = expert_columns(rows[:num_rows], columns), gate_columns(rows[num_rows:], columns)
    size = gates.shape[1]
    shortened = jnp.asarray(False)
    if k > 1:
        centring = gate_centring(k, rows.dtype)
        gradient = (sums.gate_gradient - ridge * (centring @ gates)).reshape(-1)
        hessian = sums.gate_information + ridge * jnp.kron(centring, jnp.eye(size, dtype=rows.dtype))
        total = sums.counts.sum() / (num_rows // k)
        step, shortened = _trusted_step(hessian, gradient, bound, jnp.maximum(damping, caution), total)
        gates = gates + step.reshape(k - 1, size)
        promised = step @ gradient - 0.5 * step @ hessian @ step
    hold_experts |= promised >= gates_first
    gains = jnp.zeros(num_rows, rows.dtype)
    if sums.expert_gradient is not None and sums.expert_information is not None:
        step = _least_squares(sums.expert_information, sums.expert_gradient) / (1.0 + damping)
        step = jnp.where(hold_experts, 0.0, step)
        experts = experts + step
        gains = jnp.sum(step * sums.expert_gradient, axis=1)
        gains = gains - 0.5 * jnp.einsum("id,ide,ie->i", step, sums.expert_information, step)
    counts, gains, *terms = (a.reshape(noise_std.shape) for a in (sums.counts, gains, *sums.dispersion))
    if is_gaussian(fn):
        (squares,) = terms
        updated, gain = _noise_step(noise_std, counts, squares, gains, noise, least_noise, hold_noise)
    else:
        gain = jnp.sum(gains * as_family(fn).unit(noise_std))
        updated = noise_std
        if noise != "known" and terms:
            step, more = _dispersion_step(counts, *terms, noise=noise, damping=damping)
            updated = jnp.where(hold_noise, noise_std, noise_std * jnp.exp(step))
            gain = gain + jnp.where(hold_noise, 0.0, more)
    promised = promised + gain
    if columns is None:
        rows = jnp.concatenate([experts, gates])
    else:
        rows = rows.at[:num_rows, np.asarray(columns.experts, np.int32)].set(experts)
        rows = rows.at[num_rows:, np.asarray(columns.gates, np.int32)].set(gates)
    point = Point(Predictors(rows, offsets), updated)
    return MStep(point, promised, shortened)


def _trusted_step(
    hessian: Float[jax.Array, "G G"],
    gradient: Float[jax.Array, " G"],
    bound: Float[jax.Array, "G G"],
    mu: Float[jax.Array, ""],
    total: Float[jax.Array, ""],
) -> tuple[Float[jax.Array, " G"], Bool[jax.Array, ""]]:
    """The step (H + mu B)^-1 gradient of the gates, cut to TRUSTED_CHANGE, and true if it was cut.

    The quadratic model of a softmax holds over a few nats of the logits, whose change is measured in B; with mu >= 1 it is a bound.
    """
    # the rounding error of a Hessian that is nearly singular because gates are saturated
    rounding = gradient.size * jnp.finfo(gradient.dtype).eps * jnp.diag(jnp.diag(hessian))
    step = solve_positive_definite(hessian + rounding + mu * bound, gradient)
    change = jnp.sqrt(step @ bound @ step / total)
    shortened = (change > TRUSTED_CHANGE) & (mu < 1.0)
    return jnp.where(shortened, TRUSTED_CHANGE / change, 1.0) * step, shortened


def _least_squares(
    gram: Float[jax.Array, "k D D"], gradient: Float[jax.Array, "k D"]
) -> Float[jax.Array, "k D"]:
    """(k, D): gram^-1 gradient for each of (k, D, D) and (k, D), zero if that is not finite."""
    size, info = gram.shape[1], jnp.finfo(gram.dtype)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / size
    # a minimal ridge, for an expert that few samples or only flat parts of g support
    floor = (10 + size) * info.eps * jnp.maximum(trace, info.tiny) + info.tiny
    step = solve_positive_definite(gram + floor * jnp.eye(size, dtype=gram.dtype)[None], gradient)
    return jnp.where(jnp.isfinite(step), step, 0.0)


def _noise_step(
    noise_std: Float[jax.Array, " k *m"],
    counts: Float[jax.Array, " k *m"],
    before: Float[jax.Array, " k *m"],
    gains: Float[jax.Array, " k *m"],
    noise: NoiseModel,
    least_noise: Float[jax.Array, "*m"] | None,
    hold_noise: Bool[jax.Array, ""] | bool,
) -> tuple[Float[jax.Array, " k *m"], Float[jax.Array, ""]]:
    """The noise of Gaussian labels that maximises the expected log-likelihood after the experts' step, and what both gain, () nats.

    `before` are the sums of squares before the step, whose `gains` are in the unit of the squares.
    """
    # the rounding residual of an exact fit is no noise level
    after = jnp.maximum(before - 2.0 * gains, 10 * jnp.finfo(before.dtype).eps * before)
    updated = jnp.where(hold_noise, noise_std, noise_m_step(noise_std, counts, after, noise, least_noise))

    def noise_loss(squares: jax.Array, noise_std: jax.Array) -> jax.Array:
        return jnp.sum(0.5 * squares / noise_std**2 + counts * jnp.log(noise_std))

    return updated, noise_loss(before, noise_std) - noise_loss(after, updated)


LARGEST_DISPERSION_STEP = 1.0
"""The logarithm of a dispersion changes by at most this much in one step."""
DISPERSION_INFORMATION = 1e-2
"""The least information in the logarithm of a dispersion, per sample, that a step assumes."""


def _dispersion_step(
    counts: Float[jax.Array, " k"],
    gradient: Float[jax.Array, " k"],
    information: Float[jax.Array, " k"],
    *,
    noise: NoiseModel,
    damping: Float[jax.Array, ""],
) -> tuple[Float[jax.Array, " free"], Float[jax.Array, ""]]:
    """A damped step of scoring in the log dispersions, (k,) or (1,) if they are shared, and what it gains, () nats."""
    if noise == "shared":
        counts, gradient, information = (
            a.sum(axis=0, keepdims=True) for a in (counts, gradient, information)
        )
    least = DISPERSION_INFORMATION * counts + jnp.finfo(counts.dtype).tiny
    step = gradient / jnp.maximum(information, least) / (1.0 + damping)
    step = jnp.clip(step, -LARGEST_DISPERSION_STEP, LARGEST_DISPERSION_STEP)
    promised = step * gradient - 0.5 * information * step**2
    return step, promised.sum()


def noise_m_step(
    noise_std: Float[jax.Array, " k *m"],
    counts: Float[jax.Array, " k *m"],
    squares: Float[jax.Array, " k *m"],
    noise: NoiseModel,
    least_noise: Float[jax.Array, "*m"] | None = None,
) -> Float[jax.Array, " k *m"]:
    """(k,), or (k, m): the noise that maximises the expected log-likelihood; `noise_std` itself if it is known.

    Noises of their own are at least `noise_floor`, which depends on `least_noise`, () or (m,), and the noises `noise_std` so far.
    """
    if noise == "known":
        return noise_std
    if noise == "shared":  # summed over the experts; every output has its own
        squares, counts = (jnp.zeros_like(a) + a.sum(axis=0, keepdims=True) for a in (squares, counts))
    tiny = jnp.finfo(squares.dtype).tiny
    updated = jnp.sqrt(jnp.maximum(squares / jnp.maximum(counts, tiny), tiny))
    if noise == "per_expert" and least_noise is not None:
        floor = noise_floor(noise_std, least_noise, counts.sum(axis=0))
        updated = jnp.maximum(updated, jnp.broadcast_to(floor, updated.shape))
    return updated
