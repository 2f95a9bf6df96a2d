"""Input distributions to sample from: a registered sampler is one function (key, n, d, dtype) -> x (n, d).

All built-in ones have mean zero and identity covariance except `correlated_normal`; only `standard_normal` meets the theory's
assumption, the rest show what happens without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.gaussian import standard_normal

InputSampler = Callable[[jax.Array, int, int, jnp.dtype], jax.Array]
_REGISTRY: dict[str, InputSampler] = {}


def register_input_distribution(name: str, sampler: InputSampler) -> InputSampler:
    """Make a sampler (key, num_samples, dim, dtype) -> x (num_samples, dim) available under a name.

    A sample is drawn in blocks, each with its own key: what rows share (a mixture's centres, say) must not be drawn from it.

    Raises:
        ValueError: the name is no identifier, or the sampler is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier() or not callable(sampler):
        raise ValueError(
            f"input distribution: expected an identifier and a function, got {name!r} and {sampler!r}"
        )
    _REGISTRY[name] = sampler
    return sampler


def input_distribution_names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_REGISTRY)


def get_input_distribution(name: str) -> InputSampler:
    """The sampler behind a name.

    Raises:
        ValueError: it is not registered; the message names the nearest.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(str(name), _REGISTRY, n=2, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(
        f"input_distribution: unknown name {name!r}; {nearest}registered: {', '.join(_REGISTRY)}"
    )


STUDENT_T_DEGREES = 8
MIXTURE_OFFSET = 0.9
CORRELATION = 0.5


def _standard_normal(key, n, d, dtype):
    return standard_normal(key, (n, d), dtype)


def _uniform(key, n, d, dtype):
    """Uniform on [-sqrt 3, sqrt 3]^d."""
    return jax.random.uniform(key, (n * d,), dtype, -(3.0**0.5), 3.0**0.5).reshape(n, d)


def _rademacher(key, n, d, dtype):
    return jax.random.rademacher(key, (n * d,), dtype).reshape(n, d)


def _student_t(key, n, d, dtype):
    """Independent Student t with 8 degrees of freedom, scaled to unit variance."""
    scale = ((STUDENT_T_DEGREES - 2) / STUDENT_T_DEGREES) ** 0.5
    return scale * jax.random.t(key, STUDENT_T_DEGREES, (n * d,), dtype).reshape(n, d)


def _gaussian_mixture(key, n, d, dtype):
    """Two equal normal clusters at +-0.9 along the main diagonal, with identity covariance over all."""
    sign_key, normal_key = jax.random.split(key)
    direction = jnp.full(d, d**-0.5, dtype)
    z = standard_normal(normal_key, (n, d), dtype)
    along = (1.0 - MIXTURE_OFFSET**2) ** 0.5
    z = z - (1.0 - along) * (z @ direction)[:, None] * direction[None]
    signs = jax.random.rademacher(sign_key, (n, 1), dtype)
    return z + MIXTURE_OFFSET * signs * direction[None]


def _correlated_normal(key, n, d, dtype):
    """Normal with unit variances and correlation 0.5 between every two inputs."""
    shared_key, own_key = jax.random.split(key)
    shared = jax.random.normal(shared_key, (n, 1), dtype)
    return CORRELATION**0.5 * shared + (1.0 - CORRELATION) ** 0.5 * standard_normal(own_key, (n, d), dtype)


for _name, _sampler in {
    "standard_normal": _standard_normal,
    "uniform": _uniform,
    "rademacher": _rademacher,
    "student_t": _student_t,
    "gaussian_mixture": _gaussian_mixture,
    "correlated_normal": _correlated_normal,
}.items():
    register_input_distribution(_name, _sampler)
