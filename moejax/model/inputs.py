"""Input distributions: a registered one is a sampler (key, n, d, dtype) -> x (n, d), and maybe a log density x (d,) -> ().

All built-in ones have mean zero and identity covariance except `correlated_normal` and `shifted_normal`; only `standard_normal`
meets the theory's assumption; the others show the effect of its violation. `normal` and `normal_mixture` make others, to be
registered:

    register_input_distribution("mine", *normal(mean, covariance))

A log density gives the score tensors that `moejax.moments.score_tensors` needs. `uniform` and `rademacher` have none: a uniform
density does not vanish at the ends of its support, and the other is no density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.checks import require
from moejax.model.family import LOG_TWO_PI
from moejax.model.gaussian import standard_normal
from moejax.registry import Registry

InputSampler = Callable[[jax.Array, int, int, jnp.dtype], Float[jax.Array, "n d"]]


class InputDistribution(NamedTuple):
    """A sampler of inputs and, if known, their log density."""

    sampler: InputSampler
    """(key, num_samples, dim, dtype) -> x (num_samples, dim)."""
    log_density: LogDensity | None = None
    """x (d,) -> () log p(x), a scalar JAX function; None if there is no differentiable one."""


_REGISTRY: Registry[InputDistribution] = Registry("input_distribution")


def register_input_distribution(
    name: str, sampler: InputSampler, log_density: LogDensity | None = None, *, replace: bool = False
) -> InputSampler:
    """Make a sampler (key, num_samples, dim, dtype) -> x (num_samples, dim) available under a name.

    A sample is drawn in blocks, each with its own key. Values that all rows share (such as the centres of a mixture) must not
    be drawn from that key.

    Args:
        name: an identifier.
        sampler: draws the inputs.
        log_density: x (d,) -> () log p(x), up to a constant: one scalar JAX function, from which the score tensors follow.
        replace: if true, a built-in name may be given to them; your own names may always be given again.

    Raises:
        ValueError: the name is no identifier or built in, or the sampler or the density is not callable.

    Examples:
        >>> def laplace(key, num_samples, dim, dtype):
        ...     return jax.random.laplace(key, (num_samples, dim), dtype)
        >>> moejax.register_input_distribution("laplace", laplace, lambda x: -jnp.abs(x).sum()) is laplace
        True
    """
    require(
        callable(sampler), "input_distribution", "a function (key, num_samples, dim, dtype) -> x", sampler
    )
    if log_density is not None and not callable(log_density):
        raise ValueError(f"log_density: expected a function of x (d,), or None, got {log_density!r}")
    _REGISTRY.register(name, InputDistribution(sampler, log_density), replace)
    return sampler


def input_distribution_names() -> tuple[str, ...]:
    """The registered names."""
    return _REGISTRY.names()


def get_input_distribution(name: str) -> InputSampler:
    """The sampler behind a name.

    Raises:
        ValueError: the name is not registered; the message names the nearest.
    """
    return _registered(name).sampler


def get_log_density(name: str) -> LogDensity | None:
    """The log density behind a name, x (d,) -> (); None if it has none.

    Raises:
        ValueError: the name is not registered; the message names the nearest.
    """
    return _registered(name).log_density


def _registered(name: str) -> InputDistribution:
    return _REGISTRY.lookup(name)


def normal(mean: Any, covariance: Any) -> InputDistribution:
    """N(mean, covariance): sampler and log density.

    Args:
        mean: (d,).
        covariance: (d, d), positive definite.

    Raises:
        ValueError: the shapes do not fit, or the covariance is not symmetric positive definite.
    """
    return normal_mixture([1.0], [mean], [covariance])


def normal_mixture(
    mixing_weights: Sequence[float], means: Sequence[Any], covariances: Sequence[Any]
) -> InputDistribution:
    """A mixture of c normal distributions: sampler and log density.

    Args:
        mixing_weights: (c,) positive; divided by their sum.
        means: (c, d).
        covariances: (c, d, d), each positive definite.

    Raises:
        ValueError: the shapes do not fit, a weight is not positive, or a covariance is not symmetric positive definite.
    """
    shares, centres, squares = (np.asarray(a, np.float64) for a in (mixing_weights, means, covariances))
    if centres.ndim != 2 or squares.shape != (*centres.shape, centres.shape[1]):
        raise ValueError(
            f"mean and covariance: expected shapes (d,) and (d, d), got {centres.shape[1:]} and {squares.shape[1:]}"
        )
    if shares.shape != centres.shape[:1] or not np.all(shares > 0):
        raise ValueError(f"mixing_weights: expected {len(centres)} positive numbers, got {mixing_weights!r}")
    lowest = np.linalg.eigvalsh(squares).min()
    if not np.allclose(squares, squares.transpose(0, 2, 1)) or not lowest > 0:
        raise ValueError(
            f"covariance: expected a symmetric positive definite matrix, got one with least eigenvalue {lowest:.3g}"
        )
    shares = shares / shares.sum()
    roots = np.linalg.cholesky(squares)
    inverses = np.linalg.inv(roots)
    dim = centres.shape[1]
    # log(share) - log det(root): the log of each component's factor
    heights = np.log(shares) - np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)

    def sampler(key: jax.Array, num_samples: int, dim_asked: int, dtype: jnp.dtype) -> jax.Array:
        if dim_asked != dim:
            raise ValueError(f"dim: expected {dim}, the dimension of the mean, got {dim_asked}")
        component_key, normal_key = jax.random.split(key)
        z = standard_normal(normal_key, (num_samples, dim), dtype)
        bounds = jnp.asarray(np.cumsum(shares)[:-1], dtype)
        chosen = jnp.sum(jax.random.uniform(component_key, (num_samples, 1), dtype) >= bounds[None], axis=1)
        x = jnp.zeros_like(z)
        for component, (centre, root) in enumerate(zip(centres, roots, strict=True)):
            drawn = jnp.asarray(centre, dtype)[None] + z @ jnp.asarray(root.T, dtype)
            x = jnp.where((chosen == component)[:, None], drawn, x)
        return x

    def log_density(x: jax.Array) -> jax.Array:
        whitened = jnp.einsum(
            "cab,cb->ca", jnp.asarray(inverses, x.dtype), x[None] - jnp.asarray(centres, x.dtype)
        )
        kernels = jnp.asarray(heights, x.dtype) - 0.5 * jnp.sum(whitened**2, axis=1)
        return jax.nn.logsumexp(kernels) - 0.5 * dim * LOG_TWO_PI

    return InputDistribution(sampler, log_density)


STUDENT_T_DEGREES = 8
MIXTURE_OFFSET = 0.9
CORRELATION = 0.5
SHIFT = 0.5


def _standard_normal(key, n, d, dtype):
    return standard_normal(key, (n, d), dtype)


def _standard_normal_density(x):
    return -0.5 * jnp.sum(x**2) - 0.5 * x.shape[0] * LOG_TWO_PI


def _uniform(key, n, d, dtype):
    """Uniform on [-sqrt 3, sqrt 3]^d."""
    return jax.random.uniform(key, (n * d,), dtype, -(3.0**0.5), 3.0**0.5).reshape(n, d)


def _rademacher(key, n, d, dtype):
    return jax.random.rademacher(key, (n * d,), dtype).reshape(n, d)


def _student_t(key, n, d, dtype):
    """Independent Student t with 8 degrees of freedom, scaled to unit variance."""
    scale = ((STUDENT_T_DEGREES - 2) / STUDENT_T_DEGREES) ** 0.5
    return scale * jax.random.t(key, STUDENT_T_DEGREES, (n * d,), dtype).reshape(n, d)


def _student_t_density(x):
    degrees = STUDENT_T_DEGREES
    # of t = x / scale, degrees * scale^2 = degrees - 2
    height = (
        math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log((degrees - 2) * math.pi)
    )
    return jnp.sum(height - 0.5 * (degrees + 1) * jnp.log1p(x**2 / (degrees - 2)))


def _gaussian_mixture(key, n, d, dtype):
    """Two equal normal clusters at +-0.9 along the main diagonal, with identity covariance over all."""
    sign_key, normal_key = jax.random.split(key)
    direction = jnp.full(d, d**-0.5, dtype)
    z = standard_normal(normal_key, (n, d), dtype)
    along = (1.0 - MIXTURE_OFFSET**2) ** 0.5
    z = z - (1.0 - along) * (z @ direction)[:, None] * direction[None]
    signs = jax.random.rademacher(sign_key, (n, 1), dtype)
    return z + MIXTURE_OFFSET * signs * direction[None]


def _gaussian_mixture_density(x):
    variance = 1.0 - MIXTURE_OFFSET**2
    along = x.sum() * x.shape[0] ** -0.5
    across = jnp.sum(x**2) - along**2
    clusters = -0.5 * (along - MIXTURE_OFFSET * jnp.asarray([1.0, -1.0], x.dtype)) ** 2 / variance
    constant = math.log(2.0) + 0.5 * math.log(variance) + 0.5 * x.shape[0] * LOG_TWO_PI
    return jax.nn.logsumexp(clusters) - 0.5 * across - constant


def _correlated_normal(key, n, d, dtype):
    """Normal with unit variances and correlation 0.5 between every two inputs."""
    shared_key, own_key = jax.random.split(key)
    shared = jax.random.normal(shared_key, (n, 1), dtype)
    return CORRELATION**0.5 * shared + (1.0 - CORRELATION) ** 0.5 * standard_normal(own_key, (n, d), dtype)


def _correlated_normal_density(x):
    d = x.shape[0]
    own, total = 1.0 - CORRELATION, 1.0 + (d - 1) * CORRELATION
    # the covariance is `own` across the main diagonal and `total` along it
    along = x.sum() ** 2 / d
    log_determinant = (d - 1) * math.log(own) + math.log(total)
    return -0.5 * ((jnp.sum(x**2) - along) / own + along / total + log_determinant + d * LOG_TWO_PI)


def _shifted_normal(key, n, d, dtype):
    """Normal with mean 0.5 in every input, unit variances, and correlation 0.5^|i - j| between inputs i and j."""
    root = np.linalg.cholesky(CORRELATION ** np.abs(np.subtract.outer(np.arange(d), np.arange(d))))
    return SHIFT + standard_normal(key, (n, d), dtype) @ jnp.asarray(root.T, dtype)


def _shifted_normal_density(x):
    # an autoregression: each input given the one before is normal
    centred = x - SHIFT
    variance = 1.0 - CORRELATION**2
    innovations = centred[1:] - CORRELATION * centred[:-1]
    squares = centred[0] ** 2 + jnp.sum(innovations**2) / variance
    return -0.5 * (squares + (x.shape[0] - 1) * math.log(variance) + x.shape[0] * LOG_TWO_PI)


for _name, _sampler, _log_density in (
    ("standard_normal", _standard_normal, _standard_normal_density),
    ("uniform", _uniform, None),
    ("rademacher", _rademacher, None),
    ("student_t", _student_t, _student_t_density),
    ("gaussian_mixture", _gaussian_mixture, _gaussian_mixture_density),
    ("correlated_normal", _correlated_normal, _correlated_normal_density),
    ("shifted_normal", _shifted_normal, _shifted_normal_density),
):
    register_input_distribution(_name, _sampler, _log_density)

LogDensity = Callable[[Float[jax.Array, " d"]], Float[jax.Array, ""]]
"""x (d,) -> () log p(x), up to a constant; smooth, and p vanishes at the ends of its support."""
