"""The registry of output families, and the built-in ones."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import brief, require
from moejax.model import discrete_families, real_families
from moejax.model.activations import (
    ActivationLike,
    ScalarFunction,
    activation_and_slope,
    activation_facts,
    activation_name,
    apply_activation,
    get_activation,
)
from moejax.model.family import Channel, Family, activation_of, gaussian, is_gaussian
from moejax.model.family_checks import require_sound
from moejax.registry import Registry

FamilyMaker = Callable[..., Family]
"""(numbers in brackets after the name ..) -> Family."""
FamilyLike = str | Family
ChannelLike = ActivationLike | Family
"""The type of an argument `activation` of the model's functions: g by name or as a function, or a family."""

_REGISTRY: Registry[FamilyMaker] = Registry("family")
_WITH_NUMBERS = re.compile(r"(\w+)\(([^()]*)\)")


def register_family(
    name: str, family: Family | FamilyMaker, *, replace: bool = False
) -> Family | FamilyMaker:
    """Make an output family available under a name to `fit`, `MoERegressor`, sweeps and the command line.

    Args:
        name: an identifier.
        family: a `Family`; or a function of numbers that returns one, for names such as "binomial(10)". It is called once for
            each combination of numbers.
        replace: if true, a built-in name may be given to `family`; your own names may always be given again.

    Returns:
        `family` itself.

    Raises:
        ValueError: the name is no identifier, built in, or not the family's own; or the log-density of a `Family` is not
            normalised, not finite, or without derivatives, with the number that is wrong. The families that a function makes are
            checked when they are made.

    Examples:
        >>> def log_density(y, t, s):  # the number of failures before the first success
        ...     return -jax.nn.softplus(t) + y * jax.nn.log_sigmoid(t)
        >>> geometric = moejax.Family("geometric", log_density, support="counts", mean=lambda t, s: jnp.exp(t))
        >>> _ = moejax.register_family("geometric", geometric)
        >>> "geometric" in moejax.family_names()
        True
    """
    if isinstance(family, Family):
        one = family
        _require_named(one, name)
        require_sound(one)
        _REGISTRY.register(name, lambda: one, replace)
        return family
    require(callable(family), f"family {name}", "a Family, or a function that makes one", family)
    maker = family

    @functools.cache
    def checked(*numbers: float) -> Family:
        made = maker(*numbers)
        require(isinstance(made, Family), f"family {name}", "a function that makes a Family", made)
        _require_named(made, name)
        require_sound(made)
        return made

    _REGISTRY.register(name, checked, replace)
    return family


def _require_named(family: Family, name: str) -> None:
    """Refuse a family whose own name, without its numbers, is not the registered one, by which results find it again."""
    words = f"the name of the registration, {name!r}, before its numbers"
    require(family.name.partition("(")[0] == name, "family: name", words, family.name)


def family_names() -> tuple[str, ...]:
    """The registered names, in the order of their registration.

    Examples:
        >>> moejax.family_names()[:4]
        ('gaussian', 'student_t', 'laplace', 'poisson')
    """
    return _REGISTRY.names()


def get_family(family: FamilyLike, activation: ActivationLike = "linear") -> Family:
    """The family behind a name such as "poisson" or "binomial(10)", of g of the linear predictor.

    Args:
        family: a registered name, with its numbers in brackets if it has any, or a family.
        activation: g. The parameter of the family (a mean, a log mean, the logit of a probability) is g(a_i . x + b_i).

    Raises:
        ValueError: an unknown name or wrong numbers.

    Examples:
        >>> moejax.get_family("binomial(10)").support
        10
    """
    fn = get_activation(activation)
    if isinstance(family, Family):
        linear = fn is get_activation("linear")
        return gaussian(fn) if is_gaussian(family) and not linear else _of_activation(family, fn)
    name, numbers = _name_and_numbers(family)
    if name == "gaussian" and not numbers:
        return gaussian(fn)
    try:
        made = _REGISTRY.lookup(name)(*numbers)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        example = _EXAMPLES.get(name, name)
        raise ValueError(f"family: expected {name} with its numbers, as {example}, got {family!r}") from None
    return _of_activation(made, fn)


def _name_and_numbers(family: str) -> tuple[str, tuple[float, ...]]:
    with_numbers = _WITH_NUMBERS.fullmatch(family.strip()) if isinstance(family, str) else None
    if with_numbers is None:
        return family, ()  # the registry refuses what is no name
    try:
        return with_numbers[1], tuple(float(number) for number in with_numbers[2].split(","))
    except ValueError:
        raise ValueError(f"family: expected numbers in the brackets, got {brief(family)}") from None


@functools.lru_cache(maxsize=256)
def _of_activation(family: Family, fn: ScalarFunction) -> Family:
    """The law of a label whose parameter is g of the linear predictor."""
    if fn is get_activation("linear") or fn is family.activation:
        return family
    plain = family.activation is None or family.activation is get_activation("linear")
    require(plain, "activation", f"none beside that of the family {family.name}", activation_name(fn))

    def g(t: jax.Array) -> jax.Array:
        return apply_activation(fn, t)

    def slope_squared(t: jax.Array) -> jax.Array:
        return activation_and_slope(fn, t)[1] ** 2

    information, variance, sample, adapt = family.information, family.variance, family.sample, family.adapt
    return dataclasses.replace(
        family,
        log_density=lambda y, t, s: family.log_density(y, g(t), s),
        mean=lambda t, s: family.mean(g(t), s),
        sample=None if sample is None else lambda key, t, s: sample(key, g(t), s),
        variance=None if variance is None else lambda t, s: variance(g(t), s),
        information=None if information is None else lambda t, s: information(g(t), s) * slope_squared(t),
        smooth=family.smooth and not activation_facts(fn).kinked,
        activation=fn,
        marginal_tells_norm=True,
        adapt=None
        if adapt is None
        else lambda y, t, s, shares: _of_activation(
            adapt(y, None if t is None else np.asarray(g(jnp.asarray(t))), s, shares), fn
        ),
    )


def is_registered(family: Family) -> bool:
    """True if the family's name, and its activation, are enough to find it again."""
    fn = family.activation
    try:
        return get_family(family.name, get_activation("linear") if fn is None else fn) is family
    except ValueError:
        return False


def get_channel(channel: ChannelLike) -> Channel:
    """An activation's function, or a family as it is."""
    return channel if isinstance(channel, Family) else get_activation(channel)


def channel_name(channel: ChannelLike) -> str:
    """The name to print for a channel."""
    return channel.name if isinstance(channel, Family) else activation_name(channel)


def channel_of(family: FamilyLike, activation: ActivationLike) -> Channel:
    """The channel of the options `family` and `activation`: g itself if the family is Gaussian.

    Raises:
        ValueError: as in `get_family`.
    """
    made = get_family(family, activation)
    return activation_of(made) if is_gaussian(made) else made


_EXAMPLES = {"binomial": "binomial(10)", "ordinal": "ordinal(5)", "student_t": "student_t(3)"}
"""Names with numbers, as a message shows them."""


for _name, _maker in {
    "gaussian": lambda: gaussian(get_activation("linear")),
    "student_t": real_families.student_t,
    "laplace": real_families.laplace,
    "poisson": discrete_families.poisson,
    "negative_binomial": discrete_families.negative_binomial,
    "zero_inflated_poisson": discrete_families.zero_inflated_poisson,
    "binomial": discrete_families.binomial,
    "bernoulli": discrete_families.bernoulli,
    "ordinal": discrete_families.ordinal,
    "gamma": real_families.gamma,
    "exponential": real_families.exponential,
    "lognormal": real_families.lognormal,
}.items():
    _REGISTRY.register(_name, functools.cache(_maker))
