"""The registry of methods: each maps a sample to an estimate, inside one compiled program.

A method is a function (key, problem, config) -> MethodResult: `problem` is data (arrays), `config` is static. A new one is
registered under a name with `register_method`; `fit`, trials and sweeps then accept the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.checks import require
from moejax.likelihood.collapse import rounding_noise
from moejax.likelihood.em import RIDGE
from moejax.likelihood.free_columns import FreeColumns
from moejax.methods.options import FitOptions, Start
from moejax.model.families import ChannelLike, channel_name, get_channel
from moejax.model.family import Channel, Nuisances, as_family, channel_facts, is_gaussian
from moejax.model.inputs import LogDensity
from moejax.model.mixture import MoEParams, NoiseModel, mean_gates
from moejax.model.status import Status
from moejax.moments.label_transforms import LabelTransform
from moejax.moments.spectral import SpectralEstimate, SpectralTransforms
from moejax.registry import Registry

STARTS: tuple[Start, ...] = get_args(Start)


class Problem(NamedTuple):
    """The argument of a method: a sample, and its known properties."""

    x: Float[jax.Array, "n d"]
    """(n, d) inputs."""
    y: Float[jax.Array, " n *m"]
    """(n,) labels, or (n, m)."""
    weights: Float[jax.Array, " n"]
    """(n,) sample weights, zero for padding."""
    noise_std: Float[jax.Array, "*m"]
    """() or (m,): noise level for which the label transforms were built; also the starting value of EM."""
    transforms: SpectralTransforms | None
    """Label transforms of the fitted activation at that noise; None if the method uses no moments."""
    more_transforms: tuple[SpectralTransforms, ...] = ()
    """Label transforms of other orders (`MethodConfig.more_orders`), for a method that tries several."""
    least_noise: Float[jax.Array, "*m"] | None = None
    """() or (m,): the least noise of an expert if each has its own (`collapse.noise_floor`); None: the rounding of the labels."""
    nuisances: Nuisances | None = None
    """Norm, intercept and dispersion of the experts of another family than the Gaussian; None: norm 1, no intercept."""
    third: LabelTransform[Any] | None = None
    """Order-3 label transform of a third moment that is not whitened; None unless the method needs it, or has no other moments."""

    @property
    def resolution(self) -> Float[jax.Array, "*m"]:
        """() or (m,): `least_noise`, or the rounding of the labels if that is larger."""
        rounding = jnp.broadcast_to(rounding_noise(self.y, self.weights), self.y.shape[1:])
        return rounding if self.least_noise is None else jnp.maximum(self.least_noise, rounding)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The static choices of a fit; hashable, one compiled program each. `FitOptions` explains the options."""

    fn: Channel
    """g of Gaussian labels, or another output family."""
    num_experts: int
    order: int
    """Order of the tensor that is decomposed, 3 or 4."""
    more_orders: tuple[int, ...] = ()
    noise: NoiseModel = FitOptions.noise
    fit_intercept: bool = FitOptions.fit_intercept
    num_restarts: int = FitOptions.num_restarts
    num_starts: int | None = FitOptions.num_starts
    polish: bool = FitOptions.polish
    max_iterations: int = FitOptions.max_iterations
    num_polar_iterations: int = 8
    ridge: float = RIDGE
    chunk_size: int | None = FitOptions.chunk_size
    num_residual_passes: int | None = FitOptions.num_residual_passes
    log_density: LogDensity | None = None
    """x (d,) -> log p(x) of inputs that are not standard normal; their moments are then a start, not an estimate."""
    start: Start = FitOptions.start
    record_path: bool = False
    """If true, `MethodResult.path` is kept."""
    expert_steps: int = 1
    """Gauss-Newton steps of the experts in every M-step of joint EM, each with a pass over the data."""
    economical: bool = False
    """If true, as in trials, which measure their end anyway, the last step of the polish is not evaluated (see `polish`)."""
    columns: FreeColumns | None = None
    """The columns whose coefficients are free, if gates and experts do not have the same inputs; None for all. `fit_intercept` then
    says whether there is a column of ones, and `has_expert_biases` whether the experts use it."""

    @property
    def has_expert_biases(self) -> bool:
        """True if the biases of the experts are fitted."""
        return self.fit_intercept if self.columns is None else self.columns.has_expert_biases


class SearchEnd(NamedTuple):
    """How far a search for the best optimum went, and why no further."""

    num_starts: Int[jax.Array, ""]
    """() int32 starts that were made, children included."""
    settled: Bool[jax.Array, ""]
    """() bool: it ended early, because its independent starts found nothing else; false if it made all its generations."""
    by_descent: Bool[jax.Array, ""]
    """() bool: it ended early because runs of gradient descent agreed; the next two fields are then about these runs."""
    num_distinct: Int[jax.Array, ""]
    """() int32 distinct optima of the independent starts."""
    num_best: Int[jax.Array, ""]
    """() int32 independent starts that reached the best of these."""
    unseen: Float[jax.Array, ""]
    """() the expected share of all starts that lead to an optimum which none of these reached; infinite if none climbed alone."""


class Finalists(NamedTuple):
    """The optima of a search that were polished, in no order."""

    params: MoEParams
    """Leaves (f, ..)."""
    log_likelihoods: Float[jax.Array, " f"]
    """(f,) nats; minus infinity for one that was not polished, or in which an expert's noise ran off to zero."""


class MethodResult(NamedTuple):
    """An estimate, its history and its diagnostics."""

    params: MoEParams
    mixing_weights: Float[jax.Array, " k"]
    """(k,) estimated E[P_i]."""
    history: Float[jax.Array, " h"]
    """(h,) objective in nats at every pass over the data, stage after stage; NaN after a stage has converged. It is the
    log-likelihood minus the ridge's penalty on the gates, which EM and the polish never lower; for gradient descent, without
    penalty."""
    num_iterations: Int[jax.Array, ""]
    """() int32 passes over the data, including those of pilots, moments and every start."""
    status: Int[jax.Array, ""]
    """() int32, a `Status`; 0 is ok."""
    spectral: SpectralEstimate | None
    """The moments' diagnostics, if the method uses moments."""
    optima: Float[jax.Array, " p"] | None = None
    """(p,) log-likelihoods in nats of the optima that a search kept, best first, on the sample it searched."""
    search: SearchEnd | None = None
    """The end of a search."""
    finalists: Finalists | None = None
    """The polished optima of a search."""
    path: MoEParams | None = None
    """Leaves (h, ..): the parameters at every entry of `history`, NaN where that is NaN; None unless `record_path` asks for it."""


Method = Callable[[jax.Array, Problem, MethodConfig], MethodResult]
Moments = Literal["required", "optional", "none", "third"]
Slopes = Literal["used", "polish", "unused"]


class Registered(NamedTuple):
    """A method and its requirements (`register_method`)."""

    method: Method
    moments: Moments
    order: int | None
    several_outputs: bool
    slopes: Slopes
    staged: bool
    wide: bool = False
    separate_inputs: bool = False
    families: bool = False


_REGISTRY: Registry[Registered] = Registry("method")


def register_method(
    name: str,
    method: Method,
    *,
    moments: Moments,
    order: int | None = None,
    several_outputs: bool = False,
    slopes: Slopes = "used",
    staged: bool = False,
    wide: bool = False,
    separate_inputs: bool = False,
    families: bool = False,
    replace: bool = False,
) -> Method:
    """Make a method available under a name to `fit`, trials and sweeps.

    Args:
        name: an identifier.
        method: (key, problem, config) -> MethodResult, traceable by JAX; docs/reference/methods.md describes these types.
        moments: "required" if the method needs `problem.transforms` (an activation without a usable order is refused), "optional"
            if it uses them when there is a usable order, "none" if it never gets them, "third" if it needs `problem.third` instead,
            for which order 2 need not be usable.
        order: the only order of the moments that the method accepts; None leaves it to the user or to the predicted error.
        several_outputs: if true, labels may be (n, m).
        slopes: "used" if the steps of the experts need the slope of the activation (a step function is refused, because its slope
            is zero), "polish" if only the polish does, "unused" if none does.
        staged: if true, `fit` does not compile the method as a whole: it consists of compiled stages (`moejax.methods.stages`).
        wide: if true, the method is for many inputs, and `fit` forms no d x d matrix either: it standardises the inputs column by
            column instead of whitening them, and gives no standard errors.
        separate_inputs: if true, the method fits the coefficients of `config.columns` only, and leaves the others zero; `fit` then
            accepts it with gates that are constant or have other inputs than the experts.
        families: if true, `config.fn` may be any output family; otherwise only Gaussian labels are accepted.
        replace: if true, a built-in name may be given to `method`; your own names may always be given again.

    Raises:
        ValueError: the name is no identifier or built in, `method` is not callable, or `moments` or `slopes` is none of these
            words.

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
    _REGISTRY.register(
        name,
        Registered(method, moments, order, several_outputs, slopes, staged, wide, separate_inputs, families),
        replace,
    )
    return method


def method_names() -> tuple[str, ...]:
    """The registered names."""
    return _REGISTRY.names()


def get_method(name: str) -> Method:
    """The method behind a name.

    Raises:
        ValueError: the name is not registered; the message names the nearest.
    """
    return lookup_method(name).method


def moments_of(name: str) -> Moments:
    """The method's need of label transforms: "required", "optional", "none" or "third"."""
    return lookup_method(name).moments


def lookup_method(name: str) -> Registered:
    """The method behind a name, and its requirements.

    Raises:
        ValueError: the name is not registered; the message names the nearest.
    """
    return _REGISTRY.lookup(name)


def require_slopes(name: str, activation: ChannelLike, *, polish: bool) -> None:
    """Refuse a step function as the activation of a method that needs its slope.

    Raises:
        ValueError: the method is not registered, or it needs the slope and the activation changes in jumps only.
    """
    slopes = lookup_method(name).slopes
    uses = slopes == "used" or (slopes == "polish" and polish)
    if uses and channel_facts(get_channel(activation)).stepped:
        raise ValueError(
            f"activation: expected a function with a slope for method {name!r}, got {channel_name(activation)}, which "
            'changes in jumps only; take a smooth step such as sigmoid(10 t), or method="spectral", which uses moments only'
        )


def require_family(name: str, channel: Channel) -> None:
    """Refuse labels that are not Gaussian for a method that is made for these.

    Raises:
        ValueError: with the methods that accept the family.
    """
    if is_gaussian(channel) or lookup_method(name).families:
        return
    others = ", ".join(other for other, registered in _REGISTRY.items() if registered.families)
    raise ValueError(
        f"method: expected one for any family ({others}) with family {as_family(channel).name}, got {name!r}"
    )


def noise_while_inexact(config: MethodConfig) -> NoiseModel:
    """The noise model of a stage whose experts are inexact: their error adds to the noise, so that a known one is free too."""
    return "shared" if config.noise == "known" else config.noise


def least_noise_of(problem: Problem, config: MethodConfig) -> Float[jax.Array, "*m"] | None:
    """() or (m,): the problem's `resolution` if every expert has its own noise; else None, because a shared noise has no bound."""
    return problem.resolution if config.noise == "per_expert" else None


def finish(
    params, history, num_iterations, converged, problem: Problem, spectral: SpectralEstimate | None
) -> MethodResult:
    """Return the result of a method: mixing weights from the gates, and the status.

    Args:
        params: the estimate.
        history: (h,) objective in nats at every pass.
        num_iterations: () int32 passes over the data, all of them.
        converged: () bool: the method converged in its own objective. Moments are only its start and do not count.
        problem: the argument of the method.
        spectral: the moments' diagnostics; None without moments.
    """
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
