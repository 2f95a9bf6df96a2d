"""The registry of methods: each maps a sample to an estimate, inside one compiled program.

A method is a function (key, problem, config) -> MethodResult: `problem` is data (arrays), `config` is static. A new one is
registered under a name with `register_method`, and is then known to `fit`, to trials and to sweeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.checks import require
from moejax.methods.options import FitOptions, Start
from moejax.model.activations import (
    ActivationLike,
    ScalarFunction,
    activation_facts,
    activation_name,
    get_activation,
)
from moejax.model.inputs import LogDensity
from moejax.model.mixture import MoEParams, NoiseModel, mean_gates
from moejax.model.status import Status
from moejax.moments.spectral import SpectralEstimate, SpectralTransforms
from moejax.registry import Registry

STARTS: tuple[Start, ...] = get_args(Start)


class Problem(NamedTuple):
    """What a method is given: a sample, and what is known about it."""

    x: Float[jax.Array, "n d"]
    """(n, d) inputs."""
    y: Float[jax.Array, " n *m"]
    """(n,) labels, or (n, m)."""
    weights: Float[jax.Array, " n"]
    """(n,) sample weights, zero for padding."""
    noise_std: Float[jax.Array, "*m"]
    """() or (m,): noise level for which the label transforms were built; also the starting value of EM."""
    transforms: SpectralTransforms | None
    """Label transforms of the fitted activation at that noise; None for a method that uses no moments."""
    more_transforms: tuple[SpectralTransforms, ...] = ()
    """Of other orders (`MethodConfig.more_orders`), for a method that tries several."""


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The static choices of a fit; hashable, one compiled program each. `FitOptions` explains the options."""

    fn: ScalarFunction
    num_experts: int
    order: int
    """Of the tensor that is decomposed, 3 or 4."""
    more_orders: tuple[int, ...] = ()
    noise: NoiseModel = FitOptions.noise
    fit_intercept: bool = FitOptions.fit_intercept
    num_restarts: int = FitOptions.num_restarts
    num_starts: int | None = FitOptions.num_starts
    polish: bool = FitOptions.polish
    max_iterations: int = FitOptions.max_iterations
    num_polar_iterations: int = 8
    ridge: float = FitOptions.ridge
    chunk_size: int | None = FitOptions.chunk_size
    num_residual_passes: int | None = FitOptions.num_residual_passes
    log_density: LogDensity | None = None
    """x (d,) -> log p(x) of inputs that are not standard normal; their moments are then a start, not an estimate."""
    start: Start = FitOptions.start
    record_path: bool = False
    """Whether `MethodResult.path` is kept."""


class MethodResult(NamedTuple):
    """An estimate and how it was reached."""

    params: MoEParams
    mixing_weights: Float[jax.Array, " k"]
    """(k,) estimated E[P_i]."""
    history: Float[jax.Array, " h"]
    """(h,) objective in nats at every pass over the data, stage after stage; NaN where a stage had converged. It is the
    log-likelihood less the ridge's penalty on the gates, which EM and the polish never lower; of gradient descent, without it."""
    num_iterations: Int[jax.Array, ""]
    """() int32 passes over the data made, those of pilots, moments and every start included."""
    status: Int[jax.Array, ""]
    """() int32, a `Status`; 0 is ok."""
    spectral: SpectralEstimate | None
    """The moments' diagnostics, where the method uses moments."""
    optima: Float[jax.Array, " p"] | None = None
    """(p,) log-likelihoods in nats of the optima that a search kept, best first, on the sample it searched."""
    path: MoEParams | None = None
    """Leaves (h, ..): the parameters at every entry of `history`, NaN where that is; None unless `record_path` asks for it."""


Method = Callable[[jax.Array, Problem, MethodConfig], MethodResult]
Moments = Literal["required", "optional", "none"]
Slopes = Literal["used", "polish", "unused"]


class Registered(NamedTuple):
    """A method and what it takes (`register_method`)."""

    method: Method
    moments: Moments
    order: int | None
    several_outputs: bool
    slopes: Slopes


_REGISTRY: Registry[Registered] = Registry("method")


def register_method(
    name: str,
    method: Method,
    *,
    moments: Moments,
    order: int | None = None,
    several_outputs: bool = False,
    slopes: Slopes = "used",
    replace: bool = False,
) -> Method:
    """Make a method available under a name to `fit`, trials and sweeps.

    Args:
        name: an identifier.
        method: (key, problem, config) -> MethodResult, traceable by JAX.
        moments: whether `problem.transforms` must be there ("required": an activation without a usable order is refused), are used
            where there is a usable order ("optional"), or are never there ("none").
        order: of the moments, where the method takes no other; None leaves it to the user or to the predicted error.
        several_outputs: whether labels may be (n, m).
        slopes: whether the experts go along the slope of the activation ("used": a step function is refused, because its slope is
            zero), in the polish only ("polish"), or not at all ("unused").
        replace: whether a built-in name may be given to `method`; a name of your own may always be given anew.

    Raises:
        ValueError: the name is no identifier or built in, `method` is not callable, or `moments` or `slopes` is another word.

    Examples:
        >>> def two_starts(key, problem, config):
        ...     return moejax.methods.multistart(key, problem, dataclasses.replace(config, num_starts=2))
        >>> moejax.register_method("two_starts", two_starts, moments="optional") is two_starts
        True
    """
    require(callable(method), "method", "a function", method)
    if moments not in get_args(Moments):
        raise ValueError(f"moments: expected one of {', '.join(get_args(Moments))}, got {moments!r}")
    if slopes not in get_args(Slopes):
        raise ValueError(f"slopes: expected one of {', '.join(get_args(Slopes))}, got {slopes!r}")
    _REGISTRY.register(name, Registered(method, moments, order, several_outputs, slopes), replace)
    return method


def method_names() -> tuple[str, ...]:
    """The registered names."""
    return _REGISTRY.names()


def get_method(name: str) -> Method:
    """The method behind a name.

    Raises:
        ValueError: it is not registered; the message names the nearest.
    """
    return lookup_method(name).method


def moments_of(name: str) -> Moments:
    """Whether the method needs label transforms."""
    return lookup_method(name).moments


def lookup_method(name: str) -> Registered:
    """The method behind a name, and what it takes.

    Raises:
        ValueError: it is not registered; the message names the nearest.
    """
    return _REGISTRY.lookup(name)


def require_slopes(name: str, activation: ActivationLike, *, polish: bool) -> None:
    """Refuse a step function as the activation of a method that goes along its slope.

    Raises:
        ValueError: the method is not registered, or does, and the activation changes in jumps only.
    """
    slopes = lookup_method(name).slopes
    uses = slopes == "used" or (slopes == "polish" and polish)
    if uses and activation_facts(get_activation(activation)).stepped:
        raise ValueError(
            f"activation: expected a function with a slope for method {name!r}, got {activation_name(activation)}, which "
            'changes in jumps only; take a smooth step such as sigmoid(10 t), or method="spectral", which uses moments only'
        )


def finish(
    params, history, num_iterations, converged, problem: Problem, spectral: SpectralEstimate | None
) -> MethodResult:
    """A result that is ok if the method converged in its own objective, from however poor a start; moments only start it."""
    finite = jax.tree.reduce(lambda a, b: a & b, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params))
    status = jnp.where(converged, Status.OK, Status.NOT_CONVERGED)
    status = jnp.where(finite, status, Status.NOT_FINITE).astype(jnp.int32)
    return MethodResult(
        params, mean_gates(params, problem.x, problem.weights), history, num_iterations, status, spectral
    )


def with_path(result: MethodResult, config: MethodConfig, *stages: MoEParams | None) -> MethodResult:
    """The result with the paths of its stages, leaves (h_s, ..), one after another, if the configuration asks for them."""
    if not config.record_path:
        return result
    nothing = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), result.params)
    return result._replace(path=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), nothing, *stages))
