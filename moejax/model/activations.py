"""The registry of expert non-linearities g, in y ~ N(g(a_i . x), sigma^2).

`register_activation(name, fn)` adds one: `fn` is any scalar JAX function; it may have kinks.
Wherever a name is accepted, the function itself is too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.environment import is_machines_fault
from moejax.model.gaussian import HALF_WIDTH
from moejax.model.on_host import on_host
from moejax.registry import Registry

ScalarFunction = Callable[[Float[jax.Array, ""]], Float[jax.Array, ""]]
ActivationLike = str | ScalarFunction
Parity = Literal["even", "odd", "none"]


class ActivationFacts(NamedTuple):
    """Properties of g, without noise, that the label transforms depend on."""

    parity: Parity
    """"odd" means odd up to an additive constant (the sigmoid is)."""
    largest_slope: float
    """max |g'| over +-8.5 standard deviations, by differences; sets the spacing of the quadrature."""
    standard_deviation: float
    """Standard deviation of g(Z), Z standard normal."""
    constant: bool
    kinked: bool
    """True if g' jumps somewhere."""
    homogeneous: bool
    """True if g(2 t) = 2 g(t): the scale of the labels can then be absorbed by the experts."""
    stepped: bool
    """True if g changes in jumps only (a step, a staircase): its slope is then no help in an ascent."""


_REGISTRY: Registry[ScalarFunction] = Registry("activation")


def register_activation(name: str, fn: ScalarFunction, *, replace: bool = False) -> ScalarFunction:
    """Make `fn` available under `name` everywhere an activation is named.

    Args:
        name: its name in specs, on the command line and in `fit(activation=...)`.
        fn: scalar JAX function R -> R, finite on [-8.5, 8.5]; it may have kinks, and cusps where its slope is infinite.
        replace: if true, a built-in name may be given to `fn`; your own names may always be given again.

    Returns:
        `fn` itself, so that `@functools.partial(register_activation, "name")` works as a decorator.

    Raises:
        ValueError: the name is no identifier or built in; or `fn` is not a finite scalar function that JAX differentiates
            (single points excepted).

    Examples:
        >>> _ = moejax.register_activation("hinge", lambda t: jnp.maximum(t - 0.3, 0.0))
        >>> "hinge" in moejax.activation_names()
        True
    """
    activation_facts(fn)
    _REGISTRY.register(name, fn, replace)
    return fn


def activation_names() -> tuple[str, ...]:
    """The registered names, in the order of their registration.

    Examples:
        >>> moejax.activation_names()[:3]
        ('linear', 'relu', 'leaky_relu')
    """
    return _REGISTRY.names()


def get_activation(activation: ActivationLike) -> ScalarFunction:
    """The function behind a name; a function is returned as it is.

    Raises:
        ValueError: the name is not registered; the message names the nearest registered ones.
    """
    if callable(activation):
        return activation
    return _REGISTRY.lookup(activation)


def activation_name(activation: ActivationLike) -> str:
    """The name to print for an activation: the one given, or the one the function is registered or defined under."""
    if isinstance(activation, str):
        return activation
    for name, fn in _REGISTRY.items():
        if fn is activation:
            return name
    return getattr(activation, "__name__", repr(activation))


def unregistered(activation: ActivationLike) -> ScalarFunction | None:
    """The function, if it is not the one that is registered under its name; None if its name is enough to find it again."""
    if not callable(activation) or any(fn is activation for _, fn in _REGISTRY.items()):
        return None
    return activation


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def apply_activation(fn: ScalarFunction, t: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """g elementwise, for t of any shape; `fn` itself receives scalars only.

    Where g has no finite slope (a cusp, as that of the cube root at 0), its derivative here is zero: a sample that lies there
    exactly counts in the likelihood but not in the direction of a step, whose other terms stay finite.
    """
    return _elementwise(fn, t)


def _elementwise(fn: ScalarFunction, t: jax.Array) -> jax.Array:
    return jax.vmap(fn)(t.reshape(-1)).reshape(t.shape)


@apply_activation.defjvp
def _(fn: ScalarFunction, point: tuple[jax.Array], tangent: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (t,) = point
    value, slope = jax.jvp(lambda s: _elementwise(fn, s), (t,), (jnp.ones_like(t),))
    return value, _finite_or_zero(slope) * tangent[0]


def _finite_or_zero(values: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(values), values, 0)


def activation_derivatives(
    fn: ScalarFunction, t: Float[jax.Array, "*shape"], width: Float[jax.Array, ""] | None = None
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """(g(t), g'(t), g''(t)) elementwise; a derivative that is not finite somewhere is zero there.

    With a `width` (), the derivatives are those of g averaged over [t - width, t + width], by differences of g and g':
    at a kink they see the change of slope that pointwise derivatives miss.
    """
    if width is None:
        (g, slope), (_, second) = jax.jvp(lambda s: activation_and_slope(fn, s), (t,), (jnp.ones_like(t),))
        return g, slope, _finite_or_zero(second)
    (above, slope_above), (below, slope_below) = (
        activation_and_slope(fn, t + sign * width) for sign in (1.0, -1.0)
    )
    return (
        apply_activation(fn, t),
        (above - below) / (2.0 * width),
        (slope_above - slope_below) / (2.0 * width),
    )


def activation_and_slope(
    fn: ScalarFunction, t: Float[jax.Array, "*shape"]
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """(g(t), g'(t)) elementwise, by forward differentiation; at a kink, the derivative JAX takes there."""
    return jax.jvp(lambda s: apply_activation(fn, s), (t,), (jnp.ones_like(t),))


def values_on_host(fn: ScalarFunction, points: Float[np.ndarray, "*shape"]) -> np.ndarray:
    """g at points, in double precision under any default of JAX, also while a program is being traced."""
    return on_host(_elementwise, fn, points)


def values_and_slopes_on_host(
    fn: ScalarFunction, points: Float[np.ndarray, "*shape"]
) -> tuple[np.ndarray, np.ndarray]:
    """g and its slope at points, as `values_on_host`."""
    return on_host(activation_and_slope, fn, points)


def _slopes_on_host(fn: ScalarFunction, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """g' and g'' at points by JAX's differentiation; not finite where that fails."""
    return on_host(_both_slopes, fn, points)


def _both_slopes(fn: ScalarFunction, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    def slope(t: jax.Array) -> jax.Array:
        return jax.jvp(functools.partial(_elementwise, fn), (t,), (jnp.ones_like(t),))[1]

    return jax.jvp(slope, (t,), (jnp.ones_like(t),))


@functools.lru_cache(maxsize=256)
def activation_facts(fn: ScalarFunction) -> ActivationFacts:
    """Parity, steepness and constancy of g, from its values on a fine grid (on the host, in double precision).

    Raises:
        ValueError: `fn` is not a finite scalar function of one real number, or JAX does not find its derivatives.
    """
    name = activation_name(fn)
    z = np.linspace(-HALF_WIDTH, HALF_WIDTH, 8193)
    g = _attempt(values_on_host, fn, z, f"activation {name}: expected a scalar JAX function, but calling it")
    if g.shape != z.shape or not np.issubdtype(g.dtype, np.floating):
        raise ValueError(
            f"activation {name}: expected one real number for a scalar input, got dtype {g.dtype}, shape {g.shape}"
        )
    if not np.all(np.isfinite(g)):
        raise ValueError(
            f"activation {name}: expected finite values on [-8.5, 8.5], got {g[~np.isfinite(g)][0]} at {z[~np.isfinite(g)][0]:.4g}"
        )
    slope = _checked_slope(fn, z, g, name)
    weights = np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).sum()
    standard_deviation = float(np.sqrt(weights @ (g - weights @ g) ** 2))
    scale = np.abs(g - g.mean()).max()
    tolerance = 1e-9 * max(scale, np.abs(g).max(), 1e-300)
    constant = bool(scale <= tolerance)
    if np.abs(g - g[::-1]).max() <= tolerance:
        parity: Parity = "even"
    elif np.abs(g + g[::-1] - 2 * g[z.size // 2]).max() <= tolerance:
        parity = "odd"
    else:
        parity = "none"
    half = values_on_host(fn, 0.5 * z)
    return ActivationFacts(
        parity,
        float(np.abs(np.diff(g) / np.diff(z)).max()),
        standard_deviation,
        constant,
        _has_kink(z, g),
        homogeneous=bool(np.abs(g - 2 * half).max() <= tolerance),
        stepped=not constant and bool(_path(slope, z) <= STEPPED * np.abs(np.diff(g)).sum()),
    )


def _attempt(evaluate: Callable[..., Any], fn: ScalarFunction, z: np.ndarray, words: str) -> Any:
    """`evaluate(fn, z)`; a ValueError in one line if it fails."""
    try:
        return evaluate(fn, z)
    except Exception as error:  # a user's function may raise anything
        if is_machines_fault(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, TypeError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{words} failed: {reason}") from error


STEPPED = 1e-6
"""If the integral of |g'| is less than this share of the total variation of g, g is a step function."""


def _path(slope: np.ndarray, z: np.ndarray) -> float:
    """Total variation of a function from its slope at the points z."""
    return float(np.abs(slope).sum() * (z[1] - z[0]))


def _checked_slope(fn: ScalarFunction, z: np.ndarray, g: np.ndarray, name: str) -> np.ndarray:
    """g' at the points z, zero where it is not finite; refuses a g whose derivatives JAX does not find.

    A derivative that is not finite is replaced by zero. That is harmless at a single point (a cusp) and right where g does not
    change, as on the flat side of sqrt(max(t, 0)); elsewhere it would be wrong.

    Raises:
        ValueError: g' or g'' is not finite at neighbouring points of the grid z between which g or g' changes.
    """
    slopes = _attempt(
        _slopes_on_host, fn, z, f"activation {name}: expected a function that JAX differentiates, but that"
    )
    for what, derivative, antiderivative in zip(
        ("slope", "second derivative"), slopes, (g, slopes[0]), strict=True
    ):
        missing = ~np.isfinite(derivative)
        values = np.where(np.isfinite(antiderivative), antiderivative, 0.0)
        changes = np.abs(np.diff(values)) > 1e-9 * max(np.abs(values).max(), 1e-300)
        wrong = np.flatnonzero(missing[1:] & missing[:-1] & changes)
        if wrong.size:
            at = wrong[0]
            raise ValueError(
                f"activation {name}: expected a {what} that JAX finds, got {derivative[at]} at {z[at]:.4g} and beside it; "
                "keep the points without one away from it: not sqrt(maximum(t, 0)) but "
                "where(t > 0, sqrt(where(t > 0, t, 1)), 0)"
            )
    return np.where(np.isfinite(slopes[0]), slopes[0], 0.0)


def _has_kink(z: np.ndarray, g: np.ndarray) -> bool:
    """True if the largest jump of the slope between neighbouring cells stays when the cells are halved."""

    def largest_jump(stride: int) -> float:
        slopes = np.diff(g[::stride]) / np.diff(z[::stride])
        return float(np.abs(np.diff(slopes)).max())

    return largest_jump(1) > max(0.75 * largest_jump(2), 1e-6 * np.abs(np.diff(g) / np.diff(z)).max())


def _leaky_relu(t: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(t, 0.01)


def _gelu(t: jax.Array) -> jax.Array:
    return jax.nn.gelu(t, approximate=False)


for _name, _fn in {
    "linear": lambda t: t,
    "relu": jax.nn.relu,
    "leaky_relu": _leaky_relu,
    "elu": jax.nn.elu,
    "gelu": _gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "erf": jax.scipy.special.erf,
    "sin": jnp.sin,
    "abs": jnp.abs,
    "square": jnp.square,
    "cos": jnp.cos,
}.items():
    _REGISTRY.register(_name, _fn)
