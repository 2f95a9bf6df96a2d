"""The logarithm of the gamma function from elementary operations, whose derivatives are as cheap as itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

_FIRST = 8.0
"""Stirling's series is used from here on; smaller arguments are shifted."""
_SHIFT = 8
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)


def log_gamma(x: Float[jax.Array, "*shape"] | float) -> Float[jax.Array, "*shape"]:
    """log Gamma(x) for x > 0, elementwise, to rounding, by Stirling's series for x or for x + 8.

    `jax.scipy.special.gammaln` has the same values, but its second derivative is a zeta function, which takes much longer.

    Examples:
        >>> round(float(log_gamma(jnp.asarray(5.0))), 4)  # log 24
        3.1781

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 6.1.41.
    """
    x = jnp.asarray(x)
    small = x < _FIRST
    near = jnp.where(small, x, 1.0)
    product = near
    for step in range(1, _SHIFT):
        product = product * (near + step)
    far = jnp.where(small, near + _SHIFT, x)
    inverse = 1.0 / far
    square = inverse * inverse
    series = jnp.zeros_like(far)
    for coefficient in reversed(_STIRLING):
        series = series * square + coefficient
    value = (far - 0.5) * jnp.log(far) - far + 0.5 * math.log(2.0 * math.pi) + series * inverse
    return value - jnp.where(small, jnp.log(product), 0.0)
