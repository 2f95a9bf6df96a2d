r"""Output families p(y | t; s): what an expert makes of its linear predictor t = a_i . x + b_i.

A family is one function, log p(y, t, s), of a label, a linear predictor and a dispersion s > 0. Likelihood methods need its
derivatives in t and log s, which forward differentiation gives; methods of moments need E[He_r(Z) | Y = y], which quadrature gives.
`Gaussian(g)`, y ~ N(g(t), s^2), has its derivatives in closed form. Wherever a function takes an activation g, it takes a family
too: g stands for `Gaussian(g)`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moejax.model.activations import (
    ActivationFacts,
    ScalarFunction,
    activation_and_slope,
    activation_derivatives,
    activation_facts,
    apply_activation,
    get_activation,
)

LOG_TWO_PI = math.log(2.0 * math.pi)

Support = Literal["real", "positive", "counts"] | int
"""The values that a label may take: any number, positive numbers, 0, 1, 2, .., or (an integer N) 0, .., N."""
DensityFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(y, t, s) -> log p(y | t; s) in nats, elementwise."""
Moment = Callable[[jax.Array, jax.Array], jax.Array]
"""(t, s) -> a moment of the label, elementwise."""
Sampler = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(PRNG key, t, s) -> labels of t's shape."""


class FirstOrder(NamedTuple):
    """What an E-step needs of every expert and sample."""

    log_density: Float[jax.Array, "k n"]
    """(k, n) log p, in nats."""
    score: Float[jax.Array, "k n"]
    """(k, n) d log p / dt, divided by the family's `unit`."""
    information: Float[jax.Array, "k n"]
    """(k, n) not negative: what a step in t takes for -d^2 log p / dt^2, divided by the unit."""
    dispersion: tuple[Float[jax.Array, "k n"], ...]
    """What a step of the dispersion needs, each (k, n): of a Gaussian (y - g)^2; of others the derivative of log p in log s and
    its square; empty without a dispersion."""


class SecondOrder(NamedTuple):
    """What Newton's method needs of every expert and sample, each (k, n); s is the dispersion."""

    log_density: Float[jax.Array, "k n"]
    score: Float[jax.Array, "k n"]
    """d log p / dt"""
    curvature: Float[jax.Array, "k n"]
    """d^2 log p / dt^2"""
    information: Float[jax.Array, "k n"]
    """Not negative: the expected -curvature, or what stands for it."""
    dispersion_score: Float[jax.Array, "k n"]
    """d log p / d log s"""
    cross: Float[jax.Array, "k n"]
    """d^2 log p / dt d log s"""
    dispersion_curvature: Float[jax.Array, "k n"]
    """d^2 log p / d (log s)^2"""
    dispersion_information: Float[jax.Array, "k n"]
    """Positive: it stands for the expected minus of that."""


LEAST_DISPERSION_INFORMATION = 0.1
"""The least information in log s of one sample that a damped step assumes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """An output family: the law of a label given the linear predictor t of its expert.

    Two families are the same only if they are one object; functions that make families cache them.

    Args:
        name: as it is printed, such as "binomial(10)".
        log_density: (y, t, s) -> log p(y | t; s) in nats, elementwise on arrays that broadcast, normalised in y, and finite for
            every y of the support and every t in reach. JAX must differentiate it in t and s.
        support: the values of a label: "real", "positive", "counts", or N for 0, .., N.
        mean: (t, s) -> E[y], elementwise; for heavy tails the location.
        sample: (key, t, s) -> labels of t's shape; None: the family cannot be drawn from.
        variance: (t, s) -> Var[y]; None: it is taken by quadrature.
        has_dispersion: if true, log_density depends on s > 0, which is estimated unless it is known.
        information: (t, s) -> E[(d log p / dt)^2 | t]; None takes -d^2 log p / dt^2 where that is positive.
        smooth: false if the second derivative in t misses a part of the curvature (a kink of log p in t, as Laplace's): it is then
            taken by differences over a small width.
        activation: g, if the law depends on t by g(t); None for t itself.
        location_scale: true if y = g(t) + s * noise: labels of a homogeneous g may then be scaled.
        marginal_tells_norm: false if the law of a label whose predictor is normal does not tell the norm of the experts from s, or
            not if there are outliers.
        num_parameters: parameters of the family that are estimated besides s (cuts, degrees of freedom).
        adapt: (y, t, s, shares) -> the family with these parameters estimated from labels (n,), and, after a fit, linear
            predictors (n, k), dispersions (k,) and responsibilities times weights (n, k); before it t and s are None and shares
            are the weights (n,). None if the family has no such parameters.

    Examples:
        >>> halves = moejax.Family(
        ...     "laplace_of_one",
        ...     lambda y, t, s: -jnp.abs(y - t) - jnp.log(2.0),
        ...     support="real",
        ...     mean=lambda t, s: t,
        ...     smooth=False,
        ... )
        >>> round(float(halves.log_density(1.0, 1.0, 1.0)), 4)
        -0.6931
    """

    name: str
    log_density: DensityFunction
    _: dataclasses.KW_ONLY
    support: Support
    mean: Moment
    sample: Sampler | None = None
    variance: Moment | None = None
    has_dispersion: bool = False
    information: Moment | None = None
    smooth: bool = True
    activation: ScalarFunction | None = None
    location_scale: bool = False
    marginal_tells_norm: bool = True
    num_parameters: int = 0
    adapt: Callable[..., Family] | None = None

    def unit(self, s: jax.Array) -> jax.Array:
        """The factor of `FirstOrder.score` and `information`, elementwise of s."""
        return jnp.ones_like(s)

    def first_order(
        self, y: Float[jax.Array, "#k n"], t: Float[jax.Array, "k n"], s: Float[jax.Array, "k 1"]
    ) -> FirstOrder:
        """The log-density and its first derivatives, for labels (k or 1, n), predictors (k, n) and dispersions (k, 1)."""
        one = jnp.ones_like(t)

        def in_t(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(lambda t: self.log_density(y, t, s), (t,), (one,))

        if self.information is None:
            (value, score), (_, curvature) = jax.jvp(in_t, (t,), (one,))
            information = jnp.maximum(-curvature, 0.0)
        else:
            value, score = in_t(t)
            information = jnp.broadcast_to(self.information(t, s), t.shape)
        if not self.has_dispersion:
            return FirstOrder(value, score, information, ())

        log_s = jnp.log(s)  # terms of s alone are computed once for an expert
        of_s = jax.jvp(lambda v: self.log_density(y, t, jnp.exp(v)), (log_s,), (jnp.ones_like(log_s),))[1]
        return FirstOrder(value, score, information, (of_s, of_s**2))

    def second_order(
        self,
        y: Float[jax.Array, "#k n"],
        t: Float[jax.Array, "k n"],
        s: Float[jax.Array, "k 1"],
        width: Float[jax.Array, ""] | None = None,
    ) -> SecondOrder:
        """The log-density and its first and second derivatives; shapes as in `first_order`.

        With a `width` (), those of the log-density averaged over [t - width, t + width].
        """
        one, zero = jnp.ones_like(t), jnp.zeros_like(t)
        log_s = jnp.log(s)  # terms of s alone are computed once for an expert

        def value_of(t: jax.Array, log_s: jax.Array) -> jax.Array:
            return self.log_density(y, t, jnp.exp(log_s))

        def in_t(t: jax.Array, log_s: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(lambda t: value_of(t, log_s), (t,), (one,))

        def in_log_s(t: jax.Array, log_s: jax.Array) -> jax.Array:
            return jax.jvp(lambda v: value_of(t, v), (log_s,), (jnp.ones_like(log_s),))[1]

        if width is None:
            (value, score), (_, curvature) = jax.jvp(lambda t: in_t(t, log_s), (t,), (one,))
        else:
            value = value_of(t, log_s)
            (above, score_above), (below, score_below) = (
                in_t(t + sign * width, log_s) for sign in (1.0, -1.0)
            )
            score, curvature = (above - below) / (2.0 * width), (score_above - score_below) / (2.0 * width)
        if self.information is None:
            information = jnp.maximum(-curvature, 0.0)
        else:
            information = jnp.broadcast_to(self.information(t, s), t.shape)
        if not self.has_dispersion:
            return SecondOrder(value, score, curvature, information, zero, zero, zero, zero)
        of_s, of_s_twice = jax.jvp(lambda v: in_log_s(t, v), (log_s,), (jnp.ones_like(log_s),))
        if width is None:
            cross = jax.jvp(lambda t: in_log_s(t, log_s), (t,), (one,))[1]
        else:
            cross = (in_log_s(t + width, log_s) - in_log_s(t - width, log_s)) / (2.0 * width)
        least = jnp.maximum(-of_s_twice, LEAST_DISPERSION_INFORMATION)
        return SecondOrder(value, score, curvature, information, of_s, cross, of_s_twice, least)


class Nuisances(NamedTuple):
    """What the law of a label has besides directions and gates: one norm, intercept and dispersion for all experts."""

    norm: Any
    """() norm of every expert."""
    intercept: Any
    """() its intercept."""
    dispersion: Any
    """() s; 1 for a family without."""


class Gaussian(Family):
    """y ~ N(g(t), s^2), with its derivatives in closed form; `gaussian(g)` makes one."""

    def __init__(self, fn: ScalarFunction):
        super().__init__(
            "gaussian",
            lambda y, t, s: -0.5 * ((y - apply_activation(fn, t)) / s) ** 2 - jnp.log(s) - 0.5 * LOG_TWO_PI,
            support="real",
            mean=lambda t, s: apply_activation(fn, t),
            sample=lambda key, t, s: apply_activation(fn, t) + s * jax.random.normal(key, t.shape, t.dtype),
            variance=lambda t, s: jnp.broadcast_to(s**2, t.shape),
            has_dispersion=True,
            activation=fn,
            location_scale=True,
        )

    def unit(self, s: jax.Array) -> jax.Array:
        """1 / s^2: sums over samples are then those of least squares, whatever the noise."""
        return 1.0 / s**2

    def first_order(self, y: Any, t: Any, s: Any) -> FirstOrder:
        """As in `Family`."""
        assert self.activation is not None, "a Gaussian has an activation"
        mean, slope = activation_and_slope(self.activation, t)
        error = y - mean
        squares = error**2
        return FirstOrder(log_normal(squares, s[:, 0]), slope * error, slope**2, (squares,))

    def second_order(self, y: Any, t: Any, s: Any, width: Any = None) -> SecondOrder:
        """As in `Family`; with a `width`, the derivatives of g are those of g averaged over it."""
        assert self.activation is not None, "a Gaussian has an activation"
        mean, slope, second = activation_derivatives(self.activation, t, width)
        inverse = 1.0 / s
        residual = y - mean
        error, slope = residual * inverse, slope * inverse
        score = error * slope
        return SecondOrder(
            log_density=log_normal(residual**2, s[:, 0]),
            score=score,
            curvature=error * second * inverse - slope**2,
            information=slope**2,
            dispersion_score=error**2 - 1.0,
            cross=-2.0 * score,
            dispersion_curvature=-2.0 * error**2,
            dispersion_information=jnp.full_like(error, 2.0),
        )


def log_normal(
    squared_residual: Float[jax.Array, "k n"], noise_std: Float[jax.Array, " k"]
) -> Float[jax.Array, "k n"]:
    """(k, n): log N(residual; 0, sigma_i^2) from squared residuals (k, n) and noise_std (k,)."""
    scaled = squared_residual * (0.5 / noise_std**2)[:, None]
    return -scaled - (jnp.log(noise_std) + 0.5 * LOG_TWO_PI)[:, None]


@functools.lru_cache(maxsize=256)
def gaussian(fn: ScalarFunction) -> Gaussian:
    """The Gaussian family of an activation g.

    Examples:
        >>> moejax.model.family.gaussian(jnp.tanh).support
        'real'
    """
    return Gaussian(fn)


Channel = ScalarFunction | Family
"""The law of a label given its linear predictor: a family, or an activation g for `Gaussian(g)`."""


def as_family(channel: Channel) -> Family:
    """The family of a channel."""
    return channel if isinstance(channel, Family) else gaussian(channel)


def is_gaussian(channel: Channel) -> bool:
    """True for an activation, and for a Gaussian family."""
    return not isinstance(channel, Family) or isinstance(channel, Gaussian)


def activation_of(channel: Channel) -> ScalarFunction:
    """g of Gaussian labels.

    Raises:
        TypeError: another family.
    """
    if not isinstance(channel, Family):
        return channel
    if not isinstance(channel, Gaussian) or channel.activation is None:
        raise TypeError(f"family {channel.name}: expected Gaussian labels")
    return channel.activation


@functools.lru_cache(maxsize=256)
def channel_facts(channel: Channel) -> ActivationFacts:
    """The facts of a channel: those of its activation, as far as they hold for its labels.

    Labels of a family that has no location are neither odd nor homogeneous, whatever g is.
    """
    family = as_family(channel)
    if not isinstance(channel, Family):
        return activation_facts(channel)
    if family.activation is None:
        return ActivationFacts("none", math.inf, 1.0, False, not family.smooth, False, False)
    facts = activation_facts(family.activation)
    return facts._replace(
        parity=facts.parity if facts.parity == "even" or family.location_scale else "none",
        homogeneous=facts.homogeneous and family.location_scale,
        kinked=facts.kinked or not family.smooth,
    )


def is_linear_location(channel: Channel) -> bool:
    """True if a label is its linear predictor plus noise, so that labels less an offset are those of a model without."""
    return channel_facts(channel).homogeneous and as_family(channel).activation is get_activation("linear")


def computes_in(channel: Channel, dtype: Any) -> bool:
    """True if the density, or g, of numbers of a floating dtype has that dtype."""
    number = jax.ShapeDtypeStruct((), dtype)
    if isinstance(channel, Family):
        return jax.eval_shape(channel.log_density, number, number, number).dtype == dtype
    return jax.eval_shape(channel, number).dtype == dtype
